//! The engine: one thread that owns the device and encodes queued pictures in packed passes.

use crate::{
    model::{PassLimits, VisionModel},
    preprocess::{Normalization, PatchGrid},
};
use bytes::Bytes;
use half::{bf16, f16};
use idefics_common::checkpoint::ModelConfig;
use idefics_kernels::{Backend, DType, Error, Result, Tensor, WeightLoader, weights::Weights};
use std::{collections::VecDeque, ops::Range, thread, time::Instant};
use tokio::sync::{mpsc, oneshot, watch};
use tracing::{Span, info_span};

/// What an engine needs to start.
pub struct EngineOptions {
    /// The checkpoint's weights.
    pub weights: Weights,
    /// The checkpoint's configuration.
    pub model: ModelConfig,
    /// How pixels become numbers.
    pub normalization: Normalization,
    /// Most patches in one pass.
    pub max_batch_patches: usize,
    /// Jobs that may wait.
    pub max_queued_images: usize,
    /// Called with the bytes of each tensor as it is loaded.
    pub progress: Box<dyn Fn(usize) + Send>,
}

/// Why a picture was not encoded.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EngineError {
    /// The queue is full.
    #[error("{0} pictures wait for the vision engine already; try again later")]
    QueueFull(usize),
    /// The engine's thread has ended after a device fault.
    #[error("the vision engine has ended; the replica must be restarted")]
    Ended,
    /// The pass in which the picture took part failed.
    #[error("{0}")]
    Failed(String),
}

/// Image tokens of one picture.
#[derive(Debug)]
pub struct Encoded {
    /// `[tokens, hidden]` row-major, little-endian, of `dtype`.
    pub data: Bytes,
    /// The activation type of the backend.
    pub dtype: DType,
    /// Rows.
    pub tokens: usize,
    /// Columns.
    pub hidden: usize,
    /// Time in the queue.
    pub queue_ms: f64,
    /// Time of the passes in which it took part.
    pub encode_ms: f64,
}

/// A picture to encode.
struct Job {
    sub_images: Vec<PatchGrid>,
    reply: oneshot::Sender<Result<Encoded, EngineError>>,
    span: Span,
    queued_at: Instant,
}

/// A handle on the engine's thread. The thread ends when the last handle is dropped.
#[derive(Clone)]
pub struct Engine {
    jobs: mpsc::Sender<Job>,
    alive: watch::Receiver<bool>,
    device_name: String,
}

impl Engine {
    /// Starts the thread and blocks until the model is loaded.
    ///
    /// # Errors
    /// If the weights are not those of `options.model`, or the device has no room.
    pub fn start<B: Backend>(backend: B, options: EngineOptions) -> Result<Self> {
        let (jobs, receiver) = mpsc::channel(options.max_queued_images);
        let (alive_sender, alive) = watch::channel(true);
        let (loaded_sender, loaded) = std::sync::mpsc::channel();
        let device_name = backend.device_name();
        let spawned = thread::Builder::new().name("vision-engine".into()).spawn(move || {
            let _alive = AliveGuard(alive_sender);
            let worker = match Worker::load(backend, options) {
                Ok(worker) => worker,
                Err(error) => return drop(loaded_sender.send(Err(error))),
            };
            drop(loaded_sender.send(Ok(())));
            worker.run(receiver);
        });
        spawned.map_err(|e| Error::Device(format!("the engine's thread cannot be started: {e}")))?;
        loaded.recv().unwrap_or_else(|_| Err(Error::Device("the engine's thread ended while it loaded".into())))?;
        Ok(Self { jobs, alive, device_name })
    }

    /// Image tokens of one picture's sub-images. Dropping the future takes the picture out of the queue.
    ///
    /// # Errors
    /// [`EngineError`]
    pub async fn encode(&self, sub_images: Vec<PatchGrid>) -> Result<Encoded, EngineError> {
        let (reply, answer) = oneshot::channel();
        let job = Job { sub_images, reply, span: info_span!("encode_pass"), queued_at: Instant::now() };
        self.jobs.try_send(job).map_err(|e| match e {
            mpsc::error::TrySendError::Full(_) => EngineError::QueueFull(self.jobs.max_capacity()),
            mpsc::error::TrySendError::Closed(_) => EngineError::Ended,
        })?;
        answer.await.unwrap_or(Err(EngineError::Ended))
    }

    /// Turns false when the thread has ended.
    pub fn alive(&self) -> watch::Receiver<bool> {
        self.alive.clone()
    }

    /// `cpu`, or the name of the card.
    pub fn device_name(&self) -> &str {
        &self.device_name
    }
}

/// Says that the thread has ended, however it ends.
struct AliveGuard(watch::Sender<bool>);

impl Drop for AliveGuard {
    fn drop(&mut self) {
        self.0.send_replace(false);
    }
}

/// A job on its way through the passes.
struct Pending {
    job: Job,
    started_at: Option<Instant>,
    next_sub_image: usize,
    data: Vec<u8>,
}

/// Where the rows of a pass go: sub-images `range` of pending job `job`.
struct Share {
    job: usize,
    range: Range<usize>,
}

struct Worker<B: Backend> {
    backend: B,
    model: VisionModel<B>,
    limits: PassLimits,
    tokens_per_image: usize,
    hidden: usize,
}

impl<B: Backend> Worker<B> {
    fn load(backend: B, options: EngineOptions) -> Result<Self> {
        let config = &options.model;
        let side = config.vision_config.num_patches_per_side();
        let max_patches = options.max_batch_patches.max(side * side);
        let limits = PassLimits { max_patches, max_sub_images: (max_patches / 64).clamp(1, 256) };
        let loader = WeightLoader::new(&backend, &options.weights, &*options.progress);
        let model = VisionModel::load(&backend, &loader, config, &options.normalization, limits)?;
        let (tokens_per_image, hidden) = (config.perceiver_config.resampler_n_latents, config.perceiver_config.hidden_size);
        Ok(Self { model, limits, tokens_per_image, hidden, backend })
    }

    /// Collect, pass, reply: until every handle is gone or the device fails.
    fn run(mut self, mut jobs: mpsc::Receiver<Job>) {
        let mut pending = VecDeque::new();
        loop {
            if pending.is_empty() {
                match jobs.blocking_recv() {
                    Some(job) => pending.push_back(Pending::new(job)),
                    None => return,
                }
            }
            while let Ok(job) = jobs.try_recv() {
                pending.push_back(Pending::new(job));
            }
            pending.retain(|p| !p.job.reply.is_closed());
            let shares = self.fill(&pending);
            if shares.is_empty() {
                continue;
            }
            if let Err(error) = self.pass(&mut pending, &shares) {
                tracing::error!(%error, "vision pass failed");
                let failed = EngineError::Failed(error.to_string());
                for p in pending.drain(..=shares[shares.len() - 1].job) {
                    drop(p.job.reply.send(Err(failed.clone())));
                }
                if matches!(error, Error::Device(_)) {
                    return;
                }
            }
            while pending.front().is_some_and(|p| p.next_sub_image == p.job.sub_images.len()) {
                let Some(done) = pending.pop_front() else { break };
                self.reply(done);
            }
        }
    }

    /// The sub-images of the next pass: first come, first served, as many as fit.
    fn fill(&self, pending: &VecDeque<Pending>) -> Vec<Share> {
        let (mut shares, mut patches, mut sub_images) = (Vec::new(), 0, 0);
        for (job, p) in pending.iter().enumerate() {
            let mut end = p.next_sub_image;
            for grid in &p.job.sub_images[end..] {
                let more = grid.rows * grid.cols;
                // A first one that does not fit alone goes in as well, and is refused by the model with a reason.
                if sub_images > 0 && (patches + more > self.limits.max_patches || sub_images == self.limits.max_sub_images) {
                    break;
                }
                (patches, sub_images, end) = (patches + more, sub_images + 1, end + 1);
            }
            if end > p.next_sub_image {
                shares.push(Share { job, range: p.next_sub_image..end });
            }
            if end < p.job.sub_images.len() {
                break;
            }
        }
        shares
    }

    fn pass(&mut self, pending: &mut VecDeque<Pending>, shares: &[Share]) -> Result<()> {
        let started_at = Instant::now();
        let _span = pending[shares[0].job].job.span.clone().entered();
        let grids: Vec<&PatchGrid> = shares.iter().flat_map(|s| &pending[s.job].job.sub_images[s.range.clone()]).collect();
        let rows = self.model.forward(&self.backend, &grids)?;
        let data = download(&self.backend, rows)?;
        let sub_image_bytes = self.tokens_per_image * self.hidden * rows.dtype().size();
        let mut at = 0;
        for share in shares {
            let p = &mut pending[share.job];
            p.started_at.get_or_insert(started_at);
            p.next_sub_image = share.range.end;
            let bytes = share.range.len() * sub_image_bytes;
            p.data.extend_from_slice(&data[at..at + bytes]);
            at += bytes;
        }
        tracing::debug!(sub_images = grids_len(shares), elapsed_ms = started_at.elapsed().as_secs_f64() * 1e3, "vision pass");
        Ok(())
    }

    fn reply(&self, done: Pending) {
        let started_at = done.started_at.unwrap_or(done.job.queued_at);
        let encoded = Encoded {
            data: done.data.into(),
            dtype: self.backend.activation_dtype(),
            tokens: done.job.sub_images.len() * self.tokens_per_image,
            hidden: self.hidden,
            queue_ms: (started_at - done.job.queued_at).as_secs_f64() * 1e3,
            encode_ms: started_at.elapsed().as_secs_f64() * 1e3,
        };
        drop(done.job.reply.send(Ok(encoded)));
    }
}

fn grids_len(shares: &[Share]) -> usize {
    shares.iter().map(|share| share.range.len()).sum()
}

impl Pending {
    fn new(job: Job) -> Self {
        Self { job, started_at: None, next_sub_image: 0, data: Vec::new() }
    }
}

/// The window of a tensor as little-endian bytes.
fn download<B: Backend>(backend: &B, tensor: &Tensor<B>) -> Result<Vec<u8>> {
    let count = tensor.rows() * tensor.cols();
    match tensor.dtype() {
        DType::F32 => {
            let mut values = vec![0f32; count];
            backend.download(tensor, &mut values)?;
            Ok(values.iter().flat_map(|v| v.to_le_bytes()).collect())
        }
        DType::F16 => {
            let mut values = vec![f16::ZERO; count];
            backend.download(tensor, &mut values)?;
            Ok(values.iter().flat_map(|v| v.to_le_bytes()).collect())
        }
        DType::Bf16 => {
            let mut values = vec![bf16::ZERO; count];
            backend.download(tensor, &mut values)?;
            Ok(values.iter().flat_map(|v| v.to_le_bytes()).collect())
        }
        other => Err(Error::shape("download", format!("{other} is not an activation type"))),
    }
}

//! The engine: one thread that owns the device and encodes queued pictures in packed passes, first come, first served.

use crate::{
    metrics,
    model_runner::{ModelRunner, RunPass, TokensShape},
    preprocess::{Normalization, PatchGrid},
};
use bytes::Bytes;
use idefics_common::{checkpoint::ModelConfig, engine_thread};
use idefics_kernels::{Backend, DType, Error, Result, weights::Weights};
use std::{
    collections::VecDeque,
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Instant,
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};
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
    /// Pictures that may be admitted and not yet encoded.
    pub max_queued_images: usize,
    /// Called with the bytes of each tensor as it is loaded.
    pub progress: Box<dyn Fn(usize) + Send>,
}

/// Why a picture was not encoded.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EngineError {
    /// As many pictures are admitted as may be.
    #[error("{0} pictures wait for the vision engine already; try again later")]
    QueueFull(usize),
    /// The engine's thread has ended after a device fault.
    #[error("the vision engine has ended; ask another replica and restart this one")]
    Ended,
    /// The pass in which the picture took part failed.
    #[error("{0}")]
    Failed(String),
}

/// What happens in the engine and in front of it.
#[derive(Debug, Default)]
pub struct EngineStats {
    /// Pictures that are admitted and not yet encoded.
    pub num_queued_images: AtomicUsize,
    /// Of those, pictures that the engine has: they wait for a pass or take part in one.
    pub num_ready_images: AtomicUsize,
    /// Forward passes.
    pub num_passes: AtomicU64,
    /// Sub-images in those passes.
    pub num_sub_images: AtomicU64,
    /// Pictures that were computed, be it for nobody in the end.
    pub num_computed_images: AtomicU64,
    /// Pictures that were given up because nobody waited for them any more, before their last pass.
    pub num_abandoned_images: AtomicU64,
    /// Calls that took part in the work for another one.
    pub num_coalesced_calls: AtomicU64,
    /// Calls that were answered from the cache.
    pub num_cached_calls: AtomicU64,
    /// Bytes in the cache.
    pub output_cache_bytes: AtomicUsize,
}

/// Counts one for as long as it lives, in the engine's statistics and in the process's metrics.
struct Counted {
    stats: Arc<EngineStats>,
    count: fn(&EngineStats) -> &AtomicUsize,
    gauge: ::metrics::Gauge,
}

impl Counted {
    fn new(stats: &Arc<EngineStats>, count: fn(&EngineStats) -> &AtomicUsize, gauge: ::metrics::Gauge) -> Self {
        count(stats).fetch_add(1, Ordering::Relaxed);
        gauge.increment(1.0);
        Self { stats: Arc::clone(stats), count, gauge }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        (self.count)(&self.stats).fetch_sub(1, Ordering::Relaxed);
        self.gauge.decrement(1.0);
    }
}

/// The right to have one picture encoded. Given back when it is dropped.
pub struct QueuePermit {
    _permit: OwnedSemaphorePermit,
    _counted: Counted,
}

/// A picture to encode.
pub struct Picture {
    /// Its patches.
    pub sub_images: Vec<PatchGrid>,
    /// From [`Engine::admit`]. Both permits are given back when the engine has no more to do with the picture.
    pub queue_permit: QueuePermit,
    /// One of the caller's, who bounds how many pictures hold patches.
    pub memory_permit: OwnedSemaphorePermit,
    /// Called on the engine's thread with the complete result, before [`Engine::encode`] returns it, and also if nobody waits
    /// for that any more.
    pub on_encoded: Box<dyn FnOnce(&Encoded) + Send>,
}

/// Image tokens of one picture. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Encoded {
    /// `[tokens, hidden]` row-major, little-endian, of `dtype`.
    pub data: Bytes,
    /// The activation type of the backend.
    pub dtype: DType,
    /// Rows.
    pub tokens: usize,
    /// Columns.
    pub hidden: usize,
    /// Begin of the first pass in which it took part.
    pub started_at: Instant,
    /// End of the last pass.
    pub ended_at: Instant,
}

/// Its fields are dropped in this order: who learns from `reply` that it is over finds its permits given back.
struct Job {
    picture: Picture,
    _counted: Counted,
    span: Span,
    reply: oneshot::Sender<Result<Encoded, EngineError>>,
}

/// A handle on the engine's thread. The thread ends when the last handle is dropped.
#[derive(Clone)]
pub struct Engine {
    jobs: mpsc::UnboundedSender<Job>, // bounded by `queue`
    queue: Arc<Semaphore>,
    max_queued_images: usize,
    stats: Arc<EngineStats>,
    alive: watch::Receiver<bool>,
    device_name: String,
}

impl Engine {
    /// Starts the thread and blocks until the model is loaded.
    ///
    /// # Errors
    /// If the weights are not those of `options.model`, or the device has no room.
    pub fn start<B: Backend>(backend: B, options: EngineOptions) -> Result<Self> {
        let (device_name, max_queued_images) = (backend.device_name(), options.max_queued_images);
        Self::start_with(device_name, max_queued_images, move || ModelRunner::load(backend, &options))
    }

    /// Starts a thread that loads a runner of passes and works with it; blocks until it is loaded.
    ///
    /// # Errors
    /// Those of `load`.
    pub fn start_with<R: RunPass>(
        device_name: String,
        max_queued_images: usize,
        load: impl FnOnce() -> Result<R> + Send + 'static,
    ) -> Result<Self> {
        let (jobs, receiver) = mpsc::unbounded_channel();
        let stats = Arc::new(EngineStats::default());
        let worker_stats = Arc::clone(&stats);
        let run = |runner: R| Worker { shape: runner.tokens_shape(), runner, stats: worker_stats }.run(receiver);
        let alive = engine_thread::start("vision-engine", load, run, Error::Device)?;
        Ok(Self { jobs, queue: Arc::new(Semaphore::new(max_queued_images)), max_queued_images, stats, alive, device_name })
    }

    /// Admits a picture, or refuses it at once: ask before anything costly is done for it.
    ///
    /// # Errors
    /// [`EngineError::QueueFull`]
    pub fn admit(&self) -> Result<QueuePermit, EngineError> {
        let permit = Arc::clone(&self.queue).try_acquire_owned().map_err(|_| {
            metrics::refused();
            EngineError::QueueFull(self.max_queued_images)
        })?;
        let counted = Counted::new(&self.stats, |stats| &stats.num_queued_images, metrics::images_queued());
        Ok(QueuePermit { _permit: permit, _counted: counted })
    }

    /// Image tokens of one picture's sub-images. Dropping the future takes the picture out of the queue; if it takes part in a
    /// pass, that goes on, and further passes for it are not made.
    ///
    /// # Errors
    /// [`EngineError`]
    pub async fn encode(&self, picture: Picture) -> Result<Encoded, EngineError> {
        if picture.sub_images.is_empty() {
            return Err(EngineError::Failed("picture has no sub-images, expected 1 or more".into()));
        }
        let (reply, answer) = oneshot::channel();
        let counted = Counted::new(&self.stats, |stats| &stats.num_ready_images, metrics::images_ready());
        let job = Job { picture, _counted: counted, span: info_span!("encode_pass"), reply };
        self.jobs.send(job).map_err(|_| EngineError::Ended)?;
        answer.await.unwrap_or(Err(EngineError::Ended))
    }

    /// What has happened so far.
    pub fn stats(&self) -> &Arc<EngineStats> {
        &self.stats
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

/// A job on its way through the passes.
struct Pending {
    job: Job,
    started_at: Option<Instant>,
    next_sub_image: usize,
    rows: Rows,
}

impl Pending {
    fn new(job: Job) -> Self {
        Self { job, started_at: None, next_sub_image: 0, rows: Rows::new(0) }
    }
}

/// Room for a picture's tokens, aligned for every element type.
struct Rows {
    words: Vec<u32>,
    bytes: usize,
}

impl Rows {
    fn new(bytes: usize) -> Self {
        Self { words: vec![0; bytes.div_ceil(4)], bytes }
    }
}

impl AsRef<[u8]> for Rows {
    fn as_ref(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.words)[..self.bytes]
    }
}

struct Worker<R> {
    runner: R,
    shape: TokensShape,
    stats: Arc<EngineStats>,
}

impl<R: RunPass> Worker<R> {
    /// Collect, pass, reply: until every handle is gone or the device fails.
    fn run(mut self, mut jobs: mpsc::UnboundedReceiver<Job>) {
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
            self.give_up_abandoned(&mut pending);
            let shares = self.fill(&pending);
            if let Err(error) = self.pass(&mut pending, &shares) {
                tracing::error!(%error, "vision pass failed");
                let failed = EngineError::Failed(error.to_string());
                for p in pending.drain(..shares.len()) {
                    let Job { picture, _counted, reply, .. } = p.job;
                    drop((picture, _counted));
                    drop(reply.send(Err(failed.clone())));
                }
                if matches!(error, Error::Device(_)) {
                    return;
                }
            }
            while let Some(done) = pending.pop_front_if(|p| p.next_sub_image == p.job.picture.sub_images.len()) {
                self.reply(done);
            }
        }
    }

    fn give_up_abandoned(&self, pending: &mut VecDeque<Pending>) {
        let before = pending.len();
        pending.retain(|p| !p.job.reply.is_closed());
        let abandoned = (before - pending.len()) as u64;
        self.stats.num_abandoned_images.fetch_add(abandoned, Ordering::Relaxed);
        metrics::abandoned(abandoned);
    }

    /// The sub-images of the next pass, a range for each of the first pictures: first come, first served, as many as fit. A
    /// picture is never passed over for a smaller one behind it; what does not fit of it leads the next pass.
    fn fill(&self, pending: &VecDeque<Pending>) -> Vec<Range<usize>> {
        let limits = self.runner.limits();
        let (mut shares, mut patches, mut sub_images) = (Vec::new(), 0, 0);
        for p in pending {
            let mut end = p.next_sub_image;
            for grid in &p.job.picture.sub_images[end..] {
                let more = grid.len();
                // A first one that does not fit alone goes in as well, and is refused by the model with a reason.
                if sub_images > 0 && (patches + more > limits.max_patches || sub_images == limits.max_sub_images) {
                    break;
                }
                (patches, sub_images, end) = (patches + more, sub_images + 1, end + 1);
            }
            if end > p.next_sub_image {
                shares.push(p.next_sub_image..end);
            }
            if end < p.job.picture.sub_images.len() {
                break;
            }
        }
        shares
    }

    fn pass(&mut self, pending: &mut VecDeque<Pending>, shares: &[Range<usize>]) -> Result<()> {
        if shares.is_empty() {
            return Ok(());
        }
        let started_at = Instant::now();
        let _span = pending[0].job.span.clone().entered();
        let (mut grids, mut outputs): (Vec<&PatchGrid>, Vec<&mut [u8]>) = Default::default();
        for (p, share) in pending.iter_mut().zip(shares) {
            let sub_images = &p.job.picture.sub_images;
            if p.started_at.is_none() {
                p.started_at = Some(started_at);
                p.rows = Rows::new(sub_images.len() * self.shape.bytes());
            }
            grids.extend(&sub_images[share.clone()]);
            let bytes = share.start * self.shape.bytes()..share.end * self.shape.bytes();
            outputs.push(&mut bytemuck::cast_slice_mut(&mut p.rows.words)[bytes]);
        }
        let (sub_images, patches) = (grids.len(), grids.iter().map(|grid| grid.len()).sum());
        self.runner.run(&grids, &mut outputs)?;
        for (p, share) in pending.iter_mut().zip(shares) {
            p.next_sub_image = share.end;
        }
        self.stats.num_passes.fetch_add(1, Ordering::Relaxed);
        self.stats.num_sub_images.fetch_add(sub_images as u64, Ordering::Relaxed);
        let elapsed = started_at.elapsed();
        metrics::pass(elapsed, sub_images, patches);
        tracing::debug!(sub_images, patches, elapsed_ms = elapsed.as_secs_f64() * 1e3, "vision pass");
        Ok(())
    }

    fn reply(&self, done: Pending) {
        let Pending { job, started_at, rows, .. } = done;
        let ended_at = Instant::now();
        let encoded = Encoded {
            data: Bytes::from_owner(rows),
            dtype: self.shape.dtype,
            tokens: job.picture.sub_images.len() * self.shape.tokens,
            hidden: self.shape.hidden,
            started_at: started_at.unwrap_or(ended_at),
            ended_at,
        };
        let Picture { on_encoded, queue_permit, memory_permit, sub_images } = job.picture;
        on_encoded(&encoded);
        drop((sub_images, memory_permit, queue_permit, job._counted));
        drop(job.reply.send(Ok(encoded)));
    }
}

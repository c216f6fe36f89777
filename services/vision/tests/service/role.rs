//! A running role whose passes the test lets through, and requests to it.

use crate::{checkpoint::checkpoint, fake_decoder::FakeDecoder};
use idefics_common::{
    channel::{GrpcChannel, in_process},
    serve::Shutdown,
};
use idefics_kernels::{
    Error, Result,
    cpu::{Cpu, CpuOptions},
    weights::Weights,
};
use idefics_proto::{
    decoder::v1::decoder_service_server::DecoderServiceServer,
    vision::v1::{
        EncodeRequest, EncodeResponse, GetInfoRequest, GetInfoResponse, PreprocessOptions, vision_service_client::VisionServiceClient,
    },
};
use idefics_vision::{
    Config, Engine, EngineOptions, EngineStats, IN_PROCESS, Vision,
    model::PassLimits,
    model_runner::{ModelRunner, RunPass, TokensShape},
    preprocess::{Normalization, PatchGrid},
};
use image::{ImageFormat, RgbImage};
use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::{
    io::Cursor,
    sync::{Arc, atomic::Ordering, mpsc as blocking},
};
use tempfile::TempDir;
use tokio::{
    sync::{mpsc, watch},
    task::JoinHandle,
};
use tonic::Status;

const FINGERPRINT: &str = "this model";

/// Announces each pass by the patches of its sub-images, and begins it when it is let through.
struct Gated {
    runner: ModelRunner<Cpu>,
    entered: mpsc::UnboundedSender<Vec<usize>>,
    tickets: blocking::Receiver<Result<()>>,
}

impl RunPass for Gated {
    fn limits(&self) -> PassLimits {
        self.runner.limits()
    }

    fn tokens_shape(&self) -> TokensShape {
        self.runner.tokens_shape()
    }

    fn run(&mut self, sub_images: &[&PatchGrid], outputs: &mut [&mut [u8]]) -> Result<()> {
        drop(self.entered.send(sub_images.iter().map(|grid| grid.len()).collect()));
        // No ticket means that the gate is open for good.
        self.tickets.recv().unwrap_or(Ok(()))?;
        self.runner.run(sub_images, outputs)
    }
}

/// The role, and what a test sees of it.
pub(crate) struct Role {
    pub(crate) stats: Arc<EngineStats>,
    pub(crate) decoder: FakeDecoder,
    alive: watch::Receiver<bool>,
    client: VisionServiceClient<GrpcChannel>,
    entered: mpsc::UnboundedReceiver<Vec<usize>>,
    tickets: Option<blocking::Sender<Result<()>>>,
    _folder: TempDir,
}

impl Role {
    /// A role whose passes wait to be let through.
    pub(crate) fn gated(config: Config) -> Self {
        let (folder, checkpoint) = checkpoint();
        let options = EngineOptions {
            weights: Weights::open(folder.path()).unwrap(),
            model: checkpoint.config.clone(),
            normalization: Normalization::from(&checkpoint.preprocessor),
            max_batch_patches: config.max_batch_patches,
            max_queued_images: config.max_queued_images,
            progress: Box::new(|_| {}),
        };
        let (entered_sender, entered) = mpsc::unbounded_channel();
        let (tickets, ticket_receiver) = blocking::channel();
        let load = move || {
            let runner = ModelRunner::load(Cpu::new(CpuOptions { threads: Some(1), isa: None })?, &options)?;
            Ok(Gated { runner, entered: entered_sender, tickets: ticket_receiver })
        };
        let engine = Engine::start_with("cpu".into(), config.max_queued_images, load).unwrap();
        let (stats, alive) = (Arc::clone(engine.stats()), engine.alive());
        let decoder = FakeDecoder::default();
        let to_decoder = in_process(DecoderServiceServer::new(decoder.clone()));
        let vision = Vision::new(&config, &checkpoint, FINGERPRINT.into(), engine, Some(to_decoder), Shutdown::default());
        let client = VisionServiceClient::new(in_process(vision.into_server()));
        Self { stats, decoder, alive, client, entered, tickets: Some(tickets), _folder: folder }
    }

    /// A role whose passes run as they come.
    pub(crate) fn open(config: Config) -> Self {
        let mut role = Self::gated(config);
        role.open_gate();
        role
    }

    /// The patches of each sub-image of the next pass, once it waits.
    pub(crate) async fn entered(&mut self) -> Vec<usize> {
        self.entered.recv().await.unwrap()
    }

    /// Lets one pass through.
    pub(crate) fn let_through(&self) {
        self.tickets.as_ref().unwrap().send(Ok(())).unwrap();
    }

    /// Lets one pass fail.
    pub(crate) fn fail(&self, error: Error) {
        self.tickets.as_ref().unwrap().send(Err(error)).unwrap();
    }

    /// Lets every pass through.
    pub(crate) fn open_gate(&mut self) {
        self.tickets = None;
    }

    /// Waits for the end of the engine's thread, which comes after the last answer.
    pub(crate) async fn ended(&mut self) {
        self.alive.wait_for(|alive| !alive).await.unwrap();
    }

    /// Starts a call.
    pub(crate) fn call(&self, request: EncodeRequest) -> JoinHandle<Result<EncodeResponse, Status>> {
        let mut client = self.client.clone();
        tokio::spawn(async move { Ok(client.encode(request).await?.into_inner()) })
    }

    /// Calls and waits.
    pub(crate) async fn encode(&self, request: EncodeRequest) -> Result<EncodeResponse, Status> {
        self.call(request).await.unwrap()
    }

    /// Asks the role who it is.
    pub(crate) async fn get_info(&self) -> Result<GetInfoResponse, Status> {
        Ok(self.client.clone().get_info(GetInfoRequest {}).await?.into_inner())
    }

    /// Starts a call and waits until the engine has its picture.
    pub(crate) async fn call_until_ready(&self, request: EncodeRequest) -> JoinHandle<Result<EncodeResponse, Status>> {
        let before = self.num_ready();
        let call = self.call(request);
        until(|| self.num_ready() == before + 1).await;
        call
    }

    pub(crate) fn num_ready(&self) -> usize {
        self.stats.num_ready_images.load(Ordering::Relaxed)
    }

    pub(crate) fn num_queued(&self) -> usize {
        self.stats.num_queued_images.load(Ordering::Relaxed)
    }

    pub(crate) fn num_passes(&self) -> u64 {
        self.stats.num_passes.load(Ordering::Relaxed)
    }

    pub(crate) fn num_coalesced(&self) -> u64 {
        self.stats.num_coalesced_calls.load(Ordering::Relaxed)
    }
}

/// Goes as its caller does.
pub(crate) async fn cancel<T>(call: JoinHandle<T>) {
    call.abort();
    drop(call.await);
}

/// Lets other tasks run until something is so.
pub(crate) async fn until(condition: impl Fn() -> bool) {
    while !condition() {
        tokio::task::yield_now().await;
    }
}

/// A PNG of noise.
pub(crate) fn picture(seed: u64, width: u32, height: u32) -> Vec<u8> {
    let mut pixels = vec![0; (width * height * 3) as usize];
    ChaCha8Rng::seed_from_u64(seed).fill_bytes(&mut pixels);
    let mut file = Cursor::new(Vec::new());
    RgbImage::from_raw(width, height, pixels).unwrap().write_to(&mut file, ImageFormat::Png).unwrap();
    file.into_inner()
}

/// A request for tokens to be returned, under the picture's hash.
pub(crate) fn request(image: Vec<u8>) -> EncodeRequest {
    EncodeRequest {
        request_id: "test".into(),
        key: blake3::hash(&image).as_bytes().to_vec().into(),
        image: image.into(),
        options: Some(PreprocessOptions { split: false, longest_edge: 56, shortest_edge: 14 }),
        model_fingerprint: FINGERPRINT.into(),
        ship_to: String::new(),
    }
}

/// The same with four crops before the whole.
pub(crate) fn split(mut request: EncodeRequest) -> EncodeRequest {
    request.options.as_mut().unwrap().split = true;
    request
}

/// The same with the tokens shipped to the decoder.
pub(crate) fn shipped(request: EncodeRequest) -> EncodeRequest {
    EncodeRequest { ship_to: IN_PROCESS.into(), ..request }
}

/// The tokens of a response.
pub(crate) fn values(response: &EncodeResponse) -> Vec<f32> {
    let data = &response.image_tokens.as_ref().unwrap().data;
    data.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
}

/// Equal but for sums in another order: f32 epsilon times a reduction of some hundred, relative to the largest value.
pub(crate) fn assert_close(found: &[f32], expected: &[f32]) {
    assert_eq!(found.len(), expected.len());
    let largest = expected.iter().fold(0f32, |max, value| max.max(value.abs()));
    let error = found.iter().zip(expected).fold(0f32, |max, (a, b)| max.max((a - b).abs())) / largest;
    assert!(largest > 0.1 && error <= 1e-5, "error {error} relative to {largest}");
}

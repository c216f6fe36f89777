//! The gRPC face of the vision role.

use crate::{
    config::Config,
    engine::{Encoded, Engine, EngineError},
    preprocess::{self, ImageLimits, PatchGrid, PreprocessOptions},
    ship::Shipper,
};
use bytes::Bytes;
use idefics_common::{
    channel::{GrpcChannel, MAX_MESSAGE_BYTES},
    checkpoint::{Checkpoint, VisionConfig},
    serve::Shutdown,
    status::{self, Violation},
};
use idefics_kernels::DType;
use idefics_proto::{
    decoder::v1::PutImageTokensRequest,
    tensor::v1 as tensor,
    vision::v1::{
        EncodeRequest, EncodeResponse, EncodeTimings, GetInfoRequest, GetInfoResponse, SubImage,
        vision_service_server::{VisionService, VisionServiceServer},
    },
};
use std::{
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::sync::Semaphore;
use tonic::{Code, Request, Response, Status};
use tracing::Instrument;

/// Full name of the service, for health.
pub const SERVICE_NAME: &str = "idefics.vision.v1.VisionService";

/// The vision role: preprocessing on blocking threads, the engine behind them.
pub struct Vision {
    engine: Engine,
    shipper: Shipper,
    limits: ImageLimits,
    model: VisionConfig,
    tokens_per_image: u32,
    hidden_size: u32,
    fingerprint: String,
    preprocess_permits: Arc<Semaphore>,
    ship_timeout: Duration,
    shutdown: Shutdown,
}

impl Vision {
    /// A role around a running engine. `decoder` is the decoder in the same process, if there is one.
    pub fn new(
        config: &Config,
        checkpoint: &Checkpoint,
        fingerprint: String,
        engine: Engine,
        decoder: Option<GrpcChannel>,
        shutdown: Shutdown,
    ) -> Self {
        let threads = match config.preprocess_threads {
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            threads => threads,
        };
        let limits = ImageLimits {
            max_image_bytes: config.max_image_bytes,
            max_pixels: config.max_image_pixels,
            max_resized_edge: checkpoint.config.vision_config.image_size as u32,
            ..ImageLimits::default()
        };
        Self {
            engine,
            shipper: Shipper::new(config.allowed_decoders.clone(), config.channel.clone(), decoder),
            limits,
            model: checkpoint.config.vision_config.clone(),
            tokens_per_image: checkpoint.tokens_per_image() as u32,
            hidden_size: checkpoint.config.text_config.hidden_size as u32,
            fingerprint,
            preprocess_permits: Arc::new(Semaphore::new(threads)),
            ship_timeout: Duration::from_millis(config.ship_timeout_ms),
            shutdown,
        }
    }

    /// The generated server around this role.
    pub fn into_server(self) -> VisionServiceServer<Self> {
        VisionServiceServer::new(self).max_decoding_message_size(MAX_MESSAGE_BYTES).max_encoding_message_size(MAX_MESSAGE_BYTES)
    }

    fn validate(&self, request: &EncodeRequest) -> Result<PreprocessOptions, Status> {
        if request.model_fingerprint != self.fingerprint {
            return Err(status::wrong_fingerprint(&self.fingerprint, &request.model_fingerprint));
        }
        let mut violations = Vec::new();
        if request.key.len() != 32 {
            violations.push(Violation::new("key", format!("has {} bytes, expected 32", request.key.len())));
        }
        let options = request.options.unwrap_or_default();
        let (longest, shortest) = (options.longest_edge, options.shortest_edge);
        let (patch, largest) = (self.model.patch_size as u32, self.model.image_size as u32);
        if longest > largest || longest < shortest {
            violations.push(Violation::new(
                "options.longest_edge",
                format!("is {longest}, expected from the shortest edge, {shortest}, to {largest}"),
            ));
        }
        if shortest < patch {
            violations.push(Violation::new("options.shortest_edge", format!("is {shortest}, expected from {patch} to the longest edge")));
        }
        if !violations.is_empty() {
            return Err(status::invalid_argument(violations));
        }
        Ok(PreprocessOptions { split: options.split, longest_edge: longest, shortest_edge: shortest })
    }

    async fn preprocess(&self, image: Bytes, options: PreprocessOptions) -> Result<Vec<PatchGrid>, Status> {
        let permits = Arc::clone(&self.preprocess_permits);
        let permit = permits.acquire_owned().await.map_err(|_| ended())?;
        let (patch_size, limits) = (self.model.patch_size, self.limits.clone());
        let work = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            preprocess::preprocess(&image, &options, patch_size, &limits)
        });
        match work.await {
            Ok(result) => result.map_err(|e| status::invalid_argument(vec![Violation::new("image", e.to_string())])),
            Err(_) => Err(Status::internal("preprocessing failed unexpectedly; the picture was not encoded")),
        }
    }

    async fn ship(&self, uri: &str, key: Bytes, tokens: tensor::Tensor) -> Result<(), Status> {
        let mut client = self.shipper.client(uri).map_err(|e| status::invalid_argument(vec![Violation::new("ship_to", e)]))?;
        let mut put = Request::new(PutImageTokensRequest { key, model_fingerprint: self.fingerprint.clone(), image_tokens: Some(tokens) });
        put.set_timeout(self.ship_timeout);
        let sent = tokio::time::timeout(self.ship_timeout, client.put_image_tokens(put)).await;
        match sent {
            Ok(Ok(_)) => Ok(()),
            // The decoder's own words matter to the gateway where they are about the request, not about vision.
            Ok(Err(e)) if matches!(e.code(), Code::FailedPrecondition | Code::ResourceExhausted) => Err(e),
            Ok(Err(e)) => {
                let message = format!("the decoder {uri} did not take the image tokens: {}", e.message());
                Err(status::unavailable(message, Duration::from_secs(1)))
            }
            Err(_) => {
                let message = format!("the decoder {uri} did not take the image tokens within {} ms", self.ship_timeout.as_millis());
                Err(status::unavailable(message, Duration::from_secs(1)))
            }
        }
    }

    async fn encode_one(&self, request: EncodeRequest) -> Result<EncodeResponse, Status> {
        let options = self.validate(&request)?;
        let started_at = Instant::now();
        let grids = self.preprocess(request.image, options).await?;
        let preprocess_ms = started_at.elapsed().as_secs_f64() * 1e3;
        let sub_images = grids.iter().map(|g| SubImage { width: g.width, height: g.height, patches: (g.rows * g.cols) as u32 }).collect();
        let encoded = self.engine.encode(grids).await.map_err(engine_status)?;
        let (queue_ms, encode_ms, tokens) = (encoded.queue_ms, encoded.encode_ms, encoded.tokens as u32);
        let tensor = to_wire(encoded);
        let started_at = Instant::now();
        let mut image_tokens = None;
        if request.ship_to.is_empty() {
            image_tokens = Some(tensor);
        } else {
            self.ship(&request.ship_to, request.key.clone(), tensor).await?;
        }
        let ship_ms = started_at.elapsed().as_secs_f64() * 1e3;
        tracing::debug!(preprocess_ms, queue_ms, encode_ms, ship_ms, tokens, "encoded");
        let timings = Some(EncodeTimings { preprocess_ms, queue_ms, encode_ms, ship_ms });
        Ok(EncodeResponse { key: request.key, sub_images, tokens, image_tokens, timings })
    }
}

#[tonic::async_trait]
impl VisionService for Vision {
    async fn encode(&self, request: Request<EncodeRequest>) -> Result<Response<EncodeResponse>, Status> {
        let request = request.into_inner();
        let span = tracing::info_span!("encode", request_id = %request.request_id);
        tokio::select! {
            response = self.encode_one(request).instrument(span) => response.map(Response::new),
            () = self.shutdown.cancel.cancelled() => Err(status::unavailable("vision is shutting down", Duration::from_secs(1))),
        }
    }

    async fn get_info(&self, _: Request<GetInfoRequest>) -> Result<Response<GetInfoResponse>, Status> {
        if !*self.engine.alive().borrow() {
            return Err(ended());
        }
        Ok(Response::new(GetInfoResponse {
            model_fingerprint: self.fingerprint.clone(),
            tokens_per_image: self.tokens_per_image,
            hidden_size: self.hidden_size,
            device: self.engine.device_name().to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        }))
    }
}

fn ended() -> Status {
    Status::internal(EngineError::Ended.to_string())
}

fn engine_status(error: EngineError) -> Status {
    match error {
        EngineError::QueueFull(_) => status::resource_exhausted(error.to_string(), Duration::from_secs(1)),
        EngineError::Ended | EngineError::Failed(_) => Status::internal(error.to_string()),
    }
}

fn to_wire(encoded: Encoded) -> tensor::Tensor {
    let dtype = match encoded.dtype {
        DType::F16 => tensor::DataType::F16,
        DType::Bf16 => tensor::DataType::Bf16,
        _ => tensor::DataType::F32,
    };
    tensor::Tensor { dtype: dtype.into(), shape: vec![encoded.tokens as u64, encoded.hidden as u64], data: encoded.data }
}

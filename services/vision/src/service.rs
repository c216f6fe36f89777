//! The gRPC face of the vision role.

use crate::{
    config::Config,
    encoder::{EncodeError, Encoder},
    engine::{Encoded, Engine, EngineError},
    metrics,
    preprocess::{ImageLimits, PreprocessOptions},
    ship::Shipper,
};
use bytes::Bytes;
use idefics_common::{
    channel::{GrpcChannel, MAX_MESSAGE_BYTES},
    checkpoint::{Checkpoint, VisionConfig},
    serve::Shutdown,
    status::{self, SHIP_TO_NOT_ALLOWED, Violation},
};
use idefics_kernels::DType;
use idefics_proto::{
    decoder::v1::{PutImageTokensRequest, decoder_service_client::DecoderServiceClient},
    tensor::v1 as tensor,
    vision::v1::{
        EncodeRequest, EncodeResponse, GetInfoRequest, GetInfoResponse,
        vision_service_server::{VisionService, VisionServiceServer},
    },
};
use std::{
    collections::HashMap,
    time::{Duration, Instant},
};
use tonic::{Code, Request, Response, Status};
use tracing::Instrument;

/// Full name of the service, for health.
pub const SERVICE_NAME: &str = "idefics.vision.v1.VisionService";

/// When to try again after a refusal.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// The vision role: checks, the encoder behind them, and shipping to each caller's decoder.
pub struct Vision {
    encoder: Encoder,
    shipper: Shipper,
    model: VisionConfig,
    tokens_per_image: u32,
    hidden_size: u32,
    fingerprint: String,
    file_hashes: HashMap<String, String>,
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
        metrics::describe();
        let limits = ImageLimits {
            max_image_bytes: config.max_image_bytes,
            max_pixels: config.max_image_pixels,
            max_resized_edge: checkpoint.config.vision_config.image_size as u32,
            ..ImageLimits::default()
        };
        Self {
            encoder: Encoder::new(config, engine, limits, checkpoint.config.vision_config.patch_size),
            shipper: Shipper::new(config.allowed_decoders.clone(), config.channel.clone(), decoder),
            model: checkpoint.config.vision_config.clone(),
            tokens_per_image: checkpoint.tokens_per_image() as u32,
            hidden_size: checkpoint.config.text_config.hidden_size as u32,
            fingerprint,
            file_hashes: checkpoint.hashes_of(&["config.json", "preprocessor_config.json"]),
            ship_timeout: Duration::from_millis(config.ship_timeout_ms),
            shutdown,
        }
    }

    /// The generated server around this role.
    pub fn into_server(self) -> VisionServiceServer<Self> {
        VisionServiceServer::new(self).max_decoding_message_size(MAX_MESSAGE_BYTES).max_encoding_message_size(MAX_MESSAGE_BYTES)
    }

    /// The request's key and options.
    fn validate(&self, request: &EncodeRequest) -> Result<([u8; 32], PreprocessOptions), Status> {
        if request.model_fingerprint != self.fingerprint {
            return Err(status::wrong_fingerprint(&self.fingerprint, &request.model_fingerprint));
        }
        let mut violations = Vec::new();
        let key = <[u8; 32]>::try_from(&*request.key);
        if key.is_err() {
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
        match key {
            Ok(key) if violations.is_empty() => {
                Ok((key, PreprocessOptions { split: options.split, longest_edge: longest, shortest_edge: shortest }))
            }
            _ => Err(status::invalid_argument(violations)),
        }
    }

    /// The decoder that the caller wants the tokens to go to.
    fn decoder(&self, uri: &str) -> Result<DecoderServiceClient<GrpcChannel>, Status> {
        self.shipper.client(uri).map_err(|why| status::failed_precondition(SHIP_TO_NOT_ALLOWED, [uri.to_owned()], why))
    }

    async fn ship(
        &self,
        mut client: DecoderServiceClient<GrpcChannel>,
        uri: &str,
        key: Bytes,
        tokens: tensor::Tensor,
    ) -> Result<(), Status> {
        let mut put = Request::new(PutImageTokensRequest { key, model_fingerprint: self.fingerprint.clone(), image_tokens: Some(tokens) });
        put.set_timeout(self.ship_timeout);
        let sent = tokio::time::timeout(self.ship_timeout, client.put_image_tokens(put)).await;
        match sent {
            Ok(Ok(_)) => Ok(()),
            // The decoder's own words matter to the gateway where they are about the request, not about vision.
            Ok(Err(e)) if matches!(e.code(), Code::FailedPrecondition | Code::ResourceExhausted) => Err(e),
            Ok(Err(e)) => {
                let message = format!("the decoder {uri} did not take the image tokens: {}", e.message());
                Err(status::unavailable(message, RETRY_AFTER))
            }
            Err(_) => {
                let message = format!("the decoder {uri} did not take the image tokens within {} ms", self.ship_timeout.as_millis());
                Err(status::unavailable(message, RETRY_AFTER))
            }
        }
    }

    async fn encode_one(&self, request: EncodeRequest) -> Result<EncodeResponse, Status> {
        let (key, options) = self.validate(&request)?;
        let decoder = if request.ship_to.is_empty() { None } else { Some(self.decoder(&request.ship_to)?) };
        let answer = self.encoder.encode(key, options, request.image).await.map_err(encode_status)?;
        let (cached, mut timings) = (answer.cached, answer.timings);
        let (tokens, sub_images) = (answer.encoded.tokens as u32, answer.sub_images.to_vec());
        let tensor = to_wire(answer.encoded);
        let image_tokens = match decoder {
            None => Some(tensor),
            Some(decoder) => {
                let started_at = Instant::now();
                self.ship(decoder, &request.ship_to, request.key.clone(), tensor).await?;
                let elapsed = started_at.elapsed();
                metrics::shipped(elapsed);
                timings.ship_ms = elapsed.as_secs_f64() * 1e3;
                None
            }
        };
        tracing::debug!(cached, ?timings, tokens, "encoded");
        Ok(EncodeResponse { key: request.key, sub_images, tokens, image_tokens, timings: Some(timings), cached })
    }
}

#[tonic::async_trait]
impl VisionService for Vision {
    async fn encode(&self, request: Request<EncodeRequest>) -> Result<Response<EncodeResponse>, Status> {
        let request = request.into_inner();
        let span = tracing::info_span!("encode", request_id = %request.request_id);
        tokio::select! {
            response = self.encode_one(request).instrument(span) => response.map(Response::new),
            () = self.shutdown.cancel.cancelled() => Err(status::unavailable("vision is shutting down", RETRY_AFTER)),
        }
    }

    async fn get_info(&self, _: Request<GetInfoRequest>) -> Result<Response<GetInfoResponse>, Status> {
        if !*self.encoder.engine().alive().borrow() {
            return Err(ended());
        }
        Ok(Response::new(GetInfoResponse {
            model_fingerprint: self.fingerprint.clone(),
            tokens_per_image: self.tokens_per_image,
            hidden_size: self.hidden_size,
            device: self.encoder.engine().device_name().to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            file_hashes: self.file_hashes.clone(),
        }))
    }
}

fn ended() -> Status {
    status::unavailable(EngineError::Ended.to_string(), RETRY_AFTER)
}

fn encode_status(error: EncodeError) -> Status {
    match error {
        EncodeError::Image(what) => status::invalid_argument(vec![Violation::new("image", what)]),
        EncodeError::Engine(EngineError::QueueFull(_)) => status::resource_exhausted(error.to_string(), RETRY_AFTER),
        EncodeError::Engine(EngineError::Ended) => ended(),
        EncodeError::Panicked | EncodeError::Engine(EngineError::Failed(_)) => Status::internal(error.to_string()),
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

//! The gRPC face of the decoder role.

use crate::{
    block_manager::BlockHash,
    config::Config,
    engine::Engine,
    image_store::{ImageKey, ImageStore, ImageTokens, StoreError},
    sequence::{
        Event, FinishReason, FirstToken, ImageSpan, Logprobs, MAX_LOGPROBS, Request as EngineRequest, SamplingParams, TokenLogprob,
    },
};
use idefics_common::{
    channel::MAX_MESSAGE_BYTES,
    checkpoint::Checkpoint,
    serve::Shutdown,
    status::{self, IMAGE_TOKENS_MISSING, Violation},
};
use idefics_kernels::DType;
use idefics_proto::{
    decoder::v1::{
        self as pb,
        decoder_service_server::{DecoderService, DecoderServiceServer},
        generate_response::Event as PbEvent,
    },
    tensor::v1 as tensor,
};
use std::{
    collections::HashMap,
    fmt::Display,
    ops::RangeInclusive,
    pin::Pin,
    sync::{Mutex, MutexGuard, PoisonError, atomic::Ordering},
    time::Duration,
};
use tokio::sync::mpsc::UnboundedReceiver;
use tokio_stream::Stream;
use tonic::{Request, Response, Status};

/// Full name of the service, for health.
pub const SERVICE_NAME: &str = "idefics.decoder.v1.DecoderService";
/// Most ids with a bias, and the largest bias either way.
const MAX_LOGIT_BIASES: usize = 1024;
const MAX_LOGIT_BIAS: f32 = 100.0;
/// Most stop ids of a request's own.
const MAX_STOP_TOKEN_IDS: usize = 16;
/// Most choices of a request.
const MAX_CHOICES: u32 = 16;
/// Priorities of a request.
const PRIORITIES: RangeInclusive<i32> = -10..=10;
/// Longest cache salt.
const MAX_CACHE_SALT_BYTES: usize = 256;
/// When to try again after a refusal: about the time of a short answer.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// The decoder role: admission and image tokens here, generation in the engine.
pub struct Decoder {
    engine: Engine,
    images: Mutex<ImageStore>,
    config: Config,
    fingerprint: String,
    image_token_id: u32,
    vocab_size: usize,
    hidden_size: usize,
    tokens_per_image: usize,
    file_hashes: HashMap<String, String>,
    shutdown: Shutdown,
}

impl Decoder {
    /// A role around a running engine.
    pub fn new(config: Config, checkpoint: &Checkpoint, fingerprint: String, engine: Engine, shutdown: Shutdown) -> Self {
        Self {
            engine,
            images: Mutex::new(ImageStore::new(config.image_store_bytes, Duration::from_millis(config.lease_ms))),
            config,
            fingerprint,
            image_token_id: checkpoint.config.image_token_id,
            vocab_size: checkpoint.config.text_config.vocab_size,
            hidden_size: checkpoint.config.text_config.hidden_size,
            tokens_per_image: checkpoint.tokens_per_image(),
            file_hashes: checkpoint.hashes_of(&["config.json", "tokenizer.json"]),
            shutdown,
        }
    }

    /// The generated server around this role.
    pub fn into_server(self) -> DecoderServiceServer<Self> {
        DecoderServiceServer::new(self).max_decoding_message_size(MAX_MESSAGE_BYTES).max_encoding_message_size(MAX_MESSAGE_BYTES)
    }

    fn images(&self) -> MutexGuard<'_, ImageStore> {
        self.images.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// New work is refused while the process drains; what was admitted before goes on.
    fn check_accepting(&self) -> Result<(), Status> {
        if self.shutdown.stop_accepting.is_cancelled() {
            return Err(status::unavailable("the decoder is shutting down; ask another replica", RETRY_AFTER));
        }
        self.check_alive()
    }

    fn check_alive(&self) -> Result<(), Status> {
        if *self.engine.alive().borrow() { Ok(()) } else { Err(ended()) }
    }

    fn check_fingerprint(&self, theirs: &str) -> Result<(), Status> {
        if theirs == self.fingerprint { Ok(()) } else { Err(status::wrong_fingerprint(&self.fingerprint, theirs)) }
    }

    fn check_length(&self, prompt_tokens: usize, max_new_tokens: usize) -> Result<(), Status> {
        let limit = self.engine.max_model_tokens();
        if prompt_tokens == 0 || max_new_tokens == 0 {
            let field = if prompt_tokens == 0 { "token_ids" } else { "max_new_tokens" };
            return Err(status::invalid_argument(vec![Violation::new(field, "is 0, expected 1 or more")]));
        }
        if prompt_tokens.saturating_add(max_new_tokens) > limit {
            let message = format!(
                "prompt is {prompt_tokens} tokens and max_new_tokens {max_new_tokens}, together more than {limit}; shorten the prompt, lower max_new_tokens or raise decoder.max_model_tokens"
            );
            return Err(Status::out_of_range(message));
        }
        Ok(())
    }

    fn check_choices(&self, n: u32) -> Result<(), Status> {
        if !(1..=MAX_CHOICES).contains(&n) {
            return Err(status::invalid_argument(vec![Violation::new("n", format!("is {n}, expected from 1 to {MAX_CHOICES}"))]));
        }
        let limit = self.config.max_requests;
        if n as usize > limit {
            return Err(Status::out_of_range(format!(
                "n is {n}, the decoder's queue has {limit} places; lower n or raise decoder.max_requests"
            )));
        }
        Ok(())
    }

    /// Every violation of a `Generate` request but its length; on success the distinct keys of its images.
    fn check_prompt(&self, request: &pb::GenerateRequest) -> Result<Vec<ImageKey>, Vec<Violation>> {
        let mut violations = Vec::new();
        if let Some(at) = request.token_ids.iter().position(|id| *id as usize >= self.vocab_size) {
            let what = format!("is {}, expected below the vocabulary's size, {}", request.token_ids[at], self.vocab_size);
            violations.push(Violation::new(format!("token_ids[{at}]"), what));
        }
        let mut keys = Vec::new();
        let mut free_from = 0;
        for (i, span) in request.image_spans.iter().enumerate() {
            match image_key(&span.key, &format!("image_spans[{i}].key")) {
                Ok(key) if !keys.contains(&key) => keys.push(key),
                Ok(_) => {}
                Err(violation) => violations.push(violation),
            }
            let start = span.start as usize;
            let ids = request.token_ids.get(start..start.saturating_add(self.tokens_per_image));
            if start < free_from || !ids.is_some_and(|ids| ids.iter().all(|id| *id == self.image_token_id)) {
                let what = format!(
                    "is {start}, expected the first of {} image tokens (id {}) behind the last span",
                    self.tokens_per_image, self.image_token_id
                );
                violations.push(Violation::new(format!("image_spans[{i}].start"), what));
            }
            free_from = start.saturating_add(self.tokens_per_image);
        }
        let (found, expected) =
            (request.token_ids.iter().filter(|id| **id == self.image_token_id).count(), request.image_spans.len() * self.tokens_per_image);
        if found != expected {
            violations.push(Violation::new("token_ids", format!("has {found} image tokens, the image spans take {expected}")));
        }
        if request.cache_salt.len() > MAX_CACHE_SALT_BYTES {
            let what = format!("has {} bytes, expected at most {MAX_CACHE_SALT_BYTES}", request.cache_salt.len());
            violations.push(Violation::new("cache_salt", what));
        }
        if let Some(n) = request.prompt_logprobs.filter(|n| *n > MAX_LOGPROBS) {
            violations.push(Violation::new("prompt_logprobs", format!("is {n}, expected from 0 to {MAX_LOGPROBS}")));
        }
        if !PRIORITIES.contains(&request.priority) {
            let what = format!("is {}, expected from {} to {}", request.priority, PRIORITIES.start(), PRIORITIES.end());
            violations.push(Violation::new("priority", what));
        }
        if violations.is_empty() { Ok(keys) } else { Err(violations) }
    }

    /// Sequences for which the queue has room, reserved or not.
    fn room(&self) -> usize {
        self.config.max_requests.saturating_sub(self.engine.stats().num_sequences.load(Ordering::Relaxed))
    }

    /// Takes over a reservation, or admits what was never reserved as `Reserve` would.
    fn admit(&self, images: &mut ImageStore, request: &pb::GenerateRequest) -> Result<(), Status> {
        let n = request.n as usize;
        if !images.covers(&request.request_id, n) {
            self.check_accepting()?;
        }
        images.admit(&request.request_id, n, self.room()).map_err(store_status)
    }

    fn engine_request(
        &self,
        store: &mut ImageStore,
        request: pb::GenerateRequest,
        sampling: SamplingParams,
        keys: &[ImageKey],
    ) -> Result<EngineRequest, Status> {
        let images = store.take(&request.request_id, keys).map_err(store_status)?;
        let mut image_spans = Vec::with_capacity(request.image_spans.len());
        for (i, span) in request.image_spans.iter().enumerate() {
            let key = image_key(&span.key, "image_spans.key").map_err(|v| status::invalid_argument(vec![v]))?;
            let (start, first_row) = (span.start as usize, (span.sub_image as usize).saturating_mul(self.tokens_per_image));
            let image = images.get(&key).ok_or_else(|| Status::internal("an image that was there is gone"))?;
            if first_row.saturating_add(self.tokens_per_image) > image.rows() {
                let what = format!("is {}, the image has {} sub-images", span.sub_image, image.rows() / self.tokens_per_image);
                return Err(status::invalid_argument(vec![Violation::new(format!("image_spans[{i}].sub_image"), what)]));
            }
            image_spans.push(ImageSpan { positions: start..start + self.tokens_per_image, key, image: image.clone(), first_row });
        }
        Ok(EngineRequest {
            request_id: request.request_id,
            token_ids: request.token_ids,
            image_spans,
            n: request.n as usize,
            max_new_tokens: request.max_new_tokens as usize,
            sampling,
            prompt_logprobs: request.prompt_logprobs,
            priority: request.priority,
            cache_root: BlockHash::root(&[self.fingerprint.as_bytes(), &request.cache_salt]),
        })
    }
}

type GenerateStream = Pin<Box<dyn Stream<Item = Result<pb::GenerateResponse, Status>> + Send>>;

#[tonic::async_trait]
impl DecoderService for Decoder {
    type GenerateStream = GenerateStream;

    async fn reserve(&self, request: Request<pb::ReserveRequest>) -> Result<Response<pb::ReserveResponse>, Status> {
        let request = request.into_inner();
        self.check_accepting()?;
        self.check_fingerprint(&request.model_fingerprint)?;
        self.check_choices(request.n)?;
        self.check_length(request.prompt_tokens as usize, request.max_new_tokens as usize)?;
        let mut keys = Vec::new();
        for (i, key) in request.image_keys.iter().enumerate() {
            let key = image_key(key, &format!("image_keys[{i}]")).map_err(|v| status::invalid_argument(vec![v]))?;
            if !keys.contains(&key) {
                keys.push(key);
            }
        }
        let mut images = self.images();
        let missing = images.reserve(&request.request_id, keys, request.n as usize, self.room()).map_err(store_status)?;
        let lease_ms = images.lease().as_millis() as u64;
        let missing_image_keys = missing.iter().map(|key| bytes::Bytes::copy_from_slice(&key.0)).collect();
        Ok(Response::new(pb::ReserveResponse { missing_image_keys, lease_ms }))
    }

    async fn release(&self, request: Request<pb::ReleaseRequest>) -> Result<Response<pb::ReleaseResponse>, Status> {
        self.images().release(&request.into_inner().request_id);
        Ok(Response::new(pb::ReleaseResponse {}))
    }

    async fn put_image_tokens(&self, request: Request<pb::PutImageTokensRequest>) -> Result<Response<pb::PutImageTokensResponse>, Status> {
        let request = request.into_inner();
        self.check_alive()?;
        self.check_fingerprint(&request.model_fingerprint)?;
        let invalid = |field: &str, what: String| status::invalid_argument(vec![Violation::new(field, what)]);
        let key = image_key(&request.key, "key").map_err(|v| status::invalid_argument(vec![v]))?;
        let wire = request.image_tokens.ok_or_else(|| invalid("image_tokens", "is absent, expected a tensor".into()))?;
        let tokens = from_wire(wire, self.tokens_per_image, self.hidden_size).map_err(|what| invalid("image_tokens", what))?;
        self.images().put(key, tokens).map_err(store_status)?;
        Ok(Response::new(pb::PutImageTokensResponse {}))
    }

    async fn generate(&self, request: Request<pb::GenerateRequest>) -> Result<Response<GenerateStream>, Status> {
        let request = request.into_inner();
        self.check_alive()?;
        self.check_choices(request.n)?;
        self.check_length(request.token_ids.len(), request.max_new_tokens as usize)?;
        let sampling = sampling_params(request.sampling.clone().unwrap_or_default(), self.vocab_size, request.max_new_tokens);
        let (sampling, keys) = match (sampling, self.check_prompt(&request)) {
            (Ok(sampling), Ok(keys)) => (sampling, keys),
            (a, b) => return Err(status::invalid_argument(a.err().into_iter().chain(b.err()).flatten().collect())),
        };
        let span = tracing::info_span!("generate", request_id = %request.request_id);
        let n = request.n as usize;
        let events = {
            // Held until the engine has counted the request, so that its place is never free in between.
            let mut images = self.images();
            self.admit(&mut images, &request)?;
            self.engine.submit(&self.engine_request(&mut images, request, sampling, &keys)?, &span)
        };
        Ok(Response::new(Box::pin(responses(events, n, self.shutdown.clone()))))
    }

    async fn cancel_choice(&self, request: Request<pb::CancelChoiceRequest>) -> Result<Response<pb::CancelChoiceResponse>, Status> {
        let pb::CancelChoiceRequest { request_id, choice } = request.into_inner();
        self.engine.cancel_choice(request_id, choice as usize);
        Ok(Response::new(pb::CancelChoiceResponse {}))
    }

    async fn get_info(&self, _: Request<pb::GetInfoRequest>) -> Result<Response<pb::GetInfoResponse>, Status> {
        self.check_accepting()?;
        // Gateways ask every few seconds: what a lost one has reserved is freed even if nothing else happens.
        self.images().expire();
        Ok(Response::new(pb::GetInfoResponse {
            model_fingerprint: self.fingerprint.clone(),
            max_model_tokens: self.engine.max_model_tokens() as u32,
            tokens_per_image: self.tokens_per_image as u32,
            hidden_size: self.hidden_size as u32,
            device: self.engine.device_name().to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            file_hashes: self.file_hashes.clone(),
        }))
    }
}

/// The engine's events on the wire, until all `n` choices have ended. Dropping the stream drops the receiver, which cancels the
/// sequences.
fn responses(events: UnboundedReceiver<Event>, n: usize, shutdown: Shutdown) -> impl Stream<Item = Result<pb::GenerateResponse, Status>> {
    // `None` behind the last event.
    futures::stream::unfold(Some((events, n)), move |state| {
        let shutdown = shutdown.clone();
        async move {
            let (mut events, left) = state?;
            let event = tokio::select! {
                biased;
                event = events.recv() => event,
                () = shutdown.cancel.cancelled() => {
                    return Some((Err(status::unavailable("the decoder is shutting down; ask again", RETRY_AFTER)), None));
                }
            };
            Some(match event {
                Some(Event::PromptLogprobs { start, tokens }) => {
                    let tokens = tokens.into_iter().map(prompt_token).collect();
                    let prompt = pb::PromptLogprobs { start: start as u32, tokens };
                    (Ok(response(PbEvent::PromptLogprobs(prompt))), Some((events, left)))
                }
                Some(Event::Token { choice, token_id, logprobs, first }) => {
                    let token = to_wire(choice, token_id, logprobs, first);
                    (Ok(response(PbEvent::Token(token))), Some((events, left)))
                }
                Some(Event::Finished { choice, reason, queue_ms, prefill_ms, decode_ms }) => {
                    let reason = match reason {
                        FinishReason::Stop => pb::FinishReason::Stop,
                        FinishReason::Length => pb::FinishReason::Length,
                        FinishReason::Cancelled => pb::FinishReason::Cancelled,
                    };
                    let finished = pb::Finished { choice: choice as u32, reason: reason.into(), queue_ms, prefill_ms, decode_ms };
                    (Ok(response(PbEvent::Finished(finished))), (left > 1).then_some((events, left - 1)))
                }
                Some(Event::Failed(error)) => (Err(Status::internal(error)), None),
                None => (Err(ended()), None),
            })
        }
    })
}

fn response(event: PbEvent) -> pb::GenerateResponse {
    pb::GenerateResponse { event: Some(event) }
}

fn to_wire(choice: usize, token_id: u32, logprobs: Option<Logprobs>, first: Option<FirstToken>) -> pb::GeneratedToken {
    let logprob = logprobs.as_ref().map(|l| l.logprob);
    let top = logprobs.map(|l| top(l.top)).unwrap_or_default();
    let first = first.map(|first| {
        let FirstToken { cached_tokens, queue_ms, prefill_ms } = first;
        pb::FirstToken { cached_tokens: cached_tokens as u32, queue_ms, prefill_ms }
    });
    pb::GeneratedToken { token_id, logprob, top, first, choice: choice as u32 }
}

fn prompt_token((token_id, logprobs): (u32, Logprobs)) -> pb::PromptToken {
    pb::PromptToken { token_id, logprob: logprobs.logprob, top: top(logprobs.top) }
}

fn top(top: Vec<TokenLogprob>) -> Vec<pb::TokenLogprob> {
    top.into_iter().map(|t| pb::TokenLogprob { token_id: t.token_id, logprob: t.logprob }).collect()
}

fn ended() -> Status {
    status::unavailable("the decoder's engine has ended; ask another replica and restart this one", RETRY_AFTER)
}

fn image_key(bytes: &[u8], field: &str) -> Result<ImageKey, Violation> {
    let key = bytes.try_into().map_err(|_| Violation::new(field, format!("has {} bytes, expected 32", bytes.len())))?;
    Ok(ImageKey(key))
}

fn store_status(error: StoreError) -> Status {
    let message = error.to_string();
    match error {
        StoreError::Missing(keys) => status::failed_precondition(IMAGE_TOKENS_MISSING, keys.iter().map(ToString::to_string), message),
        StoreError::TooManyRequests { .. } | StoreError::Full { .. } => status::resource_exhausted(message, RETRY_AFTER),
        StoreError::TooLarge { .. } => Status::out_of_range(message),
    }
}

fn from_wire(wire: tensor::Tensor, tokens_per_image: usize, hidden_size: usize) -> Result<ImageTokens, String> {
    let dtype = match wire.dtype() {
        tensor::DataType::F32 => DType::F32,
        tensor::DataType::F16 => DType::F16,
        tensor::DataType::Bf16 => DType::Bf16,
        tensor::DataType::Unspecified => return Err(format!("dtype is {}, expected f32, f16 or bf16", wire.dtype)),
    };
    match wire.shape[..] {
        [rows, hidden] if hidden == hidden_size as u64 && rows > 0 && rows.is_multiple_of(tokens_per_image as u64) => {
            ImageTokens::new(wire.data, dtype, rows as usize, hidden_size)
        }
        _ => Err(format!("shape is {:?}, expected [n x {tokens_per_image}, {hidden_size}]", wire.shape)),
    }
}

fn sampling_params(wire: pb::SamplingParams, vocab_size: usize, max_new_tokens: u32) -> Result<SamplingParams, Vec<Violation>> {
    let mut violations = Vec::new();
    let mut expect = |right: bool, field: &str, found: &dyn Display, expected: &str| {
        if !right {
            violations.push(Violation::new(format!("sampling.{field}"), format!("is {found}, expected {expected}")));
        }
    };
    let above_0 = |value: f32| value > 0.0 && value <= 1.0;
    let penalty = |value: &f32| (-2.0..=2.0).contains(value);
    expect((0.0..=2.0).contains(&wire.temperature), "temperature", &wire.temperature, "from 0 to 2");
    expect(above_0(wire.top_p), "top_p", &wire.top_p, "above 0, up to 1");
    expect((0.0..=1.0).contains(&wire.min_p), "min_p", &wire.min_p, "from 0 to 1");
    expect(above_0(wire.typical_p), "typical_p", &wire.typical_p, "above 0, up to 1");
    expect((0.01..=100.0).contains(&wire.repetition_penalty), "repetition_penalty", &wire.repetition_penalty, "from 0.01 to 100");
    expect(penalty(&wire.presence_penalty), "presence_penalty", &wire.presence_penalty, "from -2 to 2");
    expect(penalty(&wire.frequency_penalty), "frequency_penalty", &wire.frequency_penalty, "from -2 to 2");
    expect(wire.logprobs.is_none_or(|n| n <= MAX_LOGPROBS), "logprobs", &wire.logprobs.unwrap_or_default(), "from 0 to 20");
    let most = format!("at most max_new_tokens, {max_new_tokens}");
    expect(wire.min_new_tokens <= max_new_tokens, "min_new_tokens", &wire.min_new_tokens, &most);
    let in_vocabulary = format!("ids below the vocabulary's size, {vocab_size}");
    let mut logit_bias: Vec<(u32, f32)> = wire.logit_bias.into_iter().collect();
    logit_bias.sort_unstable_by_key(|(id, _)| *id);
    expect(logit_bias.len() <= MAX_LOGIT_BIASES, "logit_bias", &format!("{} ids", logit_bias.len()), "at most 1024");
    for (id, bias) in logit_bias.iter().take(MAX_LOGIT_BIASES) {
        let field = format!("logit_bias[{id}]");
        expect((*id as usize) < vocab_size, &field, id, &in_vocabulary);
        expect(bias.abs() <= MAX_LOGIT_BIAS, &field, bias, "from -100 to 100");
    }
    expect(wire.stop_token_ids.len() <= MAX_STOP_TOKEN_IDS, "stop_token_ids", &format!("{} ids", wire.stop_token_ids.len()), "at most 16");
    for (i, id) in wire.stop_token_ids.iter().enumerate().take(MAX_STOP_TOKEN_IDS) {
        expect((*id as usize) < vocab_size, &format!("stop_token_ids[{i}]"), id, &in_vocabulary);
    }
    if !violations.is_empty() {
        return Err(violations);
    }
    Ok(SamplingParams {
        temperature: wire.temperature,
        top_k: wire.top_k,
        top_p: wire.top_p,
        min_p: wire.min_p,
        typical_p: wire.typical_p,
        repetition_penalty: wire.repetition_penalty,
        presence_penalty: wire.presence_penalty,
        frequency_penalty: wire.frequency_penalty,
        logit_bias,
        seed: wire.seed.unwrap_or_else(rand::random),
        stop_token_ids: wire.stop_token_ids,
        min_new_tokens: wire.min_new_tokens,
        ignore_eos: wire.ignore_eos,
        logprobs: wire.logprobs,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use idefics_common::checkpoint::Source;
    use tonic::Code;

    #[tokio::test]
    async fn ended_engine_makes_the_role_unavailable() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../idefics/demo/checkpoint");
        let checkpoint = Checkpoint::open(Source::Folder(folder.into())).unwrap();
        let decoder = Decoder::new(Config::default(), &checkpoint, "this model".into(), Engine::ended(), Shutdown::default());
        let codes = [
            decoder.get_info(Request::new(pb::GetInfoRequest {})).await.err().unwrap(),
            decoder.reserve(Request::new(pb::ReserveRequest::default())).await.err().unwrap(),
            decoder.put_image_tokens(Request::new(pb::PutImageTokensRequest::default())).await.err().unwrap(),
            decoder.generate(Request::new(pb::GenerateRequest::default())).await.err().unwrap(),
        ]
        .map(|status| status.code());
        assert_eq!(codes, [Code::Unavailable; 4]);
        // What was submitted just before learns it from its stream.
        let (events, receiver) = tokio::sync::mpsc::unbounded_channel();
        drop(events);
        let mut responses = Box::pin(responses(receiver, 1, Shutdown::default()));
        assert_eq!(tokio_stream::StreamExt::next(&mut responses).await.unwrap().unwrap_err().code(), Code::Unavailable);
    }
}

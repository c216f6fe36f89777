//! The gRPC face of the gateway.

use crate::{
    GatewayConfig, GatewayError, Peers,
    admission::{Admission, AdmissionServer, Admitted, Permit},
    call::Call,
    coordinator::{Coordinator, Job, longest},
    events::Events,
    failure::RETRY_AFTER,
    media::Media,
    metrics,
    prompt::{self, ImageLayout, Prompt},
    replicas::Replicas,
    template::{ChatTemplate, TemplateError},
    tokenizer::{MarkedText, TextTokenizer, TokenizeError},
    validate::{
        Generation, ImageOptions, Limits, Part, Picture, TokenizeInput, Turn, ValidChat, ValidEncodeImages, ValidGenerate, ValidTokenize,
    },
};
use bytes::{Bytes, BytesMut};
use futures::{StreamExt, stream::BoxStream};
use idefics_common::{
    checkpoint::{Checkpoint, IMAGE},
    serve::Shutdown,
    status::{self, Violation},
};
use idefics_proto::{
    gateway::v1::{
        self as pb,
        gateway_service_server::{GatewayService, GatewayServiceServer},
    },
    tensor::v1 as tensor,
    vision::v1::EncodeResponse,
};
use std::{sync::Arc, time::Duration};
use tokio::sync::watch;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::DropGuard;
use tonic::{Code, Request, Response, Status};
use tracing::Instrument;

/// Full name of the service, for health.
pub const SERVICE_NAME: &str = "idefics.gateway.v1.GatewayService";

/// The gateway role. Clones share everything.
#[derive(Clone)]
pub struct Gateway(Arc<Inner>);

struct Inner {
    checkpoint: Checkpoint,
    limits: Limits,
    max_images: u32,
    max_request_bytes: usize,
    tokenizer: Arc<TextTokenizer>,
    template: ChatTemplate,
    replicas: Arc<Replicas>,
    coordinator: Coordinator,
    admission: Admission,
    stalled_client: Duration,
    shutdown: Shutdown,
    /// Ends the tasks that ask peers who they are.
    _probes: DropGuard,
}

impl Gateway {
    /// A gateway in front of `peers`, which it begins to ask who they are. Call it within a tokio runtime.
    ///
    /// # Errors
    /// [`GatewayError`] if the checkpoint's tokenizer or template cannot be used, or its weights are there but cannot be read.
    pub fn new(config: GatewayConfig, checkpoint: Checkpoint, peers: Peers, shutdown: Shutdown) -> Result<Self, GatewayError> {
        metrics::describe();
        let tokenizer = Arc::new(TextTokenizer::new(&checkpoint)?);
        let template = ChatTemplate::new(&checkpoint)?;
        let replicas = Arc::new(Replicas::new(peers, &checkpoint)?);
        let probes = replicas.probe(&config);
        Ok(Self(Arc::new(Inner {
            limits: Limits::new(&config, &checkpoint),
            max_images: config.max_images as u32,
            max_request_bytes: config.max_request_bytes,
            coordinator: Coordinator::new(&config, Arc::clone(&replicas), Arc::clone(&tokenizer)),
            admission: Admission::new(config.max_concurrent_requests, shutdown.clone()),
            stalled_client: Duration::from_millis(config.stalled_client_ms),
            checkpoint,
            tokenizer,
            template,
            replicas,
            shutdown,
            _probes: probes,
        })))
    }

    /// The generated server around this gateway, behind admission.
    pub fn into_server(self) -> AdmissionServer<GatewayServiceServer<Self>> {
        let (admission, stalled_client, limit) = (self.0.admission.clone(), self.0.stalled_client, self.0.max_request_bytes);
        AdmissionServer::new(GatewayServiceServer::new(self).max_decoding_message_size(limit), admission, stalled_client)
    }

    /// Returns when a decoder and a vision replica of the same checkpoint are there.
    pub async fn wait_ready(&self) {
        // The sender lives as long as `self`.
        drop(self.watch_ready().wait_for(|ready| *ready).await);
    }

    /// Whether a decoder and a vision replica of the same checkpoint are there, now and whenever it changes.
    pub fn watch_ready(&self) -> watch::Receiver<bool> {
        self.0.replicas.watch_ready()
    }

    /// The name and the permit of a request. One that came past [`AdmissionServer`] gets them here.
    fn admitted<T>(&self, request: &mut Request<T>) -> Result<Admitted, Status> {
        match request.extensions_mut().remove() {
            Some(admitted) => Ok(admitted),
            None => self.0.admission.admit(Call::new(request.metadata().as_ref())),
        }
    }

    fn fingerprint(&self) -> Result<String, Status> {
        self.0.replicas.fingerprint().map_err(|why| status::unavailable(why, RETRY_AFTER))
    }

    /// Runs `work`, which takes the processor for up to seconds, where it stops no other request. The permit stays with it
    /// even if the caller goes away.
    async fn compute<T: Send + 'static>(
        &self,
        permit: Permit,
        work: impl FnOnce(&Inner) -> Result<T, Status> + Send + 'static,
    ) -> Result<(T, Permit), Status> {
        let inner = Arc::clone(&self.0);
        let span = tracing::Span::current();
        let done = tokio::task::spawn_blocking(move || span.in_scope(|| work(&inner)).map(|value| (value, permit)));
        done.await.unwrap_or_else(|e| {
            tracing::error!(cause = %e, "preparing a request failed");
            Err(Status::internal("preparing the request failed; the logs have the cause under the request id"))
        })
    }

    /// Prepares a generation and lets it run.
    async fn start(
        &self,
        admitted: Admitted,
        request: Generation,
        build_prompt: impl FnOnce(&Inner) -> Result<(Prompt, Vec<Picture>), Status> + Send + 'static,
    ) -> Result<ReceiverStream<Result<pb::GenerationEvent, Status>>, Status> {
        let Admitted { call, permit } = admitted;
        let model_fingerprint = self.fingerprint()?;
        let Generation { image_options, sampling, return_prompt_token_ids, cache_salt, priority } = request;
        let deadline = call.clone();
        let prepare = self.compute(permit, move |inner| {
            let (prompt, pictures) = build_prompt(inner)?;
            let media = Media::new(&model_fingerprint, image_options, &pictures);
            Ok(Job { call, model_fingerprint, prompt, media, image_options, sampling, return_prompt_token_ids, cache_salt, priority })
        });
        // Admission keeps the deadline as well, but what it ends is not counted as a generation.
        let (job, permit) = deadline.within_deadline(prepare).await?;
        let (events, stream) = Events::channel(self.0.stalled_client);
        let gateway = self.clone();
        tokio::spawn(async move { gateway.run(job, events, permit).await }.in_current_span());
        Ok(stream)
    }

    /// Runs a generation until it ends, its caller goes away, or the gateway shuts down.
    async fn run(&self, mut job: Job, events: Events, permit: Permit) {
        let _running = metrics::Running::new();
        let call = job.call.clone();
        let outcome = tokio::select! {
            biased;
            () = events.closed() => {
                tracing::debug!(request_id = call.request_id, "the caller went away");
                metrics::ended(Code::Cancelled);
                return;
            }
            () = self.0.shutdown.cancel.cancelled() => Err(cancelled()),
            outcome = call.within_deadline(self.0.coordinator.generate(&mut job, &events)) => outcome,
        };
        drop(permit);
        metrics::ended(outcome.as_ref().map_or_else(Status::code, |()| Code::Ok));
        if let Err(status) = outcome {
            tracing::debug!(request_id = call.request_id, code = ?status.code(), "failed");
            events.fail(status);
        }
    }
}

#[tonic::async_trait]
impl GatewayService for Gateway {
    type ChatStream = BoxStream<'static, Result<pb::ChatResponse, Status>>;
    type GenerateStream = BoxStream<'static, Result<pb::GenerateResponse, Status>>;

    async fn chat(&self, mut request: Request<pb::ChatRequest>) -> Result<Response<Self::ChatStream>, Status> {
        let admitted = self.admitted(&mut request)?;
        let call = admitted.call.clone();
        let span = tracing::info_span!("chat", request_id = call.request_id);
        let start = async {
            let ValidChat { turns, generation } = self.0.limits.chat(request.into_inner()).map_err(status::invalid_argument)?;
            let options = generation.image_options;
            let build_prompt = move |inner: &Inner| {
                let prompt = inner.conversation(&turns, options, "messages")?;
                Ok((prompt, pictures(turns)))
            };
            self.start(admitted, generation, build_prompt).await
        };
        let events = start.instrument(span).await.inspect_err(|status| metrics::ended(status.code()))?;
        let response = move |event: Result<_, Status>| match event {
            Ok(event) => Ok(pb::ChatResponse { event: Some(event) }),
            Err(status) => Err(call.sign(status)),
        };
        Ok(Response::new(events.map(response).boxed()))
    }

    async fn generate(&self, mut request: Request<pb::GenerateRequest>) -> Result<Response<Self::GenerateStream>, Status> {
        let admitted = self.admitted(&mut request)?;
        let call = admitted.call.clone();
        let span = tracing::info_span!("complete", request_id = call.request_id);
        let start = async {
            let ValidGenerate { prompt, pictures, generation } =
                self.0.limits.generate(request.into_inner()).map_err(status::invalid_argument)?;
            let options = generation.image_options;
            let build_prompt = move |inner: &Inner| {
                let prompt = inner.raw_prompt(prompt, options, Some(pictures.len()))?;
                Ok((prompt, pictures))
            };
            self.start(admitted, generation, build_prompt).await
        };
        let events = start.instrument(span).await.inspect_err(|status| metrics::ended(status.code()))?;
        let response = move |event: Result<_, Status>| match event {
            Ok(event) => Ok(pb::GenerateResponse { event: Some(event) }),
            Err(status) => Err(call.sign(status)),
        };
        Ok(Response::new(events.map(response).boxed()))
    }

    async fn tokenize(&self, mut request: Request<pb::TokenizeRequest>) -> Result<Response<pb::TokenizeResponse>, Status> {
        let Admitted { call, permit } = self.admitted(&mut request)?;
        let span = tracing::info_span!("tokenize", request_id = call.request_id);
        let work = async {
            let ValidTokenize { input, image_options } = self.0.limits.tokenize(request.into_inner()).map_err(status::invalid_argument)?;
            let tokenize = self.compute(permit, move |inner| {
                let Prompt { token_ids, image_tokens, .. } = match input {
                    TokenizeInput::Text(text) => inner.plain_text(text)?,
                    TokenizeInput::Prompt(prompt) => inner.raw_prompt(prompt, image_options, None)?,
                    TokenizeInput::Conversation(turns) => inner.conversation(&turns, image_options, "conversation.messages")?,
                };
                let tokens = token_ids.iter().map(|id| inner.tokenizer.token(*id).unwrap_or_default()).collect();
                Ok(pb::TokenizeResponse { token_ids, tokens, image_tokens })
            });
            tokenize.await.map(|(response, _)| response)
        };
        Ok(Response::new(work.instrument(span).await?))
    }

    async fn encode_images(&self, mut request: Request<pb::EncodeImagesRequest>) -> Result<Response<pb::EncodeImagesResponse>, Status> {
        let Admitted { call, permit } = self.admitted(&mut request)?;
        let span = tracing::info_span!("encode_images", request_id = call.request_id);
        let work = async {
            let ValidEncodeImages { pictures, image_options } =
                self.0.limits.encode_images(request.into_inner()).map_err(status::invalid_argument)?;
            let fingerprint = self.fingerprint()?;
            let named = fingerprint.clone();
            let (media, _permit) = self.compute(permit, move |_| Ok(Media::new(&named, image_options, &pictures))).await?;
            let encoded = self.0.coordinator.encode(&call, &media, image_options, &fingerprint).await?;
            self.0.images(&media, image_options, encoded)
        };
        let work = async {
            tokio::select! {
                response = work => response,
                () = self.0.shutdown.cancel.cancelled() => Err(cancelled()),
            }
        };
        Ok(Response::new(work.instrument(span).await?))
    }

    async fn get_model(&self, _: Request<pb::GetModelRequest>) -> Result<Response<pb::GetModelResponse>, Status> {
        let inner = &self.0;
        let (config, options) = (&inner.checkpoint.config, inner.limits.default_image_options);
        let fingerprint = self.fingerprint()?;
        let max_model_tokens = inner.replicas.max_model_tokens().map_err(|why| status::unavailable(why, RETRY_AFTER))?;
        Ok(Response::new(pb::GetModelResponse {
            name: inner.checkpoint.name(),
            fingerprint,
            max_model_tokens,
            vocab_size: config.text_config.vocab_size as u32,
            hidden_size: config.text_config.hidden_size as u32,
            tokens_per_image: inner.checkpoint.tokens_per_image() as u32,
            default_image_options: Some(pb::ImageOptions {
                split: Some(options.split),
                longest_edge: Some(options.longest_edge),
                shortest_edge: Some(options.shortest_edge),
            }),
            stop_token_ids: inner.checkpoint.stop_token_ids(),
            max_images: inner.max_images,
            version: env!("CARGO_PKG_VERSION").to_owned(),
        }))
    }
}

impl Inner {
    fn layout(&self, options: ImageOptions) -> ImageLayout {
        ImageLayout { tokens_per_image: self.checkpoint.tokens_per_image(), sub_images: options.sub_images() }
    }

    /// The prompt of a conversation; `field` is the path of its messages.
    fn conversation(&self, turns: &[Turn], options: ImageOptions, field: &str) -> Result<Prompt, Status> {
        let text = self.template.render(turns, &self.tokenizer).map_err(|e| match e {
            TemplateError::Missing => Status::failed_precondition("the checkpoint has no chat template; call Generate with a raw prompt"),
            TemplateError::Invalid(what) => status::invalid_argument(vec![Violation::new(field, what)]),
            TemplateError::Broken(cause) => {
                tracing::error!(cause, "the checkpoint's chat template failed");
                Status::internal("the checkpoint's chat template failed; the logs have the cause under the request id")
            }
        })?;
        let layout = self.layout(options);
        let prompt = prompt::build(&self.tokenizer, &text, layout).map_err(|e| tokenize_status(&e, field))?;
        let parts = turns.iter().flat_map(|turn| &turn.parts).filter(|part| matches!(part, Part::Image(_))).count();
        let (marks, parts) = (prompt.image_spans.len(), parts * layout.sub_images as usize);
        if marks != parts {
            tracing::error!(marks, parts, "the checkpoint's chat template does not print each picture once");
            return Err(Status::internal("the checkpoint's chat template does not print each picture once"));
        }
        Ok(prompt)
    }

    /// The prompt that a caller wrote, which has `pictures` of them if that matters.
    fn raw_prompt(&self, prompt: String, options: ImageOptions, pictures: Option<usize>) -> Result<Prompt, Status> {
        let (marks, limit) = (prompt.matches(IMAGE).count(), self.max_images as usize);
        if marks > limit {
            let what = format!("has {marks} {IMAGE} marks, limit is {limit}; write fewer or raise gateway.max_images");
            return Err(status::invalid_argument(vec![Violation::new("prompt", what)]));
        }
        let text = MarkedText::authored(prompt);
        let violations = prompt::check_marks(&self.tokenizer, &text, pictures);
        if !violations.is_empty() {
            return Err(status::invalid_argument(violations));
        }
        prompt::build(&self.tokenizer, &text, self.layout(options)).map_err(|e| tokenize_status(&e, "prompt"))
    }

    /// Ids of ordinary text, without BOS.
    fn plain_text(&self, text: String) -> Result<Prompt, Status> {
        let prompt = prompt::build(&self.tokenizer, &MarkedText::typed(text), self.layout(self.limits.default_image_options));
        let mut prompt = prompt.map_err(|e| tokenize_status(&e, "text"))?;
        prompt.token_ids.remove(0);
        Ok(prompt)
    }

    /// Joins the tokens of all pictures.
    fn images(&self, media: &Media, options: ImageOptions, encoded: Vec<EncodeResponse>) -> Result<pb::EncodeImagesResponse, Status> {
        let (rows, columns) = (
            u64::from(options.sub_images()) * self.checkpoint.tokens_per_image() as u64,
            self.checkpoint.config.text_config.hidden_size as u64,
        );
        let mut timings = pb::Timings::default();
        let mut tensors: Vec<tensor::Tensor> = Vec::with_capacity(encoded.len());
        for response in encoded {
            if let Some(times) = &response.timings {
                longest(&mut timings, times);
            }
            match response.image_tokens {
                Some(tensor) if tensor.shape == [rows, columns] && tensors.first().is_none_or(|first| first.dtype == tensor.dtype) => {
                    tensors.push(tensor)
                }
                other => {
                    tracing::error!(shape = ?other.map(|t| t.shape), rows, columns, "vision sent other image tokens than expected");
                    return Err(Status::internal("vision sent other image tokens than expected"));
                }
            }
        }
        let data = match (tensors.as_slice(), media.order.as_slice()) {
            ([only], [_]) => only.data.clone(),
            _ => {
                let mut data = BytesMut::with_capacity(media.order.iter().map(|index| tensors[*index].data.len()).sum());
                media.order.iter().for_each(|index| data.extend_from_slice(&tensors[*index].data));
                data.freeze()
            }
        };
        let image_tokens = tensor::Tensor {
            dtype: tensors.first().map_or(0, |first| first.dtype),
            shape: vec![rows * media.order.len() as u64, columns],
            data: Bytes::clone(&data),
        };
        let sub_images = vec![options.sub_images(); media.order.len()];
        Ok(pb::EncodeImagesResponse { image_tokens: Some(image_tokens), sub_images, timings: Some(timings) })
    }
}

fn pictures(turns: Vec<Turn>) -> Vec<Picture> {
    let picture = |part| if let Part::Image(picture) = part { Some(picture) } else { None };
    turns.into_iter().flat_map(|turn| turn.parts).filter_map(picture).collect()
}

fn tokenize_status(error: &TokenizeError, field: &str) -> Status {
    match error {
        TokenizeError::Unspeakable(_) => status::invalid_argument(vec![Violation::new(field, error.to_string())]),
        TokenizeError::Failed(cause) => {
            tracing::error!(%cause, "the tokenizer failed");
            Status::internal("the tokenizer failed; the logs have the cause under the request id")
        }
    }
}

fn cancelled() -> Status {
    status::unavailable("the gateway is shutting down; ask another", RETRY_AFTER)
}

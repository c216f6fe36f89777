//! A gateway in front of a decoder and a vision role that do what a test tells them, and report what they are asked.
#![allow(dead_code, unreachable_pub, reason = "each test file uses a part of it")]

use bytes::Bytes;
use futures::{Stream, StreamExt, stream};
use idefics_common::{
    channel::{GrpcChannel, in_process},
    checkpoint::{Checkpoint, Source},
    serve::Shutdown,
    status::{IMAGE_TOKENS_MISSING, SHIP_TO_NOT_ALLOWED, failed_precondition},
};
use idefics_gateway::{Gateway, GatewayConfig, Peer, Peers};
use idefics_proto::{
    decoder::v1::{
        self as decoder,
        decoder_service_server::{DecoderService, DecoderServiceServer},
    },
    gateway::v1::{self as pb, gateway_service_client::GatewayServiceClient},
    tensor::v1 as tensor,
    vision::v1::{
        self as vision,
        vision_service_server::{VisionService, VisionServiceServer},
    },
};
use std::{
    collections::{HashMap, HashSet, VecDeque},
    path::{Path, PathBuf},
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};
use tokio::sync::mpsc;
use tonic::{
    Code, Request, Response, Status,
    body::Body,
    codegen::{Service, StdError, http},
};

pub const FINGERPRINT: &str = "f1";
pub const BOS: u32 = 1;
pub const END_OF_UTTERANCE: u32 = 602;
pub const IMAGE: u32 = 601;
pub const FAKE: u32 = 600;

pub fn demo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../idefics/demo/checkpoint")
}

/// The demo checkpoint, as a gateway without weights has it.
pub fn checkpoint() -> Checkpoint {
    Checkpoint { source: Source::Folder("demo".into()), ..Checkpoint::open(Source::Folder(demo())).unwrap() }
}

/// What a role was asked, in the order in which the roles were.
#[derive(Clone, Debug, PartialEq)]
pub enum Asked {
    Reserve { decoder: String, request: decoder::ReserveRequest },
    Release { decoder: String, request_id: String },
    Encode { vision: String, request: vision::EncodeRequest, timeout: Option<String> },
    EncodeDropped,
    Generate { decoder: String, request: decoder::GenerateRequest },
    CancelChoice { decoder: String, request: decoder::CancelChoiceRequest },
    GenerateDropped,
}

impl Asked {
    /// The name of the call, and of who was called.
    pub fn name(&self) -> String {
        match self {
            Self::Reserve { decoder, .. } => format!("{decoder} reserve"),
            Self::Release { decoder, .. } => format!("{decoder} release"),
            Self::Encode { vision, .. } => format!("{vision} encode"),
            Self::EncodeDropped => "encode dropped".into(),
            Self::Generate { decoder, .. } => format!("{decoder} generate"),
            Self::CancelChoice { decoder, request } => format!("{decoder} cancel choice {}", request.choice),
            Self::GenerateDropped => "generate dropped".into(),
        }
    }
}

/// What a decoder does at `Generate`.
#[derive(Clone, Debug)]
pub enum Script {
    /// Sends these tokens, then the end.
    Tokens(Vec<u32>, decoder::FinishReason),
    /// Sends these tokens, each with its choice, then the end of these choices, then nothing more.
    Choices(Vec<(u32, u32)>, Vec<(u32, decoder::FinishReason)>),
    /// Sends these tokens, then nothing more.
    TokensThenNothing(Vec<u32>),
    /// Sends these tokens, then breaks off.
    TokensThenError(Vec<u32>, Code),
    /// Sends this part of the prompt with log-probabilities, then breaks off.
    PromptThenError(decoder::PromptLogprobs, Code),
    /// Sends these tokens with log-probabilities, then the end.
    Logprobs(Vec<u32>),
    /// Refuses, since the tokens of all images of the prompt are gone.
    Evicted,
    /// Refuses.
    Error(Code),
}

/// What a vision role does at `Encode`.
#[derive(Clone, Debug, Default)]
pub enum Encoding {
    #[default]
    Works,
    Never,
    Fails(Code, &'static str),
    Refuses(&'static str),
    MayNotShip,
}

/// A peer's behaviour, which a test may change while it runs.
pub struct Fake {
    pub uri: String,
    pub fingerprint: Mutex<String>,
    pub hidden_size: Mutex<u32>,
    pub file_hashes: Mutex<HashMap<String, String>>,
    /// `GetInfo` fails.
    pub silent: Mutex<bool>,
    /// Every call breaks off, as where a process has died.
    pub dead: Arc<AtomicBool>,
    pub reserve: Mutex<Result<(), Code>>,
    /// What `Generate` does, one after another; the last stays.
    pub scripts: Mutex<VecDeque<Script>>,
    pub encoding: Mutex<Encoding>,
    /// Image keys that the decoder has.
    pub stored: Mutex<HashSet<Bytes>>,
    asked: mpsc::UnboundedSender<Asked>,
}

impl Fake {
    fn report(&self, asked: Asked) {
        // A test may end before its peers do.
        drop(self.asked.send(asked));
    }
}

/// Reports when it is dropped.
struct OnDrop(Arc<Fake>, Option<Asked>);

impl Drop for OnDrop {
    fn drop(&mut self) {
        if let Some(asked) = self.1.take() {
            self.0.report(asked);
        }
    }
}

pub struct FakeDecoder(Arc<Fake>);
pub struct FakeVision(Arc<Fake>, Vec<Arc<Fake>>);

type Events = Pin<Box<dyn Stream<Item = Result<decoder::GenerateResponse, Status>> + Send>>;

#[tonic::async_trait]
impl DecoderService for FakeDecoder {
    type GenerateStream = Events;

    async fn reserve(&self, request: Request<decoder::ReserveRequest>) -> Result<Response<decoder::ReserveResponse>, Status> {
        let request = request.into_inner();
        self.0.report(Asked::Reserve { decoder: self.0.uri.clone(), request: request.clone() });
        if let Err(code) = *self.0.reserve.lock().unwrap() {
            return Err(Status::new(code, "told to"));
        }
        let stored = self.0.stored.lock().unwrap();
        let missing_image_keys = request.image_keys.into_iter().filter(|key| !stored.contains(key)).collect();
        Ok(Response::new(decoder::ReserveResponse { missing_image_keys, lease_ms: 1000 }))
    }

    async fn release(&self, request: Request<decoder::ReleaseRequest>) -> Result<Response<decoder::ReleaseResponse>, Status> {
        self.0.report(Asked::Release { decoder: self.0.uri.clone(), request_id: request.into_inner().request_id });
        Ok(Response::new(decoder::ReleaseResponse {}))
    }

    async fn put_image_tokens(
        &self,
        _: Request<decoder::PutImageTokensRequest>,
    ) -> Result<Response<decoder::PutImageTokensResponse>, Status> {
        Err(Status::unimplemented("the fake vision stores keys itself"))
    }

    async fn generate(&self, request: Request<decoder::GenerateRequest>) -> Result<Response<Events>, Status> {
        let request = request.into_inner();
        self.0.report(Asked::Generate { decoder: self.0.uri.clone(), request: request.clone() });
        let script = {
            let mut scripts = self.0.scripts.lock().unwrap();
            if scripts.len() > 1 { scripts.pop_front().unwrap() } else { scripts.front().cloned().unwrap() }
        };
        let token =
            |token_id: u32| Ok(event(decoder::generate_response::Event::Token(decoder::GeneratedToken { token_id, ..Default::default() })));
        let with_logprob = |token_id: u32| {
            let top = vec![decoder::TokenLogprob { token_id, logprob: -0.5 }, decoder::TokenLogprob { token_id: 5, logprob: -1.5 }];
            Ok(event(decoder::generate_response::Event::Token(decoder::GeneratedToken {
                token_id,
                logprob: Some(-0.5),
                top,
                ..Default::default()
            })))
        };
        let end_of = |(choice, reason): (u32, decoder::FinishReason)| {
            let decode_ms = 3.0 + f64::from(choice);
            let finished = decoder::Finished { choice, reason: reason.into(), queue_ms: 1.0, prefill_ms: 2.0, decode_ms };
            Ok(event(decoder::generate_response::Event::Finished(finished)))
        };
        let end = |reason: decoder::FinishReason| end_of((0, reason));
        let events: Events = match script {
            Script::Tokens(ids, reason) => Box::pin(stream::iter(ids.into_iter().map(token).chain([end(reason)]).collect::<Vec<_>>())),
            Script::Logprobs(ids) => {
                Box::pin(stream::iter(ids.into_iter().map(with_logprob).chain([end(decoder::FinishReason::Stop)]).collect::<Vec<_>>()))
            }
            Script::Choices(tokens, ends) => {
                let of_choice = |(choice, token_id): (u32, u32)| {
                    let token = decoder::GeneratedToken { choice, token_id, ..Default::default() };
                    Ok(event(decoder::generate_response::Event::Token(token)))
                };
                let events = tokens.into_iter().map(of_choice).chain(ends.into_iter().map(end_of)).collect::<Vec<_>>();
                Box::pin(stream::iter(events).chain(stream::pending()))
            }
            Script::TokensThenNothing(ids) => {
                Box::pin(stream::iter(ids.into_iter().map(token).collect::<Vec<_>>()).chain(stream::pending()))
            }
            Script::TokensThenError(ids, code) => {
                let error = Err(Status::new(code, "told to"));
                Box::pin(stream::iter(ids.into_iter().map(token).chain([error]).collect::<Vec<_>>()))
            }
            Script::PromptThenError(part, code) => {
                let part = Ok(event(decoder::generate_response::Event::PromptLogprobs(part)));
                Box::pin(stream::iter([part, Err(Status::new(code, "told to"))]))
            }
            Script::Evicted => {
                let keys: HashSet<Bytes> = request.image_spans.into_iter().map(|span| span.key).collect();
                self.0.stored.lock().unwrap().retain(|key| !keys.contains(key));
                return Err(failed_precondition(IMAGE_TOKENS_MISSING, keys.iter().map(|key| hex(key)), "put them first"));
            }
            Script::Error(code) => return Err(Status::new(code, "told to")),
        };
        let guard = OnDrop(Arc::clone(&self.0), Some(Asked::GenerateDropped));
        let mut first = Some(decoder::FirstToken { cached_tokens: 0, queue_ms: 1.0, prefill_ms: 2.0 });
        Ok(Response::new(Box::pin(events.map(move |mut event| {
            let _ = &guard;
            if let Ok(decoder::GenerateResponse { event: Some(decoder::generate_response::Event::Token(token)) }) = &mut event
                && token.choice == 0
            {
                token.first = first.take();
            }
            event
        }))))
    }

    async fn cancel_choice(
        &self,
        request: Request<decoder::CancelChoiceRequest>,
    ) -> Result<Response<decoder::CancelChoiceResponse>, Status> {
        self.0.report(Asked::CancelChoice { decoder: self.0.uri.clone(), request: request.into_inner() });
        Ok(Response::new(decoder::CancelChoiceResponse {}))
    }

    async fn get_info(&self, _: Request<decoder::GetInfoRequest>) -> Result<Response<decoder::GetInfoResponse>, Status> {
        if *self.0.silent.lock().unwrap() {
            return Err(Status::unavailable("told to"));
        }
        Ok(Response::new(decoder::GetInfoResponse {
            model_fingerprint: self.0.fingerprint.lock().unwrap().clone(),
            max_model_tokens: 512,
            tokens_per_image: 16,
            hidden_size: *self.0.hidden_size.lock().unwrap(),
            file_hashes: self.0.file_hashes.lock().unwrap().clone(),
            ..Default::default()
        }))
    }
}

#[tonic::async_trait]
impl VisionService for FakeVision {
    async fn encode(&self, request: Request<vision::EncodeRequest>) -> Result<Response<vision::EncodeResponse>, Status> {
        let timeout = request.metadata().get("grpc-timeout").and_then(|t| t.to_str().ok()).map(str::to_owned);
        let request = request.into_inner();
        self.0.report(Asked::Encode { vision: self.0.uri.clone(), request: request.clone(), timeout });
        let encoding = self.0.encoding.lock().unwrap().clone();
        match encoding {
            Encoding::Works => {}
            Encoding::Never => {
                let _guard = OnDrop(Arc::clone(&self.0), Some(Asked::EncodeDropped));
                std::future::pending::<()>().await;
            }
            Encoding::Fails(code, message) => return Err(Status::new(code, message)),
            Encoding::MayNotShip => return Err(failed_precondition(SHIP_TO_NOT_ALLOWED, [request.ship_to], "add it there")),
            Encoding::Refuses(what) => {
                return Err(idefics_common::status::invalid_argument(vec![idefics_common::status::Violation::new("image", what)]));
            }
        }
        let sub_images = if request.options.unwrap().split { 5 } else { 1 };
        let tokens = 16 * sub_images as u32;
        let mut image_tokens = None;
        if request.ship_to.is_empty() {
            let byte = request.image.first().copied().unwrap_or_default();
            let data = Bytes::from(vec![byte; tokens as usize * 256 * 4]);
            image_tokens = Some(tensor::Tensor { dtype: tensor::DataType::F32.into(), shape: vec![u64::from(tokens), 256], data });
        } else {
            let decoder = self.1.iter().find(|decoder| decoder.uri == request.ship_to).expect("shipped to a decoder of the test");
            decoder.stored.lock().unwrap().insert(request.key.clone());
        }
        let timings = Some(vision::EncodeTimings { preprocess_ms: 4.0, queue_ms: 5.0, encode_ms: 6.0, ship_ms: 7.0 });
        let sub_images = vec![vision::SubImage::default(); sub_images];
        Ok(Response::new(vision::EncodeResponse { key: request.key, sub_images, tokens, image_tokens, timings, cached: false }))
    }

    async fn get_info(&self, _: Request<vision::GetInfoRequest>) -> Result<Response<vision::GetInfoResponse>, Status> {
        if *self.0.silent.lock().unwrap() {
            return Err(Status::unavailable("told to"));
        }
        Ok(Response::new(vision::GetInfoResponse {
            model_fingerprint: self.0.fingerprint.lock().unwrap().clone(),
            tokens_per_image: 16,
            hidden_size: *self.0.hidden_size.lock().unwrap(),
            file_hashes: self.0.file_hashes.lock().unwrap().clone(),
            ..Default::default()
        }))
    }
}

fn event(event: decoder::generate_response::Event) -> decoder::GenerateResponse {
    decoder::GenerateResponse { event: Some(event) }
}

pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A channel that breaks when it is told to.
#[derive(Clone)]
struct Mortal(GrpcChannel, Arc<AtomicBool>);

impl Service<http::Request<Body>> for Mortal {
    type Response = http::Response<Body>;
    type Error = StdError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.0.poll_ready(context).map_err(Into::into)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        if self.1.load(Ordering::Relaxed) {
            return Box::pin(async { Err(std::io::Error::from(std::io::ErrorKind::ConnectionReset).into()) });
        }
        let answer = self.0.call(request);
        Box::pin(async move { Ok(answer.await?) })
    }
}

/// A gateway and its peers.
pub struct World {
    pub gateway: Gateway,
    pub decoders: Vec<Arc<Fake>>,
    pub visions: Vec<Arc<Fake>>,
    pub shutdown: Shutdown,
    asked: mpsc::UnboundedReceiver<Asked>,
}

pub struct Setup {
    pub config: GatewayConfig,
    pub checkpoint: Checkpoint,
    pub decoders: usize,
    pub visions: usize,
}

impl Default for Setup {
    fn default() -> Self {
        Self { config: GatewayConfig::default(), checkpoint: checkpoint(), decoders: 1, visions: 1 }
    }
}

impl Setup {
    /// Builds everything, but does not wait until the peers have answered.
    pub fn build(self) -> World {
        let (sender, asked) = mpsc::unbounded_channel();
        let fake = |uri: String| {
            Arc::new(Fake {
                uri,
                fingerprint: Mutex::new(FINGERPRINT.into()),
                hidden_size: Mutex::new(256),
                file_hashes: Mutex::new(self.checkpoint.hashes_of(&["config.json", "preprocessor_config.json", "tokenizer.json"])),
                silent: Mutex::new(false),
                dead: Arc::default(),
                reserve: Mutex::new(Ok(())),
                scripts: Mutex::new([Script::Tokens(vec![END_OF_UTTERANCE], decoder::FinishReason::Stop)].into()),
                encoding: Mutex::default(),
                stored: Mutex::default(),
                asked: sender.clone(),
            })
        };
        let decoders: Vec<_> = (0..self.decoders).map(|i| fake(format!("decoder-{i}"))).collect();
        let visions: Vec<_> = (0..self.visions).map(|i| fake(format!("vision-{i}"))).collect();
        let peer = |fake: &Arc<Fake>, channel: GrpcChannel| Peer {
            uri: fake.uri.clone(),
            channel: in_process(Mortal(channel, Arc::clone(&fake.dead))),
        };
        let peers = Peers {
            decoders: decoders.iter().map(|d| peer(d, in_process(DecoderServiceServer::new(FakeDecoder(Arc::clone(d)))))).collect(),
            visions: visions
                .iter()
                .map(|v| peer(v, in_process(VisionServiceServer::new(FakeVision(Arc::clone(v), decoders.clone())))))
                .collect(),
        };
        let shutdown = Shutdown::default();
        let gateway = Gateway::new(self.config, self.checkpoint, peers, shutdown.clone()).unwrap();
        World { gateway, decoders, visions, shutdown, asked }
    }

    pub async fn ready(self) -> World {
        let world = self.build();
        world.gateway.wait_ready().await;
        // With several peers the first answers are enough for readiness; the tests want all of them.
        world.settle().await;
        world
    }
}

impl World {
    pub async fn new() -> Self {
        Setup::default().ready().await
    }

    pub fn client(&self) -> GatewayServiceClient<GrpcChannel> {
        GatewayServiceClient::new(in_process(self.gateway.clone().into_server())).max_decoding_message_size(256 << 20)
    }

    /// What the peers are asked next.
    pub async fn asked(&mut self) -> Asked {
        self.asked.recv().await.expect("the fakes live as long as the world")
    }

    /// The names of the next calls.
    pub async fn asked_names(&mut self, count: usize) -> Vec<String> {
        let mut names = Vec::new();
        for _ in 0..count {
            names.push(self.asked().await.name());
        }
        names
    }

    /// Whether the peers were asked something more.
    pub fn asked_more(&mut self) -> Option<String> {
        self.asked.try_recv().ok().map(|asked| asked.name())
    }

    /// Lets every probe have its turn. Only with a paused clock, where it takes no time.
    pub async fn settle(&self) {
        tokio::time::sleep(Duration::from_secs(5)).await;
    }

    pub fn script(&self, scripts: impl IntoIterator<Item = Script>) {
        for decoder in &self.decoders {
            *decoder.scripts.lock().unwrap() = VecDeque::new();
        }
        *self.decoders[0].scripts.lock().unwrap() = scripts.into_iter().collect();
        let scripts = self.decoders[0].scripts.lock().unwrap().clone();
        for decoder in &self.decoders[1..] {
            decoder.scripts.lock().unwrap().clone_from(&scripts);
        }
    }
}

pub fn text(text: &str) -> pb::ContentPart {
    pb::ContentPart { part: Some(pb::content_part::Part::Text(text.into())) }
}

pub fn picture(bytes: &[u8]) -> pb::ContentPart {
    pb::ContentPart { part: Some(pb::content_part::Part::Image(pb::Image { data: Bytes::copy_from_slice(bytes) })) }
}

pub fn user(content: Vec<pb::ContentPart>) -> pb::Message {
    pb::Message { role: pb::Role::User.into(), content }
}

pub fn chat(content: Vec<pb::ContentPart>) -> pb::ChatRequest {
    pb::ChatRequest { messages: vec![user(content)], ..Default::default() }
}

/// A whole answer; text, ids and log-probabilities of all choices behind one another in the order in which they came.
#[derive(Debug, Default)]
pub struct Answer {
    pub started: Vec<pb::Started>,
    pub prompt_logprobs: Vec<pb::PromptLogprobs>,
    pub deltas: Vec<pb::Delta>,
    pub text: String,
    pub token_ids: Vec<u32>,
    pub logprobs: Vec<pb::TokenLogprobs>,
    pub finished: Option<pb::Finished>,
    pub error: Option<Status>,
}

impl Answer {
    pub fn take(&mut self, event: pb::GenerationEvent) {
        use pb::generation_event::Event;
        match event.event.expect("every event is one") {
            Event::Started(started) => self.started.push(started),
            Event::PromptLogprobs(part) => self.prompt_logprobs.push(part),
            Event::Delta(delta) => {
                self.text += &delta.text;
                self.token_ids.extend(delta.token_ids.iter().copied());
                self.logprobs.extend(delta.logprobs.iter().cloned());
                self.deltas.push(delta);
            }
            Event::Finished(finished) => self.finished = Some(finished),
        }
    }

    /// Why each choice ended, which its last delta says too.
    pub fn reasons(&self) -> Vec<pb::FinishReason> {
        let reasons: Vec<_> = self.finished.as_ref().expect("it has finished").finish_reasons().collect();
        for (choice, reason) in reasons.iter().enumerate() {
            let of_choice: Vec<_> = self.deltas.iter().filter(|delta| delta.choice as usize == choice).collect();
            let (last, before) = of_choice.split_last().expect("every choice has a delta");
            assert_eq!(last.finish_reason(), *reason);
            assert!(before.iter().all(|delta| delta.finish_reason() == pb::FinishReason::Unspecified));
        }
        reasons
    }
}

/// Reads an answer to its end.
pub async fn ask(world: &World, request: impl tonic::IntoRequest<pb::ChatRequest>) -> Answer {
    let mut answer = Answer::default();
    let mut stream = match world.client().chat(request).await {
        Ok(stream) => stream.into_inner(),
        Err(status) => return Answer { error: Some(status), ..answer },
    };
    loop {
        match stream.message().await {
            Ok(Some(response)) => answer.take(response.event.expect("every response has an event")),
            Ok(None) => return answer,
            Err(status) => return Answer { error: Some(status), ..answer },
        }
    }
}

/// Reads a continuation to its end.
pub async fn complete(world: &World, request: pb::GenerateRequest) -> Answer {
    let mut answer = Answer::default();
    let mut stream = match world.client().generate(request).await {
        Ok(stream) => stream.into_inner(),
        Err(status) => return Answer { error: Some(status), ..answer },
    };
    loop {
        match stream.message().await {
            Ok(Some(response)) => answer.take(response.event.expect("every response has an event")),
            Ok(None) => return answer,
            Err(status) => return Answer { error: Some(status), ..answer },
        }
    }
}

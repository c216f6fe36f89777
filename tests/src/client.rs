//! A small gRPC client of the gateway, for what the command line does not show: status codes, details, streams.

use crate::process::{DEADLINE, Server};
use idefics_proto::gateway::v1::{
    ChatRequest, ChatResponse, ContentPart, Delta, FinishReason, Finished, GenerateRequest, Image, Message, Role, SamplingOptions, Started,
    content_part::Part, gateway_service_client::GatewayServiceClient, generation_event::Event,
};
use std::time::{Duration, Instant};
use tonic::{Status, Streaming, transport::Channel};
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};
use tonic_types::StatusExt;

/// Room for the image tokens of several split pictures.
const MAX_MESSAGE_BYTES: usize = 64 << 20;

/// A channel to a server that is listening.
pub async fn channel(server: &Server) -> Channel {
    let endpoint = tonic::transport::Endpoint::new(server.endpoint()).expect("a valid endpoint");
    endpoint.connect().await.unwrap_or_else(|e| panic!("{}: {e:?}", server.endpoint()))
}

/// A client of the gateway at `server`.
pub async fn gateway(server: &Server) -> GatewayServiceClient<Channel> {
    let client = GatewayServiceClient::new(channel(server).await);
    client.max_decoding_message_size(MAX_MESSAGE_BYTES).max_encoding_message_size(MAX_MESSAGE_BYTES)
}

/// A text part.
pub fn text(text: &str) -> ContentPart {
    ContentPart { part: Some(Part::Text(text.to_owned())) }
}

/// A picture.
pub fn image(data: impl Into<Vec<u8>>) -> ContentPart {
    ContentPart { part: Some(Part::Image(Image { data: data.into().into() })) }
}

/// A conversation of one user turn, greedy, at most 16 new tokens, returning the prompt's ids.
pub fn chat(content: Vec<ContentPart>) -> ChatRequest {
    ChatRequest {
        messages: vec![Message { role: Role::User.into(), content }],
        sampling: Some(SamplingOptions { max_new_tokens: Some(16), ..Default::default() }),
        return_prompt_token_ids: true,
        ..Default::default()
    }
}

/// A raw prompt, greedy, at most `max_new_tokens`, returning the prompt's ids.
pub fn raw(prompt: &str, images: Vec<Vec<u8>>, max_new_tokens: u32) -> GenerateRequest {
    GenerateRequest {
        prompt: prompt.to_owned(),
        images: images.into_iter().map(|data| Image { data: data.into() }).collect(),
        sampling: Some(SamplingOptions { max_new_tokens: Some(max_new_tokens), ..Default::default() }),
        return_prompt_token_ids: true,
        ..Default::default()
    }
}

/// A whole answer.
#[derive(Clone, Debug, Default)]
pub struct Reply {
    /// The first event.
    pub started: Started,
    /// The text of choice 0.
    pub text: String,
    /// The ids of choice 0.
    pub token_ids: Vec<u32>,
    /// The last event.
    pub finished: Finished,
}

/// Sends a conversation and reads the answer to its end.
///
/// # Errors
/// The status with which the call or its stream ended.
pub async fn ask(client: &mut GatewayServiceClient<Channel>, request: ChatRequest) -> Result<Reply, Status> {
    let stream = within_deadline(client.chat(request)).await?.into_inner();
    within_deadline(collect(stream)).await
}

/// Sends a raw prompt and reads the answer to its end.
///
/// # Errors
/// The status with which the call or its stream ended.
pub async fn complete(client: &mut GatewayServiceClient<Channel>, request: GenerateRequest) -> Result<Reply, Status> {
    let mut stream = within_deadline(client.generate(request)).await?.into_inner();
    within_deadline(async {
        let mut reply = Reply::default();
        while let Some(message) = stream.message().await? {
            reply.push(message.event.and_then(|e| e.event));
        }
        Ok(reply)
    })
    .await
}

/// Reads a stream to its end.
///
/// # Errors
/// The status with which it ended.
pub async fn collect(mut stream: Streaming<ChatResponse>) -> Result<Reply, Status> {
    let mut reply = Reply::default();
    while let Some(message) = stream.message().await? {
        reply.push(message.event.and_then(|e| e.event));
    }
    Ok(reply)
}

impl Reply {
    /// Why choice 0 ended.
    pub fn reason(&self) -> FinishReason {
        self.finished.finish_reasons().next().unwrap_or_default()
    }

    fn push(&mut self, event: Option<Event>) {
        match event.expect("every event has content") {
            Event::Started(started) => self.started = started,
            Event::Delta(Delta { choice: 1.., .. }) => {}
            Event::Delta(Delta { text, token_ids, .. }) => {
                self.text.push_str(&text);
                self.token_ids.extend(token_ids);
            }
            Event::PromptLogprobs(_) => {}
            Event::Finished(finished) => self.finished = finished,
        }
    }
}

/// The fields that a status says were wrong.
pub fn violated_fields(status: &Status) -> Vec<String> {
    let details = status.get_error_details();
    details.bad_request().map(|bad| bad.field_violations.iter().map(|v| v.field.clone()).collect()).unwrap_or_default()
}

/// What `grpc.health.v1` says of a service; the empty name is the whole server. None while nobody listens.
pub async fn health(server: &Server, service: &str) -> Option<ServingStatus> {
    let mut client = HealthClient::new(tonic::transport::Endpoint::new(server.endpoint()).ok()?.connect().await.ok()?);
    let response = client.check(HealthCheckRequest { service: service.to_owned() }).await.ok()?;
    Some(response.into_inner().status())
}

/// Asks again until `probe` gives a value.
///
/// # Panics
/// If it does not in time.
pub async fn until<T>(what: &str, mut probe: impl AsyncFnMut() -> Option<T>) -> T {
    let start = Instant::now();
    while start.elapsed() < DEADLINE {
        if let Some(value) = probe().await {
            return value;
        }
        // Only the rate of asking; what is waited for is the answer.
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("{what}: not within {DEADLINE:?}")
}

/// The future's output.
///
/// # Panics
/// If it takes longer than a hang would.
pub async fn within_deadline<F: Future>(future: F) -> F::Output {
    tokio::time::timeout(DEADLINE, future).await.unwrap_or_else(|_| panic!("no answer within {DEADLINE:?}"))
}

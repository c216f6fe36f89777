//! One request: sent, read to its end, and checked to be the stream that the API promises. The only place that looks into the
//! gateway's events.

use anyhow::{Context, Result};
use idefics_proto::gateway::v1::{
    ChatRequest, Finished, GetModelRequest, GetModelResponse, Started, gateway_service_client::GatewayServiceClient,
    generation_event::Event,
};
use std::time::Duration;
use tokio::time::Instant;
use tonic::{
    Status,
    transport::{Channel, Endpoint},
};

/// Largest message either way: a request with several pictures.
const MAX_MESSAGE_BYTES: usize = 64 << 20;
/// HTTP/2 windows that a picture fits into.
const WINDOW_BYTES: u32 = 8 << 20;
/// Code of answers that are not what the API promises.
const PROTOCOL: &str = "Protocol";
/// Code of requests that took longer than the driver waits.
const TIMEOUT: &str = "Timeout";

/// A client of one gateway. Clones share a connection.
#[derive(Clone)]
pub struct Client {
    gateway: GatewayServiceClient<Channel>,
    timeout: Duration,
}

/// What became of a request.
#[derive(Clone, Debug)]
pub struct Reply {
    /// When each token of the answer came.
    pub token_times: Vec<Instant>,
    /// When the stream ended.
    pub ended: Instant,
    /// The answer, or why there is none.
    pub result: Result<Answer, Failure>,
}

/// A complete answer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Answer {
    /// All deltas.
    pub text: String,
    /// Tokens of the prompt, image tokens included.
    pub prompt_tokens: u32,
    /// Of those, the ones that were not computed.
    pub cached_tokens: u32,
    /// Tokens of the answer.
    pub completion_tokens: u32,
    /// The prompt's forward passes, as the server says.
    pub prefill_ms: f64,
    /// All that vision and decoder say they did or waited for before the first token, the prompt's forward passes among it.
    pub before_first_token_ms: f64,
}

/// Why a request was not answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// Name of the gRPC code, `Protocol`, or `Timeout`.
    pub code: String,
    /// What was said.
    pub message: String,
}

impl Failure {
    /// Whether the server said that it is full; everything else is an error.
    pub fn is_refusal(&self) -> bool {
        self.code == format!("{:?}", tonic::Code::ResourceExhausted)
    }
}

impl Client {
    /// A client of the gateway at `endpoint`, such as `http://127.0.0.1:50051`. A request that takes longer than `timeout` is
    /// an error.
    ///
    /// # Errors
    /// If `endpoint` is not a URI or nobody listens there.
    pub async fn connect(endpoint: &str, timeout: Duration) -> Result<Self> {
        let transport = Endpoint::from_shared(endpoint.to_owned())
            .with_context(|| format!("{endpoint:?} is not a URI such as http://127.0.0.1:50051"))?;
        let transport = transport.tcp_nodelay(true).initial_stream_window_size(WINDOW_BYTES).initial_connection_window_size(WINDOW_BYTES);
        let channel = transport.connect().await.with_context(|| format!("no gateway listens at {endpoint}"))?;
        let gateway = GatewayServiceClient::new(channel);
        let gateway = gateway.max_decoding_message_size(MAX_MESSAGE_BYTES).max_encoding_message_size(MAX_MESSAGE_BYTES);
        Ok(Self { gateway, timeout })
    }

    /// The model behind the gateway.
    ///
    /// # Errors
    /// If the gateway does not answer.
    pub async fn model(&self) -> Result<GetModelResponse> {
        Ok(self.gateway.clone().get_model(GetModelRequest {}).await.context("the gateway does not say which model it serves")?.into_inner())
    }

    /// Sends a request and reads its answer to the end.
    pub async fn ask(&self, request: ChatRequest) -> Reply {
        let expected_tokens = request.sampling.as_ref().and_then(|sampling| sampling.max_new_tokens);
        let mut token_times = Vec::new();
        let answered = tokio::time::timeout(self.timeout, self.read(request, &mut token_times)).await;
        let ended = Instant::now();
        let result = match answered {
            Ok(Ok(transcript)) => transcript.answer(expected_tokens),
            Ok(Err(failure)) => Err(failure),
            Err(_) => Err(Failure { code: TIMEOUT.into(), message: format!("no end within {:?}", self.timeout) }),
        };
        Reply { token_times, ended, result }
    }

    async fn read(&self, request: ChatRequest, token_times: &mut Vec<Instant>) -> Result<Transcript, Failure> {
        let mut stream = self.gateway.clone().chat(request).await.map_err(failure)?.into_inner();
        let mut transcript = Transcript::default();
        while let Some(response) = stream.message().await.map_err(failure)? {
            let tokens = transcript.push(response.event.and_then(|event| event.event))?;
            token_times.extend(std::iter::repeat_n(Instant::now(), tokens));
        }
        Ok(transcript)
    }
}

fn failure(status: Status) -> Failure {
    Failure { code: format!("{:?}", status.code()), message: status.message().to_owned() }
}

fn protocol(message: impl Into<String>) -> Failure {
    Failure { code: PROTOCOL.into(), message: message.into() }
}

/// The events of one answer so far: one `started`, then deltas, then one `finished`.
#[derive(Debug, Default)]
struct Transcript {
    started: Option<Started>,
    text: String,
    tokens: u32,
    finished: Option<Finished>,
}

impl Transcript {
    /// Takes the next event; returns how many tokens came with it.
    fn push(&mut self, event: Option<Event>) -> Result<usize, Failure> {
        if self.finished.is_some() {
            return Err(protocol("an event came behind `finished`"));
        }
        match (event, &self.started) {
            (Some(Event::Started(started)), None) => self.started = Some(started),
            (Some(Event::Delta(delta)), Some(_)) => {
                self.text.push_str(&delta.text);
                self.tokens += delta.token_ids.len() as u32;
                return Ok(delta.token_ids.len());
            }
            (Some(Event::Finished(finished)), Some(_)) => self.finished = Some(finished),
            (event, started) => return Err(protocol(format!("{event:?} came out of order, started: {}", started.is_some()))),
        }
        Ok(0)
    }

    /// The answer at the end of the stream.
    fn answer(self, expected_tokens: Option<u32>) -> Result<Answer, Failure> {
        let (Some(started), Some(finished)) = (self.started, self.finished) else {
            return Err(protocol("the stream ended without `finished`"));
        };
        let (usage, timings) = (finished.usage.unwrap_or_default(), finished.timings.unwrap_or_default());
        if usage.completion_tokens != self.tokens || expected_tokens.is_some_and(|expected| expected != self.tokens) {
            let (said, came) = (usage.completion_tokens, self.tokens);
            return Err(protocol(format!("{came} tokens came, usage says {said}, asked for {expected_tokens:?}")));
        }
        Ok(Answer {
            text: self.text,
            prompt_tokens: started.prompt_tokens,
            cached_tokens: usage.cached_tokens,
            completion_tokens: usage.completion_tokens,
            prefill_ms: timings.prefill_ms,
            before_first_token_ms: timings.preprocess_ms
                + timings.encode_queue_ms
                + timings.encode_ms
                + timings.ship_ms
                + timings.queue_ms
                + timings.prefill_ms,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use idefics_proto::gateway::v1::{Delta, Usage};

    fn events(tokens: u32, said: u32) -> Vec<Option<Event>> {
        let delta = Event::Delta(Delta { text: "a".into(), token_ids: vec![7; tokens as usize], ..Default::default() });
        let usage = Usage { completion_tokens: said, prompt_tokens: 5, ..Default::default() };
        let finished = Event::Finished(Finished { usage: Some(usage), ..Default::default() });
        vec![Some(Event::Started(Started { prompt_tokens: 5, ..Default::default() })), Some(delta), Some(finished)]
    }

    fn read(events: Vec<Option<Event>>, expected: Option<u32>) -> Result<Answer, Failure> {
        let mut transcript = Transcript::default();
        for event in events {
            transcript.push(event)?;
        }
        transcript.answer(expected)
    }

    #[test]
    fn complete_stream_is_an_answer() {
        let answer = read(events(3, 3), Some(3)).unwrap();
        assert_eq!((answer.text.as_str(), answer.prompt_tokens, answer.completion_tokens), ("a", 5, 3));
    }

    #[test]
    fn streams_that_do_not_end_exactly_once_are_errors() {
        let cut = events(3, 3)[..2].to_vec();
        let twice = [events(3, 3), events(3, 3)[2..].to_vec()].concat();
        let without_start = events(3, 3)[1..].to_vec();
        let empty = vec![None];
        for bad in [cut, twice, without_start, empty, events(3, 2), vec![]] {
            assert_eq!(read(bad.clone(), None).expect_err("it is broken").code, PROTOCOL, "{bad:?}");
        }
        assert_eq!(read(events(3, 3), Some(4)).expect_err("one is missing").code, PROTOCOL);
    }

    #[test]
    fn only_a_full_server_refuses() {
        assert!(failure(Status::resource_exhausted("")).is_refusal());
        assert!(!failure(Status::unavailable("")).is_refusal());
    }
}

//! One request on its way through the engine.

use crate::{block_manager::BlockTable, image_store::ImageTokens, sampler::Sampler};
use std::{ops::Range, sync::Arc, time::Instant};
use tokio::sync::mpsc;
use tracing::Span;

/// How the next token is chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SamplingParams {
    /// 0 picks the most likely token.
    pub temperature: f32,
    /// Smallest set of tokens whose probabilities reach this sum; 1 keeps all.
    pub top_p: f32,
    /// Most likely tokens to choose from; 0 keeps all.
    pub top_k: u32,
    /// Makes sampling repeatable.
    pub seed: u64,
    /// Log-probabilities of the generated token and of this many most likely ones.
    pub logprobs: Option<u32>,
}

/// A stretch of the prompt that takes rows of an image instead of embeddings.
#[derive(Clone, Debug)]
pub struct ImageSpan {
    /// Positions in the prompt.
    pub positions: Range<usize>,
    /// The image.
    pub image: Arc<ImageTokens>,
    /// Row of the image for the first position.
    pub first_row: usize,
}

/// What a caller asks for.
#[derive(Debug)]
pub struct Request {
    /// Names it in logs.
    pub request_id: String,
    /// The prompt.
    pub token_ids: Vec<u32>,
    /// Images in the prompt, in order.
    pub image_spans: Vec<ImageSpan>,
    /// Most tokens to generate.
    pub max_new_tokens: usize,
    /// How the next token is chosen.
    pub sampling: SamplingParams,
}

/// A token and its natural log-probability.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TokenLogprob {
    /// The token.
    pub token_id: u32,
    /// Its log-probability.
    pub logprob: f32,
}

/// Log-probabilities at one position.
#[derive(Clone, Debug, PartialEq)]
pub struct Logprobs {
    /// Of the generated token.
    pub logprob: f32,
    /// The most likely tokens, most likely first.
    pub top: Vec<TokenLogprob>,
}

/// Why generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// A stop id was generated.
    Stop,
    /// As many tokens as asked for were generated.
    Length,
}

/// What the engine reports of a sequence.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// A generated token.
    Token {
        /// The id.
        token_id: u32,
        /// If asked for.
        logprobs: Option<Logprobs>,
    },
    /// The last event.
    Finished {
        /// Why.
        reason: FinishReason,
        /// From submission to the first forward pass.
        queue_ms: f64,
        /// From there to the first token.
        prefill_ms: f64,
        /// From the first token to the last.
        decode_ms: f64,
    },
    /// The last event, if the step in which the sequence took part failed.
    Failed(String),
}

/// A request with its state.
pub struct Sequence {
    /// Names it in logs.
    pub request_id: String,
    /// Prompt and generated tokens.
    pub token_ids: Vec<u32>,
    /// Length of the prompt.
    pub prompt_len: usize,
    /// Tokens whose keys and values are in the cache.
    pub num_computed: usize,
    /// Images in the prompt.
    pub image_spans: Vec<ImageSpan>,
    /// Most tokens to generate.
    pub max_new_tokens: usize,
    /// Chooses its tokens.
    pub sampler: Sampler,
    /// Its blocks, while it runs.
    pub block_table: Option<BlockTable>,
    /// Where its events go. At most `max_new_tokens + 1` are ever sent, which bounds what a slow reader can hold.
    pub events: mpsc::UnboundedSender<Event>,
    /// The caller's span.
    pub span: Span,
    submitted_at: Instant,
    started_at: Option<Instant>,
    first_token_at: Option<Instant>,
}

impl Sequence {
    /// A sequence that has not run yet.
    pub fn new(request: Request, sampler: Sampler, events: mpsc::UnboundedSender<Event>, span: Span) -> Self {
        Self {
            prompt_len: request.token_ids.len(),
            request_id: request.request_id,
            token_ids: request.token_ids,
            num_computed: 0,
            image_spans: request.image_spans,
            max_new_tokens: request.max_new_tokens,
            sampler,
            block_table: None,
            events,
            span,
            submitted_at: Instant::now(),
            started_at: None,
            first_token_at: None,
        }
    }

    /// Tokens that it may have at the end.
    pub fn max_len(&self) -> usize {
        self.prompt_len + self.max_new_tokens
    }

    /// Tokens that wait for their forward pass: the rest of the prompt, or the last generated one.
    pub fn num_pending(&self) -> usize {
        self.token_ids.len() - self.num_computed
    }

    /// Whether nobody reads its events any more.
    pub fn is_abandoned(&self) -> bool {
        self.events.is_closed()
    }

    /// Notes that its first forward pass begins.
    pub fn mark_started(&mut self) {
        self.started_at.get_or_insert_with(Instant::now);
    }

    /// Appends a generated token and reports it; returns why generation ends, if it does.
    pub fn push(&mut self, token_id: u32, logprobs: Option<Logprobs>, stop_token_ids: &[u32]) -> Option<FinishReason> {
        self.first_token_at.get_or_insert_with(Instant::now);
        self.token_ids.push(token_id);
        drop(self.events.send(Event::Token { token_id, logprobs }));
        let reason = if stop_token_ids.contains(&token_id) {
            FinishReason::Stop
        } else if self.token_ids.len() == self.max_len() {
            FinishReason::Length
        } else {
            return None;
        };
        let ms = |from: Option<Instant>, to: Option<Instant>| from.zip(to).map_or(0.0, |(from, to)| (to - from).as_secs_f64() * 1e3);
        drop(self.events.send(Event::Finished {
            reason,
            queue_ms: ms(Some(self.submitted_at), self.started_at),
            prefill_ms: ms(self.started_at, self.first_token_at),
            decode_ms: ms(self.first_token_at, Some(Instant::now())),
        }));
        Some(reason)
    }
}

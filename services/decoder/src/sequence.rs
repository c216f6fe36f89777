//! One request on its way through the engine: a sequence for each of its choices.

use crate::{
    block_manager::{BlockHash, BlockTable},
    image_store::{ImageKey, ImageTokens},
    sampler::Sampler,
};
use std::{ops::Range, sync::Arc, time::Instant};
use tokio::sync::mpsc;
use tracing::Span;

/// How the next token is chosen and what ends generation.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// 0 picks the most likely token, and what follows up to `typical_p` does nothing.
    pub temperature: f32,
    /// Most likely tokens to choose from; 0 keeps all.
    pub top_k: u32,
    /// Smallest set of tokens whose probabilities reach this sum; 1 keeps all.
    pub top_p: f32,
    /// Tokens at least this likely, relative to the most likely one; 0 keeps all.
    pub min_p: f32,
    /// Most typical tokens whose probabilities reach this sum; 1 keeps all.
    pub typical_p: f32,
    /// Divides (or, below 0, multiplies) the logits of tokens in the prompt or the answer; 1 does nothing.
    pub repetition_penalty: f32,
    /// Is subtracted from the logits of tokens in the answer.
    pub presence_penalty: f32,
    /// Is subtracted from the logit of a token for each time that it is in the answer.
    pub frequency_penalty: f32,
    /// Is added to the logits of these ids, each named once.
    pub logit_bias: Vec<(u32, f32)>,
    /// Makes sampling repeatable.
    pub seed: u64,
    /// Ids that end generation, besides the checkpoint's.
    pub stop_token_ids: Vec<u32>,
    /// No id that ends generation is chosen before as many tokens were.
    pub min_new_tokens: u32,
    /// The checkpoint's own stop ids do not end generation.
    pub ignore_eos: bool,
    /// Log-probabilities of the generated token and of this many most likely ones.
    pub logprobs: Option<u32>,
}

impl SamplingParams {
    /// The most likely token, always.
    pub const GREEDY: Self = Self {
        temperature: 0.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        typical_p: 1.0,
        repetition_penalty: 1.0,
        presence_penalty: 0.0,
        frequency_penalty: 0.0,
        logit_bias: Vec::new(),
        seed: 0,
        stop_token_ids: Vec::new(),
        min_new_tokens: 0,
        ignore_eos: false,
        logprobs: None,
    };
}

/// A stretch of the prompt that takes rows of an image instead of embeddings.
#[derive(Clone, Debug)]
pub struct ImageSpan {
    /// Positions in the prompt.
    pub positions: Range<usize>,
    /// Names the image.
    pub key: ImageKey,
    /// The image.
    pub image: Arc<ImageTokens>,
    /// Row of the image for the first position.
    pub first_row: usize,
}

/// What a caller asks for.
#[derive(Clone, Debug)]
pub struct Request {
    /// Names it in logs.
    pub request_id: String,
    /// The prompt.
    pub token_ids: Vec<u32>,
    /// Images in the prompt, in order.
    pub image_spans: Vec<ImageSpan>,
    /// Answers to generate, 1 or more. They differ in their random streams only.
    pub n: usize,
    /// Most tokens to generate for each.
    pub max_new_tokens: usize,
    /// How the next token is chosen.
    pub sampling: SamplingParams,
    /// Log-probabilities of the prompt's tokens and of this many most likely ones in their places.
    pub prompt_logprobs: Option<u32>,
    /// From -10 to 10: who has more counts as having come earlier.
    pub priority: i32,
    /// What precedes the prompt in the prefix cache: only requests with the same root share blocks.
    pub cache_root: BlockHash,
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

/// Most of the likeliest tokens whose log-probabilities a request may ask for, as in the API of OpenAI.
pub const MAX_LOGPROBS: u32 = 20;

/// Most tokens in [`Event::PromptLogprobs`]: with 20 likely ones each, some 70 kB on the wire.
pub const MAX_PROMPT_LOGPROBS: usize = 256;

/// Why generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// A stop id was generated.
    Stop,
    /// As many tokens as asked for were generated.
    Length,
    /// The caller did not want more of this choice.
    Cancelled,
}

/// What is known of a request at its first token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FirstToken {
    /// Prompt tokens whose keys and values were in the cache.
    pub cached_tokens: usize,
    /// From submission to the first forward pass.
    pub queue_ms: f64,
    /// From there to the token.
    pub prefill_ms: f64,
}

/// What the engine reports of a request. Each choice ends with `Finished`, unless the request ends with `Failed`.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// Log-probabilities of tokens of the prompt, if asked for: before any token, once for each but the first, in order.
    PromptLogprobs {
        /// Index in the prompt of the first of them.
        start: usize,
        /// The tokens, at most [`MAX_PROMPT_LOGPROBS`].
        tokens: Vec<(u32, Logprobs)>,
    },
    /// A generated token.
    Token {
        /// Which answer it belongs to, from 0.
        choice: usize,
        /// The id.
        token_id: u32,
        /// If asked for.
        logprobs: Option<Logprobs>,
        /// With the first token of choice 0.
        first: Option<FirstToken>,
    },
    /// The last event of a choice.
    Finished {
        /// Which.
        choice: usize,
        /// Why.
        reason: FinishReason,
        /// From submission to the first forward pass.
        queue_ms: f64,
        /// From there to the first token.
        prefill_ms: f64,
        /// From the first token to the last.
        decode_ms: f64,
    },
    /// The last event of all choices, if a step in which one of them took part failed.
    Failed(String),
}

/// Log-probabilities of the prompt that a sequence reports.
#[derive(Clone, Copy, Debug)]
struct PromptLogprobs {
    /// Most likely tokens in each place.
    top: usize,
    /// Index of the first token that is not reported yet. Who gives blocks back keeps it, so that each is reported once.
    next: usize,
}

/// A sequence's place in the order of the scheduler: less is earlier.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rank {
    /// When its request arrived, moved by its priority; in microseconds from a moment that all have in common.
    pub virtual_arrival_us: i64,
    /// The request's number, in order of submission; all its choices have it.
    pub number: u64,
    /// Which of the request's answers it is.
    pub choice: usize,
}

/// One choice of a request, with its state.
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
    /// Its blocks; empty while it waits.
    pub block_table: BlockTable,
    /// Tokens guessed to follow the last one, to be checked in this step.
    pub draft: Vec<u32>,
    /// Full blocks that others know of.
    pub num_published: usize,
    /// The request's priority.
    pub priority: i32,
    /// When the request was submitted.
    pub submitted_at: Instant,
    /// Which of the request's answers it is, from 0.
    pub choice: usize,
    /// Choices of the same request that wait for this one's prompt to be in the cache.
    pub siblings: Vec<Self>,
    /// Where the events of all choices go. At most `max_new_tokens + 1` are ever sent for each, and the prompt's
    /// log-probabilities once, which bounds what a slow reader can hold.
    pub events: mpsc::UnboundedSender<Event>,
    /// The caller's span.
    pub span: Span,
    /// Hashes of its full blocks, as far as they were needed; the root first.
    block_hashes: Vec<BlockHash>,
    rank: Rank,
    prompt_logprobs: Option<PromptLogprobs>,
    cached_tokens: Option<usize>,
    started_at: Option<Instant>,
    first_token_at: Option<Instant>,
}

impl Sequence {
    /// The first choice of a request that has not run yet, with the others as its siblings.
    pub fn new(request: &Request, submitted_at: Instant, events: &mpsc::UnboundedSender<Event>, span: &Span) -> Self {
        let choice = |choice| Self {
            prompt_len: request.token_ids.len(),
            request_id: request.request_id.clone(),
            token_ids: request.token_ids.clone(),
            num_computed: 0,
            image_spans: request.image_spans.clone(),
            max_new_tokens: request.max_new_tokens,
            sampler: Sampler::new(request.sampling.clone(), &request.token_ids).with_stream(choice as u64),
            block_table: BlockTable::default(),
            draft: Vec::new(),
            num_published: 0,
            choice,
            siblings: Vec::new(),
            events: events.clone(),
            span: span.clone(),
            block_hashes: vec![request.cache_root],
            rank: Rank { choice, ..Rank::default() },
            priority: request.priority,
            prompt_logprobs: None,
            cached_tokens: None,
            submitted_at,
            started_at: None,
            first_token_at: None,
        };
        // The first token has no place before it that could foretell it.
        let prompt_logprobs = request.prompt_logprobs.map(|top| PromptLogprobs { top: top as usize, next: 1 });
        Self { siblings: (1..request.n).map(choice).collect(), prompt_logprobs, ..choice(0) }
    }

    /// Its place in the order of the scheduler. The choices of a request stand together.
    pub fn rank(&self) -> Rank {
        self.rank
    }

    /// The request's number, in order of submission; all its choices have it.
    pub fn number(&self) -> u64 {
        self.rank.number
    }

    /// Gives the request its place in the order.
    pub fn set_place(&mut self, virtual_arrival_us: i64, number: u64) {
        for rank in std::iter::once(&mut self.rank).chain(self.siblings.iter_mut().map(|sibling| &mut sibling.rank)) {
            *rank = Rank { virtual_arrival_us, number, ..*rank };
        }
    }

    /// The first of its siblings, if any wait for its prompt, which the others then wait for.
    pub fn take_heir(&mut self) -> Option<Self> {
        let mut siblings = std::mem::take(&mut self.siblings).into_iter();
        let heir = siblings.next()?;
        Some(Self { siblings: siblings.collect(), prompt_logprobs: self.prompt_logprobs.take(), ..heir })
    }

    /// Tokens that it may have at the end.
    pub fn max_len(&self) -> usize {
        self.prompt_len + self.max_new_tokens
    }

    /// Tokens that wait for their forward pass: the rest of the prompt, or the last generated one.
    pub fn num_pending(&self) -> usize {
        self.token_ids.len() - self.num_computed
    }

    /// Most tokens whose keys and values may come from the cache: not those behind which logits are wanted, be it for the next
    /// token or for the prompt's log-probabilities.
    pub fn max_cached(&self) -> usize {
        let reported = self.prompt_logprobs.filter(|p| p.next < self.prompt_len).map(|p| p.next - 1);
        reported.unwrap_or(self.token_ids.len() - 1)
    }

    /// The positions in `computed` behind which a token of the prompt stands whose log-probability is still to be reported.
    pub fn unreported_positions(&self, computed: Range<usize>) -> Range<usize> {
        let Some(PromptLogprobs { next, .. }) = self.prompt_logprobs else { return 0..0 };
        computed.start.max(next - 1)..computed.end.min(self.prompt_len - 1)
    }

    /// Most likely tokens that it reports in each place of the prompt.
    pub fn prompt_top(&self) -> usize {
        self.prompt_logprobs.map_or(0, |p| p.top)
    }

    /// Reports the log-probabilities of the next tokens of the prompt.
    pub fn report_prompt(&mut self, tokens: Vec<(u32, Logprobs)>) {
        let Some(PromptLogprobs { next, .. }) = &mut self.prompt_logprobs else { return };
        for tokens in tokens.chunks(MAX_PROMPT_LOGPROBS) {
            drop(self.events.send(Event::PromptLogprobs { start: *next, tokens: tokens.to_vec() }));
            *next += tokens.len();
        }
    }

    /// Whether nobody reads its events any more.
    pub fn is_abandoned(&self) -> bool {
        self.events.is_closed()
    }

    /// Hash of full block `index` and everything before it.
    ///
    /// # Panics
    /// If the sequence has no tokens for all of that block.
    pub fn block_hash(&mut self, index: usize, block_size: usize) -> BlockHash {
        while self.block_hashes.len() < index + 2 {
            let i = self.block_hashes.len() - 1;
            let block = i * block_size..(i + 1) * block_size;
            let images = self.image_spans.iter().flat_map(|span| {
                let (start, end) = (span.positions.start.max(block.start), span.positions.end.min(block.end));
                (start..end).map(|p| (p - block.start, span.key.0, span.first_row + p - span.positions.start))
            });
            let hash = self.block_hashes[i].then(&self.token_ids[block.clone()], images);
            self.block_hashes.push(hash);
        }
        self.block_hashes[index + 1]
    }

    /// Tokens that were in the cache when it first ran.
    pub fn cached_tokens(&self) -> usize {
        self.cached_tokens.unwrap_or(0)
    }

    /// Notes how many tokens were in the cache when it first ran.
    pub fn note_cached(&mut self, tokens: usize) {
        self.cached_tokens.get_or_insert(tokens);
    }

    /// Notes that its first forward pass begins.
    pub fn mark_started(&mut self) {
        self.started_at.get_or_insert_with(Instant::now);
    }

    /// Appends a generated token and reports it; returns why generation ends, if it does. `stop_token_ids` are the checkpoint's.
    pub fn push(&mut self, token_id: u32, logprobs: Option<Logprobs>, stop_token_ids: &[u32]) -> Option<FinishReason> {
        let is_first = self.first_token_at.is_none() && self.choice == 0;
        self.first_token_at.get_or_insert_with(Instant::now);
        self.token_ids.push(token_id);
        let (queue_ms, prefill_ms) = self.queue_and_prefill_ms();
        let first = is_first.then(|| FirstToken { cached_tokens: self.cached_tokens(), queue_ms, prefill_ms });
        drop(self.events.send(Event::Token { choice: self.choice, token_id, logprobs, first }));
        let reason = if self.sampler.ends_at(token_id, stop_token_ids) {
            FinishReason::Stop
        } else if self.token_ids.len() == self.max_len() {
            FinishReason::Length
        } else {
            return None;
        };
        self.finish(reason);
        Some(reason)
    }

    /// Reports that it has ended.
    pub fn finish(&self, reason: FinishReason) {
        let (queue_ms, prefill_ms) = self.queue_and_prefill_ms();
        let decode_ms = ms(self.first_token_at, Some(Instant::now()));
        drop(self.events.send(Event::Finished { choice: self.choice, reason, queue_ms, prefill_ms, decode_ms }));
    }

    fn queue_and_prefill_ms(&self) -> (f64, f64) {
        (ms(Some(self.submitted_at), self.started_at), ms(self.started_at, self.first_token_at))
    }
}

fn ms(from: Option<Instant>, to: Option<Instant>) -> f64 {
    from.zip(to).map_or(0.0, |(from, to)| (to - from).as_secs_f64() * 1e3)
}

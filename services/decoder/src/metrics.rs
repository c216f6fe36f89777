//! What the decoder's engine and its image store record.

use crate::{scheduler::Scheduled, sequence::Sequence};
use metrics::{Counter, Gauge, Histogram, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};
use std::time::Duration;

/// Handles on the engine's metrics, taken once.
pub(crate) struct EngineMetrics {
    requests_waiting: Gauge,
    requests_running: Gauge,
    kv_blocks_used: Gauge,
    kv_blocks: Gauge,
    preemptions: Counter,
    prompt_tokens: Counter,
    cached_prompt_tokens: Counter,
    generated_tokens: Counter,
    draft_tokens: Counter,
    accepted_tokens: Counter,
    steps_ahead: Counter,
    prefill_step_seconds: Histogram,
    decode_step_seconds: Histogram,
    mixed_step_seconds: Histogram,
    step_sequences: Histogram,
    step_tokens: Histogram,
}

/// Handles on the image store's metrics, taken once.
pub(crate) struct ImageStoreMetrics {
    bytes: Gauge,
    images: Gauge,
    reservations: Gauge,
    hits: Counter,
    misses: Counter,
    evictions: Counter,
}

impl ImageStoreMetrics {
    pub(crate) fn new() -> Self {
        describe_gauge!("idefics_decoder_image_store_bytes", "Image tokens kept for requests");
        describe_gauge!("idefics_decoder_image_store_images", "Images whose tokens are kept");
        describe_gauge!("idefics_decoder_reservations", "Requests admitted whose generation has not begun");
        describe_counter!(
            "idefics_decoder_image_store_lookups_total",
            "Images that admitted requests named, by result: hit if their tokens were there, miss if not"
        );
        describe_counter!("idefics_decoder_image_store_evictions_total", "Images that gave way to others");
        let lookups = |result: &'static str| counter!("idefics_decoder_image_store_lookups_total", "result" => result);
        Self {
            bytes: gauge!("idefics_decoder_image_store_bytes"),
            images: gauge!("idefics_decoder_image_store_images"),
            reservations: gauge!("idefics_decoder_reservations"),
            hits: lookups("hit"),
            misses: lookups("miss"),
            evictions: counter!("idefics_decoder_image_store_evictions_total"),
        }
    }

    /// Shows how full the store is.
    pub(crate) fn set_levels(&self, bytes: usize, images: usize) {
        self.bytes.set(bytes as f64);
        self.images.set(images as f64);
    }

    pub(crate) fn set_reservations(&self, reservations: usize) {
        self.reservations.set(reservations as f64);
    }

    /// Records what an admitted request found.
    pub(crate) fn looked_up(&self, hits: usize, misses: usize) {
        self.hits.increment(hits as u64);
        self.misses.increment(misses as u64);
    }

    pub(crate) fn evicted(&self) {
        self.evictions.increment(1);
    }
}

/// Counts that the engine keeps itself, as of now.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Levels {
    pub(crate) waiting: usize,
    pub(crate) running: usize,
    pub(crate) blocks_used: usize,
    pub(crate) blocks: usize,
    pub(crate) preemptions: usize,
}

impl EngineMetrics {
    pub(crate) fn new() -> Self {
        describe_gauge!("idefics_decoder_requests_waiting", "Choices of requests that wait for blocks or for their turn");
        describe_gauge!("idefics_decoder_requests_running", "Choices of requests that hold blocks");
        describe_gauge!("idefics_decoder_kv_blocks_used", "Blocks of the KV cache that requests hold");
        describe_gauge!("idefics_decoder_kv_blocks", "Blocks of the KV cache");
        describe_counter!("idefics_decoder_preemptions_total", "Choices of requests that gave their blocks back and started over");
        describe_counter!("idefics_decoder_prompt_tokens_total", "Prompt tokens of requests that started");
        describe_counter!("idefics_decoder_cached_prompt_tokens_total", "Of these, tokens found in the prefix cache");
        describe_counter!("idefics_decoder_generated_tokens_total", "Tokens generated");
        describe_counter!("idefics_decoder_draft_tokens_total", "Tokens guessed by prompt lookup");
        describe_counter!("idefics_decoder_accepted_draft_tokens_total", "Of these, the ones that were right");
        describe_counter!("idefics_decoder_steps_ahead_total", "Steps queued on the device before the tokens of the step before were seen");
        describe_histogram!("idefics_decoder_step_seconds", "Time of a step by phase: prefill, decode, or mixed");
        describe_histogram!("idefics_decoder_step_sequences_size", "Sequences in a step");
        describe_histogram!("idefics_decoder_step_tokens_size", "Tokens in a step");
        let step_seconds = |phase: &'static str| histogram!("idefics_decoder_step_seconds", "phase" => phase);
        Self {
            requests_waiting: gauge!("idefics_decoder_requests_waiting"),
            requests_running: gauge!("idefics_decoder_requests_running"),
            kv_blocks_used: gauge!("idefics_decoder_kv_blocks_used"),
            kv_blocks: gauge!("idefics_decoder_kv_blocks"),
            preemptions: counter!("idefics_decoder_preemptions_total"),
            prompt_tokens: counter!("idefics_decoder_prompt_tokens_total"),
            cached_prompt_tokens: counter!("idefics_decoder_cached_prompt_tokens_total"),
            generated_tokens: counter!("idefics_decoder_generated_tokens_total"),
            draft_tokens: counter!("idefics_decoder_draft_tokens_total"),
            accepted_tokens: counter!("idefics_decoder_accepted_draft_tokens_total"),
            steps_ahead: counter!("idefics_decoder_steps_ahead_total"),
            prefill_step_seconds: step_seconds("prefill"),
            decode_step_seconds: step_seconds("decode"),
            mixed_step_seconds: step_seconds("mixed"),
            step_sequences: histogram!("idefics_decoder_step_sequences_size"),
            step_tokens: histogram!("idefics_decoder_step_tokens_size"),
        }
    }

    /// Shows where the engine stands.
    pub(crate) fn set_levels(&self, levels: Levels) {
        self.requests_waiting.set(levels.waiting as f64);
        self.requests_running.set(levels.running as f64);
        self.kv_blocks_used.set(levels.blocks_used as f64);
        self.kv_blocks.set(levels.blocks as f64);
        self.preemptions.absolute(levels.preemptions as u64);
    }

    /// Shows that the engine has nothing any more: everything that it had has ended with it.
    pub(crate) fn ended(&self) {
        for gauge in [&self.requests_waiting, &self.requests_running, &self.kv_blocks_used] {
            gauge.set(0.0);
        }
    }

    /// Records a step that took `elapsed`, from its launch or, if it was queued behind another, from that one's end.
    pub(crate) fn step<'a>(&self, step: impl ExactSizeIterator<Item = &'a Scheduled> + Clone, elapsed: Duration) {
        let decodes = step.clone().filter(|part| part.num_tokens == 1 + part.num_drafts).count();
        let histogram = match decodes {
            0 => &self.prefill_step_seconds,
            n if n == step.len() => &self.decode_step_seconds,
            _ => &self.mixed_step_seconds,
        };
        histogram.record(elapsed);
        self.step_sequences.record(step.len() as f64);
        self.step_tokens.record(step.map(|part| part.num_tokens).sum::<usize>() as f64);
    }

    /// Records that a step was queued behind one whose tokens nobody has seen yet.
    pub(crate) fn step_ahead(&self) {
        self.steps_ahead.increment(1);
    }

    /// Records a request's first token.
    pub(crate) fn first_token(&self, sequence: &Sequence) {
        self.prompt_tokens.increment(sequence.prompt_len as u64);
        self.cached_prompt_tokens.increment(sequence.cached_tokens() as u64);
    }

    /// Records a sequence's part of a step: tokens chosen, guesses made and right.
    pub(crate) fn tokens(&self, generated: usize, drafted: usize, accepted: usize) {
        self.generated_tokens.increment(generated as u64);
        self.draft_tokens.increment(drafted as u64);
        self.accepted_tokens.increment(accepted as u64);
    }
}

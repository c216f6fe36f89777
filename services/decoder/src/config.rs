//! Section `decoder` of the configuration.

use idefics_common::config::Validate;
use serde::{Deserialize, Serialize};

/// How the decoder role works.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Longest prompt and answer together; 0 means the checkpoint's `max_position_embeddings`, or what the KV cache holds if
    /// that is less.
    pub max_model_tokens: usize,
    /// Memory of the KV cache; 0 means 4 GiB on the CPU, where pages that were never used cost nothing, and on a card what is free
    /// behind the model, less `device_reserve_bytes`.
    pub kv_cache_bytes: usize,
    /// Memory of a card that an automatic KV cache leaves free: for graphs, for code that libraries load late, and for whoever else
    /// comes to use the card. A vision role in the same process has loaded by then; one in another process needs some 3 GiB more.
    pub device_reserve_bytes: usize,
    /// Token slots per block of the KV cache.
    pub block_size_tokens: usize,
    /// Sequences that run at once.
    pub max_num_seqs: usize,
    /// Tokens in one forward pass: prompts are prefilled in chunks of at most this. 0 means 512 on the CPU and 4,096 on a card.
    pub max_num_batched_tokens: usize,
    /// Tokens guessed ahead in each step from a sequence's own text (prompt lookup), checked in the same forward pass; 0 turns
    /// it off. The answer stays the same; it comes faster where it repeats the prompt.
    pub prompt_lookup_tokens: usize,
    /// Requests that may be reserved, wait or run, each of their choices counted; more are refused.
    pub max_requests: usize,
    /// How much earlier a request counts as having come for each step of its priority; 0 ignores priorities.
    pub priority_step_ms: u64,
    /// Memory for image tokens that requests wait for or may use again.
    pub image_store_bytes: usize,
    /// A reservation that is not used ends after this time.
    pub lease_ms: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            max_model_tokens: 0,
            kv_cache_bytes: 0,
            device_reserve_bytes: 2 << 30,
            block_size_tokens: 16,
            max_num_seqs: 64,
            max_num_batched_tokens: 0,
            prompt_lookup_tokens: 0,
            max_requests: 256,
            priority_step_ms: 10_000,
            image_store_bytes: 512 << 20,
            lease_ms: 600_000,
        }
    }
}

impl Validate for Config {
    fn problems(&self, problems: &mut Vec<String>) {
        for (key, value) in [
            ("block_size_tokens", self.block_size_tokens),
            ("max_num_seqs", self.max_num_seqs),
            ("max_requests", self.max_requests),
            ("image_store_bytes", self.image_store_bytes),
            ("lease_ms", self.lease_ms as usize),
        ] {
            if value == 0 {
                problems.push(format!("decoder.{key} is 0, expected 1 or more"));
            }
        }
        if (1..self.max_num_seqs).contains(&self.max_num_batched_tokens) {
            problems.push(format!(
                "decoder.max_num_batched_tokens is {}, expected at least max_num_seqs, {}",
                self.max_num_batched_tokens, self.max_num_seqs
            ));
        }
    }
}

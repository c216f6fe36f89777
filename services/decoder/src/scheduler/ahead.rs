//! One step ahead: what is computed next, decided before anybody has seen the tokens that the step before gives.
//!
//! As in the schedulers of NanoFlow (Zhu et al. 2024, <https://arxiv.org/abs/2408.12757>), SGLang
//! (<https://lmsys.org/blog/2024-12-04-sglang-v0-4/#zero-overhead-batch-scheduler>) and TensorRT-LLM
//! (<https://nvidia.github.io/TensorRT-LLM/latest/features/overlap-scheduler.html>): the device goes on while the host looks at
//! tokens. A sequence that turns out to have ended has then computed one token too many, which nobody gets.
//!
//! Its blocks may be given to others at once. The device does one thing after the other, so what the superfluous token leaves in
//! its slot is there before anything that a later step writes. Nobody reads it: it stands behind all that the sequence has
//! published, in a block that is not full by what is known of it, and a block is published only by who has filled it.

use super::{Scheduled, Scheduler};
use crate::sequence::Rank;

/// A step that follows one whose tokens nobody has seen yet.
#[derive(Debug, PartialEq, Eq)]
pub struct Ahead {
    /// One token for each sequence: the one that it is about to get.
    pub step: Vec<Scheduled>,
    /// For each of them, its index in the step before.
    pub sources: Vec<usize>,
}

impl Scheduler {
    /// The step behind one that is in flight and gives one token to each of `in_flight`, in order, behind its last one; takes the
    /// blocks that it needs. Sequences that are abandoned are dropped first, and those that get their last token now have no part
    /// in it.
    ///
    /// `None` unless it is certain that nothing better can be done: every running sequence is in flight; there are blocks for all, so
    /// that nobody gives way; no guesses are to be made from the token; no choice waits for a prompt that is now computed; and nobody
    /// who waits could run instead, neither now nor in the place of one that is about to end. So a request that comes in, or that is
    /// let in by a stop nobody foresaw, waits for the step that is queued by then and for no other.
    pub fn schedule_ahead(&mut self, in_flight: &[Rank]) -> Option<Ahead> {
        self.drop_abandoned();
        if self.prompt_lookup_tokens > 0 {
            return None;
        }
        let (mut step, mut sources, mut missing) = (Vec::with_capacity(in_flight.len()), Vec::with_capacity(in_flight.len()), 0);
        for (i, sequence) in self.running.iter().enumerate() {
            let source = in_flight.binary_search(&sequence.rank()).ok()?;
            if !sequence.siblings.is_empty() {
                return None;
            }
            let tokens = sequence.token_ids.len() + 1;
            if tokens < sequence.max_len() {
                missing += self.blocks.blocks_for(tokens).saturating_sub(sequence.block_table.blocks().len());
                step.push(Scheduled { sequence: i, num_tokens: 1, num_drafts: 0 });
                sources.push(source);
            }
        }
        let one_ends = step.len() < self.running.len();
        let one_could_run = !self.waiting.is_empty() && (one_ends || self.has_room_for_first());
        if step.is_empty() || one_could_run || missing > self.blocks.num_free() {
            return None;
        }
        for part in &step {
            let sequence = &mut self.running[part.sequence];
            let tokens = sequence.token_ids.len() + 1;
            if !self.blocks.extend(&mut sequence.block_table, tokens) {
                return None;
            }
        }
        Some(Ahead { step, sources })
    }

    /// Whether the first that waits could run beside all that run.
    fn has_room_for_first(&mut self) -> bool {
        self.running.len() < self.max_num_seqs.min(self.max_num_batched_tokens) && self.fit_first().is_some()
    }
}

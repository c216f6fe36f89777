//! Decides which tokens the next step computes.

mod ahead;

use crate::{
    block_manager::{BlockHash, BlockManager, BlockTable},
    prompt_lookup,
    sequence::{FinishReason, Rank, Sequence},
};
pub use ahead::Ahead;
use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

/// Part of a step: the next `num_tokens` tokens of running sequence `sequence`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scheduled {
    /// Index into [`Scheduler::running`].
    pub sequence: usize,
    /// Tokens to compute, guessed ones included.
    pub num_tokens: usize,
    /// How many of them are guesses behind the sequence's last token ([`Sequence::draft`]).
    pub num_drafts: usize,
}

/// Sequences in order of arrival ([`Rank`]): nobody overtakes, except that a request counts as having
/// come earlier for its priority, or later. That bounds how long others can overtake it, so nobody starves. A running sequence
/// takes blocks as it grows; when none are left, the latest arrival gives its own back and starts over later from what is still
/// cached, so the oldest always gets on.
///
/// The choices of one request share its prompt's blocks: the first is queued alone, and the others join it, at its place in the
/// order, once its prompt is in the cache and known by its hashes.
pub struct Scheduler {
    /// In order.
    waiting: VecDeque<Sequence>,
    /// In order.
    running: Vec<Sequence>,
    num_requests: u64,
    /// What arrivals are counted from.
    epoch: Instant,
    /// How much earlier a request counts as having come for each step of its priority.
    priority_step: Duration,
    blocks: BlockManager,
    max_num_seqs: usize,
    max_num_batched_tokens: usize,
    prompt_lookup_tokens: usize,
    num_preemptions: usize,
}

impl Scheduler {
    /// An empty one.
    pub fn new(blocks: BlockManager, max_num_seqs: usize, max_num_batched_tokens: usize) -> Self {
        Self {
            waiting: VecDeque::new(),
            running: Vec::new(),
            num_requests: 0,
            epoch: Instant::now(),
            priority_step: Duration::ZERO,
            blocks,
            max_num_seqs,
            max_num_batched_tokens,
            prompt_lookup_tokens: 0,
            num_preemptions: 0,
        }
    }

    /// Guesses up to `tokens` tokens ahead for every decoding sequence.
    #[must_use]
    pub fn with_prompt_lookup(self, tokens: usize) -> Self {
        Self { prompt_lookup_tokens: tokens, ..self }
    }

    /// Lets a request count as having come by `step` earlier for each step of its priority.
    #[must_use]
    pub fn with_priority_step(self, step: Duration) -> Self {
        Self { priority_step: step, ..self }
    }

    /// Adds a request at its place in the order. Each of its choices must fit into the cache alone.
    pub fn add(&mut self, mut request: Sequence) {
        debug_assert!(self.blocks.blocks_for(request.max_len()) <= self.blocks.num_blocks());
        let arrival = micros(request.submitted_at.saturating_duration_since(self.epoch));
        let virtual_arrival = arrival.saturating_sub(micros(self.priority_step).saturating_mul(request.priority.into()));
        request.set_place(virtual_arrival, self.num_requests);
        self.num_requests += 1;
        self.enqueue(request);
    }

    /// Ends one choice of a request, which is told so. Unknown ones, and those that have ended, are ignored.
    pub fn cancel(&mut self, request_id: &str, choice: usize) {
        let is_it = |sequence: &Sequence| sequence.request_id == request_id && sequence.choice == choice;
        let cancelled = if let Some(i) = self.running.iter().position(is_it) {
            let mut sequence = self.running.remove(i);
            self.blocks.release(std::mem::take(&mut sequence.block_table));
            Some(sequence)
        } else if let Some(i) = self.waiting.iter().position(is_it) {
            self.waiting.remove(i)
        } else {
            let mut siblings = self.running.iter_mut().chain(&mut self.waiting).map(|sequence| &mut sequence.siblings);
            siblings.find_map(|siblings| siblings.iter().position(is_it).map(|i| siblings.remove(i)))
        };
        let Some(mut sequence) = cancelled else { return };
        sequence.finish(FinishReason::Cancelled);
        // Others may still wait for the prompt that it did not get to compute: the next of them does.
        if let Some(heir) = sequence.take_heir() {
            self.enqueue(heir);
        }
    }

    /// Whether nothing waits and nothing runs.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty()
    }

    /// Sequences that wait or run.
    pub fn len(&self) -> usize {
        self.waiting.iter().chain(&self.running).map(|sequence| 1 + sequence.siblings.len()).sum()
    }

    /// Sequences that run, in order. Whoever changes their tokens leaves their order alone.
    pub fn running(&mut self) -> &mut [Sequence] {
        &mut self.running
    }

    /// The index of a sequence among those that run; `None` if it does not, or not any more.
    pub fn position(&self, rank: Rank) -> Option<usize> {
        self.running.binary_search_by_key(&rank, Sequence::rank).ok()
    }

    /// How many run.
    pub fn num_running(&self) -> usize {
        self.running.len()
    }

    /// Blocks of the cache.
    pub fn blocks(&self) -> &BlockManager {
        &self.blocks
    }

    /// How often a sequence had to give its blocks back.
    pub fn num_preemptions(&self) -> usize {
        self.num_preemptions
    }

    /// The next step: every decoding sequence gets its token, what is left of the budget goes to prompts in order. Abandoned
    /// sequences are dropped first. Empty if there is nothing to do.
    pub fn schedule(&mut self) -> Vec<Scheduled> {
        self.drop_abandoned();
        let decodes = self.running.iter().filter(|sequence| sequence.num_pending() == 1).count();
        let mut prefill_budget = self.max_num_batched_tokens.saturating_sub(decodes);
        let mut scheduled = Vec::with_capacity(self.max_num_seqs);
        let num_preemptions = self.num_preemptions;
        let (mut i, mut admitting) = (0, true);
        loop {
            // Whoever comes first in order is next, be it one that runs or the first that waits. Who has just given way
            // waits for the next step.
            let admitted = admitting && num_preemptions == self.num_preemptions && self.waits_before(i) && {
                admitting = prefill_budget > 0 && self.running.len() < self.max_num_seqs && self.admit(i);
                admitting
            };
            let Some(sequence) = self.running.get(i) else { break };
            let is_decode = sequence.num_pending() == 1 && !admitted;
            let num_tokens = if is_decode { 1 } else { sequence.num_pending().min(prefill_budget) };
            if num_tokens > 0 {
                if !self.make_room(i, num_tokens) {
                    // It was the latest arrival itself that had to stop.
                    break;
                }
                prefill_budget -= if is_decode { 0 } else { num_tokens };
                scheduled.push(Scheduled { sequence: i, num_tokens, num_drafts: 0 });
            }
            i += 1;
        }
        self.draft(&mut scheduled, prefill_budget);
        scheduled
    }

    /// Adds guesses to decoding sequences, with what the step has left of its budget and the cache of free blocks: nobody
    /// gives way to a guess.
    fn draft(&mut self, scheduled: &mut [Scheduled], mut budget: usize) {
        if self.prompt_lookup_tokens == 0 {
            return;
        }
        for part in scheduled {
            let sequence = &mut self.running[part.sequence];
            sequence.draft.clear();
            // The sampler chooses one token behind the last guess.
            let room = sequence.max_len().saturating_sub(sequence.token_ids.len() + 1);
            if sequence.num_pending() != 1 || room == 0 {
                continue;
            }
            let guesses = prompt_lookup::propose(&sequence.token_ids, self.prompt_lookup_tokens.min(budget).min(room));
            let tokens = sequence.token_ids.len() + guesses.len();
            if !guesses.is_empty() && self.blocks.extend(&mut sequence.block_table, tokens) {
                sequence.draft.extend_from_slice(guesses);
                part.num_drafts = guesses.len();
                part.num_tokens += guesses.len();
                budget -= guesses.len();
            }
        }
    }

    /// Notes that the step was computed and its tokens chosen, and makes the blocks that it filled known to others. Guesses
    /// that were not chosen leave nothing behind but slots that are overwritten. Choices that waited for a prompt which is now
    /// in the cache are queued. Requests that `failed`, by their numbers, leave nothing in the cache.
    pub fn commit(&mut self, step: &[Scheduled], failed: &[u64]) {
        let mut ready = Vec::new();
        for part in step {
            let sequence = &mut self.running[part.sequence];
            if failed.contains(&sequence.number()) {
                continue;
            }
            // The newest token is always one that no step has seen.
            sequence.num_computed = (sequence.num_computed + part.num_tokens).min(sequence.token_ids.len() - 1);
            let full = sequence.num_computed / self.blocks.block_size();
            for index in sequence.num_published..full {
                let hash = sequence.block_hash(index, self.blocks.block_size());
                self.blocks.publish(&sequence.block_table, index, hash);
            }
            sequence.num_published = sequence.num_published.max(full);
            if sequence.num_computed >= sequence.prompt_len {
                ready.append(&mut sequence.siblings);
            }
        }
        ready.into_iter().for_each(|sequence| self.enqueue(sequence));
    }

    /// Takes running sequences out and gives their blocks back.
    pub fn remove(&mut self, indices: &[usize]) {
        let mut i = 0;
        self.retain(|_| {
            i += 1;
            !indices.contains(&(i - 1))
        });
    }

    /// Takes whole requests out that failed, by their numbers ([`Sequence::number`]), and gives their blocks back. What these
    /// hold is not to be trusted, so nobody finds them any more, whoever computed them.
    pub fn remove_failed(&mut self, numbers: &[u64]) {
        for sequence in self.running.iter().filter(|sequence| numbers.contains(&sequence.number())) {
            self.blocks.withdraw(&sequence.block_table);
        }
        self.waiting.retain(|sequence| !numbers.contains(&sequence.number()));
        self.retain(|sequence| !numbers.contains(&sequence.number()));
    }

    /// Puts a sequence at its place among those that wait.
    fn enqueue(&mut self, sequence: Sequence) {
        let at = self.waiting.partition_point(|other| other.rank() < sequence.rank());
        self.waiting.insert(at, sequence);
    }

    /// Whether the first that waits comes before running sequence `i`.
    fn waits_before(&self, i: usize) -> bool {
        let Some(waiting) = self.waiting.front() else { return false };
        self.running.get(i).is_none_or(|running| waiting.rank() < running.rank())
    }

    /// Lets the first waiting sequence run, as number `i`, if its prompt fits beside what runs already; it starts behind the
    /// prefix that is cached.
    fn admit(&mut self, i: usize) -> bool {
        let Some(hashes) = self.fit_first() else { return false };
        let Some(mut sequence) = self.waiting.pop_front() else { return false };
        let shared = self.blocks.share(&hashes, &mut sequence.block_table);
        let tokens = shared * self.blocks.block_size();
        sequence.num_computed = tokens;
        sequence.num_published = shared;
        sequence.note_cached(tokens);
        self.running.insert(i, sequence);
        true
    }

    /// The hashes of the blocks that the first waiting sequence may find in the cache, if its prompt fits beside what runs.
    fn fit_first(&mut self) -> Option<Vec<BlockHash>> {
        let sequence = self.waiting.front_mut()?;
        let block_size = self.blocks.block_size();
        let cacheable = sequence.max_cached() / block_size;
        let hashes: Vec<_> = (0..cacheable).map(|index| sequence.block_hash(index, block_size)).collect();
        let (cached, cached_free) = self.blocks.lookup(&hashes);
        let needed = self.blocks.blocks_for(sequence.token_ids.len()) - cached;
        // One block more for each that runs, so that admission is not at once followed by preemption.
        (needed + cached_free + self.running.len() <= self.blocks.num_free()).then_some(hashes)
    }

    /// Gives running sequence `i` blocks for its next tokens, taking them from later arrivals where none are free. Says no if
    /// `i` itself had to give its blocks back.
    fn make_room(&mut self, i: usize, num_tokens: usize) -> bool {
        loop {
            let sequence = &mut self.running[i];
            let tokens = sequence.num_computed + num_tokens;
            if self.blocks.extend(&mut sequence.block_table, tokens) {
                return true;
            }
            let latest = self.running.len() - 1;
            self.preempt();
            if latest == i {
                return false;
            }
        }
    }

    /// Sends the latest arrival back to its place among those that wait.
    fn preempt(&mut self) {
        if let Some(mut sequence) = self.running.pop() {
            self.blocks.release(std::mem::take(&mut sequence.block_table));
            sequence.num_computed = 0;
            sequence.num_published = 0;
            self.num_preemptions += 1;
            self.enqueue(sequence);
        }
    }

    /// Takes out whose events nobody reads any more.
    fn drop_abandoned(&mut self) {
        self.waiting.retain(|sequence| !sequence.is_abandoned());
        self.retain(|sequence| !sequence.is_abandoned());
    }

    /// Keeps the running sequences for which `keep` holds and frees the blocks of the others.
    fn retain(&mut self, mut keep: impl FnMut(&Sequence) -> bool) {
        let blocks = &mut self.blocks;
        self.running.retain_mut(|sequence| {
            let kept = keep(sequence);
            if !kept {
                let table: BlockTable = std::mem::take(&mut sequence.block_table);
                blocks.release(table);
            }
            kept
        });
    }
}

fn micros(duration: Duration) -> i64 {
    i64::try_from(duration.as_micros()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests;

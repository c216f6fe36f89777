//! Decides which tokens the next step computes.

use crate::{block_manager::BlockManager, sequence::Sequence};
use std::collections::VecDeque;

/// Part of a step: the next `num_tokens` tokens of running sequence `sequence`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scheduled {
    /// Index into [`Scheduler::running`].
    pub sequence: usize,
    /// Tokens to compute.
    pub num_tokens: usize,
}

/// Sequences in order of arrival. A sequence runs once its whole length fits into free blocks, so a running one never has to
/// stop for want of memory.
pub struct Scheduler {
    waiting: VecDeque<Sequence>,
    running: Vec<Sequence>,
    blocks: BlockManager,
    max_num_seqs: usize,
    max_num_batched_tokens: usize,
}

impl Scheduler {
    /// An empty one.
    pub fn new(blocks: BlockManager, max_num_seqs: usize, max_num_batched_tokens: usize) -> Self {
        Self { waiting: VecDeque::new(), running: Vec::new(), blocks, max_num_seqs, max_num_batched_tokens }
    }

    /// Adds a sequence at the end of the queue. It must fit into the cache alone.
    pub fn add(&mut self, sequence: Sequence) {
        debug_assert!(self.blocks.blocks_for(sequence.max_len()) <= self.blocks.num_blocks());
        self.waiting.push_back(sequence);
    }

    /// Whether nothing waits and nothing runs.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty()
    }

    /// Sequences that wait or run.
    pub fn len(&self) -> usize {
        self.waiting.len() + self.running.len()
    }

    /// Sequences that run, oldest first.
    pub fn running(&mut self) -> &mut [Sequence] {
        &mut self.running
    }

    /// Blocks of the cache.
    pub fn blocks(&self) -> &BlockManager {
        &self.blocks
    }

    /// The next step: every decoding sequence gets its token, what is left of the budget goes to prompts in order of arrival.
    /// Abandoned sequences are dropped first. Empty if there is nothing to do.
    pub fn schedule(&mut self) -> Vec<Scheduled> {
        self.waiting.retain(|sequence| !sequence.is_abandoned());
        self.retain(|sequence| !sequence.is_abandoned());
        while self.running.len() < self.max_num_seqs
            && let Some(next) = self.waiting.front()
            && let Some(table) = self.blocks.allocate(next.max_len())
            && let Some(mut sequence) = self.waiting.pop_front()
        {
            sequence.block_table = Some(table);
            self.running.push(sequence);
        }
        let mut budget = self.max_num_batched_tokens;
        let mut scheduled = Vec::with_capacity(self.running.len());
        let decoding = |sequence: &Sequence| sequence.num_pending() == 1;
        for pass_decodes in [true, false] {
            for (i, sequence) in self.running.iter().enumerate().filter(|(_, s)| decoding(s) == pass_decodes) {
                let num_tokens = sequence.num_pending().min(budget);
                if num_tokens > 0 {
                    scheduled.push(Scheduled { sequence: i, num_tokens });
                    budget -= num_tokens;
                }
            }
        }
        scheduled
    }

    /// Takes running sequences out and frees their blocks.
    pub fn remove(&mut self, indices: &[usize]) {
        let mut i = 0;
        self.retain(|_| {
            i += 1;
            !indices.contains(&(i - 1))
        });
    }

    /// Keeps the running sequences for which `keep` holds and frees the blocks of the others.
    fn retain(&mut self, mut keep: impl FnMut(&Sequence) -> bool) {
        let blocks = &mut self.blocks;
        self.running.retain_mut(|sequence| {
            let kept = keep(sequence);
            if !kept && let Some(table) = sequence.block_table.take() {
                blocks.free(table);
            }
            kept
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        sampler::Sampler,
        sequence::{Event, Request, SamplingParams},
    };
    use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

    fn sequence(prompt: usize, max_new_tokens: usize) -> (Sequence, UnboundedReceiver<Event>) {
        let (events, receiver) = unbounded_channel();
        let sampling = SamplingParams { temperature: 0.0, top_p: 1.0, top_k: 0, seed: 0, logprobs: None };
        let request = Request { request_id: String::new(), token_ids: vec![5; prompt], image_spans: vec![], max_new_tokens, sampling };
        (Sequence::new(request, Sampler::new(sampling), events, tracing::Span::none()), receiver)
    }

    fn compute(scheduler: &mut Scheduler, step: &[Scheduled]) {
        for part in step {
            scheduler.running()[part.sequence].num_computed += part.num_tokens;
        }
    }

    #[test]
    fn prompts_are_chunked_and_decodes_go_first() {
        let mut scheduler = Scheduler::new(BlockManager::new(64, 4), 8, 10);
        let (long, _long) = sequence(25, 4);
        let (short, _short) = sequence(3, 4);
        scheduler.add(long);
        scheduler.add(short);
        let step = scheduler.schedule();
        assert_eq!(step, [Scheduled { sequence: 0, num_tokens: 10 }]);
        compute(&mut scheduler, &step);
        let step = scheduler.schedule();
        compute(&mut scheduler, &step);
        let step = scheduler.schedule();
        assert_eq!(step, [Scheduled { sequence: 0, num_tokens: 5 }, Scheduled { sequence: 1, num_tokens: 3 }]);
        compute(&mut scheduler, &step);
        let (late, _late) = sequence(30, 4);
        scheduler.add(late);
        scheduler.running()[1].token_ids.push(6);
        let step = scheduler.schedule();
        assert_eq!(step, [Scheduled { sequence: 1, num_tokens: 1 }, Scheduled { sequence: 2, num_tokens: 9 }]);
    }

    #[test]
    fn sequences_wait_for_blocks_in_order() {
        let mut scheduler = Scheduler::new(BlockManager::new(4, 4), 8, 100);
        let (a, _a) = sequence(8, 4);
        let (b, _b) = sequence(8, 4);
        let (c, _c) = sequence(1, 1);
        for s in [a, b, c] {
            scheduler.add(s);
        }
        assert_eq!(scheduler.schedule().len(), 1, "c must not overtake b");
        scheduler.remove(&[0]);
        assert_eq!(scheduler.blocks().num_free(), 4);
        assert_eq!(scheduler.schedule().len(), 2);
    }

    #[test]
    fn abandoned_sequences_free_their_blocks_at_the_next_step() {
        let mut scheduler = Scheduler::new(BlockManager::new(8, 4), 8, 100);
        let (a, receiver) = sequence(8, 4);
        let (b, waiting) = sequence(30, 2);
        scheduler.add(a);
        scheduler.add(b);
        assert_eq!(scheduler.schedule().len(), 1);
        drop((receiver, waiting));
        assert!(scheduler.schedule().is_empty());
        assert!(scheduler.is_empty());
        assert_eq!(scheduler.blocks().num_free(), 8);
    }
}

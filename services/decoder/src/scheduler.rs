//! Decides which tokens the next step computes.

use crate::{
    block_manager::{BlockManager, BlockTable},
    prompt_lookup,
    sequence::Sequence,
};
use std::collections::VecDeque;

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

/// Sequences in order of arrival: nobody overtakes. A running sequence takes blocks as it grows; when none are left, the
/// latest arrival gives its own back and starts over later from what is still cached, so the oldest always gets on.
pub struct Scheduler {
    waiting: VecDeque<Sequence>,
    running: Vec<Sequence>,
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

    /// Sequences that wait.
    pub fn num_waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Sequences that run, oldest first.
    pub fn running(&mut self) -> &mut [Sequence] {
        &mut self.running
    }

    /// Blocks of the cache.
    pub fn blocks(&self) -> &BlockManager {
        &self.blocks
    }

    /// How often a sequence had to give its blocks back.
    pub fn num_preemptions(&self) -> usize {
        self.num_preemptions
    }

    /// The next step: every decoding sequence gets its token, what is left of the budget goes to prompts in order of arrival.
    /// Abandoned sequences are dropped first. Empty if there is nothing to do.
    pub fn schedule(&mut self) -> Vec<Scheduled> {
        self.waiting.retain(|sequence| !sequence.is_abandoned());
        self.retain(|sequence| !sequence.is_abandoned());
        let decodes = self.running.iter().filter(|sequence| sequence.num_pending() == 1).count();
        let mut prefill_budget = self.max_num_batched_tokens.saturating_sub(decodes);
        let mut scheduled = Vec::with_capacity(self.max_num_seqs);
        let mut i = 0;
        while i < self.running.len() {
            let sequence = &self.running[i];
            let num_tokens = if sequence.num_pending() == 1 { 1 } else { sequence.num_pending().min(prefill_budget) };
            if num_tokens > 0 && !self.make_room(i, num_tokens) {
                // It was the latest arrival itself that had to stop.
                break;
            }
            if num_tokens > 0 {
                prefill_budget -= if self.running[i].num_pending() == 1 { 0 } else { num_tokens };
                scheduled.push(Scheduled { sequence: i, num_tokens, num_drafts: 0 });
            }
            i += 1;
        }
        while prefill_budget > 0 && self.running.len() < self.max_num_seqs && self.admit() {
            let sequence = self.running.len() - 1;
            let num_tokens = self.running[sequence].num_pending().min(prefill_budget);
            if !self.make_room(sequence, num_tokens) {
                break;
            }
            prefill_budget -= num_tokens;
            scheduled.push(Scheduled { sequence, num_tokens, num_drafts: 0 });
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
    /// that were not chosen leave nothing behind but slots that are overwritten.
    pub fn commit(&mut self, step: &[Scheduled]) {
        for part in step {
            let sequence = &mut self.running[part.sequence];
            // The newest token is always one that no step has seen.
            sequence.num_computed = (sequence.num_computed + part.num_tokens).min(sequence.token_ids.len() - 1);
            let full = sequence.num_computed / self.blocks.block_size();
            for index in sequence.num_published..full {
                let hash = sequence.block_hash(index, self.blocks.block_size());
                self.blocks.publish(&sequence.block_table, index, hash);
            }
            sequence.num_published = sequence.num_published.max(full);
        }
    }

    /// Takes running sequences out and gives their blocks back.
    pub fn remove(&mut self, indices: &[usize]) {
        let mut i = 0;
        self.retain(|_| {
            i += 1;
            !indices.contains(&(i - 1))
        });
    }

    /// Lets the first waiting sequence run if its prompt fits beside what runs already; it starts behind the prefix that is
    /// cached.
    fn admit(&mut self) -> bool {
        let Some(sequence) = self.waiting.front_mut() else { return false };
        let block_size = self.blocks.block_size();
        // The last token must be computed: its logits are wanted.
        let cacheable = (sequence.token_ids.len() - 1) / block_size;
        let hashes: Vec<_> = (0..cacheable).map(|index| sequence.block_hash(index, block_size)).collect();
        let (cached, cached_free) = self.blocks.lookup(&hashes);
        let needed = self.blocks.blocks_for(sequence.token_ids.len()) - cached;
        // One block more for each that runs, so that admission is not at once followed by preemption.
        let reserve = if self.running.is_empty() { 0 } else { self.running.len() };
        if needed + cached_free + reserve > self.blocks.num_free() {
            return false;
        }
        let Some(mut sequence) = self.waiting.pop_front() else { return false };
        let shared = self.blocks.share(&hashes, &mut sequence.block_table);
        sequence.num_computed = shared * block_size;
        sequence.num_published = shared;
        sequence.note_cached(shared * block_size);
        self.running.push(sequence);
        true
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

    /// Sends the latest arrival back to the head of the queue.
    fn preempt(&mut self) {
        if let Some(mut sequence) = self.running.pop() {
            self.blocks.release(std::mem::take(&mut sequence.block_table));
            sequence.num_computed = 0;
            sequence.num_published = 0;
            self.num_preemptions += 1;
            self.waiting.push_front(sequence);
        }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        block_manager::BlockHash,
        sampler::Sampler,
        sequence::{Event, Request, SamplingParams},
    };
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;
    use std::collections::{BTreeMap, BTreeSet};
    use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

    fn sequence(token_ids: Vec<u32>, max_new_tokens: usize) -> (Sequence, UnboundedReceiver<Event>) {
        let (events, receiver) = unbounded_channel();
        let (sampling, sampler) = (SamplingParams::GREEDY, Sampler::new(SamplingParams::GREEDY, &token_ids));
        let cache_root = BlockHash::root(&[]);
        let request = Request { request_id: String::new(), token_ids, image_spans: vec![], max_new_tokens, sampling, cache_root };
        (Sequence::new(request, sampler, events, tracing::Span::none()), receiver)
    }

    /// A sequence whose prompt no other has.
    fn own(first: u32, prompt: usize, max_new_tokens: usize) -> (Sequence, UnboundedReceiver<Event>) {
        sequence((0..prompt as u32).map(|i| first * 1000 + i).collect(), max_new_tokens)
    }

    /// Computes a step: who has no tokens pending gets the next one. Returns how many ended.
    fn run(scheduler: &mut Scheduler, step: &[Scheduled]) -> usize {
        let mut finished = Vec::new();
        for part in step {
            let sequence = &mut scheduler.running()[part.sequence];
            // Guesses are right every other time.
            let right = if sequence.token_ids.len().is_multiple_of(2) { part.num_drafts } else { 0 };
            let ends_at_last = sequence.num_pending() + part.num_drafts == part.num_tokens;
            for _ in 0..if ends_at_last { 1 + right } else { 0 } {
                if sequence.push(7, None, &[]).is_some() {
                    finished.push(part.sequence);
                }
            }
        }
        scheduler.commit(step);
        scheduler.remove(&finished);
        finished.len()
    }

    #[test]
    fn prompts_are_chunked_and_decodes_go_first() {
        let mut scheduler = Scheduler::new(BlockManager::new(64, 4), 8, 10);
        let (long, _long) = own(1, 25, 4);
        let (short, _short) = own(2, 3, 4);
        scheduler.add(long);
        scheduler.add(short);
        let mut steps = Vec::new();
        for _ in 0..3 {
            let step = scheduler.schedule();
            run(&mut scheduler, &step);
            steps.push(step.iter().map(|part| (part.sequence, part.num_tokens)).collect::<Vec<_>>());
        }
        assert_eq!(steps, [vec![(0, 10)], vec![(0, 10)], vec![(0, 5), (1, 3)]]);
        let (late, _late) = own(3, 30, 4);
        scheduler.add(late);
        let step = scheduler.schedule();
        let parts: Vec<_> = step.iter().map(|part| (part.sequence, part.num_tokens)).collect();
        assert_eq!(parts, [(0, 1), (1, 1), (2, 8)]);
    }

    #[test]
    fn nobody_overtakes_who_waits_for_blocks() {
        let mut scheduler = Scheduler::new(BlockManager::new(4, 4), 8, 100);
        let (a, _a) = own(1, 12, 4);
        let (b, _b) = own(2, 8, 4);
        let (c, _c) = own(3, 1, 1);
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
        let (a, receiver) = own(1, 20, 4);
        let (b, waiting) = own(2, 30, 2);
        scheduler.add(a);
        scheduler.add(b);
        assert_eq!(scheduler.schedule().len(), 1);
        drop((receiver, waiting));
        assert!(scheduler.schedule().is_empty());
        assert!(scheduler.is_empty());
        assert_eq!(scheduler.blocks().num_free(), 8);
    }

    #[test]
    fn latest_arrival_gives_way_and_comes_back_to_its_prefix() {
        let mut scheduler = Scheduler::new(BlockManager::new(5, 4), 8, 100);
        let (a, mut a_events) = own(1, 4, 12);
        let (b, mut b_events) = own(2, 4, 8);
        scheduler.add(a);
        scheduler.add(b);
        let mut ended = 0;
        while ended < 2 {
            let step = scheduler.schedule();
            assert!(!step.is_empty());
            ended += run(&mut scheduler, &step);
        }
        assert!(scheduler.num_preemptions() > 0);
        let tokens = |events: &mut UnboundedReceiver<Event>| std::iter::from_fn(|| events.try_recv().ok()).count();
        assert_eq!((tokens(&mut a_events), tokens(&mut b_events)), (13, 9), "every token once, and the end");
        assert_eq!(scheduler.blocks().num_free(), 5);
    }

    #[test]
    fn second_turn_computes_only_what_is_new() {
        let mut scheduler = Scheduler::new(BlockManager::new(32, 4), 8, 100);
        let first: Vec<u32> = (0..10).collect();
        let (a, mut a_events) = sequence(first.clone(), 3);
        scheduler.add(a);
        while !scheduler.is_empty() {
            let step = scheduler.schedule();
            run(&mut scheduler, &step);
        }
        assert!(matches!(a_events.try_recv(), Ok(Event::Token { cached_tokens: Some(0), .. })));
        // 12 of the first turn's 13 tokens were computed and fill blocks: the last one was never fed back.
        let (b, mut b_events) = sequence([first, vec![7, 7, 7, 90, 91, 92]].concat(), 1);
        scheduler.add(b);
        let step = scheduler.schedule();
        assert_eq!(step, [Scheduled { sequence: 0, num_tokens: 16 - 12, num_drafts: 0 }]);
        run(&mut scheduler, &step);
        assert!(matches!(b_events.try_recv(), Ok(Event::Token { cached_tokens: Some(12), .. })));
    }

    #[test]
    fn same_prompt_again_still_computes_its_last_token() {
        let mut scheduler = Scheduler::new(BlockManager::new(32, 4), 8, 100);
        for expected in [8, 4] {
            let (s, _events) = sequence((0..8).collect(), 1);
            scheduler.add(s);
            let step = scheduler.schedule();
            assert_eq!(step[0].num_tokens, expected);
            run(&mut scheduler, &step);
        }
    }

    /// Who may hold a block together: only sequences whose tokens up to its end are the same.
    fn check_sharing(scheduler: &mut Scheduler) {
        let block_size = scheduler.blocks().block_size();
        let mut content: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
        let mut held = BTreeSet::new();
        for sequence in scheduler.running() {
            for (i, block) in sequence.block_table.blocks().iter().enumerate() {
                held.insert(*block);
                let end = sequence.token_ids.len().min((i + 1) * block_size);
                let tokens = sequence.token_ids[..end].to_vec();
                if let Some(other) = content.insert(*block, tokens.clone()) {
                    assert_eq!(other, tokens, "block {block} is shared by different prefixes");
                }
            }
        }
        assert_eq!(held.len() + scheduler.blocks().num_free(), scheduler.blocks().num_blocks(), "a block leaked");
    }

    #[test]
    fn random_schedules_lose_nothing_and_end_everything_once() {
        for seed in 0..60 {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            let block_size = rng.random_range(1..6);
            let num_blocks = rng.random_range(30 / block_size + 2..120 / block_size + 3);
            let (max_seqs, budget) = (rng.random_range(1..7), rng.random_range(7..40));
            let scheduler = Scheduler::new(BlockManager::new(num_blocks, block_size), max_seqs, budget);
            let mut scheduler = scheduler.with_prompt_lookup(seed as usize % 4);
            let mut receivers: Vec<(usize, Option<UnboundedReceiver<Event>>)> = Vec::new();
            let mut steps = 0;
            while receivers.len() < 40 || !scheduler.is_empty() {
                steps += 1;
                assert!(steps < 20_000, "seed {seed}: no progress");
                if receivers.len() < 40 && rng.random_bool(0.3) {
                    // Few different beginnings, so that prefixes are shared.
                    let (start, length) = (rng.random_range(0..3u32) * 1000, rng.random_range(1..20u32));
                    let max_new_tokens = rng.random_range(1..10);
                    let (s, receiver) = sequence((start..start + length).collect(), max_new_tokens);
                    scheduler.add(s);
                    receivers.push((max_new_tokens, Some(receiver)));
                }
                if rng.random_bool(0.05)
                    && let Some(i) = (!receivers.is_empty()).then(|| rng.random_range(0..receivers.len()))
                {
                    receivers[i].1 = None;
                }
                let step = scheduler.schedule();
                let distinct: BTreeSet<usize> = step.iter().map(|part| part.sequence).collect();
                assert_eq!(distinct.len(), step.len());
                let prefill: usize = step.iter().map(|part| part.num_tokens).sum();
                assert!(prefill <= budget.max(max_seqs), "seed {seed}: {prefill} tokens in a step");
                for part in &step {
                    let s = &scheduler.running()[part.sequence];
                    let covered = s.block_table.blocks().len() * block_size;
                    let real = part.num_tokens - part.num_drafts;
                    assert!(real > 0 && real <= s.num_pending() && s.num_computed + part.num_tokens <= covered);
                    assert!(part.num_drafts == 0 || s.token_ids.len() + part.num_drafts < s.max_len());
                }
                run(&mut scheduler, &step);
                check_sharing(&mut scheduler);
            }
            assert_eq!(scheduler.blocks().num_free(), num_blocks, "seed {seed}");
            for (max_new_tokens, receiver) in receivers {
                let Some(mut receiver) = receiver else { continue };
                let events: Vec<Event> = std::iter::from_fn(|| receiver.try_recv().ok()).collect();
                let ends = events.iter().filter(|event| matches!(event, Event::Finished { .. })).count();
                assert_eq!((events.len(), ends), (max_new_tokens + 1, 1), "seed {seed}");
            }
        }
    }
}

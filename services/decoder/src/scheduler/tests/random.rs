//! Random schedules: whatever comes when, no block is lost or shared wrongly, and every choice ends once; with steps that are
//! decided ahead, too.

use super::*;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::collections::{BTreeMap, BTreeSet};

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

struct Submitted {
    n: usize,
    /// Places of the prompt that are to be reported.
    prompt_logprobs: usize,
    max_new_tokens: usize,
    cancelled: BTreeSet<usize>,
    /// None: the caller went away.
    receiver: Option<UnboundedReceiver<Event>>,
}

/// The next step, if it keeps its promises.
fn scheduled(scheduler: &mut Scheduler, (max_seqs, budget): (usize, usize)) -> Vec<Scheduled> {
    let step = scheduler.schedule();
    let block_size = scheduler.blocks().block_size();
    let distinct: BTreeSet<usize> = step.iter().map(|part| part.sequence).collect();
    assert_eq!(distinct.len(), step.len());
    assert!(scheduler.running().is_sorted_by_key(|s| s.rank()), "running sequences are out of order");
    assert!(scheduler.num_running() <= max_seqs);
    let tokens: usize = step.iter().map(|part| part.num_tokens).sum();
    assert!(tokens <= budget.max(max_seqs), "{tokens} tokens in a step");
    for part in &step {
        let s = &scheduler.running()[part.sequence];
        let covered = s.block_table.blocks().len() * block_size;
        let real = part.num_tokens - part.num_drafts;
        assert!(real > 0 && real <= s.num_pending() && s.num_computed + part.num_tokens <= covered);
        assert!(part.num_drafts == 0 || s.token_ids.len() + part.num_drafts < s.max_len());
    }
    step
}

/// Whether a step gives one token for each of its parts and nothing else.
fn is_plain(scheduler: &mut Scheduler, step: &[Scheduled]) -> bool {
    let running = scheduler.running();
    step.iter().all(|part| {
        let s = &running[part.sequence];
        let reported = s.unreported_positions(s.num_computed..s.num_computed + part.num_tokens);
        part.num_drafts == 0 && part.num_tokens == s.num_pending() && reported.is_empty()
    })
}

/// The step behind `in_flight`, if it can be decided: everybody in it has room for the token that comes, and for one more behind it.
fn look_ahead(scheduler: &mut Scheduler, in_flight: &[Rank]) -> Option<InFlight> {
    let Ahead { step, sources } = scheduler.schedule_ahead(in_flight)?;
    assert_eq!(step.len(), sources.len());
    let block_size = scheduler.blocks().block_size();
    let named = named(scheduler, step);
    for ((rank, part), source) in named.iter().zip(sources) {
        let s = &scheduler.running()[part.sequence];
        assert_eq!((*rank, part.num_tokens, part.num_drafts), (in_flight[source], 1, 0));
        assert!(s.token_ids.len() + 1 < s.max_len() && s.token_ids.len() < s.block_table.blocks().len() * block_size);
    }
    Some(named)
}

/// A step with the sequences that had a part in it.
type InFlight = Vec<(Rank, Scheduled)>;

fn named(scheduler: &mut Scheduler, step: Vec<Scheduled>) -> InFlight {
    let running = scheduler.running();
    step.into_iter().map(|part| (running[part.sequence].rank(), part)).collect()
}

#[test]
fn random_schedules_lose_nothing_and_end_everything_once() {
    for seed in 0..60 {
        random_schedule(seed, false);
    }
}

#[test]
fn random_schedules_one_step_ahead_lose_nothing_and_end_everything_once() {
    assert!((0..60).map(|seed| random_schedule(seed, true)).sum::<usize>() > 1000, "steps must be decided ahead to matter");
}

/// Returns how many steps were decided ahead.
fn random_schedule(seed: u64, looks_ahead: bool) -> usize {
    let (mut num_ahead, mut ahead): (usize, Option<InFlight>) = (0, None);
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let block_size = rng.random_range(1..6);
    let num_blocks = rng.random_range(30 / block_size + 2..120 / block_size + 3);
    let (max_seqs, budget) = (rng.random_range(1..7), rng.random_range(7..40));
    let scheduler = Scheduler::new(BlockManager::new(num_blocks, block_size), max_seqs, budget);
    let mut scheduler = scheduler.with_prompt_lookup(seed as usize % 4).with_priority_step(Duration::from_millis(20));
    let mut submitted: Vec<Submitted> = Vec::new();
    let mut steps = 0;
    while submitted.len() < 40 || !scheduler.is_empty() {
        steps += 1;
        assert!(steps < 20_000, "seed {seed}: no progress");
        if submitted.len() < 40 && rng.random_bool(0.3) {
            // Few different beginnings, so that prefixes are shared.
            let (start, length) = (rng.random_range(0..3u32) * 1000, rng.random_range(1..20u32));
            let (n, max_new_tokens) = (rng.random_range(1..5), rng.random_range(1..10));
            let request_id = submitted.len().to_string();
            let prompt_logprobs = rng.random_bool(0.3).then_some(0);
            // A millisecond each step, so that some priorities overtake and others do not.
            let priority = if rng.random_bool(0.3) { rng.random_range(-10..=10) } else { 0 };
            let (arrived, prompt) = (steps as u64, (start..start + length).collect());
            let asked = Request { request_id, n, prompt_logprobs, priority, ..request(prompt, max_new_tokens) };
            let (s, receiver) = submit_at(&scheduler, arrived, &asked);
            scheduler.add(s);
            let prompt_logprobs = prompt_logprobs.map_or(0, |_| length as usize - 1);
            let cancelled = BTreeSet::new();
            submitted.push(Submitted { n, prompt_logprobs, max_new_tokens, cancelled, receiver: Some(receiver) });
        }
        if !submitted.is_empty() && rng.random_bool(0.1) {
            let i = rng.random_range(0..submitted.len());
            if rng.random_bool(0.3) {
                submitted[i].receiver = None;
            } else {
                let choice = rng.random_range(0..5);
                scheduler.cancel(&i.to_string(), choice);
                submitted[i].cancelled.insert(choice);
            }
        }
        let step = match ahead.take() {
            Some(step) => step,
            None => {
                let step = scheduled(&mut scheduler, (max_seqs, budget));
                named(&mut scheduler, step)
            }
        };
        // As the engine does: cancelled sequences are gone, and the step behind is decided before this one's tokens are seen.
        let place = |scheduler: &Scheduler| -> Vec<Scheduled> {
            step.iter().filter_map(|(rank, part)| scheduler.position(*rank).map(|sequence| Scheduled { sequence, ..*part })).collect()
        };
        let here = place(&scheduler);
        if looks_ahead && is_plain(&mut scheduler, &here) {
            let ranks: Vec<Rank> = step.iter().map(|(rank, _)| *rank).collect();
            ahead = look_ahead(&mut scheduler, &ranks);
            num_ahead += usize::from(ahead.is_some());
        }
        let here = place(&scheduler);
        run_until(&mut scheduler, &here, || rng.random_bool(0.05));
        check_sharing(&mut scheduler);
    }
    assert_eq!((scheduler.blocks().num_free(), scheduler.len()), (num_blocks, 0), "seed {seed}");
    for Submitted { n, prompt_logprobs, max_new_tokens, cancelled, receiver } in submitted {
        let Some(mut receiver) = receiver else { continue };
        let ended = ended_once(&mut receiver, n);
        let all_cancelled = (0..n).all(|choice| cancelled.contains(&choice));
        assert!(ended.prompt_logprobs == prompt_logprobs || all_cancelled, "seed {seed}: {}", ended.prompt_logprobs);
        for (choice, (tokens, reason)) in ended.choices.into_iter().enumerate() {
            let whole = (max_new_tokens, FinishReason::Length);
            // A choice may have ended before it was cancelled.
            let cut = cancelled.contains(&choice) && reason == FinishReason::Cancelled;
            let right = (tokens, reason) == whole || cut || (1..=max_new_tokens).contains(&tokens) && reason == FinishReason::Stop;
            assert!(right, "seed {seed}: {tokens} of {max_new_tokens} tokens, {reason:?}");
        }
    }
    num_ahead
}

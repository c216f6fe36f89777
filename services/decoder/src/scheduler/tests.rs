//! Schedules without a model: who runs when, and that no block and no token is lost.

use super::*;
use crate::{
    block_manager::BlockHash,
    sequence::{Event, FirstToken, Logprobs, MAX_PROMPT_LOGPROBS, Request, SamplingParams},
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::collections::{BTreeMap, BTreeSet};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

fn request(token_ids: Vec<u32>, max_new_tokens: usize) -> Request {
    let cache_root = BlockHash::root(&[]);
    Request {
        request_id: "r".into(),
        token_ids,
        image_spans: vec![],
        n: 1,
        max_new_tokens,
        sampling: SamplingParams::GREEDY,
        prompt_logprobs: None,
        priority: 0,
        cache_root,
    }
}

fn submit(request: &Request) -> (Sequence, UnboundedReceiver<Event>) {
    let (events, receiver) = unbounded_channel();
    (Sequence::new(request, Instant::now(), &events, &tracing::Span::none()), receiver)
}

/// A request that came so many milliseconds after the scheduler was made.
fn submit_at(scheduler: &Scheduler, ms: u64, request: &Request) -> (Sequence, UnboundedReceiver<Event>) {
    let (events, receiver) = unbounded_channel();
    (Sequence::new(request, scheduler.epoch + Duration::from_millis(ms), &events, &tracing::Span::none()), receiver)
}

fn sequence(token_ids: Vec<u32>, max_new_tokens: usize) -> (Sequence, UnboundedReceiver<Event>) {
    submit(&request(token_ids, max_new_tokens))
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
        // Each place of the prompt is reported with its index for a token.
        let wanted = sequence.unreported_positions(sequence.num_computed..sequence.num_computed + part.num_tokens);
        sequence.report_prompt(wanted.map(|position| (position as u32 + 1, Logprobs { logprob: 0.0, top: vec![] })).collect());
        // Guesses are right every other time.
        let right = if sequence.token_ids.len().is_multiple_of(2) { part.num_drafts } else { 0 };
        let ends_at_last = sequence.num_pending() + part.num_drafts == part.num_tokens;
        for _ in 0..if ends_at_last { 1 + right } else { 0 } {
            if sequence.push(7, None, &[]).is_some() {
                finished.push(part.sequence);
            }
        }
    }
    scheduler.commit(step, &[]);
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
    assert!(matches!(a_events.try_recv(), Ok(Event::Token { first: Some(FirstToken { cached_tokens: 0, .. }), .. })));
    // 12 of the first turn's 13 tokens were computed and fill blocks: the last one was never fed back.
    let (b, mut b_events) = sequence([first, vec![7, 7, 7, 90, 91, 92]].concat(), 1);
    scheduler.add(b);
    let step = scheduler.schedule();
    assert_eq!(step, [Scheduled { sequence: 0, num_tokens: 16 - 12, num_drafts: 0 }]);
    run(&mut scheduler, &step);
    assert!(matches!(b_events.try_recv(), Ok(Event::Token { first: Some(FirstToken { cached_tokens: 12, .. }), .. })));
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

/// What a request got.
struct Ended {
    /// Tokens of each choice and why it ended.
    choices: Vec<(usize, FinishReason)>,
    /// Tokens of the prompt that were reported.
    prompt_logprobs: usize,
}

/// What a request got, if each choice ended once with nothing behind its end, and the prompt was reported in order and first.
fn ended_once(receiver: &mut UnboundedReceiver<Event>, n: usize) -> Ended {
    let mut prompt_logprobs = 0;
    let mut tokens = vec![0; n];
    let mut ends = vec![None; n];
    while let Ok(event) = receiver.try_recv() {
        match event {
            Event::PromptLogprobs { start, tokens: reported } => {
                assert!(tokens.iter().all(|tokens| *tokens == 0), "the prompt comes first");
                let expected: Vec<usize> = (prompt_logprobs + 1..).take(reported.len()).collect();
                assert_eq!((start, reported.iter().map(|(id, _)| *id as usize).collect()), (expected[0], expected));
                prompt_logprobs += reported.len();
            }
            Event::Token { choice, .. } => {
                assert_eq!(ends[choice], None, "a token of a choice that has ended");
                tokens[choice] += 1;
            }
            Event::Finished { choice, reason, .. } => assert_eq!(ends[choice].replace(reason), None, "choice {choice} ended twice"),
            Event::Failed(error) => panic!("{error}"),
        }
    }
    let choices = tokens.into_iter().zip(ends).map(|(tokens, end)| (tokens, end.expect("every choice ends")));
    Ended { choices: choices.collect(), prompt_logprobs }
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

#[test]
fn random_schedules_lose_nothing_and_end_everything_once() {
    for seed in 0..60 {
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
            let step = scheduler.schedule();
            let distinct: BTreeSet<usize> = step.iter().map(|part| part.sequence).collect();
            assert_eq!(distinct.len(), step.len());
            assert!(scheduler.running().is_sorted_by_key(|s| s.rank()), "seed {seed}: running sequences are out of order");
            assert!(scheduler.num_running() <= max_seqs);
            let tokens: usize = step.iter().map(|part| part.num_tokens).sum();
            assert!(tokens <= budget.max(max_seqs), "seed {seed}: {tokens} tokens in a step");
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
        assert_eq!((scheduler.blocks().num_free(), scheduler.len()), (num_blocks, 0), "seed {seed}");
        for Submitted { n, prompt_logprobs, max_new_tokens, cancelled, receiver } in submitted {
            let Some(mut receiver) = receiver else { continue };
            let ended = ended_once(&mut receiver, n);
            let all_cancelled = (0..n).all(|choice| cancelled.contains(&choice));
            assert!(ended.prompt_logprobs == prompt_logprobs || all_cancelled, "seed {seed}: {}", ended.prompt_logprobs);
            for (choice, (tokens, reason)) in ended.choices.into_iter().enumerate() {
                let whole = (max_new_tokens, FinishReason::Length);
                // A choice may have ended before it was cancelled.
                let right = (tokens, reason) == whole || cancelled.contains(&choice) && reason == FinishReason::Cancelled;
                assert!(right, "seed {seed}: {tokens} of {max_new_tokens} tokens, {reason:?}");
            }
        }
    }
}

fn run_all(scheduler: &mut Scheduler) {
    while !scheduler.is_empty() {
        let step = scheduler.schedule();
        assert!(!step.is_empty(), "no progress");
        run(scheduler, &step);
    }
}

#[test]
fn choices_compute_the_prompt_once_and_hold_its_blocks_together() {
    let mut scheduler = Scheduler::new(BlockManager::new(64, 4), 8, 100);
    let (s, mut events) = submit(&Request { n: 3, ..request((0..18).collect(), 5) });
    scheduler.add(s);
    assert_eq!(scheduler.len(), 3);
    let mut steps = Vec::new();
    for _ in 0..2 {
        let step = scheduler.schedule();
        steps.push(step.iter().map(|part| (part.sequence, part.num_tokens)).collect::<Vec<_>>());
        run(&mut scheduler, &step);
    }
    // Four full blocks are shared; two tokens behind them are computed by each.
    assert_eq!(steps, [vec![(0, 18)], vec![(0, 1), (1, 2), (2, 2)]]);
    let tables: Vec<Vec<u32>> = scheduler.running().iter().map(|s| s.block_table.blocks().to_vec()).collect();
    assert!(tables.iter().all(|table| table.len() == 5 && table[..4] == tables[0][..4]));
    assert_eq!(64 - scheduler.blocks().num_free(), 4 + 3);
    run_all(&mut scheduler);
    assert_eq!(ended_once(&mut events, 3).choices, [(5, FinishReason::Length); 3]);
    assert_eq!(scheduler.blocks().num_free(), 64);
}

#[test]
fn choices_keep_their_requests_place_in_the_queue() {
    let mut scheduler = Scheduler::new(BlockManager::new(64, 4), 2, 100);
    let (first, _first) = submit(&Request { n: 3, ..request((0..10).collect(), 1) });
    let (second, _second) = own(2, 3, 1);
    scheduler.add(first);
    scheduler.add(second);
    let mut order = Vec::new();
    while !scheduler.is_empty() {
        let step = scheduler.schedule();
        order.push(scheduler.running().iter().map(|s| (s.number(), s.choice)).collect::<Vec<_>>());
        run(&mut scheduler, &step);
    }
    // While the prompt is computed the second request uses the free place; from then on it would wait for the choices.
    assert_eq!(order, [vec![(0, 0), (1, 0)], vec![(0, 1), (0, 2)]]);
}

#[test]
fn first_choice_that_ends_at_its_first_token_leaves_its_prompt_to_the_others() {
    let mut scheduler = Scheduler::new(BlockManager::new(8, 4), 8, 100);
    let (s, mut events) = submit(&Request { n: 2, ..request((0..9).collect(), 1) });
    scheduler.add(s);
    let step = scheduler.schedule();
    run(&mut scheduler, &step);
    assert_eq!((scheduler.num_running(), scheduler.len()), (0, 1));
    assert_eq!(scheduler.schedule()[0].num_tokens, 1, "two blocks of four are still known");
    run(&mut scheduler, &[Scheduled { sequence: 0, num_tokens: 1, num_drafts: 0 }]);
    assert_eq!(ended_once(&mut events, 2).choices, [(1, FinishReason::Length); 2]);
    assert_eq!(scheduler.blocks().num_free(), 8);
}

#[test]
fn cancelling_a_choice_leaves_the_others_alone() {
    // With 5 tokens a step, the prompt takes two steps: choices are cancelled before it is computed, and behind it.
    for steps in 0..4 {
        for choice in 0..3 {
            let mut scheduler = Scheduler::new(BlockManager::new(16, 4), 8, 5);
            let (s, mut events) = submit(&Request { n: 3, ..request((0..9).collect(), 4) });
            scheduler.add(s);
            for _ in 0..steps {
                let step = scheduler.schedule();
                run(&mut scheduler, &step);
            }
            scheduler.cancel("another", choice);
            scheduler.cancel("r", 3);
            assert_eq!(scheduler.len(), 3);
            scheduler.cancel("r", choice);
            scheduler.cancel("r", choice);
            assert_eq!(scheduler.len(), 2);
            run_all(&mut scheduler);
            let ends = ended_once(&mut events, 3).choices;
            for (i, (tokens, reason)) in ends.iter().enumerate() {
                let expected = if i == choice { FinishReason::Cancelled } else { FinishReason::Length };
                assert_eq!(*reason, expected, "choice {i} after {steps} steps");
                assert!(i == choice || *tokens == 4);
            }
            assert_eq!(scheduler.blocks().num_free(), 16);
        }
    }
}

#[test]
fn abandoned_choices_are_dropped_together() {
    for steps in 0..4 {
        let mut scheduler = Scheduler::new(BlockManager::new(16, 4), 2, 5);
        let (s, events) = submit(&Request { n: 3, ..request((0..9).collect(), 9) });
        scheduler.add(s);
        for _ in 0..steps {
            let step = scheduler.schedule();
            run(&mut scheduler, &step);
        }
        drop(events);
        assert!(scheduler.schedule().is_empty());
        assert_eq!((scheduler.len(), scheduler.blocks().num_free()), (0, 16));
    }
}

#[test]
fn prompt_that_is_to_be_reported_is_not_read_from_the_cache_but_known_to_others() {
    let mut scheduler = Scheduler::new(BlockManager::new(32, 4), 8, 100);
    for (prompt_logprobs, computed) in [(None, 10), (Some(2), 10), (Some(2), 10), (None, 2)] {
        let (s, mut events) = submit(&Request { prompt_logprobs, ..request((0..10).collect(), 1) });
        scheduler.add(s);
        let step = scheduler.schedule();
        assert_eq!(step[0].num_tokens, computed);
        run(&mut scheduler, &step);
        assert_eq!(ended_once(&mut events, 1).prompt_logprobs, if prompt_logprobs.is_some() { 9 } else { 0 });
    }
}

#[test]
fn prompt_is_reported_once_although_its_blocks_are_given_back() {
    let mut scheduler = Scheduler::new(BlockManager::new(22, 1), 8, 4);
    let (a, _a) = own(1, 2, 20);
    let (b, mut b_events) = submit(&Request { prompt_logprobs: Some(0), n: 2, ..request((0..18).collect(), 3) });
    scheduler.add(a);
    scheduler.add(b);
    // While b's prompt is computed by three tokens a step, a grows and takes the blocks that the end of it would need.
    let mut computed = Vec::new();
    for _ in 0..7 {
        let step = scheduler.schedule();
        computed.push(scheduler.running().get(1).map(|b| b.num_computed));
        run(&mut scheduler, &step);
    }
    assert_eq!(computed[3..], [Some(8), Some(11), None, None]);
    run_all(&mut scheduler);
    let ended = ended_once(&mut b_events, 2);
    assert_eq!((ended.prompt_logprobs, ended.choices), (17, vec![(3, FinishReason::Length); 2]));
}

#[test]
fn long_prompt_is_reported_in_parts() {
    let mut scheduler = Scheduler::new(BlockManager::new(1000, 1), 8, 900);
    let (s, mut events) = submit(&Request { prompt_logprobs: Some(0), ..request((0..600).collect(), 1) });
    scheduler.add(s);
    let step = scheduler.schedule();
    run(&mut scheduler, &step);
    let mut lengths = Vec::new();
    while let Ok(Event::PromptLogprobs { tokens, .. }) = events.try_recv() {
        lengths.push(tokens.len());
    }
    assert_eq!(lengths, [MAX_PROMPT_LOGPROBS, MAX_PROMPT_LOGPROBS, 599 - 2 * MAX_PROMPT_LOGPROBS]);
}

/// Runs one request at a time; returns the first token of each prompt, in the order in which they ran.
fn order_of(mut scheduler: Scheduler) -> Vec<u32> {
    let mut order = Vec::new();
    while !scheduler.is_empty() {
        let step = scheduler.schedule();
        order.push(scheduler.running()[0].token_ids[0] / 1000);
        run(&mut scheduler, &step);
    }
    order
}

#[test]
fn priority_counts_as_having_come_earlier() {
    // Arrival in milliseconds, priority; a step is 100 ms.
    for (arrivals, expected) in [
        (&[(0, 0), (1, 0), (2, 0)][..], [0, 1, 2]),
        (&[(0, 0), (0, 0), (0, 0)], [0, 1, 2]),
        (&[(0, 0), (1, 1), (2, 2)], [2, 1, 0]),
        (&[(0, -1), (99, 0), (101, 0)], [1, 0, 2]),
        // Nobody starves: who came a second ago is not overtaken even by the highest priority.
        (&[(0, 0), (999, 10), (1001, 10)], [1, 0, 2]),
        (&[(0, 10), (0, -10), (2001, 0)], [0, 1, 2]),
    ] {
        let mut scheduler = Scheduler::new(BlockManager::new(8, 4), 1, 100).with_priority_step(Duration::from_millis(100));
        let mut receivers = Vec::new();
        for (i, (ms, priority)) in arrivals.iter().enumerate() {
            let prompt = (0..5).map(|token| i as u32 * 1000 + token).collect();
            let (s, receiver) = submit_at(&scheduler, *ms, &Request { priority: *priority, ..request(prompt, 1) });
            scheduler.add(s);
            receivers.push(receiver);
        }
        assert_eq!(order_of(scheduler), expected, "{arrivals:?}");
    }
}

#[test]
fn longest_step_neither_overflows_nor_loses_the_order() {
    let mut scheduler = Scheduler::new(BlockManager::new(8, 4), 1, 100).with_priority_step(Duration::from_millis(u64::MAX));
    let mut receivers = Vec::new();
    for (i, priority) in [-10, 0, 10].into_iter().enumerate() {
        let (s, receiver) = submit_at(&scheduler, 1, &Request { priority, ..request(vec![i as u32 * 1000], 1) });
        scheduler.add(s);
        receivers.push(receiver);
    }
    assert_eq!(order_of(scheduler), [2, 1, 0]);
}

#[test]
fn lower_priority_gives_blocks_back_first_and_higher_priority_gets_the_budget() {
    let mut scheduler = Scheduler::new(BlockManager::new(16, 1), 8, 6).with_priority_step(Duration::from_secs(1));
    let (low, _low) = submit_at(&scheduler, 0, &request((1000..1012).collect(), 4));
    scheduler.add(low);
    let step = scheduler.schedule();
    run(&mut scheduler, &step);
    let (high, mut events) = submit_at(&scheduler, 1, &Request { priority: 1, ..request((2000..2005).collect(), 8) });
    scheduler.add(high);
    let step = scheduler.schedule();
    let parts: Vec<_> = step.iter().map(|part| (part.sequence, part.num_tokens)).collect();
    assert_eq!(parts, [(0, 5), (1, 1)], "the newcomer goes first");
    run(&mut scheduler, &step);
    while scheduler.num_preemptions() == 0 {
        let step = scheduler.schedule();
        assert!(!step.is_empty());
        run(&mut scheduler, &step);
    }
    assert!(scheduler.running().iter().all(|s| s.priority == 1), "the earlier arrival gave way");
    run_all(&mut scheduler);
    assert_eq!(ended_once(&mut events, 1).choices, [(8, FinishReason::Length)]);
}

#[test]
fn failed_request_leaves_nothing_in_the_cache_and_others_go_on() {
    let mut scheduler = Scheduler::new(BlockManager::new(32, 4), 8, 10);
    let prompt: Vec<u32> = (0..18).collect();
    let (other, mut other_events) = own(2, 4, 5);
    let (s, _events) = submit(&Request { n: 2, ..request(prompt.clone(), 5) });
    scheduler.add(other);
    scheduler.add(s);
    // The first chunk is computed and known; then the logits behind the second are not finite.
    let step = scheduler.schedule();
    run(&mut scheduler, &step);
    let step = scheduler.schedule();
    let number = scheduler.running()[1].number();
    scheduler.commit(&step, &[number]);
    scheduler.remove_failed(&[number]);
    assert_eq!(scheduler.len(), 1, "all choices of the request are gone");
    let (again, _again) = sequence(prompt, 1);
    scheduler.add(again);
    scheduler.schedule();
    let again = scheduler.running().iter().find(|s| s.number() == 2).unwrap();
    assert_eq!(again.num_computed, 0, "nothing of it is reused");
    run_all(&mut scheduler);
    assert_eq!(ended_once(&mut other_events, 1).choices[0].1, FinishReason::Length);
    assert_eq!(scheduler.blocks().num_free(), 32);
}

//! Schedules without a model: who runs when, and that no block and no token is lost.

mod ahead;
mod choices;
mod random;

use super::*;
use crate::{
    block_manager::BlockHash,
    sequence::{Event, FirstToken, Logprobs, MAX_PROMPT_LOGPROBS, Request, SamplingParams},
};
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
    run_until(scheduler, step, || false)
}

/// The same, where `stops` says of each token whether it ends its sequence.
fn run_until(scheduler: &mut Scheduler, step: &[Scheduled], mut stops: impl FnMut() -> bool) -> usize {
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
            let stop_token_ids: &[u32] = if stops() { &[7] } else { &[] };
            if sequence.push(7, None, stop_token_ids).is_some() {
                finished.push(part.sequence);
                break;
            }
        }
    }
    scheduler.commit(step, &[]);
    scheduler.remove(&finished);
    finished.len()
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

fn run_all(scheduler: &mut Scheduler) {
    while !scheduler.is_empty() {
        let step = scheduler.schedule();
        assert!(!step.is_empty(), "no progress");
        run(scheduler, &step);
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

//! The engine on a device that chooses tokens itself, where a step is queued before the tokens of the one before are seen: the same
//! answers, and nothing is lost when something goes wrong in between.

#[path = "common/card.rs"]
mod card;
mod common;

#[path = "engine/cases.rs"]
mod cases;
#[path = "common/requests.rs"]
mod requests;

use card::{Card, Fault};
use cases::{assert_close, engine_on, with_logprobs};
use idefics_decoder::{
    Config, Engine,
    block_manager::BlockHash,
    sequence::{Event, FinishReason, Request, SamplingParams},
};
use idefics_kernels::cpu::{Cpu, CpuOptions};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use requests::{GREEDY, collect, collect_choices, endless, large, request, requests, small, text};
use std::sync::atomic::Ordering;
use tokio::sync::mpsc::UnboundedReceiver;
use tracing::Span;

fn backend() -> Card {
    Card::new(None)
}

fn steps_ahead(engine: &Engine) -> usize {
    engine.stats().num_steps_ahead.load(Ordering::Relaxed)
}

/// Counts are published after the step that sent the last event.
async fn all_blocks_free(engine: &Engine) {
    let stats = engine.stats();
    while stats.num_free_blocks.load(Ordering::Relaxed) != stats.num_blocks.load(Ordering::Relaxed) {
        tokio::task::yield_now().await;
    }
}

/// Tokens of each choice, and the errors.
async fn until_closed(mut events: UnboundedReceiver<Event>, n: usize) -> (Vec<Vec<u32>>, Vec<String>) {
    let (mut tokens, mut errors) = (vec![Vec::new(); n], Vec::new());
    while let Some(event) = events.recv().await {
        match event {
            Event::Token { choice, token_id, .. } => tokens[choice].push(token_id),
            Event::Failed(error) => errors.push(error),
            _ => {}
        }
    }
    (tokens, errors)
}

#[tokio::test]
async fn answers_are_those_of_a_host_that_chooses() {
    let (_folder, cpu) = engine_on(Cpu::new(CpuOptions::default()).unwrap(), large());
    for sampling in
        [GREEDY, SamplingParams { temperature: 1.0, top_p: 0.9, ..GREEDY }, SamplingParams { temperature: 0.8, top_k: 7, ..GREEDY }]
    {
        let (_folder, card) = engine_on(backend(), small());
        let receivers: Vec<_> = requests(sampling.clone()).iter().map(|r| card.submit(r, &Span::none())).collect();
        for (events, request) in receivers.into_iter().zip(requests(sampling)) {
            assert_eq!(collect(events).await, collect(cpu.submit(&request, &Span::none())).await);
        }
        assert!(steps_ahead(&card) > 0);
        all_blocks_free(&card).await;
    }
    assert_eq!(steps_ahead(&cpu), 0);
}

#[tokio::test]
async fn log_probabilities_are_those_of_a_host_that_computes_them() {
    let requests = || {
        let sampling = SamplingParams { logprobs: Some(5), temperature: 1.0, ..GREEDY };
        requests(sampling).into_iter().map(|r| Request { prompt_logprobs: Some(20), ..r }).collect::<Vec<_>>()
    };
    let (_folder, cpu) = engine_on(Cpu::new(CpuOptions::default()).unwrap(), large());
    let (_folder, card) = engine_on(backend(), small());
    let receivers: Vec<_> = requests().iter().map(|r| card.submit(r, &Span::none())).collect();
    for (events, request) in receivers.into_iter().zip(requests()) {
        let (prompt, answer) = with_logprobs(events).await;
        let (expected_prompt, expected_answer) = with_logprobs(cpu.submit(&request, &Span::none())).await;
        assert_close(&prompt, &expected_prompt);
        assert_close(&answer, &expected_answer);
    }
    assert!(steps_ahead(&card) > 0);
}

#[tokio::test]
async fn steps_of_a_steady_batch_are_queued_ahead() {
    let (_folder, engine) = engine_on(backend(), large());
    let (answer, reason) = collect(engine.submit(&endless(vec![5, 6, 7], 200), &Span::none())).await;
    assert_eq!((answer.len(), reason), (200, FinishReason::Length));
    // All but the prompt's, and none behind the last.
    assert_eq!(steps_ahead(&engine), 199);
    // Four choices of unlike length: who ends does not keep the others from going on.
    let before = steps_ahead(&engine);
    let answers = collect_choices(engine.submit(&Request { n: 4, ..endless(vec![5, 6, 7], 50) }, &Span::none()), 4).await;
    assert!(answers.iter().all(|(tokens, _)| *tokens == answer[..50]));
    assert!(steps_ahead(&engine) - before >= 45, "{}", steps_ahead(&engine) - before);
}

#[tokio::test]
async fn steps_whose_tokens_the_host_must_see_are_not() {
    let lookup = Config { prompt_lookup_tokens: 3, ..large() };
    let penalty = SamplingParams { presence_penalty: 0.5, ..GREEDY };
    for (config, sampling) in [(lookup, GREEDY), (large(), penalty)] {
        let (_folder, engine) = engine_on(backend(), config);
        let request = Request { sampling: SamplingParams { ignore_eos: true, ..sampling }, ..text(vec![5, 6, 7], 30) };
        assert_eq!(collect(engine.submit(&request, &Span::none())).await.0.len(), 30);
        assert_eq!(steps_ahead(&engine), 0, "{:?}", request.sampling);
    }
}

/// A stop ends a sequence whose next token is in flight: it is given to nobody, and nobody reads what it left in the cache.
#[tokio::test]
async fn token_behind_a_stop_leaves_no_trace() {
    let (_folder, engine) = engine_on(backend(), Config { block_size_tokens: 4, ..large() });
    let prompt: Vec<u32> = (3..20).collect();
    let root = |salt: u8| BlockHash::root(&[&[salt]]);
    let (plain, _) = collect(engine.submit(&Request { cache_root: root(0), ..endless(prompt.clone(), 24) }, &Span::none())).await;
    for (salt, stop_at) in (0..24).enumerate() {
        let first_of_its_kind = plain[..stop_at].iter().all(|id| *id != plain[stop_at]);
        if !first_of_its_kind {
            continue;
        }
        let sampling = SamplingParams { stop_token_ids: vec![plain[stop_at]], ignore_eos: true, ..GREEDY };
        let cache_root = root(1 + salt as u8);
        let stopped = Request { sampling, cache_root, ..endless(prompt.clone(), 24) };
        assert_eq!(collect(engine.submit(&stopped, &Span::none())).await, (plain[..=stop_at].to_vec(), FinishReason::Stop));
        all_blocks_free(&engine).await;
        // It goes on from what is in the cache, as if it had not been stopped.
        let token_ids = [&prompt[..], &plain[..=stop_at]].concat();
        let left = plain.len() - stop_at - 1;
        if left > 0 {
            let again = Request { cache_root, ..endless(token_ids, left) };
            assert_eq!(collect(engine.submit(&again, &Span::none())).await.0, plain[stop_at + 1..], "stopped at {stop_at}");
        }
    }
}

#[tokio::test]
async fn lost_card_fails_every_request_once() {
    for at in 1..8 {
        let (_folder, engine) = engine_on(Card::new(Some(Fault::Lost(at))), large());
        let all = [Request { n: 2, ..endless(vec![5, 6, 7], 40) }, endless(vec![8, 9], 40)];
        let receivers: Vec<_> = all.iter().map(|r| (engine.submit(r, &Span::none()), r.n)).collect();
        let mut errors = 0;
        for (events, n) in receivers {
            let (tokens, failed) = until_closed(events, n).await;
            assert!(failed.len() <= 1 && tokens.iter().all(|tokens| tokens.len() < at), "{failed:?} at {at}: {tokens:?}");
            errors += failed.len();
        }
        assert!(errors > 0, "at {at}");
        engine.alive().wait_for(|alive| !alive).await.unwrap();
    }
}

#[tokio::test]
async fn step_that_cannot_be_queued_fails_its_requests_once_and_the_engine_goes_on() {
    for at in 1..8 {
        let (_folder, engine) = engine_on(Card::new(Some(Fault::Refused(at))), large());
        let (tokens, failed) = until_closed(engine.submit(&endless(vec![5, 6, 7], 40), &Span::none()), 1).await;
        assert_eq!(failed, ["sample: refused"]);
        assert_eq!(tokens[0].len(), at - 1, "the step before is not lost");
        assert_eq!(collect(engine.submit(&endless(vec![5, 6, 7], 9), &Span::none())).await.0[..at - 1], tokens[0]);
        all_blocks_free(&engine).await;
    }
}

#[tokio::test]
async fn request_without_finite_logits_fails_once_and_the_others_go_on() {
    let (_folder, engine) = engine_on(backend(), large());
    let (expected, _) = collect(engine.submit(&endless(vec![8, 9], 40), &Span::none())).await;
    for at in 2..8 {
        let (_folder, engine) = engine_on(Card::new(Some(Fault::NotFinite(at))), large());
        let first = engine.submit(&endless(vec![5, 6, 7], 40), &Span::none());
        let second = engine.submit(&endless(vec![8, 9], 40), &Span::none());
        let ((tokens, failed), (others, others_failed)) = (until_closed(first, 1).await, until_closed(second, 1).await);
        assert_eq!(failed.len(), 1, "at {at}");
        assert!(tokens[0].len() < at && others_failed.is_empty() && others[0] == expected, "at {at}: {tokens:?}, {others:?}");
        all_blocks_free(&engine).await;
    }
}

#[tokio::test]
async fn cancelled_choices_end_while_a_step_of_theirs_is_in_flight() {
    let (_folder, engine) = engine_on(backend(), large());
    let (whole, _) = collect(engine.submit(&endless(vec![5; 20], 400), &Span::none())).await;
    let mut events = engine.submit(&Request { n: 3, request_id: "a".into(), ..endless(vec![5; 20], 400) }, &Span::none());
    let mut tokens = vec![Vec::new(); 3];
    let mut ends = Vec::new();
    while let Some(event) = events.recv().await {
        match event {
            Event::Token { choice, token_id, .. } => {
                tokens[choice].push(token_id);
                if tokens[choice].len() == 10 + choice && choice > 0 {
                    engine.cancel_choice("a".into(), choice);
                }
            }
            Event::Finished { choice, reason, .. } => ends.push((choice, reason)),
            other => panic!("{other:?}"),
        }
    }
    ends.sort_by_key(|(choice, _)| *choice);
    assert_eq!(ends, [(0, FinishReason::Length), (1, FinishReason::Cancelled), (2, FinishReason::Cancelled)]);
    assert!(tokens.iter().all(|tokens| whole.starts_with(tokens)) && tokens[0] == whole);
    all_blocks_free(&engine).await;
}

/// When a caller changes its mind, counted in tokens of all its choices.
#[derive(Clone, Copy, Debug)]
enum Change {
    CancelChoice { choice: usize, at: usize },
    HangUp { at: usize },
}

/// What a caller has seen of each choice by the time it went, or at the end.
async fn call(engine: Engine, request: Request, change: Option<Change>) -> Vec<(Vec<u32>, Option<FinishReason>)> {
    let mut events = engine.submit(&request, &Span::none());
    let (mut choices, mut num_tokens) = (vec![(Vec::new(), None); request.n], 0);
    while let Some(event) = events.recv().await {
        match event {
            Event::Token { choice, token_id, .. } => {
                assert_eq!(choices[choice].1, None, "a token of a choice that has ended");
                choices[choice].0.push(token_id);
                num_tokens += 1;
                match change {
                    Some(Change::HangUp { at }) if at == num_tokens => break,
                    Some(Change::CancelChoice { choice, at }) if at == num_tokens => {
                        engine.cancel_choice(request.request_id.clone(), choice);
                    }
                    _ => {}
                }
            }
            Event::Finished { choice, reason, .. } => assert_eq!(choices[choice].1.replace(reason), None, "choice {choice} ended twice"),
            other => panic!("{other:?}"),
        }
    }
    choices
}

/// Requests of every kind in few blocks, some as long as the cache, whose callers cancel choices or hang up with a step in flight:
/// each sees what it gets alone, or its beginning, and nothing is left but a cache that is right.
#[tokio::test]
async fn callers_that_go_at_any_time_leave_others_and_the_cache_alone() {
    let mut all_ahead = 0;
    for seed in 0..8 {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let block_size_tokens = rng.random_range(1..6);
        // 512 bytes a token.
        let max_tokens = rng.random_range(100..140) / block_size_tokens * block_size_tokens;
        let (max_num_seqs, max_num_batched_tokens) = (rng.random_range(1..6), rng.random_range(7..40));
        let config =
            Config { kv_cache_bytes: 512 * max_tokens, block_size_tokens, max_num_seqs, max_num_batched_tokens, ..Config::default() };
        let calls: Vec<(Request, Option<Change>)> = (0..14)
            .map(|i| {
                let sampling = SamplingParams {
                    temperature: if rng.random_bool(0.5) { 1.0 } else { 0.0 },
                    seed: i,
                    stop_token_ids: (0..rng.random_range(0..4)).map(|_| rng.random_range(3..40)).collect(),
                    min_new_tokens: rng.random_range(0..4),
                    ..GREEDY
                };
                let with_image = rng.random_bool(0.3);
                let request = request(&mut rng, with_image, sampling);
                let n = rng.random_range(1..4);
                let max_new_tokens = if rng.random_bool(0.3) { max_tokens - request.token_ids.len() } else { rng.random_range(1..24) };
                let change = match rng.random_range(0..4) {
                    0 => Some(Change::CancelChoice { choice: rng.random_range(0..n), at: rng.random_range(1..12) }),
                    1 => Some(Change::HangUp { at: rng.random_range(1..12) }),
                    _ => None,
                };
                (Request { request_id: i.to_string(), n, max_new_tokens, priority: rng.random_range(-10..=10), ..request }, change)
            })
            .collect();
        let (_folder, unhurried) = engine_on(backend(), large());
        let mut alone = Vec::new();
        for (request, _) in &calls {
            alone.push(call(unhurried.clone(), request.clone(), None).await);
        }
        let (_folder, engine) = engine_on(backend(), config);
        let running: Vec<_> = calls.iter().map(|(request, change)| tokio::spawn(call(engine.clone(), request.clone(), *change))).collect();
        for ((call, (_, change)), alone) in running.into_iter().zip(&calls).zip(&alone) {
            for (choice, (found, alone)) in call.await.unwrap().into_iter().zip(alone).enumerate() {
                let cut = match change {
                    Some(Change::HangUp { .. }) => true,
                    Some(Change::CancelChoice { choice: cancelled, .. }) => {
                        *cancelled == choice && found.1 == Some(FinishReason::Cancelled)
                    }
                    None => false,
                };
                let right = found == *alone || cut && alone.0.starts_with(&found.0);
                assert!(right, "seed {seed}, choice {choice}, {change:?}: {found:?} for {alone:?}");
            }
        }
        all_blocks_free(&engine).await;
        while engine.stats().num_sequences.load(Ordering::Relaxed) > 0 {
            tokio::task::yield_now().await;
        }
        for ((request, _), alone) in calls.into_iter().zip(alone) {
            assert_eq!(call(engine.clone(), request, None).await, alone, "seed {seed}: from what is in the cache");
        }
        all_ahead += steps_ahead(&engine);
    }
    assert!(all_ahead > 1000, "{all_ahead} steps ahead");
}

//! The engine on a tiny random model: what a request gets must not depend on how it was scheduled. Included by the tests of each
//! kind of backend.

use crate::{
    backend,
    common::{HIDDEN, IMAGE, LATENTS, VOCAB, checkpoint},
    requests::{GREEDY, collect, collect_choices, endless, engine_of, large, request, requests, small, text},
};
use idefics_decoder::{
    Config, Engine, EngineOptions,
    block_manager::BlockHash,
    image_store::{ImageKey, ImageTokens},
    sequence::{Event, FinishReason, ImageSpan, Logprobs, Request, SamplingParams},
};
use idefics_kernels::{Backend, DType, weights::Weights};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::{
    collections::BTreeSet,
    sync::{Arc, atomic::Ordering},
};
use tempfile::TempDir;
use tokio::sync::mpsc::UnboundedReceiver;
use tracing::Span;

fn engine(config: Config) -> (TempDir, Engine) {
    engine_on(backend(), config)
}

pub(crate) fn engine_on(backend: impl Backend, config: Config) -> (TempDir, Engine) {
    let (folder, checkpoint) = checkpoint(HIDDEN);
    let engine = engine_of(&folder, &checkpoint, backend, config);
    (folder, engine)
}

/// Every option that looks at what was generated, and every cut.
fn everything(temperature: f32) -> SamplingParams {
    SamplingParams {
        temperature,
        top_k: 20,
        top_p: 0.95,
        min_p: 0.01,
        typical_p: 0.9,
        repetition_penalty: 1.1,
        presence_penalty: 0.2,
        frequency_penalty: 0.3,
        logit_bias: vec![(IMAGE, 100.0), (5, 1.0)],
        stop_token_ids: vec![9],
        min_new_tokens: 12,
        ..GREEDY
    }
}

async fn alone(requests: Vec<Request>) -> Vec<Vec<(Vec<u32>, FinishReason)>> {
    let (_folder, engine) = engine(large());
    let mut answers = Vec::new();
    for request in requests {
        answers.push(collect_choices(engine.submit(&request, &Span::none()), request.n).await);
    }
    answers
}

async fn together(requests: Vec<Request>) -> Vec<Vec<(Vec<u32>, FinishReason)>> {
    let (_folder, engine) = engine(small());
    let receivers: Vec<_> = requests.iter().map(|r| (engine.submit(r, &Span::none()), r.n)).collect();
    let mut answers = Vec::new();
    for (events, n) in receivers {
        answers.push(collect_choices(events, n).await);
    }
    assert!(engine.stats().num_preemptions.load(Ordering::Relaxed) > 0, "the pool must be small enough to matter");
    answers
}

#[tokio::test]
async fn chunks_and_batches_give_each_request_what_it_gets_alone() {
    let answers = alone(requests(GREEDY)).await;
    assert_eq!(together(requests(GREEDY)).await, answers);
    let distinct: BTreeSet<&Vec<u32>> = answers.iter().flatten().map(|(tokens, _)| tokens).collect();
    assert!(distinct.len() > 6, "the prompts must matter: {distinct:?}");
    assert!(answers.iter().flatten().flat_map(|(tokens, _)| tokens).all(|id| (*id as usize) < VOCAB && *id != IMAGE && *id != 41));
}

#[tokio::test]
async fn seeded_sampling_does_not_depend_on_the_batch() {
    for sampling in [SamplingParams { temperature: 1.0, top_p: 0.9, ..GREEDY }, everything(1.0), everything(0.0)] {
        assert_eq!(together(requests(sampling.clone())).await, alone(requests(sampling)).await);
    }
}

/// Alone, and in a pool so small that choices lose the prompt that they share and compute it again.
#[tokio::test]
async fn first_choice_is_the_answer_alone_and_the_others_are_independent() {
    let hot = SamplingParams { temperature: 1.0, ..GREEDY };
    let choices =
        |sampling: &SamplingParams, n| requests(sampling.clone()).into_iter().map(move |r| Request { n, ..r }).collect::<Vec<_>>();
    for sampling in [hot.clone(), everything(1.0), GREEDY] {
        let (single, several) = (alone(choices(&sampling, 1)).await, alone(choices(&sampling, 4)).await);
        for (single, several) in single.iter().zip(&several) {
            assert_eq!(single[0], several[0]);
            assert!(sampling != GREEDY || several.iter().all(|choice| *choice == several[0]), "greedy choices are the same");
        }
        assert_eq!(together(choices(&sampling, 4)).await, several);
        assert_eq!(alone(choices(&sampling, 2)).await, several.iter().map(|choices| choices[..2].to_vec()).collect::<Vec<_>>());
    }
    // 12 requests of up to 19 tokens out of 48: two choices of more than a few tokens are never equal by chance.
    let long: Vec<Vec<_>> = alone(choices(&hot, 4)).await.into_iter().filter(|choices| choices[0].0.len() > 5).collect();
    assert!(long.len() > 3);
    for choices in long {
        assert_eq!(choices.iter().map(|(tokens, _)| tokens).collect::<BTreeSet<_>>().len(), 4, "{choices:?}");
    }
}

#[tokio::test]
async fn cached_tokens_are_those_of_earlier_requests() {
    let (_folder, engine) = engine(large());
    for expected in [0, 32] {
        let mut events = engine.submit(&Request { n: 3, ..text((3..39).collect(), 2) }, &Span::none());
        let mut cached = Vec::new();
        while let Some(event) = events.recv().await {
            if let Event::Token { choice, first: Some(first), .. } = event {
                cached.push((choice, first.cached_tokens));
            }
        }
        assert_eq!(cached, [(0, expected)]);
    }
}

#[tokio::test]
async fn cancelled_choice_ends_while_the_others_go_on() {
    let (_folder, engine) = engine(large());
    let mut events = engine.submit(&Request { n: 3, request_id: "a".into(), ..endless(vec![5; 20], 400) }, &Span::none());
    let Some(Event::Token { choice: 0, .. }) = events.recv().await else { panic!("choice 0 comes first") };
    engine.cancel_choice("a".into(), 1);
    let answers = collect_choices(events, 3).await;
    let lengths: Vec<_> = answers.iter().map(|(tokens, reason)| (tokens.len() < 399, *reason)).collect();
    assert_eq!(lengths, [(false, FinishReason::Length), (true, FinishReason::Cancelled), (false, FinishReason::Length)]);
    while engine.stats().num_sequences.load(Ordering::Relaxed) > 0 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn stop_ids_and_minimum_are_per_request() {
    let (_folder, engine) = engine(large());
    let answer = async |sampling: SamplingParams| {
        let request = Request { sampling, ..text(vec![5, 6, 7], 12) };
        collect(engine.submit(&request, &Span::none())).await
    };
    let (plain, reason) = answer(GREEDY).await;
    assert_eq!((plain.len(), reason), (12, FinishReason::Length), "the prompt must not end by itself");
    let stop_token_ids = vec![plain[0]];
    assert_eq!(
        answer(SamplingParams { stop_token_ids: stop_token_ids.clone(), ..GREEDY }).await,
        (plain[..1].to_vec(), FinishReason::Stop)
    );
    let (held_back, _) = answer(SamplingParams { stop_token_ids, min_new_tokens: 3, ..GREEDY }).await;
    assert!(held_back.len() > 3 && !held_back[..3].contains(&plain[0]), "{held_back:?}");
    // A bias towards the checkpoint's own stop id ends the answer, unless it is to be ignored.
    let eos = checkpoint(HIDDEN).1.stop_token_ids()[0];
    let biased = SamplingParams { logit_bias: vec![(eos, 100.0)], ..GREEDY };
    assert_eq!(answer(biased.clone()).await, (vec![eos], FinishReason::Stop));
    assert_eq!(answer(SamplingParams { ignore_eos: true, ..biased }).await, (vec![eos; 12], FinishReason::Length));
}

#[tokio::test]
async fn image_rows_replace_embeddings() {
    let (_folder, engine) = engine(large());
    let request = |value: f32| {
        let values = (0..LATENTS * HIDDEN).flat_map(|i| (value * ((i * 37 % 19) as f32 - 9.0)).to_le_bytes()).collect::<Vec<u8>>();
        let image = Arc::new(ImageTokens::new(values.into(), DType::F32, LATENTS, HIDDEN).unwrap());
        let image_spans = vec![ImageSpan { positions: 2..2 + LATENTS, key: ImageKey([value.to_bits() as u8; 32]), image, first_row: 0 }];
        let sampling = SamplingParams { logprobs: Some(1), ..GREEDY };
        Request { image_spans, sampling, ..text([vec![5, 6], vec![IMAGE; LATENTS], vec![7]].concat(), 1) }
    };
    let mut first_logprobs = Vec::new();
    for value in [0.1, -0.1] {
        let mut events = engine.submit(&request(value), &Span::none());
        let Some(Event::Token { logprobs: Some(logprobs), .. }) = events.recv().await else { panic!("a token comes first") };
        first_logprobs.push(logprobs);
    }
    assert_ne!(first_logprobs[0], first_logprobs[1]);
}

#[tokio::test]
async fn dropped_stream_frees_blocks() {
    let (_folder, engine) = engine(Config { max_num_batched_tokens: 7, max_num_seqs: 4, ..large() });
    let mut events = engine.submit(&text(vec![5; 20], 400), &Span::none());
    assert!(matches!(events.recv().await, Some(Event::Token { .. })));
    drop(events);
    // The next request is scheduled in a step after the one that dropped the first.
    collect(engine.submit(&text(vec![6; 4], 2), &Span::none())).await;
    let all = engine.stats().num_blocks.load(Ordering::Relaxed);
    // Counts are published after the step that sent the last event.
    while engine.stats().num_free_blocks.load(Ordering::Relaxed) != all {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn prompt_lookup_changes_no_answer() {
    for sampling in [GREEDY, SamplingParams { temperature: 1.0, top_p: 0.9, ..GREEDY }, everything(1.0), everything(0.0)] {
        let (_folder, engine) = engine(Config { prompt_lookup_tokens: 3, ..large() });
        let mut answers = Vec::new();
        for request in requests(sampling.clone()) {
            answers.push(vec![collect(engine.submit(&request, &Span::none())).await]);
        }
        assert_eq!(answers, alone(requests(sampling)).await);
    }
    // A tiny random model soon repeats itself: some guesses must be right, or none are ever accepted.
    let (_folder, plain) = engine(large());
    let (_folder, guessing) = engine(Config { prompt_lookup_tokens: 3, ..large() });
    let answer = collect(plain.submit(&text(vec![5, 6, 7], 200), &Span::none())).await;
    assert_eq!(collect(guessing.submit(&text(vec![5, 6, 7], 200), &Span::none())).await, answer);
    let (drafted, accepted) =
        (guessing.stats().num_draft_tokens.load(Ordering::Relaxed), guessing.stats().num_accepted_tokens.load(Ordering::Relaxed));
    assert!(accepted > 0 && accepted <= drafted, "{accepted} of {drafted}");
}

#[tokio::test]
async fn second_turn_reuses_the_first_and_answers_the_same() {
    let (_folder, engine) = engine(large());
    let mut rng = ChaCha8Rng::seed_from_u64(9);
    let first = request(&mut rng, true, GREEDY);
    let second = |salt: &[u8], answer: &[u32]| {
        let token_ids = [&first.token_ids[..], answer, &[11, 12, 13]].concat();
        let (image_spans, cache_root) = (first.image_spans.clone(), BlockHash::root(&[salt]));
        Request { image_spans, cache_root, ..text(token_ids, 8) }
    };
    let (image_spans, cache_root) = (first.image_spans.clone(), BlockHash::root(&[b"a"]));
    let (answer, _) = collect(engine.submit(&Request { image_spans, cache_root, ..text(first.token_ids.clone(), 8) }, &Span::none())).await;
    let mut answers = Vec::new();
    for salt in [b"a", b"b"] {
        let mut events = engine.submit(&second(salt, &answer), &Span::none());
        let Some(Event::Token { token_id, first: Some(first_token), .. }) = events.recv().await else { panic!("a token comes first") };
        let known = first.token_ids.len() + answer.len() - 1;
        // All full blocks of 16 that the first turn computed, for the same salt only.
        assert_eq!(first_token.cached_tokens, if salt == b"a" { known / 16 * 16 } else { 0 });
        answers.push((token_id, collect(events).await));
    }
    assert_eq!(answers[0], answers[1]);
}

#[tokio::test]
async fn context_beyond_the_cache_is_refused_at_start() {
    let (folder, checkpoint) = checkpoint(HIDDEN);
    let start = |config: Config| {
        let options = EngineOptions {
            weights: Weights::open(folder.path()).unwrap(),
            model: checkpoint.config.clone(),
            config,
            stop_token_ids: vec![],
            banned_token_ids: vec![],
            progress: Box::new(|_| {}),
        };
        Engine::start(backend(), options).map(|engine| engine.max_model_tokens()).map_err(|e| e.to_string())
    };
    assert_eq!(start(large()), Ok(512));
    // 2 layers x k and v x 32 elements x 4 bytes = 512 bytes a token.
    assert_eq!(start(Config { kv_cache_bytes: 512 * 64, ..large() }), Ok(64));
    assert!(start(Config { kv_cache_bytes: 512 * 64, max_model_tokens: 65, ..large() }).unwrap_err().contains("kv_cache_bytes"));
    assert!(start(Config { max_model_tokens: 513, ..large() }).unwrap_err().contains("max_position_embeddings"));
}

/// The log-probabilities of the prompt but its first token, then the answer of choice 0 with its own.
pub(crate) async fn with_logprobs(mut events: UnboundedReceiver<Event>) -> (Vec<(u32, Logprobs)>, Vec<(u32, Logprobs)>) {
    let (mut prompt, mut answer) = (Vec::new(), Vec::new());
    while let Some(event) = events.recv().await {
        match event {
            Event::PromptLogprobs { start, tokens } => {
                assert_eq!((start, answer.len()), (prompt.len() + 1, 0), "in order, and before the answer");
                prompt.extend(tokens);
            }
            Event::Token { choice: 0, token_id, logprobs, .. } => answer.push((token_id, logprobs.expect("they were asked for"))),
            Event::Token { .. } | Event::Finished { .. } => {}
            Event::Failed(error) => panic!("{error}"),
        }
    }
    (prompt, answer)
}

/// Logits of size 1 from sums of some hundred products in f32, added in another order where tokens are computed together.
const LOGPROB_TOLERANCE: f32 = 1e-4;

pub(crate) fn assert_close(found: &[(u32, Logprobs)], expected: &[(u32, Logprobs)]) {
    assert_eq!(found.len(), expected.len());
    for (i, ((id, found), (expected_id, expected))) in found.iter().zip(expected).enumerate() {
        assert_eq!((id, found.top.len()), (expected_id, expected.top.len()), "place {i}");
        let values = |l: &Logprobs| [vec![l.logprob], l.top.iter().map(|t| t.logprob).collect()].concat();
        for (a, b) in values(found).into_iter().zip(values(expected)) {
            assert!((a - b).abs() <= LOGPROB_TOLERANCE, "place {i}: {a} for {b}");
        }
    }
}

#[tokio::test]
async fn prompt_logprobs_are_those_that_generation_had() {
    let requests = || {
        let sampling = SamplingParams { logprobs: Some(3), temperature: 1.0, ..GREEDY };
        requests(sampling).into_iter().map(|r| Request { max_new_tokens: 12, prompt_logprobs: Some(3), ..r }).collect::<Vec<_>>()
    };
    let (_folder, engine) = engine(large());
    let mut alone = Vec::new();
    for request in requests() {
        let (prompt, answer) = with_logprobs(engine.submit(&request, &Span::none())).await;
        assert_eq!(prompt.iter().map(|(id, _)| *id).collect::<Vec<_>>(), request.token_ids[1..]);
        let token_ids = request.token_ids.iter().copied().chain(answer.iter().map(|(id, _)| *id)).collect();
        let (again, _) = with_logprobs(engine.submit(&Request { token_ids, max_new_tokens: 1, ..request }, &Span::none())).await;
        assert_close(&again, &[&prompt[..], &answer].concat());
        alone.push((prompt, answer));
    }
    // Together, with choices beside, by seven tokens a step and in few blocks: each place once, with the same values.
    let (_folder, engine) = self::engine(small());
    let receivers: Vec<_> = requests().into_iter().map(|r| engine.submit(&Request { n: 2, ..r }, &Span::none())).collect();
    for (events, (prompt, answer)) in receivers.into_iter().zip(&alone) {
        let (found, found_answer) = with_logprobs(events).await;
        assert_close(&found, prompt);
        assert_close(&found_answer, answer);
    }
    assert!(engine.stats().num_preemptions.load(Ordering::Relaxed) > 0, "the pool must be small enough to matter");
}

/// Choices, priorities, log-probabilities of prompts and cancellations, in a pool so small that sequences give way: what a
/// choice gets is what it gets alone, up to where it was cancelled.
#[tokio::test]
async fn random_requests_get_what_they_get_alone() {
    let mut num_preemptions = 0;
    for seed in 0..4 {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let hot = SamplingParams { temperature: 1.0, ..GREEDY };
        let requests = requests(hot).into_iter().enumerate().map(|(i, r)| Request {
            request_id: i.to_string(),
            n: rng.random_range(1..5),
            priority: rng.random_range(-10..=10),
            prompt_logprobs: rng.random_bool(0.4).then_some(1),
            ..r
        });
        let requests = requests.collect::<Vec<_>>();
        let alone = alone(requests.clone()).await;
        let (_folder, engine) = engine(small());
        let receivers: Vec<_> = requests.iter().map(|r| engine.submit(r, &Span::none())).collect();
        let cancelled: Vec<(usize, usize)> = (0..4).map(|_| (rng.random_range(0..requests.len()), rng.random_range(0..4))).collect();
        for (request, choice) in &cancelled {
            engine.cancel_choice(request.to_string(), *choice);
        }
        for (i, (events, alone)) in receivers.into_iter().zip(alone).enumerate() {
            for (choice, (found, alone)) in collect_choices(events, requests[i].n).await.into_iter().zip(alone).enumerate() {
                let cut = cancelled.contains(&(i, choice)) && found.1 == FinishReason::Cancelled && alone.0.starts_with(&found.0);
                assert!(found == alone || cut, "seed {seed}, request {i}, choice {choice}: {found:?} for {alone:?}");
            }
        }
        num_preemptions += engine.stats().num_preemptions.load(Ordering::Relaxed);
    }
    assert!(num_preemptions > 0, "the pool must be small enough to matter");
}

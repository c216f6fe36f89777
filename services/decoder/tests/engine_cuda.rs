//! The engine on the CUDA backend, on a card or on its host emulation: steps that are queued ahead, in graphs that are replayed.

mod common;
#[path = "common/requests.rs"]
mod requests;

use common::checkpoint;
use idefics_decoder::{
    Config, Engine,
    sequence::{Event, FinishReason, Request, SamplingParams},
};
use idefics_kernels::cuda::{Cuda, CudaOptions};
use requests::{GREEDY, collect, collect_choices, endless, engine_of, large, requests, small};
use std::sync::atomic::Ordering;
use tempfile::TempDir;
use tracing::Span;

/// Heads of 64, the smallest that the backend takes.
fn engine(config: Config) -> (TempDir, Engine) {
    let (folder, checkpoint) = checkpoint(128);
    let engine = engine_of(&folder, &checkpoint, Cuda::open(&CudaOptions::default()).unwrap(), config);
    (folder, engine)
}

fn steps_ahead(engine: &Engine) -> usize {
    engine.stats().num_steps_ahead.load(Ordering::Relaxed)
}

/// The tokens of a request with a min-p are chosen on the host, from the same logits: step by step, none ahead.
#[tokio::test]
#[ignore = "needs a CUDA device or its emulation"]
async fn answers_are_those_of_steps_that_wait_for_each_other() {
    // So many blocks that their tables are widened twice.
    let (_folder, engine) = engine(Config { block_size_tokens: 1, ..large() });
    let request = |min_p| Request {
        sampling: SamplingParams { min_p, logprobs: Some(3), ..endless(vec![], 1).sampling },
        ..endless((3..33).collect(), 120)
    };
    let waiting = collect(engine.submit(&request(0.1), &Span::none())).await;
    assert_eq!((waiting.0.len(), steps_ahead(&engine)), (120, 0));
    assert_eq!(collect(engine.submit(&request(0.0), &Span::none())).await, waiting);
    assert_eq!(steps_ahead(&engine), 119);
}

#[tokio::test]
#[ignore = "needs a CUDA device or its emulation"]
async fn choices_come_and_go_while_steps_are_in_flight() {
    let (_folder, engine) = engine(large());
    // So few tokens that each of their passes streams the weights: a row then has the same bits in any of them.
    let mut events = engine.submit(&Request { n: 4, request_id: "a".into(), ..endless(vec![5; 4], 60) }, &Span::none());
    let (mut tokens, mut ends) = (vec![Vec::new(); 4], vec![None; 4]);
    while let Some(event) = events.recv().await {
        match event {
            Event::Token { choice, token_id, .. } => {
                tokens[choice].push(token_id);
                if choice > 0 && tokens[choice].len() == 5 * choice {
                    engine.cancel_choice("a".into(), choice);
                }
            }
            Event::Finished { choice, reason, .. } => assert_eq!(ends[choice].replace(reason), None),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!((tokens[0].len(), ends[0]), (60, Some(FinishReason::Length)));
    assert!(tokens.iter().all(|choice| tokens[0].starts_with(choice)), "{tokens:?}");
    let stats = engine.stats();
    while stats.num_free_blocks.load(Ordering::Relaxed) != stats.num_blocks.load(Ordering::Relaxed) {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
#[ignore = "needs a CUDA device or its emulation"]
async fn requests_in_few_blocks_get_their_whole_answers() {
    let (_folder, engine) = engine(Config { kv_cache_bytes: 1 << 16, ..small() });
    let all: Vec<Request> = requests(SamplingParams { temperature: 1.0, ignore_eos: true, ..GREEDY })
        .into_iter()
        .map(|r| Request { image_spans: vec![], n: 2, ..r })
        .collect();
    let receivers: Vec<_> = all.iter().map(|r| engine.submit(r, &Span::none())).collect();
    for (events, request) in receivers.into_iter().zip(&all) {
        let lengths: Vec<_> = collect_choices(events, 2).await.into_iter().map(|(tokens, reason)| (tokens.len(), reason)).collect();
        assert_eq!(lengths, [(request.max_new_tokens, FinishReason::Length); 2]);
    }
    assert!(steps_ahead(&engine) > 0 && engine.stats().num_preemptions.load(Ordering::Relaxed) > 0);
}

/// Batches are filled up to 1, 2, 4, 8 and 16 sequences, where there is room for so many. The tokens of every other request are chosen
/// on the host. So few tokens that each pass streams the weights.
#[tokio::test]
#[ignore = "needs a CUDA device or its emulation"]
async fn answers_in_batches_of_every_size_are_those_alone() {
    for max_num_seqs in [5, 12, 64] {
        let (_folder, engine) = engine(Config { max_num_seqs, ..large() });
        let request = |i: usize| Request {
            sampling: SamplingParams {
                min_p: if i.is_multiple_of(2) { 0.1 } else { 0.0 },
                logprobs: Some(i as u32 % 4),
                ..endless(vec![], 1).sampling
            },
            ..endless(vec![3 + i as u32], 4 + 2 * i)
        };
        let count = max_num_seqs.min(13);
        let mut alone = Vec::new();
        for i in 0..count {
            alone.push(collect(engine.submit(&request(i), &Span::none())).await);
        }
        let receivers: Vec<_> = (0..count).map(|i| engine.submit(&request(i), &Span::none())).collect();
        for (i, (events, alone)) in receivers.into_iter().zip(&alone).enumerate() {
            assert_eq!(&collect(events).await, alone, "request {i} of {count} in {max_num_seqs}");
        }
    }
}

//! Engines on a tiny random model, and requests for them.

use crate::common::{HIDDEN, IMAGE, LATENTS};
use idefics_common::checkpoint::Checkpoint;
use idefics_decoder::{
    Config, Engine, EngineOptions,
    block_manager::BlockHash,
    image_store::{ImageKey, ImageTokens},
    sequence::{Event, FinishReason, ImageSpan, Request, SamplingParams},
};
use idefics_kernels::{Backend, DType, weights::Weights};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::sync::Arc;
use tempfile::TempDir;
use tokio::sync::mpsc::UnboundedReceiver;

pub(crate) const GREEDY: SamplingParams = SamplingParams::GREEDY;

pub(crate) fn engine_of(folder: &TempDir, checkpoint: &Checkpoint, backend: impl Backend, config: Config) -> Engine {
    let options = EngineOptions {
        weights: Weights::open(folder.path()).unwrap(),
        model: checkpoint.config.clone(),
        config,
        stop_token_ids: checkpoint.stop_token_ids(),
        banned_token_ids: checkpoint.banned_token_ids(),
        progress: Box::new(|_| {}),
    };
    Engine::start(backend, options).unwrap()
}

pub(crate) fn small() -> Config {
    // 32 blocks of 4 tokens, 512 bytes each: so few that sequences have to give way.
    Config { kv_cache_bytes: 1 << 16, max_num_seqs: 4, max_num_batched_tokens: 7, block_size_tokens: 4, ..Config::default() }
}

pub(crate) fn large() -> Config {
    Config { kv_cache_bytes: 8 << 20, ..Config::default() }
}

pub(crate) fn text(token_ids: Vec<u32>, max_new_tokens: usize) -> Request {
    let cache_root = BlockHash::root(&[]);
    Request {
        request_id: "test".into(),
        token_ids,
        image_spans: vec![],
        n: 1,
        max_new_tokens,
        sampling: GREEDY,
        prompt_logprobs: None,
        priority: 0,
        cache_root,
    }
}

/// An answer of as many tokens as are asked for.
pub(crate) fn endless(token_ids: Vec<u32>, max_new_tokens: usize) -> Request {
    Request { sampling: SamplingParams { ignore_eos: true, ..GREEDY }, ..text(token_ids, max_new_tokens) }
}

/// A prompt of random ids with an image in the middle of every other one.
pub(crate) fn request(rng: &mut ChaCha8Rng, with_image: bool, sampling: SamplingParams) -> Request {
    let length = rng.random_range(5..60);
    let mut token_ids: Vec<u32> = (0..length).map(|_| rng.random_range(3..IMAGE)).collect();
    let mut image_spans = Vec::new();
    if with_image {
        let values: Vec<u8> = (0..2 * LATENTS * HIDDEN).flat_map(|_| (rng.random::<f32>() - 0.5).to_le_bytes()).collect();
        let image = Arc::new(ImageTokens::new(values.into(), DType::F32, 2 * LATENTS, HIDDEN).unwrap());
        let key = ImageKey(rng.random());
        for sub_image in 0..2 {
            let start = token_ids.len() - rng.random_range(0..3);
            token_ids.truncate(start);
            token_ids.extend([IMAGE; LATENTS]);
            image_spans.push(ImageSpan { positions: start..start + LATENTS, key, image: image.clone(), first_row: sub_image * LATENTS });
            token_ids.extend([7, 8, 9]);
        }
    }
    Request { image_spans, max_new_tokens: rng.random_range(1..20), sampling, ..text(token_ids, 1) }
}

pub(crate) fn requests(sampling: SamplingParams) -> Vec<Request> {
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    (0..12).map(|i| request(&mut rng, i % 2 == 0, SamplingParams { seed: i, ..sampling.clone() })).collect()
}

/// The answer of each choice.
pub(crate) async fn collect_choices(mut events: UnboundedReceiver<Event>, n: usize) -> Vec<(Vec<u32>, FinishReason)> {
    let mut tokens = vec![Vec::new(); n];
    let mut reasons = vec![None; n];
    while reasons.contains(&None) {
        match events.recv().await.expect("every choice ends with an event") {
            Event::PromptLogprobs { .. } => {}
            Event::Token { choice, token_id, .. } => tokens[choice].push(token_id),
            Event::Finished { choice, reason, .. } => assert_eq!(reasons[choice].replace(reason), None, "choice {choice} ended twice"),
            Event::Failed(error) => panic!("{error}"),
        }
    }
    tokens.into_iter().zip(reasons.into_iter().flatten()).collect()
}

pub(crate) async fn collect(events: UnboundedReceiver<Event>) -> (Vec<u32>, FinishReason) {
    collect_choices(events, 1).await.remove(0)
}

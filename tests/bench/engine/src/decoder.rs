//! The decoder engine: prompts of given lengths to their first token, and sequences that decode together.

use crate::{DecoderArgs, Model, Report, cases::DecodeCase, median, wait_for_end};
use anyhow::{Context, Result, bail, ensure};
use idefics_decoder::{
    Config, Engine, EngineOptions,
    block_manager::BlockHash,
    sequence::{Event, Request, SamplingParams},
};
use idefics_kernels::Backend;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};
use std::time::{Duration, Instant};
use tokio::sync::mpsc::{UnboundedReceiver, error::TryRecvError};
use tracing::Span;

/// Steps after the last sequence's first token that do not count: a graph is captured in one of them.
const WARMUP_STEPS: usize = 4;
/// Random streams of the prompts that are prefilled; those below belong to the sequences that decode.
const PREFILL_STREAMS: u64 = 1 << 32;

/// Loads the engine, prefills and decodes.
pub(crate) fn measure<B: Backend>(args: &DecoderArgs, repeats: u32, model: &Model, open: &impl Fn() -> Result<B>, report: &mut Report) {
    let started_at = Instant::now();
    let engine = open().and_then(|backend| start(backend, args, model));
    let loaded = engine.as_ref().map(|engine| json!({ "device": engine.device_name(), "seconds": started_at.elapsed().as_secs_f64() }));
    report.line(json!({ "kind": "load", "engine": "decoder" }), loaded.map_err(|error| anyhow::anyhow!("{error:#}")));
    let Ok(engine) = engine else { return };
    let bench = Bench { engine, vocab_size: model.checkpoint.config.text_config.vocab_size, args };
    for tokens in &args.prefill {
        report.line(json!({ "kind": "prefill", "tokens": tokens }), bench.prefill(*tokens, repeats));
    }
    // Prompts of smaller cases begin those of larger ones, which leave them in the cache: long prefills happen once.
    let mut cases = args.decode.clone();
    cases.sort_unstable_by(|a, b| b.cmp(a));
    for case in cases {
        report.line(json!({ "kind": "decode", "batch": case.batch, "context": case.context }), bench.decode(case));
    }
    let alive = bench.engine.alive();
    drop(bench);
    wait_for_end(alive);
}

fn start<B: Backend>(backend: B, args: &DecoderArgs, model: &Model) -> Result<Engine> {
    let config = Config {
        kv_cache_bytes: args.kv_cache_bytes.unwrap_or_else(|| kv_cache_bytes(args, model, backend.activation_dtype().size())),
        max_model_tokens: args.max_model_tokens,
        max_num_seqs: args.max_num_seqs,
        max_num_batched_tokens: args.max_num_batched_tokens,
        ..Config::default()
    };
    let options = EngineOptions {
        weights: model.weights.clone(),
        model: model.checkpoint.config.clone(),
        config,
        stop_token_ids: model.checkpoint.stop_token_ids(),
        banned_token_ids: model.checkpoint.banned_token_ids(),
        progress: Box::new(|_| ()),
    };
    Engine::start(backend, options).context("the decoder engine cannot start")
}

/// Room for the largest case, with the rest of a block for each sequence.
fn kv_cache_bytes(args: &DecoderArgs, model: &Model, element_bytes: usize) -> usize {
    let text = &model.checkpoint.config.text_config;
    let block = Config::default().block_size_tokens;
    let decode = args.decode.iter().map(|case| case.batch * (case.context + args.most_new_tokens(*case) + block));
    // A prompt leaves its blocks in the cache until others need them.
    let prefill = args.prefill.iter().map(|tokens| tokens + 2 * block);
    let tokens = decode.chain(prefill).max().unwrap_or(block);
    2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim() * element_bytes * tokens
}

impl DecoderArgs {
    /// Tokens that the sequence which comes last generates: the first one ends its prefill.
    fn new_tokens(&self) -> usize {
        1 + WARMUP_STEPS + self.steps as usize
    }

    /// Tokens that all others may generate: they decode already while the later prompts are prefilled, and must not end before
    /// the last sequence does.
    fn most_new_tokens(&self, case: DecodeCase) -> usize {
        let prefill_tokens_a_step = self.max_num_batched_tokens.saturating_sub(case.batch).max(1);
        self.new_tokens() + (case.batch * case.context).div_ceil(prefill_tokens_a_step) + case.batch
    }
}

struct Bench<'a> {
    engine: Engine,
    vocab_size: usize,
    args: &'a DecoderArgs,
}

impl Bench<'_> {
    /// Queues a prompt of random tokens; those of a stream begin alike at every length.
    fn submit(&self, stream: u64, tokens: usize, max_new_tokens: usize) -> Result<UnboundedReceiver<Event>> {
        let most = self.engine.max_model_tokens();
        ensure!(
            tokens + max_new_tokens <= most,
            "{tokens} tokens and {max_new_tokens} new ones do not fit into {most}; raise --max-model-tokens or --kv-cache-bytes"
        );
        let mut rng = ChaCha8Rng::seed_from_u64(0);
        rng.set_stream(stream);
        // Special tokens stand at both ends of the vocabulary.
        let ids = 3..(self.vocab_size as u32).saturating_sub(16).max(4);
        let request = Request {
            request_id: format!("{stream}"),
            token_ids: (0..tokens).map(|_| rng.random_range(ids.clone())).collect(),
            image_spans: Vec::new(),
            n: 1,
            max_new_tokens,
            sampling: SamplingParams { ignore_eos: true, ..SamplingParams::GREEDY },
            prompt_logprobs: None,
            priority: 0,
            cache_root: BlockHash::root(&[]),
        };
        Ok(self.engine.submit(&request, &Span::none()))
    }

    /// Median times from submission to the first token, and of the forward passes alone.
    fn prefill(&self, tokens: usize, repeats: u32) -> Result<Value> {
        let (mut ttft, mut prefill) = (Vec::new(), Vec::new());
        for repeat in 0..=repeats {
            let stream = PREFILL_STREAMS + ((tokens as u64) << 16) + u64::from(repeat);
            let submitted_at = Instant::now();
            let mut events = self.submit(stream, tokens, 1)?;
            let first_at = next_token(&mut events)?;
            let Some(Event::Finished { prefill_ms, .. }) = events.blocking_recv() else { bail!("the request did not finish") };
            self.wait_until_idle();
            if repeat > 0 {
                ttft.push((first_at - submitted_at).as_secs_f64() * 1e3);
                prefill.push(prefill_ms);
            }
        }
        Ok(json!({ "ttft_ms": median(ttft), "prefill_ms": median(prefill) }))
    }

    /// Median time of a step in which all sequences decode and none prefills: the gaps between the tokens of the sequence that
    /// was submitted last.
    fn decode(&self, case: DecodeCase) -> Result<Value> {
        ensure!(
            case.batch <= self.args.max_num_seqs && case.batch < self.args.max_num_batched_tokens,
            "{} sequences do not run at once; raise --max-num-seqs and --max-num-batched-tokens",
            case.batch
        );
        let preemptions = self.preemptions();
        let mut others = (1..case.batch as u64)
            .map(|stream| self.submit(stream, case.context, self.args.most_new_tokens(case)))
            .collect::<Result<Vec<_>>>()?;
        let mut last = self.submit(0, case.context, self.args.new_tokens())?;
        let mut times = Vec::with_capacity(self.args.new_tokens());
        for _ in 0..self.args.new_tokens() {
            times.push(next_token(&mut last)?);
        }
        for events in &mut others {
            still_decodes(events)?;
        }
        drop((others, last));
        self.wait_until_idle();
        ensure!(self.preemptions() == preemptions, "sequences gave way to others; raise --kv-cache-bytes");
        let steps: Vec<f64> = times[WARMUP_STEPS..].windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64() * 1e3).collect();
        let (least, mean) = (steps.iter().copied().fold(f64::INFINITY, f64::min), steps.iter().sum::<f64>() / steps.len() as f64);
        let ms = median(steps);
        Ok(json!({ "ms": ms, "least_ms": least, "mean_ms": mean, "tokens_per_s": case.batch as f64 / ms * 1e3 }))
    }

    fn preemptions(&self) -> usize {
        self.engine.stats().num_preemptions.load(std::sync::atomic::Ordering::Relaxed)
    }

    /// Returns when no sequence waits or runs, or the engine has ended.
    fn wait_until_idle(&self) {
        while *self.engine.alive().borrow() && self.engine.stats().num_sequences.load(std::sync::atomic::Ordering::Relaxed) > 0 {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// When the next token came.
fn next_token(events: &mut UnboundedReceiver<Event>) -> Result<Instant> {
    match events.blocking_recv() {
        Some(Event::Token { .. }) => Ok(Instant::now()),
        Some(Event::Failed(error)) => bail!("the engine says: {error}"),
        Some(event) => bail!("expected a token, found {event:?}"),
        None => bail!("the engine has ended"),
    }
}

/// That a sequence has neither failed nor ended.
fn still_decodes(events: &mut UnboundedReceiver<Event>) -> Result<()> {
    loop {
        match events.try_recv() {
            Ok(Event::Token { .. }) => {}
            Ok(event) => bail!("a sequence ended before the last one: {event:?}"),
            Err(TryRecvError::Empty) => return Ok(()),
            Err(TryRecvError::Disconnected) => bail!("the engine has ended"),
        }
    }
}

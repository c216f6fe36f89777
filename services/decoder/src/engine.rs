//! The engine: one thread that owns the device and runs schedule → run → postprocess until there is nothing left to do.

use crate::{
    config::Config,
    metrics::{EngineMetrics, Levels},
    model_runner::{CacheSize, ModelRunner},
    sampler::{Sampler, Scratch},
    scheduler::{Scheduled, Scheduler},
    sequence::{Event, Request, Sequence},
};
use idefics_common::{checkpoint::ModelConfig, engine_thread};
use idefics_kernels::{Backend, Error, Result, weights::Weights};
use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Instant,
};
use tokio::sync::{mpsc, watch};
use tracing::Span;

/// What an engine needs to start.
pub struct EngineOptions {
    /// The checkpoint's weights.
    pub weights: Weights,
    /// The checkpoint's configuration.
    pub model: ModelConfig,
    /// The role's configuration.
    pub config: Config,
    /// Ids that end generation.
    pub stop_token_ids: Vec<u32>,
    /// Ids that are never generated.
    pub banned_token_ids: Vec<u32>,
    /// Called with the bytes of each tensor as it is loaded.
    pub progress: Box<dyn Fn(usize) + Send>,
}

/// Counts of an engine, for whoever watches it.
#[derive(Debug, Default)]
pub struct EngineStats {
    /// Sequences that wait or run.
    pub num_sequences: AtomicUsize,
    /// Blocks of the KV cache that nobody has.
    pub num_free_blocks: AtomicUsize,
    /// Blocks of the KV cache.
    pub num_blocks: AtomicUsize,
    /// Tokens guessed by prompt lookup.
    pub num_draft_tokens: AtomicUsize,
    /// Of these, the ones that were right.
    pub num_accepted_tokens: AtomicUsize,
    /// How often a sequence had to give its blocks back and start over.
    pub num_preemptions: AtomicUsize,
}

/// A handle on the engine's thread. The thread ends when the last handle is dropped.
#[derive(Clone)]
pub struct Engine {
    submissions: mpsc::UnboundedSender<Sequence>,
    alive: watch::Receiver<bool>,
    stats: Arc<EngineStats>,
    max_model_tokens: usize,
    device_name: String,
}

impl Engine {
    /// Starts the thread and blocks until the model is loaded.
    ///
    /// # Errors
    /// If the weights are not those of `options.model`, or the device has no room.
    pub fn start<B: Backend>(backend: B, options: EngineOptions) -> Result<Self> {
        let cache = CacheSize::new(&options.config, &options.model, backend.activation_dtype().size())?;
        let (submissions, receiver) = mpsc::unbounded_channel();
        let device_name = backend.device_name();
        let stats = Arc::new(EngineStats::default());
        let worker_stats = Arc::clone(&stats);
        let load = move || Worker::load(backend, options, cache, worker_stats);
        let alive = engine_thread::start("decoder-engine", load, |worker| worker.run(receiver), Error::Device)?;
        Ok(Self { submissions, alive, stats, max_model_tokens: cache.max_model_tokens, device_name })
    }

    /// Queues a request, whose prompt and answer must fit into [`max_model_tokens`](Self::max_model_tokens); its events come
    /// out of the receiver, at most `max_new_tokens + 1`. Dropping the receiver cancels it within one step. If the engine
    /// has ended, the receiver is closed.
    pub fn submit(&self, request: Request, span: Span) -> mpsc::UnboundedReceiver<Event> {
        let (events, receiver) = mpsc::unbounded_channel();
        let sampler = Sampler::new(request.sampling.clone(), &request.token_ids);
        self.stats.num_sequences.fetch_add(1, Ordering::Relaxed);
        drop(self.submissions.send(Sequence::new(request, sampler, events, span)));
        receiver
    }

    /// Longest prompt and answer together.
    pub fn max_model_tokens(&self) -> usize {
        self.max_model_tokens
    }

    /// Counts.
    pub fn stats(&self) -> &EngineStats {
        &self.stats
    }

    /// Turns false when the thread has ended.
    pub fn alive(&self) -> watch::Receiver<bool> {
        self.alive.clone()
    }

    /// `cpu`, or the name of the card.
    pub fn device_name(&self) -> &str {
        &self.device_name
    }
}

#[cfg(test)]
impl Engine {
    /// An engine whose thread has ended.
    pub(crate) fn ended() -> Self {
        let ((submissions, _), (_, alive)) = (mpsc::unbounded_channel(), watch::channel(false));
        Self { submissions, alive, stats: Arc::default(), max_model_tokens: 512, device_name: "none".into() }
    }
}

struct Worker<B: Backend> {
    scheduler: Scheduler,
    runner: ModelRunner<B>,
    stop_token_ids: Vec<u32>,
    banned_token_ids: Vec<u32>,
    vocab_size: usize,
    scratch: Scratch,
    stats: Arc<EngineStats>,
    metrics: EngineMetrics,
}

impl<B: Backend> Worker<B> {
    fn load(backend: B, options: EngineOptions, cache: CacheSize, stats: Arc<EngineStats>) -> Result<Self> {
        let EngineOptions { weights, model, config, stop_token_ids, banned_token_ids, progress } = options;
        let runner = ModelRunner::load(backend, &weights, &model, &config, cache, &*progress)?;
        let blocks = runner.block_manager(cache, &config);
        stats.num_blocks.store(blocks.num_blocks(), Ordering::Relaxed);
        stats.num_free_blocks.store(blocks.num_free(), Ordering::Relaxed);
        let scheduler =
            Scheduler::new(blocks, config.max_num_seqs, config.max_num_batched_tokens).with_prompt_lookup(config.prompt_lookup_tokens);
        Ok(Self {
            scheduler,
            runner,
            stop_token_ids,
            banned_token_ids,
            vocab_size: model.text_config.vocab_size,
            scratch: Scratch::default(),
            metrics: EngineMetrics::new(),
            stats,
        })
    }

    fn run(mut self, mut submissions: mpsc::UnboundedReceiver<Sequence>) {
        loop {
            if self.scheduler.is_empty() {
                match submissions.blocking_recv() {
                    Some(sequence) => self.scheduler.add(sequence),
                    None => return,
                }
            }
            while let Ok(sequence) = submissions.try_recv() {
                self.scheduler.add(sequence);
            }
            let step = self.scheduler.schedule();
            if !step.is_empty()
                && let Err(error) = self.step(&step)
            {
                tracing::error!(%error, "decoder step failed");
                self.fail(&step, &error.to_string());
                if matches!(error, Error::Device(_)) {
                    return;
                }
            }
            self.publish(submissions.len());
        }
    }

    /// Shows where the engine stands.
    fn publish(&mut self, num_submitted: usize) {
        let (waiting, all) = (self.scheduler.num_waiting() + num_submitted, self.scheduler.len() + num_submitted);
        let (blocks, free) = (self.scheduler.blocks().num_blocks(), self.scheduler.blocks().num_free());
        let preemptions = self.scheduler.num_preemptions();
        self.stats.num_free_blocks.store(free, Ordering::Relaxed);
        self.stats.num_preemptions.store(preemptions, Ordering::Relaxed);
        self.stats.num_sequences.store(all, Ordering::Relaxed);
        self.metrics.set_levels(Levels { waiting, running: all - waiting, blocks_used: blocks - free, blocks, preemptions });
    }

    fn step(&mut self, step: &[Scheduled]) -> Result<()> {
        let started_at = Instant::now();
        let running = self.scheduler.running();
        step.iter().for_each(|part| running[part.sequence].mark_started());
        let outputs = self.runner.run(step, running)?;
        let num_outputs = outputs.len();
        let mut finished = Vec::new();
        for (i, logits) in outputs {
            let sequence = &mut running[i];
            let draft = std::mem::take(&mut sequence.draft);
            let (before, drafted) = (sequence.token_ids.len(), draft.len());
            let mut accepted = 0;
            if before == sequence.prompt_len {
                self.metrics.first_token(sequence);
            }
            for (place, logits) in logits.chunks_exact(self.vocab_size).enumerate() {
                let (banned, stop) = (&self.banned_token_ids, &self.stop_token_ids);
                let Some((token_id, logprobs)) = sequence.sampler.sample(logits, banned, stop, &mut self.scratch) else {
                    drop(sequence.events.send(Event::Failed("the model's logits are not finite".into())));
                    finished.push(i);
                    break;
                };
                if sequence.push(token_id, logprobs, stop).is_some() {
                    finished.push(i);
                    break;
                }
                if draft.get(place) != Some(&token_id) {
                    break;
                }
                accepted += 1;
            }
            self.stats.num_draft_tokens.fetch_add(drafted, Ordering::Relaxed);
            self.stats.num_accepted_tokens.fetch_add(accepted, Ordering::Relaxed);
            self.metrics.tokens(sequence.token_ids.len() - before, drafted, accepted);
            // Keep its memory for the next step.
            sequence.draft = draft;
        }
        // Before anything leaves: what the step computed can be shared, finished or not.
        self.scheduler.commit(step);
        self.scheduler.remove(&finished);
        let elapsed = started_at.elapsed();
        self.metrics.step(step, elapsed);
        tracing::trace!(sequences = step.len(), outputs = num_outputs, elapsed_ms = elapsed.as_secs_f64() * 1e3, "step");
        Ok(())
    }

    /// Ends the sequences of a step with an error.
    fn fail(&mut self, step: &[Scheduled], error: &str) {
        for part in step {
            drop(self.scheduler.running()[part.sequence].events.send(Event::Failed(error.to_owned())));
        }
        let indices: Vec<usize> = step.iter().map(|part| part.sequence).collect();
        self.scheduler.remove(&indices);
    }
}

//! The engine: one thread that owns the device and runs schedule → launch → finish until there is nothing left to do. On a device
//! that chooses tokens itself, the step behind one that is in flight is launched before that one is finished, where
//! [`schedule_ahead`](Scheduler::schedule_ahead) allows it: the device does not wait for the host.

use crate::{
    block_manager::BlockManager,
    config::Config,
    metrics::{EngineMetrics, Levels},
    model_runner::{self, Launched, ModelRunner, Next},
    sampler::Scratch,
    scheduler::{Ahead, Scheduled, Scheduler},
    sequence::{Event, Logprobs, Rank, Request, Sequence},
};
use idefics_common::{checkpoint::ModelConfig, engine_thread};
use idefics_kernels::{Backend, Error, Result, weights::Weights};
use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
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
    /// Sequences that wait or run, one for each choice of a request: counted from submission on.
    pub num_sequences: AtomicUsize,
    /// Longest prompt and answer together, in tokens; set when the model is loaded.
    pub max_model_tokens: AtomicUsize,
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
    /// Steps that were queued on the device before the host had seen the tokens of the step before.
    pub num_steps_ahead: AtomicUsize,
}

/// What the engine's thread is told.
enum Command {
    Generate(Box<Sequence>),
    CancelChoice { request_id: String, choice: usize },
}

/// A handle on the engine's thread. The thread ends when the last handle is dropped.
#[derive(Clone)]
pub struct Engine {
    commands: mpsc::UnboundedSender<Command>,
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
        let (commands, receiver) = mpsc::unbounded_channel();
        let device_name = backend.device_name();
        let stats = Arc::new(EngineStats::default());
        let worker_stats = Arc::clone(&stats);
        let load = move || Worker::load(backend, options, worker_stats);
        let alive = engine_thread::start("decoder-engine", load, |worker| worker.run(receiver), Error::Device)?;
        let max_model_tokens = stats.max_model_tokens.load(Ordering::Relaxed);
        Ok(Self { commands, alive, stats, max_model_tokens, device_name })
    }

    /// Queues a request, whose prompt and answer must fit into [`max_model_tokens`](Self::max_model_tokens); the events of all
    /// its choices come out of the receiver, at most `max_new_tokens + 1` for each behind the prompt's log-probabilities.
    /// Dropping the receiver cancels them within one step, or two where one is queued ahead. If the engine has ended, the receiver
    /// is closed.
    pub fn submit(&self, request: &Request, span: &Span) -> mpsc::UnboundedReceiver<Event> {
        let (events, receiver) = mpsc::unbounded_channel();
        self.stats.num_sequences.fetch_add(request.n, Ordering::Relaxed);
        drop(self.commands.send(Command::Generate(Box::new(Sequence::new(request, Instant::now(), &events, span)))));
        receiver
    }

    /// Ends one choice of a request within one step, or two where one is queued ahead; it is reported as
    /// [`Cancelled`](crate::sequence::FinishReason::Cancelled). Unknown ones, and those that have ended, are ignored.
    pub fn cancel_choice(&self, request_id: String, choice: usize) {
        drop(self.commands.send(Command::CancelChoice { request_id, choice }));
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
        let ((commands, _), (_, alive)) = (mpsc::unbounded_channel(), watch::channel(false));
        Self { commands, alive, stats: Arc::default(), max_model_tokens: 512, device_name: "none".into() }
    }
}

/// A step that is queued on the device.
struct InFlight {
    /// Its parts, in order, and whose each is: a sequence may have another place by the time the step has ended, or none.
    parts: Vec<(Rank, Scheduled)>,
    launched: Launched,
    launched_at: Instant,
}

impl InFlight {
    /// Names the sequences of a step.
    fn parts(step: Vec<Scheduled>, running: &[Sequence]) -> Vec<(Rank, Scheduled)> {
        step.into_iter().map(|part| (running[part.sequence].rank(), part)).collect()
    }
}

/// A step that failed, with the sequences that had a part in it.
struct Failed {
    ranks: Vec<Rank>,
    error: Error,
}

struct Worker<B: Backend> {
    scheduler: Scheduler,
    /// Sequences that the scheduler had when `stats` was last told.
    num_sequences: usize,
    runner: ModelRunner<B>,
    stop_token_ids: Vec<u32>,
    banned_token_ids: Vec<u32>,
    vocab_size: usize,
    scratch: Scratch,
    /// When the last step ended.
    finished_at: Instant,
    stats: Arc<EngineStats>,
    metrics: EngineMetrics,
}

impl<B: Backend> Worker<B> {
    fn load(backend: B, options: EngineOptions, stats: Arc<EngineStats>) -> Result<Self> {
        let step_tokens = model_runner::step_tokens(&options.config, &backend);
        let runner = ModelRunner::load(backend, &options)?;
        let EngineOptions { model, config, stop_token_ids, banned_token_ids, .. } = options;
        let cache = runner.cache();
        stats.max_model_tokens.store(cache.max_model_tokens, Ordering::Relaxed);
        let blocks = BlockManager::new(cache.num_blocks, config.block_size_tokens);
        stats.num_blocks.store(blocks.num_blocks(), Ordering::Relaxed);
        stats.num_free_blocks.store(blocks.num_free(), Ordering::Relaxed);
        let scheduler = Scheduler::new(blocks, config.max_num_seqs, step_tokens)
            .with_prompt_lookup(config.prompt_lookup_tokens)
            .with_priority_step(Duration::from_millis(config.priority_step_ms));
        Ok(Self {
            scheduler,
            num_sequences: 0,
            runner,
            stop_token_ids,
            banned_token_ids,
            vocab_size: model.text_config.vocab_size,
            scratch: Scratch::default(),
            finished_at: Instant::now(),
            metrics: EngineMetrics::new(),
            stats,
        })
    }

    fn run(mut self, mut commands: mpsc::UnboundedReceiver<Command>) {
        let mut ahead: Option<InFlight> = None;
        loop {
            if self.scheduler.is_empty() {
                match commands.blocking_recv() {
                    Some(command) => self.obey(command),
                    None => return,
                }
            }
            while let Ok(command) = commands.try_recv() {
                self.obey(command);
            }
            match self.step(ahead.take()) {
                Ok(next) => ahead = next,
                Err(Failed { ranks, error }) => {
                    tracing::error!(%error, "decoder step failed");
                    self.fail(&ranks, &error.to_string());
                    if matches!(error, Error::Device(_)) {
                        return self.metrics.ended();
                    }
                }
            }
            self.publish();
        }
    }

    /// Finishes the step that is in flight, or the next one. Returns the one behind it, if that is in flight by then.
    fn step(&mut self, ahead: Option<InFlight>) -> Result<Option<InFlight>, Failed> {
        // Nobody waits for tokens of sequences that have all ended.
        let wanted = ahead.filter(|ahead| ahead.parts.iter().any(|(rank, _)| self.scheduler.position(*rank).is_some()));
        let current = match wanted {
            Some(ahead) => ahead,
            None => match self.scheduler.schedule() {
                step if step.is_empty() => return Ok(None),
                step => self.launch(step)?,
            },
        };
        let next = if B::SAMPLES { self.look_ahead(&current) } else { Ok(None) };
        self.finish(current)?;
        next
    }

    fn launch(&mut self, step: Vec<Scheduled>) -> Result<InFlight, Failed> {
        let launched_at = Instant::now();
        let running = self.scheduler.running();
        step.iter().for_each(|part| running[part.sequence].mark_started());
        let launched = self.runner.launch(&step, running);
        let parts = InFlight::parts(step, running);
        match launched {
            Ok(launched) => Ok(InFlight { parts, launched, launched_at }),
            Err(error) => Err(Failed { ranks: ranks(&parts), error }),
        }
    }

    /// Launches the step behind `current`, if it is certain what that is.
    fn look_ahead(&mut self, current: &InFlight) -> Result<Option<InFlight>, Failed> {
        let launched_at = Instant::now();
        if !current.launched.is_plain(current.parts.len()) {
            return Ok(None);
        }
        let Some(Ahead { step, sources }) = self.scheduler.schedule_ahead(&ranks(&current.parts)) else { return Ok(None) };
        let running = self.scheduler.running();
        let launched = self.runner.launch_ahead(&step, running, &sources);
        let parts = InFlight::parts(step, running);
        match launched {
            Ok(launched) => {
                self.stats.num_steps_ahead.fetch_add(1, Ordering::Relaxed);
                self.metrics.step_ahead();
                Ok(Some(InFlight { parts, launched, launched_at }))
            }
            Err(error) => Err(Failed { ranks: ranks(&parts), error }),
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Generate(request) => {
                self.num_sequences += 1 + request.siblings.len();
                self.scheduler.add(*request);
            }
            Command::CancelChoice { request_id, choice } => self.scheduler.cancel(&request_id, choice),
        }
    }

    /// Shows where the engine stands.
    fn publish(&mut self) {
        let (blocks, free) = (self.scheduler.blocks().num_blocks(), self.scheduler.blocks().num_free());
        let (running, preemptions) = (self.scheduler.num_running(), self.scheduler.num_preemptions());
        self.stats.num_free_blocks.store(free, Ordering::Relaxed);
        self.stats.num_preemptions.store(preemptions, Ordering::Relaxed);
        // Only what has ended is taken off, so that what was submitted meanwhile is never forgotten.
        let ended = self.num_sequences - self.scheduler.len();
        self.num_sequences -= ended;
        let all = self.stats.num_sequences.fetch_sub(ended, Ordering::Relaxed) - ended;
        self.metrics.set_levels(Levels { waiting: all - running, running, blocks_used: blocks - free, blocks, preemptions });
    }

    /// Waits for a step and gives its tokens out. Sequences that have ended since it was launched get nothing.
    fn finish(&mut self, step: InFlight) -> Result<(), Failed> {
        let InFlight { parts, launched, launched_at } = step;
        let places: Vec<Option<usize>> = parts.iter().map(|(rank, _)| self.scheduler.position(*rank)).collect();
        let running = self.scheduler.running();
        let mut prompt_logprobs: Vec<(usize, (u32, Logprobs))> = Vec::new();
        let outputs = self.runner.finish(launched, &mut |part, token_id, logprobs| {
            let Some(i) = places[part] else { return };
            prompt_logprobs.push((i, (token_id, logprobs)));
        });
        let outputs = match outputs {
            Ok(outputs) => outputs,
            Err(error) => return Err(Failed { ranks: ranks(&parts), error }),
        };
        let num_outputs = outputs.len();
        let (mut finished, mut failed) = (Vec::new(), Vec::new());
        for of_sequence in prompt_logprobs.chunk_by(|a, b| a.0 == b.0) {
            let sequence = &mut running[of_sequence[0].0];
            if of_sequence.iter().any(|(_, (_, logprobs))| logprobs.logprob.is_nan()) {
                failed.push(sequence.number());
            } else {
                sequence.report_prompt(of_sequence.iter().map(|(_, token)| token.clone()).collect());
            }
        }
        for (part, next) in outputs {
            let Some(i) = places[part] else { continue };
            let sequence = &mut running[i];
            if failed.contains(&sequence.number()) {
                continue;
            }
            let draft = std::mem::take(&mut sequence.draft);
            let (before, drafted) = (sequence.token_ids.len(), draft.len());
            let mut accepted = 0;
            if before == sequence.prompt_len && sequence.choice == 0 {
                self.metrics.first_token(sequence);
            }
            for place in 0..=drafted {
                let (banned, stop) = (&self.banned_token_ids, &self.stop_token_ids);
                let chosen = match next {
                    Next::Tokens(tokens, scores) => {
                        let logprobs = || scores.map(|scores| scores.row(place));
                        u32::try_from(tokens[place]).ok().map(|token_id| (sequence.sampler.accept(token_id), logprobs()))
                    }
                    Next::Logits(logits) => {
                        let row = &logits[place * self.vocab_size..(place + 1) * self.vocab_size];
                        sequence.sampler.sample(row, banned, stop, &mut self.scratch)
                    }
                };
                let Some((token_id, logprobs)) = chosen else {
                    failed.push(sequence.number());
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
        // Before anything leaves: what the step computed can be shared, finished or not, unless it is not finite.
        let computed = parts.iter().zip(&places).filter_map(|((_, part), place)| place.map(|sequence| Scheduled { sequence, ..*part }));
        self.scheduler.commit(&computed.collect::<Vec<_>>(), &failed);
        self.scheduler.remove(&finished);
        self.fail_requests(failed, "the model's logits are not finite");
        // A step that was queued ahead begins when the one before ends.
        let finished_at = Instant::now();
        let elapsed = finished_at - launched_at.max(self.finished_at);
        self.finished_at = finished_at;
        self.metrics.step(parts.iter().map(|(_, part)| part), elapsed);
        tracing::trace!(sequences = parts.len(), outputs = num_outputs, elapsed_ms = elapsed.as_secs_f64() * 1e3, "step");
        Ok(())
    }

    /// Ends the requests of a step with an error, as far as they have not ended already.
    fn fail(&mut self, ranks: &[Rank], error: &str) {
        let numbers = ranks.iter().filter(|rank| self.scheduler.position(**rank).is_some()).map(|rank| rank.number).collect();
        self.fail_requests(numbers, error);
    }

    /// Ends requests with all their choices, each with one error.
    fn fail_requests(&mut self, mut numbers: Vec<u64>, error: &str) {
        numbers.sort_unstable();
        numbers.dedup();
        for number in &numbers {
            if let Some(sequence) = self.scheduler.running().iter().find(|sequence| sequence.number() == *number) {
                drop(sequence.events.send(Event::Failed(error.to_owned())));
            }
        }
        self.scheduler.remove_failed(&numbers);
    }
}

fn ranks(parts: &[(Rank, Scheduled)]) -> Vec<Rank> {
    parts.iter().map(|(rank, _)| *rank).collect()
}

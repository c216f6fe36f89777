//! Turns a schedule into one forward pass.

use crate::{
    config::Config,
    engine::EngineOptions,
    inputs::{Inputs, Limits, Output},
    model::{ImageRows, Mistral, Workspace},
    sampler::logprobs,
    scheduler::Scheduled,
    scoring::{PendingScores, Scores, Scoring},
    sequence::{Logprobs, Sequence},
};
use half::{bf16, f16};
use idefics_common::checkpoint::ModelConfig;
use idefics_kernels::{Backend, DType, Download, Element, Error, GraphKey, KvCache, Result, Tensor, WeightLoader};

/// The model with its cache, its activations and its inputs.
pub struct ModelRunner<B: Backend> {
    backend: B,
    model: Mistral<B>,
    kv: Vec<KvCache<B>>,
    workspace: Workspace<B>,
    inputs: Inputs<B>,
    images: ImageRows<B>,
    /// `[n, 1]` i32: rows of prompts whose log-probabilities are wanted.
    prompt_rows: Tensor<B>,
    /// `[n, 1]` i32: the tokens behind them; empty where the host looks them up.
    prompt_token_ids: Tensor<B>,
    scoring: Scoring<B>,
    hidden: usize,
    vocab_size: usize,
    cache: CacheSize,
    tokens: Vec<i32>,
    scores: Scores,
    logits: Vec<f32>,
    prompt_logits: Vec<f32>,
}

/// Fewest rows whose logits the workspace has room for. The head is read once for as many rows of a prompt whose
/// log-probabilities are wanted: as many as make that cheap, and few enough that their logits take no memory to speak of.
const MIN_OUTPUTS: usize = 32;

/// What follows a sequence, a row behind its last token and behind each guess.
#[derive(Clone, Copy, Debug)]
pub enum Next<'a> {
    /// `[rows, vocab]`
    Logits(&'a [f32]),
    /// `[rows]`, chosen by the device; -1 where no logit is finite.
    Tokens(&'a [i32], Option<RowScores<'a>>),
}

/// Log-probabilities of rows that the device chose from.
#[derive(Clone, Copy, Debug)]
pub struct RowScores<'a> {
    scores: &'a Scores,
    first_row: usize,
    top: usize,
}

impl RowScores<'_> {
    /// Of the token that was chosen from a row, before anything that the request asks for.
    pub fn row(&self, row: usize) -> Logprobs {
        self.scores.row(self.first_row + row, self.top)
    }
}

/// A token of a prompt whose log-probability is wanted.
#[derive(Clone, Copy, Debug)]
struct PromptPlace {
    /// Index in the step.
    part: usize,
    token_id: u32,
    /// How many of the likeliest tokens are wanted beside it.
    top: usize,
    /// Row of the step behind which it stands.
    row: usize,
}

/// A step that is queued on the device.
#[derive(Debug)]
pub struct Launched {
    outputs: Vec<Output>,
    prompt_places: Vec<PromptPlace>,
    /// One for each row of the outputs, if the device chooses any.
    tokens: Option<Download<i32>>,
    /// Likewise, if anybody wants them of what the device chooses.
    scores: Option<PendingScores>,
}

impl Launched {
    /// Whether it gives one token for each of `parts` parts, chosen by the device, and nothing else: whether another step can be
    /// queued behind it before the host has seen what it gives.
    pub fn is_plain(&self, parts: usize) -> bool {
        let plain = |output: &Output| output.rows == 1 && output.draw.is_some();
        self.outputs.len() == parts && self.outputs.iter().all(plain) && self.prompt_places.is_empty()
    }
}

/// Called with an index in the step and a token of that sequence's prompt.
pub type OnPromptLogprobs<'a> = &'a mut dyn FnMut(usize, u32, Logprobs);

/// Size of the KV cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheSize {
    /// Blocks of all layers.
    pub num_blocks: usize,
    /// Longest sequence in tokens.
    pub max_model_tokens: usize,
}

/// Tokens in one forward pass.
pub(crate) fn step_tokens<B: Backend>(config: &Config, backend: &B) -> usize {
    if config.max_num_batched_tokens == 0 { backend.step_tokens().max(config.max_num_seqs) } else { config.max_num_batched_tokens }
}

/// Memory of the KV cache on the CPU, if the configuration leaves it open.
const CPU_KV_CACHE_BYTES: usize = 4 << 30;

impl CacheSize {
    /// What `config` gives a model whose cache elements have `element_bytes` bytes. `free_memory` is that of the device, behind
    /// everything else; `None` if it has no memory of its own.
    ///
    /// # Errors
    /// If not even one block fits, or the configured context is longer than the checkpoint's.
    pub fn new(config: &Config, model: &ModelConfig, element_bytes: usize, free_memory: Option<usize>) -> Result<Self> {
        let text = &model.text_config;
        let token_bytes = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim() * element_bytes;
        let kv_cache_bytes = match (config.kv_cache_bytes, free_memory) {
            (0, None) => CPU_KV_CACHE_BYTES,
            (0, Some(free)) => free.saturating_sub(config.device_reserve_bytes),
            (bytes, _) => bytes,
        };
        let num_blocks = kv_cache_bytes / (token_bytes * config.block_size_tokens);
        let (slots, longest) = (num_blocks * config.block_size_tokens, text.max_position_embeddings);
        let max_model_tokens = if config.max_model_tokens == 0 { longest.min(slots) } else { config.max_model_tokens };
        if max_model_tokens > longest {
            let what =
                format!("decoder.max_model_tokens is {max_model_tokens}, the checkpoint's max_position_embeddings is {longest}; lower it");
            return Err(Error::Device(what));
        }
        if max_model_tokens > slots || slots == 0 {
            let wanted =
                max_model_tokens.max(config.block_size_tokens).div_ceil(config.block_size_tokens) * config.block_size_tokens * token_bytes;
            let what = format!(
                "the KV cache has {kv_cache_bytes} bytes for {slots} tokens of {token_bytes} bytes, expected {wanted} or more for {max_model_tokens} tokens; raise decoder.kv_cache_bytes, or lower decoder.max_model_tokens or decoder.device_reserve_bytes"
            );
            return Err(Error::Device(what));
        }
        // More blocks than all sequences can fill would never be used.
        let most = max_model_tokens.div_ceil(config.block_size_tokens) * config.max_num_seqs;
        Ok(Self { num_blocks: num_blocks.min(most), max_model_tokens })
    }
}

impl<B: Backend> ModelRunner<B> {
    /// Loads the model and allocates everything that a step needs; the KV cache last, since it may take what is left.
    ///
    /// # Errors
    /// If the weights are not those of `options.model`, or the device has no room.
    pub fn load(backend: B, options: &EngineOptions) -> Result<Self> {
        let (config, text, dtype) = (&options.config, &options.model.text_config, backend.activation_dtype());
        if config.kv_cache_bytes > 0 || backend.free_memory()?.is_none() {
            // What cannot fit is found before the weights are read.
            CacheSize::new(config, &options.model, dtype.size(), None)?;
        }
        let loader = WeightLoader::new(&backend, &options.weights, &*options.progress);
        let model = Mistral::load(&loader, text, options.model.tie_word_embeddings)?;
        let (tokens, seqs) = (step_tokens(config, &backend), config.max_num_seqs);
        // A next token is wanted behind every guess.
        let outputs = tokens.min((seqs * (1 + config.prompt_lookup_tokens)).max(MIN_OUTPUTS));
        let workspace = Workspace::new(&backend, text, tokens, outputs)?;
        let images = ImageRows { tokens: backend.alloc(tokens, text.hidden_size, dtype)?, rows: backend.alloc(tokens, 1, DType::I32)? };
        let prompt_rows = backend.alloc(outputs, 1, DType::I32)?;
        let prompt_token_ids = backend.alloc(if B::SAMPLES { outputs } else { 0 }, 1, DType::I32)?;
        let scoring = Scoring::new(&backend, outputs, text.vocab_size)?;
        let cache = CacheSize::new(config, &options.model, dtype.size(), backend.free_memory()?)?;
        let block_size = config.block_size_tokens;
        let limits = Limits { tokens, sequences: seqs, outputs, blocks: cache.max_model_tokens.div_ceil(block_size), block_size };
        let inputs = Inputs::new(&backend, limits, text.vocab_size, &options.banned_token_ids)?;
        let slots = cache.num_blocks * block_size;
        let kv_size = text.num_key_value_heads * text.head_dim();
        let cache_tensor = || backend.alloc(slots, kv_size, dtype);
        let kv = (0..text.num_hidden_layers)
            .map(|_| Ok(KvCache { k: cache_tensor()?, v: cache_tensor()?, block_size }))
            .collect::<Result<_>>()?;
        Ok(Self {
            kv,
            workspace,
            inputs,
            images,
            prompt_rows,
            prompt_token_ids,
            scoring,
            cache,
            hidden: text.hidden_size,
            vocab_size: text.vocab_size,
            tokens: Vec::new(),
            scores: Scores::default(),
            logits: Vec::new(),
            prompt_logits: Vec::new(),
            model,
            backend,
        })
    }

    /// Size of the KV cache.
    pub fn cache(&self) -> CacheSize {
        self.cache
    }

    /// Queues the step. Waits for the device only where it must: where it computes in the host's memory.
    ///
    /// # Errors
    /// If the device fails.
    pub fn launch(&mut self, step: &[Scheduled], sequences: &[Sequence]) -> Result<Launched> {
        let has_images = self.prepare_images(step, sequences)?;
        let prompt_places = prompt_places(step, sequences);
        self.queue(step, sequences, None, has_images).map(|launched| Launched { prompt_places, ..launched })
    }

    /// Queues a step of one token for each sequence behind one that is in flight and [plain](Launched::is_plain). The token that it
    /// computes is the one that the other is about to give: that of the other's part `sources[i]` for part `i` of `step`.
    ///
    /// # Errors
    /// If the device fails.
    pub fn launch_ahead(&mut self, step: &[Scheduled], sequences: &[Sequence], sources: &[usize]) -> Result<Launched> {
        self.queue(step, sequences, Some(sources), false)
    }

    fn queue(&mut self, step: &[Scheduled], sequences: &[Sequence], sources: Option<&[usize]>, has_images: bool) -> Result<Launched> {
        let outputs = self.inputs.fill(&self.backend, step, sequences, sources)?;
        let (all_drawn, any_drawn) = (outputs.iter().all(|output| output.draw.is_some()), self.inputs.drawing.num_rows() > 0);
        let Self { backend, model, kv, workspace, inputs, images, scoring, .. } = self;
        let images = has_images.then_some(&*images);
        // Not within `graphed`, which does not come back to this code when it replays.
        workspace.set_rows(inputs.step.token_ids.rows(), inputs.step.output_rows.rows())?;
        let [sequences, width] = [inputs.step.block_tables.rows(), inputs.step.block_tables.cols()];
        let key = |name| GraphKey { name, sizes: [sequences, width, inputs.place] };
        let decodes = images.is_none() && inputs.step.max_seqlen_q == 1 && outputs.len() == step.len();
        match (decodes, all_drawn) {
            (true, true) => {
                backend.graphed(key(if sources.is_some() { "decode ahead" } else { "decode and draw" }), &mut || {
                    if sources.is_some() {
                        inputs.take_drawn(backend)?;
                    }
                    model.forward(backend, &inputs.step, None, kv, workspace)?;
                    inputs.drawing.run(backend, workspace.logits())
                })?;
            }
            (true, false) => backend.graphed(key("decode"), &mut || model.forward(backend, &inputs.step, None, kv, workspace))?,
            (false, _) => model.forward(backend, &inputs.step, images, kv, workspace)?,
        }
        if any_drawn && !(decodes && all_drawn) {
            inputs.drawing.run(backend, workspace.logits())?;
        }
        let tokens = if any_drawn { Some(inputs.drawing.download(backend)?) } else { None };
        let is_scored = |output: &Output| output.draw.is_some() && output.logprobs.is_some();
        let scores =
            if outputs.iter().any(is_scored) { Some(scoring.begin(backend, workspace.logits(), inputs.drawing.tokens()?)?) } else { None };
        Ok(Launched { outputs, prompt_places: Vec::new(), tokens, scores })
    }

    /// Waits for a step. Returns, in its order, what follows each sequence whose last token was computed, with its index in the
    /// step: a row behind the last token and behind each guess. `on_prompt` is called before, for every token of a prompt whose
    /// log-probability is wanted, in order.
    ///
    /// # Errors
    /// If the device fails.
    pub fn finish(&mut self, launched: Launched, on_prompt: OnPromptLogprobs<'_>) -> Result<Vec<(usize, Next<'_>)>> {
        let Launched { outputs, prompt_places, tokens, scores } = launched;
        if let Some(tokens) = tokens {
            self.tokens.resize(tokens.len(), 0);
            tokens.wait(&mut self.tokens)?;
        }
        if let Some(scores) = scores {
            scores.wait(&mut self.scores)?;
        }
        self.download_logits(&outputs)?;
        self.run_prompt(&prompt_places, on_prompt)?;
        let (tokens, scores, mut logits, mut end) = (&self.tokens[..], &self.scores, &self.logits[..], 0);
        let next = outputs.into_iter().map(|Output { part, rows, draw, logprobs }| {
            let first_row = end;
            end += rows;
            if draw.is_some() {
                let scores = logprobs.map(|top| RowScores { scores, first_row, top });
                return (part, Next::Tokens(&tokens[first_row..end], scores));
            }
            let (own, rest) = logits.split_at(rows * self.vocab_size);
            logits = rest;
            (part, Next::Logits(own))
        });
        Ok(next.collect())
    }

    /// Takes the logits of the outputs from which the host chooses.
    fn download_logits(&mut self, outputs: &[Output]) -> Result<()> {
        let on_host = outputs.iter().filter(|output| output.draw.is_none()).map(|output| output.rows).sum::<usize>();
        let (backend, logits) = (&self.backend, self.workspace.logits_mut());
        let columns = logits.cols();
        // What is there is overwritten: only what is new costs a clearing.
        self.logits.resize(on_host * columns, 0.0);
        if on_host == 0 {
            return Ok(());
        }
        let (mut first_row, mut rest) = (0, &mut self.logits[..]);
        for of_kind in outputs.chunk_by(|a, b| a.draw.is_some() == b.draw.is_some()) {
            let rows: usize = of_kind.iter().map(|output| output.rows).sum();
            if of_kind[0].draw.is_none() {
                let (own, behind) = rest.split_at_mut(rows * columns);
                rest = behind;
                logits.set_window(first_row..first_row + rows)?;
                backend.download(logits, own)?;
            }
            first_row += rows;
        }
        keep_columns(&mut self.logits, columns, self.vocab_size);
        logits.set_rows(first_row)
    }

    /// Applies the head to the rows of prompts whose log-probabilities are wanted, as many at a time as the workspace has room for:
    /// `[prompt, vocab]` is never there at once.
    fn run_prompt(&mut self, places: &[PromptPlace], on_prompt: OnPromptLogprobs<'_>) -> Result<()> {
        let Self { backend, model, workspace, prompt_rows, prompt_token_ids, scoring, .. } = self;
        for slice in places.chunks(prompt_rows.capacity()) {
            let upload = |values: Vec<i32>, tensor: &mut Tensor<B>| {
                tensor.set_rows(values.len())?;
                backend.upload(&values, tensor)
            };
            upload(slice.iter().map(|place| place.row as i32).collect(), prompt_rows)?;
            workspace.set_outputs(slice.len())?;
            model.head(backend, prompt_rows, workspace)?;
            if B::SAMPLES {
                upload(slice.iter().map(|place| place.token_id as i32).collect(), prompt_token_ids)?;
                let mut scores = Scores::default();
                scoring.begin(backend, workspace.logits(), prompt_token_ids)?.wait(&mut scores)?;
                for (row, PromptPlace { part, token_id, top, .. }) in slice.iter().enumerate() {
                    on_prompt(*part, *token_id, scores.row(row, *top));
                }
                continue;
            }
            self.prompt_logits.resize(slice.len() * workspace.logits().cols(), 0.0);
            backend.download(workspace.logits(), &mut self.prompt_logits)?;
            keep_columns(&mut self.prompt_logits, workspace.logits().cols(), self.vocab_size);
            for (PromptPlace { part, token_id, top, .. }, logits) in slice.iter().zip(self.prompt_logits.chunks_exact(self.vocab_size)) {
                on_prompt(*part, *token_id, logprobs(logits, *token_id, *top));
            }
        }
        Ok(())
    }

    /// Uploads the image rows of the step's tokens; returns whether there are any.
    fn prepare_images(&mut self, step: &[Scheduled], sequences: &[Sequence]) -> Result<bool> {
        let (mut values, mut rows, mut first_row) = (Vec::new(), Vec::new(), 0);
        for part in step {
            let sequence = &sequences[part.sequence];
            let range = sequence.num_computed..sequence.num_computed + part.num_tokens;
            for span in &sequence.image_spans {
                let (start, end) = (span.positions.start.max(range.start), span.positions.end.min(range.end));
                if start < end {
                    let row = span.first_row + start - span.positions.start;
                    values.extend(span.image.values(row..row + end - start));
                    rows.extend((start..end).map(|p| (first_row + p - range.start) as i32));
                }
            }
            first_row += part.num_tokens;
        }
        if rows.is_empty() {
            return Ok(false);
        }
        self.images.tokens.set_rows(values.len() / self.hidden)?;
        self.images.rows.set_rows(rows.len())?;
        self.backend.upload(&rows, &mut self.images.rows)?;
        upload_as(&self.backend, &values, &mut self.images.tokens)?;
        Ok(true)
    }
}

/// Of rows of `columns` values keeps the first `kept` of each.
fn keep_columns(values: &mut Vec<f32>, columns: usize, kept: usize) {
    if kept < columns {
        let rows = values.len() / columns;
        for row in 1..rows {
            values.copy_within(row * columns..row * columns + kept, row * kept);
        }
        values.truncate(rows * kept);
    }
}

/// The tokens of prompts whose log-probabilities the step gives.
fn prompt_places(step: &[Scheduled], sequences: &[Sequence]) -> Vec<PromptPlace> {
    let mut places = Vec::new();
    let mut first_row = 0;
    for (i, part) in step.iter().enumerate() {
        let sequence = &sequences[part.sequence];
        let start = sequence.num_computed;
        let positions = sequence.unreported_positions(start..start + part.num_tokens);
        places.extend(positions.map(|position| PromptPlace {
            part: i,
            token_id: sequence.token_ids[position + 1],
            top: sequence.prompt_top(),
            row: first_row + position - start,
        }));
        first_row += part.num_tokens;
    }
    places
}

/// Uploads f32 values in the tensor's own type.
fn upload_as<B: Backend>(backend: &B, values: &[f32], tensor: &mut Tensor<B>) -> Result<()> {
    fn convert<B: Backend, T: Element>(backend: &B, values: &[f32], tensor: &mut Tensor<B>, to: fn(f32) -> T) -> Result<()> {
        let values: Vec<T> = values.iter().map(|v| to(*v)).collect();
        backend.upload(&values, tensor)
    }
    match tensor.dtype() {
        DType::F16 => convert(backend, values, tensor, f16::from_f32),
        DType::Bf16 => convert(backend, values, tensor, bf16::from_f32),
        _ => backend.upload(values, tensor),
    }
}

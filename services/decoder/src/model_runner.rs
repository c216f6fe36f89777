//! Turns a schedule into one forward pass.

use crate::{
    config::Config,
    drawing::{DrawRow, Drawing},
    engine::EngineOptions,
    model::{ImageRows, Mistral, StepInputs, Workspace},
    sampler::Draw,
    scheduler::Scheduled,
    sequence::Sequence,
};
use half::{bf16, f16};
use idefics_common::checkpoint::ModelConfig;
use idefics_kernels::{Backend, DType, Element, Error, GraphKey, KvCache, Result, Tensor, WeightLoader};

/// The model with its cache, its activations and its inputs.
pub struct ModelRunner<B: Backend> {
    backend: B,
    model: Mistral<B>,
    kv: Vec<KvCache<B>>,
    workspace: Workspace<B>,
    inputs: StepInputs<B>,
    images: ImageRows<B>,
    hidden: usize,
    vocab_size: usize,
    max_blocks: usize,
    /// Rows whose next token the workspace has room for.
    max_outputs: usize,
    drawing: Drawing<B>,
    cache: CacheSize,
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
    Tokens(&'a [i32]),
}

/// Called with the index of a sequence, a position of its prompt and the logits `[vocab]` of the token behind it.
pub type OnPromptLogits<'a> = &'a mut dyn FnMut(usize, usize, &[f32]);

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
        let i32s = |rows, cols| backend.alloc(rows, cols, DType::I32);
        let workspace = Workspace::new(&backend, text, tokens, outputs)?;
        let images = ImageRows { tokens: backend.alloc(tokens, text.hidden_size, dtype)?, rows: i32s(tokens, 1)? };
        let drawing = Drawing::new(&backend, outputs, text.vocab_size, &options.banned_token_ids)?;
        let cache = CacheSize::new(config, &options.model, dtype.size(), backend.free_memory()?)?;
        let max_blocks = cache.max_model_tokens.div_ceil(config.block_size_tokens);
        let slots = cache.num_blocks * config.block_size_tokens;
        let kv_size = text.num_key_value_heads * text.head_dim();
        let cache_tensor = || backend.alloc(slots, kv_size, dtype);
        let kv = (0..text.num_hidden_layers)
            .map(|_| Ok(KvCache { k: cache_tensor()?, v: cache_tensor()?, block_size: config.block_size_tokens }))
            .collect::<Result<_>>()?;
        Ok(Self {
            kv,
            workspace,
            inputs: StepInputs {
                token_ids: i32s(tokens, 1)?,
                positions: i32s(tokens, 1)?,
                slots: i32s(tokens, 1)?,
                cu_seqlens_q: i32s(seqs + 1, 1)?,
                block_tables: i32s(seqs, max_blocks)?,
                context_lens: i32s(seqs, 1)?,
                output_rows: i32s(outputs, 1)?,
                max_seqlen_q: 0,
            },
            images,
            drawing,
            cache,
            hidden: text.hidden_size,
            vocab_size: text.vocab_size,
            max_blocks,
            max_outputs: outputs,
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

    /// Computes the step. Returns, in the order of `step`, what follows each sequence whose last token was computed, with its
    /// index: a row behind the last token and behind each guess. `on_prompt` is called before, for every position of the step
    /// whose next prompt token's log-probability is wanted, in order.
    ///
    /// # Errors
    /// If the device fails.
    pub fn run(&mut self, step: &[Scheduled], sequences: &[Sequence], on_prompt: OnPromptLogits<'_>) -> Result<Vec<(usize, Next<'_>)>> {
        let outputs = self.prepare(step, sequences)?;
        let has_images = self.prepare_images(step, sequences)?;
        let rows = outputs.iter().map(|(_, rows)| rows).sum();
        let Self { backend, model, kv, workspace, inputs, images, .. } = self;
        let images = has_images.then_some(&*images);
        // Not within `graphed`, which does not come back to this code when it replays.
        workspace.set_rows(inputs.token_ids.rows(), rows)?;
        if images.is_none() && inputs.max_seqlen_q == 1 && outputs.len() == step.len() {
            let key = GraphKey { name: "decode", sizes: [step.len(), 0, 0] };
            backend.graphed(key, &mut || model.forward(backend, inputs, None, kv, workspace))?;
        } else {
            model.forward(backend, inputs, images, kv, workspace)?;
        }
        let drawn = self.choose(&outputs, sequences)?;
        self.run_prompt(step, sequences, on_prompt)?;
        let (tokens, mut logits, mut end) = (self.drawing.tokens(), &self.logits[..], 0);
        let next = outputs.into_iter().zip(drawn).map(|((sequence, rows), drawn)| {
            end += rows;
            if drawn {
                return (sequence, Next::Tokens(&tokens[end - rows..end]));
            }
            let (own, rest) = logits.split_at(rows * self.vocab_size);
            logits = rest;
            (sequence, Next::Logits(own))
        });
        Ok(next.collect())
    }

    /// Takes from the device what follows each sequence: tokens that it chose, or logits. Returns which of `outputs` have tokens.
    fn choose(&mut self, outputs: &[(usize, usize)], sequences: &[Sequence]) -> Result<Vec<bool>> {
        let draws = |sequence: usize| if B::SAMPLES { sequences[sequence].sampler.plain_draw() } else { None };
        let draws: Vec<Option<Draw>> = outputs.iter().map(|(sequence, _)| draws(*sequence)).collect();
        let (backend, logits) = (&self.backend, self.workspace.logits_mut());
        if draws.iter().any(Option::is_some) {
            let rows = outputs.iter().zip(&draws).flat_map(|((sequence, rows), draw)| {
                // A row whose logits go to the host has to have something here too.
                let random = sequences[*sequence].sampler.random_bits(*rows);
                random.into_iter().map(|random| draw.map_or(DrawRow::GREEDY, |draw| DrawRow { draw, random }))
            });
            self.drawing.run(backend, logits, rows)?;
        }
        let on_host = outputs.iter().zip(&draws).filter(|(_, draw)| draw.is_none()).map(|((_, rows), _)| rows).sum::<usize>();
        // What is there is overwritten: only what is new costs a clearing.
        self.logits.resize(on_host * self.vocab_size, 0.0);
        let (mut first_row, mut rest) = (0, &mut self.logits[..]);
        for part in outputs.iter().zip(&draws).collect::<Vec<_>>().chunk_by(|a, b| a.1.is_some() == b.1.is_some()) {
            let rows: usize = part.iter().map(|((_, rows), _)| rows).sum();
            if part[0].1.is_none() {
                let (own, behind) = rest.split_at_mut(rows * self.vocab_size);
                rest = behind;
                logits.set_window(first_row..first_row + rows)?;
                backend.download(logits, own)?;
            }
            first_row += rows;
        }
        logits.set_rows(first_row)?;
        Ok(draws.iter().map(Option::is_some).collect())
    }

    /// Uploads the step; returns the sequences whose next token it gives, with their rows of logits.
    fn prepare(&mut self, step: &[Scheduled], sequences: &[Sequence]) -> Result<Vec<(usize, usize)>> {
        let tokens = step.iter().map(|part| part.num_tokens).sum();
        let (mut token_ids, mut positions, mut slots) =
            (Vec::with_capacity(tokens), Vec::with_capacity(tokens), Vec::with_capacity(tokens));
        let (mut cu_seqlens, mut tables, mut context_lens) = (vec![0], Vec::new(), Vec::new());
        let (mut output_rows, mut outputs) = (Vec::new(), Vec::new());
        for part in step {
            let sequence = &sequences[part.sequence];
            let table = &sequence.block_table;
            let range = sequence.num_computed..sequence.num_computed + part.num_tokens;
            let real = range.start..range.end - part.num_drafts;
            token_ids.extend(sequence.token_ids[real.clone()].iter().chain(&sequence.draft[..part.num_drafts]).map(|id| *id as i32));
            positions.extend(range.clone().map(|p| p as i32));
            slots.extend(range.clone().map(|p| table.slot(p, self.kv[0].block_size)));
            cu_seqlens.push(token_ids.len() as i32);
            context_lens.push(range.end as i32);
            let row = tables.len();
            tables.extend(table.blocks().iter().map(|b| *b as i32));
            tables.resize(row + self.max_blocks, 0);
            if real.end == sequence.token_ids.len() {
                let (end, rows) = (token_ids.len(), 1 + part.num_drafts);
                output_rows.extend((end - rows..end).map(|row| row as i32));
                outputs.push((part.sequence, rows));
            }
        }
        let inputs = &mut self.inputs;
        inputs.max_seqlen_q = step.iter().map(|part| part.num_tokens).max().unwrap_or(0);
        for (values, tensor) in [
            (&token_ids, &mut inputs.token_ids),
            (&positions, &mut inputs.positions),
            (&slots, &mut inputs.slots),
            (&cu_seqlens, &mut inputs.cu_seqlens_q),
            (&tables, &mut inputs.block_tables),
            (&context_lens, &mut inputs.context_lens),
            (&output_rows, &mut inputs.output_rows),
        ] {
            tensor.set_rows(values.len() / tensor.cols())?;
            self.backend.upload(values, tensor)?;
        }
        Ok(outputs)
    }

    /// Applies the head to the rows of prompts whose logits are wanted, as many at a time as the workspace has room for:
    /// `[prompt, vocab]` is never there at once.
    fn run_prompt(&mut self, step: &[Scheduled], sequences: &[Sequence], on_prompt: OnPromptLogits<'_>) -> Result<()> {
        let mut wanted = Vec::new();
        let mut first_row = 0;
        for part in step {
            let sequence = &sequences[part.sequence];
            let start = sequence.num_computed;
            let positions = sequence.unreported_positions(start..start + part.num_tokens);
            wanted.extend(positions.map(|position| (part.sequence, position, (first_row + position - start) as i32)));
            first_row += part.num_tokens;
        }
        for slice in wanted.chunks(self.max_outputs) {
            let rows: Vec<i32> = slice.iter().map(|(_, _, row)| *row).collect();
            self.inputs.output_rows.set_rows(rows.len())?;
            self.backend.upload(&rows, &mut self.inputs.output_rows)?;
            self.workspace.set_outputs(rows.len())?;
            self.model.head(&self.backend, &self.inputs.output_rows, &mut self.workspace)?;
            self.prompt_logits.resize(rows.len() * self.vocab_size, 0.0);
            self.backend.download(self.workspace.logits(), &mut self.prompt_logits)?;
            for ((sequence, position, _), logits) in slice.iter().zip(self.prompt_logits.chunks_exact(self.vocab_size)) {
                on_prompt(*sequence, *position, logits);
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

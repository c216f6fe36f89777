//! Turns a schedule into one forward pass.

use crate::{
    config::Config,
    model::{ImageRows, Mistral, StepInputs, Workspace},
    scheduler::Scheduled,
    sequence::Sequence,
};
use half::{bf16, f16};
use idefics_common::checkpoint::ModelConfig;
use idefics_kernels::{Backend, DType, Element, Error, GraphKey, KvCache, Result, Tensor, WeightLoader, weights::Weights};

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
    logits: Vec<f32>,
    prompt_logits: Vec<f32>,
}

/// Fewest rows whose logits the workspace has room for. The head is read once for as many rows of a prompt whose
/// log-probabilities are wanted: as many as make that cheap, and few enough that their logits take no memory to speak of.
const MIN_OUTPUTS: usize = 32;

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

impl CacheSize {
    /// What `config` gives a model whose cache elements have `element_bytes` bytes.
    ///
    /// # Errors
    /// If not even one block fits, or the configured context is longer than the checkpoint's.
    pub fn new(config: &Config, model: &ModelConfig, element_bytes: usize) -> Result<Self> {
        let text = &model.text_config;
        let token_bytes = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim() * element_bytes;
        let num_blocks = config.kv_cache_bytes / (token_bytes * config.block_size_tokens);
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
                "decoder.kv_cache_bytes is {}, which holds {slots} tokens of {token_bytes} bytes; expected {wanted} or more for {max_model_tokens} tokens",
                config.kv_cache_bytes
            );
            return Err(Error::Device(what));
        }
        // More blocks than all sequences can fill would never be used.
        let most = max_model_tokens.div_ceil(config.block_size_tokens) * config.max_num_seqs;
        Ok(Self { num_blocks: num_blocks.min(most), max_model_tokens })
    }
}

impl<B: Backend> ModelRunner<B> {
    /// Loads the model and allocates everything that a step needs.
    ///
    /// # Errors
    /// If the weights are not those of `model`, or the device has no room.
    pub fn load(
        backend: B,
        weights: &Weights,
        model: &ModelConfig,
        config: &Config,
        cache: CacheSize,
        progress: &dyn Fn(usize),
    ) -> Result<Self> {
        let text = &model.text_config;
        let loaded = Mistral::load(&WeightLoader::new(&backend, weights, progress), text, model.tie_word_embeddings)?;
        let (tokens, seqs) = (config.max_num_batched_tokens, config.max_num_seqs);
        // A next token is wanted behind every guess.
        let outputs = tokens.min((seqs * (1 + config.prompt_lookup_tokens)).max(MIN_OUTPUTS));
        let kv_size = text.num_key_value_heads * text.head_dim();
        let max_blocks = cache.max_model_tokens.div_ceil(config.block_size_tokens);
        let slots = cache.num_blocks * config.block_size_tokens;
        let i32s = |rows, cols| backend.alloc(rows, cols, DType::I32);
        let cache_tensor = || backend.alloc(slots, kv_size, backend.activation_dtype());
        let kv = (0..text.num_hidden_layers)
            .map(|_| Ok(KvCache { k: cache_tensor()?, v: cache_tensor()?, block_size: config.block_size_tokens }))
            .collect::<Result<_>>()?;
        Ok(Self {
            kv,
            workspace: Workspace::new(&backend, text, tokens, outputs)?,
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
            images: ImageRows { tokens: backend.alloc(tokens, text.hidden_size, backend.activation_dtype())?, rows: i32s(tokens, 1)? },
            hidden: text.hidden_size,
            vocab_size: text.vocab_size,
            max_blocks,
            max_outputs: outputs,
            logits: Vec::new(),
            prompt_logits: Vec::new(),
            model: loaded,
            backend,
        })
    }

    /// Computes the step. Returns, in the order of `step`, the logits of each sequence whose last token was computed: pairs of
    /// the sequence's index and its rows `[1 + drafts, vocab]`, behind the last token and behind each guess. `on_prompt` is
    /// called before, for every position of the step whose next prompt token's log-probability is wanted, in order.
    ///
    /// # Errors
    /// If the device fails.
    pub fn run(&mut self, step: &[Scheduled], sequences: &[Sequence], on_prompt: OnPromptLogits<'_>) -> Result<Vec<(usize, &[f32])>> {
        let outputs = self.prepare(step, sequences)?;
        let has_images = self.prepare_images(step, sequences)?;
        let Self { backend, model, kv, workspace, inputs, images, .. } = self;
        let images = has_images.then_some(&*images);
        if images.is_none() && inputs.max_seqlen_q == 1 && outputs.len() == step.len() {
            let key = GraphKey { name: "decode", bucket: step.len() };
            backend.graphed(key, &mut || model.forward(backend, inputs, None, kv, workspace))?;
        } else {
            model.forward(backend, inputs, images, kv, workspace)?;
        }
        let rows: usize = outputs.iter().map(|(_, rows)| rows).sum();
        self.logits.resize(rows * self.vocab_size, 0.0);
        if rows > 0 {
            self.backend.download(self.workspace.logits(), &mut self.logits)?;
        }
        self.run_prompt(step, sequences, on_prompt)?;
        let mut rest = &self.logits[..];
        let split = outputs.into_iter().map(|(sequence, rows)| {
            let (logits, behind) = rest.split_at(rows * self.vocab_size);
            rest = behind;
            (sequence, logits)
        });
        Ok(split.collect())
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

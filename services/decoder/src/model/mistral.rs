//! The Mistral decoder, `[tokens, hidden]` throughout: the sequences of a step lie behind one another, without padding.
//!
//! Jiang et al. 2023, <https://arxiv.org/abs/2310.06825>; reference: `transformers/models/mistral/modeling_mistral.py`. Field
//! names follow the checkpoint's keys.

use idefics_common::checkpoint::TextConfig;
use idefics_kernels::{
    AttentionShape, Backend, DType, Epilogue, KvCache, Matrix, PagedAttention, Result, RmsNorm, Rope, SwigluScratch, Tensor, WeightLoader,
};

struct Attention<B: Backend> {
    qkv_proj: Matrix<B>, // q, k and v stacked: [q_size + 2 * kv_size, hidden]
    o_proj: Matrix<B>,   // [hidden, q_size]
}

impl<B: Backend> Attention<B> {
    fn load(loader: &WeightLoader<'_, B>, hidden: usize, shape: AttentionShape) -> Result<Self> {
        let (q, kv) = ([shape.q_size(), hidden], [shape.kv_size(), hidden]);
        Ok(Self {
            qkv_proj: loader.stacked([("q_proj.weight", q), ("k_proj.weight", kv), ("v_proj.weight", kv)])?,
            o_proj: loader.tensor("o_proj.weight", [hidden, shape.q_size()])?,
        })
    }

    /// `hidden += o(attention(q, k, v))` of the normalised `hidden`
    fn forward(
        &self,
        backend: &B,
        norm: RmsNorm<'_, B>,
        ws: &mut Workspace<B>,
        kv: &mut KvCache<B>,
        step: &StepInputs<B>,
        paged: &PagedAttention<'_, B>,
    ) -> Result<()> {
        backend.rms_norm_linear(&ws.hidden, norm, &self.qkv_proj, &mut ws.normed, &mut ws.qkv)?;
        let rope = Rope { cos_sin: &ws.cos_sin, slots: &step.slots };
        backend.rope_and_paged_attention(&mut ws.qkv, rope, kv, paged, &mut ws.attention)?;
        backend.linear(&ws.attention, &self.o_proj, None, Epilogue::Accumulate, &mut ws.hidden)
    }
}

struct Mlp<B: Backend> {
    gate_up_proj: Matrix<B>, // gate and up stacked: [2 * intermediate, hidden]
    down_proj: Matrix<B>,    // [hidden, intermediate]
}

impl<B: Backend> Mlp<B> {
    fn load(loader: &WeightLoader<'_, B>, hidden: usize, intermediate: usize) -> Result<Self> {
        Ok(Self {
            gate_up_proj: loader.stacked(["gate_proj.weight", "up_proj.weight"].map(|name| (name, [intermediate, hidden])))?,
            down_proj: loader.tensor("down_proj.weight", [hidden, intermediate])?,
        })
    }

    /// `hidden += down(silu(gate(x)) * up(x))` of the normalised `hidden`
    fn forward(&self, backend: &B, norm: RmsNorm<'_, B>, ws: &mut Workspace<B>) -> Result<()> {
        let scratch = SwigluScratch { normed: &mut ws.normed, gate_up: &mut ws.gate_up };
        backend.rms_norm_swiglu(&ws.hidden, norm, &self.gate_up_proj, scratch, &mut ws.activated)?;
        backend.linear(&ws.activated, &self.down_proj, None, Epilogue::Accumulate, &mut ws.hidden)
    }
}

struct DecoderLayer<B: Backend> {
    input_layernorm: Matrix<B>,
    self_attn: Attention<B>,
    post_attention_layernorm: Matrix<B>,
    mlp: Mlp<B>,
}

impl<B: Backend> DecoderLayer<B> {
    fn load(loader: &WeightLoader<'_, B>, config: &TextConfig, shape: AttentionShape) -> Result<Self> {
        let hidden = config.hidden_size;
        Ok(Self {
            input_layernorm: loader.tensor("input_layernorm.weight", [hidden])?,
            self_attn: Attention::load(&loader.sub("self_attn"), hidden, shape)?,
            post_attention_layernorm: loader.tensor("post_attention_layernorm.weight", [hidden])?,
            mlp: Mlp::load(&loader.sub("mlp"), hidden, config.intermediate_size)?,
        })
    }

    fn forward(
        &self,
        backend: &B,
        ws: &mut Workspace<B>,
        kv: &mut KvCache<B>,
        step: &StepInputs<B>,
        paged: &PagedAttention<'_, B>,
        eps: f32,
    ) -> Result<()> {
        self.self_attn.forward(backend, RmsNorm { weight: &self.input_layernorm, eps }, ws, kv, step, paged)?;
        self.mlp.forward(backend, RmsNorm { weight: &self.post_attention_layernorm, eps }, ws)
    }
}

/// What varies from step to step, at fixed addresses.
pub struct StepInputs<B: Backend> {
    /// `[tokens, 1]` i32
    pub token_ids: Tensor<B>,
    /// `[tokens, 1]` i32: position of each token in its sequence.
    pub positions: Tensor<B>,
    /// `[tokens, 1]` i32: cache slot of each token.
    pub slots: Tensor<B>,
    /// `[sequences + 1, 1]` i32
    pub cu_seqlens_q: Tensor<B>,
    /// `[sequences, max blocks]` i32
    pub block_tables: Tensor<B>,
    /// `[sequences, 1]` i32
    pub context_lens: Tensor<B>,
    /// `[outputs, 1]` i32: rows whose next token is wanted.
    pub output_rows: Tensor<B>,
    /// Most tokens that a sequence has in this step.
    pub max_seqlen_q: usize,
}

/// Rows of the step that come from an image instead of the embedding table.
pub struct ImageRows<B: Backend> {
    /// `[n, hidden]`
    pub tokens: Tensor<B>,
    /// `[n, 1]` i32: where each goes.
    pub rows: Tensor<B>,
}

/// Every activation of a step, allocated once for the largest.
pub struct Workspace<B: Backend> {
    hidden: Tensor<B>,         // [T, hidden] the residual stream
    normed: Tensor<B>,         // [T, hidden]
    qkv: Tensor<B>,            // [T, q_size + 2 * kv_size]
    attention: Tensor<B>,      // [T, q_size]
    gate_up: Tensor<B>,        // [T, 2 * intermediate]
    activated: Tensor<B>,      // [T, intermediate]
    outputs: Tensor<B>,        // [O, hidden] the rows whose next token is wanted
    normed_outputs: Tensor<B>, // [O, hidden]
    logits: Tensor<B>,         // [O, vocab and what it is filled up with] f32
    inv_freq: Tensor<B>,       // [1, head_dim / 2] f32
    cos_sin: Tensor<B>,        // [T, head_dim] f32: of the tokens' angles, for all layers
}

impl<B: Backend> Workspace<B> {
    /// Room for steps of `max_tokens` tokens of which `max_outputs` want a next token.
    ///
    /// # Errors
    /// If the device has no room.
    pub fn new(backend: &B, config: &TextConfig, max_tokens: usize, max_outputs: usize) -> Result<Self> {
        let (hidden, shape) = (config.hidden_size, attention_shape(config));
        let alloc = |rows, cols| backend.alloc(rows, cols, backend.activation_dtype());
        let half = config.head_dim() / 2;
        let mut inv_freq = backend.alloc(1, half, DType::F32)?;
        // 1 / theta^(2 j / head_dim) in f32, as `MistralRotaryEmbedding` computes it.
        let theta = config.rope_theta as f32;
        let frequencies: Vec<f32> = (0..half).map(|j| 1.0 / theta.powf((2 * j) as f32 / config.head_dim() as f32)).collect();
        backend.upload(&frequencies, &mut inv_freq)?;
        Ok(Self {
            hidden: alloc(max_tokens, hidden)?,
            normed: alloc(max_tokens, hidden)?,
            qkv: alloc(max_tokens, shape.q_size() + 2 * shape.kv_size())?,
            attention: alloc(max_tokens, shape.q_size())?,
            gate_up: alloc(max_tokens, 2 * config.intermediate_size)?,
            activated: alloc(max_tokens, config.intermediate_size)?,
            outputs: alloc(max_outputs, hidden)?,
            normed_outputs: alloc(max_outputs, hidden)?,
            logits: backend.alloc(max_outputs, backend.padded_features(config.vocab_size), DType::F32)?,
            inv_freq,
            cos_sin: backend.alloc(max_tokens, 2 * half, DType::F32)?,
        })
    }

    /// Sets the windows of a step of `tokens` tokens of which `outputs` want a next token.
    ///
    /// # Errors
    /// If the workspace has no room for so many.
    pub fn set_rows(&mut self, tokens: usize, outputs: usize) -> Result<()> {
        self.set_outputs(outputs)?;
        let Self { hidden, normed, qkv, attention, gate_up, activated, cos_sin, .. } = self;
        for tensor in [hidden, normed, qkv, attention, gate_up, activated, cos_sin] {
            tensor.set_rows(tokens)?;
        }
        Ok(())
    }

    /// Sets the windows of `outputs` rows that want a next token.
    ///
    /// # Errors
    /// If the workspace has no room for so many.
    pub fn set_outputs(&mut self, outputs: usize) -> Result<()> {
        for tensor in [&mut self.outputs, &mut self.normed_outputs, &mut self.logits] {
            tensor.set_rows(outputs)?;
        }
        Ok(())
    }

    /// `[outputs, vocab or more]` f32, of the last step or the last call of [`Mistral::head`]; what is behind the vocabulary does not
    /// count.
    pub fn logits(&self) -> &Tensor<B> {
        &self.logits
    }

    /// The same, so that its window can be moved.
    pub fn logits_mut(&mut self) -> &mut Tensor<B> {
        &mut self.logits
    }
}

/// The decoder's weights.
pub struct Mistral<B: Backend> {
    embed_tokens: Matrix<B>, // [vocab, hidden]; filled up if it is the head, too
    layers: Vec<DecoderLayer<B>>,
    norm: Matrix<B>,
    lm_head: Option<Matrix<B>>, // [vocab, hidden], filled up; none if tied to the embeddings
    shape: AttentionShape,
    sliding_window: Option<usize>,
    eps: f32,
}

impl<B: Backend> Mistral<B> {
    /// Loads the weights under `model.text_model` and `lm_head`.
    ///
    /// # Errors
    /// If a tensor is missing or has another shape than `config` says.
    pub fn load(root: &WeightLoader<'_, B>, config: &TextConfig, tie_word_embeddings: bool) -> Result<Self> {
        let (model, shape) = (root.sub("model.text_model"), attention_shape(config));
        let (layers, table) = (model.sub("layers"), [config.vocab_size, config.hidden_size]);
        Ok(Self {
            embed_tokens: if tie_word_embeddings {
                model.padded("embed_tokens.weight", table)?
            } else {
                model.tensor("embed_tokens.weight", table)?
            },
            layers: (0..config.num_hidden_layers)
                .map(|i| DecoderLayer::load(&layers.sub(&i.to_string()), config, shape))
                .collect::<Result<_>>()?,
            norm: model.tensor("norm.weight", [config.hidden_size])?,
            lm_head: if tie_word_embeddings { None } else { Some(root.padded("lm_head.weight", table)?) },
            shape,
            sliding_window: config.sliding_window,
            eps: config.rms_norm_eps,
        })
    }

    /// Logits of the next token for `step.output_rows`, left in `ws`, whose windows are [set](Workspace::set_rows); keys and values
    /// of the step's tokens go into `kv`, one cache per layer. Nothing but ops: a backend may record and replay it.
    ///
    /// # Errors
    /// If the inputs do not fit together, or the device fails.
    pub fn forward(
        &self,
        backend: &B,
        step: &StepInputs<B>,
        images: Option<&ImageRows<B>>,
        kv: &mut [KvCache<B>],
        ws: &mut Workspace<B>,
    ) -> Result<()> {
        let paged = PagedAttention {
            positions: &step.positions,
            cu_seqlens_q: &step.cu_seqlens_q,
            block_tables: &step.block_tables,
            context_lens: &step.context_lens,
            max_seqlen_q: step.max_seqlen_q,
            sliding_window: self.sliding_window,
            shape: self.shape,
        };
        backend.embed(&self.embed_tokens, &step.token_ids, &mut ws.hidden)?;
        if let Some(images) = images {
            backend.scatter_rows(&images.tokens, &images.rows, &mut ws.hidden)?;
        }
        backend.rope_cos_sin(&step.positions, &ws.inv_freq, &mut ws.cos_sin)?;
        for (layer, kv) in self.layers.iter().zip(kv) {
            layer.forward(backend, ws, kv, step, &paged, self.eps)?;
        }
        if step.output_rows.rows() == 0 { Ok(()) } else { self.head(backend, &step.output_rows, ws) }
    }

    /// Logits of the next token behind `rows` (`[n, 1]` i32) of the last [`forward`](Self::forward), left in `ws`, whose windows are
    /// [set](Workspace::set_outputs) to n outputs.
    ///
    /// # Errors
    /// If there are more rows, or the device fails.
    pub fn head(&self, backend: &B, rows: &Tensor<B>, ws: &mut Workspace<B>) -> Result<()> {
        backend.gather_rows(&ws.hidden, rows, &mut ws.outputs)?;
        let norm = RmsNorm { weight: &self.norm, eps: self.eps };
        let lm_head = self.lm_head.as_ref().unwrap_or(&self.embed_tokens);
        backend.rms_norm_linear(&ws.outputs, norm, lm_head, &mut ws.normed_outputs, &mut ws.logits)
    }
}

/// Heads of the decoder.
pub(crate) fn attention_shape(config: &TextConfig) -> AttentionShape {
    AttentionShape { num_heads: config.num_attention_heads, num_kv_heads: config.num_key_value_heads, head_dim: config.head_dim() }
}

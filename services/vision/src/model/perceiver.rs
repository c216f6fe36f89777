//! The Perceiver resampler: a fixed number of latents attends to the patches of a sub-image and becomes its image tokens.
//!
//! Jaegle et al. 2021, <https://arxiv.org/abs/2103.03206>; Alayrac et al. 2022 (Flamingo), <https://arxiv.org/abs/2204.14198>;
//! reference: `Idefics2PerceiverResampler` in `transformers/models/idefics2/modeling_idefics2.py`.

use super::{Packing, PassLimits};
use idefics_common::checkpoint::PerceiverConfig;
use idefics_kernels::{AttentionShape, Backend, Epilogue, Matrix, Result, RmsNorm, SwigluScratch, Tensor, VarlenAttention, WeightLoader};

/// Width of the MLP in multiples of the hidden size (`Idefics2PerceiverLayer`).
const MLP_RATIO: usize = 4;

struct PerceiverLayer<B: Backend> {
    input_latents_norm: Matrix<B>,
    input_context_norm: Matrix<B>,
    q_proj: Matrix<B>,  // [q_size, hidden]
    kv_proj: Matrix<B>, // k and v stacked: [2 * kv_size, hidden]
    o_proj: Matrix<B>,  // [hidden, q_size]
    post_attention_layernorm: Matrix<B>,
    gate_up_proj: Matrix<B>, // gate and up stacked: [2 * 4 * hidden, hidden]
    down_proj: Matrix<B>,    // [hidden, 4 * hidden]
}

impl<B: Backend> PerceiverLayer<B> {
    fn load(loader: &WeightLoader<'_, B>, hidden: usize, shape: AttentionShape) -> Result<Self> {
        let (attention, mlp, intermediate) = (loader.sub("self_attn"), loader.sub("mlp"), MLP_RATIO * hidden);
        Ok(Self {
            input_latents_norm: loader.tensor("input_latents_norm.weight", [hidden])?,
            input_context_norm: loader.tensor("input_context_norm.weight", [hidden])?,
            q_proj: attention.tensor("q_proj.weight", [shape.q_size(), hidden])?,
            kv_proj: attention.stacked(["k_proj.weight", "v_proj.weight"].map(|name| (name, [shape.kv_size(), hidden])))?,
            o_proj: attention.tensor("o_proj.weight", [hidden, shape.q_size()])?,
            post_attention_layernorm: loader.tensor("post_attention_layernorm.weight", [hidden])?,
            gate_up_proj: mlp.stacked(["gate_proj.weight", "up_proj.weight"].map(|name| (name, [intermediate, hidden])))?,
            down_proj: mlp.tensor("down_proj.weight", [hidden, intermediate])?,
        })
    }

    fn forward(
        &self,
        backend: &B,
        ws: &mut Workspace<B>,
        context: &Tensor<B>,
        shape: AttentionShape,
        eps: f32,
        packing: &Packing<'_, B>,
    ) -> Result<()> {
        // Keys and values come from the patches and the latents, each with its own norm.
        let context_norm = RmsNorm { weight: &self.input_context_norm, eps };
        backend.rms_norm_linear(context, context_norm, &self.kv_proj, &mut ws.normed_context, &mut ws.context_kv)?;
        backend.scatter_rows(&ws.context_kv, packing.context_rows, &mut ws.kv)?;
        backend.rms_norm(&ws.latents, &self.input_latents_norm, eps, &mut ws.normed)?;
        backend.linear(&ws.normed, &self.kv_proj, None, Epilogue::Store, &mut ws.latent_kv)?;
        backend.scatter_rows(&ws.latent_kv, packing.latent_rows, &mut ws.kv)?;

        backend.linear(&ws.normed, &self.q_proj, None, Epilogue::Store, &mut ws.q)?;
        let attention = VarlenAttention {
            q: ws.q.columns(0),
            k: ws.kv.columns(0),
            v: ws.kv.columns(shape.kv_size()),
            cu_seqlens_q: packing.cu_seqlens_q,
            cu_seqlens_k: packing.cu_seqlens_k,
            max_seqlen_q: packing.latents,
            max_seqlen_k: packing.max_patches + packing.latents,
            shape,
        };
        backend.attention_varlen(&attention, &mut ws.attention)?;
        backend.linear(&ws.attention, &self.o_proj, None, Epilogue::Accumulate, &mut ws.latents)?;

        let norm = RmsNorm { weight: &self.post_attention_layernorm, eps };
        let scratch = SwigluScratch { normed: &mut ws.normed, gate_up: &mut ws.gate_up };
        backend.rms_norm_swiglu(&ws.latents, norm, &self.gate_up_proj, scratch, &mut ws.activated)?;
        backend.linear(&ws.activated, &self.down_proj, None, Epilogue::Accumulate, &mut ws.latents)
    }
}

/// Activations of one pass: `T` latent rows (sub-images x latents), `P` patches.
struct Workspace<B: Backend> {
    latents: Tensor<B>,        // [T, hidden] the residual stream
    normed: Tensor<B>,         // [T, hidden]
    normed_context: Tensor<B>, // [P, hidden]
    context_kv: Tensor<B>,     // [P, 2 * kv_size]
    latent_kv: Tensor<B>,      // [T, 2 * kv_size]
    kv: Tensor<B>,             // [P + T, 2 * kv_size] per sub-image: patches, then latents
    q: Tensor<B>,              // [T, q_size]
    attention: Tensor<B>,      // [T, q_size]
    gate_up: Tensor<B>,        // [T, 2 * 4 * hidden]
    activated: Tensor<B>,      // [T, 4 * hidden]
}

pub(super) struct Perceiver<B: Backend> {
    latents: Matrix<B>, // [latents, hidden]
    layers: Vec<PerceiverLayer<B>>,
    norm: Matrix<B>,
    workspace: Workspace<B>,
    shape: AttentionShape,
    eps: f32,
}

impl<B: Backend> Perceiver<B> {
    pub(super) fn load(backend: &B, loader: &WeightLoader<'_, B>, config: &PerceiverConfig, limits: PassLimits) -> Result<Self> {
        let (hidden, count) = (config.hidden_size, config.resampler_n_latents);
        let shape = AttentionShape {
            num_heads: config.resampler_n_heads,
            num_kv_heads: config.num_key_value_heads,
            head_dim: config.resampler_head_dim,
        };
        let layers = loader.sub("layers");
        let (patches, rows) = (limits.max_patches, limits.max_sub_images * count);
        let alloc = |rows, cols| backend.alloc(rows, cols, backend.activation_dtype());
        Ok(Self {
            latents: loader.tensor("latents", [count, hidden])?,
            layers: (0..config.resampler_depth)
                .map(|i| PerceiverLayer::load(&layers.sub(&i.to_string()), hidden, shape))
                .collect::<Result<_>>()?,
            norm: loader.tensor("norm.weight", [hidden])?,
            workspace: Workspace {
                latents: alloc(rows, hidden)?,
                normed: alloc(rows, hidden)?,
                normed_context: alloc(patches, hidden)?,
                context_kv: alloc(patches, 2 * shape.kv_size())?,
                latent_kv: alloc(rows, 2 * shape.kv_size())?,
                kv: alloc(patches + rows, 2 * shape.kv_size())?,
                q: alloc(rows, shape.q_size())?,
                attention: alloc(rows, shape.q_size())?,
                gate_up: alloc(rows, 2 * MLP_RATIO * hidden)?,
                activated: alloc(rows, MLP_RATIO * hidden)?,
            },
            shape,
            eps: config.rms_norm_eps,
        })
    }

    /// Image tokens per sub-image.
    pub(super) fn latents(&self) -> usize {
        self.latents.rows
    }

    /// `[P, hidden]` to `[sub-images * latents, hidden]`.
    pub(super) fn forward(&mut self, backend: &B, context: &Tensor<B>, packing: &Packing<'_, B>) -> Result<()> {
        let (ws, patches, rows) = (&mut self.workspace, context.rows(), packing.latent_ids.rows());
        for tensor in [&mut ws.latents, &mut ws.normed, &mut ws.latent_kv, &mut ws.q, &mut ws.attention, &mut ws.gate_up, &mut ws.activated]
        {
            tensor.set_rows(rows)?;
        }
        ws.normed_context.set_rows(patches)?;
        ws.context_kv.set_rows(patches)?;
        ws.kv.set_rows(patches + rows)?;
        backend.embed(&self.latents, packing.latent_ids, &mut ws.latents)?;
        for layer in &self.layers {
            layer.forward(backend, ws, context, self.shape, self.eps, packing)?;
        }
        backend.rms_norm(&ws.latents, &self.norm, self.eps, &mut ws.normed)
    }

    /// What the last [`forward`](Self::forward) computed, `[sub-images x latents, hidden]`; the window is the caller's to set.
    pub(super) fn image_tokens(&mut self) -> &mut Tensor<B> {
        &mut self.workspace.normed
    }
}

//! The vision tower: SigLIP at native resolution, `[patches, hidden]` packed, no padding.
//!
//! Zhai et al. 2023, <https://arxiv.org/abs/2303.15343>; Dehghani et al. 2023 (NaViT), <https://arxiv.org/abs/2307.06304>;
//! reference: `Idefics2VisionTransformer` in `transformers/models/idefics2/modeling_idefics2.py`.

use super::Packing;
use idefics_common::checkpoint::VisionConfig;
use idefics_kernels::{AttentionShape, Backend, Epilogue, Matrix, Pictures, Result, Tensor, VarlenAttention, WeightLoader};

/// A norm with weight and bias, `[1, hidden]` each.
struct LayerNorm<B: Backend> {
    weight: Matrix<B>,
    bias: Matrix<B>,
}

impl<B: Backend> LayerNorm<B> {
    fn load(loader: &WeightLoader<'_, B>, size: usize) -> Result<Self> {
        Ok(Self { weight: loader.tensor("weight", [size])?, bias: loader.tensor("bias", [size])? })
    }
}

/// A linear layer with a bias.
struct Linear<B: Backend> {
    weight: Matrix<B>, // [out, in]
    bias: Matrix<B>,   // [1, out]
}

impl<B: Backend> Linear<B> {
    fn load(loader: &WeightLoader<'_, B>, output: usize, input: usize) -> Result<Self> {
        Ok(Self { weight: loader.tensor("weight", [output, input])?, bias: loader.tensor("bias", [output])? })
    }

    fn forward(&self, backend: &B, x: &Tensor<B>, epilogue: Epilogue, out: &mut Tensor<B>) -> Result<()> {
        backend.linear(x, &self.weight, Some(&self.bias), epilogue, out)
    }
}

struct EncoderLayer<B: Backend> {
    layer_norm1: LayerNorm<B>,
    qkv_proj: Linear<B>, // q, k and v stacked: [3 * hidden, hidden]
    out_proj: Linear<B>,
    layer_norm2: LayerNorm<B>,
    fc1: Linear<B>, // [intermediate, hidden]
    fc2: Linear<B>, // [hidden, intermediate]
}

impl<B: Backend> EncoderLayer<B> {
    fn load(loader: &WeightLoader<'_, B>, config: &VisionConfig) -> Result<Self> {
        let (hidden, intermediate) = (config.hidden_size, config.intermediate_size);
        let attention = loader.sub("self_attn");
        Ok(Self {
            layer_norm1: LayerNorm::load(&loader.sub("layer_norm1"), hidden)?,
            qkv_proj: Linear {
                weight: attention.stacked(["q_proj.weight", "k_proj.weight", "v_proj.weight"].map(|name| (name, [hidden, hidden])))?,
                bias: attention.stacked(["q_proj.bias", "k_proj.bias", "v_proj.bias"].map(|name| (name, [hidden])))?,
            },
            out_proj: Linear::load(&attention.sub("out_proj"), hidden, hidden)?,
            layer_norm2: LayerNorm::load(&loader.sub("layer_norm2"), hidden)?,
            fc1: Linear::load(&loader.sub("mlp.fc1"), intermediate, hidden)?,
            fc2: Linear::load(&loader.sub("mlp.fc2"), hidden, intermediate)?,
        })
    }

    fn forward(&self, backend: &B, ws: &mut Workspace<B>, shape: AttentionShape, eps: f32, packing: &Packing<'_, B>) -> Result<()> {
        backend.layer_norm(&ws.hidden, &self.layer_norm1.weight, &self.layer_norm1.bias, eps, &mut ws.normed)?;
        self.qkv_proj.forward(backend, &ws.normed, Epilogue::Store, &mut ws.qkv)?;
        let attention = VarlenAttention {
            q: ws.qkv.columns(0),
            k: ws.qkv.columns(shape.q_size()),
            v: ws.qkv.columns(2 * shape.q_size()),
            cu_seqlens_q: packing.cu_seqlens,
            cu_seqlens_k: packing.cu_seqlens,
            max_seqlen_q: packing.max_patches,
            max_seqlen_k: packing.max_patches,
            shape,
        };
        backend.attention_varlen(&attention, &mut ws.normed)?;
        self.out_proj.forward(backend, &ws.normed, Epilogue::Accumulate, &mut ws.hidden)?;
        backend.layer_norm(&ws.hidden, &self.layer_norm2.weight, &self.layer_norm2.bias, eps, &mut ws.normed)?;
        self.fc1.forward(backend, &ws.normed, Epilogue::GeluTanh, &mut ws.mlp)?;
        self.fc2.forward(backend, &ws.mlp, Epilogue::Accumulate, &mut ws.hidden)
    }
}

/// Activations of one pass; `normed` also holds the attention's output, which has the same shape.
struct Workspace<B: Backend> {
    patches: Tensor<B>, // [P, 3 * patch * patch]
    hidden: Tensor<B>,  // [P, hidden] the residual stream
    normed: Tensor<B>,  // [P, hidden]
    qkv: Tensor<B>,     // [P, 3 * hidden]
    mlp: Tensor<B>,     // [P, intermediate]
}

pub(super) struct VisionTower<B: Backend> {
    patch_embedding: Linear<B>,    // [hidden, 3 * patch * patch]: the convolution as a product
    position_embedding: Matrix<B>, // [side * side, hidden]
    layers: Vec<EncoderLayer<B>>,
    post_layernorm: LayerNorm<B>,
    workspace: Workspace<B>,
    shape: AttentionShape,
    eps: f32,
}

impl<B: Backend> VisionTower<B> {
    pub(super) fn load(backend: &B, loader: &WeightLoader<'_, B>, config: &VisionConfig, max_patches: usize) -> Result<Self> {
        let (hidden, patch) = (config.hidden_size, config.patch_size);
        let (embeddings, layers) = (loader.sub("embeddings"), loader.sub("encoder.layers"));
        let positions = config.num_patches_per_side() * config.num_patches_per_side();
        let alloc = |cols| backend.alloc(max_patches, cols, backend.activation_dtype());
        Ok(Self {
            patch_embedding: Linear {
                weight: embeddings.tensor("patch_embedding.weight", [hidden, config.num_channels, patch, patch])?,
                bias: embeddings.tensor("patch_embedding.bias", [hidden])?,
            },
            position_embedding: embeddings.tensor("position_embedding.weight", [positions, hidden])?,
            layers: (0..config.num_hidden_layers)
                .map(|i| EncoderLayer::load(&layers.sub(&i.to_string()), config))
                .collect::<Result<_>>()?,
            post_layernorm: LayerNorm::load(&loader.sub("post_layernorm"), hidden)?,
            workspace: Workspace {
                patches: alloc(config.num_channels * patch * patch)?,
                hidden: alloc(hidden)?,
                normed: alloc(hidden)?,
                qkv: alloc(3 * hidden)?,
                mlp: alloc(config.intermediate_size)?,
            },
            shape: AttentionShape {
                num_heads: config.num_attention_heads,
                num_kv_heads: config.num_attention_heads,
                head_dim: config.head_dim(),
            },
            eps: config.layer_norm_eps,
        })
    }

    /// `[P, hidden]` after the last norm.
    pub(super) fn forward(
        &mut self,
        backend: &B,
        pictures: &Pictures<'_, B>,
        position_ids: &Tensor<B>,
        packing: &Packing<'_, B>,
    ) -> Result<&mut Tensor<B>> {
        let ws = &mut self.workspace;
        for tensor in [&mut ws.patches, &mut ws.hidden, &mut ws.normed, &mut ws.qkv, &mut ws.mlp] {
            tensor.set_rows(position_ids.rows())?;
        }
        backend.patchify(pictures, &mut ws.patches)?;
        backend.embed(&self.position_embedding, position_ids, &mut ws.hidden)?;
        self.patch_embedding.forward(backend, &ws.patches, Epilogue::Accumulate, &mut ws.hidden)?;
        for layer in &self.layers {
            layer.forward(backend, ws, self.shape, self.eps, packing)?;
        }
        backend.layer_norm(&ws.hidden, &self.post_layernorm.weight, &self.post_layernorm.bias, self.eps, &mut ws.normed)?;
        Ok(&mut ws.normed)
    }
}

//! The [`Backend`] trait: the ops from which every model is made, and the contract that they keep.

use crate::{Columns, DType, Download, Element, Error, Matrix, Result, Tensor, Upload, Values, composed, weights::WeightView};

/// What [`Backend::linear`] does with a product before it stores it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Epilogue {
    /// `out = x W^T + bias`
    Store,
    /// `out = out + x W^T + bias`: the residual connection.
    Accumulate,
    /// `out = gelu_tanh(x W^T + bias)`; Hendrycks and Gimpel 2016, the tanh form that SigLIP uses.
    GeluTanh,
}

/// The norm in front of a product: [`Backend::rms_norm`] with these.
pub struct RmsNorm<'a, B: Backend> {
    /// `[1, x.cols]`
    pub weight: &'a Matrix<B>,
    /// What is added to the mean of the squares.
    pub eps: f32,
}

/// Memory that [`Backend::rms_norm_swiglu`] may use; what it leaves there is not specified.
pub struct SwigluScratch<'a, B: Backend> {
    /// As `x`.
    pub normed: &'a mut Tensor<B>,
    /// `[n, gate_up_proj.rows]`, in the activation type.
    pub gate_up: &'a mut Tensor<B>,
}

/// Heads of an attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionShape {
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads; divides `num_heads`. Query head `h` uses key head `h / (num_heads / num_kv_heads)`.
    pub num_kv_heads: usize,
    /// Elements of one head.
    pub head_dim: usize,
}

impl AttentionShape {
    /// Columns of all query heads.
    pub fn q_size(&self) -> usize {
        self.num_heads * self.head_dim
    }

    /// Columns of all key heads.
    pub fn kv_size(&self) -> usize {
        self.num_kv_heads * self.head_dim
    }

    /// `1 / sqrt(head_dim)`; Vaswani et al. 2017, section 3.2.1.
    pub fn scale(&self) -> f32 {
        (self.head_dim as f32).sqrt().recip()
    }
}

/// Bidirectional attention over packed sequences: every query row of sequence `i` sees every key row of sequence `i`.
pub struct VarlenAttention<'a, B: Backend> {
    /// `[sum of query lengths, >= offset + q_size]`
    pub q: Columns<'a, B>,
    /// `[sum of key lengths, >= offset + kv_size]`
    pub k: Columns<'a, B>,
    /// `[sum of key lengths, >= offset + kv_size]`
    pub v: Columns<'a, B>,
    /// `[sequences + 1, 1]` i32: where each sequence's query rows start, and the total.
    pub cu_seqlens_q: &'a Tensor<B>,
    /// `[sequences + 1, 1]` i32: where each sequence's key rows start, and the total.
    pub cu_seqlens_k: &'a Tensor<B>,
    /// Longest query length, for the size of a launch.
    pub max_seqlen_q: usize,
    /// Longest key length.
    pub max_seqlen_k: usize,
    /// Heads.
    pub shape: AttentionShape,
}

/// Keys and values of one layer in blocks of `block_size` token slots.
pub struct KvCache<B: Backend> {
    /// `[blocks x block_size, kv_size]`
    pub k: Tensor<B>,
    /// `[blocks x block_size, kv_size]`
    pub v: Tensor<B>,
    /// Token slots per block.
    pub block_size: usize,
}

/// How [`Backend::rope_and_store_kv`] rotates a step's rows, and where it puts them.
pub struct Rope<'a, B: Backend> {
    /// `[tokens, head_dim]` f32, of [`Backend::rope_cos_sin`].
    pub cos_sin: &'a Tensor<B>,
    /// `[tokens, 1]` i32; a negative slot stores nothing.
    pub slots: &'a Tensor<B>,
}

impl<B: Backend> Clone for Rope<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B: Backend> Copy for Rope<'_, B> {}

/// 8-bit pictures that [`Backend::patchify`] cuts.
pub struct Pictures<'a, B: Backend> {
    /// `[pixels, channels]` u8: the pictures one after the other, row by row.
    pub pixels: &'a Tensor<B>,
    /// `[patches, 1]` i32: where the first pixel of each patch is.
    pub origins: &'a Tensor<B>,
    /// `[patches, 1]` i32: pixels a row of its picture.
    pub widths: &'a Tensor<B>,
    /// `[channels, 256]` f32: what becomes of each value.
    pub table: &'a Tensor<B>,
    /// Rows and columns of a patch.
    pub patch_size: usize,
}

/// What [`Backend::paged_attention`] must know about a step: which rows belong to which sequence, and where their past lies.
///
/// Everything that varies from step to step is in device tensors.
pub struct PagedAttention<'a, B: Backend> {
    /// `[tokens, 1]` i32: position of each row in its sequence.
    pub positions: &'a Tensor<B>,
    /// `[sequences + 1, 1]` i32: where each sequence's rows start, and the total.
    pub cu_seqlens_q: &'a Tensor<B>,
    /// `[sequences, max blocks]` i32: the blocks of each sequence, in order.
    pub block_tables: &'a Tensor<B>,
    /// `[sequences, 1]` i32: tokens of each sequence in the cache, the step's own included.
    pub context_lens: &'a Tensor<B>,
    /// Most rows that a sequence has in this step.
    pub max_seqlen_q: usize,
    /// Position `i` sees positions `i - window + 1 ..= i`; `None` means from 0.
    pub sliding_window: Option<usize>,
    /// Heads.
    pub shape: AttentionShape,
}

/// How [`Backend::sample`] chooses, a row of each for a row of logits.
pub struct Draws<'a, B: Backend> {
    /// `[n, 1]` f32; 0 takes the most likely token, the first of equals.
    pub temperature: &'a Tensor<B>,
    /// `[n, 1]` i32: how many of the most likely tokens stay; 0 keeps all. Equals of the last one stay.
    pub top_k: &'a Tensor<B>,
    /// `[n, 1]` f32: the most likely tokens that reach this share of what top-k left stay; 1 keeps all.
    pub top_p: &'a Tensor<B>,
    /// `[n, 2]` i32: 64 uniform bits, the lower half first.
    pub random: &'a Tensor<B>,
    /// `[1, ceil(vocab / 32)]` i32: a bit for each id that is never chosen.
    pub banned: &'a Tensor<B>,
}

/// Names a sequence of ops with fixed shapes that a backend may record once and replay.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct GraphKey {
    /// Which sequence of ops: unique per model and phase.
    pub name: &'static str,
    /// All sizes that its launches depend on: sequences of a decode step and columns of their block tables; patches, sub-images and
    /// the largest sub-image of a vision pass, the first and the last [padded](Backend::padded_rows).
    pub sizes: [usize; 3],
}

/// A device and its fused ops.
///
/// # Contract
/// An op never allocates device memory, never synchronises, and never reads device memory on the host. It reads the row
/// windows of its inputs and overwrites that of its output, whose rows must be as many as the op produces. Inputs and
/// output are distinct tensors. Shapes are checked before the device is touched ([`crate::check`]); a mismatch is
/// [`Error::Shape`](crate::Error::Shape). Sums are accumulated in f32 or better.
///
/// [`alloc`](Self::alloc), [`load_weight`](Self::load_weight), [`upload`](Self::upload) and
/// [`download`](Self::download) are not ops: they may allocate and wait. All that is asked of a backend happens in the order in
/// which it was asked, as far as anybody can see.
pub trait Backend: Sized + Send + Sync + 'static {
    /// Device memory of an activation.
    type Storage: Send;
    /// A weight, in the device's representation.
    type WeightStorage: Send + Sync;

    /// Whether [`sample`](Self::sample) and [`logprobs`](Self::logprobs) are there. They are not where logits are in the host's memory anyway.
    const SAMPLES: bool = false;

    /// `cpu`, or the name of the card.
    fn device_name(&self) -> String;

    /// Memory of the device's own that nobody has taken, in bytes; `None` if it computes in the host's.
    ///
    /// # Errors
    /// If the device does not say.
    fn free_memory(&self) -> Result<Option<usize>> {
        Ok(None)
    }

    /// Tokens that make a forward pass long enough for the device to be busy, and short enough that a decoding sequence does not
    /// wait for it noticeably.
    fn step_tokens(&self) -> usize;

    /// Rows to which a pass of `rows` is filled up, so that few sizes come up in [`graphed`](Self::graphed).
    fn padded_rows(&self, rows: usize) -> usize {
        rows
    }

    /// Sequences to which a step of decoding `sequences` is filled up with empty ones, for the same reason.
    fn padded_sequences(&self, sequences: usize) -> usize {
        sequences
    }

    /// Output features to which a layer is filled up whose rows of output would else begin at addresses that products do not like.
    fn padded_features(&self, features: usize) -> usize {
        features
    }

    /// Element type of activations and of the KV cache.
    fn activation_dtype(&self) -> DType;

    /// A tensor of zeros, `[rows, cols]`; 0 rows or columns are allowed.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device) if the memory is not there.
    fn alloc(&self, rows: usize, cols: usize, dtype: DType) -> Result<Tensor<Self>>;

    /// A weight made of `parts` stacked by rows; all have the same columns and element type. Vectors (one-dimensional
    /// tensors: norms, biases) are concatenated instead, to `[1, sum]`. The CPU maps matrices, a card copies them.
    ///
    /// # Errors
    /// If the parts do not fit together, or the memory is not there.
    fn load_weight(&self, parts: &[WeightView]) -> Result<Matrix<Self>>;

    /// Copies `src` into the window of `dst`.
    ///
    /// # Errors
    /// If type or length differ, or the device fails.
    fn upload<T: Element>(&self, src: &[T], dst: &mut Tensor<Self>) -> Result<()>;

    /// Waits for the ops so far and copies the window of `src` into `dst`.
    ///
    /// # Errors
    /// If type or length differ, or the device fails.
    fn download<T: Element>(&self, src: &Tensor<Self>, dst: &mut [T]) -> Result<()>;

    /// Begins to copy the window of `src` to the host: as it is behind the ops so far, whatever is done to it later. A backend that
    /// is late does not wait here, so that more can be queued before [`Download::wait`].
    ///
    /// # Errors
    /// If the type differs, or the device fails.
    fn begin_download<T: Element>(&self, src: &Tensor<Self>) -> Result<Download<T>> {
        let mut elements = vec![T::zeroed(); src.rows() * src.cols()];
        self.download(src, &mut elements)?;
        Ok(Download::new(elements.len(), move |dst: &mut [T]| {
            dst.copy_from_slice(&elements);
            Ok(())
        }))
    }

    /// Tensors for [`upload_packed`](Self::upload_packed): columns of i32 or f32, with room for `capacities` elements.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device) if the memory is not there.
    fn alloc_packed<const N: usize>(&self, capacities: [(usize, DType); N]) -> Result<[Tensor<Self>; N]> {
        let tensors = capacities.into_iter().map(|(elements, dtype)| self.alloc(elements, 1, dtype)).collect::<Result<Vec<_>>>()?;
        tensors.try_into().map_err(|_| Error::shape("alloc_packed", format!("expected {N} tensors")))
    }

    /// Copies values into tensors that [`alloc_packed`](Self::alloc_packed) gave together, and shapes these to them; in one copy where
    /// each would cost. Tensors that are not among them hold nothing any more.
    ///
    /// Where the tensors then lie depends on the shapes of `uploads` and on the number that is returned, one of a few: both belong
    /// to the key of what is [`graphed`](Self::graphed) with them. Not within `graphed`.
    ///
    /// # Errors
    /// If types differ, there are more elements than were allocated, or the device fails.
    fn upload_packed(&self, uploads: &mut [Upload<'_, Self>]) -> Result<usize> {
        for upload in uploads {
            upload.tensor.set_shape(upload.rows()?, upload.cols)?;
            match upload.values {
                Values::F32(values) => self.upload(values, upload.tensor)?,
                Values::I32(values) => self.upload(values, upload.tensor)?,
            }
        }
        Ok(0)
    }

    /// Runs `f`. A backend with graphs may record its ops at any sight of `key` and replay them after, so `f` must do
    /// the same ops on the same windows of the same tensors whenever `key` is the same, and nothing that later code relies on.
    ///
    /// # Errors
    /// Those of `f`.
    fn graphed(&self, key: GraphKey, f: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        let _ = key;
        f()
    }

    /// `out[i] = table[ids[i]]`: embedding look-up. `ids` `[n, 1]` i32, each below `table.rows`; `out` `[n, table.cols]`.
    fn embed(&self, table: &Matrix<Self>, ids: &Tensor<Self>, out: &mut Tensor<Self>) -> Result<()>;

    /// `out[i] = src[rows[i]]`. `rows` `[n, 1]` i32 within the window of `src`; `out` `[n, src.cols]`.
    fn gather_rows(&self, src: &Tensor<Self>, rows: &Tensor<Self>, out: &mut Tensor<Self>) -> Result<()>;

    /// `out[rows[i]] = src[i]`; other rows of `out` stay. `rows` `[n, 1]` i32, distinct, within the window of `out`.
    fn scatter_rows(&self, src: &Tensor<Self>, rows: &Tensor<Self>, out: &mut Tensor<Self>) -> Result<()>;

    /// Cuts pictures into patches, rescales and normalises: `out[p, (c * size + y) * size + x] = table[c, v]`, where `v` is channel `c`
    /// of the pixel `y` rows below and `x` columns beside the patch's first one. `out` `[patches, channels * size * size]`, channel-major
    /// as the weight of the patch convolution.
    fn patchify(&self, pictures: &Pictures<'_, Self>, out: &mut Tensor<Self>) -> Result<()>;

    /// `x W^T + bias` with an epilogue. `x` `[n, weight.cols]`; `bias` `[1, weight.rows]`; `out` `[n, weight.rows]`, in the
    /// activation type or f32.
    fn linear(
        &self,
        x: &Tensor<Self>,
        weight: &Matrix<Self>,
        bias: Option<&Matrix<Self>>,
        epilogue: Epilogue,
        out: &mut Tensor<Self>,
    ) -> Result<()>;

    /// `x / sqrt(mean(x^2) + eps) * weight`; Zhang and Sennrich 2019. `weight` `[1, x.cols]`.
    fn rms_norm(&self, x: &Tensor<Self>, weight: &Matrix<Self>, eps: f32, out: &mut Tensor<Self>) -> Result<()>;

    /// `(x - mean) / sqrt(var + eps) * weight + bias`; Ba et al. 2016. `weight` and `bias` `[1, x.cols]`.
    fn layer_norm(&self, x: &Tensor<Self>, weight: &Matrix<Self>, bias: &Matrix<Self>, eps: f32, out: &mut Tensor<Self>) -> Result<()>;

    /// The angles `positions[i] * inv_freq[j]` of rotary position embedding (Su et al. 2021), products in f32 as in the reference:
    /// `out[i]` has their cosines, then their sines. `positions` `[tokens, 1]` i32; `inv_freq` `[1, head_dim / 2]` f32; `out`
    /// `[tokens, head_dim]` f32.
    fn rope_cos_sin(&self, positions: &Tensor<Self>, inv_freq: &Tensor<Self>, out: &mut Tensor<Self>) -> Result<()>;

    /// Rotates q and k of `qkv` `[tokens, q_size + 2 kv_size]` (element `j` pairs with `j + head_dim / 2`, as in the Hugging Face
    /// layout), q in place, k into the cache beside v.
    fn rope_and_store_kv(&self, qkv: &mut Tensor<Self>, rope: Rope<'_, Self>, shape: AttentionShape, kv: &mut KvCache<Self>) -> Result<()>;

    /// Causal attention of the q columns of `qkv` over the cache, which holds the step's own keys already. `out` `[tokens,
    /// q_size]`. FlashAttention (Dao 2023): scores are never stored.
    fn paged_attention(
        &self,
        qkv: &Tensor<Self>,
        kv: &KvCache<Self>,
        step: &PagedAttention<'_, Self>,
        out: &mut Tensor<Self>,
    ) -> Result<()>;

    /// [`rope_and_store_kv`](Self::rope_and_store_kv), then [`paged_attention`](Self::paged_attention), of rows that are the last of
    /// their contexts and that no other sequence of the step sees. What `qkv` then holds is not said.
    ///
    /// # Errors
    /// Those of its parts.
    fn rope_and_paged_attention(
        &self,
        qkv: &mut Tensor<Self>,
        rope: Rope<'_, Self>,
        kv: &mut KvCache<Self>,
        step: &PagedAttention<'_, Self>,
        out: &mut Tensor<Self>,
    ) -> Result<()> {
        composed::rope_and_paged_attention(self, qkv, rope, kv, step, out)
    }

    /// Bidirectional attention over packed sequences. `out` `[sum of query lengths, q_size]`. Scores are never stored.
    fn attention_varlen(&self, attention: &VarlenAttention<'_, Self>, out: &mut Tensor<Self>) -> Result<()>;

    /// Chooses a token from each row of `logits` `[n, vocab]` f32 on the device: `out` `[n, 1]` i32, -1 where no logit is finite
    /// and allowed. A draw is at the place `total * random / 2^64` of the kept tokens' probabilities, added up by id.
    ///
    /// # Errors
    /// As of every op; always of a backend that does not [sample](Self::SAMPLES).
    fn sample(&self, logits: &Tensor<Self>, draws: &Draws<'_, Self>, out: &mut Tensor<Self>) -> Result<()> {
        let _ = (logits, draws, out);
        Err(Error::shape("sample", "expected a backend that samples; take the logits to the host"))
    }

    /// Log-probabilities, log softmax(logits), of one token and of the most likely ones of each row of `logits` `[n, vocab or more]`
    /// f32, of which the first `vocab` columns count. `token_ids` `[n, 1]` i32; `top_ids` `[n, k]` i32, k at most vocab, by falling probability and equals by id; `out` `[n, 1 + k]`
    /// f32: that of the row's token, NaN if there is no such id, then those of `top_ids`. All of a row are NaN if it holds NaN or
    /// positive infinity.
    ///
    /// # Errors
    /// As of every op; always of a backend that does not [sample](Self::SAMPLES).
    fn logprobs(
        &self,
        logits: &Tensor<Self>,
        vocab: usize,
        token_ids: &Tensor<Self>,
        top_ids: &mut Tensor<Self>,
        out: &mut Tensor<Self>,
    ) -> Result<()> {
        let _ = (logits, vocab, token_ids, top_ids, out);
        Err(Error::shape("logprobs", "expected a backend that samples; take the logits to the host"))
    }

    /// `rms_norm(x) W^T`: [`rms_norm`](Self::rms_norm), then [`linear`](Self::linear), by default. A backend that does both at once need
    /// not store what is normalised: it may round `x * norm.weight` to the activation type instead, and divide the product by the root.
    /// `normed`, as `x`, is scratch. `out` `[n, weight.rows]`, in the activation type or f32.
    ///
    /// # Errors
    /// If shapes do not fit, or the device fails.
    fn rms_norm_linear(
        &self,
        x: &Tensor<Self>,
        norm: RmsNorm<'_, Self>,
        weight: &Matrix<Self>,
        normed: &mut Tensor<Self>,
        out: &mut Tensor<Self>,
    ) -> Result<()> {
        composed::rms_norm_linear(self, x, norm, weight, normed, out)
    }

    /// `silu(h G^T) * (h U^T)` of `h = rms_norm(x)`, with `gate_up_proj` `[G; U]` stacked and `out` `[n, gate_up_proj.rows / 2]`: the
    /// first half of a gated MLP (Shazeer 2020). By default [`rms_norm`](Self::rms_norm), [`linear`](Self::linear) and
    /// [`silu_and_mul`](Self::silu_and_mul), of which each rounds what it stores to the activation type. A backend that does them at once
    /// rounds as in [`rms_norm_linear`](Self::rms_norm_linear), and does not round gate and up.
    ///
    /// # Errors
    /// If shapes do not fit, or the device fails.
    fn rms_norm_swiglu(
        &self,
        x: &Tensor<Self>,
        norm: RmsNorm<'_, Self>,
        gate_up_proj: &Matrix<Self>,
        scratch: SwigluScratch<'_, Self>,
        out: &mut Tensor<Self>,
    ) -> Result<()> {
        composed::rms_norm_swiglu(self, x, norm, gate_up_proj, scratch, out)
    }

    /// `silu(x[:, ..n]) * x[:, n..]`, with `x` `[tokens, 2 n]` and `out` `[tokens, n]`; Shazeer 2020 (SwiGLU).
    fn silu_and_mul(&self, x: &Tensor<Self>, out: &mut Tensor<Self>) -> Result<()>;
}

//! Shape checks, one function per op: every backend calls them before it touches the device.
//!
//! They read shapes and types only. What is in index tensors lies on the device: a backend that can read it there without
//! cost checks it too, and each must stay within its tensors whatever it is.

use crate::{
    AttentionShape, Backend, Columns, DType, Draws, Error, KvCache, Matrix, PagedAttention, Pictures, Result, RmsNorm, Rope, SwigluScratch,
    Tensor, VarlenAttention,
};

/// Collects what an op expects; the first thing that does not hold is its error.
struct Check(&'static str);

impl Check {
    /// `name` has `rows` rows and `cols` columns in its window.
    fn shape<B: Backend>(&self, name: &str, tensor: &Tensor<B>, rows: usize, cols: usize) -> Result<()> {
        if (tensor.rows(), tensor.cols()) == (rows, cols) {
            return Ok(());
        }
        Err(Error::shape(self.0, format!("expected {name} [{rows}, {cols}], found [{}, {}]", tensor.rows(), tensor.cols())))
    }

    /// `name` is `[rows, cols]`, in one of `dtypes`.
    fn tensor<B: Backend>(&self, name: &str, tensor: &Tensor<B>, rows: usize, cols: usize, dtypes: &[DType]) -> Result<()> {
        self.shape(name, tensor, rows, cols)?;
        self.dtype(name, tensor.dtype(), dtypes)
    }

    fn dtype(&self, name: &str, found: DType, dtypes: &[DType]) -> Result<()> {
        if dtypes.contains(&found) {
            return Ok(());
        }
        let names: Vec<String> = dtypes.iter().map(DType::to_string).collect();
        Err(Error::shape(self.0, format!("expected {name} in {}, found {found}", names.join(" or "))))
    }

    /// `name` is a column of i32.
    fn indices<B: Backend>(&self, name: &str, tensor: &Tensor<B>, rows: usize) -> Result<()> {
        self.tensor(name, tensor, rows, 1, &[DType::I32])
    }

    /// `name` is a weight of `[1, cols]`.
    fn vector<B: Backend>(&self, name: &str, matrix: &Matrix<B>, cols: usize) -> Result<()> {
        self.dtype(name, matrix.dtype, &WEIGHT)?;
        self.holds((matrix.rows, matrix.cols) == (1, cols), || {
            format!("expected {name} [1, {cols}], found [{}, {}]", matrix.rows, matrix.cols)
        })
    }

    /// `name` has at least `cols` columns from its offset on.
    fn columns<B: Backend>(&self, name: &str, columns: Columns<'_, B>, cols: usize, dtype: DType) -> Result<()> {
        self.dtype(name, columns.tensor.dtype(), &[dtype])?;
        self.holds(columns.offset.checked_add(cols).is_some_and(|end| end <= columns.tensor.cols()), || {
            format!("expected {name} with {cols} columns from {} on, found {} in all", columns.offset, columns.tensor.cols())
        })
    }

    fn heads(&self, shape: AttentionShape) -> Result<()> {
        let AttentionShape { num_heads, num_kv_heads, head_dim } = shape;
        let fits = num_kv_heads > 0 && head_dim > 0 && num_heads > 0 && num_heads.is_multiple_of(num_kv_heads);
        self.holds(fits, || format!("expected heads in whole groups, found {num_heads} over {num_kv_heads} of {head_dim}"))
    }

    fn kv_cache<B: Backend>(&self, kv: &KvCache<B>, shape: AttentionShape, dtype: DType) -> Result<()> {
        self.tensor("kv.k", &kv.k, kv.k.rows(), shape.kv_size(), &[dtype])?;
        self.tensor("kv.v", &kv.v, kv.k.rows(), shape.kv_size(), &[dtype])?;
        self.holds(kv.block_size > 0 && kv.k.rows().is_multiple_of(kv.block_size), || {
            format!("expected whole blocks, found {} slots in blocks of {}", kv.k.rows(), kv.block_size)
        })
    }

    fn holds(&self, fits: bool, what: impl FnOnce() -> String) -> Result<()> {
        if fits { Ok(()) } else { Err(Error::shape(self.0, what())) }
    }
}

/// Types that a weight may have.
const WEIGHT: [DType; 3] = [DType::F32, DType::F16, DType::Bf16];

/// Host and device side of a copy.
///
/// # Errors
/// [`Error::Shape`] if types or lengths differ. So do all checks of this module.
pub fn copy<B: Backend>(op: &'static str, tensor: &Tensor<B>, dtype: DType, len: usize) -> Result<()> {
    let check = Check(op);
    check.dtype("tensor", tensor.dtype(), &[dtype])?;
    check.holds(tensor.rows() * tensor.cols() == len, || {
        format!("expected {} elements on the host for [{}, {}], found {len}", tensor.rows() * tensor.cols(), tensor.rows(), tensor.cols())
    })
}

/// A tensor that goes to the host without its length being said.
///
/// # Errors
/// [`Error::Shape`] if the types differ.
pub fn element<B: Backend>(op: &'static str, tensor: &Tensor<B>, dtype: DType) -> Result<()> {
    Check(op).dtype("tensor", tensor.dtype(), &[dtype])
}

/// [`Backend::embed`]
pub fn embed<B: Backend>(backend: &B, table: &Matrix<B>, ids: &Tensor<B>, out: &Tensor<B>) -> Result<()> {
    let check = Check("embed");
    check.dtype("table", table.dtype, &WEIGHT)?;
    check.indices("ids", ids, ids.rows())?;
    check.tensor("out", out, ids.rows(), table.cols, &[backend.activation_dtype()])
}

/// [`Backend::gather_rows`]
pub fn gather_rows<B: Backend>(src: &Tensor<B>, rows: &Tensor<B>, out: &Tensor<B>) -> Result<()> {
    let check = Check("gather_rows");
    check.indices("rows", rows, rows.rows())?;
    check.tensor("out", out, rows.rows(), src.cols(), &[src.dtype()])
}

/// [`Backend::scatter_rows`]
pub fn scatter_rows<B: Backend>(src: &Tensor<B>, rows: &Tensor<B>, out: &Tensor<B>) -> Result<()> {
    let check = Check("scatter_rows");
    check.indices("rows", rows, src.rows())?;
    check.tensor("out", out, out.rows(), src.cols(), &[src.dtype()])
}

/// [`Backend::patchify`]
pub fn patchify<B: Backend>(backend: &B, pictures: &Pictures<'_, B>, out: &Tensor<B>) -> Result<()> {
    let check = Check("patchify");
    let Pictures { pixels, origins, widths, table, patch_size } = *pictures;
    check.tensor("pixels", pixels, pixels.rows(), table.rows(), &[DType::U8])?;
    check.tensor("table", table, table.rows(), 256, &[DType::F32])?;
    check.indices("origins", origins, out.rows())?;
    check.indices("widths", widths, out.rows())?;
    check.holds(out.rows() == 0 || pixels.rows() > 0, || format!("expected pixels of {} patches, found none", out.rows()))?;
    check.tensor("out", out, out.rows(), table.rows() * patch_size * patch_size, &[backend.activation_dtype()])
}

/// [`Backend::linear`]
pub fn linear<B: Backend>(backend: &B, x: &Tensor<B>, weight: &Matrix<B>, bias: Option<&Matrix<B>>, out: &Tensor<B>) -> Result<()> {
    let check = Check("linear");
    check.dtype("weight", weight.dtype, &WEIGHT)?;
    check.tensor("x", x, x.rows(), weight.cols, &[backend.activation_dtype()])?;
    if let Some(bias) = bias {
        check.vector("bias", bias, weight.rows)?;
    }
    check.tensor("out", out, x.rows(), weight.rows, &[backend.activation_dtype(), DType::F32])
}

/// [`Backend::rms_norm`]
pub fn rms_norm<B: Backend>(backend: &B, x: &Tensor<B>, weight: &Matrix<B>, out: &Tensor<B>) -> Result<()> {
    norm(&Check("rms_norm"), backend, x, weight, out)
}

/// [`Backend::rms_norm_linear`]
pub fn rms_norm_linear<B: Backend>(
    backend: &B,
    x: &Tensor<B>,
    norm: &RmsNorm<'_, B>,
    weight: &Matrix<B>,
    normed: &Tensor<B>,
    out: &Tensor<B>,
) -> Result<()> {
    let check = Check("rms_norm_linear");
    normed_input(&check, backend, x, norm, weight, normed)?;
    check.tensor("out", out, x.rows(), weight.rows, &[backend.activation_dtype(), DType::F32])
}

/// [`Backend::rms_norm_swiglu`]
pub fn rms_norm_swiglu<B: Backend>(
    backend: &B,
    x: &Tensor<B>,
    norm: &RmsNorm<'_, B>,
    gate_up_proj: &Matrix<B>,
    scratch: &SwigluScratch<'_, B>,
    out: &Tensor<B>,
) -> Result<()> {
    let check = Check("rms_norm_swiglu");
    normed_input(&check, backend, x, norm, gate_up_proj, scratch.normed)?;
    check.holds(gate_up_proj.rows.is_multiple_of(2), || {
        format!("expected as many rows of gate as of up, found {} in all", gate_up_proj.rows)
    })?;
    check.tensor("gate_up", scratch.gate_up, x.rows(), gate_up_proj.rows, &[backend.activation_dtype()])?;
    check.tensor("out", out, x.rows(), gate_up_proj.rows / 2, &[backend.activation_dtype()])
}

/// What a product with a norm in front of it reads, and where the norm may be stored.
fn normed_input<B: Backend>(
    check: &Check,
    backend: &B,
    x: &Tensor<B>,
    norm: &RmsNorm<'_, B>,
    weight: &Matrix<B>,
    normed: &Tensor<B>,
) -> Result<()> {
    check.dtype("weight", weight.dtype, &WEIGHT)?;
    check.tensor("x", x, x.rows(), weight.cols, &[backend.activation_dtype()])?;
    check.vector("norm.weight", norm.weight, x.cols())?;
    check.tensor("normed", normed, x.rows(), x.cols(), &[backend.activation_dtype()])
}

/// [`Backend::layer_norm`]
pub fn layer_norm<B: Backend>(backend: &B, x: &Tensor<B>, weight: &Matrix<B>, bias: &Matrix<B>, out: &Tensor<B>) -> Result<()> {
    let check = Check("layer_norm");
    check.vector("bias", bias, x.cols())?;
    norm(&check, backend, x, weight, out)
}

fn norm<B: Backend>(check: &Check, backend: &B, x: &Tensor<B>, weight: &Matrix<B>, out: &Tensor<B>) -> Result<()> {
    check.vector("weight", weight, x.cols())?;
    check.dtype("x", x.dtype(), &[backend.activation_dtype()])?;
    check.tensor("out", out, x.rows(), x.cols(), &[backend.activation_dtype()])
}

/// [`Backend::rope_cos_sin`]
pub fn rope_cos_sin<B: Backend>(positions: &Tensor<B>, inv_freq: &Tensor<B>, out: &Tensor<B>) -> Result<()> {
    let check = Check("rope_cos_sin");
    check.indices("positions", positions, positions.rows())?;
    check.tensor("inv_freq", inv_freq, 1, inv_freq.cols(), &[DType::F32])?;
    check.tensor("out", out, positions.rows(), 2 * inv_freq.cols(), &[DType::F32])
}

/// [`Backend::rope_and_store_kv`]
pub fn rope_and_store_kv<B: Backend>(
    backend: &B,
    qkv: &Tensor<B>,
    rope: Rope<'_, B>,
    shape: AttentionShape,
    kv: &KvCache<B>,
) -> Result<()> {
    let check = Check("rope_and_store_kv");
    check.heads(shape)?;
    check.holds(shape.head_dim.is_multiple_of(2), || format!("expected an even head_dim, found {}", shape.head_dim))?;
    check.tensor("qkv", qkv, qkv.rows(), shape.q_size() + 2 * shape.kv_size(), &[backend.activation_dtype()])?;
    check.tensor("cos_sin", rope.cos_sin, qkv.rows(), shape.head_dim, &[DType::F32])?;
    check.indices("slots", rope.slots, qkv.rows())?;
    check.kv_cache(kv, shape, backend.activation_dtype())
}

/// [`Backend::paged_attention`]
pub fn paged_attention<B: Backend>(
    backend: &B,
    qkv: &Tensor<B>,
    kv: &KvCache<B>,
    step: &PagedAttention<'_, B>,
    out: &Tensor<B>,
) -> Result<()> {
    let check = Check("paged_attention");
    let shape = step.shape;
    check.heads(shape)?;
    check.tensor("qkv", qkv, qkv.rows(), shape.q_size() + 2 * shape.kv_size(), &[backend.activation_dtype()])?;
    check.tensor("out", out, qkv.rows(), shape.q_size(), &[backend.activation_dtype()])?;
    check.kv_cache(kv, shape, backend.activation_dtype())?;
    let sequences = step.context_lens.rows();
    check.indices("positions", step.positions, qkv.rows())?;
    check.indices("context_lens", step.context_lens, sequences)?;
    check.indices("cu_seqlens_q", step.cu_seqlens_q, sequences + 1)?;
    check.tensor("block_tables", step.block_tables, sequences, step.block_tables.cols(), &[DType::I32])?;
    check.holds(step.sliding_window != Some(0), || "expected a sliding window of 1 or more, found 0".into())
}

/// [`Backend::attention_varlen`]
pub fn attention_varlen<B: Backend>(backend: &B, attention: &VarlenAttention<'_, B>, out: &Tensor<B>) -> Result<()> {
    let check = Check("attention_varlen");
    let (shape, dtype) = (attention.shape, backend.activation_dtype());
    check.heads(shape)?;
    check.columns("q", attention.q, shape.q_size(), dtype)?;
    check.columns("k", attention.k, shape.kv_size(), dtype)?;
    check.columns("v", attention.v, shape.kv_size(), dtype)?;
    let (q, k, v) = (attention.q.tensor.rows(), attention.k.tensor.rows(), attention.v.tensor.rows());
    check.holds(k == v, || format!("expected as many rows of v as of k, found {v} and {k}"))?;
    check.tensor("out", out, q, shape.q_size(), &[dtype])?;
    let ends = attention.cu_seqlens_q.rows();
    check.holds(ends > 0, || "expected cu_seqlens_q to begin with 0, found nothing".into())?;
    check.indices("cu_seqlens_q", attention.cu_seqlens_q, ends)?;
    check.indices("cu_seqlens_k", attention.cu_seqlens_k, ends)
}

/// [`Backend::sample`]
pub fn sample<B: Backend>(logits: &Tensor<B>, draws: &Draws<'_, B>, out: &Tensor<B>) -> Result<()> {
    let check = Check("sample");
    let rows = logits.rows();
    check.dtype("logits", logits.dtype(), &[DType::F32])?;
    check.tensor("temperature", draws.temperature, rows, 1, &[DType::F32])?;
    check.indices("top_k", draws.top_k, rows)?;
    check.tensor("top_p", draws.top_p, rows, 1, &[DType::F32])?;
    check.tensor("random", draws.random, rows, 2, &[DType::I32])?;
    check.tensor("banned", draws.banned, 1, logits.cols().div_ceil(32), &[DType::I32])?;
    check.indices("out", out, rows)
}

/// [`Backend::logprobs`]
pub fn logprobs<B: Backend>(logits: &Tensor<B>, vocab: usize, token_ids: &Tensor<B>, top_ids: &Tensor<B>, out: &Tensor<B>) -> Result<()> {
    let check = Check("logprobs");
    let (rows, top) = (logits.rows(), top_ids.cols());
    check.dtype("logits", logits.dtype(), &[DType::F32])?;
    check.indices("token_ids", token_ids, rows)?;
    check.tensor("top_ids", top_ids, rows, top, &[DType::I32])?;
    check.holds((1..=logits.cols()).contains(&vocab), || {
        format!("expected a vocabulary of 1 to {} tokens, the columns of logits, found {vocab}", logits.cols())
    })?;
    check.holds(top <= vocab, || format!("expected top_ids with at most the {vocab} tokens of the vocabulary, found {top}"))?;
    check.tensor("out", out, rows, 1 + top, &[DType::F32])
}

/// [`Backend::silu_and_mul`]
pub fn silu_and_mul<B: Backend>(backend: &B, x: &Tensor<B>, out: &Tensor<B>) -> Result<()> {
    let check = Check("silu_and_mul");
    check.tensor("x", x, out.rows(), 2 * out.cols(), &[backend.activation_dtype()])?;
    check.tensor("out", out, x.rows(), out.cols(), &[backend.activation_dtype()])
}

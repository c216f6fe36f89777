//! Ops that are made of others, for backends and sizes with nothing better.

use crate::{Backend, Epilogue, KvCache, Matrix, PagedAttention, Result, RmsNorm, Rope, SwigluScratch, Tensor, check};

/// [`Backend::rms_norm_linear`]
pub(crate) fn rms_norm_linear<B: Backend>(
    backend: &B,
    x: &Tensor<B>,
    norm: RmsNorm<'_, B>,
    weight: &Matrix<B>,
    normed: &mut Tensor<B>,
    out: &mut Tensor<B>,
) -> Result<()> {
    check::rms_norm_linear(backend, x, &norm, weight, normed, out)?;
    backend.rms_norm(x, norm.weight, norm.eps, normed)?;
    backend.linear(normed, weight, None, Epilogue::Store, out)
}

/// [`Backend::rms_norm_swiglu`]
pub(crate) fn rms_norm_swiglu<B: Backend>(
    backend: &B,
    x: &Tensor<B>,
    norm: RmsNorm<'_, B>,
    gate_up_proj: &Matrix<B>,
    scratch: SwigluScratch<'_, B>,
    out: &mut Tensor<B>,
) -> Result<()> {
    check::rms_norm_swiglu(backend, x, &norm, gate_up_proj, &scratch, out)?;
    backend.rms_norm(x, norm.weight, norm.eps, scratch.normed)?;
    backend.linear(scratch.normed, gate_up_proj, None, Epilogue::Store, scratch.gate_up)?;
    backend.silu_and_mul(scratch.gate_up, out)
}

/// [`Backend::rope_and_paged_attention`]
pub(crate) fn rope_and_paged_attention<B: Backend>(
    backend: &B,
    qkv: &mut Tensor<B>,
    rope: Rope<'_, B>,
    kv: &mut KvCache<B>,
    step: &PagedAttention<'_, B>,
    out: &mut Tensor<B>,
) -> Result<()> {
    backend.rope_and_store_kv(qkv, rope, step.shape, kv)?;
    backend.paged_attention(qkv, kv, step, out)
}

//! `x W^T + bias` with an epilogue: few rows stream the weight once ([`super::gemv`]), many go through packed blocks
//! ([`super::gemm`]).

use super::{
    Cpu, gemm, gemv, math,
    simd::Simd,
    storage::{CpuWeight, Shared},
};
use crate::{Epilogue, Matrix, Result, Tensor, check};

/// Most rows of `x` for which the weight is streamed. Above, packing a block of the weight costs less than the vectors that
/// wait for it.
pub(crate) const STREAMED_ROWS: usize = 16;

/// Operands of one linear layer on the CPU.
pub(crate) struct Linear<'a> {
    /// `[n, k]`
    pub(crate) x: &'a [f32],
    /// Rows of `x`.
    pub(crate) n: usize,
    /// Input features.
    pub(crate) k: usize,
    /// `[features, k]`
    pub(crate) weight: &'a CpuWeight,
    /// Output features.
    pub(crate) features: usize,
    /// `[features]`
    pub(crate) bias: Option<&'a [f32]>,
    pub(crate) epilogue: Epilogue,
    /// `[n, features]`
    pub(crate) out: Shared<'a>,
}

/// [`Backend::linear`](crate::Backend::linear).
pub(crate) fn linear(
    cpu: &Cpu,
    x: &Tensor<Cpu>,
    weight: &Matrix<Cpu>,
    bias: Option<&Matrix<Cpu>>,
    epilogue: Epilogue,
    out: &mut Tensor<Cpu>,
) -> Result<()> {
    check::linear(cpu, x, weight, bias, out)?;
    let stored = CpuWeight::of("linear", weight)?;
    let op = Linear {
        x: x.storage.slice(x.elements()),
        n: x.rows(),
        k: stored.cols(),
        weight: stored,
        features: stored.rows(),
        bias: bias.map(|bias| CpuWeight::vector_of("linear", bias)).transpose()?,
        epilogue,
        out: Shared::new(out.storage.slice_mut(out.elements())),
    };
    if op.n == 0 || op.features == 0 {
        return Ok(());
    }
    if op.n <= STREAMED_ROWS {
        gemv::run(cpu, &op)
    } else {
        gemm::run(cpu, &op)
    }
    Ok(())
}

impl Linear<'_> {
    /// A vector, or the first `lanes` of one.
    ///
    /// # Safety
    /// `p` is readable for `lanes` elements.
    #[inline(always)]
    unsafe fn load<S: Simd>(simd: S, p: *const f32, lanes: usize) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { if lanes == S::LANES { simd.load(p) } else { simd.load_head(p, lanes) } }
    }

    /// Finishes the first `lanes` sums of `value` and stores them in `out[row, column ..]`: adds what is there if the epilogue
    /// or an earlier block left something, and with the last block the bias and the activation.
    ///
    /// # Safety
    /// `column + lanes` is within the row, and no other thread works on these elements.
    #[inline(always)]
    pub(crate) unsafe fn store<S: Simd>(&self, simd: S, value: S::V, row: usize, column: usize, lanes: usize, block: Block) {
        // SAFETY: the elements are within `out`, by the caller's promise, and the bias has one for each column.
        unsafe {
            let out = self.out.as_ptr().add(row * self.features + column);
            let mut value = value;
            if block.is_last
                && let Some(bias) = self.bias
            {
                value = simd.add(value, Self::load(simd, bias.as_ptr().add(column), lanes));
            }
            if !block.is_first || self.epilogue == Epilogue::Accumulate {
                value = simd.add(value, Self::load(simd, out, lanes));
            }
            if block.is_last && self.epilogue == Epilogue::GeluTanh {
                value = math::gelu_tanh(simd, value);
            }
            if lanes == S::LANES { simd.store(out, value) } else { simd.store_head(out, value, lanes) }
        }
    }
}

/// Where a block of input features stands among those of its sum.
#[derive(Clone, Copy)]
pub(crate) struct Block {
    pub(crate) is_first: bool,
    pub(crate) is_last: bool,
}

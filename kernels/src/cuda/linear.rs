//! `x W^T + bias` with an epilogue, alone or with the norm ahead of it and the gate behind it: few rows stream the weight once
//! (`cu/gemv.cu`), many go through cuBLASLt ([`super::blas`]), with kernels of their own for norm and gate.

use super::{
    Cuda,
    blas::{Blas, Product},
    driver::{DevicePtr, Stream},
    pointer,
};
use crate::{DType, Epilogue, Matrix, Result, RmsNorm, SwigluScratch, Tensor, check, composed};
use std::sync::Arc;

/// Most rows of `x` for which the weight is streamed. Up to here a row has the same bits whatever else is in the batch. 16 is what one
/// pass of `gemv_16` takes, which still moves hardly more than the weight. Whether cuBLASLt is faster below has not been measured.
const STREAMED_ROWS: usize = 16;

/// Rows of `weight` and threads of a block of `cu/gemv.cu`.
const WEIGHT_ROWS: usize = 16;
const THREADS: usize = 256;

/// The kernels of a kind of product in `cu/gemv.cu`.
struct Kernels {
    /// For up to 8 rows of `x`, for up to 16, and for rows that do not begin at multiples of 16 bytes.
    names: [&'static str; 3],
    /// Columns of `out` that a block has.
    columns: usize,
}

const GEMV: Kernels = Kernels { names: ["gemv_8", "gemv_16", "gemv_unaligned"], columns: WEIGHT_ROWS };
const NORMED: Kernels = Kernels { names: ["normed_8", "normed_16", "normed_unaligned"], columns: WEIGHT_ROWS };
const GATED: Kernels = Kernels { names: ["gated_8", "gated_16", "gated_unaligned"], columns: WEIGHT_ROWS / 2 };

/// The norm of `x`, which [`GEMV`] does not have.
struct Norm {
    weight: DevicePtr,
    eps: f32,
}

impl From<RmsNorm<'_, Cuda>> for Norm {
    fn from(norm: RmsNorm<'_, Cuda>) -> Self {
        Self { weight: norm.weight.storage.pointer(), eps: norm.eps }
    }
}

/// Whether the norm is taken in the product's own pass over `x`. The mean of nothing is none.
fn is_streamed(x: &Tensor<Cuda>) -> bool {
    x.rows() <= STREAMED_ROWS && x.cols() > 0
}

/// What [`Backend::linear`](crate::Backend::linear) needs besides its operands.
pub(super) struct Linear {
    blas: Blas,
}

impl Linear {
    pub(super) fn new(stream: &Arc<Stream>) -> Result<Self> {
        Ok(Self { blas: Blas::new(stream)? })
    }

    /// [`Backend::linear`](crate::Backend::linear)
    pub(super) fn run(
        &self,
        cuda: &Cuda,
        x: &Tensor<Cuda>,
        weight: &Matrix<Cuda>,
        bias: Option<&Matrix<Cuda>>,
        epilogue: Epilogue,
        out: &mut Tensor<Cuda>,
    ) -> Result<()> {
        check::linear(cuda, x, weight, bias, out)?;
        let product = Product {
            x: pointer(x),
            weight: weight.storage.pointer(),
            bias: bias.map_or(0, |bias| bias.storage.pointer()),
            out: pointer(out),
            n: x.rows(),
            m: weight.rows,
            k: weight.cols,
            epilogue,
            out_dtype: out.dtype(),
        };
        if product.n == 0 || product.m == 0 {
            return Ok(());
        }
        // SAFETY: shapes were checked.
        if product.n > STREAMED_ROWS && unsafe { self.blas.multiply(&product) }? {
            return Ok(());
        }
        stream(cuda, &GEMV, &product, &Norm { weight: 0, eps: 0.0 })
    }
}

/// [`Backend::rms_norm_linear`](crate::Backend::rms_norm_linear)
pub(super) fn rms_norm_linear(
    cuda: &Cuda,
    x: &Tensor<Cuda>,
    norm: RmsNorm<'_, Cuda>,
    weight: &Matrix<Cuda>,
    normed: &mut Tensor<Cuda>,
    out: &mut Tensor<Cuda>,
) -> Result<()> {
    if !is_streamed(x) {
        return composed::rms_norm_linear(cuda, x, norm, weight, normed, out);
    }
    check::rms_norm_linear(cuda, x, &norm, weight, normed, out)?;
    stream(cuda, &NORMED, &normed_product(x, weight, out), &norm.into())
}

/// [`Backend::rms_norm_swiglu`](crate::Backend::rms_norm_swiglu)
pub(super) fn rms_norm_swiglu(
    cuda: &Cuda,
    x: &Tensor<Cuda>,
    norm: RmsNorm<'_, Cuda>,
    gate_up_proj: &Matrix<Cuda>,
    scratch: SwigluScratch<'_, Cuda>,
    out: &mut Tensor<Cuda>,
) -> Result<()> {
    if !is_streamed(x) {
        return composed::rms_norm_swiglu(cuda, x, norm, gate_up_proj, scratch, out);
    }
    check::rms_norm_swiglu(cuda, x, &norm, gate_up_proj, &scratch, out)?;
    stream(cuda, &GATED, &normed_product(x, gate_up_proj, out), &norm.into())
}

fn normed_product(x: &Tensor<Cuda>, weight: &Matrix<Cuda>, out: &Tensor<Cuda>) -> Product {
    Product {
        x: pointer(x),
        weight: weight.storage.pointer(),
        bias: 0,
        out: pointer(out),
        n: x.rows(),
        m: out.cols(),
        k: x.cols(),
        epilogue: Epilogue::Store,
        out_dtype: out.dtype(),
    }
}

/// Streams the weight once for every 8 or 16 rows of `x`. The shapes were checked.
fn stream(cuda: &Cuda, kernels: &Kernels, product: &Product, norm: &Norm) -> Result<()> {
    let Product { n, m, k, .. } = *product;
    let [few, more, unaligned] = kernels.names;
    // Rows are aligned to 16 bytes where k is a multiple of 8, as tensors begin at multiples of 256.
    let (name, rows) = match (k.is_multiple_of(8), n) {
        (true, ..=8) => (few, 8),
        (true, _) => (more, 16),
        (false, _) => (unaligned, 16),
    };
    // Of each warp the sums, rows x 16 floats, each row 4 floats longer for the sake of banks, and the squares of the rows.
    let shared_bytes = THREADS / 32 * rows * (WEIGHT_ROWS + 4 + 1) * size_of::<f32>();
    let launch = cuda.launch(name)?.grid([m.div_ceil(kernels.columns), n.div_ceil(rows), 1]).threads(THREADS).shared_bytes(shared_bytes);
    let launch = launch.pointer(product.x).pointer(product.weight).pointer(product.bias).pointer(norm.weight).pointer(product.out);
    let launch = launch.int(n).int(m).int(k).float(norm.eps);
    let epilogue = match product.epilogue {
        Epilogue::Store => 0,
        Epilogue::Accumulate => 1,
        Epilogue::GeluTanh => 2,
    };
    // SAFETY: shapes were checked.
    unsafe { launch.int(epilogue).int(usize::from(product.out_dtype == DType::F32)).run() }
}

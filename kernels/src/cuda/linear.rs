//! `x W^T + bias` with an epilogue: few rows stream the weight once (`cu/gemv.cu`), many go through cuBLASLt ([`super::blas`]).

use super::{
    Cuda,
    blas::{Blas, Product},
    driver::Stream,
    pointer,
};
use crate::{DType, Epilogue, Matrix, Result, Tensor, check};
use std::sync::Arc;

/// Most rows of `x` for which the weight is streamed. Up to here a row has the same bits whatever else is in the batch. 16 is what one
/// pass of `gemv_16` takes, which still moves hardly more than the weight. Whether cuBLASLt is faster below has not been measured.
const STREAMED_ROWS: usize = 16;

/// Rows of `weight` and threads of a block of `cu/gemv.cu`.
const WEIGHT_ROWS: usize = 16;
const THREADS: usize = 256;

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
        gemv(cuda, &product)
    }
}

/// Streams the weight once for every 8 or 16 rows of `x`.
fn gemv(cuda: &Cuda, product: &Product) -> Result<()> {
    let Product { n, m, k, .. } = *product;
    // Rows are aligned to 16 bytes where k is a multiple of 8, as tensors begin at multiples of 256.
    let (name, rows) = match (k.is_multiple_of(8), n) {
        (true, ..=8) => ("gemv_8", 8),
        (true, _) => ("gemv_16", 16),
        (false, _) => ("gemv_unaligned", 16),
    };
    // The sums of each warp: rows x 16 floats, each row 4 floats longer for the sake of banks.
    let shared_bytes = THREADS / 32 * rows * (WEIGHT_ROWS + 4) * size_of::<f32>();
    let launch = cuda.launch(name)?.grid([m.div_ceil(WEIGHT_ROWS), n.div_ceil(rows), 1]).threads(THREADS).shared_bytes(shared_bytes);
    let launch = launch.pointer(product.x).pointer(product.weight).pointer(product.bias).pointer(product.out).int(n).int(m).int(k);
    let epilogue = match product.epilogue {
        Epilogue::Store => 0,
        Epilogue::Accumulate => 1,
        Epilogue::GeluTanh => 2,
    };
    // SAFETY: shapes were checked.
    unsafe { launch.int(epilogue).int(usize::from(product.out_dtype == DType::F32)).run() }
}

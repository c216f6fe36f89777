//! Normalisation of rows.

use super::{Cuda, pointer};
use crate::{Matrix, Result, Tensor, check};

/// A float for each of up to 32 warps, twice.
const SHARED_BYTES: usize = 2 * 32 * 4;

/// Threads of a row's block: one for 8 elements, in whole warps.
fn threads(cols: usize) -> usize {
    cols.div_ceil(8).next_multiple_of(32).clamp(32, 256)
}

/// [`Backend::rms_norm`](crate::Backend::rms_norm)
pub(super) fn rms_norm(cuda: &Cuda, x: &Tensor<Cuda>, weight: &Matrix<Cuda>, eps: f32, out: &mut Tensor<Cuda>) -> Result<()> {
    check::rms_norm(cuda, x, weight, out)?;
    let launch = cuda.launch("rms_norm")?.grid([x.rows(), 1, 1]).threads(threads(x.cols())).shared_bytes(SHARED_BYTES);
    let launch = launch.pointer(pointer(x)).pointer(weight.storage.pointer()).pointer(pointer(out));
    // SAFETY: shapes were checked.
    unsafe { launch.int(x.cols()).float(eps).run() }
}

/// [`Backend::layer_norm`](crate::Backend::layer_norm)
pub(super) fn layer_norm(
    cuda: &Cuda,
    x: &Tensor<Cuda>,
    weight: &Matrix<Cuda>,
    bias: &Matrix<Cuda>,
    eps: f32,
    out: &mut Tensor<Cuda>,
) -> Result<()> {
    check::layer_norm(cuda, x, weight, bias, out)?;
    let launch = cuda.launch("layer_norm")?.grid([x.rows(), 1, 1]).threads(threads(x.cols())).shared_bytes(SHARED_BYTES);
    let launch = launch.pointer(pointer(x)).pointer(weight.storage.pointer()).pointer(bias.storage.pointer()).pointer(pointer(out));
    // SAFETY: shapes were checked.
    unsafe { launch.int(x.cols()).float(eps).run() }
}

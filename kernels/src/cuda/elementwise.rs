//! Functions of single elements.

use super::{Cuda, pointer};
use crate::{Result, Tensor, check};

const THREADS: usize = 256;

/// Blocks for `items` items of a grid-stride loop: as many as run at once, a few times over.
fn blocks(cuda: &Cuda, items: usize) -> usize {
    items.div_ceil(THREADS).min(cuda.device().multiprocessors * 8)
}

/// [`Backend::normalize_patches`](crate::Backend::normalize_patches)
pub(super) fn normalize_patches(cuda: &Cuda, pixels: &Tensor<Cuda>, table: &Tensor<Cuda>, out: &mut Tensor<Cuda>) -> Result<()> {
    check::normalize_patches(cuda, pixels, table, out)?;
    let (rows, cols) = (pixels.rows(), pixels.cols());
    let launch = cuda.launch("normalize_patches")?.grid([blocks(cuda, rows * cols), 1, 1]).threads(THREADS);
    let launch = launch.pointer(pointer(pixels)).pointer(pointer(table)).pointer(pointer(out));
    // SAFETY: shapes were checked; a channel has `cols / channels` pixels, so that it is below the table's rows.
    unsafe { launch.int(rows).int(cols).int(cols / table.rows()).run() }
}

/// [`Backend::silu_and_mul`](crate::Backend::silu_and_mul)
pub(super) fn silu_and_mul(cuda: &Cuda, x: &Tensor<Cuda>, out: &mut Tensor<Cuda>) -> Result<()> {
    check::silu_and_mul(cuda, x, out)?;
    let (rows, n) = (out.rows(), out.cols());
    let items = if n.is_multiple_of(8) { rows * n / 8 } else { rows * n };
    let launch = cuda.launch("silu_and_mul")?.grid([blocks(cuda, items), 1, 1]).threads(THREADS);
    // SAFETY: shapes were checked.
    unsafe { launch.pointer(pointer(x)).pointer(pointer(out)).int(rows).int(n).run() }
}

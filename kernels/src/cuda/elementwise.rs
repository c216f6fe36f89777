//! Functions of single elements.

use super::{Cuda, pointer};
use crate::{Pictures, Result, Tensor, check};

const THREADS: usize = 256;

/// Blocks for `items` items of a grid-stride loop: as many as run at once, a few times over.
fn blocks(cuda: &Cuda, items: usize) -> usize {
    items.div_ceil(THREADS).min(cuda.device().multiprocessors * 8)
}

/// [`Backend::patchify`](crate::Backend::patchify)
pub(super) fn patchify(cuda: &Cuda, pictures: &Pictures<'_, Cuda>, out: &mut Tensor<Cuda>) -> Result<()> {
    check::patchify(cuda, pictures, out)?;
    let Pictures { pixels, origins, widths, table, patch_size } = *pictures;
    let launch = cuda.launch("patchify")?.grid([blocks(cuda, out.rows() * out.cols()), 1, 1]).threads(THREADS);
    let launch = launch.pointer(pointer(pixels)).pointer(pointer(origins)).pointer(pointer(widths));
    let launch = launch.pointer(pointer(table)).pointer(pointer(out)).int(pixels.rows()).int(out.rows());
    // SAFETY: shapes were checked, and the kernel stays within the pixels whatever the indices are.
    unsafe { launch.int(table.rows()).int(patch_size).run() }
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

//! Rows by index: embedding look-up, gather, scatter.

use super::{Cuda, driver::DevicePtr, pointer};
use crate::{Backend, Matrix, Result, Tensor, check};

/// The kernel for rows of `row_bytes` bytes: the widest word that divides them. Rows begin at multiples of their length from a
/// 256-byte boundary, so words are aligned.
fn kernel(row_bytes: usize, [wide, four, two, one]: [&'static str; 4]) -> (&'static str, usize) {
    match row_bytes {
        n if n.is_multiple_of(16) => (wide, 16),
        n if n.is_multiple_of(4) => (four, 4),
        n if n.is_multiple_of(2) => (two, 2),
        _ => (one, 1),
    }
}

struct Copy {
    src: DevicePtr,
    rows: DevicePtr,
    out: DevicePtr,
    count: usize,
    row_bytes: usize,
    limit: usize,
}

impl Copy {
    fn run(&self, cuda: &Cuda, kernels: [&'static str; 4]) -> Result<()> {
        if self.row_bytes == 0 {
            return Ok(());
        }
        let (name, word) = kernel(self.row_bytes, kernels);
        let launch = cuda.launch(name)?.grid([self.count, 1, 1]).threads((self.row_bytes / word).next_multiple_of(32).min(256));
        let launch = launch.pointer(self.src).pointer(self.rows).pointer(self.out).int(self.row_bytes).int(self.limit);
        // SAFETY: `src` and `out` were checked by the caller: `count` rows on one side, `limit` on the other.
        unsafe { launch.run() }
    }
}

const GATHER: [&str; 4] = ["gather_rows_16", "gather_rows_4", "gather_rows_2", "gather_rows_1"];
const SCATTER: [&str; 4] = ["scatter_rows_16", "scatter_rows_4", "scatter_rows_2", "scatter_rows_1"];

/// [`Backend::embed`]
pub(super) fn embed(cuda: &Cuda, table: &Matrix<Cuda>, ids: &Tensor<Cuda>, out: &mut Tensor<Cuda>) -> Result<()> {
    check::embed(cuda, table, ids, out)?;
    let row_bytes = table.cols * cuda.activation_dtype().size();
    let src = table.storage.pointer();
    Copy { src, rows: pointer(ids), out: pointer(out), count: ids.rows(), row_bytes, limit: table.rows }.run(cuda, GATHER)
}

/// [`Backend::gather_rows`]
pub(super) fn gather(cuda: &Cuda, src: &Tensor<Cuda>, rows: &Tensor<Cuda>, out: &mut Tensor<Cuda>) -> Result<()> {
    check::gather_rows(src, rows, out)?;
    let row_bytes = src.cols() * src.dtype().size();
    Copy { src: pointer(src), rows: pointer(rows), out: pointer(out), count: rows.rows(), row_bytes, limit: src.rows() }.run(cuda, GATHER)
}

/// [`Backend::scatter_rows`]
pub(super) fn scatter(cuda: &Cuda, src: &Tensor<Cuda>, rows: &Tensor<Cuda>, out: &mut Tensor<Cuda>) -> Result<()> {
    check::scatter_rows(src, rows, out)?;
    let row_bytes = src.cols() * src.dtype().size();
    Copy { src: pointer(src), rows: pointer(rows), out: pointer(out), count: rows.rows(), row_bytes, limit: out.rows() }.run(cuda, SCATTER)
}

//! Rows by index: embedding look-up, gather and scatter.

use super::{
    Cpu,
    micro::{Stored, with_stored},
    simd::{Kernel, Simd},
    storage::{CpuWeight, Shared},
};
use crate::{Error, Matrix, Result, Tensor, check};
use std::marker::PhantomData;

/// Elements above which threads share the work.
const PARALLEL_ELEMENTS: usize = 1 << 17;

/// [`Backend::embed`](crate::Backend::embed).
pub(crate) fn embed(cpu: &Cpu, table: &Matrix<Cpu>, ids: &Tensor<Cpu>, out: &mut Tensor<Cpu>) -> Result<()> {
    check::embed(cpu, table, ids, out)?;
    let weight = CpuWeight::of("embed", table)?;
    let ids: &[i32] = ids.storage.slice(ids.elements());
    check_indices("embed", "id", ids, weight.rows())?;
    let cols = weight.cols();
    let out = Shared::new(out.storage.slice_mut(out.elements()));
    cpu.for_each(ids.len() * cols >= PARALLEL_ELEMENTS, ids.len(), |i| {
        // SAFETY: each row of the output belongs to one tile.
        let out = unsafe { out.part(i * cols..(i + 1) * cols) };
        let row = weight.row(ids[i] as usize);
        with_stored!(weight.dtype(), T => cpu.level().run(Widen::<T> { row, out, stored: PhantomData }));
    });
    Ok(())
}

/// [`Backend::gather_rows`](crate::Backend::gather_rows).
pub(crate) fn gather(src: &Tensor<Cpu>, rows: &Tensor<Cpu>, out: &mut Tensor<Cpu>) -> Result<()> {
    check::gather_rows(src, rows, out)?;
    let rows: &[i32] = rows.storage.slice(rows.elements());
    check_indices("gather_rows", "row", rows, src.rows())?;
    let bytes = src.cols() * src.dtype().size();
    let (from, to) = (bytes_of(src), out.elements());
    let size = out.dtype().size();
    let to: &mut [u8] = out.storage.slice_mut(to.start * size..to.end * size);
    for (i, row) in rows.iter().enumerate() {
        to[i * bytes..(i + 1) * bytes].copy_from_slice(&from[*row as usize * bytes..][..bytes]);
    }
    Ok(())
}

/// [`Backend::scatter_rows`](crate::Backend::scatter_rows).
pub(crate) fn scatter(src: &Tensor<Cpu>, rows: &Tensor<Cpu>, out: &mut Tensor<Cpu>) -> Result<()> {
    check::scatter_rows(src, rows, out)?;
    let rows: &[i32] = rows.storage.slice(rows.elements());
    check_indices("scatter_rows", "row", rows, out.rows())?;
    let bytes = src.cols() * src.dtype().size();
    let (from, to) = (bytes_of(src), out.elements());
    let size = out.dtype().size();
    let to: &mut [u8] = out.storage.slice_mut(to.start * size..to.end * size);
    for (i, row) in rows.iter().enumerate() {
        to[*row as usize * bytes..][..bytes].copy_from_slice(&from[i * bytes..(i + 1) * bytes]);
    }
    Ok(())
}

/// The window of `tensor`.
fn bytes_of(tensor: &Tensor<Cpu>) -> &[u8] {
    let (elements, size) = (tensor.elements(), tensor.dtype().size());
    tensor.storage.slice(elements.start * size..elements.end * size)
}

/// That all of `indices` are in `0..limit`.
fn check_indices(op: &'static str, name: &str, indices: &[i32], limit: usize) -> Result<()> {
    match indices.iter().position(|index| usize::try_from(*index).map_or(true, |index| index >= limit)) {
        Some(i) => Err(Error::shape(op, format!("expected {name} {i} in 0..{limit}, found {}", indices[i]))),
        None => Ok(()),
    }
}

/// One row of a weight as f32.
struct Widen<'a, T> {
    row: &'a [u8],
    out: &'a mut [f32],
    stored: PhantomData<T>,
}

impl<T: Stored> Kernel for Widen<'_, T> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let len = self.out.len().min(self.row.len() / T::SIZE);
        let whole = len - len % S::LANES;
        // SAFETY: `i` and what is loaded and stored from it on is below `len`.
        unsafe {
            for i in (0..whole).step_by(S::LANES) {
                simd.store(self.out.as_mut_ptr().add(i), T::load(simd, self.row.as_ptr().add(i * T::SIZE)));
            }
            for i in whole..len {
                self.out[i] = T::get(self.row.as_ptr().add(i * T::SIZE));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn indices_outside_are_named() {
        let error = check_indices("embed", "id", &[0, 4, -1], 4).unwrap_err().to_string();
        assert_eq!(error, "embed: expected id 1 in 0..4, found 4");
        assert!(check_indices("embed", "id", &[-1], 4).is_err());
        assert!(check_indices("embed", "id", &[0, 3], 4).is_ok());
    }
}

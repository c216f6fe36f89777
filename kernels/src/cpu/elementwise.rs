//! The gate of the MLPs, and pixels to numbers.

use super::{
    Cpu, math,
    simd::{Kernel, Simd},
    storage::Shared,
};
use crate::{Result, Tensor, check};

/// Elements above which threads share the work.
const PARALLEL_ELEMENTS: usize = 1 << 15;

/// Elements of a task, at most.
const TASK_ELEMENTS: usize = 1 << 13;

/// [`Backend::silu_and_mul`](crate::Backend::silu_and_mul).
pub(crate) fn silu_and_mul(cpu: &Cpu, x: &Tensor<Cpu>, out: &mut Tensor<Cpu>) -> Result<()> {
    check::silu_and_mul(cpu, x, out)?;
    let cols = out.cols();
    let x: &[f32] = x.storage.slice(x.elements());
    let (len, pieces) = (out.rows() * cols, cols.div_ceil(TASK_ELEMENTS));
    let tiles = out.rows() * pieces;
    let out = Shared::new(out.storage.slice_mut(out.elements()));
    cpu.for_each(len >= PARALLEL_ELEMENTS, tiles, |i| {
        let (row, start) = (i / pieces, i % pieces * TASK_ELEMENTS);
        let end = cols.min(start + TASK_ELEMENTS);
        let (gate, up) = x[row * 2 * cols..(row + 1) * 2 * cols].split_at(cols);
        // SAFETY: each piece of the output belongs to one tile.
        let out = unsafe { out.part(row * cols + start..row * cols + end) };
        cpu.level().run(SiluAndMul { gate: &gate[start..end], up: &up[start..end], out });
    });
    Ok(())
}

struct SiluAndMul<'a> {
    gate: &'a [f32],
    up: &'a [f32],
    out: &'a mut [f32],
}

impl Kernel for SiluAndMul<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let len = self.out.len().min(self.gate.len()).min(self.up.len());
        let (gate, up, out) = (self.gate.as_ptr(), self.up.as_ptr(), self.out.as_mut_ptr());
        let whole = len - len % S::LANES;
        // SAFETY: what is loaded and stored is below `len`.
        unsafe {
            for i in (0..whole).step_by(S::LANES) {
                simd.store(out.add(i), simd.mul(math::silu(simd, simd.load(gate.add(i))), simd.load(up.add(i))));
            }
            if whole < len {
                let (gate, up) = (simd.load_head(gate.add(whole), len - whole), simd.load_head(up.add(whole), len - whole));
                simd.store_head(out.add(whole), simd.mul(math::silu(simd, gate), up), len - whole);
            }
        }
    }
}

/// [`Backend::normalize_patches`](crate::Backend::normalize_patches).
pub(crate) fn normalize_patches(cpu: &Cpu, pixels: &Tensor<Cpu>, table: &Tensor<Cpu>, out: &mut Tensor<Cpu>) -> Result<()> {
    check::normalize_patches(cpu, pixels, table, out)?;
    let (rows, cols, area) = (pixels.rows(), pixels.cols(), pixels.cols() / table.rows());
    let pixels: &[u8] = pixels.storage.slice(pixels.elements());
    let table: &[f32] = table.storage.slice(table.elements());
    let out = Shared::new(out.storage.slice_mut(out.elements()));
    cpu.for_each(pixels.len() >= PARALLEL_ELEMENTS, rows, |row| {
        let part = row * cols..(row + 1) * cols;
        // SAFETY: each row of the output belongs to one tile.
        let out = unsafe { out.part(part.clone()) };
        let channels = pixels[part].chunks_exact(area.max(1)).zip(out.chunks_exact_mut(area.max(1)));
        for ((pixels, out), table) in channels.zip(table.as_chunks::<256>().0) {
            for (out, pixel) in out.iter_mut().zip(pixels) {
                *out = table[usize::from(*pixel)];
            }
        }
    });
    Ok(())
}

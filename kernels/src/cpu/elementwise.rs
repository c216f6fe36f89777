//! The gate of the MLPs, and pixels to numbers.

use super::{
    Cpu, math,
    simd::{Kernel, Simd},
    storage::Shared,
};
use crate::{Error, Pictures, Result, Tensor, check};

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

/// [`Backend::patchify`](crate::Backend::patchify).
pub(crate) fn patchify(cpu: &Cpu, pictures: &Pictures<'_, Cpu>, out: &mut Tensor<Cpu>) -> Result<()> {
    check::patchify(cpu, pictures, out)?;
    let Pictures { pixels, origins, widths, table, patch_size } = *pictures;
    let (rows, cols, channels) = (out.rows(), out.cols(), table.rows());
    let pixels: &[u8] = pixels.storage.slice(pixels.elements());
    let (origins, widths): (&[i32], &[i32]) = (origins.storage.slice(origins.elements()), widths.storage.slice(widths.elements()));
    let table: &[f32] = table.storage.slice(table.elements());
    let limit = pixels.len() / channels.max(1);
    // Pixels from the first one of a row of a patch on.
    let place = |patch: usize, y: usize| -> Option<usize> {
        let (origin, width) = (usize::try_from(origins[patch]).ok()?, usize::try_from(widths[patch]).ok()?);
        origin.checked_add(y.checked_mul(width)?)
    };
    let is_within = |patch| place(patch, patch_size.saturating_sub(1)).is_some_and(|last| last + patch_size <= limit);
    if let Some(patch) = (0..rows).find(|patch| !is_within(*patch)) {
        let (origin, width) = (origins[patch], widths[patch]);
        let what = format!("expected patches within {limit} pixels, found patch {patch} from pixel {origin} on in rows of {width}");
        return Err(Error::shape("patchify", what));
    }
    let out = Shared::new(out.storage.slice_mut(out.elements()));
    cpu.for_each(rows * cols >= PARALLEL_ELEMENTS, rows, |patch| {
        // SAFETY: each row of the output belongs to one tile.
        let out = unsafe { out.part(patch * cols..(patch + 1) * cols) };
        for y in 0..patch_size {
            let first = place(patch, y).expect("patches are within the pixels") * channels;
            let row = &pixels[first..first + patch_size * channels];
            for (channel, table) in table.as_chunks::<256>().0.iter().enumerate() {
                let out = &mut out[(channel * patch_size + y) * patch_size..][..patch_size];
                for (out, pixel) in out.iter_mut().zip(row.chunks_exact(channels)) {
                    *out = table[usize::from(pixel[channel])];
                }
            }
        }
    });
    Ok(())
}

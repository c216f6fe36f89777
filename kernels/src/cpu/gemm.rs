//! Matrix product for many rows: blocks of the weight are widened and packed into the cache of a core, rows of `x` pass by.
//!
//! Per task and block of `KC` input features: pack `features x KC` of the weight (it stays in the L2 cache), then for each
//! `MR` rows of `x`: pack them (L1), and run the register tile along the packed weight. A sum takes its terms in an order
//! that depends on neither the number of rows nor that of threads.

use super::{
    Cpu,
    linear::{Block, Linear},
    micro::{NV, Stored, even_pieces, pack_broadcast, tile, with_rows, with_stored},
    simd::{Isa, Kernel, MAX_LANES, Simd},
    storage::{Scratch, scratch},
};
use std::{marker::PhantomData, ops::Range};

/// Input features of a block: `MR` packed rows of it take 18 of the 32 KiB of an L1 cache.
const KC: usize = 384;

/// Most rows of a task: enough to pay for packing the weight.
const MC: usize = 384;

/// Multiplications above which threads share the work: some 50 µs.
const PARALLEL_MULS: usize = 1 << 21;

/// Tasks per thread, so that a thread that loses its core for a while is not waited for long.
const TASKS_PER_THREAD: usize = 6;

pub(crate) fn run(cpu: &Cpu, op: &Linear<'_>) {
    // The packed weight of a task fits L2: 576 KiB of 1 MiB where there is AVX-512, 384 KiB of 512 KiB elsewhere.
    let (sliver, most) = match cpu.level().isa() {
        Isa::Avx512 => (32, 384),
        Isa::Avx2 => (16, 256),
        Isa::Portable => (8, 256),
    };
    let threads = if op.n * op.k * op.features < PARALLEL_MULS { 1 } else { cpu.pool().threads() };
    let row_blocks = op.n.div_ceil(MC);
    let wanted = (TASKS_PER_THREAD * threads).div_ceil(row_blocks).min(op.features.div_ceil(2 * sliver)).max(op.features.div_ceil(most));
    let width = op.features.div_ceil(wanted).next_multiple_of(sliver);
    let feature_blocks = op.features.div_ceil(width);
    let task = |i: usize| {
        let (feature_block, row_block) = (i / row_blocks, i % row_blocks);
        let rows = op.n * row_block / row_blocks..op.n * (row_block + 1) / row_blocks;
        let features = feature_block * width..op.features.min((feature_block + 1) * width);
        scratch(Scratch::Panel, width * KC, |panel| {
            scratch(Scratch::Sliver, (KC + 1) * MAX_LANES, |sliver| {
                with_stored!(op.weight.dtype(), T => cpu.level().run(Task::<T> { op, rows, features, panel, sliver, stored: PhantomData }));
            });
        });
    };
    cpu.for_each(threads > 1, feature_blocks * row_blocks, task);
}

/// Rows times features of the output.
struct Task<'a, T> {
    op: &'a Linear<'a>,
    rows: Range<usize>,
    features: Range<usize>,
    /// `[features / (NV LANES), KC, NV LANES]`: the packed weight.
    panel: &'a mut [f32],
    /// `[KC, MR]`: packed rows of `x`.
    sliver: &'a mut [f32],
    stored: PhantomData<T>,
}

impl<T: Stored> Kernel for Task<'_, T> {
    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        let k = self.op.k;
        for start in (0..k.max(1)).step_by(KC) {
            let depth = KC.min(k - start);
            let block = Block { is_first: start == 0, is_last: start + depth == k };
            self.pack_weight(simd, start, depth);
            for (first, end) in even_pieces(self.rows.len(), S::MR) {
                let row = self.rows.start + first;
                self.pack_rows(simd, row, end - first, start, depth);
                for i in 0..self.features.len().div_ceil(NV * S::LANES) {
                    with_rows!(S, end - first, M => self.tile::<S, M>(simd, row, i, depth, block));
                }
            }
        }
    }
}

impl<T: Stored> Task<'_, T> {
    #[inline(always)]
    fn pack_weight<S: Simd>(&mut self, simd: S, start: usize, depth: usize) {
        let width = NV * S::LANES;
        for (i, sliver) in self.panel.chunks_exact_mut(KC * width).enumerate() {
            for v in 0..NV {
                let feature = self.features.start + i * width + v * S::LANES;
                if feature >= self.features.end {
                    break;
                }
                // Beyond the last feature the last one stands in; its products are not stored.
                let rows = self.op.weight.row_starts(feature, S::LANES, self.features.end - 1, start * T::SIZE);
                // SAFETY: the rows have `k >= start + depth` elements; the sliver holds `depth <= KC` rows of `width`.
                unsafe { T::pack(simd, &rows, depth, sliver.as_mut_ptr().add(v * S::LANES), width) }
            }
        }
    }

    #[inline(always)]
    fn pack_rows<S: Simd>(&mut self, simd: S, row: usize, rows: usize, start: usize, depth: usize) {
        let mut sources = [self.op.x.as_ptr(); MAX_LANES];
        for (i, source) in sources.iter_mut().enumerate().take(rows) {
            *source = self.op.x[(row + i) * self.op.k + start..].as_ptr();
        }
        // SAFETY: each row has `depth` elements from `start` on; the sliver has `(KC + 1) * MAX_LANES`.
        unsafe { pack_broadcast(simd, &sources[..rows], depth, self.sliver.as_mut_ptr()) }
    }

    #[inline(always)]
    fn tile<S: Simd, const M: usize>(&mut self, simd: S, row: usize, i: usize, depth: usize, block: Block) {
        let width = NV * S::LANES;
        // SAFETY: both operands were packed for `depth`.
        let acc = unsafe { tile::<S, M>(simd, self.sliver.as_ptr(), S::MR, self.panel[i * KC * width..].as_ptr(), depth) };
        for (m, acc) in acc.into_iter().enumerate() {
            for (v, value) in acc.into_iter().enumerate() {
                let column = self.features.start + i * width + v * S::LANES;
                let lanes = S::LANES.min(self.features.end.saturating_sub(column));
                if lanes > 0 {
                    // SAFETY: within the features of this task, which no other task has for these rows.
                    unsafe { self.op.store(simd, value, row + m, column, lanes, block) }
                }
            }
        }
    }
}

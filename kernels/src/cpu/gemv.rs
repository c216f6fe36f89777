//! Matrix-vector product for few rows: the weight is read once, at the speed of the memory.
//!
//! A sum is kept as one vector of partial sums along the input features, whatever the number of rows, so a row's result does
//! not depend on what else is in the batch.

use super::{
    Cpu,
    linear::{Block, Linear, STREAMED_ROWS},
    micro::{Stored, even_pieces, with_stored},
    simd::{Kernel, Simd},
};
use std::{marker::PhantomData, ops::Range};

/// Output features of a task: a multiple of those that are summed together.
const FEATURES: usize = 96;

/// Bytes of weight above which threads share the work: some 10 µs of reading.
const PARALLEL_BYTES: usize = 256 << 10;

/// What a prefetch brings.
const LINE_BYTES: usize = 64;

/// How far ahead of the sums each weight row is asked for.
const PREFETCH_BYTES: usize = 256;

pub(crate) fn run(cpu: &Cpu, op: &Linear<'_>) {
    let task = |i: usize| {
        let features = i * FEATURES..op.features.min((i + 1) * FEATURES);
        with_stored!(op.weight.dtype(), T => cpu.level().run(Task::<T> { op, features, stored: PhantomData }));
    };
    let parallel = op.features * op.weight.row_bytes() >= PARALLEL_BYTES;
    cpu.for_each(parallel, op.features.div_ceil(FEATURES), task);
}

/// All rows times a range of output features.
struct Task<'a, T> {
    op: &'a Linear<'a>,
    features: Range<usize>,
    stored: PhantomData<T>,
}

impl<T: Stored> Kernel for Task<'_, T> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let mut sums = [[0f32; FEATURES]; STREAMED_ROWS];
        let mut feature = self.features.start;
        while feature < self.features.end {
            let run = self.op.weight.run(feature..self.features.end);
            let count = run.len() / self.op.weight.row_bytes().max(1);
            if count == 0 {
                break;
            }
            // As many features at a time as the registers have room for sums.
            let group = if S::REGISTERS >= 32 { [8, 8, 4, 4] } else { [8, 4, 3, 3] }[self.op.n.min(4) - 1];
            let mut done = 0;
            while done < count {
                let features = if count - done >= group { group } else { 1 };
                let bytes = &run[done * self.op.weight.row_bytes()..];
                let at = feature + done - self.features.start;
                // What the first rows of `x` bring into the cache serves the others.
                for (first, end) in even_pieces(self.op.n, 4) {
                    let sums = &mut sums[first..end];
                    match (end - first, features) {
                        (1, 1) => self.dots::<S, 1, 1>(simd, bytes, first, sums, at),
                        (2, 1) => self.dots::<S, 1, 2>(simd, bytes, first, sums, at),
                        (3, 1) => self.dots::<S, 1, 3>(simd, bytes, first, sums, at),
                        (4, 1) => self.dots::<S, 1, 4>(simd, bytes, first, sums, at),
                        (1, 8) => self.dots::<S, 8, 1>(simd, bytes, first, sums, at),
                        (2, 8) => self.dots::<S, 8, 2>(simd, bytes, first, sums, at),
                        (2, 4) => self.dots::<S, 4, 2>(simd, bytes, first, sums, at),
                        (3, 4) => self.dots::<S, 4, 3>(simd, bytes, first, sums, at),
                        (4, 4) => self.dots::<S, 4, 4>(simd, bytes, first, sums, at),
                        (2, 3) => self.dots::<S, 3, 2>(simd, bytes, first, sums, at),
                        (3, 3) => self.dots::<S, 3, 3>(simd, bytes, first, sums, at),
                        (4, 3) => self.dots::<S, 3, 4>(simd, bytes, first, sums, at),
                        _ => {}
                    }
                }
                done += features;
            }
            feature += count;
        }
        self.finish(simd, &sums[..self.op.n]);
    }
}

impl<T: Stored> Task<'_, T> {
    /// Sums of `R` features, whose weights begin with `bytes`, with `N` rows of `x` from `first` on.
    #[inline(always)]
    fn dots<S: Simd, const R: usize, const N: usize>(&self, simd: S, bytes: &[u8], first: usize, sums: &mut [[f32; FEATURES]], at: usize) {
        let (k, stride) = (self.op.k, self.op.weight.row_bytes());
        let (w, x) = (bytes.as_ptr(), self.op.x[first * k..].as_ptr());
        let mut acc = [[simd.splat(0.0); N]; R];
        // A cache line of each weight row at a time; what is ahead of its end is the start of a row of the next group.
        let vectors = LINE_BYTES / (T::SIZE * S::LANES);
        let step = vectors * S::LANES;
        let whole = k - k % step;
        let near = k.saturating_sub(PREFETCH_BYTES / T::SIZE);
        let mut i = 0;
        while i < whole {
            let ahead = PREFETCH_BYTES + if i < near { 0 } else { (R - 1) * stride };
            for r in 0..R {
                simd.prefetch(w.wrapping_add(r * stride + i * T::SIZE + ahead));
            }
            for v in 0..vectors {
                let i = i + v * S::LANES;
                // SAFETY: `i + LANES <= k`, which is the length of the rows of `x` and of the `R` rows of the weight.
                unsafe { Self::add::<S, R, N>(simd, &mut acc, w.add(i * T::SIZE), stride, x.add(i), k) }
            }
            i += step;
        }
        while i + S::LANES <= k {
            // SAFETY: as above.
            unsafe { Self::add::<S, R, N>(simd, &mut acc, w.add(i * T::SIZE), stride, x.add(i), k) }
            i += S::LANES;
        }
        if i < k {
            // SAFETY: `k - i` elements are left in every row.
            unsafe {
                for (r, acc) in acc.iter_mut().enumerate() {
                    let wide = T::load_head(simd, w.add(r * stride + i * T::SIZE), k - i);
                    for (n, acc) in acc.iter_mut().enumerate() {
                        *acc = simd.fma(wide, simd.load_head(x.add(n * k + i), k - i), *acc);
                    }
                }
            }
        }
        for (r, acc) in acc.into_iter().enumerate() {
            for (sums, acc) in sums.iter_mut().zip(acc) {
                sums[at + r] = simd.reduce_add(acc);
            }
        }
    }

    /// One vector of each row.
    ///
    /// # Safety
    /// `w` is readable for a vector in `R` rows at a distance of `stride` bytes, `x` in `N` at a distance of `k`.
    #[inline(always)]
    unsafe fn add<S: Simd, const R: usize, const N: usize>(
        simd: S,
        acc: &mut [[S::V; N]; R],
        w: *const u8,
        stride: usize,
        x: *const f32,
        k: usize,
    ) {
        // SAFETY: the caller's promise.
        unsafe {
            let mut wide = [simd.splat(0.0); R];
            for (r, wide) in wide.iter_mut().enumerate() {
                *wide = T::load(simd, w.add(r * stride));
            }
            for n in 0..N {
                let x = simd.load(x.add(n * k));
                for (acc, wide) in acc.iter_mut().zip(wide) {
                    acc[n] = simd.fma(wide, x, acc[n]);
                }
            }
        }
    }

    #[inline(always)]
    fn finish<S: Simd>(&self, simd: S, sums: &[[f32; FEATURES]]) {
        for (row, sums) in sums.iter().enumerate() {
            for column in (0..self.features.len()).step_by(S::LANES) {
                let lanes = S::LANES.min(self.features.len() - column);
                // SAFETY: `sums` is whole vectors; the columns are this task's own.
                unsafe {
                    let value = simd.load(sums.as_ptr().add(column));
                    let block = Block { is_first: true, is_last: true };
                    self.op.store(simd, value, row, self.features.start + column, lanes, block);
                }
            }
        }
    }
}

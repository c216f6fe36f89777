//! Paged attention for few entries per key head: keys and values are read once, at the speed of the memory.
//!
//! Long contexts are split (Flash-Decoding, Dao et al. 2023): splits begin at multiples of [`SPLIT`] positions, so a row's
//! result depends on neither batch nor threads. A split has all heads, since their keys lie side by side. Each leaves its maximum, its sum and its unscaled result per
//! entry, which a second pass puts together in order.

use super::{
    Cpu,
    attention::{Keys, Queries, locate},
    math,
    paged::{Sequence, Step},
    simd::{Kernel, MAX_LANES, Simd},
    storage::{Scratch, Shared, scratch},
};
use std::ops::Range;

/// Most entries per key head; more fill the lanes of a register tile well enough.
pub(crate) const MAX_ENTRIES: usize = 8;

/// Positions of a split.
const SPLIT: usize = 128;

/// Keys that are visited head by head. While they are, the next ones are asked for in the order of the memory: head by head
/// the memory would give half of its bandwidth.
const RUN: usize = 8;

/// Floats that a split leaves per entry: maximum, sum and a result.
fn partial(head_dim: usize) -> usize {
    head_dim + 2
}

/// All sequences with at most [`MAX_ENTRIES`] entries.
pub(crate) fn run(cpu: &Cpu, parallel: bool, step: &Step<'_>, sequences: &[Sequence<'_>]) {
    let (heads, head_dim) = (step.shape.num_kv_heads, step.shape.head_dim);
    let splits = |i: usize| {
        let seen = &sequences[i].seen;
        seen.start / SPLIT..seen.end.div_ceil(SPLIT)
    };
    let is_short = |i: usize| step.entries(&sequences[i]) <= MAX_ENTRIES;
    let tiles_of = |i: usize| if is_short(i) { splits(i).len() } else { 0 };
    let tiles: usize = (0..sequences.len()).map(tiles_of).sum();
    let size = MAX_ENTRIES * partial(head_dim);
    scratch(Scratch::Partials, tiles * heads * size, |partials| {
        let shared = Shared::new(partials);
        cpu.for_each(parallel, tiles, |tile| {
            let (i, split) = locate(tile, tiles_of);
            let (sequence, split) = (&sequences[i], splits(i).start + split);
            let range = sequence.seen.start.max(split * SPLIT)..sequence.seen.end.min((split + 1) * SPLIT);
            // SAFETY: each tile has its own part.
            let out = unsafe { shared.part(tile * heads * size..(tile + 1) * heads * size) };
            let stride = head_dim.next_multiple_of(MAX_LANES);
            scratch(Scratch::Attention, heads * MAX_ENTRIES * (stride + SPLIT), |memory| {
                cpu.level().run(Split { step, sequence, range, memory, out });
            });
        });
        cpu.for_each(parallel, sequences.len(), |i| {
            if !is_short(i) {
                return;
            }
            let first: usize = (0..i).map(tiles_of).sum();
            // SAFETY: the splits are done, and these are of this sequence alone.
            let partials = unsafe { shared.part(first * heads * size..(first + tiles_of(i)) * heads * size) };
            for head in 0..heads {
                let (queries, _) = step.head(&sequences[i], head);
                for entry in 0..step.entries(&sequences[i]) {
                    let at = head * size + entry * partial(head_dim);
                    let splits = partials.chunks_exact(heads * size).map(|split| &split[at..at + partial(head_dim)]);
                    combine(&queries, entry, splits);
                }
            }
        });
    });
}

/// One split of all key heads.
struct Split<'a> {
    step: &'a Step<'a>,
    sequence: &'a Sequence<'a>,
    /// Positions.
    range: Range<usize>,
    /// Queries and scores, see [`Split::attend`].
    memory: &'a mut [f32],
    /// `[heads, MAX_ENTRIES, partial]`
    out: &'a mut [f32],
}

impl Kernel for Split<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        // Some sums too many for 3, 5, 6 and 7 entries: groups are powers of two.
        match self.step.entries(self.sequence) {
            0 => {}
            1 => self.attend::<S, 1>(simd),
            2 => self.attend::<S, 2>(simd),
            3 | 4 => self.attend::<S, 4>(simd),
            _ => self.attend::<S, 8>(simd),
        }
    }
}

impl Split<'_> {
    #[inline(always)]
    fn attend<S: Simd, const E: usize>(self, simd: S) {
        let Self { step, sequence, range, memory, out } = self;
        let (heads, head_dim, entries) = (step.shape.num_kv_heads, step.shape.head_dim, step.entries(sequence));
        let stride = head_dim.next_multiple_of(S::LANES);
        // `[heads, E, stride]` scaled queries, padded with zeros; `[heads, E, SPLIT]` scores.
        let (q, scores) = memory.split_at_mut(heads * E * stride);
        q.fill(0.0);
        for (head, q) in q.chunks_exact_mut(E * stride).enumerate() {
            let (queries, _) = step.head(sequence, head);
            for (entry, q) in q.chunks_exact_mut(stride).enumerate().take(entries) {
                q.iter_mut().zip(queries.entry(entry)).for_each(|(to, from)| *to = from * queries.scale);
            }
        }
        let (queries, keys) = step.head(sequence, 0);
        let mut rows = [0; SPLIT];
        for (row, t) in rows.iter_mut().zip(range.clone()) {
            *row = keys.row(t);
        }
        let rows = &rows[..range.len()];
        match (S::REGISTERS >= 32, E) {
            (true, 1 | 2 | 4) | (false, 1 | 2) => score::<S, E, 4>(simd, &keys, rows, q, head_dim, scores),
            (true, _) | (false, 4) => score::<S, E, 2>(simd, &keys, rows, q, head_dim, scores),
            _ => score::<S, E, 1>(simd, &keys, rows, q, head_dim, scores),
        }
        for head in 0..heads {
            for entry in 0..E {
                let scores = &mut scores[(head * E + entry) * SPLIT..][..SPLIT];
                if entry < entries {
                    let seen = queries.visible.of_row(entry / queries.group);
                    let count = range.len();
                    scores[..seen.start.saturating_sub(range.start).min(count)].fill(f32::NEG_INFINITY);
                    scores[seen.end.saturating_sub(range.start).min(count)..count].fill(f32::NEG_INFINITY);
                }
                let out = &mut out[(head * MAX_ENTRIES + entry) * partial(head_dim)..][..partial(head_dim)];
                (out[0], out[1]) = softmax(simd, scores, range.len());
                out[2..].fill(0.0);
            }
        }
        for start in (0..rows.len()).step_by(RUN) {
            let (run, next) = rows[start..].split_at(RUN.min(rows.len() - start));
            let ahead = &mut Ahead::new(keys.v, keys.v_stride, next);
            for head in 0..heads {
                let values = Rows { data: &keys.v[head * head_dim..], stride: keys.v_stride, rows: run, head_dim };
                let scores = &scores[head * E * SPLIT + start..];
                let out = &mut out[head * MAX_ENTRIES * partial(head_dim)..];
                let mut column = 0;
                while column < head_dim {
                    if column + 4 * S::LANES <= head_dim && E * 4 + 5 <= S::REGISTERS {
                        weigh::<S, E, 4>(simd, &values, scores, column, out, ahead);
                        column += 4 * S::LANES;
                    } else if column + 2 * S::LANES <= head_dim {
                        weigh::<S, E, 2>(simd, &values, scores, column, out, ahead);
                        column += 2 * S::LANES;
                    } else {
                        weigh::<S, E, 1>(simd, &values, scores, column, out, ahead);
                        column += S::LANES;
                    }
                }
            }
        }
    }
}

/// `scores[(head * E + entry) * SPLIT + i]` = the query of the entry times the key in `rows[i]`, `K` keys at a time.
#[inline(always)]
fn score<S: Simd, const E: usize, const K: usize>(
    simd: S,
    keys: &Keys<'_>,
    rows: &[usize],
    q: &[f32],
    head_dim: usize,
    scores: &mut [f32],
) {
    let stride = head_dim.next_multiple_of(S::LANES);
    let heads = q.len() / (E * stride);
    for start in (0..rows.len()).step_by(RUN) {
        let (run, next) = rows[start..].split_at(RUN.min(rows.len() - start));
        // After the last keys come the first values.
        let mut ahead = match next.is_empty() {
            false => Ahead::new(keys.k, keys.k_stride, next),
            true => Ahead::new(keys.v, keys.v_stride, rows),
        };
        for head in 0..heads {
            let (k, q) = (&keys.k[head * head_dim..], &q[head * E * stride..]);
            for first in (0..run.len()).step_by(K) {
                let keys = Rows { data: k, stride: keys.k_stride, rows: &run[first..], head_dim };
                let scores = &mut scores[head * E * SPLIT + start + first..];
                score_keys::<S, E, K>(simd, &keys, q, scores, &mut ahead);
            }
        }
    }
}

/// The first `K` of `rows`, or as many as there are, of one head.
#[inline(always)]
fn score_keys<S: Simd, const E: usize, const K: usize>(simd: S, keys: &Rows<'_>, q: &[f32], scores: &mut [f32], ahead: &mut Ahead<'_>) {
    let Rows { data, rows, head_dim, .. } = *keys;
    let stride = head_dim.next_multiple_of(S::LANES);
    let whole = head_dim - head_dim % S::LANES;
    let mut k = [std::ptr::null(); K];
    for (i, k) in k.iter_mut().enumerate() {
        // The last key stands in for those beyond.
        *k = data[rows[i.min(rows.len() - 1)] * keys.stride..][..head_dim].as_ptr();
    }
    let mut acc = [[simd.splat(0.0); K]; E];
    for j in (0..head_dim).step_by(S::LANES) {
        ahead.ask(simd, K * S::LANES);
        let mut part = [simd.splat(0.0); K];
        // SAFETY: `j` is below `head_dim`, which the keys have; queries are padded to whole vectors.
        unsafe {
            for (part, k) in part.iter_mut().zip(k) {
                *part = if j < whole { simd.load(k.add(j)) } else { simd.load_head(k.add(j), head_dim - j) };
            }
            for (entry, acc) in acc.iter_mut().enumerate() {
                let q = simd.load(q.as_ptr().add(entry * stride + j));
                for (acc, part) in acc.iter_mut().zip(part) {
                    *acc = simd.fma(part, q, *acc);
                }
            }
        }
    }
    for (entry, acc) in acc.into_iter().enumerate() {
        let mut four = [acc[0]; 4];
        four[..K].copy_from_slice(&acc);
        let sums = simd.reduce_add4(four);
        let count = K.min(rows.len());
        scores[entry * SPLIT..][..count].copy_from_slice(&sums[..count]);
    }
}

/// Turns `count` scores into exponentials; gives their maximum and their sum.
#[inline(always)]
fn softmax<S: Simd>(simd: S, scores: &mut [f32], count: usize) -> (f32, f32) {
    // What fills the last vector counts for nothing.
    let padded = count.next_multiple_of(S::LANES);
    scores[count..padded].fill(f32::NEG_INFINITY);
    let mut max = simd.splat(f32::NEG_INFINITY);
    let p = scores.as_mut_ptr();
    // SAFETY: `i` is below `padded`, which is at most `SPLIT`, the length of `scores`.
    unsafe {
        for i in (0..padded).step_by(S::LANES) {
            max = simd.max(max, simd.load(p.add(i)));
        }
        let max = simd.reduce_max(max);
        let base = simd.splat(max.max(-1e30));
        let mut sum = simd.splat(0.0);
        for i in (0..padded).step_by(S::LANES) {
            let e = math::exp2_nonpositive(simd, simd.sub(simd.load(p.add(i)), base));
            simd.store(p.add(i), e);
            sum = simd.add(sum, e);
        }
        (max, simd.reduce_add(sum))
    }
}

/// Keys or values of one head in some rows.
struct Rows<'a> {
    data: &'a [f32],
    stride: usize,
    rows: &'a [usize],
    head_dim: usize,
}

/// Adds the values, weighed by `scores`, to `V` vectors of columns of each entry's result.
#[inline(always)]
fn weigh<S: Simd, const E: usize, const V: usize>(
    simd: S,
    values: &Rows<'_>,
    scores: &[f32],
    column: usize,
    out: &mut [f32],
    ahead: &mut Ahead<'_>,
) {
    let head_dim = values.head_dim;
    let lanes = S::LANES.min(head_dim - column);
    let mut acc = [[simd.splat(0.0); V]; E];
    for (i, row) in values.rows.iter().enumerate() {
        ahead.ask(simd, V * S::LANES);
        let value = &values.data[row * values.stride..][..head_dim];
        let mut v = [simd.splat(0.0); V];
        for (j, v) in v.iter_mut().enumerate() {
            // SAFETY: with `V` above 1 the vectors are whole; the last one alone may have fewer lanes.
            *v = unsafe {
                let p = value.as_ptr().add(column + j * S::LANES);
                if lanes == S::LANES { simd.load(p) } else { simd.load_head(p, lanes) }
            };
        }
        for (entry, acc) in acc.iter_mut().enumerate() {
            let p = simd.splat(scores[entry * SPLIT + i]);
            for (acc, v) in acc.iter_mut().zip(v) {
                *acc = simd.fma(p, v, *acc);
            }
        }
    }
    for (entry, acc) in acc.into_iter().enumerate() {
        for (j, acc) in acc.into_iter().enumerate() {
            let out = &mut out[entry * partial(head_dim) + 2 + column + j * S::LANES..];
            // SAFETY: the columns are below `head_dim`.
            unsafe {
                if lanes == S::LANES {
                    simd.store(out.as_mut_ptr(), simd.add(acc, simd.load(out.as_ptr())));
                } else {
                    simd.store_head(out.as_mut_ptr(), simd.add(acc, simd.load_head(out.as_ptr(), lanes)), lanes);
                }
            }
        }
    }
}

/// Asks for the rows of the next run in the order of the memory, a little with each step of the sums: many at once would stop
/// the core until the memory has taken them.
struct Ahead<'a> {
    data: &'a [f32],
    stride: usize,
    rows: &'a [usize],
    /// In the first of `rows`.
    offset: usize,
}

impl<'a> Ahead<'a> {
    #[inline(always)]
    fn new(data: &'a [f32], stride: usize, rows: &'a [usize]) -> Self {
        Self { data, stride, rows: &rows[..rows.len().min(RUN)], offset: 0 }
    }

    /// As many elements as the step has used up.
    #[inline(always)]
    fn ask<S: Simd>(&mut self, simd: S, len: usize) {
        const LINE: usize = 16;
        let Some(row) = self.rows.first() else { return };
        let start = self.data.as_ptr().wrapping_add(row * self.stride);
        for at in (self.offset.next_multiple_of(LINE)..self.offset + len).step_by(LINE) {
            simd.prefetch(start.wrapping_add(at).cast());
        }
        self.offset += len;
        if self.offset >= self.stride {
            self.offset -= self.stride;
            self.rows = &self.rows[1..];
        }
    }
}

/// Puts the splits of one entry together.
fn combine<'a>(queries: &Queries<'_>, entry: usize, splits: impl Iterator<Item = &'a [f32]> + Clone) {
    let max = splits.clone().map(|split| split[0]).fold(-1e30, f32::max);
    // SAFETY: the entries of a sequence and head are of one tile, which has each once.
    let out = unsafe { queries.result(entry) };
    out.fill(0.0);
    let mut sum = 0.0;
    for split in splits {
        let weight = (split[0] - max).exp2();
        sum += split[1] * weight;
        out.iter_mut().zip(&split[2..]).for_each(|(out, value)| *out += value * weight);
    }
    let factor = if sum == 0.0 { 0.0 } else { 1.0 / sum };
    out.iter_mut().for_each(|out| *out *= factor);
}

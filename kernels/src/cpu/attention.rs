//! Attention that never stores its scores: FlashAttention-2 (Dao 2023) in register tiles, with the queries in the lanes.
//!
//! A task has one key head and up to [`TASK_ENTRIES`] entries; an entry is one query row of one head of the group that shares
//! the key head. Two vectors of entries are a panel. Per block of [`KEYS`] keys and per panel: `S^T = K Q^T`, the online
//! softmax down the keys, `O^T = O^T alpha + V^T P^T`. So maxima, sums and rescaling need no step across lanes, and neither
//! scores nor values are transposed.
//!
//! Blocks of keys begin at multiples of [`KEYS`], so what a row sees is summed in an order that depends on its position
//! alone: a prompt gives the same bits in one piece and in chunks.

use super::{
    Cpu, math,
    micro::{NV, even_pieces, pack_broadcast, tile, with_rows},
    simd::{Kernel, MAX_LANES, Simd},
    storage::{Scratch, Shared, scratch},
};
use crate::{AttentionShape, Error, Result, Tensor, VarlenAttention, check};
use std::ops::Range;

/// Keys of a block: a multiple of the tile rows of all instruction sets, and their scores fill half of an L1 cache.
pub(crate) const KEYS: usize = 120;

/// Most entries of a task: packing a block of keys and values is shared by as many.
pub(crate) const TASK_ENTRIES: usize = 256;

/// Multiplications above which threads share the work.
pub(crate) const PARALLEL_MULS: usize = 1 << 19;

/// Keys and values of one sequence and key head.
#[derive(Clone, Copy)]
pub(crate) struct Keys<'a> {
    /// Keys, from the first element of the head in row 0 on.
    pub(crate) k: &'a [f32],
    /// Values, likewise.
    pub(crate) v: &'a [f32],
    /// Elements from one row of keys to the next.
    pub(crate) k_stride: usize,
    /// Elements from one row of values to the next.
    pub(crate) v_stride: usize,
    /// Where the rows are if they are in blocks: the blocks in order, and the rows of one. All that is visible was checked.
    pub(crate) blocks: Option<(&'a [i32], usize)>,
}

impl Keys<'_> {
    /// The row of position `t`.
    #[inline(always)]
    pub(crate) fn row(&self, t: usize) -> usize {
        match self.blocks {
            None => t,
            Some((table, size)) => table[t / size] as usize * size + t % size,
        }
    }

    /// The key and the value at position `t`.
    #[inline(always)]
    pub(crate) fn at(&self, t: usize, head_dim: usize) -> (&[f32], &[f32]) {
        let row = self.row(t);
        (&self.k[row * self.k_stride..][..head_dim], &self.v[row * self.v_stride..][..head_dim])
    }
}

/// Queries of one sequence and the heads of one group, and where their results go.
#[derive(Clone, Copy)]
pub(crate) struct Queries<'a> {
    /// From the group's first element in the sequence's first row on.
    pub(crate) q: &'a [f32],
    pub(crate) q_stride: usize,
    pub(crate) out: Shared<'a>,
    /// Index of the group's first element in the sequence's first row.
    pub(crate) out_start: usize,
    pub(crate) out_stride: usize,
    /// Heads of the group.
    pub(crate) group: usize,
    pub(crate) head_dim: usize,
    /// Factor of the scores, for a softmax in base 2.
    pub(crate) scale: f32,
    pub(crate) visible: Visible<'a>,
}

/// The keys that a row sees.
#[derive(Clone, Copy)]
pub(crate) enum Visible<'a> {
    /// Row `i`, at `positions[i]`, sees up to itself, at most `window` keys, of `len`.
    Causal { positions: &'a [i32], window: usize, len: usize },
    /// Every row sees as many.
    All(usize),
}

impl Visible<'_> {
    /// Those of one row.
    pub(crate) fn of_row(&self, row: usize) -> Range<usize> {
        match *self {
            Self::All(len) => 0..len,
            Self::Causal { positions, window, len } => {
                let seen = usize::try_from(positions[row]).map_or(0, |position| position + 1);
                seen.saturating_sub(window).min(len)..seen.min(len)
            }
        }
    }
}

impl<'a> Queries<'a> {
    /// The query of an entry.
    #[inline(always)]
    pub(crate) fn entry(&self, entry: usize) -> &[f32] {
        let start = entry / self.group * self.q_stride + entry % self.group * self.head_dim;
        &self.q[start..start + self.head_dim]
    }

    /// The result of an entry.
    ///
    /// # Safety
    /// No other thread has this entry, and the caller has it once.
    #[inline(always)]
    pub(crate) unsafe fn result(&self, entry: usize) -> &'a mut [f32] {
        let start = self.out_start + entry / self.group * self.out_stride + entry % self.group * self.head_dim;
        // SAFETY: heads of rows do not overlap; the entry is the caller's own.
        unsafe { self.out.part(start..start + self.head_dim) }
    }
}

/// [`Backend::attention_varlen`](crate::Backend::attention_varlen).
pub(crate) fn attention_varlen(cpu: &Cpu, attention: &VarlenAttention<'_, Cpu>, out: &mut Tensor<Cpu>) -> Result<()> {
    check::attention_varlen(cpu, attention, out)?;
    let op = "attention_varlen";
    let AttentionShape { num_heads, num_kv_heads, head_dim } = attention.shape;
    let (group, scale) = (num_heads / num_kv_heads, attention.shape.scale() * std::f32::consts::LOG2_E);
    let [q, k, v] = [attention.q, attention.k, attention.v];
    let ends_q = starts(op, "cu_seqlens_q", attention.cu_seqlens_q, q.tensor.rows())?;
    let ends_k = starts(op, "cu_seqlens_k", attention.cu_seqlens_k, k.tensor.rows())?;
    let q_data: &[f32] = q.tensor.storage.slice(q.tensor.elements());
    let k_data: &[f32] = k.tensor.storage.slice(k.tensor.elements());
    let v_data: &[f32] = v.tensor.storage.slice(v.tensor.elements());
    let out_stride = out.cols();
    let out_data: &mut [f32] = out.storage.slice_mut(out.elements());
    let covered = ends_q.last().map_or(0, |end| *end as usize);
    out_data[..ends_q[0] as usize * out_stride].fill(0.0);
    out_data[covered * out_stride..].fill(0.0);
    let out = Shared::new(out_data);

    let spans = |i: usize| (ends_q[i] as usize..ends_q[i + 1] as usize, ends_k[i] as usize..ends_k[i + 1] as usize);
    let entries: usize = covered * group;
    let muls: usize = (0..ends_q.len() - 1).map(spans).map(|(q, k)| 2 * q.len() * k.len() * num_heads * head_dim).sum();
    let parallel = muls >= PARALLEL_MULS;
    let size = task_entries(cpu, parallel, entries * num_kv_heads);
    let tiles_of = |i: usize| (spans(i).0.len() * group).div_ceil(size) * num_kv_heads;
    let tiles = (0..ends_q.len() - 1).map(tiles_of).sum();
    cpu.for_each(parallel, tiles, |tile| {
        let (sequence, tile) = locate(tile, tiles_of);
        let (rows, keys) = spans(sequence);
        let (head, part) = (tile % num_kv_heads, tile / num_kv_heads);
        let entries = part * size..((part + 1) * size).min(rows.len() * group);
        let visible = Visible::All(keys.len());
        let queries = Queries {
            q: tail(q_data, rows.start * q.tensor.cols() + q.offset + head * group * head_dim),
            q_stride: q.tensor.cols(),
            out,
            out_start: rows.start * out_stride + head * group * head_dim,
            out_stride,
            group,
            head_dim,
            scale,
            visible,
        };
        let keys = Keys {
            k: tail(k_data, keys.start * k.tensor.cols() + k.offset + head * head_dim),
            v: tail(v_data, keys.start * v.tensor.cols() + v.offset + head * head_dim),
            k_stride: k.tensor.cols(),
            v_stride: v.tensor.cols(),
            blocks: None,
        };
        run(cpu, &queries, &keys, entries);
    });
    Ok(())
}

/// The elements of `data` from `start` on; none if it ends before.
pub(crate) fn tail(data: &[f32], start: usize) -> &[f32] {
    data.get(start..).unwrap_or(&[])
}

/// Entries of a task, so that all threads have some.
pub(crate) fn task_entries(cpu: &Cpu, parallel: bool, entries: usize) -> usize {
    let wanted = if parallel { entries.div_ceil(4 * cpu.pool().threads()) } else { entries };
    wanted.next_multiple_of(NV * MAX_LANES).clamp(NV * MAX_LANES, TASK_ENTRIES)
}

/// The sequence of `tile`, and which of its tiles it is.
pub(crate) fn locate(mut tile: usize, tiles_of: impl Fn(usize) -> usize) -> (usize, usize) {
    let mut sequence = 0;
    while tile >= tiles_of(sequence) {
        tile -= tiles_of(sequence);
        sequence += 1;
    }
    (sequence, tile)
}

/// The values of a `cu_seqlens` tensor, which ascend within `0..=rows`.
pub(crate) fn starts<'a>(op: &'static str, name: &str, tensor: &'a Tensor<Cpu>, rows: usize) -> Result<&'a [i32]> {
    let values: &[i32] = tensor.storage.slice(tensor.elements());
    let ascends = values.first().is_some_and(|first| *first >= 0) && values.windows(2).all(|pair| pair[0] <= pair[1]);
    if !ascends || values.last().is_some_and(|last| *last as usize > rows) {
        return Err(Error::shape(op, format!("expected {name} to ascend from 0 to at most {rows}, found {values:?}")));
    }
    Ok(values)
}

/// Attention of `entries` of `queries` over `keys`.
pub(crate) fn run(cpu: &Cpu, queries: &Queries<'_>, keys: &Keys<'_>, entries: Range<usize>) {
    let head_dim = queries.head_dim;
    scratch(Scratch::Panel, (KEYS + MAX_LANES) * head_dim + MAX_LANES, |k_packed| {
        scratch(Scratch::Sliver, KEYS * head_dim, |v_packed| {
            // Room for the widest vectors; panels of narrower ones are smaller, and more.
            let width = NV * MAX_LANES;
            let panels = entries.len().div_ceil(width);
            scratch(Scratch::Attention, (panels * (2 * head_dim + 4) + KEYS) * width, |memory| {
                cpu.level().run(Task { queries, keys, entries, k_packed, v_packed, memory });
            });
        });
    });
}

struct Task<'a> {
    queries: &'a Queries<'a>,
    keys: &'a Keys<'a>,
    entries: Range<usize>,
    /// `[KEYS / MR, head_dim, MR]`
    k_packed: &'a mut [f32],
    /// `[KEYS, head_dim]`
    v_packed: &'a mut [f32],
    /// `[KEYS, NV LANES]` scores, then the panels.
    memory: &'a mut [f32],
}

/// State of `NV * LANES` entries, one per lane.
struct Panel<'a> {
    /// `[head_dim, NV LANES]`, scaled
    q: &'a mut [f32],
    /// `[head_dim, NV LANES]`, not yet divided by `sum`
    out: &'a mut [f32],
    /// Greatest score so far.
    max: &'a mut [f32],
    /// Sum of the exponentials so far.
    sum: &'a mut [f32],
    /// First key that the lane sees.
    low: &'a mut [f32],
    /// One past the last.
    high: &'a mut [f32],
}

impl<'a> Panel<'a> {
    #[inline(always)]
    fn split(memory: &'a mut [f32], head_dim: usize, width: usize) -> Self {
        let (q, memory) = memory.split_at_mut(head_dim * width);
        let (out, memory) = memory.split_at_mut(head_dim * width);
        let (max, memory) = memory.split_at_mut(width);
        let (sum, memory) = memory.split_at_mut(width);
        let (low, high) = memory.split_at_mut(width);
        Self { q, out, max, sum, low, high }
    }
}

impl Kernel for Task<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { queries, keys, entries, k_packed, v_packed, memory } = self;
        let (width, head_dim) = (NV * S::LANES, queries.head_dim);
        let panel_size = (2 * head_dim + 4) * width;
        let panels = entries.len().div_ceil(width);
        let (scores, memory) = memory.split_at_mut(KEYS * width);
        let mut seen: Option<Range<usize>> = None;
        for (i, memory) in memory.chunks_exact_mut(panel_size).take(panels).enumerate() {
            let first = entries.start + i * width;
            let range = begin(queries, first..entries.end.min(first + width), Panel::split(memory, head_dim, width), width);
            if !range.is_empty() {
                let all = seen.get_or_insert(range.clone());
                *all = all.start.min(range.start)..all.end.max(range.end);
            }
        }
        let seen = seen.unwrap_or(0..0);
        for start in (seen.start / KEYS * KEYS..seen.end).step_by(KEYS) {
            // Keys of the block that a row sees, though it may not be this row: the others may not even be there.
            let block = start.max(seen.start)..seen.end.min(start + KEYS);
            pack::<S>(simd, keys, block.clone(), head_dim, k_packed, v_packed);
            for memory in memory.chunks_exact_mut(panel_size).take(panels) {
                let panel = Panel::split(memory, head_dim, width);
                add_block(simd, panel, block.clone(), head_dim, k_packed, v_packed, scores);
            }
        }
        for (i, memory) in memory.chunks_exact_mut(panel_size).take(panels).enumerate() {
            let first = entries.start + i * width;
            end(queries, first..entries.end.min(first + width), Panel::split(memory, head_dim, width), width);
        }
    }
}

/// Sets up a panel with `entries`; gives the keys that any of them sees.
#[inline(always)]
fn begin(queries: &Queries<'_>, entries: Range<usize>, panel: Panel<'_>, width: usize) -> Range<usize> {
    panel.out.fill(0.0);
    panel.max.fill(f32::NEG_INFINITY);
    panel.sum.fill(0.0);
    let (mut low, mut high) = (usize::MAX, 0);
    for lane in 0..width {
        let entry = entries.start + lane;
        if entry >= entries.end {
            // Sees what the first lane sees, so that it does not make a block a masked one; its result is not stored.
            (panel.low[lane], panel.high[lane]) = (panel.low[0], panel.high[0]);
            for j in 0..queries.head_dim {
                panel.q[j * width + lane] = 0.0;
            }
            continue;
        }
        let range = queries.visible.of_row(entry / queries.group);
        (panel.low[lane], panel.high[lane]) = (range.start as f32, range.end as f32);
        if !range.is_empty() {
            (low, high) = (low.min(range.start), high.max(range.end));
        }
        for (j, q) in queries.entry(entry).iter().enumerate() {
            panel.q[j * width + lane] = q * queries.scale;
        }
    }
    low.min(high)..high
}

/// Divides by the sums and stores; what sees no key becomes 0.
#[inline(always)]
fn end(queries: &Queries<'_>, entries: Range<usize>, panel: Panel<'_>, width: usize) {
    for (lane, entry) in entries.enumerate() {
        let sum = panel.sum[lane];
        let factor = if sum == 0.0 { 0.0 } else { sum.recip() };
        // SAFETY: the entries of a task are its own, and each is in one lane.
        let out = unsafe { queries.result(entry) };
        for (j, out) in out.iter_mut().enumerate() {
            *out = panel.out[j * width + lane] * factor;
        }
    }
}

/// Packs the keys `block` in slivers of `MR`, and the values as rows.
#[inline(always)]
fn pack<S: Simd>(simd: S, keys: &Keys<'_>, block: Range<usize>, head_dim: usize, k_packed: &mut [f32], v_packed: &mut [f32]) {
    let mut rows = [std::ptr::null(); MAX_LANES];
    let mut filled = 0;
    for (i, t) in block.clone().enumerate() {
        let (k, v) = keys.at(t, head_dim);
        v_packed[i * head_dim..(i + 1) * head_dim].copy_from_slice(v);
        rows[filled] = k.as_ptr();
        filled += 1;
        if filled == S::MR || t + 1 == block.end {
            let to = &mut k_packed[i / S::MR * S::MR * head_dim..];
            // SAFETY: keys have `head_dim` elements; beside the slivers there is room for a vector.
            unsafe { pack_broadcast(simd, &rows[..filled], head_dim, to.as_mut_ptr()) }
            filled = 0;
        }
    }
}

/// The online softmax over one more block of keys.
#[inline(always)]
fn add_block<S: Simd>(
    simd: S,
    panel: Panel<'_>,
    block: Range<usize>,
    head_dim: usize,
    k_packed: &[f32],
    v_packed: &[f32],
    scores: &mut [f32],
) {
    let width = NV * S::LANES;
    let (start, end) = (block.start as f32, block.end as f32);
    if panel.low.iter().all(|low| *low >= end) || panel.high.iter().all(|high| *high <= start) {
        return;
    }
    // What no lane sees at the end of the block is left out; it would count for nothing.
    let end = panel.high.iter().copied().fold(0.0, f32::max).min(end);
    let is_masked = panel.low.iter().any(|low| *low > start) || panel.high.iter().any(|high| *high < end);
    let keys = end as usize - block.start;
    for first in (0..keys).step_by(S::MR) {
        let rows = S::MR.min(keys - first);
        with_rows!(S, rows, M => {
            // SAFETY: the sliver and the queries have `head_dim` rows.
            let acc = unsafe { tile::<S, M>(simd, k_packed[first * head_dim..].as_ptr(), S::MR, panel.q.as_ptr(), head_dim) };
            for (m, acc) in acc.into_iter().enumerate() {
                // SAFETY: the scores have a row of two vectors for each key.
                unsafe {
                    simd.store(scores[(first + m) * width..].as_mut_ptr(), acc[0]);
                    simd.store(scores[(first + m) * width + S::LANES..].as_mut_ptr(), acc[1]);
                }
            }
        });
    }
    let mut alpha = [simd.splat(0.0); NV];
    for (v, alpha) in alpha.iter_mut().enumerate() {
        let at = v * S::LANES;
        // SAFETY: rows of scores and of the state are two vectors wide, and `at` is the first or second; `key < keys`.
        unsafe {
            let scores = scores.as_mut_ptr().add(at);
            if is_masked {
                let (low, high) = (simd.load(panel.low.as_ptr().add(at)), simd.load(panel.high.as_ptr().add(at)));
                let hidden = simd.splat(f32::NEG_INFINITY);
                for key in 0..keys {
                    let t = simd.splat(start + key as f32);
                    let score = simd.load(scores.add(key * width));
                    let score = simd.select_ge(t, low, score, hidden);
                    simd.store(scores.add(key * width), simd.select_ge(t, high, hidden, score));
                }
            }
            let before = simd.load(panel.max.as_ptr().add(at));
            let mut max = before;
            for key in 0..keys {
                max = simd.max(max, simd.load(scores.add(key * width)));
            }
            simd.store(panel.max.as_mut_ptr().add(at), max);
            // Where nothing was seen yet, infinity minus infinity is to be 0 nevertheless.
            let base = simd.max(simd.splat(-1e30), max);
            let mut sum = simd.splat(0.0);
            for key in 0..keys {
                let p = math::exp2_nonpositive(simd, simd.sub(simd.load(scores.add(key * width)), base));
                simd.store(scores.add(key * width), p);
                sum = simd.add(sum, p);
            }
            *alpha = math::exp2_nonpositive(simd, simd.sub(before, base));
            let total = panel.sum.as_mut_ptr().add(at);
            simd.store(total, simd.fma(simd.load(total), *alpha, sum));
        }
    }
    for (first, end) in even_pieces(head_dim, S::MR) {
        with_rows!(S, end - first, M => {
            // SAFETY: values and probabilities have a row for each key.
            let acc = unsafe { tile::<S, M>(simd, v_packed[first..].as_ptr(), head_dim, scores.as_ptr(), keys) };
            for (m, acc) in acc.into_iter().enumerate() {
                for (v, acc) in acc.into_iter().enumerate() {
                    // SAFETY: `first + m` is below `head_dim`, and a row is two vectors.
                    unsafe {
                        let out = panel.out[(first + m) * width + v * S::LANES..].as_mut_ptr();
                        simd.store(out, simd.fma(simd.load(out), alpha[v], acc));
                    }
                }
            }
        });
    }
}

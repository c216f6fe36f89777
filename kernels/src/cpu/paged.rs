//! Causal attention over the paged cache: which rows see which blocks, and who computes them.
//!
//! A few entries per key head (decoding) stream the cache ([`super::decode`]); more (a prompt, or a chunk of one) go through
//! register tiles ([`super::attention`]).

use super::{
    Cpu,
    attention::{self, Keys, PARALLEL_MULS, Queries, Visible, locate, starts, tail, task_entries},
    decode::{self, MAX_ENTRIES},
    storage::Shared,
};
use crate::{AttentionShape, Error, KvCache, PagedAttention, Result, Tensor, check};
use std::ops::Range;

/// One sequence of a step.
pub(crate) struct Sequence<'a> {
    /// Its rows of `qkv`.
    rows: Range<usize>,
    /// Positions that any of them sees; empty if none.
    pub(crate) seen: Range<usize>,
    visible: Visible<'a>,
    /// Its blocks.
    table: &'a [i32],
}

/// A step with all that its tiles need.
pub(crate) struct Step<'a> {
    q: &'a [f32],
    q_stride: usize,
    k: &'a [f32],
    v: &'a [f32],
    block_size: usize,
    out: Shared<'a>,
    pub(crate) shape: AttentionShape,
}

impl Step<'_> {
    pub(crate) fn group(&self) -> usize {
        self.shape.num_heads / self.shape.num_kv_heads
    }

    /// Entries of one key head.
    pub(crate) fn entries(&self, sequence: &Sequence<'_>) -> usize {
        sequence.rows.len() * self.group()
    }

    /// Operands of one sequence and key head.
    pub(crate) fn head<'a>(&'a self, sequence: &'a Sequence<'_>, head: usize) -> (Queries<'a>, Keys<'a>) {
        let AttentionShape { head_dim, .. } = self.shape;
        let first = head * self.group() * head_dim;
        let queries = Queries {
            q: tail(self.q, sequence.rows.start * self.q_stride + first),
            q_stride: self.q_stride,
            out: self.out,
            out_start: sequence.rows.start * self.shape.q_size() + first,
            out_stride: self.shape.q_size(),
            group: self.group(),
            head_dim,
            scale: self.shape.scale() * std::f32::consts::LOG2_E,
            visible: sequence.visible,
        };
        let keys = Keys {
            k: tail(self.k, head * head_dim),
            v: tail(self.v, head * head_dim),
            k_stride: self.shape.kv_size(),
            v_stride: self.shape.kv_size(),
            blocks: Some((sequence.table, self.block_size)),
        };
        (queries, keys)
    }
}

/// [`Backend::paged_attention`](crate::Backend::paged_attention).
pub(crate) fn paged_attention(
    cpu: &Cpu,
    qkv: &Tensor<Cpu>,
    kv: &KvCache<Cpu>,
    step: &PagedAttention<'_, Cpu>,
    out: &mut Tensor<Cpu>,
) -> Result<()> {
    check::paged_attention(cpu, qkv, kv, step, out)?;
    let sequences = sequences(qkv, kv, step)?;
    let out_data: &mut [f32] = out.storage.slice_mut(out.elements());
    let q_size = step.shape.q_size();
    let first = sequences.first().map_or(qkv.rows(), |sequence| sequence.rows.start);
    let covered = sequences.last().map_or(qkv.rows(), |sequence| sequence.rows.end);
    out_data[..first * q_size].fill(0.0);
    out_data[covered * q_size..].fill(0.0);
    let step = Step {
        q: qkv.storage.slice(qkv.elements()),
        q_stride: qkv.cols(),
        k: kv.k.storage.slice(kv.k.elements()),
        v: kv.v.storage.slice(kv.v.elements()),
        block_size: kv.block_size,
        out: Shared::new(out_data),
        shape: step.shape,
    };
    let is_short = |sequence: &&Sequence<'_>| step.entries(sequence) <= MAX_ENTRIES;
    let muls = |sequence: &Sequence<'_>| 2 * sequence.rows.len() * sequence.seen.len() * q_size;
    let parallel = sequences.iter().map(muls).sum::<usize>() >= PARALLEL_MULS;
    if sequences.iter().any(|sequence| is_short(&sequence)) {
        decode::run(cpu, parallel, &step, &sequences);
    }
    if sequences.iter().all(|sequence| is_short(&sequence)) {
        return Ok(());
    }
    let heads = step.shape.num_kv_heads;
    let entries: usize = sequences.iter().map(|sequence| step.entries(sequence)).sum();
    let size = task_entries(cpu, parallel, entries * heads);
    let tiles_of = |i: usize| {
        if is_short(&&sequences[i]) { 0 } else { step.entries(&sequences[i]).div_ceil(size) * heads }
    };
    let tiles = (0..sequences.len()).map(tiles_of).sum();
    cpu.for_each(parallel, tiles, |tile| {
        let (sequence, tile) = locate(tile, tiles_of);
        let sequence = &sequences[sequence];
        // The last rows see most: they come first, so that no thread is left with one at the end.
        let parts = step.entries(sequence).div_ceil(size);
        let (head, part) = (tile % heads, parts - 1 - tile / heads);
        let (queries, keys) = step.head(sequence, head);
        attention::run(cpu, &queries, &keys, part * size..((part + 1) * size).min(step.entries(sequence)));
    });
    Ok(())
}

/// Reads and checks the index tensors: all blocks that a row sees are in the cache.
fn sequences<'a>(qkv: &Tensor<Cpu>, kv: &KvCache<Cpu>, step: &PagedAttention<'a, Cpu>) -> Result<Vec<Sequence<'a>>> {
    let op = "paged_attention";
    let ends = starts(op, "cu_seqlens_q", step.cu_seqlens_q, qkv.rows())?;
    let positions: &[i32] = step.positions.storage.slice(step.positions.elements());
    let lens: &[i32] = step.context_lens.storage.slice(step.context_lens.elements());
    let tables: &[i32] = step.block_tables.storage.slice(step.block_tables.elements());
    let (width, blocks) = (step.block_tables.cols(), kv.k.rows() / kv.block_size);
    let mut sequences = Vec::with_capacity(lens.len());
    for (i, len) in lens.iter().enumerate() {
        let rows = ends[i] as usize..ends[i + 1] as usize;
        let len = usize::try_from(*len).unwrap_or(0);
        let window = step.sliding_window.unwrap_or(usize::MAX);
        let visible = Visible::Causal { positions: &positions[rows.clone()], window, len };
        let ranges = (0..rows.len()).map(|row| visible.of_row(row)).filter(|range| !range.is_empty());
        let seen = ranges.reduce(|a, b| a.start.min(b.start)..a.end.max(b.end)).unwrap_or(0..0);
        let table = &tables[i * width..(i + 1) * width];
        let used = seen.start / kv.block_size..seen.end.div_ceil(kv.block_size);
        let held = table.get(used.clone()).ok_or_else(|| {
            let what = format!("expected {} blocks for {} positions of sequence {i}, found {width}", used.end, seen.end);
            Error::shape(op, what)
        })?;
        if let Some(block) = held.iter().find(|block| usize::try_from(**block).map_or(true, |block| block >= blocks)) {
            return Err(Error::shape(op, format!("expected blocks of sequence {i} in 0..{blocks}, found {block}")));
        }
        sequences.push(Sequence { rows, seen, visible, table });
    }
    Ok(sequences)
}

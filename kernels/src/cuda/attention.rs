//! Attention: which kernel, how many blocks, and the memory in which the parts of a split sequence meet.

use super::{
    Cuda,
    driver::{DeviceBuffer, DevicePtr, Stream},
    module::Launch,
    pointer,
};
use crate::{AttentionShape, Columns, Error, KvCache, PagedAttention, Result, Rope, Tensor, VarlenAttention, check, composed};
use serde::{Deserialize, Serialize};
use std::{str::FromStr, sync::Arc};

/// Which kernels compute attention over many queries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AttentionKernels {
    /// The fastest that the card can run.
    #[default]
    Auto,
    /// Products of warps (`mma.sync`): every card.
    Mma,
    /// Products of warpgroups (`wgmma`): compute capability 9.0 (H100, H200) only.
    Wgmma,
}

impl FromStr for AttentionKernels {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "mma" => Ok(Self::Mma),
            "wgmma" => Ok(Self::Wgmma),
            _ => Err(format!("attention is {text:?}, expected auto, mma or wgmma")),
        }
    }
}

/// The compute capability that has `wgmma`. Later ones have other instructions in its place.
const WGMMA_COMPUTE_CAPABILITY: (i32, i32) = (9, 0);

/// Threads of a block of the kernels in `flash.cuh` and `paged_decode.cu`.
const THREADS: usize = 128;
/// Entries of a tile in `paged_decode.cu`.
const DECODE_TILE: usize = 16;
/// Most splits of a tile in `paged_decode.cu`.
const MAX_DECODE_SPLITS: usize = 32;
/// Most splits of a tile of the kernels over many queries: the last block reads what all the others wrote.
const MAX_SPLITS: usize = 8;
/// Keys below which a tile is not split: `flash::MIN_TILES` tiles of keys, of the head sizes with the largest.
const MIN_SPLIT_KEYS: usize = 256;
/// Sequences with more rows than this in a step are `paged_prefill`'s. A draft of 7 tokens fits; with many more the keys would
/// be read once for each 16 entries.
const MAX_DECODE_ROWS: usize = 8;
/// Blocks of the kernels for 9.0 that do nothing but set rows of no sequence to zero.
const ZEROING_BLOCKS: usize = 8;
/// Twice the blocks of `paged_decode` that a multiprocessor holds at once.
const DECODE_BLOCKS_PER_MULTIPROCESSOR: usize = 4;

/// Largest head size that has kernels.
const MAX_HEAD_DIM: usize = 128;

/// The kernels of a head size.
struct Kernels {
    varlen: &'static str,
    varlen_wgmma: &'static str,
    prefill: &'static str,
    prefill_wgmma: &'static str,
    decode: &'static str,
}

fn kernels(op: &'static str, head_dim: usize) -> Result<Kernels> {
    let [varlen, varlen_wgmma, prefill, prefill_wgmma, decode] = match head_dim {
        64 => ["attention_varlen_64", "attention_varlen_sm90_64", "paged_prefill_64", "paged_prefill_sm90_64", "paged_decode_64"],
        72 => ["attention_varlen_72", "attention_varlen_sm90_72", "paged_prefill_72", "paged_prefill_sm90_72", "paged_decode_72"],
        80 => ["attention_varlen_80", "attention_varlen_sm90_80", "paged_prefill_80", "paged_prefill_sm90_80", "paged_decode_80"],
        96 => ["attention_varlen_96", "attention_varlen_sm90_96", "paged_prefill_96", "paged_prefill_sm90_96", "paged_decode_96"],
        128 => ["attention_varlen_128", "attention_varlen_sm90_128", "paged_prefill_128", "paged_prefill_sm90_128", "paged_decode_128"],
        _ => return Err(Error::shape(op, format!("expected a head_dim of 64, 72, 80, 96 or 128, found {head_dim}; use the CPU"))),
    };
    Ok(Kernels { varlen, varlen_wgmma, prefill, prefill_wgmma, decode })
}

/// How a kernel over many queries cuts its work, as `flash::Head` in `flash.cuh` and `flash::sm90::Head` in `flash_sm90.cuh` have it.
#[derive(Clone, Copy)]
struct Tiling {
    /// Entries of a tile (a query row of one head).
    rows: usize,
    /// Of a block.
    threads: usize,
    /// Of a block.
    shared_bytes: usize,
    /// Blocks that a multiprocessor holds at once.
    blocks_per_multiprocessor: usize,
    /// Elements (f32) of what a split of a tile hands on: each thread what it has.
    partial_len: usize,
}

impl Tiling {
    const fn mma(head_dim: usize) -> Self {
        let (rows, pitch) = (128, ((head_dim / 8) | 1) * 16);
        Self {
            rows,
            threads: THREADS,
            shared_bytes: 32 + if head_dim <= 96 { 4 * 64 * pitch } else { (4 * 32 + rows) * pitch },
            blocks_per_multiprocessor: if head_dim <= 72 { 3 } else { 2 },
            partial_len: THREADS * (head_dim + 8),
        }
    }

    const fn wgmma(head_dim: usize, warpgroups: usize) -> Self {
        const STAGES: usize = 5;
        const HEADER_BYTES: usize = 128;
        let (threads, keys) = (128 * warpgroups, 32 * warpgroups);
        Self {
            rows: 64 * warpgroups,
            threads,
            shared_bytes: HEADER_BYTES + STAGES * 2 * keys * head_dim * 2,
            blocks_per_multiprocessor: 1,
            partial_len: threads * (4 + head_dim / 2),
        }
    }
}

/// What kernels of prefill have in shared memory besides for each entry: the keys that it sees.
const SEEN_BYTES: usize = 8;
/// What `paged_prefill.cu` has besides: the rows of two tiles of 64 keys.
const PREFILL_SLOT_BYTES: usize = 2 * 64 * 4;

/// Elements (f32) of what a split of `paged_decode` hands on: results, bases and sums.
const fn decode_partial_len(head_dim: usize) -> usize {
    DECODE_TILE * (head_dim + 2)
}

/// Warpgroups of a block of `attention_varlen_sm90.cu`: `varlen_sm90::Head`.
const fn varlen_warpgroups(head_dim: usize) -> usize {
    if head_dim <= 80 { 3 } else { 2 }
}
/// Warpgroups of a block of `paged_prefill_sm90.cu`: `prefill_sm90::Head`.
const PREFILL_WARPGROUPS: usize = 2;

/// Shared memory of a block of `paged_decode`: what each of four warps has, then the weights with which they are put together.
fn decode_bytes(head_dim: usize) -> usize {
    4 * (4 * decode_partial_len(head_dim) + (MAX_DECODE_SPLITS + 2) * DECODE_TILE)
}

/// Which kernels there are, and where the splits of a tile meet. Ops of one stream follow each other, so all share it.
pub(super) struct Attention {
    wgmma: bool,
    partials: DeviceBuffer,
    /// How many splits of a tile are done, zero between ops.
    arrived: DeviceBuffer,
    multiprocessors: usize,
}

impl Attention {
    /// # Errors
    /// If the card cannot run the kernels that were asked for, or has no memory left.
    pub(super) fn new(stream: &Arc<Stream>, kernels: AttentionKernels) -> Result<Self> {
        const fn split_len(tiling: Tiling) -> usize {
            tiling.blocks_per_multiprocessor * tiling.partial_len
        }
        const LEN: usize = split_len(Tiling::mma(MAX_HEAD_DIM));
        const { assert!(LEN >= split_len(Tiling::mma(72))) };
        const { assert!(LEN >= split_len(Tiling::wgmma(80, varlen_warpgroups(80)))) };
        const { assert!(LEN >= split_len(Tiling::wgmma(MAX_HEAD_DIM, PREFILL_WARPGROUPS))) };
        const { assert!(LEN >= DECODE_BLOCKS_PER_MULTIPROCESSOR * decode_partial_len(MAX_HEAD_DIM)) };
        // Two blocks of the largest fit the 164 KiB of an A100's multiprocessor, of which each also takes one.
        const LARGEST: Tiling = Tiling::mma(MAX_HEAD_DIM);
        const { assert!(2 * (LARGEST.shared_bytes + LARGEST.rows * SEEN_BYTES + PREFILL_SLOT_BYTES + 1024) <= 164 << 10) };
        let device = stream.device();
        let (multiprocessors, has_wgmma) = (device.multiprocessors, device.compute_capability == WGMMA_COMPUTE_CAPABILITY);
        if kernels == AttentionKernels::Wgmma && !has_wgmma {
            let (name, (major, minor)) = (&device.name, device.compute_capability);
            let what = format!("attention by wgmma needs compute capability 9.0, {name} has {major}.{minor}; take auto or mma");
            return Err(Error::Device(what));
        }
        let partials = DeviceBuffer::uninit(stream, multiprocessors * LEN * 4)?;
        let arrived = DeviceBuffer::zeroed(stream, multiprocessors * DECODE_BLOCKS_PER_MULTIPROCESSOR * 4)?;
        Ok(Self { wgmma: has_wgmma && kernels != AttentionKernels::Mma, partials, arrived, multiprocessors })
    }

    /// Blocks that run at once.
    fn wave(&self, tiling: Tiling) -> usize {
        self.multiprocessors * tiling.blocks_per_multiprocessor
    }

    /// Blocks for the tiles that there may be, and for the splits of those that do not fill the card (`flash::sm90::find_work`):
    /// sequences have `longest` entries at most, and `entries` together.
    fn blocks(&self, tiling: Tiling, num_kv_heads: usize, sequences: usize, longest: usize, entries: usize) -> usize {
        // All entries, and a tile more for the end of each sequence.
        let tiles = (sequences * longest.div_ceil(tiling.rows)).min(entries / tiling.rows + sequences);
        tiles * num_kv_heads + self.wave(tiling)
    }

    /// How many blocks share the keys of a tile, so that few tiles over long contexts fill the card: as many as fit at once. `keys`
    /// is the longest context that may be.
    fn splits(&self, tiling: Tiling, tiles: usize, keys: usize) -> usize {
        (self.wave(tiling) / tiles.max(1)).min(keys / MIN_SPLIT_KEYS).clamp(1, MAX_SPLITS)
    }

    /// The same for `paged_decode`: twice as many as fit at once, so that what is left at the end is short. Contexts are not known
    /// here; each block finds its share.
    fn decode_splits(&self, tiles: usize) -> usize {
        (self.multiprocessors * DECODE_BLOCKS_PER_MULTIPROCESSOR / tiles.max(1)).clamp(1, MAX_DECODE_SPLITS)
    }
}

/// Where the first element of the columns lies, and the elements from row to row.
fn columns(name: &str, columns: Columns<'_, Cuda>) -> Result<(DevicePtr, usize)> {
    let (offset, stride) = (columns.offset, columns.tensor.cols());
    if !offset.is_multiple_of(8) || !stride.is_multiple_of(8) {
        let what = format!("expected columns and offset of {name} in multiples of 8 (16 bytes), found {stride} and {offset}");
        return Err(Error::shape("attention_varlen", what));
    }
    Ok((pointer(columns.tensor) + 2 * offset as u64, stride))
}

/// The factor of scores for a softmax in base 2.
fn scale(shape: AttentionShape) -> f32 {
    shape.scale() * std::f32::consts::LOG2_E
}

/// [`Backend::attention_varlen`](crate::Backend::attention_varlen)
pub(super) fn varlen(cuda: &Cuda, attention: &VarlenAttention<'_, Cuda>, out: &mut Tensor<Cuda>) -> Result<()> {
    check::attention_varlen(cuda, attention, out)?;
    let AttentionShape { num_heads, num_kv_heads, head_dim } = attention.shape;
    let kernels = kernels("attention_varlen", head_dim)?;
    let ((q, q_stride), (k, k_stride), (v, v_stride)) =
        (columns("q", attention.q)?, columns("k", attention.k)?, columns("v", attention.v)?);
    let (rows_q, rows_k) = (out.rows(), attention.k.tensor.rows());
    let (group, scratch, sequences) = (num_heads / num_kv_heads, &cuda.attention, attention.cu_seqlens_q.rows() - 1);
    let longest = attention.max_seqlen_q.min(rows_q) * group;
    let launch_of = |kernel, tiling: Tiling| -> Result<Launch<'_>> {
        let launch = cuda.launch(kernel)?.threads(tiling.threads).shared_bytes(tiling.shared_bytes);
        let launch = launch.pointer(q).pointer(k).pointer(v).pointer(pointer(out));
        let launch = launch.pointer(pointer(attention.cu_seqlens_q)).pointer(pointer(attention.cu_seqlens_k));
        Ok(launch.pointer(scratch.partials.pointer()).pointer(scratch.arrived.pointer()))
    };
    let launch = if scratch.wgmma {
        let tiling = Tiling::wgmma(head_dim, varlen_warpgroups(head_dim));
        let blocks = scratch.blocks(tiling, num_kv_heads, sequences, longest, rows_q * group);
        let launch = launch_of(kernels.varlen_wgmma, tiling)?.grid([blocks + ZEROING_BLOCKS, 1, 1]);
        launch.int(scratch.wave(tiling)).int(sequences).int(rows_q).int(rows_k).int(num_kv_heads)
    } else {
        let tiling = Tiling::mma(head_dim);
        let tiles = longest.div_ceil(tiling.rows).max(1);
        let splits = scratch.splits(tiling, tiles * num_kv_heads * sequences, attention.max_seqlen_k.min(rows_k));
        // The last z is for the rows of no sequence.
        let launch = launch_of(kernels.varlen, tiling)?.grid([tiles * splits, num_kv_heads, sequences + 1]);
        launch.int(splits).int(rows_q).int(rows_k)
    };
    let launch = launch.int(q_stride).int(k_stride).int(v_stride).int(group).float(scale(attention.shape));
    // SAFETY: shapes were checked, splits have room, and the kernel stays within the rows whatever `cu_seqlens` hold.
    unsafe { launch.run() }
}

/// [`Backend::paged_attention`](crate::Backend::paged_attention). Sequences with few rows are `paged_decode`'s, those with many
/// `paged_prefill`'s; each kernel passes over the other's.
pub(super) fn paged(
    cuda: &Cuda,
    qkv: &Tensor<Cuda>,
    kv: &KvCache<Cuda>,
    step: &PagedAttention<'_, Cuda>,
    out: &mut Tensor<Cuda>,
) -> Result<()> {
    check::paged_attention(cuda, qkv, kv, step, out)?;
    let kernels = kernels("paged_attention", step.shape.head_dim)?;
    let paged = Paged { cuda, qkv, kv, step, out };
    paged.decode(kernels.decode, None)?;
    if paged.longest() > MAX_DECODE_ROWS { paged.prefill(&kernels) } else { Ok(()) }
}

/// [`Backend::rope_and_paged_attention`](crate::Backend::rope_and_paged_attention)
pub(super) fn rope_paged(
    cuda: &Cuda,
    qkv: &mut Tensor<Cuda>,
    rope: Rope<'_, Cuda>,
    kv: &mut KvCache<Cuda>,
    step: &PagedAttention<'_, Cuda>,
    out: &mut Tensor<Cuda>,
) -> Result<()> {
    let kernel = match step.shape.head_dim {
        64 => "rope_paged_decode_64",
        128 => "rope_paged_decode_128",
        _ => return composed::rope_and_paged_attention(cuda, qkv, rope, kv, step, out),
    };
    if step.max_seqlen_q.min(qkv.rows()) > MAX_DECODE_ROWS {
        return composed::rope_and_paged_attention(cuda, qkv, rope, kv, step, out);
    }
    check::rope_and_store_kv(cuda, qkv, rope, step.shape, kv)?;
    check::paged_attention(cuda, qkv, kv, step, out)?;
    Paged { cuda, qkv, kv, step, out }.decode(kernel, Some(rope))
}

/// Operands of paged attention, whose shapes were checked.
struct Paged<'a> {
    cuda: &'a Cuda,
    qkv: &'a Tensor<Cuda>,
    kv: &'a KvCache<Cuda>,
    step: &'a PagedAttention<'a, Cuda>,
    out: &'a Tensor<Cuda>,
}

impl Paged<'_> {
    /// Most rows that a sequence may have.
    fn longest(&self) -> usize {
        self.step.max_seqlen_q.min(self.qkv.rows())
    }

    fn group(&self) -> usize {
        self.step.shape.num_heads / self.step.shape.num_kv_heads
    }

    fn window(&self) -> usize {
        self.step.sliding_window.unwrap_or(usize::MAX)
    }

    /// What all kernels begin with.
    fn launch(&self, kernel: &'static str, threads: usize, shared_bytes: usize) -> Result<Launch<'_>> {
        let Self { cuda, qkv, kv, step, out } = self;
        let launch = cuda.launch(kernel)?.threads(threads).shared_bytes(shared_bytes);
        let launch = launch.pointer(pointer(qkv)).pointer(pointer(&kv.k)).pointer(pointer(&kv.v)).pointer(pointer(out));
        let launch = launch.pointer(pointer(step.positions)).pointer(pointer(step.cu_seqlens_q));
        let launch = launch.pointer(pointer(step.block_tables)).pointer(pointer(step.context_lens));
        Ok(launch.pointer(cuda.attention.partials.pointer()).pointer(cuda.attention.arrived.pointer()))
    }

    /// Attention of the sequences with few rows. With `rope`, `kernel` rotates these first, and puts them into the cache.
    fn decode(&self, kernel: &'static str, rope: Option<Rope<'_, Cuda>>) -> Result<()> {
        let Self { cuda, qkv, kv, step, .. } = self;
        let AttentionShape { num_kv_heads, head_dim, .. } = step.shape;
        let (group, sequences) = (self.group(), step.context_lens.rows());
        let tiles = num_kv_heads * (self.longest().min(MAX_DECODE_ROWS) * group).div_ceil(DECODE_TILE).max(1);
        let splits = cuda.attention.decode_splits(sequences * tiles);
        // The last z is for the rows of no sequence.
        let launch = self.launch(kernel, THREADS, decode_bytes(head_dim))?.grid([splits, tiles, sequences + 1]);
        let launch = launch.pointer(rope.map_or(0, |rope| pointer(rope.cos_sin))).pointer(rope.map_or(0, |rope| pointer(rope.slots)));
        let launch = launch.int(qkv.rows()).int(step.block_tables.cols()).int(kv.block_size).int(kv.k.rows());
        let launch = launch.int(num_kv_heads).int(group).int(self.window()).int(MAX_DECODE_ROWS).float(scale(step.shape));
        // SAFETY: shapes were checked, splits have room, and the kernel stays within its tensors whatever the indices are. Without
        // `rope` it does not read what there is none of.
        unsafe { launch.run() }
    }

    /// Attention of the sequences with many rows.
    fn prefill(&self, kernels: &Kernels) -> Result<()> {
        let Self { cuda, qkv, kv, step, .. } = self;
        let AttentionShape { num_kv_heads, head_dim, .. } = step.shape;
        let (rows, group, window, sequences) = (self.longest(), self.group(), self.window(), step.context_lens.rows());
        let scratch = &cuda.attention;
        let launch = if scratch.wgmma {
            let tiling = Tiling::wgmma(head_dim, PREFILL_WARPGROUPS);
            let blocks = scratch.blocks(tiling, num_kv_heads, sequences, rows * group, qkv.rows() * group);
            let launch = self.launch(kernels.prefill_wgmma, tiling.threads, tiling.shared_bytes + tiling.rows * SEEN_BYTES)?;
            launch.grid([blocks, 1, 1]).int(scratch.wave(tiling)).int(sequences).int(num_kv_heads)
        } else {
            let tiling = Tiling::mma(head_dim);
            let tiles = (rows * group).div_ceil(tiling.rows);
            let longest = window.saturating_add(rows).min(step.block_tables.cols() * kv.block_size);
            let splits = scratch.splits(tiling, tiles * num_kv_heads * sequences, longest);
            let shared_bytes = tiling.shared_bytes + tiling.rows * SEEN_BYTES + PREFILL_SLOT_BYTES;
            let launch = self.launch(kernels.prefill, tiling.threads, shared_bytes)?;
            launch.grid([tiles * splits, num_kv_heads, sequences]).int(splits)
        };
        let launch = launch.int(qkv.rows()).int(step.block_tables.cols()).int(kv.block_size).int(kv.k.rows());
        let launch = launch.int(group).int(window).int(MAX_DECODE_ROWS).float(scale(step.shape));
        // SAFETY: as in `decode`.
        unsafe { launch.run() }
    }
}

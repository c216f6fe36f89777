//! The register tile of all products: `MR` broadcast rows times two vectors of columns, and how operands are packed for it.
//!
//! Goto and van de Geijn 2008; the tile sizes are those that fill the registers of each instruction set.

use super::simd::{MAX_LANES, Simd};
use crate::DType;

/// Vectors of columns in a tile.
pub(crate) const NV: usize = 2;

/// Runs `$body` with the constant `$m` being `$rows`, which is between 1 and the tile rows of `$S`.
macro_rules! with_rows {
    ($S:ty, $rows:expr, $m:ident => $body:expr) => {
        with_rows!(@arms $S, $rows, $m, $body, 1 2 3 4 5 6 7 8 9 10 11 12)
    };
    (@arms $S:ty, $rows:expr, $m:ident, $body:expr, $($n:literal)*) => {
        match $rows {
            $($n if $n <= <$S as $crate::cpu::simd::Simd>::MR => { const $m: usize = $n; $body })*
            _ => {}
        }
    };
}
pub(crate) use with_rows;

/// `acc[i][v] = sum over k of a[k * a_stride + i] * b[k * NV * LANES + v * LANES ..]`, `i` below `M`.
///
/// # Safety
/// `a` is readable for `depth` rows of `M` at a stride of `a_stride`, `b` for `depth` rows of `NV` vectors.
#[inline(always)]
pub(crate) unsafe fn tile<S: Simd, const M: usize>(
    simd: S,
    a: *const f32,
    a_stride: usize,
    b: *const f32,
    depth: usize,
) -> [[S::V; NV]; M] {
    let mut acc = [[simd.splat(0.0); NV]; M];
    let (mut a, mut b) = (a, b);
    for _ in 0..depth {
        // SAFETY: row `k` of both operands, by the caller's promise; the last step leaves the pointers one row past the end,
        // where they are not read.
        unsafe {
            let b0 = simd.load(b);
            let b1 = simd.load(b.add(S::LANES));
            for (i, acc) in acc.iter_mut().enumerate() {
                let x = simd.splat(*a.add(i));
                acc[0] = simd.fma(x, b0, acc[0]);
                acc[1] = simd.fma(x, b1, acc[1]);
            }
        }
        a = a.wrapping_add(a_stride);
        b = b.wrapping_add(NV * S::LANES);
    }
    acc
}

/// Splits `count` into as few pieces of at most `most` as there must be, of nearly equal sizes: no short last tile.
pub(crate) fn even_pieces(count: usize, most: usize) -> impl Iterator<Item = (usize, usize)> {
    let pieces = count.div_ceil(most).max(1);
    (0..pieces).map(move |i| (count * i / pieces, count * (i + 1) / pieces)).filter(|(start, end)| start < end)
}

/// Packs rows for broadcasting: `dst[k * MR + i] = rows[i][k]` for `i < rows.len()`, `k < depth`; what else is written up to
/// `depth * MR + LANES` has no meaning.
///
/// # Safety
/// Each of `rows` is readable for `depth` f32, and `dst` writable for `depth * MR + LANES`; 1 to `MR` rows.
#[inline(always)]
pub(crate) unsafe fn pack_broadcast<S: Simd>(simd: S, rows: &[*const f32], depth: usize, dst: *mut f32) {
    let mut sources = [rows[0].cast::<u8>(); MAX_LANES];
    for (source, row) in sources.iter_mut().zip(rows) {
        *source = row.cast();
    }
    let whole = depth - depth % S::LANES;
    let mut k = 0;
    // SAFETY: `k` stays below `depth`, which all rows have.
    unsafe {
        while k < whole {
            simd.transpose(&sources, dst.add(k * S::MR), S::MR);
            for source in &mut sources {
                *source = source.add(4 * S::LANES);
            }
            k += S::LANES;
        }
        while k < depth {
            for (i, row) in rows.iter().enumerate() {
                *dst.add(k * S::MR + i) = *row.add(k);
            }
            k += 1;
        }
    }
}

/// An element type of weights.
pub(crate) trait Stored: Copy + 'static {
    /// Bytes of an element.
    const SIZE: usize;

    /// # Safety
    /// `p` is readable for `LANES` elements, unaligned.
    unsafe fn load<S: Simd>(simd: S, p: *const u8) -> S::V;

    /// # Safety
    /// `p` is readable for an element, unaligned.
    unsafe fn get(p: *const u8) -> f32;

    /// The first `n < LANES` elements, then zeros.
    ///
    /// # Safety
    /// `p` is readable for `n` elements.
    #[inline(always)]
    unsafe fn load_head<S: Simd>(simd: S, p: *const u8, n: usize) -> S::V {
        let mut lanes = [0f32; MAX_LANES];
        // SAFETY: `i` is below `n`; `lanes` is longer than a vector.
        unsafe {
            for (i, lane) in lanes.iter_mut().enumerate().take(n) {
                *lane = Self::get(p.add(i * Self::SIZE));
            }
            simd.load(lanes.as_ptr())
        }
    }

    /// Packs a column of vectors: `dst[k * stride + i] = rows[i][k]`, `i < LANES`, `k < depth`, widened.
    ///
    /// # Safety
    /// The first `LANES` of `rows` are readable for `depth` elements, `dst` writable for `depth` vectors at `stride`.
    #[inline(always)]
    unsafe fn pack<S: Simd>(simd: S, rows: &[*const u8; MAX_LANES], depth: usize, dst: *mut f32, stride: usize) {
        // SAFETY: what `pack_block` touches is below `whole`, the rest below `depth`.
        unsafe {
            let done = Self::pack_blocks(simd, rows, depth, dst, stride);
            for k in done..depth {
                for (i, row) in rows.iter().enumerate().take(S::LANES) {
                    *dst.add(k * stride + i) = Self::get(row.add(k * Self::SIZE));
                }
            }
        }
    }

    /// The whole blocks of [`pack`](Self::pack); gives how many of `depth` they are.
    ///
    /// # Safety
    /// As [`pack`](Self::pack).
    unsafe fn pack_blocks<S: Simd>(simd: S, rows: &[*const u8; MAX_LANES], depth: usize, dst: *mut f32, stride: usize) -> usize;
}

/// `rows`, each `bytes` further on.
#[inline(always)]
fn advance(rows: &[*const u8; MAX_LANES], bytes: usize) -> [*const u8; MAX_LANES] {
    let mut out = *rows;
    for row in &mut out {
        *row = row.wrapping_add(bytes);
    }
    out
}

impl Stored for f32 {
    const SIZE: usize = 4;

    #[inline(always)]
    unsafe fn load<S: Simd>(simd: S, p: *const u8) -> S::V {
        // SAFETY: the caller's promise; `load` takes any alignment.
        unsafe { simd.load(p.cast()) }
    }

    #[inline(always)]
    unsafe fn get(p: *const u8) -> f32 {
        // SAFETY: the caller's promise.
        unsafe { p.cast::<f32>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn pack_blocks<S: Simd>(simd: S, rows: &[*const u8; MAX_LANES], depth: usize, dst: *mut f32, stride: usize) -> usize {
        let whole = depth - depth % S::LANES;
        for k in (0..whole).step_by(S::LANES) {
            // SAFETY: `LANES` elements of each row from `k` on.
            unsafe { simd.transpose(&advance(rows, 4 * k), dst.add(k * stride), stride) }
        }
        whole
    }
}

impl Stored for half::bf16 {
    const SIZE: usize = 2;

    #[inline(always)]
    unsafe fn load<S: Simd>(simd: S, p: *const u8) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { simd.load_bf16(p) }
    }

    #[inline(always)]
    unsafe fn get(p: *const u8) -> f32 {
        // SAFETY: the caller's promise.
        Self::from_bits(u16::from_le(unsafe { p.cast::<u16>().read_unaligned() })).to_f32()
    }

    #[inline(always)]
    unsafe fn pack_blocks<S: Simd>(simd: S, rows: &[*const u8; MAX_LANES], depth: usize, dst: *mut f32, stride: usize) -> usize {
        // Pairs of elements are transposed as one unit, which halves the shuffles, and widened after.
        let mut pairs = [0f32; MAX_LANES * MAX_LANES];
        let whole = depth - depth % (2 * S::LANES);
        for k in (0..whole).step_by(2 * S::LANES) {
            // SAFETY: `2 LANES` elements of each row from `k` on; `pairs` holds `LANES` vectors.
            unsafe {
                simd.transpose(&advance(rows, 2 * k), pairs.as_mut_ptr(), S::LANES);
                for j in 0..S::LANES {
                    let pair = simd.load(pairs.as_ptr().add(j * S::LANES));
                    let to = dst.add((k + 2 * j) * stride);
                    simd.store(to, simd.widen_low(pair));
                    simd.store(to.add(stride), simd.widen_high(pair));
                }
            }
        }
        whole
    }
}

impl Stored for half::f16 {
    const SIZE: usize = 2;

    #[inline(always)]
    unsafe fn load<S: Simd>(simd: S, p: *const u8) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { simd.load_f16(p) }
    }

    #[inline(always)]
    unsafe fn get(p: *const u8) -> f32 {
        // SAFETY: the caller's promise.
        Self::from_bits(u16::from_le(unsafe { p.cast::<u16>().read_unaligned() })).to_f32()
    }

    #[inline(always)]
    unsafe fn pack_blocks<S: Simd>(simd: S, rows: &[*const u8; MAX_LANES], depth: usize, dst: *mut f32, stride: usize) -> usize {
        let mut wide = [0f32; MAX_LANES * MAX_LANES];
        let mut wide_rows = [wide.as_ptr().cast::<u8>(); MAX_LANES];
        for (i, row) in wide_rows.iter_mut().enumerate().take(S::LANES) {
            *row = row.wrapping_add(4 * i * S::LANES);
        }
        let whole = depth - depth % S::LANES;
        for k in (0..whole).step_by(S::LANES) {
            // SAFETY: `LANES` elements of each row from `k` on; `wide` holds `LANES` vectors.
            unsafe {
                for (i, row) in rows.iter().enumerate().take(S::LANES) {
                    simd.store(wide.as_mut_ptr().add(i * S::LANES), simd.load_f16(row.add(2 * k)));
                }
                simd.transpose(&wide_rows, dst.add(k * stride), stride);
            }
        }
        whole
    }
}

/// Calls `$body` with `$T` being the Rust type of the weight's `$dtype`.
macro_rules! with_stored {
    ($dtype:expr, $T:ident => $body:expr) => {
        match $dtype {
            $crate::DType::Bf16 => {
                type $T = half::bf16;
                $body
            }
            $crate::DType::F16 => {
                type $T = half::f16;
                $body
            }
            _ => {
                type $T = f32;
                $body
            }
        }
    };
}
pub(crate) use with_stored;

/// Whether [`with_stored`] knows the type; other types are refused when a weight is loaded.
pub(crate) const fn is_stored(dtype: DType) -> bool {
    matches!(dtype, DType::F32 | DType::F16 | DType::Bf16)
}

//! Vector instructions behind one trait, so that every kernel is written once and compiled per instruction set.
//!
//! A [`Kernel`] is a struct with the operands of one piece of work. [`Level::run`] enters it through a function that has
//! the instruction set enabled, into which the kernel and the operations of [`Simd`] are inlined.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;

use crate::{Error, Result};
use std::fmt;

/// An instruction set that the kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Isa {
    /// No intrinsics: what the compiler makes of four lanes, on every architecture.
    Portable,
    /// AVX2 with FMA and F16C, 8 lanes and 16 registers.
    Avx2,
    /// AVX-512 F, BW, DQ and VL, 16 lanes and 32 registers.
    Avx512,
}

impl Isa {
    /// All of them, slowest first.
    pub const ALL: [Self; 3] = [Self::Portable, Self::Avx2, Self::Avx512];

    /// The fastest that this machine has.
    pub fn detect() -> Self {
        Self::ALL.into_iter().rev().find(|isa| isa.is_available()).unwrap_or(Self::Portable)
    }

    /// Whether this machine has it.
    pub fn is_available(self) -> bool {
        match self {
            Self::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c"),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => {
                Self::Avx2.is_available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
            }
            #[cfg(not(target_arch = "x86_64"))]
            _ => false,
        }
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Portable => "portable",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
        })
    }
}

/// An instruction set that this machine was seen to have: the proof on which the intrinsics rest.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Level(Isa);

impl Level {
    pub(crate) fn new(isa: Isa) -> Result<Self> {
        if !isa.is_available() {
            return Err(Error::Device(format!("this machine has no {isa}; choose {}", Isa::detect())));
        }
        Ok(Self(isa))
    }

    pub(crate) fn isa(self) -> Isa {
        self.0
    }

    /// Runs `kernel` with this instruction set.
    #[inline]
    pub(crate) fn run<K: Kernel>(self, kernel: K) {
        match self.0 {
            Isa::Portable => kernel.run(portable::Portable),
            // SAFETY: `Level::new` saw that the machine has the instruction set.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => unsafe { avx2::run(kernel) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => unsafe { avx512::run(kernel) },
            #[cfg(not(target_arch = "x86_64"))]
            _ => kernel.run(portable::Portable),
        }
    }
}

/// A piece of work with its operands. `run` must be `#[inline(always)]`, and so must all that it calls and that uses
/// [`Simd`]: only then is it compiled for the instruction set.
pub(crate) trait Kernel {
    fn run<S: Simd>(self, simd: S);
}

/// Most lanes of any instruction set.
pub(crate) const MAX_LANES: usize = 16;

/// Vectors of f32 of one instruction set. A value of the type proves that the machine has it.
pub(crate) trait Simd: Copy + Send + Sync + 'static {
    /// A vector of [`LANES`](Self::LANES) f32.
    type V: Copy;
    const LANES: usize;
    /// Vector registers.
    const REGISTERS: usize;
    /// Rows of a register tile, at most [`LANES`](Self::LANES); its columns are two vectors.
    const MR: usize;

    fn splat(self, x: f32) -> Self::V;
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The greater; `b` if either is NaN.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// The lesser; `b` if either is NaN.
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    /// To the nearest integer, ties to even.
    fn round(self, a: Self::V) -> Self::V;
    /// `2^n` for integers `-127 < n < 128`, and 0 for `n = -127`.
    fn pow2(self, n: Self::V) -> Self::V;
    /// Per lane, `yes` where `a >= b`, else `no`.
    fn select_ge(self, a: Self::V, b: Self::V, yes: Self::V, no: Self::V) -> Self::V;
    /// Sum of the lanes, in an order that is always the same.
    fn reduce_add(self, a: Self::V) -> f32;
    /// Sums of the lanes of four vectors, in an order that is always the same, but not that of `reduce_add`.
    fn reduce_add4(self, a: [Self::V; 4]) -> [f32; 4];
    /// Greatest lane.
    fn reduce_max(self, a: Self::V) -> f32;
    /// Per lane, the lower 16 bits taken as bf16.
    fn widen_low(self, a: Self::V) -> Self::V;
    /// Per lane, the upper 16 bits taken as bf16.
    fn widen_high(self, a: Self::V) -> Self::V;

    /// # Safety
    /// `p` is readable for `LANES` f32; it need not be aligned.
    unsafe fn load(self, p: *const f32) -> Self::V;
    /// # Safety
    /// `p` is writable for `LANES` f32.
    unsafe fn store(self, p: *mut f32, a: Self::V);
    /// # Safety
    /// `p` is readable for `2 LANES` bytes; it need not be aligned.
    unsafe fn load_bf16(self, p: *const u8) -> Self::V;
    /// # Safety
    /// As [`load_bf16`](Self::load_bf16).
    unsafe fn load_f16(self, p: *const u8) -> Self::V;
    /// Transposes `LANES` x `LANES` 32-bit units: unit `j` of `rows[i]` goes to `dst[j * stride + i]`, `j` ascending, so
    /// with a `stride` below `LANES` what spills over is overwritten by the next.
    ///
    /// # Safety
    /// The first `LANES` of `rows` are readable for `LANES` units, unaligned; `dst` is writable for `(LANES - 1) * stride +
    /// LANES`.
    unsafe fn transpose(self, rows: &[*const u8; MAX_LANES], dst: *mut f32, stride: usize);
    /// Asks for the cache line of `p`, which may be any address.
    fn prefetch(self, p: *const u8);

    /// The first `n < LANES` elements, then zeros.
    ///
    /// # Safety
    /// `p` is readable for `n` f32.
    #[inline(always)]
    unsafe fn load_head(self, p: *const f32, n: usize) -> Self::V {
        let mut lanes = [0f32; MAX_LANES];
        // SAFETY: `p` has `n` elements, and `lanes` more than a vector.
        unsafe {
            std::ptr::copy_nonoverlapping(p, lanes.as_mut_ptr(), n);
            self.load(lanes.as_ptr())
        }
    }

    /// Stores the first `n <= LANES` lanes.
    ///
    /// # Safety
    /// `p` is writable for `n` f32.
    #[inline(always)]
    unsafe fn store_head(self, p: *mut f32, a: Self::V, n: usize) {
        let mut lanes = [0f32; MAX_LANES];
        // SAFETY: `lanes` holds a vector, and `p` has room for `n` elements.
        unsafe {
            self.store(lanes.as_mut_ptr(), a);
            std::ptr::copy_nonoverlapping(lanes.as_ptr(), p, n);
        }
    }
}

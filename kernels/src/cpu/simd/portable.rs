//! Four lanes in plain Rust, for architectures without intrinsics here; the compiler maps them to SSE2 or NEON.

use super::{MAX_LANES, Simd};

#[derive(Clone, Copy)]
pub(crate) struct Portable;

type V = [f32; 4];

#[inline(always)]
fn map(a: V, f: impl Fn(f32) -> f32) -> V {
    a.map(f)
}

#[inline(always)]
fn zip(a: V, b: V, f: impl Fn(f32, f32) -> f32) -> V {
    [f(a[0], b[0]), f(a[1], b[1]), f(a[2], b[2]), f(a[3], b[3])]
}

impl Simd for Portable {
    type V = V;
    const LANES: usize = 4;
    const REGISTERS: usize = 16;
    const MR: usize = 4;

    #[inline(always)]
    fn splat(self, x: f32) -> V {
        [x; 4]
    }

    #[inline(always)]
    fn add(self, a: V, b: V) -> V {
        zip(a, b, |a, b| a + b)
    }

    #[inline(always)]
    fn sub(self, a: V, b: V) -> V {
        zip(a, b, |a, b| a - b)
    }

    #[inline(always)]
    fn mul(self, a: V, b: V) -> V {
        zip(a, b, |a, b| a * b)
    }

    #[inline(always)]
    fn div(self, a: V, b: V) -> V {
        zip(a, b, |a, b| a / b)
    }

    #[inline(always)]
    fn fma(self, a: V, b: V, c: V) -> V {
        // Where the instruction is missing, `mul_add` is a call into the C library for each lane.
        if cfg!(any(target_arch = "aarch64", target_feature = "fma")) {
            [a[0].mul_add(b[0], c[0]), a[1].mul_add(b[1], c[1]), a[2].mul_add(b[2], c[2]), a[3].mul_add(b[3], c[3])]
        } else {
            [a[0] * b[0] + c[0], a[1] * b[1] + c[1], a[2] * b[2] + c[2], a[3] * b[3] + c[3]]
        }
    }

    #[inline(always)]
    fn max(self, a: V, b: V) -> V {
        zip(a, b, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    fn min(self, a: V, b: V) -> V {
        zip(a, b, |a, b| if a < b { a } else { b })
    }

    #[inline(always)]
    fn round(self, a: V) -> V {
        // Adding and taking away 1.5 x 2^23 rounds |a| < 2^22, which is all that the exponentials need.
        const MAGIC: f32 = 12_582_912.0;
        map(a, |a| (a + MAGIC) - MAGIC)
    }

    #[inline(always)]
    fn pow2(self, n: V) -> V {
        // NaN becomes 0 here; the factor beside it is NaN as well.
        map(n, |n| f32::from_bits(((n as i32 + 127) << 23) as u32))
    }

    #[inline(always)]
    fn select_ge(self, a: V, b: V, yes: V, no: V) -> V {
        let mut out = no;
        for i in 0..4 {
            if a[i] >= b[i] {
                out[i] = yes[i];
            }
        }
        out
    }

    #[inline(always)]
    fn reduce_add(self, a: V) -> f32 {
        (a[0] + a[2]) + (a[1] + a[3])
    }

    #[inline(always)]
    fn reduce_add4(self, a: [V; 4]) -> [f32; 4] {
        a.map(|a| self.reduce_add(a))
    }

    #[inline(always)]
    fn reduce_max(self, a: V) -> f32 {
        a[0].max(a[2]).max(a[1].max(a[3]))
    }

    #[inline(always)]
    fn widen_low(self, a: V) -> V {
        map(a, |a| f32::from_bits(a.to_bits() << 16))
    }

    #[inline(always)]
    fn widen_high(self, a: V) -> V {
        map(a, |a| f32::from_bits(a.to_bits() & 0xffff_0000))
    }

    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> V {
        // SAFETY: the caller's promise.
        unsafe { p.cast::<V>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn store(self, p: *mut f32, a: V) {
        // SAFETY: the caller's promise.
        unsafe { p.cast::<V>().write_unaligned(a) }
    }

    #[inline(always)]
    unsafe fn load_bf16(self, p: *const u8) -> V {
        // SAFETY: the caller's promise.
        unsafe { p.cast::<[u16; 4]>().read_unaligned() }.map(|bits| f32::from_bits(u32::from(u16::from_le(bits)) << 16))
    }

    #[inline(always)]
    unsafe fn load_f16(self, p: *const u8) -> V {
        // SAFETY: the caller's promise.
        unsafe { p.cast::<[u16; 4]>().read_unaligned() }.map(|bits| half::f16::from_bits(u16::from_le(bits)).to_f32())
    }

    #[inline(always)]
    unsafe fn transpose(self, rows: &[*const u8; MAX_LANES], dst: *mut f32, stride: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            let [a, b, c, d] = [rows[0], rows[1], rows[2], rows[3]].map(|row| row.cast::<V>().read_unaligned());
            self.store(dst, [a[0], b[0], c[0], d[0]]);
            self.store(dst.add(stride), [a[1], b[1], c[1], d[1]]);
            self.store(dst.add(2 * stride), [a[2], b[2], c[2], d[2]]);
            self.store(dst.add(3 * stride), [a[3], b[3], c[3], d[3]]);
        }
    }

    #[inline(always)]
    fn prefetch(self, _p: *const u8) {}
}

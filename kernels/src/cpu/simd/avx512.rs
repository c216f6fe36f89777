//! AVX-512 F, BW, DQ and VL.

use super::{Kernel, MAX_LANES, Simd};
use std::arch::x86_64::*;

/// Only [`run`] makes one.
#[derive(Clone, Copy)]
pub(crate) struct Avx512(());

/// Runs `kernel` compiled for AVX-512.
///
/// # Safety
/// The machine has AVX-512 F, BW, DQ and VL, AVX2, FMA and F16C.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub(super) unsafe fn run<K: Kernel>(kernel: K) {
    kernel.run(Avx512(()));
}

/// An intrinsic, whose instruction set a value of [`Avx512`] proves.
macro_rules! simd {
    ($intrinsic:expr) => {
        // SAFETY: a value of `Avx512` exists only where the machine has the instruction set.
        unsafe { $intrinsic }
    };
}

impl Simd for Avx512 {
    type V = __m512;
    const LANES: usize = 16;
    const REGISTERS: usize = 32;
    const MR: usize = 12;

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        simd!(_mm512_set1_ps(x))
    }

    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        simd!(_mm512_add_ps(a, b))
    }

    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        simd!(_mm512_sub_ps(a, b))
    }

    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        simd!(_mm512_mul_ps(a, b))
    }

    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        simd!(_mm512_div_ps(a, b))
    }

    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        simd!(_mm512_fmadd_ps(a, b, c))
    }

    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        simd!(_mm512_max_ps(a, b))
    }

    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        simd!(_mm512_min_ps(a, b))
    }

    #[inline(always)]
    fn round(self, a: __m512) -> __m512 {
        simd!(_mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a))
    }

    #[inline(always)]
    fn pow2(self, n: __m512) -> __m512 {
        simd!(_mm512_castsi512_ps(_mm512_slli_epi32::<23>(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)))))
    }

    #[inline(always)]
    fn select_ge(self, a: __m512, b: __m512, yes: __m512, no: __m512) -> __m512 {
        simd!(_mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_GE_OQ>(a, b), no, yes))
    }

    #[inline(always)]
    fn reduce_add(self, a: __m512) -> f32 {
        simd!(_mm512_reduce_add_ps(a))
    }

    #[inline(always)]
    fn reduce_add4(self, a: [__m512; 4]) -> [f32; 4] {
        simd!({
            let ab = _mm512_add_ps(_mm512_unpacklo_ps(a[0], a[1]), _mm512_unpackhi_ps(a[0], a[1]));
            let cd = _mm512_add_ps(_mm512_unpacklo_ps(a[2], a[3]), _mm512_unpackhi_ps(a[2], a[3]));
            let abcd = _mm512_add_ps(_mm512_shuffle_ps::<0x44>(ab, cd), _mm512_shuffle_ps::<0xee>(ab, cd));
            let half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps::<1>(abcd));
            let sums = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps::<1>(half));
            let mut out = [0.0; 4];
            _mm_storeu_ps(out.as_mut_ptr(), sums);
            out
        })
    }

    #[inline(always)]
    fn reduce_max(self, a: __m512) -> f32 {
        simd!(_mm512_reduce_max_ps(a))
    }

    #[inline(always)]
    fn widen_low(self, a: __m512) -> __m512 {
        simd!(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_castps_si512(a))))
    }

    #[inline(always)]
    fn widen_high(self, a: __m512) -> __m512 {
        simd!(_mm512_and_ps(a, _mm512_castsi512_ps(_mm512_set1_epi32(0xffff_0000u32 as i32))))
    }

    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> __m512 {
        simd!(_mm512_loadu_ps(p))
    }

    #[inline(always)]
    unsafe fn store(self, p: *mut f32, a: __m512) {
        simd!(_mm512_storeu_ps(p, a))
    }

    #[inline(always)]
    unsafe fn load_bf16(self, p: *const u8) -> __m512 {
        simd!(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast())))))
    }

    #[inline(always)]
    unsafe fn load_f16(self, p: *const u8) -> __m512 {
        simd!(_mm512_cvtph_ps(_mm256_loadu_si256(p.cast())))
    }

    #[inline(always)]
    unsafe fn transpose(self, rows: &[*const u8; MAX_LANES], dst: *mut f32, stride: usize) {
        // SAFETY: a value of `Avx512` exists only where the machine has the instruction set; the caller promises that the
        // rows and the target are there.
        unsafe {
            let mut a = [_mm512_setzero_ps(); 16];
            for i in 0..16 {
                a[i] = _mm512_loadu_ps(rows[i].cast());
            }
            // Within groups of four rows: quarter q of c[4 g + j] holds column 4 q + j of rows 4 g .. 4 g + 4.
            let mut c = a;
            for g in 0..4 {
                let i = g * 4;
                let (ab_low, ab_high) = (_mm512_unpacklo_ps(a[i], a[i + 1]), _mm512_unpackhi_ps(a[i], a[i + 1]));
                let (cd_low, cd_high) = (_mm512_unpacklo_ps(a[i + 2], a[i + 3]), _mm512_unpackhi_ps(a[i + 2], a[i + 3]));
                c[i] = _mm512_shuffle_ps::<0x44>(ab_low, cd_low);
                c[i + 1] = _mm512_shuffle_ps::<0xee>(ab_low, cd_low);
                c[i + 2] = _mm512_shuffle_ps::<0x44>(ab_high, cd_high);
                c[i + 3] = _mm512_shuffle_ps::<0xee>(ab_high, cd_high);
            }
            // The same among the quarters: column 4 q + j takes quarter q of c[j], c[4 + j], c[8 + j] and c[12 + j].
            let mut out = a;
            for j in 0..4 {
                let (low, high) = (_mm512_shuffle_f32x4::<0x44>(c[j], c[4 + j]), _mm512_shuffle_f32x4::<0xee>(c[j], c[4 + j]));
                let (low2, high2) = (_mm512_shuffle_f32x4::<0x44>(c[8 + j], c[12 + j]), _mm512_shuffle_f32x4::<0xee>(c[8 + j], c[12 + j]));
                out[j] = _mm512_shuffle_f32x4::<0x88>(low, low2);
                out[4 + j] = _mm512_shuffle_f32x4::<0xdd>(low, low2);
                out[8 + j] = _mm512_shuffle_f32x4::<0x88>(high, high2);
                out[12 + j] = _mm512_shuffle_f32x4::<0xdd>(high, high2);
            }
            for (j, column) in out.into_iter().enumerate() {
                _mm512_storeu_ps(dst.add(j * stride), column);
            }
        }
    }

    #[inline(always)]
    fn prefetch(self, p: *const u8) {
        simd!(_mm_prefetch::<_MM_HINT_T0>(p.cast()))
    }

    #[inline(always)]
    unsafe fn load_head(self, p: *const f32, n: usize) -> __m512 {
        simd!(_mm512_maskz_loadu_ps((1u16 << n).wrapping_sub(1), p))
    }

    #[inline(always)]
    unsafe fn store_head(self, p: *mut f32, a: __m512, n: usize) {
        simd!(_mm512_mask_storeu_ps(p, ((1u32 << n) - 1) as u16, a))
    }
}

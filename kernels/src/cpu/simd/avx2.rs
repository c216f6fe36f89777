//! AVX2, FMA and F16C.

use super::{Kernel, MAX_LANES, Simd};
use std::arch::x86_64::*;

/// Only [`run`] makes one.
#[derive(Clone, Copy)]
pub(crate) struct Avx2(());

/// Runs `kernel` compiled for AVX2.
///
/// # Safety
/// The machine has AVX2, FMA and F16C.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn run<K: Kernel>(kernel: K) {
    kernel.run(Avx2(()));
}

/// An intrinsic, whose instruction set a value of [`Avx2`] proves.
macro_rules! simd {
    ($intrinsic:expr) => {
        // SAFETY: a value of `Avx2` exists only where the machine has the instruction set.
        unsafe { $intrinsic }
    };
}

impl Simd for Avx2 {
    type V = __m256;
    const LANES: usize = 8;
    const REGISTERS: usize = 16;
    const MR: usize = 6;

    #[inline(always)]
    fn splat(self, x: f32) -> __m256 {
        simd!(_mm256_set1_ps(x))
    }

    #[inline(always)]
    fn add(self, a: __m256, b: __m256) -> __m256 {
        simd!(_mm256_add_ps(a, b))
    }

    #[inline(always)]
    fn sub(self, a: __m256, b: __m256) -> __m256 {
        simd!(_mm256_sub_ps(a, b))
    }

    #[inline(always)]
    fn mul(self, a: __m256, b: __m256) -> __m256 {
        simd!(_mm256_mul_ps(a, b))
    }

    #[inline(always)]
    fn div(self, a: __m256, b: __m256) -> __m256 {
        simd!(_mm256_div_ps(a, b))
    }

    #[inline(always)]
    fn fma(self, a: __m256, b: __m256, c: __m256) -> __m256 {
        simd!(_mm256_fmadd_ps(a, b, c))
    }

    #[inline(always)]
    fn max(self, a: __m256, b: __m256) -> __m256 {
        simd!(_mm256_max_ps(a, b))
    }

    #[inline(always)]
    fn min(self, a: __m256, b: __m256) -> __m256 {
        simd!(_mm256_min_ps(a, b))
    }

    #[inline(always)]
    fn round(self, a: __m256) -> __m256 {
        simd!(_mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a))
    }

    #[inline(always)]
    fn pow2(self, n: __m256) -> __m256 {
        simd!(_mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)))))
    }

    #[inline(always)]
    fn select_ge(self, a: __m256, b: __m256, yes: __m256, no: __m256) -> __m256 {
        simd!(_mm256_blendv_ps(no, yes, _mm256_cmp_ps::<_CMP_GE_OQ>(a, b)))
    }

    #[inline(always)]
    fn reduce_add(self, a: __m256) -> f32 {
        simd!({
            let a = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let a = _mm_add_ps(a, _mm_movehl_ps(a, a));
            _mm_cvtss_f32(_mm_add_ss(a, _mm_movehdup_ps(a)))
        })
    }

    #[inline(always)]
    fn reduce_add4(self, a: [__m256; 4]) -> [f32; 4] {
        simd!({
            let ab = _mm256_add_ps(_mm256_unpacklo_ps(a[0], a[1]), _mm256_unpackhi_ps(a[0], a[1]));
            let cd = _mm256_add_ps(_mm256_unpacklo_ps(a[2], a[3]), _mm256_unpackhi_ps(a[2], a[3]));
            let abcd = _mm256_add_ps(_mm256_shuffle_ps::<0x44>(ab, cd), _mm256_shuffle_ps::<0xee>(ab, cd));
            let sums = _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps::<1>(abcd));
            let mut out = [0.0; 4];
            _mm_storeu_ps(out.as_mut_ptr(), sums);
            out
        })
    }

    #[inline(always)]
    fn reduce_max(self, a: __m256) -> f32 {
        simd!({
            let a = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let a = _mm_max_ps(a, _mm_movehl_ps(a, a));
            _mm_cvtss_f32(_mm_max_ss(a, _mm_movehdup_ps(a)))
        })
    }

    #[inline(always)]
    fn widen_low(self, a: __m256) -> __m256 {
        simd!(_mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_castps_si256(a))))
    }

    #[inline(always)]
    fn widen_high(self, a: __m256) -> __m256 {
        simd!(_mm256_and_ps(a, _mm256_castsi256_ps(_mm256_set1_epi32(0xffff_0000u32 as i32))))
    }

    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> __m256 {
        simd!(_mm256_loadu_ps(p))
    }

    #[inline(always)]
    unsafe fn store(self, p: *mut f32, a: __m256) {
        simd!(_mm256_storeu_ps(p, a))
    }

    #[inline(always)]
    unsafe fn load_bf16(self, p: *const u8) -> __m256 {
        simd!(_mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast())))))
    }

    #[inline(always)]
    unsafe fn load_f16(self, p: *const u8) -> __m256 {
        simd!(_mm256_cvtph_ps(_mm_loadu_si128(p.cast())))
    }

    #[inline(always)]
    unsafe fn transpose(self, rows: &[*const u8; MAX_LANES], dst: *mut f32, stride: usize) {
        // SAFETY: a value of `Avx2` exists only where the machine has the instruction set; the caller promises that the rows
        // and the target are there.
        unsafe {
            // Rows i and i + 4 share a register, so that two rounds within the halves are all that is left.
            let mut q = [_mm256_setzero_ps(); 8];
            for i in 0..4 {
                let (a, b) = (rows[i].cast::<f32>(), rows[i + 4].cast::<f32>());
                q[i] = _mm256_insertf128_ps::<1>(_mm256_castps128_ps256(_mm_loadu_ps(a)), _mm_loadu_ps(b));
                q[i + 4] = _mm256_insertf128_ps::<1>(_mm256_castps128_ps256(_mm_loadu_ps(a.add(4))), _mm_loadu_ps(b.add(4)));
            }
            for half in 0..2 {
                let [a, b, c, d] = [q[half * 4], q[half * 4 + 1], q[half * 4 + 2], q[half * 4 + 3]];
                let (ab_low, ab_high) = (_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
                let (cd_low, cd_high) = (_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
                let to = dst.add(half * 4 * stride);
                _mm256_storeu_ps(to, _mm256_shuffle_ps::<0x44>(ab_low, cd_low));
                _mm256_storeu_ps(to.add(stride), _mm256_shuffle_ps::<0xee>(ab_low, cd_low));
                _mm256_storeu_ps(to.add(2 * stride), _mm256_shuffle_ps::<0x44>(ab_high, cd_high));
                _mm256_storeu_ps(to.add(3 * stride), _mm256_shuffle_ps::<0xee>(ab_high, cd_high));
            }
        }
    }

    #[inline(always)]
    fn prefetch(self, p: *const u8) {
        simd!(_mm_prefetch::<_MM_HINT_T0>(p.cast()))
    }
}

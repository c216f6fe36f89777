//! Exponentials and what is made of them, per vector.
//!
//! `exp2` and `exp` are within 3e-7 of the true value, relatively, `silu` within 5e-7 (of the true value's normal range).
//! `gelu_tanh` is within 5e-7 of `max(|gelu|, 0.2)`: its argument's rounding grows where it is nearly 0. NaN in gives NaN out.

use super::simd::Simd;

/// `2^r` on `-0.5 ..= 0.5`: `1 + r p(r)`, with `p` fitted by least squares at Chebyshev nodes to a relative error of 2e-8 with
/// these coefficients in f32.
const EXP2: [f32; 7] = [1.0, 6.931_472e-1, 2.402_264_8e-1, 5.550_329e-2, 9.618_374e-3, 1.339_984_8e-3, 1.537_070_6e-4];

#[inline(always)]
fn exp2_fraction<S: Simd>(simd: S, r: S::V) -> S::V {
    let mut p = simd.splat(EXP2[6]);
    for c in EXP2[..6].iter().rev() {
        p = simd.fma(p, r, simd.splat(*c));
    }
    p
}

/// `2^x` for `x <= 0`; exactly 0 below -126.5 and for negative infinity.
#[inline(always)]
pub(crate) fn exp2_nonpositive<S: Simd>(simd: S, x: S::V) -> S::V {
    let x = simd.max(simd.splat(-127.0), x);
    let n = simd.round(x);
    simd.mul(exp2_fraction(simd, simd.sub(x, n)), simd.pow2(n))
}

/// `e^x` over the whole range: infinity above 88.73, denormals and 0 below -87.34.
#[inline(always)]
pub(crate) fn exp<S: Simd>(simd: S, x: S::V) -> S::V {
    // Beyond these bounds the result is 0 or infinity; the order of the operands keeps NaN.
    let x = simd.min(simd.splat(90.0), simd.max(simd.splat(-105.0), x));
    let n = simd.round(simd.mul(x, simd.splat(std::f32::consts::LOG2_E)));
    // x - n ln 2, with ln 2 in two parts of which the first has few bits (Cody and Waite 1980).
    let r = simd.fma(n, simd.splat(-0.693_359_4), x);
    let r = simd.fma(n, simd.splat(2.121_944_4e-4), r);
    let p = exp2_fraction(simd, simd.mul(r, simd.splat(std::f32::consts::LOG2_E)));
    // 2^n may be outside of the range of normal numbers while 2^(n/2) is not.
    let half = simd.round(simd.mul(n, simd.splat(0.5)));
    simd.mul(simd.mul(p, simd.pow2(half)), simd.pow2(simd.sub(n, half)))
}

/// `x / (1 + e^-x)`
#[inline(always)]
pub(crate) fn silu<S: Simd>(simd: S, x: S::V) -> S::V {
    let e = exp(simd, simd.sub(simd.splat(0.0), x));
    simd.div(x, simd.add(simd.splat(1.0), e))
}

/// `x / 2 (1 + tanh(u))` with `u = sqrt(2 / pi) (x + 0.044715 x^3)`, which is `x / (1 + e^(-2 u))`: no cancellation near 0.
#[inline(always)]
pub(crate) fn gelu_tanh<S: Simd>(simd: S, x: S::V) -> S::V {
    const A: f32 = -1.595_769_2; // -2 sqrt(2 / pi)
    const B: f32 = A * 0.044_715;
    let square = simd.mul(x, x);
    let e = exp(simd, simd.mul(x, simd.fma(square, simd.splat(B), simd.splat(A))));
    simd.div(x, simd.add(simd.splat(1.0), e))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::simd::{Isa, Kernel, Level};

    #[derive(Clone, Copy, Debug)]
    enum Function {
        Exp2,
        Exp,
        Silu,
        Gelu,
    }

    struct Apply<'a>(Function, &'a mut [f32]);

    impl Kernel for Apply<'_> {
        #[inline(always)]
        fn run<S: Simd>(self, simd: S) {
            for chunk in self.1.chunks_exact_mut(S::LANES) {
                // SAFETY: the chunk is a vector.
                unsafe {
                    let x = simd.load(chunk.as_ptr());
                    let y = match self.0 {
                        Function::Exp2 => exp2_nonpositive(simd, x),
                        Function::Exp => exp(simd, x),
                        Function::Silu => silu(simd, x),
                        Function::Gelu => gelu_tanh(simd, x),
                    };
                    simd.store(chunk.as_mut_ptr(), y);
                }
            }
        }
    }

    /// Applies `function` on every instruction set to many values of `low..high`; compares by `error`.
    fn check(function: Function, low: f32, high: f32, expected: fn(f64) -> f64, error: fn(f64, f64) -> f64, limit: f64) {
        const STEPS: usize = 1 << 18;
        let x: Vec<f32> = (0..STEPS).map(|i| low + (high - low) * (i as f32 / STEPS as f32)).collect();
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
            let mut y = x.clone();
            Level::new(isa).unwrap().run(Apply(function, &mut y));
            for (x, y) in x.iter().zip(y) {
                let expected = expected(f64::from(*x));
                let error = error(f64::from(y), expected);
                assert!(error <= limit, "{function:?}({x}) on {isa} is {y}, expected {expected}: off by {error:e}");
            }
        }
    }

    fn relative(found: f64, expected: f64) -> f64 {
        (found - expected).abs() / expected.abs().max(f64::from(f32::MIN_POSITIVE))
    }

    fn gelu(x: f64) -> f64 {
        0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x * x * x)).tanh())
    }

    #[test]
    fn accuracy_is_as_stated() {
        check(Function::Exp2, -126.0, 0.0, f64::exp2, relative, 3e-7);
        check(Function::Exp, -87.0, 88.7, f64::exp, relative, 3e-7);
        check(Function::Silu, -87.0, 100.0, |x| x / (1.0 + (-x).exp()), relative, 5e-7);
        check(Function::Silu, -1.0, 1.0, |x| x / (1.0 + (-x).exp()), relative, 5e-7);
        check(Function::Gelu, -20.0, 20.0, gelu, |y, expected| (y - expected).abs() / expected.abs().max(0.2), 5e-7);
        check(Function::Gelu, -0.1, 0.1, gelu, relative, 5e-7);
    }

    #[test]
    fn ends_of_the_range_are_exact() {
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
            let run = |function, x: f32| {
                let mut y = [x; 16];
                Level::new(isa).unwrap().run(Apply(function, &mut y));
                y[0]
            };
            assert_eq!(run(Function::Exp2, 0.0), 1.0);
            assert_eq!(run(Function::Exp2, f32::NEG_INFINITY), 0.0);
            assert_eq!(run(Function::Exp2, -1e30), 0.0);
            assert_eq!(run(Function::Exp, 0.0), 1.0);
            assert_eq!(run(Function::Exp, f32::NEG_INFINITY), 0.0);
            assert_eq!(run(Function::Exp, 89.0), f32::INFINITY);
            assert_eq!(run(Function::Silu, 1e30), 1e30);
            assert_eq!(run(Function::Gelu, 100.0), 100.0);
            assert_eq!(run(Function::Gelu, -100.0), 0.0);
            for function in [Function::Exp2, Function::Exp, Function::Silu, Function::Gelu] {
                assert!(run(function, f32::NAN).is_nan(), "{function:?} on {isa}");
            }
        }
    }
}

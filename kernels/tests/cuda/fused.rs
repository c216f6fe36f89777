//! Products with the norm ahead of them and the gate behind them.

use crate::{
    common::{Rng, Stored, assert_close, bits, weights},
    support::*,
};
use idefics_kernels::{Backend, DType, RmsNorm, SwigluScratch, Tensor, cuda::Cuda};
use std::ops::Range;

/// Up to this many rows all is done in the pass over the weight; above, norm and gate are kernels of their own.
const STREAMED_ROWS: usize = 16;
const EPS: f32 = 1e-5;

#[derive(Clone, Copy, Debug)]
struct Case {
    n: usize,
    k: usize,
    /// Rows of the weight.
    m: usize,
    out_dtype: DType,
}

/// A sum, what its rounding may have cost, and the sum of the magnitudes of its terms.
#[derive(Clone, Copy)]
struct Sum {
    value: f64,
    error: f64,
}

struct Operands {
    case: Case,
    x: Vec<f32>,
    norm: Stored,
    weight: Stored,
}

impl Operands {
    /// Rows of very different size, as those of a residual stream are.
    fn new(case: Case, seed: u64) -> Self {
        let rng = &mut Rng(seed);
        let x = (0..case.n * case.k).map(|i| round(rng.unit() * 3f32.powi((i / case.k % 7) as i32 - 2))).collect();
        let (norm, weight) = (weights(rng, DType::Bf16, &[&[case.k]]), weights(rng, DType::Bf16, &[&[case.m, case.k]]));
        Self { case, x, norm, weight }
    }

    /// `rms_norm(x[row]) . weight[j]`
    fn sum(&self, row: usize, j: usize) -> Sum {
        let Case { n, k, .. } = self.case;
        let x = &self.x[row * k..][..k];
        let mean = x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / k as f64;
        let root = (mean + f64::from(EPS)).sqrt();
        let terms = x.iter().zip(&self.norm.values).zip(&self.weight.values[j * k..]).map(|((x, norm), weight)| {
            let product = f64::from(*x) * f64::from(round(*norm));
            // Rounded on its way into the product; with many rows it is what is normalised that is rounded.
            let product = if n <= STREAMED_ROWS { f64::from(round(product as f32)) } else { product };
            product * f64::from(round(*weight)) / root
        });
        let (value, size) = terms.fold((0.0, 0.0), |(sum, size), term| (sum + term, size + term.abs()));
        // Sums in f32, of the terms as in `linear`, of the squares better; and the approximate root, good to 2 units in the last place.
        let error = (k as f64 / 8.0 + 32.0) * f64::from(f32::EPSILON) * size * 1.01;
        Sum { value, error: if n <= STREAMED_ROWS { error } else { error + size * BF16_ROUNDING } }
    }

    fn norm<'a>(&self, weight: &'a idefics_kernels::Matrix<Cuda>) -> RmsNorm<'a, Cuda> {
        RmsNorm { weight, eps: EPS }
    }

    fn x(&self, cuda: &Cuda, rows: Range<usize>) -> Tensor<Cuda> {
        tensor(cuda, rows.len(), self.case.k, &self.x[rows.start * self.case.k..rows.end * self.case.k])
    }

    fn linear(&self, cuda: &Cuda, rows: Range<usize>) -> Tensor<Cuda> {
        let mut normed = poisoned(cuda, rows.len(), self.case.k, DType::Bf16);
        let mut out = poisoned(cuda, rows.len(), self.case.m, self.case.out_dtype);
        let (norm, weight) = (self.norm.load(cuda), self.weight.load(cuda));
        cuda.rms_norm_linear(&self.x(cuda, rows), self.norm(&norm), &weight, &mut normed, &mut out).unwrap();
        assert_untouched_around("normed", cuda, &mut normed);
        assert_untouched_around("out", cuda, &mut out);
        out
    }

    fn swiglu(&self, cuda: &Cuda, rows: Range<usize>) -> Tensor<Cuda> {
        let mut normed = poisoned(cuda, rows.len(), self.case.k, DType::Bf16);
        let mut gate_up = poisoned(cuda, rows.len(), self.case.m, DType::Bf16);
        let mut out = poisoned(cuda, rows.len(), self.case.m / 2, DType::Bf16);
        let (norm, weight) = (self.norm.load(cuda), self.weight.load(cuda));
        let scratch = SwigluScratch { normed: &mut normed, gate_up: &mut gate_up };
        cuda.rms_norm_swiglu(&self.x(cuda, rows), self.norm(&norm), &weight, scratch, &mut out).unwrap();
        assert_untouched_around("normed", cuda, &mut normed);
        assert_untouched_around("gate_up", cuda, &mut gate_up);
        assert_untouched_around("out", cuda, &mut out);
        out
    }

    fn check_linear(&self, cuda: &Cuda) {
        let Case { n, m, out_dtype, .. } = self.case;
        let sums: Vec<Sum> = (0..n * m).map(|i| self.sum(i / m, i % m)).collect();
        let stored = if out_dtype == DType::Bf16 { BF16_ROUNDING } else { 0.0 };
        let expected: Vec<f64> = sums.iter().map(|sum| sum.value).collect();
        let tolerance = |i: usize| sums[i].error + stored * (sums[i].value.abs() + sums[i].error) + 1e-30;
        assert_close(&format!("rms_norm_linear {:?}", self.case), &read(cuda, &self.linear(cuda, 0..n)), &expected, tolerance);
    }

    fn check_swiglu(&self, cuda: &Cuda) {
        let Case { n, m, .. } = self.case;
        let (mut expected, mut tolerance) = (Vec::new(), Vec::new());
        for (row, j) in (0..n).flat_map(|row| (0..m / 2).map(move |j| (row, j))) {
            let [gate, up] = [j, m / 2 + j].map(|j| {
                let Sum { value, error } = self.sum(row, j);
                Sum { value, error: if n <= STREAMED_ROWS { error } else { error + (value.abs() + error) * BF16_ROUNDING } }
            });
            let silu = gate.value / (1.0 + (-gate.value).exp());
            // The slope of silu is below 1.1; its exponential is good to 2^-21.
            let silu_error = 1.1 * gate.error + silu.abs() * 1e-5;
            let error = silu_error * (up.value.abs() + up.error) + silu.abs() * up.error;
            expected.push(silu * up.value);
            tolerance.push(error + BF16_ROUNDING * ((silu * up.value).abs() + error) + 1e-30);
        }
        let name = format!("rms_norm_swiglu {:?}", self.case);
        assert_close(&name, &read(cuda, &self.swiglu(cuda, 0..n)), &expected, |i| tolerance[i]);
    }
}

/// No vector divides 1, 7, 75, 588; 200 ends within a batch of a warp, 1,152 within a turn of all.
const SHAPES: [(usize, usize); 8] = [(1, 2), (7, 6), (8, 16), (75, 34), (200, 18), (588, 10), (1152, 30), (64, 14)];

#[test]
#[ignore = "needs a CUDA device or its emulation"]
fn normed_products_match_f64_for_all_numbers_of_rows_and_all_tails() {
    let cuda = open();
    for n in (1..=17).chain([33]) {
        for (i, (k, m)) in SHAPES.into_iter().enumerate() {
            let out_dtype = if (n + i) % 2 == 0 { DType::F32 } else { DType::Bf16 };
            // One row of the weight less, so that there are odd numbers of them.
            Operands::new(Case { n, k, m: m - 1, out_dtype }, (n * 100 + i) as u64).check_linear(&cuda);
        }
    }
}

#[test]
#[ignore = "needs a CUDA device or its emulation"]
fn gated_products_match_f64_for_all_numbers_of_rows_and_all_tails() {
    let cuda = open();
    for n in (1..=17).chain([33]) {
        for (i, (k, m)) in SHAPES.into_iter().enumerate() {
            Operands::new(Case { n, k, m, out_dtype: DType::Bf16 }, (n * 100 + i) as u64).check_swiglu(&cuda);
        }
    }
}

#[test]
#[ignore = "needs a CUDA device or its emulation"]
fn long_rows_are_normed_through_whole_and_partial_turns() {
    let cuda = open();
    for (n, k) in [(1, 4096), (8, 4096), (9, 4304), (16, 4096), (2, 4101), (18, 4096)] {
        let operands = Operands::new(Case { n, k, m: 18, out_dtype: DType::F32 }, k as u64);
        operands.check_linear(&cuda);
        operands.check_swiglu(&cuda);
    }
}

#[test]
#[ignore = "needs a CUDA device or its emulation"]
fn fused_row_has_the_same_bits_whatever_else_is_in_the_batch() {
    let cuda = open();
    for (k, m) in [(1096, 40), (523, 34)] {
        let operands = Operands::new(Case { n: STREAMED_ROWS, k, m, out_dtype: DType::F32 }, 5);
        for op in [Operands::linear, Operands::swiglu] {
            let product = |rows| bits(&read(&cuda, &op(&operands, &cuda, rows)));
            let alone: Vec<Vec<u32>> = (0..STREAMED_ROWS).map(|row| product(row..row + 1)).collect();
            for rows in (2..=STREAMED_ROWS).map(|n| 0..n).chain([3..7, 5..14, 1..16]) {
                assert!(product(rows.clone()) == alone[rows.clone()].concat(), "rows {rows:?} of {k}");
            }
        }
    }
}

#[test]
#[ignore = "needs a CUDA device or its emulation"]
fn fused_rows_of_zeros_and_no_rows_are_what_their_parts_make_of_them() {
    let cuda = open();
    let mut operands = Operands::new(Case { n: 2, k: 24, m: 6, out_dtype: DType::F32 }, 1);
    operands.x.fill(0.0);
    assert!(read(&cuda, &operands.linear(&cuda, 0..2)).iter().all(|y| *y == 0.0));
    assert!(read(&cuda, &operands.swiglu(&cuda, 0..2)).iter().all(|y| *y == 0.0));
    operands.linear(&cuda, 0..0);
    operands.swiglu(&cuda, 0..0);
}

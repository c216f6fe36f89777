use crate::{
    common::{Rng, Stored, assert_close, weights},
    support::*,
};
use idefics_kernels::{Backend, DType, cuda::Cuda};

/// Widths of the demo, of SigLIP, of Mistral, and some that no vector divides.
const SHAPES: [(usize, usize); 7] = [(1, 1), (3, 7), (5, 33), (4, 144), (2, 1152), (3, 4096), (1, 2056)];

struct Case {
    cuda: Cuda,
    x: Vec<f32>,
    weight: Stored,
    bias: Stored,
    rows: usize,
    cols: usize,
}

impl Case {
    /// Rows whose mean is far from 0 against their spread, which one pass over the squares would lose.
    fn new(rows: usize, cols: usize) -> Self {
        let rng = &mut Rng(cols as u64);
        let x = units(rng, rows * cols).iter().map(|v| round(v + 8.0)).collect();
        let (weight, bias) = (weights(rng, DType::Bf16, &[&[cols]]), weights(rng, DType::Bf16, &[&[cols]]));
        Self { cuda: open(), x, weight, bias, rows, cols }
    }

    fn row(&self, row: usize) -> Vec<f64> {
        self.x[row * self.cols..(row + 1) * self.cols].iter().map(|v| f64::from(*v)).collect()
    }

    fn check(&self, name: &str, run: impl Fn(&Self, &mut idefics_kernels::Tensor<Cuda>), expected: &[f64], scale: impl Fn(usize) -> f64) {
        let mut out = poisoned(&self.cuda, self.rows, self.cols, DType::Bf16);
        run(self, &mut out);
        // Sums of up to 4,096 squares in f32 are good to 1e-5 in whatever order; the rest is the rounding of the result.
        let tolerance = |i: usize| expected[i].abs() * BF16_ROUNDING + scale(i) * 1e-5 + 1e-30;
        assert_close(&format!("{name} {} x {}", self.rows, self.cols), &read(&self.cuda, &out), expected, tolerance);
        assert_untouched_around(name, &self.cuda, &mut out);
    }
}

#[test]
#[ignore = "needs a CUDA device or its emulation"]
fn rms_norm_is_that_of_f64() {
    for (rows, cols) in SHAPES {
        let case = Case::new(rows, cols);
        let mut expected = Vec::new();
        for row in 0..rows {
            let x = case.row(row);
            let mean = x.iter().map(|v| v * v).sum::<f64>() / cols as f64;
            expected.extend(x.iter().zip(&case.weight.values).map(|(x, w)| x / (mean + 1e-5).sqrt() * f64::from(*w)));
        }
        let run = |case: &Case, out: &mut _| {
            let x = tensor(&case.cuda, rows, cols, &case.x);
            case.cuda.rms_norm(&x, &case.weight.load(&case.cuda), 1e-5, out).unwrap();
        };
        case.check("rms_norm", run, &expected, |i| expected[i].abs());
    }
}

#[test]
#[ignore = "needs a CUDA device or its emulation"]
fn layer_norm_is_that_of_f64() {
    for (rows, cols) in SHAPES {
        let case = Case::new(rows, cols);
        let (mut expected, mut scale) = (Vec::new(), Vec::new());
        for row in 0..rows {
            let x = case.row(row);
            let mean = x.iter().sum::<f64>() / cols as f64;
            let deviation = (x.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / cols as f64 + 1e-6).sqrt();
            for ((x, w), b) in x.iter().zip(&case.weight.values).zip(&case.bias.values) {
                expected.push((x - mean) / deviation * f64::from(*w) + f64::from(*b));
                // An error of the mean, 9 * 2^-24 a few times over, is divided by the deviation.
                scale.push(f64::from(w.abs()) * (1.0 + 9.0 / deviation.max(0.1)) + f64::from(b.abs()));
            }
        }
        let run = |case: &Case, out: &mut _| {
            let x = tensor(&case.cuda, rows, cols, &case.x);
            let (weight, bias) = (case.weight.load(&case.cuda), case.bias.load(&case.cuda));
            case.cuda.layer_norm(&x, &weight, &bias, 1e-6, out).unwrap();
        };
        case.check("layer_norm", run, &expected, |i| scale[i]);
    }
}

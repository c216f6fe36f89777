//! RMSNorm (Zhang and Sennrich 2019) and LayerNorm (Ba et al. 2016), row by row in f32.

use super::{
    Cpu,
    simd::{Kernel, Simd},
    storage::{CpuWeight, Shared},
};
use crate::{Matrix, Result, Tensor, check};

/// Elements above which threads share the work.
const PARALLEL_ELEMENTS: usize = 1 << 16;

/// Rows of a task.
const ROWS: usize = 8;

/// [`Backend::rms_norm`](crate::Backend::rms_norm).
pub(crate) fn rms_norm(cpu: &Cpu, x: &Tensor<Cpu>, weight: &Matrix<Cpu>, eps: f32, out: &mut Tensor<Cpu>) -> Result<()> {
    check::rms_norm(cpu, x, weight, out)?;
    norm(cpu, x, CpuWeight::vector_of("rms_norm", weight)?, None, eps, out);
    Ok(())
}

/// [`Backend::layer_norm`](crate::Backend::layer_norm).
pub(crate) fn layer_norm(
    cpu: &Cpu,
    x: &Tensor<Cpu>,
    weight: &Matrix<Cpu>,
    bias: &Matrix<Cpu>,
    eps: f32,
    out: &mut Tensor<Cpu>,
) -> Result<()> {
    check::layer_norm(cpu, x, weight, bias, out)?;
    let bias = CpuWeight::vector_of("layer_norm", bias)?;
    norm(cpu, x, CpuWeight::vector_of("layer_norm", weight)?, Some(bias), eps, out);
    Ok(())
}

fn norm(cpu: &Cpu, x: &Tensor<Cpu>, weight: &[f32], bias: Option<&[f32]>, eps: f32, out: &mut Tensor<Cpu>) {
    let (rows, cols) = (x.rows(), x.cols());
    let x: &[f32] = x.storage.slice(x.elements());
    let out = Shared::new(out.storage.slice_mut(out.elements()));
    cpu.for_each(x.len() >= PARALLEL_ELEMENTS, rows.div_ceil(ROWS), |i| {
        let part = i * ROWS * cols..rows.min((i + 1) * ROWS) * cols;
        // SAFETY: each row of the output belongs to one tile.
        let out = unsafe { out.part(part.clone()) };
        cpu.level().run(Rows { x: &x[part], weight, bias, eps, out });
    });
}

struct Rows<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    /// With a bias it is LayerNorm, without it RMSNorm.
    bias: Option<&'a [f32]>,
    eps: f32,
    out: &'a mut [f32],
}

impl Kernel for Rows<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let cols = self.weight.len().max(1);
        for (x, out) in self.x.chunks_exact(cols).zip(self.out.chunks_exact_mut(cols)) {
            let mean = match self.bias {
                Some(_) => sum_of_powers::<S, false>(simd, x, 0.0) / cols as f32,
                None => 0.0,
            };
            let variance = sum_of_powers::<S, true>(simd, x, mean) / cols as f32;
            let scale = 1.0 / (variance + self.eps).sqrt();
            apply(simd, x, mean, scale, self.weight, self.bias, out);
        }
    }
}

/// Sum of `x - mean`, or of its squares.
#[inline(always)]
fn sum_of_powers<S: Simd, const SQUARE: bool>(simd: S, x: &[f32], mean: f32) -> f32 {
    let mut sums = [simd.splat(0.0); 4];
    let shift = simd.splat(mean);
    let whole = x.len() - x.len() % (4 * S::LANES);
    for i in (0..whole).step_by(4 * S::LANES) {
        for (j, sum) in sums.iter_mut().enumerate() {
            // SAFETY: four vectors from `i` on are below `whole`.
            let x = simd.sub(unsafe { simd.load(x.as_ptr().add(i + j * S::LANES)) }, shift);
            *sum = if SQUARE { simd.fma(x, x, *sum) } else { simd.add(x, *sum) };
        }
    }
    let mut sum = simd.reduce_add(simd.add(simd.add(sums[0], sums[1]), simd.add(sums[2], sums[3])));
    for x in &x[whole..] {
        let x = x - mean;
        sum += if SQUARE { x * x } else { x };
    }
    sum
}

#[inline(always)]
fn apply<S: Simd>(simd: S, x: &[f32], mean: f32, scale: f32, weight: &[f32], bias: Option<&[f32]>, out: &mut [f32]) {
    let (shift, factor) = (simd.splat(mean), simd.splat(scale));
    let whole = x.len() - x.len() % S::LANES;
    for i in (0..whole).step_by(S::LANES) {
        // SAFETY: a vector from `i` on is below `whole`, and all slices are as long as `x`.
        unsafe {
            let normed = simd.mul(simd.sub(simd.load(x.as_ptr().add(i)), shift), factor);
            let weight = simd.load(weight.as_ptr().add(i));
            let value = match bias {
                Some(bias) => simd.fma(normed, weight, simd.load(bias.as_ptr().add(i))),
                None => simd.mul(normed, weight),
            };
            simd.store(out.as_mut_ptr().add(i), value);
        }
    }
    for i in whole..x.len() {
        out[i] = (x[i] - mean) * scale * weight[i] + bias.map_or(0.0, |bias| bias[i]);
    }
}

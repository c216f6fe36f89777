//! Tensors of the card with poison around them.

use crate::common::Rng;
use half::bf16;
use idefics_kernels::{
    Backend, DType, Element, Tensor,
    cuda::{AttentionKernels, Cuda, CudaOptions},
};
use std::sync::Once;

/// What rounding a value to bf16 costs at most, relative to it: half a unit in the last of 8 bits.
pub(crate) const BF16_ROUNDING: f64 = 1.0 / 256.0;

/// The first card, or its emulation. The first test compiles the kernels, and the others find them in the user's cache, where
/// they are known by all that goes into them: nothing of another version is tested.
pub(crate) fn open() -> Cuda {
    static FIRST: Once = Once::new();
    let open = || Cuda::open(&CudaOptions::default()).unwrap();
    FIRST.call_once(|| drop(open()));
    open()
}

/// The first card, or its emulation, with each kind of attention that it can run.
pub(crate) fn open_each() -> Vec<Cuda> {
    let default = open();
    let kinds: &[_] = match default.compute_capability() {
        (9, 0) => &[AttentionKernels::Mma, AttentionKernels::Wgmma],
        _ => &[AttentionKernels::Mma],
    };
    kinds.iter().map(|attention| Cuda::open(&CudaOptions { attention: *attention, ..CudaOptions::default() }).unwrap()).collect()
}

/// As bf16 holds it.
pub(crate) fn round(value: f32) -> f32 {
    bf16::from_f32(value).to_f32()
}

/// Numbers in -1..1 that bf16 holds.
pub(crate) fn units(rng: &mut Rng, len: usize) -> Vec<f32> {
    rng.units(len).into_iter().map(round).collect()
}

/// NaN everywhere, with a window of `rows` that does not begin at row 0.
pub(crate) fn poisoned(cuda: &Cuda, rows: usize, cols: usize, dtype: DType) -> Tensor<Cuda> {
    let mut tensor = cuda.alloc(rows + 16, cols, dtype).unwrap();
    match dtype {
        DType::Bf16 => cuda.upload(&vec![bf16::NAN; (rows + 16) * cols], &mut tensor).unwrap(),
        DType::F32 => cuda.upload(&vec![f32::NAN; (rows + 16) * cols], &mut tensor).unwrap(),
        DType::I32 => cuda.upload(&vec![i32::MIN; (rows + 16) * cols], &mut tensor).unwrap(),
        _ => cuda.upload(&vec![0xabu8; (rows + 16) * cols], &mut tensor).unwrap(),
    }
    tensor.set_window(8..8 + rows).unwrap();
    tensor
}

/// Activations with these elements, poisoned around.
pub(crate) fn tensor(cuda: &Cuda, rows: usize, cols: usize, values: &[f32]) -> Tensor<Cuda> {
    let mut tensor = poisoned(cuda, rows, cols, DType::Bf16);
    write(cuda, values, &mut tensor);
    tensor
}

/// Writes activations.
pub(crate) fn write(cuda: &Cuda, values: &[f32], tensor: &mut Tensor<Cuda>) {
    let values: Vec<bf16> = values.iter().map(|v| bf16::from_f32(*v)).collect();
    cuda.upload(&values, tensor).unwrap();
}

/// Elements of a type of the host, poisoned around.
pub(crate) fn elements<T: Element>(cuda: &Cuda, rows: usize, cols: usize, values: &[T]) -> Tensor<Cuda> {
    let mut tensor = poisoned(cuda, rows, cols, T::DTYPE);
    cuda.upload(values, &mut tensor).unwrap();
    tensor
}

/// A column of indices.
pub(crate) fn indices(cuda: &Cuda, values: &[i32]) -> Tensor<Cuda> {
    elements(cuda, values.len(), 1, values)
}

/// The elements of the window.
pub(crate) fn read(cuda: &Cuda, tensor: &Tensor<Cuda>) -> Vec<f32> {
    let len = tensor.rows() * tensor.cols();
    match tensor.dtype() {
        DType::Bf16 => {
            let mut out = vec![bf16::ZERO; len];
            cuda.download(tensor, &mut out).unwrap();
            out.into_iter().map(bf16::to_f32).collect()
        }
        _ => {
            let mut out = vec![0f32; len];
            cuda.download(tensor, &mut out).unwrap();
            out
        }
    }
}

/// That nothing around the window of activations was written.
pub(crate) fn assert_untouched_around(name: &str, cuda: &Cuda, tensor: &mut Tensor<Cuda>) {
    let window = tensor.window();
    for rows in [0..window.start, window.end..tensor.capacity()] {
        tensor.set_window(rows).unwrap();
        assert!(read(cuda, tensor).iter().all(|v| v.is_nan()), "{name}: wrote outside of the window");
    }
    tensor.set_window(window).unwrap();
}

//! Weights from the mapped checkpoint to the card, as bf16.

use super::{Cuda, driver::DeviceBuffer};
use crate::{DType, Error, Matrix, Result, weights::WeightView};
use half::{bf16, f16};
use rayon::{
    iter::{IndexedParallelIterator, ParallelIterator},
    slice::ParallelSliceMut,
};

/// What a thread brings into pinned memory in one go.
const THREAD_BYTES: usize = 256 << 10;

/// [`Backend::load_weight`](crate::Backend::load_weight)
pub(super) fn load(cuda: &Cuda, parts: &[WeightView]) -> Result<Matrix<Cuda>> {
    let (rows, cols) = stacked_shape(parts)?;
    let storage = DeviceBuffer::uninit(&cuda.stream, rows * cols * size_of::<bf16>())?;
    let mut to = storage.pointer();
    for part in parts {
        let source = part.bytes();
        let bytes = source.len() / part.dtype.size() * size_of::<bf16>();
        let dtype = part.dtype;
        cuda.staging().upload(to, bytes, |offset, piece| {
            // A bus takes more than one thread gives: it would wait for page faults and copies.
            piece.par_chunks_mut(THREAD_BYTES).enumerate().for_each(|(i, piece)| {
                let from = (offset + i * THREAD_BYTES) / size_of::<bf16>() * dtype.size();
                convert(dtype, &source[from..from + piece.len() / size_of::<bf16>() * dtype.size()], piece);
            });
        })?;
        to += bytes as u64;
    }
    Ok(Matrix { storage, rows, cols, dtype: DType::Bf16 })
}

/// Rows and columns of the parts together: matrices are stacked by rows, vectors end to end.
fn stacked_shape(parts: &[WeightView]) -> Result<(usize, usize)> {
    let fail = |what: String| Err(Error::shape("load_weight", what));
    let Some(first) = parts.first() else { return fail("expected one part or more, found none".into()) };
    let vectors = first.shape.len() < 2;
    for part in parts {
        if (part.shape.len() < 2) != vectors || !vectors && part.cols() != first.cols() {
            return fail(format!("expected parts that stack on {:?}, found {:?} ({})", first.shape, part.shape, part.name));
        }
        if !matches!(part.dtype, DType::F32 | DType::F16 | DType::Bf16) {
            return Err(Error::TensorDType { name: part.name.clone(), found: part.dtype.to_string() });
        }
    }
    let sum = |size: fn(&WeightView) -> usize| parts.iter().map(size).sum();
    Ok(if vectors { (1, sum(WeightView::cols)) } else { (sum(WeightView::rows), first.cols()) })
}

/// Little-endian elements of `dtype` as bf16, rounded to nearest even.
fn convert(dtype: DType, source: &[u8], out: &mut [u8]) {
    let narrow = |out: &mut [u8], size: usize, widen: fn(&[u8]) -> f32| {
        for (out, element) in out.chunks_exact_mut(2).zip(source.chunks_exact(size)) {
            out.copy_from_slice(&bf16::from_f32(widen(element)).to_le_bytes());
        }
    };
    match dtype {
        DType::F32 => narrow(out, 4, |b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])),
        DType::F16 => narrow(out, 2, |b| f16::from_le_bytes([b[0], b[1]]).to_f32()),
        _ => out.copy_from_slice(source),
    }
}

//! Tensors that go to the card in one copy: they lie behind one another in one allocation, anew for each upload.

use super::{
    Cuda,
    driver::{DeviceBuffer, DevicePtr},
};
use crate::{DType, Error, Result, Tensor, Upload};

/// Where a tensor may begin: at multiples of what the bus moves at once, which the widest word of a kernel divides.
const ALIGNMENT: usize = 64;

/// Lays tensors out behind one another, and makes them anew where they then lie.
struct Layout<'a> {
    memory: &'a DeviceBuffer,
    end: usize,
}

impl Layout<'_> {
    /// The next tensor and where it begins.
    fn next(&mut self, rows: usize, cols: usize, dtype: DType) -> Result<(usize, Tensor<Cuda>)> {
        let (start, bytes) = (self.end, rows * cols * dtype.size());
        self.end = (start + bytes).next_multiple_of(ALIGNMENT);
        let full = || Error::shape("upload_packed", format!("expected no more elements than were allocated, found [{rows}, {cols}]"));
        Ok((start, Tensor::new(self.memory.part(start, bytes).ok_or_else(full)?, rows, cols, dtype)))
    }
}

/// [`Backend::alloc_packed`](crate::Backend::alloc_packed)
pub(super) fn alloc<const N: usize>(cuda: &Cuda, capacities: [(usize, DType); N]) -> Result<[Tensor<Cuda>; N]> {
    let bytes: usize = capacities.iter().map(|(elements, dtype)| (elements * dtype.size()).next_multiple_of(ALIGNMENT)).sum();
    let memory = DeviceBuffer::zeroed(&cuda.stream, bytes)?;
    let mut layout = Layout { memory: &memory, end: 0 };
    let tensors = capacities.into_iter().map(|(elements, dtype)| Ok(layout.next(elements, 1, dtype)?.1));
    let tensors = tensors.collect::<Result<Vec<_>>>()?;
    tensors.try_into().map_err(|_| Error::shape("alloc_packed", format!("expected {N} tensors")))
}

/// [`Backend::upload_packed`](crate::Backend::upload_packed)
pub(super) fn upload(cuda: &Cuda, uploads: &mut [Upload<'_, Cuda>]) -> Result<()> {
    let Some(memory) = uploads.first().map(|first| first.tensor.storage.whole()) else { return Ok(()) };
    let mut layout = Layout { memory: &memory, end: 0 };
    let mut parts = Vec::with_capacity(uploads.len());
    for upload in uploads {
        if !upload.tensor.storage.is_beside(&memory) {
            return Err(Error::shape("upload_packed", "expected tensors that were allocated together"));
        }
        let rows = upload.rows()?;
        let (start, tensor) = layout.next(rows, upload.cols, upload.values.dtype())?;
        *upload.tensor = tensor;
        parts.push((start, upload.values.bytes()));
    }
    cuda.device().bind()?;
    let to: DevicePtr = memory.pointer();
    let end = parts.last().map_or(0, |(start, bytes)| start + bytes.len());
    cuda.staging().upload(to, end, |offset, piece| {
        for (start, bytes) in &parts {
            let (from, until) = (offset.max(*start), (offset + piece.len()).min(start + bytes.len()));
            if from < until {
                piece[from - offset..until - offset].copy_from_slice(&bytes[from - start..until - start]);
            }
        }
    })
}

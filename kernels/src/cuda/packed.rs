//! Tensors that go to the card in one copy: they lie behind one another in one allocation, anew for each upload.
//!
//! Uploads alternate between two halves of the allocation and have a stream of their own, so that the tensors of one step arrive
//! while the step before, which reads the other half, still computes.

use super::{
    Cuda,
    driver::{DeviceBuffer, Event, Stream},
    staging::Staging,
};
use crate::{DType, Error, Result, Tensor, Upload};
use std::sync::{Arc, atomic::Ordering};

/// Where a tensor may begin: at multiples of what the bus moves at once, which the widest word of a kernel divides.
const ALIGNMENT: usize = 64;

/// Bytes of a pinned slot, of which an upload takes as many as it needs: those of a decode step are few.
const SLOT_BYTES: usize = 1 << 20;

/// The stream of uploads, and its order with that of the ops.
pub(super) struct Uploads {
    /// Of the ops.
    ops: Arc<Stream>,
    copies: Arc<Stream>,
    staging: Staging,
    /// In `ops`, where the upload before this one was queued: ops that read the half which that upload left come before.
    left: Event,
    /// In `copies`, behind the last upload.
    arrived: Event,
}

impl Uploads {
    pub(super) fn new(ops: &Arc<Stream>) -> Result<Self> {
        let copies = Stream::new(Arc::clone(ops.device()))?;
        Ok(Self {
            staging: Staging::new(&copies, SLOT_BYTES)?,
            left: Event::new(Arc::clone(ops))?,
            arrived: Event::new(Arc::clone(&copies))?,
            ops: Arc::clone(ops),
            copies,
        })
    }

    /// Queues an upload, ahead of ops that are queued later and behind those that may still read what lay there.
    fn queue(&mut self, half: &Half<'_>, bytes: usize, fill: impl FnMut(usize, &mut [u8])) -> Result<()> {
        self.copies.wait(&self.left)?;
        self.left.record()?;
        self.staging.upload(half.memory.pointer() + half.start as u64, bytes, fill)?;
        self.arrived.record()?;
        self.ops.wait(&self.arrived)
    }

    /// Waits until all uploads are done.
    pub(super) fn synchronize(&self) -> Result<()> {
        self.copies.synchronize()
    }
}

/// One half of an allocation. Tensors are laid out behind one another in it.
struct Half<'a> {
    memory: &'a DeviceBuffer,
    start: usize,
    bytes: usize,
    used: usize,
}

impl<'a> Half<'a> {
    fn new(memory: &'a DeviceBuffer, index: usize) -> Self {
        let bytes = memory.len() / 2;
        Self { memory, start: index * bytes, bytes, used: 0 }
    }

    /// The next tensor and where in this half it begins.
    fn next(&mut self, rows: usize, cols: usize, dtype: DType) -> Result<(usize, Tensor<Cuda>)> {
        let (offset, bytes) = (self.used, rows * cols * dtype.size());
        self.used = (offset + bytes).next_multiple_of(ALIGNMENT);
        let part = if self.used <= self.bytes { self.memory.part(self.start + offset, bytes) } else { None };
        let full = || Error::shape("upload_packed", format!("expected no more elements than were allocated, found [{rows}, {cols}]"));
        Ok((offset, Tensor::new(part.ok_or_else(full)?, rows, cols, dtype)))
    }
}

/// [`Backend::alloc_packed`](crate::Backend::alloc_packed)
pub(super) fn alloc<const N: usize>(cuda: &Cuda, capacities: [(usize, DType); N]) -> Result<[Tensor<Cuda>; N]> {
    let bytes: usize = capacities.iter().map(|(elements, dtype)| (elements * dtype.size()).next_multiple_of(ALIGNMENT)).sum();
    let memory = DeviceBuffer::zeroed(&cuda.stream, 2 * bytes)?;
    // Copies wait for the zeros.
    cuda.uploads().left.record()?;
    let mut half = Half::new(&memory, 0);
    let tensors = capacities.into_iter().map(|(elements, dtype)| Ok(half.next(elements, 1, dtype)?.1));
    let tensors = tensors.collect::<Result<Vec<_>>>()?;
    tensors.try_into().map_err(|_| Error::shape("alloc_packed", format!("expected {N} tensors")))
}

/// [`Backend::upload_packed`](crate::Backend::upload_packed)
pub(super) fn upload(cuda: &Cuda, uploads: &mut [Upload<'_, Cuda>]) -> Result<usize> {
    let Some(memory) = uploads.first().map(|first| first.tensor.storage.whole()) else { return Ok(0) };
    let index = 1 - memory.half().load(Ordering::Relaxed);
    let mut half = Half::new(&memory, index);
    let mut parts = Vec::with_capacity(uploads.len());
    let mut tensors = Vec::with_capacity(uploads.len());
    for upload in &*uploads {
        if !upload.tensor.storage.is_beside(&memory) {
            return Err(Error::shape("upload_packed", "expected tensors that were allocated together"));
        }
        let (offset, tensor) = half.next(upload.rows()?, upload.cols, upload.values.dtype())?;
        parts.push((offset, upload.values.bytes()));
        tensors.push(tensor);
    }
    cuda.device().bind()?;
    let end = parts.last().map_or(0, |(offset, bytes)| offset + bytes.len());
    cuda.uploads().queue(&half, end, |offset, piece| {
        for (start, bytes) in &parts {
            let (from, until) = (offset.max(*start), (offset + piece.len()).min(start + bytes.len()));
            if from < until {
                piece[from - offset..until - offset].copy_from_slice(&bytes[from - start..until - start]);
            }
        }
    })?;
    memory.half().store(index, Ordering::Relaxed);
    for (upload, tensor) in uploads.iter_mut().zip(tensors) {
        *upload.tensor = tensor;
    }
    Ok(index)
}

//! Memory of the CPU backend: activations in anonymous mappings, weights where their files are mapped.

use super::{Cpu, micro::is_stored, simd::MAX_LANES};
use crate::{DType, Error, Matrix, Result, weights::WeightView};
use half::{bf16, f16};
use memmap2::MmapMut;
use std::{cell::RefCell, ops::Range};

/// Above this size an allocation asks for huge pages: the KV cache and the widest activations.
const HUGE_BYTES: usize = 2 << 20;

/// Zeroed memory of one tensor, page-aligned. Pages that were never touched take no memory.
pub struct CpuStorage(MmapMut);

impl CpuStorage {
    pub(crate) fn zeroed(rows: usize, cols: usize, dtype: DType) -> Result<Self> {
        let bytes = rows.checked_mul(cols).and_then(|n| n.checked_mul(dtype.size()));
        let fail = |e: &dyn std::fmt::Display| Error::Device(format!("no memory for [{rows}, {cols}] {dtype}: {e}"));
        let bytes = bytes.ok_or_else(|| fail(&"more bytes than addresses"))?;
        // An empty mapping is refused by some systems.
        let map = MmapMut::map_anon(bytes.max(1)).map_err(|e| fail(&e))?;
        #[cfg(target_os = "linux")]
        if bytes >= HUGE_BYTES {
            // Only a hint: a kernel without huge pages refuses it, and all works as before.
            let _ = map.advise(memmap2::Advice::HugePage);
        }
        Ok(Self(map))
    }

    /// Elements `range`, which are of type `T`.
    pub(crate) fn slice<T: bytemuck::Pod>(&self, range: Range<usize>) -> &[T] {
        let size = size_of::<T>();
        bytemuck::cast_slice(&self.0[range.start * size..range.end * size])
    }

    /// Elements `range`, which are of type `T`.
    pub(crate) fn slice_mut<T: bytemuck::Pod>(&mut self, range: Range<usize>) -> &mut [T] {
        let size = size_of::<T>();
        bytemuck::cast_slice_mut(&mut self.0[range.start * size..range.end * size])
    }
}

/// A weight: tensors of the checkpoint where they are mapped, stacked by rows. Nothing is copied or widened but vectors.
pub struct CpuWeight {
    segments: Vec<Segment>,
    rows: usize,
    cols: usize,
    dtype: DType,
    /// The elements of a weight of one row, widened.
    vector: Vec<f32>,
}

struct Segment {
    view: WeightView,
    /// Rows of the whole that are in it.
    rows: Range<usize>,
}

impl CpuWeight {
    /// Stacks `parts`: matrices by rows, vectors end to end. Matrices stay where they are mapped, read into memory.
    pub(crate) fn load(parts: &[WeightView]) -> Result<Matrix<Cpu>> {
        let fail = |what: String| Err(Error::shape("load_weight", what));
        let Some(first) = parts.first() else { return fail("expected at least one part, found none".into()) };
        let (dtype, is_vector) = (first.dtype, first.shape.len() < 2);
        if !is_stored(dtype) {
            return Err(Error::TensorDType { name: first.name.clone(), found: dtype.to_string() });
        }
        for part in parts {
            if part.dtype != dtype || (part.shape.len() < 2) != is_vector || (!is_vector && part.cols() != first.cols()) {
                let top = format!("{} {:?} {}", part.name, part.shape, part.dtype);
                return fail(format!("{top} cannot be stacked on {} {:?} {dtype}", first.name, first.shape));
            }
            if part.bytes().len() != part.rows() * part.cols() * dtype.size() {
                return fail(format!("{} {:?} {dtype} has {} bytes", part.name, part.shape, part.bytes().len()));
            }
        }
        let mut rows = 0;
        let mut segments = Vec::with_capacity(parts.len());
        for part in parts {
            part.prefetch();
            segments.push(Segment { view: part.clone(), rows: rows..rows + part.rows() });
            rows += part.rows();
        }
        let mut cols = first.cols();
        if is_vector {
            (rows, cols) = (1, parts.iter().map(WeightView::cols).sum());
            if parts.len() > 1 {
                // Not one run of bytes: ops that take a matrix refuse it, those that take a vector have it.
                segments.clear();
            }
        }
        let vector = if rows == 1 { parts.iter().flat_map(|part| widen(part.bytes(), dtype)).collect() } else { Vec::new() };
        Ok(Matrix { storage: Self { segments, rows, cols, dtype, vector }, rows, cols, dtype })
    }

    /// The weight of `matrix`, whose public fields say the same as it does.
    pub(crate) fn of<'a>(op: &'static str, matrix: &'a Matrix<Cpu>) -> Result<&'a Self> {
        let weight = &matrix.storage;
        if (weight.rows, weight.cols, weight.dtype) != (matrix.rows, matrix.cols, matrix.dtype) {
            let found = format!("[{}, {}] {}", weight.rows, weight.cols, weight.dtype);
            return Err(Error::shape(op, format!("expected a weight [{}, {}] {}, found {found}", matrix.rows, matrix.cols, matrix.dtype)));
        }
        if weight.segments.is_empty() {
            return Err(Error::shape(op, "expected a matrix, found stacked vectors"));
        }
        Ok(weight)
    }

    /// The elements of `matrix`, which has one row, widened.
    pub(crate) fn vector_of<'a>(op: &'static str, matrix: &'a Matrix<Cpu>) -> Result<&'a [f32]> {
        let vector = &matrix.storage.vector;
        if matrix.rows != 1 || vector.len() != matrix.cols {
            return Err(Error::shape(op, format!("expected a vector of {}, found {}", matrix.cols, vector.len())));
        }
        Ok(vector)
    }

    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    pub(crate) fn cols(&self) -> usize {
        self.cols
    }

    pub(crate) fn dtype(&self) -> DType {
        self.dtype
    }

    /// Bytes of a row.
    pub(crate) fn row_bytes(&self) -> usize {
        self.cols * self.dtype.size()
    }

    /// The bytes of row `row`; not aligned to the element. Empty if there is no such row.
    pub(crate) fn row(&self, row: usize) -> &[u8] {
        self.run(row..row + 1)
    }

    /// The bytes of the longest run of `rows` from its start that lies in one piece.
    pub(crate) fn run(&self, rows: Range<usize>) -> &[u8] {
        match self.segments.iter().find(|segment| segment.rows.contains(&rows.start)) {
            Some(Segment { view, rows: held }) => {
                let (end, size) = (rows.end.min(held.end), self.row_bytes());
                &view.bytes()[(rows.start - held.start) * size..(end - held.start) * size]
            }
            None => &[],
        }
    }

    /// Addresses of `offset` bytes into `count` rows from `row` on; of row `last` for those beyond.
    pub(crate) fn row_starts(&self, row: usize, count: usize, last: usize, offset: usize) -> [*const u8; MAX_LANES] {
        let mut starts = [std::ptr::null(); MAX_LANES];
        let run = self.run(row..(row + count).min(last + 1));
        for (i, start) in starts.iter_mut().enumerate().take(count) {
            *start = match run.get(i * self.row_bytes()..) {
                Some(bytes) if !bytes.is_empty() => bytes.as_ptr(),
                _ => self.row((row + i).min(last)).as_ptr(),
            };
            *start = start.wrapping_add(offset);
        }
        starts
    }
}

/// The elements of `bytes`, which need not be aligned.
pub(crate) fn widen(bytes: &[u8], dtype: DType) -> Vec<f32> {
    let mut out = vec![0.0; bytes.len() / dtype.size()];
    widen_into(bytes, dtype, &mut out);
    out
}

/// As [`widen`], into `out`, which has as many elements.
pub(crate) fn widen_into(bytes: &[u8], dtype: DType, out: &mut [f32]) {
    match dtype {
        DType::Bf16 => {
            for (out, &[a, b]) in out.iter_mut().zip(bytes.as_chunks().0) {
                *out = bf16::from_le_bytes([a, b]).to_f32();
            }
        }
        DType::F16 => {
            for (out, &[a, b]) in out.iter_mut().zip(bytes.as_chunks().0) {
                *out = f16::from_le_bytes([a, b]).to_f32();
            }
        }
        _ => {
            for (out, chunk) in out.iter_mut().zip(bytes.as_chunks().0) {
                *out = f32::from_le_bytes(*chunk);
            }
        }
    }
}

/// Purposes of [`scratch`], each with its own buffer, so that they may nest.
#[derive(Clone, Copy)]
pub(crate) enum Scratch {
    /// A panel of packed weights; packed keys.
    Panel,
    /// A sliver of packed activations; values.
    Sliver,
    /// Queries, sums and scores of an attention.
    Attention,
    /// What the tiles of one op leave for its end.
    Partials,
}

#[repr(C, align(64))]
#[derive(Clone, Copy)]
struct Line([f32; 16]);
// SAFETY: sixteen f32 without padding, for which all zeros are a value.
unsafe impl bytemuck::Zeroable for Line {}
// SAFETY: as above; every bit pattern is a value.
unsafe impl bytemuck::Pod for Line {}

/// Lends `len` f32, cache-line aligned and of unknown content, from a buffer of the calling thread that only grows.
pub(crate) fn scratch<R>(purpose: Scratch, len: usize, f: impl FnOnce(&mut [f32]) -> R) -> R {
    thread_local! {
        static BUFFERS: [RefCell<Vec<Line>>; 4] = const { [const { RefCell::new(Vec::new()) }; 4] };
    }
    BUFFERS.with(|buffers| {
        let mut buffer = buffers[purpose as usize].borrow_mut();
        let lines = len.div_ceil(16);
        if buffer.len() < lines {
            buffer.resize(lines, Line([0.0; 16]));
        }
        f(&mut bytemuck::cast_slice_mut(&mut buffer[..lines])[..len])
    })
}

/// Memory into which the tiles of an op write disjoint parts.
#[derive(Clone, Copy)]
pub(crate) struct Shared<'a> {
    start: *mut f32,
    len: usize,
    memory: std::marker::PhantomData<&'a mut [f32]>,
}

// SAFETY: the parts that are taken are disjoint, by the promise of the callers of `part`.
unsafe impl Send for Shared<'_> {}
// SAFETY: as above.
unsafe impl Sync for Shared<'_> {}

impl<'a> Shared<'a> {
    pub(crate) fn new(memory: &'a mut [f32]) -> Self {
        Self { start: memory.as_mut_ptr(), len: memory.len(), memory: std::marker::PhantomData }
    }

    /// Elements `range`.
    ///
    /// # Panics
    /// If they are not within the memory.
    ///
    /// # Safety
    /// No element of it is in another part that is alive.
    pub(crate) unsafe fn part(&self, range: Range<usize>) -> &'a mut [f32] {
        assert!(range.start <= range.end && range.end <= self.len);
        // SAFETY: within the memory, as was checked; disjoint from other parts by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }

    /// Address of the first element, for kernels that write columns of many rows.
    pub(crate) fn as_ptr(&self) -> *mut f32 {
        self.start
    }
}

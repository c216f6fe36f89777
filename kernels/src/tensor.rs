//! Two-dimensional tensors in device memory: activations with a movable row window, and read-only weight matrices.

use crate::{Backend, Error, Result};
use std::{fmt, ops::Range};

/// Type of an element.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE 754 binary32.
    F32,
    /// IEEE 754 binary16.
    F16,
    /// bfloat16.
    Bf16,
    /// Signed 32-bit integer: positions, slots, ids.
    I32,
    /// Pixels.
    U8,
}

impl DType {
    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            Self::F32 | Self::I32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::U8 => 1,
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::I32 => "i32",
            Self::U8 => "u8",
        })
    }
}

/// A host type that can be copied to and from a tensor of [`Element::DTYPE`].
pub trait Element: bytemuck::Pod + Send + Sync {
    /// Type on the device.
    const DTYPE: DType;
}
impl Element for f32 {
    const DTYPE: DType = DType::F32;
}
impl Element for half::f16 {
    const DTYPE: DType = DType::F16;
}
impl Element for half::bf16 {
    const DTYPE: DType = DType::Bf16;
}
impl Element for i32 {
    const DTYPE: DType = DType::I32;
}
impl Element for u8 {
    const DTYPE: DType = DType::U8;
}

/// `[rows, cols]` row-major in device memory, allocated once for its capacity.
///
/// Ops see a window of rows, which moves without touching the device: a step with fewer tokens than the capacity
/// narrows it, and a long product is done in pieces by sliding it.
pub struct Tensor<B: Backend> {
    /// Device memory of `capacity x cols` elements.
    pub storage: B::Storage,
    dtype: DType,
    /// Elements allocated.
    allocated: usize,
    capacity: usize,
    window: Range<usize>,
    cols: usize,
}

impl<B: Backend> Tensor<B> {
    /// Wraps `storage`, which must hold `rows x cols` elements of `dtype`; the window covers all of it. For backends.
    pub fn new(storage: B::Storage, rows: usize, cols: usize, dtype: DType) -> Self {
        Self { storage, dtype, allocated: rows * cols, capacity: rows, window: 0..rows, cols }
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Rows in the window.
    pub fn rows(&self) -> usize {
        self.window.len()
    }

    /// Elements per row.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Rows that the window can have.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// The window.
    pub fn window(&self) -> Range<usize> {
        self.window.clone()
    }

    /// The elements of the window, as a range of the storage.
    pub fn elements(&self) -> Range<usize> {
        self.window.start * self.cols..self.window.end * self.cols
    }

    /// Sets the window to the first `rows` rows.
    ///
    /// # Errors
    /// If `rows` is above the capacity.
    pub fn set_rows(&mut self, rows: usize) -> Result<()> {
        self.set_window(0..rows)
    }

    /// Sets the window.
    ///
    /// # Errors
    /// If `window` reaches past the capacity.
    pub fn set_window(&mut self, window: Range<usize>) -> Result<()> {
        if window.start > window.end || window.end > self.capacity {
            return Err(Error::shape("set_window", format!("rows {window:?} of a tensor with capacity {}", self.capacity)));
        }
        self.window = window;
        Ok(())
    }

    /// Lays the memory out as `rows` rows of `cols` columns, all of them in the window. What was there is meaningless from then on.
    ///
    /// # Errors
    /// If these are more elements than were allocated.
    pub(crate) fn set_shape(&mut self, rows: usize, cols: usize) -> Result<()> {
        if rows.checked_mul(cols).is_none_or(|elements| elements > self.allocated) {
            return Err(Error::shape("set_shape", format!("[{rows}, {cols}] of a tensor with {} elements", self.allocated)));
        }
        (self.capacity, self.window, self.cols) = (rows, 0..rows, cols);
        Ok(())
    }

    /// Columns from `offset` on, for ops that read a part of each row.
    pub fn columns(&self, offset: usize) -> Columns<'_, B> {
        Columns { tensor: self, offset }
    }
}

impl<B: Backend> fmt::Debug for Tensor<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{:?} of {}, {}] {}", self.window, self.capacity, self.cols, self.dtype)
    }
}

/// The columns of a tensor from an offset on: q, k or v of a stacked projection.
pub struct Columns<'a, B: Backend> {
    /// The whole tensor.
    pub tensor: &'a Tensor<B>,
    /// First column.
    pub offset: usize,
}

impl<B: Backend> Clone for Columns<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<B: Backend> Copy for Columns<'_, B> {}

/// A weight, `[rows, cols]` row-major (`[out_features, in_features]` of a linear layer; `[1, n]` of a norm or bias),
/// in the element type in which the checkpoint has it.
///
/// Several tensors of the checkpoint may be stacked by rows (q, k and v; gate and up).
pub struct Matrix<B: Backend> {
    /// The backend's representation.
    pub storage: B::WeightStorage,
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    /// Element type.
    pub dtype: DType,
}

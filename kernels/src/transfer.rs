//! Copies between host and device that are more than one tensor at a time, or that nobody waits for at once.

use crate::{Backend, DType, Element, Error, Result, Tensor, check};
use std::fmt;

/// Elements on the host for one tensor of [`Backend::upload_packed`].
#[derive(Clone, Copy, Debug)]
pub enum Values<'a> {
    /// For a tensor of f32.
    F32(&'a [f32]),
    /// For a tensor of i32.
    I32(&'a [i32]),
}

impl<'a> Values<'a> {
    /// How many.
    pub fn len(&self) -> usize {
        match self {
            Self::F32(values) => values.len(),
            Self::I32(values) => values.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Their type on the device.
    pub fn dtype(&self) -> DType {
        match self {
            Self::F32(_) => DType::F32,
            Self::I32(_) => DType::I32,
        }
    }

    /// Their bytes, as the device has them.
    pub fn bytes(&self) -> &'a [u8] {
        match self {
            Self::F32(values) => bytemuck::cast_slice(values),
            Self::I32(values) => bytemuck::cast_slice(values),
        }
    }
}

/// A tensor of [`Backend::upload_packed`] and what goes into it.
pub struct Upload<'a, B: Backend> {
    /// Whole rows.
    pub values: Values<'a>,
    /// Columns that the tensor is to have.
    pub cols: usize,
    /// One of those that [`Backend::alloc_packed`] gave. It gets as many rows as there are values for.
    pub tensor: &'a mut Tensor<B>,
}

impl<B: Backend> Upload<'_, B> {
    /// Rows of the values.
    ///
    /// # Errors
    /// [`Error::Shape`] if the last one is not whole, or the tensor has another type.
    pub fn rows(&self) -> Result<usize> {
        check::element("upload_packed", self.tensor, self.values.dtype())?;
        let (len, cols) = (self.values.len(), self.cols);
        if cols == 0 || !len.is_multiple_of(cols) {
            return Err(Error::shape("upload_packed", format!("expected whole rows of {cols}, found {len} elements")));
        }
        Ok(len / cols)
    }
}

/// A copy to the host that is on its way. Whoever drops it does not get the elements, and nothing else happens.
pub struct Download<T> {
    len: usize,
    arrive: Arrive<T>,
}

/// Waits for elements and hands them out.
type Arrive<T> = Box<dyn FnOnce(&mut [T]) -> Result<()> + Send>;

impl<T: Element> Download<T> {
    /// `arrive` waits until the copy of `len` elements has ended and hands them out. For backends.
    pub fn new(len: usize, arrive: impl FnOnce(&mut [T]) -> Result<()> + Send + 'static) -> Self {
        Self { len, arrive: Box::new(arrive) }
    }

    /// Elements that are on their way.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Waits for the copy, and for nothing that was queued behind it, and writes the elements to `dst`.
    ///
    /// # Errors
    /// If the length differs, or the device failed at what was queued before the copy.
    pub fn wait(self, dst: &mut [T]) -> Result<()> {
        if dst.len() != self.len {
            return Err(Error::shape("download", format!("expected {} elements on the host, found {}", self.len, dst.len())));
        }
        (self.arrive)(dst)
    }
}

impl<T> fmt::Debug for Download<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Download of {} elements", self.len)
    }
}

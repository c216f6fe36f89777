//! What can go wrong below a model: shapes that do not fit, weights that are not what they should be, a device fault.

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error of the compute seam.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An op was called with tensors that do not fit together. A bug in a model, found before the device is touched.
    #[error("{op}: {what}")]
    Shape {
        /// The op.
        op: &'static str,
        /// What was expected and what was found.
        what: String,
    },
    /// A checkpoint lacks a tensor.
    #[error("checkpoint has no tensor {name}; is it an Idefics2 checkpoint, and complete?")]
    MissingTensor {
        /// Key of the tensor.
        name: String,
    },
    /// A checkpoint's tensor has another shape than its configuration says.
    #[error("tensor {name} has shape {found:?}, expected {expected:?} from config.json")]
    TensorShape {
        /// Key of the tensor.
        name: String,
        /// Shape by the configuration.
        expected: Vec<usize>,
        /// Shape in the file.
        found: Vec<usize>,
    },
    /// A checkpoint's tensor has an element type that is not served.
    #[error("tensor {name} has dtype {found}, expected BF16, F16 or F32")]
    TensorDType {
        /// Key of the tensor.
        name: String,
        /// Type in the file.
        found: String,
    },
    /// A weight file cannot be read or is not what its header says.
    #[error("{file}: {what}")]
    WeightFile {
        /// Path or name of the file.
        file: String,
        /// What was expected and what was found.
        what: String,
    },
    /// The device failed; the engine that owns it must end.
    #[error("device fault: {0}")]
    Device(String),
}

impl Error {
    /// A [`Error::Shape`] of `op`.
    pub fn shape(op: &'static str, what: impl Into<String>) -> Self {
        Self::Shape { op, what: what.into() }
    }
}

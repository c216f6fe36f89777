//! Why a picture was refused.

use super::ImageFormat;

/// A picture that cannot be served: always the caller's doing, never a fault of the service.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PreprocessError {
    /// No bytes at all.
    #[error("image is empty; send the bytes of an encoded picture")]
    Empty,
    /// The file is larger than [`super::ImageLimits::max_image_bytes`].
    #[error("image is {found} bytes, limit is {limit}; send a smaller file or raise max_image_bytes")]
    TooManyBytes {
        /// Bytes sent.
        found: usize,
        /// Bytes allowed.
        limit: usize,
    },
    /// Nobody waits for the picture any more.
    #[error("image is no longer wanted")]
    Abandoned,
    /// The first bytes are of no format that is served.
    #[error("image starts like no known format; send JPEG, PNG, WebP, GIF, BMP or TIFF")]
    UnknownFormat,
    /// The file ends early or contradicts itself.
    #[error("{format} image is truncated or corrupt: {reason}; send the whole file")]
    Corrupt {
        /// What the content was recognised as.
        format: ImageFormat,
        /// What the decoder says.
        reason: String,
    },
    /// A well-formed file with something in it that no decoder here reads.
    #[error("{format} image uses a feature that is not served: {reason}; convert it to 8-bit PNG or JPEG")]
    Unsupported {
        /// What the content was recognised as.
        format: ImageFormat,
        /// What the decoder says.
        reason: String,
    },
    /// The header claims more pixels than [`super::ImageLimits::max_pixels`].
    #[error("image is {width} x {height} pixels, limit is {limit} in all; send a smaller picture or raise max_pixels")]
    TooManyPixels {
        /// Pixels a row.
        width: u32,
        /// Rows.
        height: u32,
        /// Pixels allowed in all.
        limit: u64,
    },
    /// The header claims an edge above [`super::ImageLimits::max_edge`].
    #[error("image is {width} x {height} pixels, limit is {limit} per edge; send a smaller picture or raise max_edge")]
    EdgeTooLong {
        /// Pixels a row.
        width: u32,
        /// Rows.
        height: u32,
        /// Pixels allowed per edge.
        limit: u32,
    },
    /// The header claims no pixels.
    #[error("image is {width} x {height} pixels; send one with at least one pixel")]
    ZeroSize {
        /// Pixels a row.
        width: u32,
        /// Rows.
        height: u32,
    },
    /// Decoding needs more memory than the pixels account for.
    #[error("{format} image needs more than {limit_bytes} bytes to decode; send a smaller picture or raise max_pixels")]
    TooMuchMemory {
        /// What the content was recognised as.
        format: ImageFormat,
        /// Bytes allowed.
        limit_bytes: u64,
    },
    /// `shortest_edge` or `longest_edge` is smaller than a patch or larger than [`super::ImageLimits::max_resized_edge`].
    #[error("{option} is {value}, expected {min} to {max}; ask for another size or leave it out")]
    EdgeOption {
        /// Name of the option.
        option: &'static str,
        /// Value asked for.
        value: u32,
        /// Edge of one patch.
        min: u32,
        /// Largest edge allowed.
        max: u32,
    },
}

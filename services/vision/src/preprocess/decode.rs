//! From the bytes of a stranger's file to upright RGB.
//!
//! The format is sniffed from the content. Every decoder reads the header, has its size checked against the limits, and only then
//! allocates pixels. Whatever a file carries besides its first picture is skipped. EXIF orientation is applied, then alpha goes over
//! white, as `ImageOps.exif_transpose` and the image processor's `convert_to_rgb` do.

use std::{fmt, panic};

use image::{ColorType, ImageDecoder, ImageError};

use super::orientation::Orientation;
use super::rgb::{gray_to_rgb, rgba_over_white};
use super::{ImageLimits, PreprocessError, RgbPicture, bmp, gif, jpeg, png, tiff, webp};

/// What a file's content was recognised as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageFormat {
    /// Baseline and progressive; gray, YCbCr, RGB, CMYK, YCCK.
    Jpeg,
    /// All colour types and depths; of an animation the default image.
    Png,
    /// Lossy and lossless; of an animation the first frame.
    WebP,
    /// The first frame.
    Gif,
    /// Windows bitmaps.
    Bmp,
    /// The first page.
    Tiff,
}

impl fmt::Display for ImageFormat {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Jpeg => "JPEG",
            Self::Png => "PNG",
            Self::WebP => "WebP",
            Self::Gif => "GIF",
            Self::Bmp => "BMP",
            Self::Tiff => "TIFF",
        })
    }
}

impl ImageFormat {
    /// The format whose signature `bytes` start with.
    fn sniff(bytes: &[u8]) -> Option<Self> {
        match bytes {
            [0xff, 0xd8, 0xff, ..] => Some(Self::Jpeg),
            [0x89, b'P', b'N', b'G', b'\r', b'\n', 0x1a, b'\n', ..] => Some(Self::Png),
            [b'R', b'I', b'F', b'F', _, _, _, _, b'W', b'E', b'B', b'P', ..] => Some(Self::WebP),
            [b'G', b'I', b'F', b'8', b'7' | b'9', b'a', ..] => Some(Self::Gif),
            [b'B', b'M', ..] => Some(Self::Bmp),
            [b'I', b'I', 42, 0, ..] | [b'M', b'M', 0, 42, ..] => Some(Self::Tiff),
            _ => None,
        }
    }

    /// The file contradicts itself or ends early.
    pub(super) fn corrupt(self, reason: impl fmt::Display) -> PreprocessError {
        PreprocessError::Corrupt { format: self, reason: reason.to_string() }
    }

    /// The file is well-formed, but needs what is not there.
    pub(super) fn unsupported(self, reason: impl fmt::Display) -> PreprocessError {
        PreprocessError::Unsupported { format: self, reason: reason.to_string() }
    }
}

/// A picture as its file stores it, and how it is to be turned.
pub(super) struct Stored {
    pub(super) picture: RgbPicture,
    pub(super) orientation: Orientation,
}

/// The first picture of an encoded file, upright, over white, as RGB.
///
/// # Errors
/// [`PreprocessError`] if the file is not a whole picture of a known format or exceeds `limits`.
pub fn decode(bytes: &[u8], limits: &ImageLimits) -> Result<RgbPicture, PreprocessError> {
    if bytes.is_empty() {
        return Err(PreprocessError::Empty);
    }
    if bytes.len() > limits.max_image_bytes {
        return Err(PreprocessError::TooManyBytes { found: bytes.len(), limit: limits.max_image_bytes });
    }
    let format = ImageFormat::sniff(bytes).ok_or(PreprocessError::UnknownFormat)?;
    let decode_as = || match format {
        ImageFormat::Jpeg => jpeg::decode(bytes, limits),
        ImageFormat::Png => png::decode(bytes, limits),
        ImageFormat::WebP => webp::decode(bytes, limits),
        ImageFormat::Gif => gif::decode(bytes, limits),
        ImageFormat::Bmp => bmp::decode(bytes, limits),
        ImageFormat::Tiff => tiff::decode(bytes, limits),
    };
    // Decoders check themselves by assertions, and strangers' files find those: zune-jpeg stops so at sampling factors of 4 x 2.
    let stored = panic::catch_unwind(decode_as).unwrap_or_else(|_| Err(format.corrupt("the decoder gave up")))?;
    Ok(stored.orientation.apply(stored.picture))
}

impl ImageLimits {
    /// Whether a header's claim is within the limits.
    pub(super) fn check(&self, width: u32, height: u32) -> Result<(), PreprocessError> {
        if width == 0 || height == 0 {
            return Err(PreprocessError::ZeroSize { width, height });
        }
        if width.max(height) > self.max_edge {
            return Err(PreprocessError::EdgeTooLong { width, height, limit: self.max_edge });
        }
        if u64::from(width) * u64::from(height) > self.max_pixels {
            return Err(PreprocessError::TooManyPixels { width, height, limit: self.max_pixels });
        }
        Ok(())
    }

    /// Bytes that one decoder may allocate: what the deepest pixels need, and as much again as workspace.
    pub(super) fn decoder_bytes(&self) -> u64 {
        self.max_pixels.saturating_mul(16).saturating_add(1 << 20)
    }
}

/// Decodes 8-bit pixels by a decoder of the `image` crate.
pub(super) fn read_rgb(mut decoder: impl ImageDecoder, format: ImageFormat, limits: &ImageLimits) -> Result<RgbPicture, PreprocessError> {
    let from_image = |error| from_image(error, format, limits);
    let (width, height) = decoder.dimensions();
    limits.check(width, height)?;
    let mut decoder_limits = image::Limits::no_limits();
    decoder_limits.max_alloc = Some(limits.decoder_bytes());
    decoder.set_limits(decoder_limits).map_err(from_image)?;
    let color = decoder.color_type();
    let mut samples = vec![0; decoder.total_bytes() as usize];
    decoder.read_image(&mut samples).map_err(from_image)?;
    let pixels = match color {
        ColorType::L8 => gray_to_rgb(&samples),
        ColorType::Rgb8 => samples,
        ColorType::Rgba8 => rgba_over_white(&samples),
        other => return Err(format.unsupported(format_args!("{other:?} pixels"))),
    };
    Ok(RgbPicture { width, height, pixels })
}

/// The refusal that an error of the `image` crate amounts to.
pub(super) fn from_image(error: ImageError, format: ImageFormat, limits: &ImageLimits) -> PreprocessError {
    match error {
        ImageError::Unsupported(error) => format.unsupported(error),
        ImageError::Limits(_) => PreprocessError::TooMuchMemory { format, limit_bytes: limits.decoder_bytes() },
        error => format.corrupt(error),
    }
}

//! TIFF files: the first page, of integer samples up to 16 bits.

use std::borrow::Cow;
use std::io::Cursor;

use tiff::decoder::{Decoder, DecodingResult, Limits};
use tiff::tags::Tag;
use tiff::{ColorType, TiffError};

use super::decode::Stored;
use super::orientation::{self, Orientation};
use super::rgb::{gray_alpha_over_white, gray_to_rgb, inks_to_rgb, map_pixels, over_white, rgba_over_white, unpack_bits};
use super::{ImageFormat, ImageLimits, PreprocessError, RgbPicture};

const FORMAT: ImageFormat = ImageFormat::Tiff;
const XMP: Tag = Tag::Unknown(700);
/// `ExtraSamples`: colours are multiplied with alpha already.
const ASSOCIATED_ALPHA: u16 = 1;
/// `PhotometricInterpretation`: gray, and indices of a palette.
const BLACK_IS_ZERO: u16 = 1;
const PALETTE: u16 = 3;

pub(super) fn decode(bytes: &[u8], limits: &ImageLimits) -> Result<Stored, PreprocessError> {
    let from_tiff = |error| from_tiff(error, limits);
    let (bytes, is_palette) = palette_as_gray(bytes);
    let mut decoder = Decoder::new(Cursor::new(&bytes)).map_err(from_tiff)?.with_limits(decoder_limits(limits));
    let (width, height) = decoder.dimensions().map_err(from_tiff)?;
    limits.check(width, height)?;
    let orientation = decoder.find_tag_unsigned(Tag::Orientation).ok().flatten();
    let xmp = decoder.find_tag(XMP).ok().flatten().and_then(|value| value.into_u8_vec().ok());
    let orientation = Orientation::from_tags(orientation, xmp.as_deref());
    let extra_samples: Vec<u16> = decoder.find_tag_unsigned_vec(Tag::ExtraSamples).ok().flatten().unwrap_or_default();
    let color_map: Vec<u16> = if is_palette { decoder.get_tag_u16_vec(Tag::ColorMap).map_err(from_tiff)? } else { Vec::new() };
    let colors = decoder.colortype().map_err(from_tiff)?;
    let samples = read_samples(&mut decoder, limits)?;

    let associated = extra_samples.first() == Some(&ASSOCIATED_ALPHA);
    let pixels = match colors {
        ColorType::Gray(bits @ (1 | 2 | 4 | 8)) => {
            let samples = unpack_bits(samples, width as usize, bits);
            if is_palette {
                from_color_map(&samples, &color_map, bits)
            } else {
                map_pixels(&samples, |[gray]| [gray * (255 / (u8::MAX >> (8 - bits))); 3])
            }
        }
        ColorType::Gray(16) => gray_to_rgb(&samples),
        ColorType::Multiband { bit_depth: 8, num_samples: 2 } => gray_alpha_over_white(&samples),
        ColorType::RGB(8 | 16) => samples,
        ColorType::RGBA(8 | 16) if associated => map_pixels(&samples, |pixel| over_white(divide_by_alpha(pixel))),
        ColorType::RGBA(8 | 16) => rgba_over_white(&samples),
        ColorType::CMYK(8 | 16) => inks_to_rgb(&samples),
        other => return Err(FORMAT.unsupported(format_args!("{other:?} pixels"))),
    };
    if pixels.len() != width as usize * height as usize * 3 {
        return Err(FORMAT.unsupported("samples that do not fill the pixels"));
    }
    Ok(Stored { picture: RgbPicture { width, height, pixels }, orientation })
}

fn from_tiff(error: TiffError, limits: &ImageLimits) -> PreprocessError {
    match error {
        TiffError::LimitsExceeded => PreprocessError::TooMuchMemory { format: FORMAT, limit_bytes: limits.decoder_bytes() },
        TiffError::UnsupportedError(error) => FORMAT.unsupported(error),
        error => FORMAT.corrupt(error),
    }
}

fn decoder_limits(limits: &ImageLimits) -> Limits {
    let bytes = usize::try_from(limits.decoder_bytes()).unwrap_or(usize::MAX);
    let mut decoder_limits = Limits::default();
    decoder_limits.decoding_buffer_size = bytes;
    decoder_limits.intermediate_buffer_size = bytes;
    decoder_limits.ifd_value_size = bytes;
    decoder_limits
}

/// The file with its palette interpretation replaced by gray, and whether it had one: the decoder refuses palettes, but indices and
/// gray values are stored alike.
fn palette_as_gray(bytes: &[u8]) -> (Cow<'_, [u8]>, bool) {
    match orientation::find_short(bytes, Tag::PhotometricInterpretation.to_u16()) {
        Some((at, PALETTE)) => {
            let mut patched = bytes.to_vec();
            let gray = if bytes.starts_with(b"MM") { BLACK_IS_ZERO.to_be_bytes() } else { BLACK_IS_ZERO.to_le_bytes() };
            patched[at..at + 2].copy_from_slice(&gray);
            (Cow::Owned(patched), true)
        }
        _ => (Cow::Borrowed(bytes), false),
    }
}

/// All samples, interleaved, the high byte of those of 16 bits; those of less than 8 bits still packed.
fn read_samples<R: std::io::Read + std::io::Seek>(decoder: &mut Decoder<R>, limits: &ImageLimits) -> Result<Vec<u8>, PreprocessError> {
    let mut result = DecodingResult::U8(Vec::new());
    let layout = decoder.read_image_to_buffer(&mut result).map_err(|error| from_tiff(error, limits))?;
    if result.as_buffer(0).as_bytes().len() < layout.complete_len {
        return Err(PreprocessError::TooMuchMemory { format: FORMAT, limit_bytes: limits.decoder_bytes() });
    }
    let samples = match result {
        DecodingResult::U8(samples) => samples,
        DecodingResult::U16(samples) => samples.into_iter().map(|sample| (sample >> 8) as u8).collect(),
        _ => return Err(FORMAT.unsupported("samples that are not 8 or 16 bit unsigned integers")),
    };
    if layout.planes <= 1 {
        return Ok(samples);
    }
    let plane = samples.len() / layout.planes;
    Ok((0..plane).flat_map(|at| samples.iter().skip(at).step_by(plane).copied()).collect())
}

/// Colours by index; the map has all reds first, then greens and blues, of which Pillow takes the high byte.
fn from_color_map(indices: &[u8], color_map: &[u16], bits: u8) -> Vec<u8> {
    let entries = 1 << bits;
    let channel = |channel: usize, index: u8| color_map.get(channel * entries + usize::from(index)).map_or(0, |value| (value >> 8) as u8);
    map_pixels(indices, |[index]| [channel(0, index), channel(1, index), channel(2, index)])
}

/// Colours that were multiplied with alpha, as Pillow divides them again: truncated, and clipped where they exceed alpha.
fn divide_by_alpha([red, green, blue, alpha]: [u8; 4]) -> [u8; 4] {
    match alpha {
        0 => [0; 4],
        255 => [red, green, blue, alpha],
        _ => {
            let [red, green, blue] = [red, green, blue].map(|value| (u16::from(value) * 255 / u16::from(alpha)).min(255) as u8);
            [red, green, blue, alpha]
        }
    }
}

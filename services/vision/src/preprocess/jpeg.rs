//! JPEG files.
//!
//! The decoder is lenient: it fills what it misses with gray. So the file is first walked from marker to marker up to its end.
//! Four-component files are converted here, since decoders at large take all of them for Adobe's inverted ones.

use zune_jpeg::JpegDecoder;
use zune_jpeg::errors::DecodeErrors;
use zune_jpeg::zune_core::bytestream::ZCursor;
use zune_jpeg::zune_core::colorspace::ColorSpace;
use zune_jpeg::zune_core::options::DecoderOptions;

use super::decode::Stored;
use super::orientation::Orientation;
use super::rgb::{gray_to_rgb, inks_to_rgb};
use super::{ImageFormat, ImageLimits, PreprocessError, RgbPicture};

const FORMAT: ImageFormat = ImageFormat::Jpeg;

pub(super) fn decode(bytes: &[u8], limits: &ImageLimits) -> Result<Stored, PreprocessError> {
    // Our own limits are checked below; the decoder's tell no size.
    let options = DecoderOptions::default().set_strict_mode(false).set_max_width(usize::MAX).set_max_height(usize::MAX);
    let mut decoder = JpegDecoder::new_with_options(ZCursor::new(bytes), options);
    decoder.decode_headers().map_err(from_zune)?;
    let info = decoder.info().ok_or_else(|| FORMAT.corrupt("no frame header"))?;
    let (width, height) = (u32::from(info.width), u32::from(info.height));
    limits.check(width, height)?;
    check_whole(bytes)?;
    let orientation = Orientation::from_metadata(decoder.exif().map(Vec::as_slice), decoder.xmp().map(Vec::as_slice));

    let stored = decoder.input_colorspace().ok_or_else(|| FORMAT.corrupt("no colour space"))?;
    let colors = match stored {
        ColorSpace::Luma | ColorSpace::CMYK | ColorSpace::YCCK => stored,
        _ => ColorSpace::RGB,
    };
    decoder.set_options(options.jpeg_set_out_colorspace(colors));
    let mut samples = decoder.decode().map_err(from_zune)?;
    let pixels = match colors {
        ColorSpace::Luma => gray_to_rgb(&samples),
        ColorSpace::CMYK | ColorSpace::YCCK => {
            invert_inks(&mut samples, colors == ColorSpace::YCCK);
            inks_to_rgb(&samples)
        }
        _ => samples,
    };
    if pixels.len() != width as usize * height as usize * 3 {
        return Err(FORMAT.unsupported(format_args!("{stored:?} colours")));
    }
    Ok(Stored { picture: RgbPicture { width, height, pixels }, orientation })
}

fn from_zune(error: DecodeErrors) -> PreprocessError {
    match error {
        DecodeErrors::Unsupported(scheme) => FORMAT.unsupported(format_args!("{scheme:?}")),
        error => FORMAT.corrupt(format_args!("{error:?}")),
    }
}

/// Follows the markers to the end of the image.
fn check_whole(bytes: &[u8]) -> Result<(), PreprocessError> {
    let truncated = || FORMAT.corrupt("no end-of-image marker");
    let mut rest = &bytes[2..];
    loop {
        // Entropy-coded data, and garbage between segments: up to the next marker that is neither a stuffed byte nor a restart.
        let at = rest.windows(2).position(|pair| pair[0] == 0xff && !matches!(pair[1], 0x00 | 0x01 | 0xd0..=0xd8 | 0xff));
        let at = at.ok_or_else(truncated)?;
        if rest[at + 1] == 0xd9 {
            return Ok(());
        }
        let [_, _, high, low, ..] = rest[at..] else { return Err(truncated()) };
        let length = usize::from(u16::from_be_bytes([high, low]));
        rest = rest.get(at + 2 + length..).ok_or_else(truncated)?;
    }
}

/// Turns the stored samples of a four-component file into inks, in place.
///
/// Adobe stores them inverted, and Pillow takes every such file for Adobe's. In YCCK the first three are the complement's luma and
/// chroma, which libjpeg converts with 16 fractional bits.
fn invert_inks(samples: &mut [u8], is_ycck: bool) {
    const RED: i32 = 91_881; // 1.40200
    const GREEN_CB: i32 = 22_554; // 0.34414
    const GREEN_CR: i32 = 46_802; // 0.71414
    const BLUE: i32 = 116_130; // 1.77200
    const HALF: i32 = 1 << 15;
    for [first, second, third, black] in samples.as_chunks_mut::<4>().0 {
        *black = 255 - *black;
        if is_ycck {
            let (luma, cb, cr) = (i32::from(*first), i32::from(*second) - 128, i32::from(*third) - 128);
            let clamp = |value: i32| value.clamp(0, 255) as u8;
            *first = clamp(luma + ((RED * cr + HALF) >> 16));
            *second = clamp(luma + ((HALF - GREEN_CB * cb - GREEN_CR * cr) >> 16));
            *third = clamp(luma + ((BLUE * cb + HALF) >> 16));
        } else {
            (*first, *second, *third) = (255 - *first, 255 - *second, 255 - *third);
        }
    }
}

//! PNG files: every colour type and depth, expanded as Pillow expands them.

use std::io::Cursor;

use png::{BitDepth, ColorType, Decoder, DecodingError, Info, Limits, Transformations};

use super::decode::Stored;
use super::orientation::Orientation;
use super::rgb::{gray_alpha_over_white, gray_to_rgb, map_pixels, over_white, rgba_over_white, unpack_bits};
use super::{ImageFormat, ImageLimits, PreprocessError, RgbPicture};

const FORMAT: ImageFormat = ImageFormat::Png;
/// Metadata above this size is not looked into.
const MAX_TEXT_BYTES: usize = 1 << 20;

pub(super) fn decode(bytes: &[u8], limits: &ImageLimits) -> Result<Stored, PreprocessError> {
    let from_png = |error| from_png(error, limits);
    let max_bytes = usize::try_from(limits.decoder_bytes()).unwrap_or(usize::MAX);
    let mut decoder = Decoder::new_with_limits(Cursor::new(bytes), Limits { bytes: max_bytes });
    decoder.set_transformations(Transformations::IDENTITY);
    let header = decoder.read_header_info().map_err(from_png)?;
    let (width, height) = (header.width, header.height);
    limits.check(width, height)?;
    let mut reader = decoder.read_info().map_err(from_png)?;
    let size = reader.output_buffer_size().ok_or_else(|| FORMAT.corrupt("no size"))?;
    let mut samples = vec![0; size];
    let frame = reader.next_frame(&mut samples).map_err(from_png)?;
    if (frame.width, frame.height) != (width, height) {
        return Err(FORMAT.corrupt(format_args!("first frame is {} x {}, header says {width} x {height}", frame.width, frame.height)));
    }
    // The orientation may stand behind the pixels.
    reader.finish().map_err(from_png)?;
    let info = reader.info();
    let orientation = Orientation::from_metadata(info.exif_metadata.as_deref(), xmp(info).as_deref());
    let transparent = info.trns.as_deref();
    let samples = unpack_bits(samples, width as usize, info.bit_depth as u8);
    let pixels = match (info.color_type, info.bit_depth) {
        (ColorType::Indexed, _) => from_palette(&samples, info.palette.as_deref().unwrap_or_default(), transparent.unwrap_or_default()),
        (ColorType::Grayscale, BitDepth::Sixteen) => from_gray_16(&samples, transparent),
        (ColorType::Grayscale, depth) => from_gray(&samples, depth, transparent),
        (ColorType::GrayscaleAlpha, BitDepth::Sixteen) => gray_alpha_over_white(&high_bytes(&samples)),
        (ColorType::GrayscaleAlpha, _) => gray_alpha_over_white(&samples),
        (ColorType::Rgba, BitDepth::Sixteen) => rgba_over_white(&high_bytes(&samples)),
        (ColorType::Rgba, _) => rgba_over_white(&samples),
        // The reference takes RGB as it is, so a transparent colour (tRNS) shows.
        (ColorType::Rgb, BitDepth::Sixteen) => high_bytes(&samples),
        (ColorType::Rgb, _) => samples,
    };
    Ok(Stored { picture: RgbPicture { width, height, pixels }, orientation })
}

fn from_png(error: DecodingError, limits: &ImageLimits) -> PreprocessError {
    match error {
        DecodingError::LimitsExceeded => PreprocessError::TooMuchMemory { format: FORMAT, limit_bytes: limits.decoder_bytes() },
        error => FORMAT.corrupt(error),
    }
}

/// The XMP block, if there is one and it is of a size that cameras write.
fn xmp(info: &Info<'_>) -> Option<Vec<u8>> {
    let mut chunk = info.utf8_text.iter().find(|chunk| chunk.keyword == "XML:com.adobe.xmp")?.clone();
    chunk.decompress_text_with_limit(MAX_TEXT_BYTES).ok()?;
    Some(chunk.get_text().ok()?.into_bytes())
}

/// The high bytes of big-endian 16-bit samples.
fn high_bytes(samples: &[u8]) -> Vec<u8> {
    samples.as_chunks::<2>().0.iter().map(|&[high, _]| high).collect()
}

/// Colours by index. An index past the palette is black.
fn from_palette(indices: &[u8], palette: &[u8], alphas: &[u8]) -> Vec<u8> {
    let mut colors = [[0; 3]; 256];
    for (color, entry) in colors.iter_mut().zip(palette.as_chunks::<3>().0) {
        *color = *entry;
    }
    for (color, &alpha) in colors.iter_mut().zip(alphas) {
        let [red, green, blue] = *color;
        *color = over_white([red, green, blue, alpha]);
    }
    map_pixels(indices, |[index]| colors[usize::from(index)])
}

/// Gray of up to eight bits, scaled to eight.
///
/// The reference compares the transparent value, as the file stores it, with scaled pixels: below eight bits only 0 ever matches.
fn from_gray(samples: &[u8], depth: BitDepth, transparent: Option<&[u8]>) -> Vec<u8> {
    let scale = 255 / ((1_u16 << depth as u16) - 1) as u8;
    // The decoder keeps the low byte alone.
    let transparent = transparent.and_then(|value| value.last().copied());
    map_pixels(samples, |[sample]| match sample * scale {
        gray if Some(gray) == transparent => [255; 3],
        gray => [gray; 3],
    })
}

/// The high byte of 16-bit gray, white where transparent.
///
/// Not what the reference does: Pillow 11.3 clips such values to 255, which turns all but the darkest 0.4% of the range white.
fn from_gray_16(samples: &[u8], transparent: Option<&[u8]>) -> Vec<u8> {
    match transparent {
        Some(value) => map_pixels(samples, |sample: [u8; 2]| if sample == value { [255; 3] } else { [sample[0]; 3] }),
        None => gray_to_rgb(&high_bytes(samples)),
    }
}

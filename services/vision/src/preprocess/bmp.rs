//! BMP files.

use std::io::Cursor;

use image::codecs::bmp::BmpDecoder;

use super::decode::{Stored, from_image, read_rgb};
use super::orientation::Orientation;
use super::{ImageFormat, ImageLimits, PreprocessError, RgbPicture};

const FORMAT: ImageFormat = ImageFormat::Bmp;
/// Where the header tells its own size, and the picture's.
const HEADER_SIZE: usize = 14;
const SIZE: usize = 18;
/// Where the header tells the bits a pixel.
const BITS_PER_PIXEL: usize = 28;
/// Where the header tells how pixels are packed, and the value that says: as the masks behind it tell.
const COMPRESSION: usize = 30;
const BIT_FIELDS: u8 = 3;
/// Where the mask of green lies.
const GREEN_MASK: usize = 58;

pub(super) fn decode(bytes: &[u8], limits: &ImageLimits) -> Result<Stored, PreprocessError> {
    // The decoder calls an empty picture one that is too large.
    if let Some((width, height)) = header_size(bytes) {
        limits.check(width, height)?;
    }
    let decoder = BmpDecoder::new(Cursor::new(bytes)).map_err(|error| from_image(error, FORMAT, limits))?;
    let mut picture = read_rgb(decoder, FORMAT, limits)?;
    if bytes.get(BITS_PER_PIXEL) == Some(&16) {
        let is_565 = bytes.get(COMPRESSION) == Some(&BIT_FIELDS) && bytes.get(GREEN_MASK..GREEN_MASK + 2) == Some(&[0xe0, 0x07]);
        truncate_levels(&mut picture, [31, if is_565 { 63 } else { 31 }, 31]);
    }
    Ok(Stored { picture, orientation: Orientation::UPRIGHT })
}

/// Width and height in the header, unless it is OS/2's short one.
fn header_size(bytes: &[u8]) -> Option<(u32, u32)> {
    let value = |at: usize| Some(i32::from_le_bytes(*bytes.get(at..)?.first_chunk()?));
    let is_long = value(HEADER_SIZE)? > 12;
    // Negative heights store the top row first.
    is_long.then_some((value(SIZE)?.unsigned_abs(), value(SIZE + 4)?.unsigned_abs()))
}

/// Takes values that were scaled up from `0..=levels` and rounded, and truncates them instead, as Pillow does.
fn truncate_levels(picture: &mut RgbPicture, levels: [u16; 3]) {
    let tables = levels.map(|levels| -> [u8; 256] {
        std::array::from_fn(|value| {
            let level = (value as u16 * levels + 127) / 255;
            (level * 255 / levels) as u8
        })
    });
    for pixel in picture.pixels.as_chunks_mut::<3>().0 {
        for (value, table) in pixel.iter_mut().zip(&tables) {
            *value = table[usize::from(*value)];
        }
    }
}

//! WebP files: still pictures, and the first frame of animations on its canvas.

use std::borrow::Cow;
use std::io::Cursor;

use image::ImageDecoder;
use image::codecs::webp::WebPDecoder;

use super::decode::{Stored, from_image, read_rgb};
use super::orientation::Orientation;
use super::{ImageFormat, ImageLimits, PreprocessError};

const FORMAT: ImageFormat = ImageFormat::WebP;
/// Bytes before the first chunk: `RIFF`, a length, `WEBP`.
const FILE_HEADER: usize = 12;
/// Bytes before a chunk's payload: its name and a length.
const CHUNK_HEADER: usize = 8;
/// Where an animation frame's payload says how it meets the canvas.
const FRAME_FLAGS: usize = 15;
/// The frame replaces what it covers.
const DO_NOT_BLEND: u8 = 0x02;
/// In a `VP8X` chunk's first byte: some pixel may be transparent.
const CANVAS_ALPHA: u8 = 0x10;
/// In a `VP8L` chunk's fifth byte: some pixel may be transparent.
const LOSSLESS_ALPHA: u8 = 0x10;

pub(super) fn decode(bytes: &[u8], limits: &ImageLimits) -> Result<Stored, PreprocessError> {
    check_whole(bytes)?;
    let bytes = correct_flags(bytes);
    let mut decoder = WebPDecoder::new(Cursor::new(&bytes)).map_err(|error| from_image(error, FORMAT, limits))?;
    let (width, height) = decoder.dimensions();
    limits.check(width, height)?;
    let exif = decoder.exif_metadata().ok().flatten();
    let xmp = decoder.xmp_metadata().ok().flatten();
    let orientation = Orientation::from_metadata(exif.as_deref(), xmp.as_deref());
    Ok(Stored { picture: read_rgb(decoder, FORMAT, limits)?, orientation })
}

/// The length in the header must lie within the file: what is missing may be decoded as if it were zeros.
fn check_whole(bytes: &[u8]) -> Result<(), PreprocessError> {
    let claimed = chunk_length(bytes, 0).map_or(FILE_HEADER, |length| length + CHUNK_HEADER);
    if claimed > bytes.len() {
        return Err(FORMAT.corrupt(format_args!("header says {claimed} bytes, file has {}", bytes.len())));
    }
    Ok(())
}

/// The file with two flags set as libwebp would read it.
///
/// It takes an animation's first frame as it is, where the decoder would blend it with the canvas, which rounds. And it believes a still
/// picture's own data about alpha, not the header in front of it.
fn correct_flags(bytes: &[u8]) -> Cow<'_, [u8]> {
    let mut bytes = Cow::Borrowed(bytes);
    let mut has_alpha = false;
    let mut at = FILE_HEADER;
    while let Some(length) = chunk_length(&bytes, at) {
        let payload = at + CHUNK_HEADER;
        match &bytes[at..at + 4] {
            b"ANMF" if payload + FRAME_FLAGS < bytes.len() => {
                bytes.to_mut()[payload + FRAME_FLAGS] |= DO_NOT_BLEND;
                return bytes;
            }
            b"ALPH" => has_alpha = true,
            b"VP8L" => has_alpha |= bytes.get(payload + 4).is_some_and(|byte| byte & LOSSLESS_ALPHA != 0),
            _ => {}
        }
        at = payload + length.next_multiple_of(2);
    }
    let flags = FILE_HEADER + CHUNK_HEADER;
    if bytes[FILE_HEADER..].starts_with(b"VP8X") && bytes.get(flags).is_some_and(|byte| (byte & CANVAS_ALPHA != 0) != has_alpha) {
        bytes.to_mut()[flags] ^= CANVAS_ALPHA;
    }
    bytes
}

/// The length that the chunk at `at` claims for its payload.
fn chunk_length(bytes: &[u8], at: usize) -> Option<usize> {
    let length = *bytes.get(at + 4..)?.first_chunk()?;
    Some(u32::from_le_bytes(length) as usize)
}

//! GIF files: the first frame, on the canvas that Pillow gives it.

use std::io::Cursor;
use std::num::NonZeroU64;

use gif::{ColorOutput, DecodeOptions, DecodingError, MemoryLimit};

use super::decode::Stored;
use super::orientation::Orientation;
use super::{ImageFormat, ImageLimits, PreprocessError, RgbPicture};

const FORMAT: ImageFormat = ImageFormat::Gif;

pub(super) fn decode(bytes: &[u8], limits: &ImageLimits) -> Result<Stored, PreprocessError> {
    let from_gif = |error| from_gif(error, limits);
    let mut options = DecodeOptions::new();
    options.set_color_output(ColorOutput::Indexed);
    options.set_memory_limit(MemoryLimit::Bytes(NonZeroU64::new(limits.decoder_bytes()).unwrap_or(NonZeroU64::MAX)));
    let mut decoder = options.read_info(Cursor::new(bytes)).map_err(from_gif)?;
    let (screen_width, screen_height) = (decoder.width(), decoder.height());
    let frame = decoder.next_frame_info().map_err(from_gif)?.ok_or_else(|| FORMAT.corrupt("no frame"))?;
    let (left, top) = (usize::from(frame.left), usize::from(frame.top));
    let (frame_width, frame_height) = (usize::from(frame.width), usize::from(frame.height));
    let transparent = frame.transparent;
    // A frame that reaches over the edge of the screen enlarges it.
    let width = usize::from(screen_width).max(left + frame_width);
    let height = usize::from(screen_height).max(top + frame_height);
    limits.check(width as u32, height as u32)?;
    if frame_width == 0 || frame_height == 0 {
        return Err(FORMAT.corrupt("first frame is empty"));
    }

    let palette = decoder.palette().map(<[u8]>::to_vec).unwrap_or_default();
    let mut indices = vec![0; frame_width * frame_height];
    decoder.read_into_buffer(&mut indices).map_err(from_gif)?;

    let colors = colors(&palette, transparent);
    // What the frame leaves bare is transparent if anything is, and else has the first colour, whatever the background index says.
    let bare = colors[usize::from(transparent.unwrap_or(0))];
    let mut pixels: Vec<u8> = bare.iter().copied().cycle().take(width * height * 3).collect();
    for (y, row) in indices.chunks_exact(frame_width).enumerate() {
        let target = &mut pixels[((top + y) * width + left) * 3..][..frame_width * 3];
        for (pixel, &index) in target.as_chunks_mut::<3>().0.iter_mut().zip(row) {
            *pixel = colors[usize::from(index)];
        }
    }
    Ok(Stored { picture: RgbPicture { width: width as u32, height: height as u32, pixels }, orientation: Orientation::UPRIGHT })
}

fn from_gif(error: DecodingError, limits: &ImageLimits) -> PreprocessError {
    match error {
        DecodingError::MemoryLimit | DecodingError::OutOfMemory => {
            PreprocessError::TooMuchMemory { format: FORMAT, limit_bytes: limits.decoder_bytes() }
        }
        error => FORMAT.corrupt(error),
    }
}

/// The colour of each index, over white.
///
/// An index past the palette is black. But if the palette is a gray ramp, Pillow drops it and takes each index for its own gray.
fn colors(palette: &[u8], transparent: Option<u8>) -> [[u8; 3]; 256] {
    let entries = palette.as_chunks::<3>().0;
    let is_ramp = entries.iter().enumerate().all(|(index, entry)| *entry == [index as u8; 3]);
    std::array::from_fn(|index| match entries.get(index) {
        _ if transparent.map(usize::from) == Some(index) => [255; 3],
        Some(&color) => color,
        None if is_ramp => [index as u8; 3],
        None => [0; 3],
    })
}

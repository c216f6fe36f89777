//! Pictures drawn from a seed: gradients under rectangles, which compress about as well as screenshots do.

use crate::range::Range;
use bytes::Bytes;
use image::{ImageFormat, Rgb, RgbImage};
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use std::io::Cursor;

/// Rectangles in a picture.
const RECTANGLES: usize = 12;

/// An encoded picture, PNG or JPEG, each edge drawn from `edge_pixels`. `variant` changes one pixel and nothing else: a picture
/// that costs the same work and that no cache knows.
pub(crate) fn draw(rng: &mut ChaCha8Rng, edge_pixels: Range, variant: u32) -> Bytes {
    let (width, height) = (edge_pixels.draw(rng), edge_pixels.draw(rng));
    let tint: [u8; 3] = rng.random();
    let mut picture = RgbImage::from_fn(width, height, |x, y| {
        let (across, down) = ((x * 255 / width) as u8, (y * 255 / height) as u8);
        Rgb([tint[0].wrapping_add(across), tint[1].wrapping_add(down), tint[2]])
    });
    for _ in 0..RECTANGLES {
        let color = Rgb(rng.random());
        let (left, top) = (rng.random_range(0..width), rng.random_range(0..height));
        let (right, bottom) = (rng.random_range(left..width), rng.random_range(top..height));
        for y in top..=bottom {
            for x in left..=right {
                picture.put_pixel(x, y, color);
            }
        }
    }
    let format = if rng.random() { ImageFormat::Png } else { ImageFormat::Jpeg };
    if variant > 0 {
        mark(&mut picture, variant);
    }
    let mut encoded = Cursor::new(Vec::new());
    picture.write_to(&mut encoded, format).expect("an RGB picture can be written to memory as PNG and as JPEG");
    encoded.into_inner().into()
}

/// Writes `variant` into the first corner in blocks of 8 x 8 pixels per bit, so that JPEG keeps it.
fn mark(picture: &mut RgbImage, variant: u32) {
    let blocks_across = (picture.width() / 8).max(1);
    for bit in 0..u32::BITS {
        let value = if variant >> bit & 1 == 1 { 255 } else { 0 };
        let (left, top) = (bit % blocks_across * 8, bit / blocks_across * 8);
        for y in top..(top + 8).min(picture.height()) {
            for x in left..(left + 8).min(picture.width()) {
                picture.put_pixel(x, y, Rgb([value; 3]));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;
    use std::collections::BTreeSet;

    #[test]
    fn variants_of_a_picture_have_its_size_and_other_bytes() {
        let draw = |seed, variant| draw(&mut ChaCha8Rng::seed_from_u64(seed), Range { least: 64, most: 200 }, variant);
        for seed in 0..8 {
            let variants: BTreeSet<Bytes> = (0..8).map(|variant| draw(seed, variant)).collect();
            assert_eq!(variants.len(), 8, "seed {seed}");
            let sizes: BTreeSet<(u32, u32)> = variants
                .iter()
                .map(|bytes| image::load_from_memory(bytes).unwrap())
                .map(|picture| (picture.width(), picture.height()))
                .collect();
            assert_eq!(sizes.len(), 1, "seed {seed}");
        }
        assert_eq!(draw(1, 3), draw(1, 3));
    }

    #[test]
    fn both_formats_occur() {
        let mut rng = ChaCha8Rng::seed_from_u64(0);
        let formats: BTreeSet<String> =
            (0..20).map(|_| format!("{:?}", image::guess_format(&draw(&mut rng, Range { least: 32, most: 64 }, 0)).unwrap())).collect();
        assert_eq!(formats.into_iter().collect::<Vec<_>>(), ["Jpeg", "Png"]);
    }
}

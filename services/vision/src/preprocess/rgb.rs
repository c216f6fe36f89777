//! 8-bit RGB pictures, and how pixels of other kinds become such.

/// An owned picture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RgbPicture {
    /// Pixels a row.
    pub width: u32,
    /// Rows.
    pub height: u32,
    /// `[height, width, 3]` u8.
    pub pixels: Vec<u8>,
}

impl RgbPicture {
    /// All of it, borrowed.
    #[must_use]
    pub fn view(&self) -> RgbView<'_> {
        RgbView { pixels: &self.pixels, stride: self.width as usize * 3, width: self.width, height: self.height }
    }
}

/// A rectangle of a picture: a crop without a copy.
#[derive(Clone, Copy, Debug)]
pub struct RgbView<'a> {
    /// From the first pixel of the rectangle on.
    pixels: &'a [u8],
    /// Bytes from one row to the next.
    stride: usize,
    width: u32,
    height: u32,
}

impl<'a> RgbView<'a> {
    /// Pixels a row.
    #[must_use]
    pub fn width(&self) -> u32 {
        self.width
    }

    /// Rows.
    #[must_use]
    pub fn height(&self) -> u32 {
        self.height
    }

    /// `[width, 3]` u8.
    ///
    /// # Panics
    /// If there is no such row.
    #[must_use]
    #[inline]
    pub fn row(&self, y: usize) -> &'a [u8] {
        &self.pixels[y * self.stride..][..self.width as usize * 3]
    }

    /// The rectangle of `width` x `height` at (`x`, `y`).
    ///
    /// # Panics
    /// If it is empty or does not lie within this view.
    #[must_use]
    pub fn crop(&self, x: u32, y: u32, width: u32, height: u32) -> RgbView<'a> {
        assert!(width > 0 && height > 0 && x + width <= self.width && y + height <= self.height, "crop lies outside of the picture");
        RgbView { pixels: &self.pixels[y as usize * self.stride + x as usize * 3..], stride: self.stride, width, height }
    }

    /// A copy of the rectangle.
    #[must_use]
    pub fn to_picture(&self) -> RgbPicture {
        let mut pixels = Vec::with_capacity(self.width as usize * self.height as usize * 3);
        for y in 0..self.height as usize {
            pixels.extend_from_slice(self.row(y));
        }
        RgbPicture { width: self.width, height: self.height, pixels }
    }
}

/// A colour with alpha, laid over white.
///
/// Pillow's `alpha_composite` in fixed point for an opaque white background: the colours are blended with 7 extra bits, and the division
/// by 255 rounds by shifts.
pub(super) fn over_white([red, green, blue, alpha]: [u8; 4]) -> [u8; 3] {
    let weight = u32::from(alpha) << 7;
    let blend = |value: u8| {
        let sum = u32::from(value) * weight + 255 * ((255 << 7) - weight) + (0x80 << 7);
        ((((sum >> 8) + sum) >> 8) >> 7) as u8
    };
    [blend(red), blend(green), blend(blue)]
}

/// RGB from pixels of `N` samples.
pub(super) fn map_pixels<const N: usize>(samples: &[u8], color: impl Fn([u8; N]) -> [u8; 3]) -> Vec<u8> {
    let samples = samples.as_chunks::<N>().0;
    let mut pixels = vec![0; samples.len() * 3];
    for (pixel, &samples) in pixels.as_chunks_mut::<3>().0.iter_mut().zip(samples) {
        *pixel = color(samples);
    }
    pixels
}

/// RGB from RGBA pixels, over white.
pub(super) fn rgba_over_white(samples: &[u8]) -> Vec<u8> {
    map_pixels(samples, over_white)
}

/// RGB from gray pixels with alpha, over white.
pub(super) fn gray_alpha_over_white(samples: &[u8]) -> Vec<u8> {
    map_pixels(samples, |[gray, alpha]| over_white([gray, gray, gray, alpha]))
}

/// RGB from gray pixels.
pub(super) fn gray_to_rgb(samples: &[u8]) -> Vec<u8> {
    map_pixels(samples, |[gray]| [gray; 3])
}

/// RGB from cyan, magenta, yellow and black, each 255 at most ink.
///
/// As Pillow converts: ink takes its share of what black leaves, rounded by shifts.
pub(super) fn inks_to_rgb(samples: &[u8]) -> Vec<u8> {
    map_pixels(samples, |[cyan, magenta, yellow, black]| {
        let light = 255 - u32::from(black);
        [cyan, magenta, yellow].map(|ink| {
            let product = u32::from(ink) * light + 128;
            (light - (((product >> 8) + product) >> 8)) as u8
        })
    })
}

/// One byte per sample of `bits` each, most significant first, rows starting at whole bytes; samples of 8 bits as they are.
pub(super) fn unpack_bits(packed: Vec<u8>, width: usize, bits: u8) -> Vec<u8> {
    let bits = usize::from(bits);
    if bits >= 8 {
        return packed;
    }
    let per_byte = 8 / bits;
    let mask = u8::MAX >> (8 - bits);
    let sample = |row: &[u8], x: usize| row[x / per_byte] >> (8 - bits - x % per_byte * bits) & mask;
    let rows = packed.chunks_exact(width.div_ceil(per_byte).max(1));
    rows.flat_map(|row| (0..width).map(move |x| sample(row, x))).collect()
}

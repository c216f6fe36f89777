//! Antialiased bilinear resizing, bit-exact with Pillow's on 8-bit RGB.
//!
//! Two passes, horizontal then vertical, with 8-bit values between them. Each output value is a weighted sum over `2 * support` input
//! values in 22-bit fixed point. Both the weights and the rounding of each pass are Pillow's (its `Resample.c` is the reference); the
//! order of work is ours, in [`super::kernel`].

use super::kernel::{self, Taps};
use super::{PreprocessOptions, RgbPicture, RgbView};

/// Extra bits of the fixed-point weights: 32 less 8 of the values and 2 of headroom.
pub(super) const PRECISION_BITS: u32 = 22;

/// Width and height after resizing, as the Idefics2 image processor computes them.
///
/// The longer edge is scaled down to `longest_edge` and the other one with it, truncated; then each edge is raised to `shortest_edge`,
/// even if that distorts. The aspect ratio and the product are f64: the truncation shows their last bit.
#[must_use]
pub fn output_size(width: u32, height: u32, options: &PreprocessOptions) -> (u32, u32) {
    let longest = options.longest_edge;
    let aspect_ratio = f64::from(width) / f64::from(height);
    let (width, height) = if width >= height && width > longest {
        (longest, (f64::from(longest) / aspect_ratio) as u32)
    } else if height > width && height > longest {
        ((f64::from(longest) * aspect_ratio) as u32, longest)
    } else {
        (width, height)
    };
    (width.max(options.shortest_edge), height.max(options.shortest_edge))
}

/// `source` at `width` x `height` pixels. An axis that keeps its size is not touched.
///
/// # Panics
/// If `width` or `height` is 0.
#[must_use]
pub fn resize_bilinear(source: RgbView<'_>, width: u32, height: u32) -> RgbPicture {
    assert!(width > 0 && height > 0, "output is {width} x {height}, expected at least one pixel");
    let (resize_columns, resize_rows) = (width != source.width(), height != source.height());
    if !resize_columns && !resize_rows {
        return source.to_picture();
    }
    let narrowed;
    let mut view = source;
    if resize_columns {
        let pixels = kernel::horizontal(source, &taps(source.width(), width));
        narrowed = RgbPicture { width, height: source.height(), pixels };
        if !resize_rows {
            return narrowed;
        }
        view = narrowed.view();
    }
    RgbPicture { width, height, pixels: kernel::vertical(view, &taps(source.height(), height)) }
}

/// Which input positions each output position of an axis sums up, and with which weights.
///
/// A triangle of half-width `support` around the centre of the output pixel, normalised to 1 in f64 and then rounded half up to
/// [`PRECISION_BITS`].
fn taps(input: u32, output: u32) -> Taps {
    let scale = f64::from(input) / f64::from(output);
    let support = scale.max(1.0);
    let reciprocal = 1.0 / support;
    let mut taps = Taps::with_capacity(output as usize, support.ceil() as usize * 2 + 1);
    let mut weights = Vec::new();
    for position in 0..output {
        let center = (f64::from(position) + 0.5) * scale;
        // A cast truncates toward zero, and a negative value becomes 0: what Pillow does in two steps.
        let first = (center - support + 0.5) as u32;
        let end = ((center + support + 0.5) as u32).min(input);
        weights.clear();
        weights.extend((first..end).map(|tap| {
            let distance = (f64::from(tap) - center + 0.5) * reciprocal;
            (1.0 - distance.abs()).max(0.0)
        }));
        let sum: f64 = weights.iter().sum();
        let unit = f64::from(1 << PRECISION_BITS);
        taps.push(first as usize, weights.iter().map(|weight| (0.5 + weight / sum * unit) as i32));
    }
    taps
}

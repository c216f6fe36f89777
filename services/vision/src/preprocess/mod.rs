//! The image path of an encode call: encoded bytes in, one grid of 8-bit patches per (sub-)image out.
//!
//! Decode ([`decode`]) → split into crops → resize each ([`resize_bilinear`]) → keep whole patches ([`PatchGrid`]). The values equal
//! those of the Idefics2 image processor of `transformers` 4.57.6 over Pillow 11.3, bit for bit, for every lossless format; a JPEG's
//! differ by the rounding of its decoder. Pixels stay 8-bit up to the engine, which looks them up in [`Normalization::table`]: a quarter
//! of the bytes to queue and to upload, and the same floats.
//!
//! Everything here blocks on the CPU, and spreads a large picture over rayon's threads: call it from a blocking thread.

mod bmp;
mod decode;
mod error;
mod gif;
mod jpeg;
mod kernel;
mod normalize;
mod orientation;
mod patches;
mod png;
mod position;
mod resize;
mod rgb;
mod tiff;
mod webp;

use rayon::prelude::*;

pub use decode::{ImageFormat, decode};
pub use error::PreprocessError;
pub use normalize::Normalization;
pub use patches::PatchGrid;
pub use position::position_ids;
pub use resize::{output_size, resize_bilinear};
pub use rgb::{RgbPicture, RgbView};

/// How a picture is cut and resized: `preprocessor_config.json`, or what the request asks for instead.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PreprocessOptions {
    /// Four crops before the whole picture: five grids instead of one.
    pub split: bool,
    /// The longer edge is scaled down to at most this many pixels.
    pub longest_edge: u32,
    /// Each edge is scaled up to at least this many pixels, even if that distorts.
    pub shortest_edge: u32,
}

impl Default for PreprocessOptions {
    /// The values of `idefics2-8b`, without splitting.
    fn default() -> Self {
        Self { split: false, longest_edge: 980, shortest_edge: 378 }
    }
}

/// What a stranger's picture may cost. All but the last are checked on the file's header, before anything is decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImageLimits {
    /// Size of the encoded file.
    pub max_image_bytes: usize,
    /// Width times height that the header claims. Decoding needs up to eight bytes a pixel.
    pub max_pixels: u64,
    /// Width or height that the header claims, in pixels.
    pub max_edge: u32,
    /// Largest `longest_edge` or `shortest_edge` that a request may ask for: the `image_size` that the vision tower was trained on.
    pub max_resized_edge: u32,
}

impl Default for ImageLimits {
    /// 20 MiB, 64 megapixels, 32768 pixels an edge, 980 pixels after resizing.
    fn default() -> Self {
        Self { max_image_bytes: 20 << 20, max_pixels: 64_000_000, max_edge: 32_768, max_resized_edge: 980 }
    }
}

/// The patches of one encoded picture: one grid, or with [`PreprocessOptions::split`] five: the crops top left, top right, bottom left
/// and bottom right, then the whole picture.
///
/// # Errors
/// [`PreprocessError`] if the file is not a whole picture of a known format, exceeds `limits`, or if `options` leave no whole patch.
pub fn preprocess(
    bytes: &[u8],
    options: &PreprocessOptions,
    patch_size: usize,
    limits: &ImageLimits,
) -> Result<Vec<PatchGrid>, PreprocessError> {
    preprocess_while(|| true, bytes, options, patch_size, limits)
}

/// [`preprocess`] for as long as `wanted` says so: it is asked before the picture is decoded and before each grid is made.
///
/// # Errors
/// Those of [`preprocess`], and [`PreprocessError::Abandoned`].
pub fn preprocess_while(
    wanted: impl Fn() -> bool + Sync,
    bytes: &[u8],
    options: &PreprocessOptions,
    patch_size: usize,
    limits: &ImageLimits,
) -> Result<Vec<PatchGrid>, PreprocessError> {
    let still_wanted = || wanted().then_some(()).ok_or(PreprocessError::Abandoned);
    still_wanted()?;
    check_edges(options, patch_size, limits)?;
    let picture = decode(bytes, limits)?;
    let views = if options.split { split(picture.view()) } else { vec![picture.view()] };
    views
        .into_par_iter()
        .map(|view| {
            still_wanted()?;
            let (width, height) = output_size(view.width(), view.height(), options);
            Ok(PatchGrid::new(resize_bilinear(view, width, height), patch_size))
        })
        .collect()
}

/// Each edge of every grid lies between `shortest_edge` and the larger of the two options, so two comparisons bound all that follows.
fn check_edges(options: &PreprocessOptions, patch_size: usize, limits: &ImageLimits) -> Result<(), PreprocessError> {
    let PreprocessOptions { longest_edge, shortest_edge, .. } = *options;
    let (min, max) = (u32::try_from(patch_size).unwrap_or(u32::MAX).max(1), limits.max_resized_edge);
    for (option, value) in [("shortest_edge", shortest_edge), ("longest_edge", longest_edge)] {
        if !(min..=max).contains(&value) {
            return Err(PreprocessError::EdgeOption { option, value, min, max });
        }
    }
    Ok(())
}

/// The four crops at half of each edge, then the whole.
///
/// An edge of one pixel has no half. The reference fails there; here both crops of that axis are the one row or column that exists.
fn split(whole: RgbView<'_>) -> Vec<RgbView<'_>> {
    let halves = |edge: u32| {
        let middle = edge / 2;
        [(0, middle.max(1)), (middle, edge - middle)]
    };
    let (columns, rows) = (halves(whole.width()), halves(whole.height()));
    let crops = rows.iter().flat_map(|&(y, height)| columns.iter().map(move |&(x, width)| whole.crop(x, y, width, height)));
    crops.chain([whole]).collect()
}

//! Cutting a picture into the patches that the convolution of the patch embedding sees.

use super::RgbPicture;

/// The patches of one (sub-)image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PatchGrid {
    /// Pixels a row after resizing, the dropped remainder included.
    pub width: u32,
    /// Rows of pixels after resizing, the dropped remainder included.
    pub height: u32,
    /// Rows of patches.
    pub rows: usize,
    /// Patches a row.
    pub cols: usize,
    /// `[rows * cols, 3 * patch_size * patch_size]` u8, row-major over the grid; within a patch channel, y, x: the layout of the
    /// convolution's weight `[out, 3, patch_size, patch_size]`.
    pub pixels: Vec<u8>,
}

/// All whole patches of `picture`; what remains at the right and bottom edge is dropped, as the convolution drops it.
///
/// # Panics
/// If `patch_size` is 0.
#[must_use]
pub fn cut_patches(picture: &RgbPicture, patch_size: usize) -> PatchGrid {
    let (width, height) = (picture.width as usize, picture.height as usize);
    let (rows, cols) = (height / patch_size, width / patch_size);
    let plane = patch_size * patch_size;
    let mut pixels = vec![0; rows * cols * 3 * plane];
    if cols > 0 {
        for (y, row) in picture.pixels.chunks_exact(width * 3).take(rows * patch_size).enumerate() {
            let grid_row = &mut pixels[y / patch_size * cols * 3 * plane..][..cols * 3 * plane];
            let offset = y % patch_size * patch_size;
            for (patch, source) in grid_row.chunks_exact_mut(3 * plane).zip(row.chunks_exact(patch_size * 3)) {
                for channel in 0..3 {
                    let target = &mut patch[channel * plane + offset..][..patch_size];
                    for (value, pixel) in target.iter_mut().zip(source.as_chunks::<3>().0) {
                        *value = pixel[channel];
                    }
                }
            }
        }
    }
    PatchGrid { width: picture.width, height: picture.height, rows, cols, pixels }
}

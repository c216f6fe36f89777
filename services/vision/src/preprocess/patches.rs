//! A picture as the grid of patches that the convolution of the patch embedding sees.

use super::RgbPicture;

/// The patches of one (sub-)image, not yet cut: that is [`Backend::patchify`](idefics_kernels::Backend::patchify)'s.
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
    /// `[rows * patch_size, cols * patch_size, 3]` u8.
    pub pixels: Vec<u8>,
}

impl PatchGrid {
    /// All whole patches of `picture`; what remains at the right and bottom edge is dropped, as the convolution drops it.
    ///
    /// # Panics
    /// If `patch_size` is 0.
    #[must_use]
    pub fn new(picture: RgbPicture, patch_size: usize) -> Self {
        let RgbPicture { width, height, mut pixels } = picture;
        let (rows, cols) = (height as usize / patch_size, width as usize / patch_size);
        let (pitch, kept) = (width as usize * 3, cols * patch_size * 3);
        if kept < pitch {
            for y in 1..rows * patch_size {
                pixels.copy_within(y * pitch..y * pitch + kept, y * kept);
            }
        }
        pixels.truncate(rows * patch_size * kept);
        Self { width, height, rows, cols, pixels }
    }

    /// Patches.
    #[must_use]
    pub fn len(&self) -> usize {
        self.rows * self.cols
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

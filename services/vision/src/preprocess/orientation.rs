//! Turning a stored picture upright, as its metadata asks.

use rayon::prelude::*;

use super::RgbPicture;

/// The orientation tag of TIFF and EXIF.
const ORIENTATION: u16 = 0x0112;
/// Rows of the result that are filled together, from whole cache lines of the source.
const STRIP: usize = 64;

/// How the camera was held: 1 upright, 2 to 8 the other turns and mirrorings of EXIF.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Orientation(u16);

impl Orientation {
    /// As stored.
    pub(super) const UPRIGHT: Self = Self(1);

    /// What EXIF says, or XMP if EXIF says nothing; upright if neither does, or if it is none of the eight.
    pub(super) fn from_metadata(exif: Option<&[u8]>, xmp: Option<&[u8]>) -> Self {
        Self::from_tags(exif.and_then(from_exif), xmp)
    }

    /// As [`Self::from_metadata`], of an orientation tag that is read already.
    pub(super) fn from_tags(tag: Option<u16>, xmp: Option<&[u8]>) -> Self {
        match tag.or_else(|| xmp.and_then(from_xmp)) {
            Some(value @ 1..=8) => Self(value),
            _ => Self::UPRIGHT,
        }
    }

    /// `picture` as it is to be seen.
    pub(super) fn apply(self, picture: RgbPicture) -> RgbPicture {
        // Whether rows become columns, and which edges of the stored picture are then read from their far end.
        let (transposed, mirror_x, mirror_y) = match self.0 {
            2 => (false, true, false),
            3 => (false, true, true),
            4 => (false, false, true),
            5 => (true, false, false),
            6 => (true, false, true),
            7 => (true, true, true),
            8 => (true, true, false),
            _ => return picture,
        };
        let (source_width, source_height) = (picture.width as isize, picture.height as isize);
        let source = picture.pixels.as_chunks::<3>().0;
        // Where the first pixel of the result lies in the source, and how far from there the next ones right and down.
        let corner = if mirror_x { source_width - 1 } else { 0 } + if mirror_y { (source_height - 1) * source_width } else { 0 };
        let along_row = if mirror_x { -1 } else { 1 };
        let along_column = if mirror_y { -source_width } else { source_width };
        let (right, down) = if transposed { (along_column, along_row) } else { (along_row, along_column) };
        let (width, height) = if transposed { (picture.height, picture.width) } else { (picture.width, picture.height) };
        let mut pixels = vec![0; picture.pixels.len()];
        let strips = pixels.as_chunks_mut::<3>().0.par_chunks_mut(width as usize * STRIP).enumerate();
        strips.for_each(|(strip, pixels)| {
            let first = corner + (strip * STRIP) as isize * down;
            for x in 0..width as usize {
                let mut at = first + x as isize * right;
                for pixel in pixels[x..].iter_mut().step_by(width as usize) {
                    *pixel = source[at as usize];
                    at += down;
                }
            }
        });
        RgbPicture { width, height, pixels }
    }
}

/// The orientation tag of an EXIF block, which is a TIFF file without pixels.
fn from_exif(exif: &[u8]) -> Option<u16> {
    find_short(exif.strip_prefix(b"Exif\0\0").unwrap_or(exif), ORIENTATION).map(|(_, value)| value)
}

/// Where the value of a tag lies in a TIFF file, and the value: of the first directory, and only if it is a single short.
pub(super) fn find_short(tiff: &[u8], tag: u16) -> Option<(usize, u16)> {
    let big_endian = tiff.starts_with(b"MM");
    let u16_at = |at: usize| {
        let bytes = *tiff.get(at..)?.first_chunk()?;
        Some(if big_endian { u16::from_be_bytes(bytes) } else { u16::from_le_bytes(bytes) })
    };
    let u32_at = |at: usize| {
        let bytes = *tiff.get(at..)?.first_chunk()?;
        Some(if big_endian { u32::from_be_bytes(bytes) } else { u32::from_le_bytes(bytes) })
    };
    if !(big_endian || tiff.starts_with(b"II")) || u16_at(2)? != 42 {
        return None;
    }
    let directory = u32_at(4)? as usize;
    let entries = usize::from(u16_at(directory)?);
    let entry = (0..entries).map(|entry| directory + 2 + entry * 12).find(|&at| u16_at(at) == Some(tag))?;
    let is_short = u16_at(entry + 2)? == 3 && u32_at(entry + 4)? == 1;
    is_short.then_some((entry + 8, u16_at(entry + 8)?))
}

/// The digit behind the first `tiff:Orientation="` or `tiff:Orientation>`.
fn from_xmp(xmp: &[u8]) -> Option<u16> {
    let name = b"tiff:Orientation";
    let mut starts = xmp.windows(name.len()).enumerate().filter(|(_, window)| window == name).map(|(at, _)| &xmp[at + name.len()..]);
    starts.find_map(|rest| match rest.strip_prefix(b"=\"").or_else(|| rest.strip_prefix(b">"))? {
        [digit @ b'0'..=b'9', ..] => Some(u16::from(digit - b'0')),
        _ => None,
    })
}

//! Files that are none: an error that says why, never a panic, never a picture with a gray half.

use idefics_vision::preprocess::{ImageFormat, ImageLimits, PreprocessError, PreprocessOptions, decode, preprocess};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::golden_files;

const PATCH: usize = 14;

fn refusal(bytes: &[u8], limits: &ImageLimits) -> PreprocessError {
    decode(bytes, limits).expect_err("a bad file was decoded")
}

/// The header of a PNG file that claims this size, and no pixels.
fn png_header(width: u32, height: u32) -> Vec<u8> {
    let mut header = b"IHDR".to_vec();
    header.extend(width.to_be_bytes());
    header.extend(height.to_be_bytes());
    header.extend([8, 2, 0, 0, 0]);
    let mut file = b"\x89PNG\r\n\x1a\n\0\0\0\x0d".to_vec();
    file.extend(&header);
    file.extend(crc32(&header).to_be_bytes());
    file.extend(b"\0\0\0\0IDAT\x35\xaf\x06\x1e");
    file
}

fn crc32(bytes: &[u8]) -> u32 {
    !bytes
        .iter()
        .fold(!0, |crc, &byte| (0..8).fold(crc ^ u32::from(byte), |crc, _| if crc & 1 == 1 { crc >> 1 ^ 0xedb8_8320 } else { crc >> 1 }))
}

fn gif_header(width: u16, height: u16) -> Vec<u8> {
    let [screen, frame] = [b"GIF89a".as_slice(), b",\0\0\0\0"].map(|prefix| [prefix, &width.to_le_bytes(), &height.to_le_bytes()].concat());
    [screen.as_slice(), &[0x80, 0, 0, 1, 2, 3, 4, 5, 6], &frame, &[0, 2, 2, 0x4c, 1, 0, b';']].concat()
}

fn bmp_header(width: i32, height: i32) -> Vec<u8> {
    let mut file = b"BM\0\0\0\0\0\0\0\0\x36\0\0\0\x28\0\0\0".to_vec();
    file.extend(width.to_le_bytes());
    file.extend(height.to_le_bytes());
    file.extend([1, 0, 24, 0]);
    file.resize(60, 0);
    file
}

fn tiff_header(width: u32, height: u32) -> Vec<u8> {
    let entry = |tag: u16, value: u32| [&tag.to_le_bytes()[..], &4_u16.to_le_bytes(), &1_u32.to_le_bytes(), &value.to_le_bytes()].concat();
    let entries = [entry(256, width), entry(257, height), entry(258, 8), entry(259, 1), entry(262, 1), entry(273, 8), entry(277, 1)];
    let last = [entry(278, height), entry(279, 4)];
    [&b"II*\0\x08\0\0\0\x09\0"[..], &entries.concat(), &last.concat(), &[0; 4]].concat()
}

fn webp_header(width: u32, height: u32) -> Vec<u8> {
    let size = (width - 1) | (height - 1) << 14;
    [&b"RIFF\x16\0\0\0WEBPVP8L\x0a\0\0\0\x2f"[..], &size.to_le_bytes(), &[0; 5]].concat()
}

fn jpeg_header(width: u16, height: u16) -> Vec<u8> {
    let frame = [&b"\xff\xd8\xff\xc0\0\x0b\x08"[..], &height.to_be_bytes(), &width.to_be_bytes(), b"\x01\x01\x11\0"].concat();
    [&frame[..], b"\xff\xda\0\x08\x01\x01\0\0\x3f\0\xff\xd9"].concat()
}

#[test]
fn no_bytes_and_no_picture_are_refused() {
    let limits = ImageLimits::default();
    assert!(matches!(refusal(b"", &limits), PreprocessError::Empty));
    for bytes in [&b"hello, this is no picture"[..], b"\0", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%PDF-1.7", &[0xff, 0xd8]] {
        assert!(matches!(refusal(bytes, &limits), PreprocessError::UnknownFormat), "{bytes:?}");
    }
}

#[test]
fn bytes_are_limited_before_anything_is_read() {
    let limits = ImageLimits { max_image_bytes: 10, ..ImageLimits::default() };
    let error = refusal(&[0; 11], &limits);
    assert!(matches!(error, PreprocessError::TooManyBytes { found: 11, limit: 10 }));
    assert_eq!(error.to_string(), "image is 11 bytes, limit is 10; send a smaller file or raise max_image_bytes");
}

#[test]
fn decompression_bombs_are_refused_by_their_header() {
    let limits = ImageLimits { max_edge: 60_000, ..ImageLimits::default() };
    let bombs = [
        png_header(50_000, 50_000),
        gif_header(50_000, 50_000),
        bmp_header(50_000, 50_000),
        bmp_header(50_000, -50_000),
        tiff_header(50_000, 50_000),
        webp_header(16_000, 16_000),
        jpeg_header(50_000, 50_000),
    ];
    for bomb in bombs {
        let error = refusal(&bomb, &limits);
        assert!(matches!(error, PreprocessError::TooManyPixels { .. }), "{error}");
    }
}

#[test]
fn long_edges_are_refused_by_the_header() {
    let limits = ImageLimits { max_edge: 1000, ..ImageLimits::default() };
    let long = [
        png_header(1001, 1),
        gif_header(1, 1001),
        bmp_header(1001, 1),
        tiff_header(1, 1001),
        webp_header(1001, 1),
        jpeg_header(1, 1001),
        jpeg_header(65_535, 1),
    ];
    for file in long {
        let error = refusal(&file, &limits);
        assert!(matches!(error, PreprocessError::EdgeTooLong { limit: 1000, .. }), "{error}");
    }
    assert!(matches!(refusal(&png_header(u32::MAX >> 1, u32::MAX >> 1), &limits), PreprocessError::EdgeTooLong { .. }));
}

#[test]
fn headers_without_pixels_are_refused() {
    let limits = ImageLimits::default();
    for file in [png_header(0, 5), gif_header(0, 0), bmp_header(0, 5), tiff_header(5, 0), jpeg_header(0, 5), jpeg_header(5, 0)] {
        let error = refusal(&file, &limits);
        assert!(matches!(error, PreprocessError::ZeroSize { .. } | PreprocessError::Corrupt { .. }), "{error}");
    }
}

/// A cut that loses no pixel may be served, but then the picture is the whole one.
#[test]
fn truncated_files_are_refused_unless_every_pixel_is_there() {
    let limits = ImageLimits::default();
    for (name, bytes) in golden_files() {
        let whole = decode(&bytes, &limits).unwrap();
        for length in 0..bytes.len() {
            if let Ok(picture) = decode(&bytes[..length], &limits) {
                assert!(picture == whole, "{name} cut to {length} of {} bytes gives another picture", bytes.len());
                assert!(length * 3 > bytes.len(), "{name} is whole with {length} of {} bytes", bytes.len());
            }
        }
    }
}

#[test]
fn truncated_jpeg_names_what_is_missing() {
    let (_, bytes) = golden_files().into_iter().find(|(name, _)| name == "sampling2.jpg").unwrap();
    let error = refusal(&bytes[..bytes.len() - 1], &ImageLimits::default());
    assert!(matches!(error, PreprocessError::Corrupt { format: ImageFormat::Jpeg, .. }));
    assert_eq!(error.to_string(), "JPEG image is truncated or corrupt: no end-of-image marker; send the whole file");
}

#[test]
fn mutated_files_never_panic_and_respect_the_limits() {
    let limits = ImageLimits { max_pixels: 1 << 16, max_edge: 1 << 12, ..ImageLimits::default() };
    let options = PreprocessOptions { split: true, longest_edge: 56, shortest_edge: 28 };
    let mut random = StdRng::seed_from_u64(7);
    for (name, bytes) in golden_files() {
        for _ in 0..100 {
            let mut mutated = bytes.clone();
            for _ in 0..random.random_range(1..=4) {
                // Half of them in the header, where they do most.
                let end = if random.random() { mutated.len() } else { mutated.len().min(64) };
                let at = random.random_range(0..end);
                mutated[at] = [0, 255, mutated[at] ^ 1 << random.random_range(0..8), random.random()][random.random_range(0..4)];
            }
            if let Ok(grids) = preprocess(&mutated, &options, PATCH, &limits) {
                assert!(grids.iter().all(|grid| grid.len() <= 16), "{name}");
            }
        }
    }
}

#[test]
fn sizes_that_no_grid_can_have_are_refused() {
    let (_, bytes) = golden_files().into_iter().find(|(name, _)| name == "mode_rgb.bmp").unwrap();
    for (longest_edge, shortest_edge) in [(981, 378), (980, 981), (980, 13), (13, 14), (0, 0), (u32::MAX, u32::MAX)] {
        let options = PreprocessOptions { split: false, longest_edge, shortest_edge };
        let error = preprocess(&bytes, &options, PATCH, &ImageLimits::default()).unwrap_err();
        assert!(matches!(error, PreprocessError::EdgeOption { min: 14, max: 980, .. }), "{error}");
    }
    let options = PreprocessOptions { split: false, longest_edge: 1000, shortest_edge: 378 };
    let error = preprocess(&bytes, &options, PATCH, &ImageLimits::default()).unwrap_err();
    assert_eq!(error.to_string(), "longest_edge is 1000, expected 14 to 980; ask for another size or leave it out");
}

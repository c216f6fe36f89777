//! Every format, mode and orientation, against Pillow.

use std::collections::BTreeMap;

use idefics_vision::preprocess::{ImageLimits, RgbPicture, decode};
use serde::Deserialize;

use crate::{digest, golden, golden_json};

#[derive(Deserialize)]
struct Golden {
    lossless: BTreeMap<String, Expected>,
    lossy: BTreeMap<String, Expected>,
}

#[derive(Deserialize)]
struct Expected {
    width: u32,
    height: u32,
    /// Hash of the pixels, or the pixels in hex.
    rgb: String,
}

fn decode_golden(name: &str) -> RgbPicture {
    let bytes = std::fs::read(golden().join("files").join(name)).unwrap();
    decode(&bytes, &ImageLimits::default()).unwrap_or_else(|error| panic!("{name}: {error}"))
}

#[test]
fn lossless_files_equal_the_reference() {
    let wrong: Vec<String> = golden_json::<Golden>("decode.json")
        .lossless
        .into_iter()
        .filter(|(name, expected)| {
            let picture = decode_golden(name);
            (picture.width, picture.height, digest(&picture.pixels)) != (expected.width, expected.height, expected.rgb.clone())
        })
        .map(|(name, _)| name)
        .collect();
    assert!(wrong.is_empty(), "pixels differ from the reference in {wrong:?}");
}

/// Decoders of JPEG may round differently in the inverse transform and in the upsampling of chroma: with all samples at full resolution
/// that is two levels at most, and with halved chroma four.
#[test]
fn lossy_files_differ_from_the_reference_by_rounding_only() {
    for (name, expected) in golden_json::<Golden>("decode.json").lossy {
        let picture = decode_golden(&name);
        assert_eq!((picture.width, picture.height), (expected.width, expected.height), "{name}");
        let expected: Vec<u8> =
            (0..expected.rgb.len()).step_by(2).map(|at| u8::from_str_radix(&expected.rgb[at..at + 2], 16).unwrap()).collect();
        let differences: Vec<u32> = picture.pixels.iter().zip(&expected).map(|(&found, &wanted)| found.abs_diff(wanted).into()).collect();
        let (largest, mean) = (*differences.iter().max().unwrap(), f64::from(differences.iter().sum::<u32>()) / differences.len() as f64);
        let (most, most_in_the_mean) = if name.ends_with(".webp") {
            (0, 0.0)
        } else if name.starts_with("sampling1") || name.starts_with("sampling2") || name == "restart.jpg" {
            (4, 0.6)
        } else {
            (2, 0.1)
        };
        assert!(largest <= most && mean <= most_in_the_mean, "{name}: differs by up to {largest}, {mean:.3} in the mean");
    }
}

#[test]
fn content_decides_the_format() {
    for (name, expected) in
        [("mode_rgb.bmp", "BMP"), ("rgb.jpg", "JPEG"), ("partial.gif", "GIF"), ("lossy.webp", "WebP"), ("cmyk.tif", "TIFF")]
    {
        let bytes = std::fs::read(golden().join("files").join(name)).unwrap();
        let error = decode(&bytes[..bytes.len() / 2], &ImageLimits::default()).unwrap_err().to_string();
        assert!(error.starts_with(expected), "{name}: {error}");
    }
}

//! Resizing, splitting, cutting, normalising and positions, against the image processor of `transformers`.

use std::collections::BTreeMap;

use idefics_vision::preprocess::{
    ImageLimits, Normalization, PatchGrid, PreprocessOptions, RgbPicture, output_size, position_ids, preprocess, resize_bilinear,
};
use serde::Deserialize;

use crate::{digest, golden_json};

const PATCH: usize = 14;

#[derive(Deserialize)]
struct Golden {
    cases: Vec<Case>,
    normalizations: Vec<GoldenNormalization>,
}

#[derive(Deserialize)]
struct Case {
    width: u32,
    height: u32,
    split: bool,
    longest_edge: u32,
    shortest_edge: u32,
    grids: Vec<Grid>,
}

#[derive(Debug, Deserialize, PartialEq)]
struct Grid {
    width: u32,
    height: u32,
    resized: String,
    patches: String,
    pixel_values: String,
}

#[derive(Deserialize)]
struct GoldenNormalization {
    rescale_factor: f64,
    mean: [f64; 3],
    std: [f64; 3],
    table: String,
}

/// Squares of noise and of gradients in turn; `generated` in make_golden.py is the same in Python.
fn generated(width: u32, height: u32) -> RgbPicture {
    let mut pixels = Vec::with_capacity(width as usize * height as usize * 3);
    for y in 0..height {
        for x in 0..width {
            for channel in 0..3_u32 {
                let mut hash = x.wrapping_mul(0x9e37_79b1).wrapping_add(y.wrapping_mul(0x85eb_ca77));
                hash = hash.wrapping_add(channel.wrapping_mul(0xc2b2_ae3d)).wrapping_add(width * 31 + height);
                hash = (hash ^ (hash >> 15)).wrapping_mul(0x2c1b_3c6d);
                hash = (hash ^ (hash >> 12)).wrapping_mul(0x297a_2d39);
                hash ^= hash >> 15;
                let gradient = (x * 3 + y * 5 + channel * 160) >> 2;
                let is_noise = (x >> 4 ^ y >> 4) & 1 == 1;
                pixels.push(if is_noise { hash as u8 } else { gradient as u8 });
            }
        }
    }
    RgbPicture { width, height, pixels }
}

/// The picture as an uncompressed BMP file.
fn bmp(picture: &RgbPicture) -> Vec<u8> {
    let row_bytes = picture.width as usize * 3;
    let mut file = b"BM\0\0\0\0\0\0\0\0\x36\0\0\0\x28\0\0\0".to_vec();
    file.extend(picture.width.to_le_bytes());
    file.extend((-(picture.height as i32)).to_le_bytes());
    file.extend([1, 0, 24, 0]);
    file.resize(54, 0);
    for row in picture.pixels.chunks(row_bytes) {
        file.extend(row.chunks(3).flat_map(|pixel| [pixel[2], pixel[1], pixel[0]]));
        file.resize(file.len() + row_bytes.next_multiple_of(4) - row_bytes, 0);
    }
    file
}

/// The patches of a grid one after the other, each channel, y, x: the layout of the convolution's weight.
fn patches(grid: &PatchGrid) -> Vec<u8> {
    let mut patches = Vec::new();
    for (row, col) in (0..grid.rows).flat_map(|row| (0..grid.cols).map(move |col| (row, col))) {
        for (channel, y) in (0..3).flat_map(|channel| (0..PATCH).map(move |y| (channel, y))) {
            let first = (row * PATCH + y) * grid.cols * PATCH + col * PATCH;
            patches.extend((0..PATCH).map(|x| grid.pixels[(first + x) * 3 + channel]));
        }
    }
    patches
}

/// Patch bytes as the model sees them: f32 in the order of `pixels`.
fn normalized(pixels: &[u8], table: &[f32]) -> Vec<u8> {
    let plane = PATCH * PATCH;
    pixels.iter().enumerate().flat_map(|(at, &value)| table[at / plane % 3 * 256 + usize::from(value)].to_le_bytes()).collect()
}

#[test]
fn grids_equal_the_reference_bit_for_bit() {
    let table = Normalization::default().table();
    for case in golden_json::<Golden>("resize.json").cases {
        let label = format!("{} x {} split {} to {}/{}", case.width, case.height, case.split, case.longest_edge, case.shortest_edge);
        let options = PreprocessOptions { split: case.split, longest_edge: case.longest_edge, shortest_edge: case.shortest_edge };
        let picture = generated(case.width, case.height);

        let whole = case.grids.last().unwrap();
        let size = output_size(case.width, case.height, &options);
        assert_eq!(size, (whole.width, whole.height), "{label}");
        let resized = resize_bilinear(picture.view(), size.0, size.1);
        assert_eq!(digest(&resized.pixels), whole.resized, "{label}: resized pixels");

        let grids = preprocess(&bmp(&picture), &options, PATCH, &ImageLimits::default()).unwrap();
        assert_eq!(grids.len(), case.grids.len(), "{label}");
        for (index, (grid, expected)) in grids.iter().zip(&case.grids).enumerate() {
            assert_eq!((grid.width, grid.height), (expected.width, expected.height), "{label}: grid {index}");
            assert_eq!((grid.cols, grid.rows), (grid.width as usize / PATCH, grid.height as usize / PATCH), "{label}: grid {index}");
            let patches = patches(grid);
            assert_eq!(digest(&patches), expected.patches, "{label}: patches of grid {index}");
            assert_eq!(digest(&normalized(&patches, &table)), expected.pixel_values, "{label}: values of grid {index}");
        }
    }
}

#[test]
fn split_image_yields_five_grids_with_the_whole_last() {
    let options = PreprocessOptions { split: true, ..PreprocessOptions::default() };
    let picture = generated(900, 500);
    let grids = preprocess(&bmp(&picture), &options, PATCH, &ImageLimits::default()).unwrap();
    let sizes: Vec<_> = grids.iter().map(|grid| (grid.width, grid.height)).collect();
    assert_eq!(sizes, [(450, 378), (450, 378), (450, 378), (450, 378), (900, 500)]);
    let whole = preprocess(&bmp(&picture), &PreprocessOptions::default(), PATCH, &ImageLimits::default()).unwrap();
    assert_eq!(grids.last(), whole.first());
}

#[test]
fn tables_equal_the_reference_bit_for_bit() {
    for golden in golden_json::<Golden>("resize.json").normalizations {
        let normalization = Normalization { rescale_factor: golden.rescale_factor, mean: golden.mean, std: golden.std };
        let table: Vec<u8> = normalization.table().into_iter().flat_map(f32::to_le_bytes).collect();
        assert_eq!(digest(&table), golden.table, "{normalization:?}");
    }
}

#[test]
fn position_ids_equal_the_reference_for_every_count() {
    for (side, counts) in golden_json::<BTreeMap<String, Vec<Vec<i32>>>>("positions.json") {
        let side: usize = side.parse().unwrap();
        assert_eq!(counts.len(), side);
        for rows in &counts {
            for cols in [&counts[0], &counts[side / 3], &counts[side - 1], rows] {
                let expected: Vec<i32> = rows.iter().flat_map(|row| cols.iter().map(move |col| row * side as i32 + col)).collect();
                assert_eq!(position_ids(rows.len(), cols.len(), side), expected, "{} x {} of {side}", rows.len(), cols.len());
            }
        }
    }
}

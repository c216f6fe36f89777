//! Weights and pictures by formula: the twin of `golden/synthetic.py`, which explains it.

use image::RgbImage;
use serde::Deserialize;

/// One weight of the random checkpoint: `(centre + k) * 2^exponent`, `k` a hash from `-spread` to `spread`.
#[derive(Clone, Debug, Deserialize)]
pub struct TensorSpec {
    /// Key in the checkpoint.
    pub name: String,
    /// Sizes, outermost first.
    pub shape: Vec<usize>,
    centre: i64,
    spread: i64,
    exponent: i32,
    zero_rows: Vec<usize>,
}

impl TensorSpec {
    /// The elements, row-major; each is exact in bf16, f16 and f32.
    pub fn values(&self) -> Vec<f32> {
        let seed = fnv1a(self.name.as_bytes());
        let (range, scale) = (2 * self.spread as u64 + 1, 2f64.powi(self.exponent));
        let count: usize = self.shape.iter().product();
        let mut values: Vec<f32> = (0..count as u64)
            .map(|index| {
                let k = ((hash(seed, index) >> 32) % range) as i64 - self.spread;
                ((self.centre + k) as f64 * scale) as f32
            })
            .collect();
        let row_len = count / self.shape[0];
        for row in &self.zero_rows {
            values[row * row_len..(row + 1) * row_len].fill(0.0);
        }
        values
    }
}

/// Tiles of random colour under a gradient, with noise in the low bits.
pub fn picture(seed: u32, width: u32, height: u32) -> RgbImage {
    let (tiles, noises) = (fnv1a(format!("tiles {seed}").as_bytes()), fnv1a(format!("noise {seed}").as_bytes()));
    RgbImage::from_fn(width, height, |x, y| {
        image::Rgb([0u64, 1, 2].map(|c| {
            let (x, y, width, height) = (u64::from(x), u64::from(y), u64::from(width), u64::from(height));
            let tile = hash(tiles, ((y / 37) * 1024 + x / 53) * 3 + c) >> 56;
            let noise = hash(noises, (y * width + x) * 3 + c) >> 60;
            let ramp = (x * (c + 1) * 96 / width + y * (3 - c) * 48 / height) % 128;
            ((tile / 2 + ramp) / 2 * 2 % 240 + noise) as u8
        }))
    })
}

/// Sum of (index + 1) x value modulo 2^64, in hexadecimal: tells a generator that differs from an answer that does.
pub fn checksum(values: impl IntoIterator<Item = u64>) -> String {
    let sum = values.into_iter().zip(1u64..).fold(0u64, |sum, (value, index)| sum.wrapping_add(value.wrapping_mul(index)));
    format!("{sum:016x}")
}

fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xCBF2_9CE4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01B3))
}

/// splitmix64.
fn hash(seed: u64, index: u64) -> u64 {
    let mut z = seed.wrapping_add((index + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

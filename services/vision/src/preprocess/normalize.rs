//! Rescaling and normalising of 8-bit pixels, as a table of all values that there are.

use idefics_common::checkpoint::PreprocessorConfig;

/// The last two steps of the image processor, from `preprocessor_config.json`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Normalization {
    /// Multiplies the 8-bit value.
    pub rescale_factor: f64,
    /// Subtracted per channel, after rescaling.
    pub mean: [f64; 3],
    /// Divides per channel, after the mean.
    pub std: [f64; 3],
}

impl Default for Normalization {
    /// The values of `idefics2-8b`: 0..255 to -1..1.
    fn default() -> Self {
        Self { rescale_factor: 1.0 / 255.0, mean: [0.5; 3], std: [0.5; 3] }
    }
}

impl From<&PreprocessorConfig> for Normalization {
    fn from(config: &PreprocessorConfig) -> Self {
        Self { rescale_factor: config.rescale_factor, mean: config.image_mean, std: config.image_std }
    }
}

impl Normalization {
    /// The float for each 8-bit value: `[3, 256]` f32, channel-major.
    ///
    /// Rounds where the reference rounds: the product in f64, then to f32, then the mean and the division in f32.
    #[must_use]
    pub fn table(&self) -> Vec<f32> {
        let channels = self.mean.iter().zip(&self.std);
        channels
            .flat_map(|(&mean, &std)| {
                (0..=u8::MAX).map(move |value| ((f64::from(value) * self.rescale_factor) as f32 - mean as f32) / std as f32)
            })
            .collect()
    }
}

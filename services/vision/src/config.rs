//! Section `vision` of the configuration.

use idefics_common::{channel::ChannelConfig, config::Validate};
use serde::{Deserialize, Serialize};

/// How the vision role works.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Decoders that image tokens may be shipped to: URIs such as `http://decoder-0:50053`, or `http://*.decoder:50053` for
    /// every host of a domain. Nothing else is ever connected to.
    pub allowed_decoders: Vec<String>,
    /// How decoders are connected to.
    pub channel: ChannelConfig,
    /// Longest time for a decoder to acknowledge tokens.
    pub ship_timeout_ms: u64,
    /// Most patches in one forward pass; raised to those of one largest sub-image where it is less. Memory grows with it.
    pub max_batch_patches: usize,
    /// Pictures that may wait for the engine; more are refused.
    pub max_queued_images: usize,
    /// Pictures decoded and resized at once; 0 means one per processor.
    pub preprocess_threads: usize,
    /// Largest encoded picture.
    pub max_image_bytes: usize,
    /// Most pixels that a picture's header may announce.
    pub max_image_pixels: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            allowed_decoders: Vec::new(),
            channel: ChannelConfig::default(),
            ship_timeout_ms: 30_000,
            max_batch_patches: 4_900,
            max_queued_images: 256,
            preprocess_threads: 0,
            max_image_bytes: 20 << 20,
            max_image_pixels: 64_000_000,
        }
    }
}

impl Validate for Config {
    fn problems(&self, problems: &mut Vec<String>) {
        for (key, value) in [
            ("max_batch_patches", self.max_batch_patches),
            ("max_queued_images", self.max_queued_images),
            ("max_image_bytes", self.max_image_bytes),
            ("max_image_pixels", self.max_image_pixels as usize),
            ("ship_timeout_ms", self.ship_timeout_ms as usize),
        ] {
            if value == 0 {
                problems.push(format!("vision.{key} is 0, expected 1 or more"));
            }
        }
        for uri in &self.allowed_decoders {
            if !uri.starts_with("http://") {
                problems.push(format!("vision.allowed_decoders has {uri:?}, expected a URI such as http://decoder-0:50053"));
            }
        }
    }
}

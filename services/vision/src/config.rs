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
    /// Pictures that may be on their way to the end of their last forward pass; more are refused at once. Calls for the same
    /// picture at the same time count once, calls that the cache answers not at all.
    pub max_queued_images: usize,
    /// Of those, pictures that may hold patches: being preprocessed, waiting for the engine, or in a pass. The others hold no
    /// more than their encoded bytes. Bounds memory: a picture's patches take at most 15 x longest edge^2 bytes split and
    /// 3 x longest edge^2 whole, 14.4 MB and 2.9 MB at 980 pixels; so 32 take at most 461 MB.
    pub max_preprocessed_images: usize,
    /// Bytes of image tokens that are kept for calls to come, least recently used first out; 0 keeps none. A picture's take
    /// sub-images x tokens per image x hidden size x 2 bytes in half precision: 0.5 MB whole and 2.6 MB split for idefics2-8b.
    pub output_cache_bytes: usize,
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
            max_preprocessed_images: 32,
            output_cache_bytes: 256 << 20,
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
            ("max_preprocessed_images", self.max_preprocessed_images),
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

//! The vision role: image bytes in, pooled image tokens out, shipped straight to a decoder.
//!
//! A request goes through [`service`] (checks), the encoder (tokens that are there or on their way are not computed again),
//! [`preprocess`] (decode, split, resize, cut; blocking threads), [`engine`] (one thread that owns the device and runs [`model`])
//! and on to the decoder's `PutImageTokens`.
#![forbid(unsafe_code)]

pub mod config;
mod encoder;
pub mod engine;
mod flights;
mod metrics;
pub mod model;
pub mod model_runner;
mod output_cache;
pub mod preprocess;
pub mod service;
mod ship;

pub use config::Config;
pub use engine::{Engine, EngineError, EngineOptions, EngineStats};
pub use service::{SERVICE_NAME, Vision};
pub use ship::IN_PROCESS;

//! The vision role: image bytes in, pooled image tokens out, shipped straight to a decoder.
//!
//! A request goes through [`service`] (checks), [`preprocess`] (decode, split, resize, cut; blocking threads), [`engine`] (one
//! thread that owns the device and runs [`model`]) and on to the decoder's `PutImageTokens`.
#![forbid(unsafe_code)]

pub mod config;
pub mod engine;
pub mod model;
pub mod preprocess;
pub mod service;
mod ship;

pub use config::Config;
pub use engine::{Engine, EngineError, EngineOptions};
pub use service::{SERVICE_NAME, Vision};
pub use ship::IN_PROCESS;

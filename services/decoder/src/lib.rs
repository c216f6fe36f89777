//! The decoder role: token ids and image tokens in, a stream of generated tokens out.
//!
//! A request goes through [`service`] (checks, admission, [`image_store`]) into [`engine`], whose thread runs
//! [`scheduler`] → [`model_runner`] → [`sampler`] step by step.
#![forbid(unsafe_code)]

pub mod block_manager;
pub mod config;
mod drawing;
pub mod engine;
pub mod image_store;
mod inputs;
mod metrics;
pub mod model;
pub mod model_runner;
pub mod prompt_lookup;
pub mod sampler;
pub mod scheduler;
mod scoring;
pub mod sequence;
pub mod service;

pub use config::Config;
pub use engine::{Engine, EngineOptions};
pub use service::{Decoder, SERVICE_NAME};

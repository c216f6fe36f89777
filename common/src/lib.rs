//! What every service needs and no model knows: configuration, logs, serving, channels, statuses, the checkpoint's files.
#![forbid(unsafe_code)]

pub mod channel;
pub mod checkpoint;
pub mod config;
pub mod engine_thread;
mod infrastructure;
mod listen;
pub mod metrics;
pub mod serve;
pub mod status;
pub mod telemetry;

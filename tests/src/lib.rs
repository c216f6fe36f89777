//! What the integration tests share: the binary under test as processes, checkpoints and pictures made by formula, the
//! reference values in `golden/`, and a small client.
#![forbid(unsafe_code)]

pub mod checkpoint;
pub mod client;
pub mod golden;
pub mod process;
pub mod synthetic;

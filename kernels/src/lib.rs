//! The compute seam: one trait of fused ops, the tensors that it works on, and its backends.
//!
//! Models are written once against [`Backend`]; which backend runs them is decided when an engine starts.
//! This crate knows neither async runtimes nor gRPC.

mod backend;
pub mod check;
mod composed;
pub mod cpu;
pub mod cuda;
mod error;
mod loader;
mod tensor;
mod transfer;
pub mod weights;

pub use backend::{
    AttentionShape, Backend, Draws, Epilogue, GraphKey, KvCache, PagedAttention, Pictures, RmsNorm, Rope, SwigluScratch, VarlenAttention,
};
pub use error::{Error, Result};
pub use loader::WeightLoader;
pub use tensor::{Columns, DType, Element, Matrix, Tensor};
pub use transfer::{Download, Upload, Values};

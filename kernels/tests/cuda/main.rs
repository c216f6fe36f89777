//! Every op of the CUDA backend against references in f64, on a card or on its host emulation (`just kernels`).
//!
//! Inputs are rounded to bf16 first, so that only the op's own errors count. bf16 keeps 8 bits, so that rounding a result to nearest costs
//! at most 2^-8 of it.

mod attention;
mod cache;
#[path = "../common/mod.rs"]
mod common;
mod elementwise;
mod fused;
mod linear;
mod norm;
mod overlap;
mod paged_attention;
mod rope;
mod rows;
mod sample;
mod support;
mod transfer;

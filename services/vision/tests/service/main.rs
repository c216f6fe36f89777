//! The vision role called in process, with a tiny random checkpoint on the CPU and a decoder that only takes notes.

mod batching;
mod cancellation;
mod checkpoint;
mod fake_decoder;
mod role;
mod sharing;

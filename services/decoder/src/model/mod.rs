//! The language model.

mod mistral;

pub use mistral::{ImageRows, Mistral, StepInputs, Workspace};

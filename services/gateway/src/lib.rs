//! The gateway role: the public face of idefics-serve.
//!
//! A request is let in (`admission`), checked (`validate`), laid out (`template`), tokenized (`prompt`, `tokenizer`), its pictures
//! are named (`media`); then it goes to the peers (`coordinator`, `replicas`), and their tokens come back as text (`relay`,
//! `detokenize`).
#![forbid(unsafe_code)]

mod admission;
mod call;
mod config;
mod coordinator;
mod detokenize;
mod events;
mod failure;
mod media;
mod metrics;
mod prompt;
mod relay;
mod replicas;
mod service;
mod template;
#[cfg(test)]
mod testing;
mod tokenizer;
mod validate;

pub use admission::AdmissionServer;
pub use config::GatewayConfig;
pub use replicas::{Peer, Peers};
pub use service::{Gateway, SERVICE_NAME};

/// Why a gateway cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum GatewayError {
    /// The tokenizer cannot serve this model.
    #[error("checkpoint {checkpoint}: tokenizer.json: {what}")]
    Tokenizer {
        /// Name of the checkpoint.
        checkpoint: String,
        /// What was expected and what was found.
        what: String,
    },
    /// The weights are there but cannot be read.
    #[error(transparent)]
    Checkpoint(#[from] idefics_common::checkpoint::CheckpointError),
    /// The chat template cannot be compiled.
    #[error("checkpoint {checkpoint}: chat template: {what}")]
    Template {
        /// Name of the checkpoint.
        checkpoint: String,
        /// What is wrong with it.
        what: String,
    },
}

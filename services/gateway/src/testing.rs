//! The demo checkpoint for unit tests.

use idefics_common::checkpoint::{Checkpoint, Source};
use std::path::Path;

pub(crate) fn checkpoint() -> Checkpoint {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../idefics/demo/checkpoint");
    Checkpoint::open(Source::Folder(folder)).unwrap()
}

/// The demo checkpoint with another `tokenizer.json`.
pub(crate) fn edited(edit: impl FnOnce(&mut serde_json::Value)) -> Checkpoint {
    let mut checkpoint = checkpoint();
    let mut json = serde_json::from_slice(&checkpoint.tokenizer_json).unwrap();
    edit(&mut json);
    checkpoint.tokenizer_json = serde_json::to_vec(&json).unwrap().into();
    checkpoint
}

/// The demo checkpoint with another chat template.
pub(crate) fn with_template(template: &str) -> Checkpoint {
    Checkpoint { chat_template: Some(template.to_owned()), ..checkpoint() }
}

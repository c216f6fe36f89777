//! The demo checkpoint, part of the binary.

use idefics_common::checkpoint::{EmbeddedFile, Source};
use std::path::Path;

macro_rules! demo_files {
    ($($name:literal),+ $(,)?) => {
        &[$(EmbeddedFile { name: $name, bytes: include_bytes!(concat!("../demo/checkpoint/", $name)) }),+]
    };
}

/// Name under which the demo checkpoint is served.
pub(crate) const NAME: &str = "idefics2-demo";

const FILES: &[EmbeddedFile] = demo_files![
    "chat_template.json",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
];

/// The checkpoint in `folder`, or the demo.
pub(crate) fn source(folder: Option<&Path>) -> Source {
    folder.map_or(Source::Embedded { name: NAME, files: FILES }, |folder| Source::Folder(folder.to_owned()))
}

/// The demo's weights.
pub(crate) fn weights() -> &'static [u8] {
    FILES.iter().find(|file| file.name == "model.safetensors").map_or(&[], |file| file.bytes)
}

//! The image path against the reference, and against strangers.
//!
//! Expected values come from tests/golden/preprocess, whose README tells how they were made.

mod decode;
mod hostile;
mod reference;

use std::path::PathBuf;

use serde::de::DeserializeOwned;

/// Where the golden data lies.
fn golden() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/preprocess")
}

/// One of its JSON files.
fn golden_json<T: DeserializeOwned>(name: &str) -> T {
    let text = std::fs::read_to_string(golden().join(name)).unwrap();
    serde_json::from_str(&text).unwrap()
}

/// All files in it, by name in order.
fn golden_files() -> Vec<(String, Vec<u8>)> {
    let entries = std::fs::read_dir(golden().join("files")).unwrap().map(|entry| entry.unwrap());
    let mut files: Vec<_> = entries.map(|entry| (entry.file_name().into_string().unwrap(), std::fs::read(entry.path()).unwrap())).collect();
    files.sort();
    files
}

/// The hash that the golden data uses.
fn digest(bytes: &[u8]) -> String {
    blake3::hash(bytes).to_hex().to_string()
}

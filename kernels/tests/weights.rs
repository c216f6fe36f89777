//! Checkpoints on disk: what opens, and what is refused with which words.

mod common;

use common::{Rng, encode, safetensors};
use idefics_kernels::{DType, Error, Result, weights::Weights};
use std::{fs, path::Path};

/// A file with one tensor.
fn one(name: &str, dtype: DType, shape: &[usize]) -> Vec<u8> {
    let (bytes, _) = encode(dtype, &Rng(1).units(shape.iter().product()));
    safetensors(&[(name.into(), dtype, shape.to_vec(), bytes)])
}

fn message(result: Result<Weights>) -> String {
    match result {
        Err(error @ (Error::WeightFile { .. } | Error::TensorDType { .. })) => error.to_string(),
        Err(error) => panic!("unexpected {error:?}"),
        Ok(_) => panic!("expected an error"),
    }
}

fn index(folder: &Path, entries: &[(&str, &str)]) {
    let map: Vec<String> = entries.iter().map(|(name, shard)| format!(r#""{name}":"{shard}""#)).collect();
    let text = format!(r#"{{"metadata":{{"total_size":1}},"weight_map":{{{}}}}}"#, map.join(","));
    fs::write(folder.join("model.safetensors.index.json"), text).unwrap();
}

#[test]
fn single_file_opens() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("model.safetensors"), one("a.weight", DType::Bf16, &[2, 3, 4, 5])).unwrap();
    let weights = Weights::open(folder.path()).unwrap();
    let view = weights.get("a.weight", &[2, 3, 4, 5]).unwrap();
    assert_eq!((view.rows(), view.cols(), view.dtype, view.bytes().len()), (2, 60, DType::Bf16, 240));
    assert!(matches!(weights.get("a.bias", &[2]), Err(Error::MissingTensor { name }) if name == "a.bias"));
    assert_eq!(weights.iter().count(), 1);
}

#[test]
fn shards_open_through_their_index() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("1.safetensors"), one("a", DType::F32, &[3])).unwrap();
    fs::write(folder.path().join("2.safetensors"), one("b", DType::F16, &[2, 2])).unwrap();
    index(folder.path(), &[("a", "1.safetensors"), ("b", "2.safetensors")]);
    let weights = Weights::open(folder.path()).unwrap();
    assert_eq!(weights.get("a", &[3]).unwrap().rows(), 1);
    assert_eq!(weights.get("b", &[2, 2]).unwrap().rows(), 2);
}

#[test]
fn truncated_file_is_refused_wherever_it_ends() {
    let folder = tempfile::tempdir().unwrap();
    let whole = one("a", DType::F32, &[8]);
    for len in [0, 4, 8, 20, whole.len() - 1] {
        fs::write(folder.path().join("model.safetensors"), &whole[..len]).unwrap();
        let message = message(Weights::open(folder.path()));
        assert!(message.contains("not a complete safetensors file"), "{len} bytes: {message}");
    }
}

#[test]
fn folder_without_weights_says_what_is_missing() {
    let folder = tempfile::tempdir().unwrap();
    assert!(message(Weights::open(folder.path())).contains("no model.safetensors"));
}

#[test]
fn index_that_names_a_missing_shard_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    index(folder.path(), &[("a", "gone.safetensors")]);
    let message = message(Weights::open(folder.path()));
    assert!(message.contains("gone.safetensors") && message.contains("cannot be opened"), "{message}");
}

#[test]
fn index_that_names_a_tensor_its_shard_lacks_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("1.safetensors"), one("a", DType::F32, &[3])).unwrap();
    index(folder.path(), &[("a", "1.safetensors"), ("b", "1.safetensors")]);
    assert!(message(Weights::open(folder.path())).contains("names tensor b, which its shard 1.safetensors lacks"));
}

#[test]
fn index_that_leads_out_of_the_folder_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    for shard in ["../secret", "/etc/passwd", ".."] {
        index(folder.path(), &[("a", shard)]);
        let message = message(Weights::open(folder.path()));
        assert!(message.contains("not a plain file name") || message.contains("cannot be"), "{message}");
    }
    fs::write(folder.path().join("model.safetensors.index.json"), "{").unwrap();
    assert!(message(Weights::open(folder.path())).contains("not a shard index"));
}

#[test]
fn tensors_are_asked_for_by_name_and_shape() {
    let bytes: &'static [u8] = one("a", DType::F32, &[3, 2]).leak();
    let weights = Weights::from_static("embedded", bytes).unwrap();
    assert!(matches!(weights.get("b", &[3, 2]), Err(Error::MissingTensor { name }) if name == "b"));
    let shape = weights.get("a", &[2, 3]).map(|_| ());
    assert!(matches!(shape, Err(Error::TensorShape { expected, found, .. }) if expected == [2, 3] && found == [3, 2]));
}

#[test]
fn element_types_that_are_not_served_are_named() {
    let mut bytes = one("a", DType::F32, &[2]);
    let at = bytes.windows(3).position(|window| window == b"F32").unwrap();
    bytes[at..at + 3].copy_from_slice(b"I64");
    // Twice the size of the elements: the shape that fits the bytes is half as long.
    let at = bytes.windows(3).position(|window| window == b"[2]").unwrap();
    bytes[at + 1] = b'1';
    assert!(message(Weights::from_static("embedded", bytes.leak())).contains("dtype I64"));
}

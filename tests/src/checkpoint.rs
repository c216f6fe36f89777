//! Writes the random checkpoint as a folder in the Hugging Face layout, in any of the forms that such folders take.

use crate::{golden, synthetic};
use half::{bf16, f16};
use safetensors::{Dtype, tensor::TensorView};
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};
use tempfile::TempDir;

/// Where the chat template is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TemplatePlace {
    /// `chat_template.jinja`, the template itself.
    Jinja,
    /// `chat_template.json`, under the key `chat_template`.
    Json,
    /// `tokenizer_config.json`, under the key `chat_template`.
    TokenizerConfig,
}

/// A tensor to be written.
#[derive(Clone, Debug)]
pub struct Tensor {
    /// Sizes, outermost first.
    pub shape: Vec<usize>,
    /// The elements.
    pub values: Vec<f32>,
}

/// The form of the folder; the default is one bf16 file and `chat_template.json`.
#[derive(Clone, Debug)]
pub struct Form {
    /// `BF16`, `F16` or `F32`: the values are exact in each.
    pub dtype: Dtype,
    /// Files; more than one come with an index.
    pub shards: usize,
    /// Where the chat template is.
    pub template: TemplatePlace,
}

impl Default for Form {
    fn default() -> Self {
        Self { dtype: Dtype::BF16, shards: 1, template: TemplatePlace::Json }
    }
}

/// A checkpoint in a temporary folder, gone when dropped.
pub struct Checkpoint {
    folder: TempDir,
}

impl Checkpoint {
    /// The folder.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// A file in the folder.
    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Reads a JSON file of the folder, lets `change` edit it and writes it back.
    pub fn edit_json(&self, name: &str, change: impl FnOnce(&mut Value)) {
        let mut value = read_json(&self.file(name));
        change(&mut value);
        write_json(&self.file(name), &value);
    }
}

/// The random checkpoint.
pub fn random() -> Checkpoint {
    write(&Form::default(), |_| ())
}

/// The random checkpoint in the given form, its tensors as `change` leaves them.
pub fn write(form: &Form, change: impl FnOnce(&mut BTreeMap<String, Tensor>)) -> Checkpoint {
    let mut tensors = random_tensors();
    change(&mut tensors);
    let folder = tempfile::Builder::new().prefix("idefics-random-").tempdir().expect("a temporary folder");
    let (from, to) = (golden::folder().join("random"), folder.path());
    for name in ["config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json"] {
        fs::copy(from.join(name), to.join(name)).expect("the configuration is copied");
    }
    let demo = golden::demo_checkpoint();
    fs::copy(demo.join("tokenizer.json"), to.join("tokenizer.json")).expect("the tokenizer is copied");
    write_template(&demo, to, form.template);
    write_tensors(to, form, &tensors);
    Checkpoint { folder }
}

fn random_tensors() -> BTreeMap<String, Tensor> {
    #[derive(serde::Deserialize)]
    struct Listing {
        checksum: String,
        tensors: Vec<synthetic::TensorSpec>,
    }
    let listing: Listing = golden::read("random/tensors.json");
    let mut sums = Vec::new();
    let mut tensors = BTreeMap::new();
    for spec in listing.tensors {
        let values = spec.values();
        let sum = synthetic::checksum(values.iter().map(|v| u64::from(v.to_bits())));
        sums.push(u64::from_str_radix(&sum, 16).expect("a checksum is hexadecimal"));
        tensors.insert(spec.name, Tensor { shape: spec.shape, values });
    }
    assert_eq!(synthetic::checksum(sums), listing.checksum, "the weights differ from those that the references were made with");
    tensors
}

fn write_template(demo: &Path, to: &Path, place: TemplatePlace) {
    let mut tokenizer_config = read_json(&demo.join("tokenizer_config.json"));
    let template = tokenizer_config["chat_template"].take();
    let text = template.as_str().expect("the demo's tokenizer_config.json has the template").to_owned();
    tokenizer_config.as_object_mut().expect("an object").remove("chat_template");
    match place {
        TemplatePlace::Jinja => fs::write(to.join("chat_template.jinja"), text).expect("the template is written"),
        TemplatePlace::Json => write_json(&to.join("chat_template.json"), &json!({ "chat_template": text })),
        TemplatePlace::TokenizerConfig => tokenizer_config["chat_template"] = text.into(),
    }
    write_json(&to.join("tokenizer_config.json"), &tokenizer_config);
}

fn write_tensors(to: &Path, form: &Form, tensors: &BTreeMap<String, Tensor>) {
    let bytes: BTreeMap<&str, Vec<u8>> = tensors.iter().map(|(name, t)| (name.as_str(), encode(form.dtype, &t.values))).collect();
    let file_name = |shard: usize| match form.shards {
        1 => "model.safetensors".to_owned(),
        shards => format!("model-{:05}-of-{shards:05}.safetensors", shard + 1),
    };
    let mut weight_map = BTreeMap::new();
    // Tensors are dealt out in turn, so that every layer is spread over all shards.
    for shard in 0..form.shards {
        let views = tensors.iter().skip(shard).step_by(form.shards).map(|(name, tensor)| {
            weight_map.insert(name.clone(), file_name(shard));
            let view = TensorView::new(form.dtype, tensor.shape.clone(), &bytes[name.as_str()]).expect("shape and values fit");
            (name.clone(), view)
        });
        let views: Vec<_> = views.collect();
        let metadata = Some([("format".to_owned(), "pt".to_owned())].into());
        safetensors::serialize_to_file(views, metadata, &to.join(file_name(shard))).expect("the weights are written");
    }
    if form.shards > 1 {
        let total: usize = bytes.values().map(Vec::len).sum();
        let index = json!({ "metadata": { "total_size": total }, "weight_map": weight_map });
        write_json(&to.join("model.safetensors.index.json"), &index);
    }
}

fn encode(dtype: Dtype, values: &[f32]) -> Vec<u8> {
    match dtype {
        Dtype::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        Dtype::F16 => values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect(),
        Dtype::BF16 => values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect(),
        other => panic!("checkpoints are not written in {other:?}"),
    }
}

fn read_json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))).expect("valid JSON")
}

fn write_json(path: &Path, value: &Value) {
    fs::write(path, serde_json::to_vec_pretty(value).expect("serialisable")).expect("a JSON file is written");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_and_pictures_are_those_of_the_references() {
        assert!(!random_tensors().is_empty());
        golden::Pictures::write();
    }
}

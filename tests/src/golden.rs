//! The reference values in `golden/`, and how far an answer may be from them.

use crate::{
    process::{Answer, TokenLogprobs},
    synthetic,
};
use safetensors::SafeTensors;
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::Value;
use std::{
    collections::BTreeMap,
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
};
use tempfile::TempDir;

/// Largest relative L2 distance of a sub-image's tokens from the reference, both computed in f32. The reference itself in f64
/// is 5e-6 away; another order of summation costs a few times that; the smallest wrong formula that was tried costs 5e-4.
pub const IMAGE_TOKENS_TOLERANCE: f64 = 1e-4;

/// Largest difference of a log-probability. Logits are of size 10 and f32 has 1e-6 of that; thousands of sums add up to 1e-4.
/// The cases' smallest margin between first and second token is ten times this, so that greedy tokens must be identical.
pub const LOGPROB_TOLERANCE: f64 = 1e-3;

/// `tests/golden`.
pub fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("golden")
}

/// The demo checkpoint, as it lies in the repository.
pub fn demo_checkpoint() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../services/idefics/demo/checkpoint")
}

/// A picture of the demo's cases, such as `pictures/01.png`.
pub fn demo_picture(name: &str) -> PathBuf {
    folder().join("demo").join(name)
}

/// A JSON file in `golden/`.
pub fn read<T: DeserializeOwned>(name: &str) -> T {
    let bytes = fs::read(folder().join(name)).unwrap_or_else(|e| panic!("golden/{name}: {e}"));
    serde_json::from_slice(&bytes).unwrap_or_else(|e| panic!("golden/{name}: {e}"))
}

/// How pictures are cut and resized; what is absent is the checkpoint's own.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct ImageOptions {
    split: Option<bool>,
    longest_edge: Option<u32>,
    shortest_edge: Option<u32>,
}

impl ImageOptions {
    /// As flags of `ask` and `encode`.
    pub fn flags(&self) -> Vec<String> {
        let mut flags = Vec::new();
        if let Some(split) = self.split {
            flags.push(if split { "--split" } else { "--no-split" }.to_owned());
        }
        for (flag, value) in [("--longest-edge", self.longest_edge), ("--shortest-edge", self.shortest_edge)] {
            if let Some(value) = value {
                flags.extend([flag.to_owned(), value.to_string()]);
            }
        }
        flags
    }
}

/// A case of the demo checkpoint.
#[derive(Debug, Deserialize)]
pub struct DemoCase {
    /// `[{role, content: [{type, text | path}]}]`, paths as [`demo_picture`] takes them.
    pub messages: Value,
    /// The reference's answer, without surrounding white space.
    pub text: String,
    /// The prompt.
    pub prompt_token_ids: Vec<u32>,
    /// The answer, the token that ends the turn included.
    pub token_ids: Vec<u32>,
    /// Most likely first tokens with their log-probabilities.
    pub first_top5: Vec<(u32, f64)>,
}

/// The cases of the demo checkpoint.
pub fn demo_cases() -> Vec<DemoCase> {
    #[derive(Deserialize)]
    struct File {
        cases: Vec<DemoCase>,
    }
    read::<File>("demo/cases.json").cases
}

/// A greedy answer of the demo checkpoint under penalties, bias or stop ids.
#[derive(Debug, Deserialize)]
pub struct SamplingCase {
    /// Index into [`demo_cases`], whose messages it has.
    pub case: usize,
    /// Flags of `ask`.
    pub flags: Vec<String>,
    /// The answer.
    pub token_ids: Vec<u32>,
    /// `stop` or `length`.
    pub finish_reason: String,
}

/// The cases of `demo/sampling.json`.
pub fn sampling_cases() -> Vec<SamplingCase> {
    read("demo/sampling.json")
}

/// Log-probabilities of a prompt of the demo checkpoint.
#[derive(Debug, Deserialize)]
pub struct PromptLogprobsCase {
    /// Index into [`demo_cases`], whose messages it has.
    pub case: usize,
    /// Of each token but the first.
    pub logprobs: Vec<f64>,
    /// The most likely tokens in its place.
    pub top: Vec<Vec<(u32, f64)>>,
}

/// The cases of `demo/prompt_logprobs.json`.
pub fn prompt_logprobs_cases() -> Vec<PromptLogprobsCase> {
    read("demo/prompt_logprobs.json")
}

/// A case of the random checkpoint: a conversation or a raw prompt.
#[derive(Clone, Debug, Deserialize)]
pub struct RandomCase {
    /// What it is about.
    pub name: String,
    /// The conversation, paths naming [`Pictures`]; absent for a raw prompt.
    pub messages: Option<Value>,
    /// The raw prompt, if it is one.
    pub prompt: Option<String>,
    /// Pictures of a raw prompt.
    #[serde(default)]
    pub images: Vec<String>,
    /// How pictures are cut and resized.
    pub options: ImageOptions,
    /// Most tokens to generate.
    pub max_new_tokens: u32,
    /// The prompt.
    pub prompt_token_ids: Vec<u32>,
    /// Image tokens in the prompt.
    pub image_tokens: u32,
    /// The answer.
    pub token_ids: Vec<u32>,
    /// `stop` or `length`.
    pub finish_reason: String,
    /// The answer as text.
    pub text: String,
    /// Most likely tokens of each step with their log-probabilities.
    pub top5: Vec<Vec<(u32, f64)>>,
}

/// A few more than the references hold: equals may swap places at the end of the list.
pub const LOGPROBS: [&str; 2] = ["--logprobs", "8"];

impl RandomCase {
    /// The arguments of `ask`, without where to ask. Messages are written beside the pictures.
    pub fn arguments(&self, pictures: &Pictures) -> Vec<OsString> {
        let mut flags: Vec<OsString> = self.options.flags().into_iter().map(Into::into).collect();
        flags.extend(["--max-new-tokens".into(), self.max_new_tokens.to_string().into()]);
        flags.extend(LOGPROBS.map(Into::into));
        if let Some(messages) = &self.messages {
            let file = pictures.folder().join(format!("{}.json", self.name));
            write_messages(messages, &file, |name| pictures.path(name));
            flags.extend(["--messages".into(), file.into()]);
        }
        flags.extend(self.images.iter().flat_map(|name| ["--image".into(), pictures.path(name).into()]));
        if let Some(prompt) = &self.prompt {
            flags.extend(["--raw".into(), prompt.into()]);
        }
        flags
    }
}

/// The cases of the random checkpoint.
pub fn random_cases() -> Vec<RandomCase> {
    #[derive(Deserialize)]
    struct File {
        cases: Vec<RandomCase>,
    }
    read::<File>("random/cases.json").cases
}

/// The random checkpoint's case of this name.
pub fn random_case(name: &str) -> RandomCase {
    random_cases().into_iter().find(|case| case.name == name).unwrap_or_else(|| panic!("golden/random has no case {name}"))
}

/// Pictures to encode and what comes out.
#[derive(Debug, Deserialize)]
pub struct Encode {
    /// What it is about; the tensor's name.
    pub name: String,
    /// The pictures.
    pub images: Vec<String>,
    /// How they are cut and resized.
    pub options: ImageOptions,
    /// `[sub-images x tokens per image, hidden]`.
    #[serde(skip)]
    pub image_tokens: Matrix,
}

/// The encodes of `demo` or `random`.
pub fn encodes(of: &str) -> Vec<Encode> {
    let mut encodes: Vec<Encode> = read(&format!("{of}/encodes.json"));
    let tensors = fs::read(folder().join(of).join("image_tokens.safetensors")).expect("the reference image tokens");
    for encode in &mut encodes {
        encode.image_tokens = Matrix::from_safetensors(&tensors, &encode.name);
    }
    encodes
}

/// A matrix of f32, row-major.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Matrix {
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// The elements.
    pub values: Vec<f32>,
}

impl Matrix {
    /// The f32 tensor `name` of a safetensors file.
    pub fn from_safetensors(file: &[u8], name: &str) -> Self {
        let tensors = SafeTensors::deserialize(file).expect("a safetensors file");
        let tensor = tensors.tensor(name).unwrap_or_else(|e| panic!("tensor {name}: {e}"));
        assert_eq!(tensor.dtype(), safetensors::Dtype::F32, "tensor {name}");
        let [rows, cols] = tensor.shape() else { panic!("tensor {name} has shape {:?}, not a matrix", tensor.shape()) };
        Self { rows: *rows, cols: *cols, values: bytemuck::pod_collect_to_vec(tensor.data()) }
    }

    /// The worst relative L2 distance between stretches of `rows` rows, which are sub-images.
    ///
    /// # Panics
    /// If the shapes differ.
    pub fn distance(&self, reference: &Self, rows: usize) -> f64 {
        assert_eq!((self.rows, self.cols), (reference.rows, reference.cols), "shape of the image tokens");
        let stretch = rows * self.cols;
        let distances = self.values.chunks(stretch).zip(reference.values.chunks(stretch)).map(|(ours, theirs)| {
            let square = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
            let off = square(&mut ours.iter().zip(theirs).map(|(a, b)| f64::from(*a) - f64::from(*b)));
            off / square(&mut theirs.iter().map(|v| f64::from(*v)))
        });
        // A NaN must not pass for small.
        distances.fold(0.0, |worst, d| if d.is_nan() || d > worst { d } else { worst })
    }
}

/// The random checkpoint's pictures as PNG files in a temporary folder, gone when dropped.
pub struct Pictures {
    folder: TempDir,
}

impl Pictures {
    /// Draws and writes all of them.
    pub fn write() -> Self {
        #[derive(Deserialize)]
        struct Picture {
            seed: u32,
            width: u32,
            height: u32,
            checksum: String,
        }
        #[derive(Deserialize)]
        struct File {
            pictures: BTreeMap<String, Picture>,
        }
        let folder = tempfile::Builder::new().prefix("idefics-pictures-").tempdir().expect("a temporary folder");
        for (name, p) in read::<File>("random/cases.json").pictures {
            let drawn = synthetic::picture(p.seed, p.width, p.height);
            let sum = synthetic::checksum(drawn.iter().map(|v| u64::from(*v)));
            assert_eq!(sum, p.checksum, "picture {name} differs from the one that the references were made with");
            drawn.save(folder.path().join(format!("{name}.png"))).expect("a picture is written");
        }
        Self { folder }
    }

    /// The file of a picture.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(format!("{name}.png"))
    }

    /// The folder, for files of the test's own.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }
}

/// Writes a conversation for `--messages`, every picture's path replaced by what `locate` makes of it.
pub fn write_messages(messages: &Value, to: &Path, locate: impl Fn(&str) -> PathBuf) {
    let mut messages = messages.clone();
    for message in messages.as_array_mut().expect("a list of messages") {
        for part in message["content"].as_array_mut().expect("a list of parts") {
            if let Some(path) = part.get("path").and_then(Value::as_str) {
                part["path"] = locate(path).to_str().expect("a UTF-8 path").into();
            }
        }
    }
    fs::write(to, serde_json::to_vec(&messages).expect("serialisable")).expect("the messages are written");
}

/// The largest difference between the log-probabilities of an answer and the reference's most likely tokens.
///
/// # Panics
/// If a step or one of the tokens is missing; ask for a few more tokens than the reference has, as equals may swap places.
pub fn logprob_difference(answer: &Answer, reference: &[Vec<(u32, f64)>]) -> f64 {
    let steps = reference.iter().enumerate().map(|(step, expected)| {
        let found = answer.logprobs.get(step).unwrap_or_else(|| panic!("no log-probabilities at step {step}"));
        let chosen = found.top.iter().find(|top| top.token_id == found.token_id).expect("the greedy token is among the most likely");
        assert!((chosen.logprob - found.logprob).abs() < 1e-6, "step {step} has two log-probabilities for the generated token");
        top_difference(found, expected)
    });
    steps.fold(0.0, f64::max)
}

/// The largest difference between the log-probabilities of a prompt and the reference's, of its tokens and of the most likely.
///
/// # Panics
/// As [`logprob_difference`], or if the answer has other tokens than the prompt.
pub fn prompt_logprob_difference(answer: &Answer, reference: &PromptLogprobsCase) -> f64 {
    let (first, rest) = answer.prompt_logprobs.split_first().expect("one for each token of the prompt");
    assert!(first.is_none(), "nothing foretells the first token");
    let ids: Vec<u32> = rest.iter().flatten().map(|found| found.token_id).collect();
    assert_eq!(ids, answer.prompt_token_ids[1..]);
    assert_eq!(ids.len(), reference.logprobs.len());
    let places = rest.iter().flatten().zip(reference.logprobs.iter().zip(&reference.top));
    places.map(|(found, (own, top))| top_difference(found, top).max(number(found.logprob - own).abs())).fold(0.0, f64::max)
}

fn top_difference(found: &TokenLogprobs, expected: &[(u32, f64)]) -> f64 {
    let differences = expected.iter().map(|(token_id, logprob)| {
        let top = found.top.iter().find(|top| top.token_id == *token_id);
        let top = top.unwrap_or_else(|| panic!("token {token_id} is not among the most likely: {found:?}"));
        number(top.logprob - logprob).abs()
    });
    differences.fold(0.0, f64::max)
}

/// `f64::max` would pass over a NaN.
fn number(value: f64) -> f64 {
    assert!(!value.is_nan(), "a log-probability is not a number");
    value
}

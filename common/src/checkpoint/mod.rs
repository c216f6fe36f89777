//! A checkpoint in the Hugging Face layout of `HuggingFaceM4/idefics2-8b`: its configuration files, and where its weights are.

mod files;
mod model_config;
mod processor;

pub use files::{EmbeddedFile, Source};
pub use model_config::{ModelConfig, PerceiverConfig, TextConfig, VisionConfig};
pub use processor::{GenerationConfig, ImageDefaults, PreprocessorConfig};

use serde::de::DeserializeOwned;
use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

/// Ends every turn of a conversation.
pub const END_OF_UTTERANCE: &str = "<end_of_utterance>";
/// Stands before and after the tokens of every (sub-)image.
pub const FAKE_TOKEN_AROUND_IMAGE: &str = "<fake_token_around_image>";
/// Stands where an image token goes.
pub const IMAGE: &str = "<image>";

/// Why a checkpoint is refused.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// A file that must be there is not, or cannot be read.
    #[error("checkpoint {checkpoint}: {file} cannot be read: {reason}; expected a folder in the layout of HuggingFaceM4/idefics2-8b")]
    File {
        /// The folder.
        checkpoint: String,
        /// The file in it.
        file: String,
        /// What the system says.
        reason: String,
    },
    /// A file is not what it should be.
    #[error("checkpoint {checkpoint}: {file}: {what}")]
    Content {
        /// The folder.
        checkpoint: String,
        /// The file in it.
        file: String,
        /// What was expected and what was found.
        what: String,
    },
}

/// The parsed files of a checkpoint. Weights stay on disk until a role maps them from [`Checkpoint::source`].
#[derive(Clone)]
pub struct Checkpoint {
    /// Where the files are.
    pub source: Source,
    /// `config.json`, class defaults filled in.
    pub config: ModelConfig,
    /// `generation_config.json`; empty if there is none.
    pub generation: GenerationConfig,
    /// `preprocessor_config.json`.
    pub preprocessor: PreprocessorConfig,
    /// The template's text, from `chat_template.jinja`, `chat_template.json` or `tokenizer_config.json`, in this order. Base
    /// checkpoints have none.
    pub chat_template: Option<String>,
    /// `tokenizer.json`.
    pub tokenizer_json: Arc<[u8]>,
    /// The special tokens of `tokenizer.json` by their text.
    pub added_tokens: BTreeMap<String, u32>,
    /// `bos_token` of `tokenizer_config.json`, `<s>` unless given.
    pub bos_token: String,
    /// Hash, in 64 hexadecimal digits, of each file that must be there, by its name.
    pub file_hashes: BTreeMap<&'static str, String>,
}

impl Checkpoint {
    /// Reads and checks every configuration file.
    ///
    /// # Errors
    /// [`CheckpointError`] naming the file, what was expected and what was found.
    pub fn open(source: Source) -> Result<Self, CheckpointError> {
        let mut file_hashes = BTreeMap::new();
        for file in ["config.json", "preprocessor_config.json", "tokenizer.json"] {
            let bytes = source.read(file)?.ok_or_else(|| source.missing(file))?;
            file_hashes.insert(file, blake3::hash(&bytes).to_hex().to_string());
        }
        let config: ModelConfig = json(&source, "config.json")?.ok_or_else(|| source.missing("config.json"))?;
        config.validate().map_err(|what| source.content("config.json", what))?;
        let preprocessor: PreprocessorConfig =
            json(&source, "preprocessor_config.json")?.ok_or_else(|| source.missing("preprocessor_config.json"))?;
        preprocessor.validate(&config.vision_config).map_err(|what| source.content("preprocessor_config.json", what))?;
        let image_seq_len = json::<processor::ProcessorConfig>(&source, "processor_config.json")?.and_then(|c| c.image_seq_len);
        if let Some(found) = image_seq_len.filter(|n| *n != config.perceiver_config.resampler_n_latents) {
            let expected = config.perceiver_config.resampler_n_latents;
            let what = format!("image_seq_len is {found}, expected {expected}, the resampler_n_latents of config.json");
            return Err(source.content("processor_config.json", what));
        }
        let tokenizer_config: processor::TokenizerConfig = json(&source, "tokenizer_config.json")?.unwrap_or_default();
        let bos_token = tokenizer_config.bos_token.as_ref().map_or("<s>", processor::TokenText::as_str).to_owned();
        let tokenizer_json = source.read("tokenizer.json")?.ok_or_else(|| source.missing("tokenizer.json"))?;
        let tokenizer: processor::AddedTokens =
            serde_json::from_slice(&tokenizer_json).map_err(|e| source.content("tokenizer.json", format!("not the expected JSON: {e}")))?;
        Ok(Self {
            chat_template: chat_template(&source, tokenizer_config)?,
            generation: json(&source, "generation_config.json")?.unwrap_or_default(),
            tokenizer_json: tokenizer_json.into(),
            added_tokens: tokenizer.into_ids(),
            source,
            config,
            preprocessor,
            bos_token,
            file_hashes,
        })
    }

    /// The last part of the folder's name, or the name under which the checkpoint is embedded.
    pub fn name(&self) -> String {
        self.source.name()
    }

    /// Rows of image tokens per sub-image.
    pub fn tokens_per_image(&self) -> usize {
        self.config.perceiver_config.resampler_n_latents
    }

    /// Ids that end generation: those of `generation_config.json` (`</s>` if it names none) and `<end_of_utterance>`.
    pub fn stop_token_ids(&self) -> Vec<u32> {
        let mut ids = self.generation.eos_token_ids().to_vec();
        ids.extend(self.added_tokens.get(END_OF_UTTERANCE));
        if self.generation.eos_token_ids().is_empty() {
            ids.extend(self.added_tokens.get("</s>"));
        }
        ids.sort_unstable();
        ids.dedup();
        ids
    }

    /// Ids that are never generated: `<image>` and `<fake_token_around_image>`.
    pub fn banned_token_ids(&self) -> Vec<u32> {
        let fake = self.added_tokens.get(FAKE_TOKEN_AROUND_IMAGE).copied();
        [Some(self.config.image_token_id), fake].into_iter().flatten().collect()
    }

    /// The hashes of some of the files, as a role reports them.
    pub fn hashes_of(&self, files: &[&str]) -> HashMap<String, String> {
        let hashes = self.file_hashes.iter().filter(|(file, _)| files.contains(*file));
        hashes.map(|(file, hash)| ((*file).to_owned(), hash.clone())).collect()
    }

    /// Whether the weights are there, all of them, so that [`fingerprint`](Self::fingerprint) is that of the model.
    pub fn has_weights(&self) -> bool {
        files::has_weights(&self.source)
    }

    /// Hash, in 64 hexadecimal digits, of `config.json`, `preprocessor_config.json` and the weights: each weight file's length and header, and 4 KiB at
    /// 64 places spread over it. Two checkpoints with the same fingerprint compute the same image tokens.
    ///
    /// # Errors
    /// If a file cannot be read.
    pub fn fingerprint(&self) -> Result<String, CheckpointError> {
        files::fingerprint(&self.source)
    }
}

fn json<T: DeserializeOwned>(source: &Source, file: &str) -> Result<Option<T>, CheckpointError> {
    let Some(bytes) = source.read(file)? else { return Ok(None) };
    serde_json::from_slice(&bytes).map(Some).map_err(|e| source.content(file, format!("not the expected JSON: {e}")))
}

fn chat_template(source: &Source, tokenizer_config: processor::TokenizerConfig) -> Result<Option<String>, CheckpointError> {
    if let Some(bytes) = source.read("chat_template.jinja")? {
        let text = String::from_utf8(bytes).map_err(|_| source.content("chat_template.jinja", "not UTF-8".into()))?;
        return Ok(Some(text));
    }
    let separate: Option<processor::ChatTemplateFile> = json(source, "chat_template.json")?;
    Ok(separate.map(|file| file.chat_template).or(tokenizer_config.chat_template).and_then(processor::ChatTemplate::into_default))
}

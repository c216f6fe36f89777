//! The small files beside `config.json`: preprocessing, generation, tokenizer.

use super::VisionConfig;
use serde::Deserialize;
use std::collections::BTreeMap;

/// `preprocessor_config.json`; defaults are those of `Idefics2ImageProcessor` of `transformers` 4.57.6.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default)]
pub struct PreprocessorConfig {
    /// Whether pictures are split unless a request says otherwise.
    pub do_image_splitting: bool,
    /// Mean per colour, subtracted after rescaling.
    pub image_mean: [f64; 3],
    /// Standard deviation per colour.
    pub image_std: [f64; 3],
    /// Factor from 8-bit values.
    pub rescale_factor: f64,
    /// PIL's number of the resampling filter; only 2, bilinear, is served.
    pub resample: u32,
    /// Edges after resizing.
    pub size: ImageDefaults,
}

/// `size` of `preprocessor_config.json`, in pixels.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
pub struct ImageDefaults {
    /// The longer edge is scaled down to at most this.
    pub longest_edge: u32,
    /// Each edge is scaled up to at least this.
    pub shortest_edge: u32,
}

impl Default for PreprocessorConfig {
    fn default() -> Self {
        Self {
            do_image_splitting: false,
            image_mean: [0.5; 3],
            image_std: [0.5; 3],
            rescale_factor: 1.0 / 255.0,
            resample: 2,
            size: ImageDefaults { longest_edge: 980, shortest_edge: 378 },
        }
    }
}

impl PreprocessorConfig {
    /// Says what in the file cannot be served with this vision tower, the first problem only.
    pub(super) fn validate(&self, tower: &VisionConfig) -> Result<(), String> {
        let ImageDefaults { longest_edge, shortest_edge } = self.size;
        if self.resample != 2 {
            return Err(format!("resample is {}, served is 2 (bilinear)", self.resample));
        }
        let (patch_size, image_size) = (tower.patch_size, tower.image_size);
        if longest_edge as usize > image_size {
            return Err(format!(
                "size.longest_edge is {longest_edge}, expected at most {image_size}, for which the vision tower has positions; lower it or take the file that belongs to config.json, whose vision_config.image_size that is"
            ));
        }
        if (shortest_edge as usize) < patch_size {
            return Err(format!(
                "size.shortest_edge is {shortest_edge}, expected at least {patch_size}, one patch; raise it or take the file that belongs to config.json, whose vision_config.patch_size that is"
            ));
        }
        if shortest_edge > longest_edge {
            return Err(format!("size.shortest_edge is {shortest_edge}, expected at most size.longest_edge, {longest_edge}; lower it"));
        }
        if self.image_std.iter().any(|std| *std <= 0.0 || !std.is_finite()) {
            return Err(format!("image_std is {:?}, expected finite values above 0", self.image_std));
        }
        if self.image_mean.iter().chain([&self.rescale_factor]).any(|value| !value.is_finite()) {
            return Err(format!("image_mean is {:?} and rescale_factor {}, expected finite values", self.image_mean, self.rescale_factor));
        }
        Ok(())
    }
}

/// `generation_config.json`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct GenerationConfig {
    /// Ids that end generation: one or a list.
    eos_token_id: Option<OneOrMany>,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(u32),
    Many(Vec<u32>),
}

impl GenerationConfig {
    /// Ids that end generation.
    pub fn eos_token_ids(&self) -> &[u32] {
        match &self.eos_token_id {
            None => &[],
            Some(OneOrMany::One(id)) => std::slice::from_ref(id),
            Some(OneOrMany::Many(ids)) => ids,
        }
    }
}

/// `processor_config.json`.
#[derive(Deserialize)]
pub(super) struct ProcessorConfig {
    pub(super) image_seq_len: Option<usize>,
}

/// What matters of `tokenizer_config.json`.
#[derive(Default, Deserialize)]
#[serde(default)]
pub(super) struct TokenizerConfig {
    pub(super) bos_token: Option<TokenText>,
    pub(super) chat_template: Option<ChatTemplate>,
}

/// What matters of `tokenizer.json` to a role without a tokenizer.
#[derive(Deserialize)]
pub(super) struct AddedTokens {
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
}

#[derive(Deserialize)]
struct AddedToken {
    id: u32,
    content: String,
}

impl AddedTokens {
    pub(super) fn into_ids(self) -> BTreeMap<String, u32> {
        self.added_tokens.into_iter().map(|token| (token.content, token.id)).collect()
    }
}

/// A token, as a string or as the serialised `AddedToken`.
#[derive(Deserialize)]
#[serde(untagged)]
pub(super) enum TokenText {
    Plain(String),
    Added { content: String },
}

impl TokenText {
    pub(super) fn as_str(&self) -> &str {
        match self {
            Self::Plain(text) | Self::Added { content: text } => text,
        }
    }
}

/// `chat_template.json`.
#[derive(Deserialize)]
pub(super) struct ChatTemplateFile {
    pub(super) chat_template: ChatTemplate,
}

/// One template, or several by name.
#[derive(Deserialize)]
#[serde(untagged)]
pub(super) enum ChatTemplate {
    One(String),
    Named(Vec<NamedTemplate>),
}

#[derive(Deserialize)]
pub(super) struct NamedTemplate {
    name: String,
    template: String,
}

impl ChatTemplate {
    /// The only template, or the one named `default`.
    pub(super) fn into_default(self) -> Option<String> {
        match self {
            Self::One(template) => Some(template),
            Self::Named(templates) => templates.into_iter().find(|t| t.name == "default").map(|t| t.template),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is wrong with the sizes, for a tower of patches of 14 and pictures up to 980.
    fn problem(longest_edge: u32, shortest_edge: u32) -> String {
        let tower = VisionConfig { patch_size: 14, image_size: 980, ..VisionConfig::default() };
        let config = PreprocessorConfig { size: ImageDefaults { longest_edge, shortest_edge }, ..PreprocessorConfig::default() };
        config.validate(&tower).err().unwrap_or_default()
    }

    #[test]
    fn sizes_are_those_that_the_tower_takes() {
        for (longest, shortest) in [(980, 378), (980, 980), (14, 14), (980, 14)] {
            assert_eq!(problem(longest, shortest), "", "{longest} {shortest}");
        }
        for (longest, shortest, expected) in [
            (981, 378, "size.longest_edge is 981, expected at most 980"),
            (980, 13, "size.shortest_edge is 13, expected at least 14"),
            (980, 0, "size.shortest_edge is 0, expected at least 14"),
            (100, 101, "size.shortest_edge is 101, expected at most size.longest_edge, 100"),
        ] {
            assert!(problem(longest, shortest).starts_with(expected), "{}", problem(longest, shortest));
        }
    }

    #[test]
    fn normalisation_is_finite() {
        for json in [r#"{"image_std": [0.5, 0, 0.5]}"#, r#"{"image_std": [0.5, -1, 0.5]}"#] {
            let config: PreprocessorConfig = serde_json::from_str(json).unwrap();
            let tower = VisionConfig { patch_size: 14, image_size: 980, ..VisionConfig::default() };
            assert!(config.validate(&tower).unwrap_err().contains("image_std"), "{json}");
        }
    }
}

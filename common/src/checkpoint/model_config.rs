//! `config.json`. The hub's files leave out every value that equals its class default; the defaults here are those of
//! `transformers` 4.57.6 (`configuration_idefics2.py`, `configuration_mistral.py`).

use serde::Deserialize;

/// `config.json` of an Idefics2 checkpoint.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(from = "RawConfig")]
pub struct ModelConfig {
    /// `model_type`, which must be `idefics2`.
    pub model_type: String,
    /// Id of `<image>`.
    pub image_token_id: u32,
    /// Whether `lm_head` is the embedding table.
    pub tie_word_embeddings: bool,
    /// SigLIP.
    pub vision_config: VisionConfig,
    /// The resampler.
    pub perceiver_config: PerceiverConfig,
    /// Mistral.
    pub text_config: TextConfig,
    /// How the weights are quantised, if they are.
    pub quantization_method: Option<String>,
}

/// `vision_config`: the SigLIP vision tower.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default)]
pub struct VisionConfig {
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Encoder layers.
    pub num_hidden_layers: usize,
    /// Heads; the head size is `hidden_size / num_attention_heads`.
    pub num_attention_heads: usize,
    /// Colours.
    pub num_channels: usize,
    /// Longest edge in pixels.
    pub image_size: usize,
    /// Edge of a patch in pixels.
    pub patch_size: usize,
    /// Activation of the MLP.
    pub hidden_act: String,
    /// Added to the variance.
    pub layer_norm_eps: f32,
}

impl Default for VisionConfig {
    fn default() -> Self {
        Self {
            hidden_size: 768,
            intermediate_size: 3072,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            num_channels: 3,
            image_size: 224,
            patch_size: 32,
            hidden_act: "gelu_pytorch_tanh".into(),
            layer_norm_eps: 1e-6,
        }
    }
}

impl VisionConfig {
    /// Elements of one head.
    pub fn head_dim(&self) -> usize {
        self.hidden_size / self.num_attention_heads
    }

    /// Position buckets per axis.
    pub fn num_patches_per_side(&self) -> usize {
        self.image_size / self.patch_size
    }
}

/// `perceiver_config`: the resampler.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default)]
pub struct PerceiverConfig {
    /// Activation of the MLP.
    pub hidden_act: String,
    /// Width; replaced by the text model's where they differ.
    pub hidden_size: usize,
    /// Added to the mean square; replaced by the text model's where the widths differ.
    pub rms_norm_eps: f32,
    /// Image tokens per sub-image.
    pub resampler_n_latents: usize,
    /// Layers.
    pub resampler_depth: usize,
    /// Query heads.
    pub resampler_n_heads: usize,
    /// Elements of one head.
    pub resampler_head_dim: usize,
    /// Key and value heads.
    pub num_key_value_heads: usize,
}

impl Default for PerceiverConfig {
    fn default() -> Self {
        Self {
            hidden_act: "silu".into(),
            hidden_size: 4096,
            rms_norm_eps: 1e-6,
            resampler_n_latents: 64,
            resampler_depth: 3,
            resampler_n_heads: 16,
            resampler_head_dim: 96,
            num_key_value_heads: 4,
        }
    }
}

/// `text_config`: the Mistral decoder.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default)]
pub struct TextConfig {
    /// `model_type`, which must be `mistral`.
    pub model_type: String,
    /// Entries of the vocabulary.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Layers.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads.
    pub num_key_value_heads: usize,
    /// Elements of one head; absent or null means `hidden_size / num_attention_heads`.
    pub head_dim: Option<usize>,
    /// Activation of the MLP.
    pub hidden_act: String,
    /// Longest context in tokens.
    pub max_position_embeddings: usize,
    /// Added to the mean square.
    pub rms_norm_eps: f32,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// How the rotary frequencies are stretched; only null is served.
    pub rope_scaling: Option<serde_json::Value>,
    /// Positions that a position attends to, itself included; absent means 4096, null means all.
    pub sliding_window: Option<usize>,
}

impl Default for TextConfig {
    fn default() -> Self {
        Self {
            model_type: "mistral".into(),
            vocab_size: 32000,
            hidden_size: 4096,
            intermediate_size: 14336,
            num_hidden_layers: 32,
            num_attention_heads: 32,
            num_key_value_heads: 8,
            head_dim: None,
            hidden_act: "silu".into(),
            max_position_embeddings: 4096 * 32,
            rms_norm_eps: 1e-6,
            rope_theta: 10000.0,
            rope_scaling: None,
            sliding_window: Some(4096),
        }
    }
}

impl TextConfig {
    /// Elements of one head.
    pub fn head_dim(&self) -> usize {
        self.head_dim.unwrap_or(self.hidden_size / self.num_attention_heads)
    }
}

#[derive(Deserialize)]
struct RawConfig {
    #[serde(default)]
    model_type: String,
    image_token_id: Option<u32>,
    tie_word_embeddings: Option<bool>,
    vision_config: Option<VisionConfig>,
    perceiver_config: Option<PerceiverConfig>,
    text_config: Option<TextConfig>,
    quantization_config: Option<QuantizationConfig>,
}

#[derive(Deserialize)]
struct QuantizationConfig {
    quant_method: Option<String>,
}

impl From<RawConfig> for ModelConfig {
    fn from(raw: RawConfig) -> Self {
        // Idefics2Config builds the text model's configuration itself where the file has none.
        let text_config = raw.text_config.unwrap_or_else(|| TextConfig {
            max_position_embeddings: 4096 * 8,
            rms_norm_eps: 1e-5,
            ..TextConfig::default()
        });
        let mut perceiver_config = raw.perceiver_config.unwrap_or_default();
        if perceiver_config.hidden_size != text_config.hidden_size {
            perceiver_config.hidden_size = text_config.hidden_size;
            perceiver_config.rms_norm_eps = text_config.rms_norm_eps;
        }
        Self {
            model_type: raw.model_type,
            image_token_id: raw.image_token_id.unwrap_or(32001),
            tie_word_embeddings: raw.tie_word_embeddings.unwrap_or(false),
            vision_config: raw.vision_config.unwrap_or_default(),
            perceiver_config,
            text_config,
            quantization_method: raw.quantization_config.map(|q| q.quant_method.unwrap_or_else(|| "unnamed".into())),
        }
    }
}

impl ModelConfig {
    /// Says what in the configuration cannot be served, every problem at once.
    ///
    /// # Errors
    /// The problems, joined by `; `.
    pub fn validate(&self) -> Result<(), String> {
        let (vision, perceiver, text) = (&self.vision_config, &self.perceiver_config, &self.text_config);
        let mut problems = Vec::new();
        let mut expect = |right: bool, problem: String| {
            if !right {
                problems.push(problem);
            }
        };
        expect(self.model_type == "idefics2", format!("model_type is {:?}, expected \"idefics2\"", self.model_type));
        expect(text.model_type == "mistral", format!("text_config.model_type is {:?}, expected \"mistral\"", text.model_type));
        for (name, value) in [
            ("vision_config.hidden_size", vision.hidden_size),
            ("vision_config.intermediate_size", vision.intermediate_size),
            ("vision_config.num_attention_heads", vision.num_attention_heads),
            ("vision_config.patch_size", vision.patch_size),
            ("vision_config.num_channels", vision.num_channels),
            ("perceiver_config.resampler_n_latents", perceiver.resampler_n_latents),
            ("perceiver_config.resampler_n_heads", perceiver.resampler_n_heads),
            ("perceiver_config.resampler_head_dim", perceiver.resampler_head_dim),
            ("perceiver_config.num_key_value_heads", perceiver.num_key_value_heads),
            ("text_config.vocab_size", text.vocab_size),
            ("text_config.hidden_size", text.hidden_size),
            ("text_config.intermediate_size", text.intermediate_size),
            ("text_config.num_hidden_layers", text.num_hidden_layers),
            ("text_config.num_attention_heads", text.num_attention_heads),
            ("text_config.num_key_value_heads", text.num_key_value_heads),
            ("text_config.max_position_embeddings", text.max_position_embeddings),
        ] {
            expect(value > 0, format!("{name} is 0, expected 1 or more"));
        }
        expect(text.sliding_window != Some(0), "text_config.sliding_window is 0, expected 1 or more, or null".into());
        if !problems.is_empty() {
            return Err(problems.join("; "));
        }
        let mut expect = |right: bool, problem: String| {
            if !right {
                problems.push(problem);
            }
        };
        expect(vision.num_channels == 3, format!("vision_config.num_channels is {}, expected 3", vision.num_channels));
        expect(
            vision.hidden_size.is_multiple_of(vision.num_attention_heads),
            format!(
                "vision_config.hidden_size {} is not a multiple of num_attention_heads {}",
                vision.hidden_size, vision.num_attention_heads
            ),
        );
        expect(
            vision.image_size >= vision.patch_size,
            format!("vision_config.image_size {} is below patch_size {}", vision.image_size, vision.patch_size),
        );
        expect(
            perceiver.resampler_n_heads.is_multiple_of(perceiver.num_key_value_heads),
            format!(
                "perceiver_config.resampler_n_heads {} is not a multiple of num_key_value_heads {}",
                perceiver.resampler_n_heads, perceiver.num_key_value_heads
            ),
        );
        expect(
            text.num_attention_heads.is_multiple_of(text.num_key_value_heads),
            format!(
                "text_config.num_attention_heads {} is not a multiple of num_key_value_heads {}",
                text.num_attention_heads, text.num_key_value_heads
            ),
        );
        expect(
            text.head_dim().is_multiple_of(2) && text.head_dim() > 0,
            format!("text_config.head_dim is {}, expected an even number", text.head_dim()),
        );
        expect(
            (self.image_token_id as usize) < text.vocab_size,
            format!("image_token_id {} is not below vocab_size {}", self.image_token_id, text.vocab_size),
        );
        expect(
            vision.hidden_act == "gelu_pytorch_tanh",
            format!("vision_config.hidden_act is {:?}, served is \"gelu_pytorch_tanh\"", vision.hidden_act),
        );
        expect(perceiver.hidden_act == "silu", format!("perceiver_config.hidden_act is {:?}, served is \"silu\"", perceiver.hidden_act));
        expect(text.hidden_act == "silu", format!("text_config.hidden_act is {:?}, served is \"silu\"", text.hidden_act));
        expect(text.rope_scaling.is_none(), "text_config.rope_scaling is set, served is null".into());
        if let Some(method) = &self.quantization_method {
            expect(false, format!("the weights are quantised ({method}), served are bf16, f16 and f32"));
        }
        if problems.is_empty() { Ok(()) } else { Err(problems.join("; ")) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> ModelConfig {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn left_out_values_take_class_defaults() {
        let config = parse(
            r#"{"model_type": "idefics2", "text_config": {"vocab_size": 32003, "rms_norm_eps": 1e-5}, "vision_config": {"hidden_size": 1152}}"#,
        );
        let text = &config.text_config;
        assert_eq!((text.hidden_size, text.intermediate_size, text.head_dim(), text.num_key_value_heads), (4096, 14336, 128, 8));
        assert_eq!((text.sliding_window, text.rope_theta, text.rms_norm_eps), (Some(4096), 10000.0, 1e-5));
        assert_eq!((config.vision_config.layer_norm_eps, config.image_token_id), (1e-6, 32001));
        assert_eq!(config.perceiver_config, PerceiverConfig::default());
    }

    #[test]
    fn sliding_window_null_means_none() {
        assert_eq!(parse(r#"{"text_config": {"sliding_window": null}}"#).text_config.sliding_window, None);
    }

    #[test]
    fn perceiver_takes_width_and_eps_of_text_where_widths_differ() {
        let config = parse(
            r#"{"text_config": {"hidden_size": 256, "rms_norm_eps": 1e-5}, "perceiver_config": {"hidden_size": 512, "rms_norm_eps": 1e-3}}"#,
        );
        assert_eq!((config.perceiver_config.hidden_size, config.perceiver_config.rms_norm_eps), (256, 1e-5));
        let config = parse(
            r#"{"text_config": {"hidden_size": 256, "rms_norm_eps": 1e-5}, "perceiver_config": {"hidden_size": 256, "rms_norm_eps": 1e-3}}"#,
        );
        assert_eq!(config.perceiver_config.rms_norm_eps, 1e-3);
    }

    #[test]
    fn every_problem_is_reported_at_once() {
        let problems =
            parse(r#"{"model_type": "llava", "text_config": {"num_attention_heads": 0, "sliding_window": 0}}"#).validate().unwrap_err();
        for expected in ["\"llava\"", "num_attention_heads is 0", "sliding_window is 0"] {
            assert!(problems.contains(expected), "{problems}");
        }
    }

    #[test]
    fn quantised_weights_are_refused() {
        let config = parse(
            r#"{"model_type": "idefics2", "text_config": {"vocab_size": 32003}, "vision_config": {"patch_size": 14}, "quantization_config": {"quant_method": "awq"}}"#,
        );
        assert!(config.validate().unwrap_err().contains("quantised (awq)"));
    }
}

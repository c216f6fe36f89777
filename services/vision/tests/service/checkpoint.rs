//! A tiny random checkpoint, written to a folder: what vision reads of one.

use half::bf16;
use idefics_common::checkpoint::{Checkpoint, Source};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use safetensors::{Dtype, tensor::TensorView};
use serde_json::json;
use tempfile::TempDir;

pub(crate) const HIDDEN: usize = 64;
pub(crate) const LATENTS: usize = 4;
const VISION_HIDDEN: usize = 144;
const VISION_INTERMEDIATE: usize = 96;
const INTERMEDIATE: usize = 80;
const LAYERS: usize = 2;
const PERCEIVER_HEAD: usize = 96;

/// Two layers each of a vision tower (2 heads of 72, patches of 14, pictures up to 56) and of a Perceiver (2 heads, 1 for keys).
pub(crate) fn checkpoint() -> (TempDir, Checkpoint) {
    let folder = tempfile::tempdir().unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = shapes()
        .into_iter()
        .map(|(name, shape)| {
            let norm = name.contains("norm") && name.ends_with("weight");
            let (offset, scale) = if norm { (1.0, 0.1) } else { (0.0, 0.3) };
            let count: usize = shape.iter().product();
            let data = (0..count).flat_map(|_| bf16::from_f32(offset + scale * (rng.random::<f32>() - 0.5)).to_le_bytes()).collect();
            (format!("model.{name}"), shape, data)
        })
        .collect();
    let views = tensors.iter().map(|(name, shape, data)| (name.as_str(), TensorView::new(Dtype::BF16, shape.clone(), data).unwrap()));
    safetensors::serialize_to_file(views, None, &folder.path().join("model.safetensors")).unwrap();
    let write = |name: &str, value: serde_json::Value| std::fs::write(folder.path().join(name), value.to_string()).unwrap();
    write(
        "config.json",
        json!({
            "model_type": "idefics2", "image_token_id": 40,
            "vision_config": {"hidden_size": VISION_HIDDEN, "intermediate_size": VISION_INTERMEDIATE, "num_hidden_layers": LAYERS,
                "num_attention_heads": 2, "patch_size": 14, "image_size": 56},
            "perceiver_config": {"resampler_n_latents": LATENTS, "hidden_size": HIDDEN, "resampler_depth": LAYERS,
                "resampler_n_heads": 2, "resampler_head_dim": PERCEIVER_HEAD, "num_key_value_heads": 1},
            "text_config": {"vocab_size": 50, "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_hidden_layers": 1,
                "num_attention_heads": 2, "num_key_value_heads": 1}
        }),
    );
    write("preprocessor_config.json", json!({"size": {"longest_edge": 56, "shortest_edge": 14}}));
    write("tokenizer.json", json!({"added_tokens": []}));
    let checkpoint = Checkpoint::open(Source::Folder(folder.path().to_owned())).unwrap();
    (folder, checkpoint)
}

fn shapes() -> Vec<(String, Vec<usize>)> {
    let (v, m, h) = (VISION_HIDDEN, VISION_INTERMEDIATE, HIDDEN);
    let mut shapes: Vec<(String, Vec<usize>)> = vec![
        ("vision_model.embeddings.patch_embedding.weight".into(), vec![v, 3, 14, 14]),
        ("vision_model.embeddings.patch_embedding.bias".into(), vec![v]),
        ("vision_model.embeddings.position_embedding.weight".into(), vec![16, v]),
        ("vision_model.post_layernorm.weight".into(), vec![v]),
        ("vision_model.post_layernorm.bias".into(), vec![v]),
        ("connector.modality_projection.gate_proj.weight".into(), vec![INTERMEDIATE, v]),
        ("connector.modality_projection.up_proj.weight".into(), vec![INTERMEDIATE, v]),
        ("connector.modality_projection.down_proj.weight".into(), vec![h, INTERMEDIATE]),
        ("connector.perceiver_resampler.latents".into(), vec![LATENTS, h]),
        ("connector.perceiver_resampler.norm.weight".into(), vec![h]),
    ];
    for i in 0..LAYERS {
        let layer = format!("vision_model.encoder.layers.{i}");
        for (name, output, input) in [
            ("self_attn.q_proj", v, v),
            ("self_attn.k_proj", v, v),
            ("self_attn.v_proj", v, v),
            ("self_attn.out_proj", v, v),
            ("mlp.fc1", m, v),
            ("mlp.fc2", v, m),
        ] {
            shapes.push((format!("{layer}.{name}.weight"), vec![output, input]));
            shapes.push((format!("{layer}.{name}.bias"), vec![output]));
        }
        for norm in ["layer_norm1", "layer_norm2"] {
            shapes.push((format!("{layer}.{norm}.weight"), vec![v]));
            shapes.push((format!("{layer}.{norm}.bias"), vec![v]));
        }
        let layer = format!("connector.perceiver_resampler.layers.{i}");
        for (name, shape) in [
            ("input_latents_norm", vec![h]),
            ("input_context_norm", vec![h]),
            ("post_attention_layernorm", vec![h]),
            ("self_attn.q_proj", vec![2 * PERCEIVER_HEAD, h]),
            ("self_attn.k_proj", vec![PERCEIVER_HEAD, h]),
            ("self_attn.v_proj", vec![PERCEIVER_HEAD, h]),
            ("self_attn.o_proj", vec![h, 2 * PERCEIVER_HEAD]),
            ("mlp.gate_proj", vec![4 * h, h]),
            ("mlp.up_proj", vec![4 * h, h]),
            ("mlp.down_proj", vec![h, 4 * h]),
        ] {
            shapes.push((format!("{layer}.{name}.weight"), shape));
        }
    }
    shapes
}

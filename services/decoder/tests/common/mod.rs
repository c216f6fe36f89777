//! A tiny random checkpoint, written to a folder.

use half::bf16;
use idefics_common::checkpoint::{Checkpoint, Source};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use safetensors::{Dtype, tensor::TensorView};
use serde_json::json;
use tempfile::TempDir;

pub(crate) const HIDDEN: usize = 64;
pub(crate) const VOCAB: usize = 50;
pub(crate) const LATENTS: usize = 4;
pub(crate) const IMAGE: u32 = 40;
const LAYERS: usize = 2;
const INTERMEDIATE: usize = 96;

/// A checkpoint with a text model only, which is all that a decoder reads. Sliding window 12, heads of half of `hidden`, 2 queries per
/// key.
pub(crate) fn checkpoint(hidden: usize) -> (TempDir, Checkpoint) {
    let folder = tempfile::tempdir().unwrap();
    let mut shapes =
        vec![("lm_head.weight".to_owned(), vec![VOCAB, hidden]), ("model.text_model.embed_tokens.weight".into(), vec![VOCAB, hidden])];
    shapes.push(("model.text_model.norm.weight".into(), vec![hidden]));
    for i in 0..LAYERS {
        for (name, shape) in [
            ("input_layernorm", vec![hidden]),
            ("post_attention_layernorm", vec![hidden]),
            ("self_attn.q_proj", vec![hidden, hidden]),
            ("self_attn.k_proj", vec![hidden / 2, hidden]),
            ("self_attn.v_proj", vec![hidden / 2, hidden]),
            ("self_attn.o_proj", vec![hidden, hidden]),
            ("mlp.gate_proj", vec![INTERMEDIATE, hidden]),
            ("mlp.up_proj", vec![INTERMEDIATE, hidden]),
            ("mlp.down_proj", vec![hidden, INTERMEDIATE]),
        ] {
            shapes.push((format!("model.text_model.layers.{i}.{name}.weight"), shape));
        }
    }
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = shapes
        .into_iter()
        .map(|(name, shape)| {
            // Norms near 1, matrices wide enough that logits differ clearly.
            let scale = if shape.len() == 1 { 0.1 } else { 0.4 };
            let offset = if shape.len() == 1 { 1.0 } else { 0.0 };
            let count: usize = shape.iter().product();
            let data = (0..count).flat_map(|_| bf16::from_f32(offset + scale * (rng.random::<f32>() - 0.5)).to_le_bytes()).collect();
            (name, shape, data)
        })
        .collect();
    let views = tensors.iter().map(|(name, shape, data)| (name.as_str(), TensorView::new(Dtype::BF16, shape.clone(), data).unwrap()));
    safetensors::serialize_to_file(views, None, &folder.path().join("model.safetensors")).unwrap();
    let write = |name: &str, value: serde_json::Value| std::fs::write(folder.path().join(name), value.to_string()).unwrap();
    write(
        "config.json",
        json!({
            "model_type": "idefics2", "image_token_id": IMAGE,
            "vision_config": {"patch_size": 14, "image_size": 28},
            "perceiver_config": {"resampler_n_latents": LATENTS, "hidden_size": hidden},
            "text_config": {"vocab_size": VOCAB, "hidden_size": hidden, "intermediate_size": INTERMEDIATE, "num_hidden_layers": LAYERS,
                "num_attention_heads": 2, "num_key_value_heads": 1, "sliding_window": 12, "max_position_embeddings": 512}
        }),
    );
    write("preprocessor_config.json", json!({"size": {"longest_edge": 28, "shortest_edge": 14}}));
    write("tokenizer.json", json!({"added_tokens": [{"id": 2, "content": "</s>"}, {"id": 41, "content": "<fake_token_around_image>"}]}));
    let checkpoint = Checkpoint::open(Source::Folder(folder.path().to_owned())).unwrap();
    (folder, checkpoint)
}

//! `idefics inspect`: what a checkpoint is and what each role needs.

use crate::{
    cli::InspectArgs,
    progress::{DECODER_PREFIXES, VISION_PREFIXES},
    roles::Model,
};
use anyhow::Result;
use idefics_kernels::weights::{WeightView, Weights};
use std::collections::BTreeSet;

/// Prints the description.
pub(crate) fn run(args: &InspectArgs) -> Result<()> {
    let model = Model::open(args.model.as_deref())?;
    print!("{}", describe(&model));
    Ok(())
}

const PARTS: [(&str, &str); 5] = [
    ("vision tower", "model.vision_model."),
    ("modality projection", "model.connector.modality_projection."),
    ("perceiver", "model.connector.perceiver_resampler."),
    ("text model", "model.text_model."),
    ("lm_head", "lm_head."),
];

struct Part {
    parameters: u64,
    bytes: u64,
    dtypes: String,
}

fn part(weights: &Weights, prefixes: &[&str]) -> Part {
    let views: Vec<&WeightView> = weights.iter().filter(|view| prefixes.iter().any(|p| view.name.starts_with(p))).collect();
    let dtypes: BTreeSet<String> = views.iter().map(|view| view.dtype.to_string()).collect();
    Part {
        parameters: views.iter().map(|view| view.shape.iter().product::<usize>() as u64).sum(),
        bytes: views.iter().map(|view| view.bytes().len() as u64).sum(),
        dtypes: dtypes.into_iter().collect::<Vec<_>>().join(", "),
    }
}

fn describe(model: &Model) -> String {
    let (checkpoint, config) = (&model.checkpoint, &model.checkpoint.config);
    let (vision, perceiver, text) = (&config.vision_config, &config.perceiver_config, &config.text_config);
    let size = checkpoint.preprocessor.size;
    let window = text.sliding_window.map_or("no window".into(), |window| format!("sliding window {window}"));
    let split = if checkpoint.preprocessor.do_image_splitting { "split by default" } else { "not split by default" };
    let template = if checkpoint.chat_template.is_some() { "yes" } else { "none (base checkpoint: use --raw)" };
    let mut lines = vec![
        format!("model         {} (fingerprint {})", checkpoint.name(), &model.fingerprint[..16]),
        format!(
            "vision        {} layers, hidden {}, {} heads of {}, patches of {} px, images up to {} px",
            vision.num_hidden_layers,
            vision.hidden_size,
            vision.num_attention_heads,
            vision.head_dim(),
            vision.patch_size,
            vision.image_size
        ),
        format!(
            "perceiver     {} layers, {} latents, {} heads of {}, {} key-value heads",
            perceiver.resampler_depth,
            perceiver.resampler_n_latents,
            perceiver.resampler_n_heads,
            perceiver.resampler_head_dim,
            perceiver.num_key_value_heads
        ),
        format!(
            "text          {} layers, hidden {}, {} heads of {}, {} key-value heads, vocabulary {}, context {}, {window}",
            text.num_hidden_layers,
            text.hidden_size,
            text.num_attention_heads,
            text.head_dim(),
            text.num_key_value_heads,
            text.vocab_size,
            text.max_position_embeddings
        ),
        format!("images        longest edge {}, shortest edge {}, {split}", size.longest_edge, size.shortest_edge),
        format!("chat template {template}"),
        String::new(),
        format!("{:<22}{:>14}{:>14}  {}", "part", "parameters", "size", "dtype"),
    ];
    for (name, prefix) in PARTS {
        let part = part(&model.weights, &[prefix]);
        lines.push(format!("{name:<22}{:>14}{:>14}  {}", thousands(part.parameters), human_bytes(part.bytes), part.dtypes));
    }
    let all = part(&model.weights, &[""]);
    lines.push(format!("{:<22}{:>14}{:>14}  {}", "all", thousands(all.parameters), human_bytes(all.bytes), all.dtypes));

    let kv_elements = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim();
    // The CPU backend keeps keys and values in f32, a card in 16 bits.
    let (cpu_kv, card_kv) = (kv_elements as u64 * 4, kv_elements as u64 * 2);
    let (vision, decoder) = (part(&model.weights, &VISION_PREFIXES), part(&model.weights, &DECODER_PREFIXES));
    lines.extend([
        String::new(),
        "memory by role (weights are mapped on the CPU, in the checkpoint's own dtype)".into(),
        format!("vision        {} of weights, and activations", human_bytes(vision.bytes)),
        format!(
            "decoder       {} of weights, and the KV cache: {} a token on the CPU, {} in 16 bits",
            human_bytes(decoder.bytes),
            human_bytes(cpu_kv),
            human_bytes(card_kv)
        ),
        "gateway       tokenizer and configuration only".into(),
        String::new(),
    ]);
    lines.join("\n")
}

fn thousands(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

fn human_bytes(bytes: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB"];
    let (mut value, mut unit) = (bytes as f64, 0);
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{value:.1} {}", units[unit]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn demo_is_described_by_part() {
        let text = describe(&Model::open(None).unwrap());
        for expected in
            ["idefics2-demo", "2 heads of 72", "2 heads of 96", "2 heads of 128", "bf16", "vision tower", "not split by default"]
        {
            assert!(text.contains(expected), "{text}");
        }
    }

    #[test]
    fn numbers_are_readable() {
        assert_eq!((thousands(7), thousands(1234567)), ("7".into(), "1,234,567".into()));
        assert_eq!((human_bytes(512), human_bytes(10 << 20)), ("512 B".into(), "10.0 MiB".into()));
    }
}

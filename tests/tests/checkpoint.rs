//! Any checkpoint in the Hugging Face layout is served alike, and a wrong one is refused at start with what is wrong.

use idefics_tests::{
    checkpoint::{self, Checkpoint, Form, TemplatePlace, Tensor},
    golden::{self, Pictures, RandomCase},
    process::{Answer, Idefics},
};
use safetensors::Dtype;
use serde_json::{Value, json};
use std::{collections::BTreeMap, ffi::OsString, fs};

const IDEFICS: Idefics = Idefics(env!("CARGO_BIN_EXE_idefics-under-test"));

/// Asks one process, embedded, the reference's case with two pictures.
fn ask(model: &Checkpoint, case: &RandomCase, pictures: &Pictures) -> Answer {
    let messages = pictures.folder().join("messages.json");
    golden::write_messages(case.messages.as_ref().unwrap(), &messages, |name| pictures.path(name));
    let mut args: Vec<OsString> = case.options.flags().into_iter().map(Into::into).collect();
    args.extend(["--max-new-tokens".into(), case.max_new_tokens.to_string().into(), "--logprobs".into(), "8".into()]);
    args.extend(["--messages".into(), messages.into(), "--model".into(), model.path().into()]);
    IDEFICS.ask(args)
}

fn assert_equals_reference(model: &Checkpoint, what: &str) {
    let case = golden::random_case("interleaved");
    let answer = ask(model, &case, &Pictures::write());
    assert_eq!(answer.prompt_token_ids, case.prompt_token_ids, "prompt of {what}");
    assert_eq!(answer.token_ids, case.token_ids, "answer of {what}");
    let difference = golden::logprob_difference(&answer, &case.top5);
    println!("{what}: log-probabilities within {difference:.1e}");
    assert!(difference <= golden::LOGPROB_TOLERANCE, "{what}: log-probabilities differ by {difference:.1e}");
}

#[test]
fn every_dtype_gives_the_same_answer() {
    for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16] {
        let form = Form { dtype, ..Form::default() };
        assert_equals_reference(&checkpoint::write(&form, |_| ()), &format!("{dtype:?}"));
    }
}

#[test]
fn shards_give_the_same_answer() {
    let form = Form { shards: 3, ..Form::default() };
    assert_equals_reference(&checkpoint::write(&form, |_| ()), "three shards");
}

#[test]
fn the_template_is_found_in_each_of_its_places() {
    for template in [TemplatePlace::Jinja, TemplatePlace::Json, TemplatePlace::TokenizerConfig] {
        let form = Form { template, ..Form::default() };
        assert_equals_reference(&checkpoint::write(&form, |_| ()), &format!("{template:?}"));
    }
}

/// The random checkpoint's `config.json` leaves these values out; said aloud, they change nothing.
#[test]
fn class_defaults_may_be_written_out() {
    let model = checkpoint::random();
    model.edit_json("config.json", |config| {
        merge(&mut config["text_config"], json!({ "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": false }));
        merge(&mut config["vision_config"], json!({ "layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh", "num_channels": 3 }));
        let perceiver = json!({
            "hidden_act": "silu", "hidden_size": 128, "resampler_depth": 3, "resampler_head_dim": 96, "resampler_n_latents": 64,
            "rms_norm_eps": 0.01,
        });
        merge(&mut config["perceiver_config"], perceiver);
    });
    assert_equals_reference(&model, "class defaults written out");
}

/// The window of the random checkpoint is 24 tokens and its prompts are longer: null must switch it off.
#[test]
fn the_sliding_window_is_the_checkpoints() {
    let case = golden::random_case("interleaved");
    let pictures = Pictures::write();
    let unlimited = checkpoint::random();
    unlimited.edit_json("config.json", |config| config["text_config"]["sliding_window"] = Value::Null);
    let absent = checkpoint::random();
    absent.edit_json("config.json", |config| _ = config["text_config"].as_object_mut().unwrap().remove("sliding_window"));
    let (unlimited, absent) = (ask(&unlimited, &case, &pictures), ask(&absent, &case, &pictures));
    // Absent means 4,096, which is longer than this prompt and its answer.
    assert_eq!(unlimited.token_ids, absent.token_ids);
    assert_ne!(unlimited.token_ids, case.token_ids);
}

#[test]
fn missing_tensor_is_refused_by_name() {
    for name in ["model.text_model.layers.2.self_attn.v_proj.weight", "model.vision_model.post_layernorm.bias", "lm_head.weight"] {
        let model = checkpoint::write(&Form::default(), |tensors| _ = tensors.remove(name).unwrap());
        refused(&model, &[name]);
    }
}

#[test]
fn wrong_shape_is_refused_with_both_shapes() {
    let reshape = |name: &'static str, shape: &'static [usize]| {
        move |tensors: &mut BTreeMap<String, Tensor>| {
            let tensor = tensors.get_mut(name).unwrap();
            tensor.shape = shape.to_vec();
            tensor.values.resize(shape.iter().product(), 0.0);
        }
    };
    let name = "model.connector.perceiver_resampler.layers.1.self_attn.k_proj.weight";
    refused(&checkpoint::write(&Form::default(), reshape(name, &[96, 128])), &[name, "192", "96", "128"]);
    // As many elements as expected, in the wrong order of sizes.
    let name = "model.text_model.layers.0.mlp.down_proj.weight";
    refused(&checkpoint::write(&Form::default(), reshape(name, &[256, 128])), &[name, "[128, 256]", "[256, 128]"]);
}

#[test]
fn configuration_of_another_checkpoint_is_refused() {
    let model = checkpoint::random();
    model.edit_json("config.json", |config| config["text_config"]["num_hidden_layers"] = 4.into());
    refused(&model, &["model.text_model.layers.3."]);
    let model = checkpoint::random();
    model.edit_json("config.json", |config| config["model_type"] = "llava".into());
    refused(&model, &["model_type", "llava", "idefics2"]);
}

#[test]
fn truncated_weights_are_refused_with_the_file() {
    let model = checkpoint::random();
    let file = model.file("model.safetensors");
    let bytes = fs::read(&file).unwrap();
    // In the last tensor, in the header, in the header's length, and nothing at all.
    for length in [bytes.len() - 1, 1000, 4, 0] {
        fs::write(&file, &bytes[..length]).unwrap();
        refused(&model, &["model.safetensors"]);
    }
}

#[test]
fn truncated_shard_is_refused_with_the_file() {
    let model = checkpoint::write(&Form { shards: 3, ..Form::default() }, |_| ());
    let name = "model-00002-of-00003.safetensors";
    let bytes = fs::read(model.file(name)).unwrap();
    fs::write(model.file(name), &bytes[..bytes.len() / 2]).unwrap();
    refused(&model, &[name]);
    fs::remove_file(model.file(name)).unwrap();
    refused(&model, &[name]);
}

#[test]
fn missing_files_are_refused_by_name() {
    for name in ["config.json", "tokenizer.json", "model.safetensors"] {
        let model = checkpoint::random();
        fs::remove_file(model.file(name)).unwrap();
        refused(&model, &[name]);
    }
    let folder = tempfile::tempdir().unwrap();
    let output = IDEFICS.run(["serve".as_ref(), "--model".as_ref(), folder.path().join("nowhere").as_os_str()]);
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("nowhere"));
}

#[test]
fn inspect_describes_the_checkpoint() {
    let inspect = |folder: &std::path::Path| {
        let output = IDEFICS.run(["inspect".as_ref(), folder.as_os_str()]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap().to_lowercase()
    };
    let demo = inspect(&golden::demo_checkpoint());
    for word in ["bf16", "vision", "perceiver", "decoder"] {
        assert!(demo.contains(word), "inspect says nothing of {word}:\n{demo}");
    }
    assert!(inspect(checkpoint::write(&Form { dtype: Dtype::F16, ..Form::default() }, |_| ()).path()).contains("f16"));
}

fn merge(into: &mut Value, more: Value) {
    let Value::Object(more) = more else { unreachable!() };
    into.as_object_mut().unwrap().extend(more);
}

/// Starting a server fails, and its message has every one of these words.
fn refused(model: &Checkpoint, words: &[&str]) {
    let serve = ["serve", "--grpc-addr", "127.0.0.1:0", "--model"].map(OsString::from);
    let output = IDEFICS.run(serve.into_iter().chain([model.path().into()]));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success(), "served; wanted a refusal with {words:?}");
    assert!(!said.contains("panicked"), "{said}");
    for word in words {
        assert!(said.contains(word), "the refusal lacks {word:?}:\n{said}");
    }
}

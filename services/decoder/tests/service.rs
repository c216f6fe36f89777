//! The decoder's gRPC face, called in process.

mod common;

use common::{HIDDEN, IMAGE, LATENTS, VOCAB, checkpoint};
use idefics_common::{
    channel::{GrpcChannel, in_process},
    serve::Shutdown,
    status::{self, IMAGE_TOKENS_MISSING, MODEL_FINGERPRINT},
};
use idefics_decoder::{Config, Decoder, Engine, EngineOptions};
use idefics_kernels::{
    cpu::{Cpu, CpuOptions},
    weights::Weights,
};
use idefics_proto::{
    decoder::v1::{
        CancelChoiceRequest, FinishReason, GenerateRequest, ImageSpan, PutImageTokensRequest, ReleaseRequest, ReserveRequest,
        SamplingParams, decoder_service_client::DecoderServiceClient, generate_response::Event,
    },
    tensor::v1::{DataType, Tensor},
};
use tempfile::TempDir;
use tonic::Code;
use tonic_types::StatusExt;

const FINGERPRINT: &str = "this model";

fn client(config: Config, shutdown: &Shutdown) -> (TempDir, DecoderServiceClient<GrpcChannel>) {
    let (folder, checkpoint) = checkpoint(HIDDEN);
    let options = EngineOptions {
        weights: Weights::open(folder.path()).unwrap(),
        model: checkpoint.config.clone(),
        config: config.clone(),
        stop_token_ids: vec![],
        banned_token_ids: checkpoint.banned_token_ids(),
        progress: Box::new(|_| {}),
    };
    let engine = Engine::start(Cpu::new(CpuOptions::default()).unwrap(), options).unwrap();
    let decoder = Decoder::new(config, &checkpoint, FINGERPRINT.into(), engine, shutdown.clone());
    (folder, DecoderServiceClient::new(in_process(decoder.into_server())))
}

fn config() -> Config {
    Config { kv_cache_bytes: 8 << 20, ..Config::default() }
}

fn reserve(request_id: &str, keys: &[[u8; 32]]) -> ReserveRequest {
    let image_keys = keys.iter().map(|k| k.to_vec().into()).collect();
    ReserveRequest {
        request_id: request_id.into(),
        model_fingerprint: FINGERPRINT.into(),
        image_keys,
        prompt_tokens: 6,
        max_new_tokens: 5,
        n: 1,
    }
}

fn put(key: [u8; 32], rows: usize, value: f32) -> PutImageTokensRequest {
    let tensor = Tensor {
        dtype: DataType::F32.into(),
        shape: vec![rows as u64, HIDDEN as u64],
        data: value.to_le_bytes().repeat(rows * HIDDEN).into(),
    };
    PutImageTokensRequest { key: key.to_vec().into(), model_fingerprint: FINGERPRINT.into(), image_tokens: Some(tensor) }
}

fn greedy() -> SamplingParams {
    SamplingParams { top_p: 1.0, typical_p: 1.0, repetition_penalty: 1.0, ..SamplingParams::default() }
}

fn generate(request_id: &str, key: [u8; 32]) -> GenerateRequest {
    GenerateRequest {
        request_id: request_id.into(),
        token_ids: [vec![5], vec![IMAGE; LATENTS], vec![6]].concat(),
        image_spans: vec![ImageSpan { key: key.to_vec().into(), sub_image: 0, start: 1 }],
        max_new_tokens: 5,
        sampling: Some(SamplingParams { logprobs: Some(2), ..greedy() }),
        cache_salt: Default::default(),
        n: 1,
        prompt_logprobs: None,
        priority: 0,
    }
}

#[tokio::test]
async fn reserved_shipped_and_generated() {
    let (_folder, mut client) = client(config(), &Shutdown::default());
    let key = [7; 32];
    let reserved = client.reserve(reserve("a", &[key])).await.unwrap().into_inner();
    assert_eq!(reserved.missing_image_keys, [key.to_vec()]);
    client.put_image_tokens(put(key, LATENTS, 0.5)).await.unwrap();
    assert!(client.reserve(reserve("b", &[key])).await.unwrap().into_inner().missing_image_keys.is_empty());
    let mut stream = client.generate(GenerateRequest { prompt_logprobs: Some(4), ..generate("a", key) }).await.unwrap().into_inner();
    let (mut prompt, mut tokens, mut finished) = (Vec::new(), 0, 0);
    while let Some(message) = stream.message().await.unwrap() {
        match message.event.unwrap() {
            Event::Token(token) => {
                assert_eq!((token.top.len(), token.logprob.is_some()), (2, true));
                tokens += 1;
            }
            Event::PromptLogprobs(part) => {
                assert_eq!((part.start, tokens), (1, 0));
                assert!(part.tokens.iter().all(|token| token.logprob < 0.0 && token.top.len() == 4));
                prompt.extend(part.tokens.iter().map(|token| token.token_id));
            }
            Event::Finished(_) => finished += 1,
        }
    }
    assert_eq!((tokens, finished), (5, 1));
    assert_eq!(prompt, [vec![IMAGE; LATENTS], vec![6]].concat());
}

#[tokio::test]
async fn missing_images_are_named() {
    let (_folder, mut client) = client(config(), &Shutdown::default());
    let status = client.generate(generate("a", [0xab; 32])).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert_eq!(status::precondition_subjects(&status, IMAGE_TOKENS_MISSING), ["ab".repeat(32)]);
}

#[tokio::test]
async fn other_models_are_refused() {
    let (_folder, mut client) = client(config(), &Shutdown::default());
    let other = || "another model".to_owned();
    let status = client.reserve(ReserveRequest { model_fingerprint: other(), ..reserve("a", &[]) }).await.unwrap_err();
    assert_eq!(status::precondition_subjects(&status, MODEL_FINGERPRINT), [other()]);
    let status =
        client.put_image_tokens(PutImageTokensRequest { model_fingerprint: other(), ..put([1; 32], LATENTS, 0.0) }).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
}

#[tokio::test]
async fn bad_tensors_are_refused() {
    let (_folder, mut client) = client(config(), &Shutdown::default());
    for (request, expected) in [
        (put([1; 32], LATENTS, f32::NAN), "not finite"),
        (put([1; 32], LATENTS + 1, 0.0), "expected [n x 4, 64]"),
        (PutImageTokensRequest { image_tokens: None, ..put([1; 32], LATENTS, 0.0) }, "is absent"),
        (PutImageTokensRequest { key: vec![1; 31].into(), ..put([1; 32], LATENTS, 0.0) }, "31 bytes"),
    ] {
        let status = client.put_image_tokens(request).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument);
        assert!(status.message().contains(expected), "{}", status.message());
    }
}

#[tokio::test]
async fn bad_prompts_are_refused_with_every_violation() {
    let (_folder, mut client) = client(config(), &Shutdown::default());
    let key = [7; 32];
    client.put_image_tokens(put(key, LATENTS, 0.5)).await.unwrap();
    let mut request = generate("a", key);
    request.token_ids.push(VOCAB as u32);
    request.token_ids.push(IMAGE);
    request.image_spans[0].start = 2;
    request.prompt_logprobs = Some(21);
    request.priority = -11;
    request.sampling = Some(SamplingParams {
        temperature: f32::NAN,
        top_p: 0.0,
        min_p: 1.1,
        presence_penalty: 2.1,
        frequency_penalty: f32::NAN,
        logprobs: Some(21),
        min_new_tokens: 6,
        logit_bias: [(5, 100.5), (6, -100.0), (VOCAB as u32, f32::NAN)].into(),
        stop_token_ids: vec![VOCAB as u32 - 1, VOCAB as u32],
        ..SamplingParams::default()
    });
    let status = client.generate(request).await.unwrap_err();
    let violations = status::field_violations(&status);
    let mut fields: Vec<&str> = violations.keys().map(String::as_str).collect();
    fields.sort_unstable();
    let past_the_vocabulary = format!("sampling.logit_bias[{VOCAB}]");
    let expected = [
        "image_spans[0].start",
        "priority",
        "prompt_logprobs",
        "sampling.frequency_penalty",
        past_the_vocabulary.as_str(),
        "sampling.logit_bias[5]",
        "sampling.logprobs",
        "sampling.min_new_tokens",
        "sampling.min_p",
        "sampling.presence_penalty",
        "sampling.repetition_penalty",
        "sampling.stop_token_ids[1]",
        "sampling.temperature",
        "sampling.top_p",
        "sampling.typical_p",
        "token_ids",
        "token_ids[6]",
    ];
    assert_eq!(fields, expected);

    let mut request = generate("a", key);
    request.image_spans[0].sub_image = 1;
    let status = client.generate(request).await.unwrap_err();
    assert!(status.message().contains("the image has 1 sub-images"), "{}", status.message());
    let status = client.generate(GenerateRequest { max_new_tokens: 507, ..generate("a", key) }).await.unwrap_err();
    assert_eq!(status.code(), Code::OutOfRange);
}

#[tokio::test]
async fn admission_is_bounded_and_released() {
    let (_folder, mut client) = client(Config { max_requests: 1, ..config() }, &Shutdown::default());
    client.reserve(reserve("a", &[])).await.unwrap();
    let status = client.reserve(reserve("b", &[])).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted);
    client.release(ReleaseRequest { request_id: "a".into() }).await.unwrap();
    client.reserve(reserve("b", &[])).await.unwrap();
}

#[tokio::test]
async fn generation_without_a_reservation_is_admitted_as_reserve_would() {
    let shutdown = Shutdown::default();
    let (_folder, mut client) = client(Config { max_requests: 2, ..config() }, &shutdown);
    let text = |request_id: &str, n| GenerateRequest {
        token_ids: vec![5, 6, 7],
        image_spans: vec![],
        n,
        max_new_tokens: 500,
        ..generate(request_id, [7; 32])
    };
    client.reserve(reserve("a", &[])).await.unwrap();
    for n in [2, 1] {
        // Two places and one taken: the second fits, and runs from then on.
        let answer = client.generate(text("b", n)).await;
        assert_eq!(answer.as_ref().err().map(tonic::Status::code), (n == 2).then_some(Code::ResourceExhausted));
        let Err(status) = answer else { break };
        assert!(status.get_details_retry_info().is_some());
    }
    client.release(ReleaseRequest { request_id: "a".into() }).await.unwrap();
    client.reserve(reserve("c", &[])).await.unwrap();
    shutdown.stop_accepting.cancel();
    let status = client.generate(text("d", 1)).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "only what was admitted goes on");
    let mut stream = client.generate(text("c", 1)).await.unwrap().into_inner();
    assert!(stream.message().await.unwrap().is_some());
}

#[tokio::test]
async fn each_choice_takes_a_place_in_the_queue() {
    let (_folder, mut client) = client(Config { max_requests: 4, ..config() }, &Shutdown::default());
    let with = |request_id: &str, n| ReserveRequest { n, ..reserve(request_id, &[]) };
    client.reserve(with("a", 3)).await.unwrap();
    assert_eq!(client.reserve(with("b", 2)).await.unwrap_err().code(), Code::ResourceExhausted);
    client.reserve(with("b", 1)).await.unwrap();
    client.release(ReleaseRequest { request_id: "a".into() }).await.unwrap();
    client.reserve(with("c", 3)).await.unwrap();
    let status = client.reserve(with("d", 5)).await.unwrap_err();
    assert_eq!(status.code(), Code::OutOfRange);
    assert!(status.message().contains("decoder.max_requests"), "{}", status.message());
    for n in [0, 17] {
        let status = client.reserve(with("d", n)).await.unwrap_err();
        assert_eq!(status::field_violations(&status).keys().collect::<Vec<_>>(), ["n"]);
    }
}

#[tokio::test]
async fn choices_end_one_by_one_and_one_can_be_cancelled() {
    let (_folder, mut client) = client(config(), &Shutdown::default());
    let key = [7; 32];
    client.put_image_tokens(put(key, LATENTS, 0.5)).await.unwrap();
    let mut stream = client.generate(GenerateRequest { n: 3, max_new_tokens: 400, ..generate("a", key) }).await.unwrap().into_inner();
    let Some(Event::Token(token)) = stream.message().await.unwrap().unwrap().event else { panic!("a token comes first") };
    let first = token.first.expect("it is the first of choice 0");
    assert_eq!((token.choice, first.cached_tokens), (0, 0));
    for (request_id, choice) in [("a", 1), ("a", 9), ("unknown", 0)] {
        client.cancel_choice(CancelChoiceRequest { request_id: request_id.into(), choice }).await.unwrap();
    }
    let mut ends = Vec::new();
    while let Some(message) = stream.message().await.unwrap() {
        if let Some(Event::Finished(finished)) = message.event {
            if finished.choice == 0 {
                assert_eq!((first.queue_ms, first.prefill_ms), (finished.queue_ms, finished.prefill_ms));
            }
            ends.push((finished.choice, finished.reason()));
        }
    }
    ends.sort_by_key(|(choice, _)| *choice);
    assert_eq!(ends, [(0, FinishReason::Length), (1, FinishReason::Cancelled), (2, FinishReason::Length)]);
}

#[tokio::test]
async fn shutdown_refuses_new_work_and_ends_streams() {
    let shutdown = Shutdown::default();
    let (_folder, mut client) = client(config(), &shutdown);
    let key = [7; 32];
    client.put_image_tokens(put(key, LATENTS, 0.5)).await.unwrap();
    let mut stream = client.generate(GenerateRequest { max_new_tokens: 500, ..generate("a", key) }).await.unwrap().into_inner();
    assert!(stream.message().await.unwrap().is_some());
    shutdown.stop_accepting.cancel();
    assert_eq!(client.reserve(reserve("b", &[])).await.unwrap_err().code(), Code::Unavailable);
    shutdown.cancel.cancel();
    let ended = loop {
        match stream.message().await {
            Ok(Some(_)) => {}
            Ok(None) => break None,
            Err(status) => break Some(status.code()),
        }
    };
    // The engine may finish before the cancellation is seen.
    assert!(matches!(ended, None | Some(Code::Unavailable)));
}

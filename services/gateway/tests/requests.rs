//! A request's way through the peers, and what happens when something goes wrong on it.

mod support;

use idefics_common::status::field_violations;
use idefics_gateway::GatewayConfig;
use idefics_proto::{
    decoder::v1::{FinishReason, PromptLogprobs, PromptToken, SamplingParams, TokenLogprob},
    gateway::v1::{self as pb, generation_event::Event},
};
use std::time::Duration;
use support::{Asked, BOS, END_OF_UTTERANCE, Encoding, FAKE, IMAGE, Script, Setup, World, ask, chat, complete, picture, text};
use tonic::{Code, Request, Streaming};
use tonic_types::StatusExt;

fn stop(texts: &[&str]) -> Option<pb::SamplingOptions> {
    Some(pb::SamplingOptions { stop: texts.iter().map(|text| (*text).to_owned()).collect(), ..Default::default() })
}

/// Ids that spell `text` without a space in front.
async fn spell(world: &World, text: &str) -> Vec<u32> {
    let input = Some(pb::tokenize_request::Input::Text(text.to_owned()));
    world.client().tokenize(pb::TokenizeRequest { input, image_options: None }).await.unwrap().into_inner().token_ids
}

async fn next(stream: &mut Streaming<pb::ChatResponse>) -> Event {
    stream.message().await.unwrap().unwrap().event.unwrap().event.unwrap()
}

#[tokio::test(start_paused = true)]
async fn request_is_admitted_then_encoded_then_generated() {
    let mut world = World::new().await;
    world.script([Script::Tokens(vec![399, 463, 483, 272, END_OF_UTTERANCE], FinishReason::Stop)]);
    let request = pb::ChatRequest { return_prompt_token_ids: true, ..chat(vec![picture(b"one"), text("What is this?")]) };
    let answer = ask(&world, request).await;
    assert!(answer.error.is_none(), "{:?}", answer.error);
    assert_eq!((answer.text.as_str(), answer.token_ids.as_slice()), ("A pink ring.", &[399, 463, 483, 272, END_OF_UTTERANCE][..]));
    let [started] = answer.started.as_slice() else { panic!("{:?}", answer.started) };
    assert_eq!((started.image_tokens, started.prompt_tokens as usize), (16, started.prompt_token_ids.len()));
    assert_eq!(started.prompt_token_ids.iter().filter(|id| **id == IMAGE).count(), 16);
    assert_eq!(answer.reasons(), [pb::FinishReason::Stop]);
    let finished = answer.finished.unwrap();
    assert_eq!(
        finished.usage.unwrap(),
        pb::Usage { prompt_tokens: started.prompt_tokens, image_tokens: 16, completion_tokens: 5, cached_tokens: 0 }
    );
    let timings = finished.timings.unwrap();
    assert_eq!((timings.preprocess_ms, timings.encode_queue_ms, timings.encode_ms, timings.ship_ms), (4.0, 5.0, 6.0, 7.0));
    assert_eq!((timings.queue_ms, timings.prefill_ms, timings.decode_ms), (1.0, 2.0, 3.0));

    let (Asked::Reserve { request: reserve, .. }, Asked::Encode { request: encode, .. }) = (world.asked().await, world.asked().await)
    else {
        panic!("reserve, then encode")
    };
    let Asked::Generate { request: generate, .. } = world.asked().await else { panic!("then generate") };
    assert_eq!((reserve.request_id.as_str(), reserve.model_fingerprint.as_str()), (started.request_id.as_str(), support::FINGERPRINT));
    assert_eq!((reserve.prompt_tokens, reserve.max_new_tokens), (started.prompt_tokens, 256));
    assert_eq!((encode.image.as_ref(), encode.ship_to.as_str(), &encode.key), (&b"one"[..], "decoder-0", &reserve.image_keys[0]));
    assert_eq!(encode.key.len(), 32);
    let options = encode.options.unwrap();
    assert_eq!((options.split, options.longest_edge, options.shortest_edge), (false, 168, 56));
    assert_eq!(generate.token_ids, started.prompt_token_ids);
    assert_eq!((&generate.image_spans[0].key, generate.image_spans[0].sub_image), (&encode.key, 0));
    assert_eq!(generate.token_ids[generate.image_spans[0].start as usize - 1..][..2], [FAKE, IMAGE]);
    assert_eq!(world.asked().await.name(), "generate dropped");
    assert_eq!(world.asked_more(), None, "nothing is released that was used up");
}

#[tokio::test(start_paused = true)]
async fn the_same_picture_is_encoded_once() {
    let mut world = World::new().await;
    let answer = ask(&world, chat(vec![picture(b"one"), picture(b"two"), picture(b"one"), text("?")])).await;
    assert!(answer.error.is_none(), "{:?}", answer.error);
    assert_eq!(world.asked_names(4).await, ["decoder-0 reserve", "vision-0 encode", "vision-0 encode", "decoder-0 generate"]);
    ask(&world, chat(vec![picture(b"two"), text("Again?")])).await;
    let mut names = world.asked_names(3).await;
    names.retain(|name| name != "generate dropped");
    assert_eq!(names, ["decoder-0 reserve", "decoder-0 generate"], "the decoder has it already");
}

#[tokio::test(start_paused = true)]
async fn split_picture_has_five_spans_under_another_key() {
    let mut world = World::new().await;
    ask(&world, chat(vec![picture(b"one"), text("?")])).await;
    let Asked::Reserve { request: whole, .. } = world.asked().await else { panic!() };
    world.asked_names(3).await;
    let image_options = Some(pb::ImageOptions { split: Some(true), ..Default::default() });
    let answer = ask(&world, pb::ChatRequest { image_options, ..chat(vec![picture(b"one"), text("?")]) }).await;
    assert_eq!(answer.finished.unwrap().usage.unwrap().image_tokens, 80);
    let Asked::Reserve { request: split, .. } = world.asked().await else { panic!() };
    assert_ne!(whole.image_keys, split.image_keys);
    world.asked().await;
    let Asked::Generate { request, .. } = world.asked().await else { panic!() };
    assert_eq!(request.image_spans.iter().map(|span| span.sub_image).collect::<Vec<_>>(), [0, 1, 2, 3, 4]);
    for span in &request.image_spans {
        let start = span.start as usize;
        assert_eq!((request.token_ids[start - 1], request.token_ids[start + 16]), (FAKE, FAKE));
        assert!(request.token_ids[start..start + 16].iter().all(|id| *id == IMAGE));
    }
    assert_eq!(request.token_ids.iter().filter(|id| **id == FAKE).count(), 6);
}

#[tokio::test(start_paused = true)]
async fn raw_prompt_takes_pictures_in_order_of_marks() {
    let mut world = World::new().await;
    let images = [&b"one"[..], b"two"].map(|data| pb::Image { data: data.into() }).to_vec();
    let request = pb::GenerateRequest {
        prompt: "<image>a<image>b<end_of_utterance>".into(),
        images,
        return_prompt_token_ids: true,
        ..Default::default()
    };
    let answer = complete(&world, request).await;
    let ids = &answer.started[0].prompt_token_ids;
    assert_eq!((ids[0], *ids.last().unwrap()), (BOS, END_OF_UTTERANCE), "special tokens of a raw prompt count");
    let Asked::Reserve { request: reserve, .. } = world.asked().await else { panic!() };
    world.asked_names(2).await;
    let Asked::Generate { request, .. } = world.asked().await else { panic!() };
    assert_eq!(request.image_spans.iter().map(|span| span.key.clone()).collect::<Vec<_>>(), reserve.image_keys);
}

#[tokio::test(start_paused = true)]
async fn evicted_tokens_are_encoded_again_once() {
    let mut world = World::new().await;
    world.script([Script::Evicted, Script::Tokens(vec![399], FinishReason::Length)]);
    let answer = ask(&world, chat(vec![picture(b"one"), text("?")])).await;
    assert_eq!((answer.reasons(), answer.started.len()), (vec![pb::FinishReason::Length], 1));
    let names = world.asked_names(5).await;
    assert_eq!(names, ["decoder-0 reserve", "vision-0 encode", "decoder-0 generate", "vision-0 encode", "decoder-0 generate"]);

    let mut world = World::new().await;
    world.script([Script::Evicted]);
    let answer = ask(&world, chat(vec![picture(b"one"), text("?")])).await;
    let error = answer.error.unwrap();
    assert_eq!(error.code(), Code::Unavailable, "{error:?}");
    assert_eq!(world.asked_names(5).await, names);
    assert_eq!(world.asked().await.name(), "decoder-0 release");
}

#[tokio::test(start_paused = true)]
async fn picture_that_vision_refuses_is_named_by_its_place_in_the_request() {
    let mut world = World::new().await;
    *world.visions[0].encoding.lock().unwrap() = Encoding::Refuses("is not a picture");
    let error = ask(&world, chat(vec![text("?"), picture(b"bad"), picture(b"bad")])).await.error.unwrap();
    assert_eq!(error.code(), Code::InvalidArgument);
    let violations = field_violations(&error);
    assert_eq!(violations.len(), 2);
    assert_eq!(violations["messages[0].content[1].image.data"], "is not a picture");
    assert_eq!(violations["messages[0].content[2].image.data"], "is not a picture");
    assert_eq!(world.asked_names(3).await, ["decoder-0 reserve", "vision-0 encode", "decoder-0 release"]);

    let images = vec![pb::Image { data: "bad".into() }];
    let error = complete(&world, pb::GenerateRequest { prompt: "<image>".into(), images, ..Default::default() }).await.error.unwrap();
    assert!(field_violations(&error).contains_key("images[0].data"), "{error:?}");
}

#[tokio::test(start_paused = true)]
async fn inner_words_of_a_failing_peer_stay_inside() {
    let world = World::new().await;
    *world.visions[0].encoding.lock().unwrap() = Encoding::Fails(Code::Internal, "secret address 0x7f");
    let error = ask(&world, chat(vec![picture(b"one")])).await.error.unwrap();
    assert_eq!(error.code(), Code::Internal);
    assert!(error.message().contains("vision-0") && !error.message().contains("secret"), "{error:?}");
}

#[tokio::test(start_paused = true)]
async fn refusals_of_the_decoder_reach_the_caller() {
    for (code, retry) in [(Code::ResourceExhausted, true), (Code::OutOfRange, false), (Code::Unavailable, true)] {
        let mut world = World::new().await;
        *world.decoders[0].reserve.lock().unwrap() = Err(code);
        let error = ask(&world, chat(vec![picture(b"one")])).await.error.unwrap();
        assert_eq!((error.code(), error.get_details_retry_info().is_some()), (code, retry), "{error:?}");
        assert_eq!(world.asked().await.name(), "decoder-0 reserve");
        world.settle().await;
        assert_eq!(world.asked_more(), None, "nothing was encoded for nothing");
    }
}

#[tokio::test(start_paused = true)]
async fn prompt_past_the_context_is_out_of_range_before_anything_is_asked() {
    let mut world = World::new().await;
    let error = ask(&world, chat(vec![text(&"word ".repeat(600))])).await.error.unwrap();
    assert_eq!(error.code(), Code::OutOfRange);
    assert!(error.message().contains("limit is 512"), "{error:?}");
    assert_eq!(world.asked_more(), None);
}

#[tokio::test(start_paused = true)]
async fn answer_is_cut_to_what_the_context_leaves() {
    let mut world = World::new().await;
    let sampling = Some(pb::SamplingOptions { max_new_tokens: Some(100_000), ..Default::default() });
    ask(&world, pb::ChatRequest { sampling, ..chat(vec![text("?")]) }).await;
    let Asked::Reserve { request, .. } = world.asked().await else { panic!() };
    assert_eq!(request.prompt_tokens + request.max_new_tokens, 512);
}

#[tokio::test(start_paused = true)]
async fn stop_text_across_tokens_ends_the_answer_and_the_decoders_stream() {
    let mut world = World::new().await;
    let ids = spell(&world, "A pink ring and more").await;
    world.script([Script::TokensThenNothing(ids.clone())]);
    let answer = ask(&world, pb::ChatRequest { sampling: stop(&["zzz", "ink ri"]), ..chat(vec![text("?")]) }).await;
    assert_eq!(answer.text, "A p");
    assert!(answer.token_ids.len() < ids.len() && ids.starts_with(&answer.token_ids));
    assert_eq!(answer.reasons(), [pb::FinishReason::Stop]);
    assert_eq!(answer.finished.unwrap().usage.unwrap().completion_tokens as usize, answer.token_ids.len());
    assert_eq!(world.asked_names(3).await, ["decoder-0 reserve", "decoder-0 generate", "generate dropped"]);
}

#[tokio::test(start_paused = true)]
async fn start_of_a_stop_text_is_shown_when_the_rest_never_comes() {
    let world = World::new().await;
    let ids = spell(&world, "A pink").await;
    world.script([Script::Tokens(ids, FinishReason::Length)]);
    let answer = ask(&world, pb::ChatRequest { sampling: stop(&["pinkish"]), ..chat(vec![text("?")]) }).await;
    assert_eq!((answer.text.as_str(), answer.reasons()), ("A pink", vec![pb::FinishReason::Length]));
}

#[tokio::test(start_paused = true)]
async fn stop_text_in_bytes_that_end_the_answer_is_found() {
    let world = World::new().await;
    let bytes = |text: &str| text.bytes().map(|b| 3 + u32::from(b)).collect::<Vec<_>>();
    let ids = [vec![399], bytes("你好")].concat();
    world.script([Script::Tokens(ids, FinishReason::Length)]);
    let answer = ask(&world, pb::ChatRequest { sampling: stop(&["好"]), ..chat(vec![text("?")]) }).await;
    assert_eq!((answer.text.as_str(), answer.reasons()), ("A你", vec![pb::FinishReason::Stop]));
}

#[tokio::test(start_paused = true)]
async fn log_probabilities_come_with_their_tokens() {
    let mut world = World::new().await;
    world.script([Script::Logprobs(vec![399, 463])]);
    let sampling =
        Some(pb::SamplingOptions { logprobs: Some(2), seed: Some(7), top_k: Some(3), temperature: Some(0.5), ..Default::default() });
    let answer = ask(&world, pb::ChatRequest { sampling, ..chat(vec![text("?")]) }).await;
    assert_eq!(answer.logprobs.iter().map(|l| l.token_id).collect::<Vec<_>>(), [399, 463]);
    assert_eq!((answer.logprobs[0].logprob, answer.logprobs[0].top.len()), (-0.5, 2));
    world.asked().await;
    let Asked::Generate { request, .. } = world.asked().await else { panic!() };
    let sampling = request.sampling.unwrap();
    assert_eq!((sampling.logprobs, sampling.seed, sampling.top_k, sampling.temperature, sampling.top_p), (Some(2), Some(7), 3, 0.5, 1.0));
}

/// What the caller has of the prompt would come twice.
#[tokio::test(start_paused = true)]
async fn no_other_decoder_starts_over_once_a_part_of_the_prompt_was_sent() {
    let mut world = Setup { decoders: 2, ..Setup::default() }.ready().await;
    let top = vec![TokenLogprob { token_id: 5, logprob: -1.5 }];
    let part = PromptLogprobs { start: 1, tokens: vec![PromptToken { token_id: 7, logprob: -2.5, top }] };
    world.script([Script::PromptThenError(part, Code::Unavailable)]);
    let sampling = Some(pb::SamplingOptions { prompt_logprobs: Some(1), ..Default::default() });
    let answer = ask(&world, pb::ChatRequest { sampling, ..chat(vec![text("?")]) }).await;
    assert_eq!(answer.error.unwrap().code(), Code::Unavailable);
    let top = vec![pb::TopLogprob { token_id: 5, logprob: -1.5 }];
    let tokens = vec![pb::TokenLogprobs { token_id: 7, logprob: -2.5, top }];
    assert_eq!(answer.prompt_logprobs, [pb::PromptLogprobs { start: 1, tokens }]);
    let generated = world.asked_names(3).await.iter().filter(|name| name.ends_with("generate")).count();
    world.settle().await;
    assert_eq!((generated, world.asked_more()), (1, None));
}

#[tokio::test(start_paused = true)]
async fn every_sampling_option_reaches_the_decoder() {
    let mut world = World::new().await;
    let options = pb::SamplingOptions {
        max_new_tokens: Some(100_000),
        temperature: Some(0.5),
        top_p: Some(0.9),
        top_k: Some(3),
        seed: Some(7),
        stop: vec!["zzz".into()],
        logprobs: Some(2),
        min_p: Some(0.1),
        typical_p: Some(0.8),
        repetition_penalty: Some(1.2),
        presence_penalty: Some(0.3),
        frequency_penalty: Some(-0.4),
        logit_bias: [(5, -1.5), (6, 2.5)].into(),
        stop_token_ids: vec![8, 9],
        min_new_tokens: Some(100_000),
        ignore_eos: true,
        n: Some(3),
        prompt_logprobs: Some(4),
    };
    ask(&world, pb::ChatRequest { sampling: Some(options), priority: -7, ..chat(vec![text("?")]) }).await;
    world.asked().await;
    let Asked::Generate { request, .. } = world.asked().await else { panic!() };
    let expected = SamplingParams {
        temperature: 0.5,
        top_p: 0.9,
        top_k: 3,
        seed: Some(7),
        logprobs: Some(2),
        min_p: 0.1,
        typical_p: 0.8,
        repetition_penalty: 1.2,
        presence_penalty: 0.3,
        frequency_penalty: -0.4,
        logit_bias: [(5, -1.5), (6, 2.5)].into(),
        stop_token_ids: vec![8, 9],
        // As many as the context leaves.
        min_new_tokens: request.max_new_tokens,
        ignore_eos: true,
    };
    assert!(request.max_new_tokens < 100_000);
    assert_eq!((request.n, request.prompt_logprobs, request.priority), (3, Some(4), -7));
    assert_eq!(request.sampling, Some(expected));
}

#[tokio::test(start_paused = true)]
async fn caller_that_goes_away_while_encoding_releases_the_reservation() {
    let mut world = World::new().await;
    *world.visions[0].encoding.lock().unwrap() = Encoding::Never;
    let stream = world.client().chat(chat(vec![picture(b"one")])).await.unwrap().into_inner();
    assert_eq!(world.asked_names(2).await, ["decoder-0 reserve", "vision-0 encode"]);
    drop(stream);
    let mut names = world.asked_names(2).await;
    names.sort();
    assert_eq!(names, ["decoder-0 release", "encode dropped"]);
}

#[tokio::test(start_paused = true)]
async fn caller_that_goes_away_while_generating_cancels_the_decoders_stream() {
    let mut world = World::new().await;
    world.script([Script::TokensThenNothing(vec![399])]);
    let mut stream = world.client().chat(chat(vec![text("?")])).await.unwrap().into_inner();
    assert!(matches!(next(&mut stream).await, Event::Started(_)));
    assert!(matches!(next(&mut stream).await, Event::Delta(_)));
    drop(stream);
    assert_eq!(world.asked_names(3).await, ["decoder-0 reserve", "decoder-0 generate", "generate dropped"]);
}

#[tokio::test(start_paused = true)]
async fn deadline_ends_the_request_and_is_passed_on() {
    let mut world = World::new().await;
    *world.visions[0].encoding.lock().unwrap() = Encoding::Never;
    let mut request = Request::new(chat(vec![picture(b"one")]));
    request.set_timeout(Duration::from_millis(300));
    let error = ask(&world, request).await.error.unwrap();
    assert_eq!(error.code(), Code::DeadlineExceeded, "{error:?}");
    assert_eq!(world.asked().await.name(), "decoder-0 reserve");
    let Asked::Encode { timeout, .. } = world.asked().await else { panic!() };
    let micros: u64 = timeout.unwrap().trim_end_matches('u').parse().unwrap();
    assert!((300_000..=400_000).contains(&micros), "{micros}");
    let mut names = world.asked_names(2).await;
    names.sort();
    assert_eq!(names, ["decoder-0 release", "encode dropped"]);
}

#[tokio::test(start_paused = true)]
async fn decoder_that_stops_talking_is_unavailable() {
    let world = Setup { config: GatewayConfig { token_timeout_ms: 1000, ..Default::default() }, ..Default::default() }.ready().await;
    world.script([Script::TokensThenNothing(vec![399])]);
    let answer = ask(&world, chat(vec![text("?")])).await;
    let error = answer.error.unwrap();
    assert_eq!((error.code(), answer.text.as_str()), (Code::Unavailable, "A"));
    assert!(error.message().contains("decoder-0"), "{error:?}");
}

#[tokio::test(start_paused = true)]
async fn one_request_too_many_is_told_to_retry() {
    let config = GatewayConfig { max_concurrent_requests: 1, ..Default::default() };
    let world = Setup { config, ..Default::default() }.ready().await;
    world.script([Script::TokensThenNothing(vec![399])]);
    let mut first = world.client().chat(chat(vec![text("?")])).await.unwrap().into_inner();
    next(&mut first).await;
    let error = ask(&world, chat(vec![text("?")])).await.error.unwrap();
    assert_eq!(error.code(), Code::ResourceExhausted);
    assert!(error.get_details_retry_info().is_some_and(|info| info.retry_delay.is_some()));
    drop(first);
    world.settle().await;
    world.script([Script::Tokens(vec![399], FinishReason::Stop)]);
    assert!(ask(&world, chat(vec![text("?")])).await.error.is_none(), "the permit is free again");
}

#[tokio::test(start_paused = true)]
async fn shutdown_refuses_new_calls_then_ends_running_ones() {
    let world = World::new().await;
    world.script([Script::TokensThenNothing(vec![399])]);
    let mut running = world.client().chat(chat(vec![text("?")])).await.unwrap().into_inner();
    assert!(matches!(next(&mut running).await, Event::Started(_)));
    world.shutdown.stop_accepting.cancel();
    assert_eq!(ask(&world, chat(vec![text("?")])).await.error.unwrap().code(), Code::Unavailable);
    assert!(matches!(next(&mut running).await, Event::Delta(_)), "what runs goes on");
    world.shutdown.cancel.cancel();
    assert_eq!(running.message().await.unwrap_err().code(), Code::Unavailable);
}

#[tokio::test(start_paused = true)]
async fn every_problem_of_a_request_is_named() {
    let mut world = World::new().await;
    let request = pb::ChatRequest {
        messages: vec![
            pb::Message { role: 0, content: vec![pb::ContentPart { part: None }, picture(b"")] },
            pb::Message { role: 9, content: vec![] },
        ],
        image_options: Some(pb::ImageOptions { split: None, longest_edge: Some(9999), shortest_edge: Some(3) }),
        sampling: Some(pb::SamplingOptions {
            max_new_tokens: Some(0),
            temperature: Some(f32::NAN),
            top_p: Some(0.0),
            stop: vec![String::new()],
            logprobs: Some(21),
            logit_bias: [(7, 101.0)].into(),
            stop_token_ids: vec![1, u32::MAX],
            ..Default::default()
        }),
        return_prompt_token_ids: false,
        cache_salt: vec![0; 257].into(),
        priority: 11,
    };
    let error = ask(&world, request).await.error.unwrap();
    assert_eq!(error.code(), Code::InvalidArgument);
    let mut fields: Vec<String> = field_violations(&error).into_keys().collect();
    fields.sort();
    let expected = [
        "cache_salt",
        "image_options.longest_edge",
        "image_options.shortest_edge",
        "messages[0].content[0]",
        "messages[0].content[1].image.data",
        "messages[0].role",
        "messages[1].content",
        "messages[1].role",
        "priority",
        "sampling.logit_bias[7]",
        "sampling.logprobs",
        "sampling.max_new_tokens",
        "sampling.stop[0]",
        "sampling.stop_token_ids[1]",
        "sampling.temperature",
        "sampling.top_p",
    ];
    assert_eq!(fields, expected);
    assert_eq!(world.asked_more(), None);
}

#[tokio::test(start_paused = true)]
async fn marks_and_pictures_must_be_as_many() {
    let world = World::new().await;
    let images = vec![pb::Image { data: "x".into() }];
    let request = pb::GenerateRequest { prompt: "<image> and <image>".into(), images, ..Default::default() };
    let error = complete(&world, request).await.error.unwrap();
    let violations = field_violations(&error);
    assert!(violations["prompt"].contains('2') && violations["prompt"].contains('1'), "{violations:?}");
    let request = pb::GenerateRequest { prompt: "<fake_token_around_image>".into(), ..Default::default() };
    let error = complete(&world, request).await.error.unwrap();
    assert_eq!(error.code(), Code::InvalidArgument);
}

#[tokio::test(start_paused = true)]
async fn base_checkpoint_points_to_generate() {
    let mut checkpoint = support::checkpoint();
    checkpoint.chat_template = None;
    let world = Setup { checkpoint, ..Default::default() }.ready().await;
    let error = ask(&world, chat(vec![text("?")])).await.error.unwrap();
    assert_eq!(error.code(), Code::FailedPrecondition);
    assert!(error.message().contains("Generate"));
    assert!(complete(&world, pb::GenerateRequest { prompt: "x".into(), ..Default::default() }).await.error.is_none());
}

#[tokio::test(start_paused = true)]
async fn encoded_pictures_come_back_in_the_order_asked() {
    let mut world = World::new().await;
    let images = [&b"1"[..], b"2", b"1"].map(|data| pb::Image { data: data.into() }).to_vec();
    let image_options = Some(pb::ImageOptions { split: Some(true), ..Default::default() });
    let response = world.client().encode_images(pb::EncodeImagesRequest { images, image_options }).await.unwrap().into_inner();
    let tensor = response.image_tokens.unwrap();
    assert_eq!((tensor.shape, response.sub_images), (vec![3 * 80, 256], vec![5, 5, 5]));
    let each = tensor.data.len() / 3;
    assert_eq!([tensor.data[0], tensor.data[each], tensor.data[2 * each]], [b'1', b'2', b'1']);
    assert_eq!(response.timings.unwrap().encode_ms, 6.0);
    assert_eq!(world.asked_names(2).await, ["vision-0 encode", "vision-0 encode"]);
    assert_eq!(world.asked_more(), None);
}

#[tokio::test(start_paused = true)]
async fn model_is_described() {
    let world = World::new().await;
    let model = world.client().get_model(pb::GetModelRequest {}).await.unwrap().into_inner();
    assert_eq!((model.fingerprint.as_str(), model.max_model_tokens, model.vocab_size), (support::FINGERPRINT, 512, 603));
    assert_eq!((model.hidden_size, model.tokens_per_image, model.stop_token_ids), (256, 16, vec![2, 602]));
    let options = model.default_image_options.unwrap();
    assert_eq!((options.split, options.longest_edge, options.shortest_edge), (Some(false), Some(168), Some(56)));
}

//! Several replicas: readiness, choice, and what happens when one is down.

mod support;

use idefics_common::checkpoint::{Checkpoint, Source};
use idefics_proto::{decoder::v1::FinishReason, gateway::v1 as pb};
use std::{collections::HashSet, sync::atomic::Ordering};
use support::{Encoding, Script, Setup, ask, chat, picture, text};
use tonic::Code;

fn two() -> Setup {
    Setup { decoders: 2, visions: 2, ..Default::default() }
}

#[tokio::test(start_paused = true)]
async fn readiness_follows_the_peers() {
    let world = Setup::default().build();
    let mut ready = world.gateway.watch_ready();
    assert!(!*ready.borrow());
    ready.wait_for(|ready| *ready).await.unwrap();
    *world.visions[0].silent.lock().unwrap() = true;
    ready.wait_for(|ready| !*ready).await.unwrap();
    let error = ask(&world, chat(vec![picture(b"one")])).await.error.unwrap();
    assert_eq!(error.code(), Code::Unavailable);
    assert!(error.message().contains("vision-0"), "{error:?}");
    *world.visions[0].silent.lock().unwrap() = false;
    ready.wait_for(|ready| *ready).await.unwrap();
    assert!(ask(&world, chat(vec![picture(b"one")])).await.error.is_none());
}

#[tokio::test(start_paused = true)]
async fn decoder_that_is_not_there_is_named() {
    let world = Setup::default().build();
    *world.decoders[0].silent.lock().unwrap() = true;
    world.settle().await;
    let error = ask(&world, chat(vec![text("?")])).await.error.unwrap();
    assert_eq!(error.code(), Code::Unavailable);
    assert!(error.message().contains("no decoder is ready: decoder-0 does not answer"), "{error:?}");
    assert_eq!(world.client().get_model(pb::GetModelRequest {}).await.unwrap_err().code(), Code::Unavailable);
}

#[tokio::test(start_paused = true)]
async fn peers_of_another_checkpoint_are_not_used() {
    let world = Setup { decoders: 3, visions: 2, ..Default::default() }.build();
    *world.decoders[0].fingerprint.lock().unwrap() = "f2".into();
    *world.visions[1].fingerprint.lock().unwrap() = "f2".into();
    world.settle().await;
    let mut world = world;
    let mut asked = HashSet::new();
    for i in 0..8u8 {
        assert!(ask(&world, chat(vec![picture(&[i])])).await.error.is_none());
        asked.extend(world.asked_names(4).await);
    }
    assert!(!asked.contains("decoder-0 reserve") && !asked.contains("vision-1 encode"), "{asked:?}");
    assert!(asked.contains("decoder-1 reserve") && asked.contains("decoder-2 reserve"), "{asked:?}");
    assert_eq!(world.client().get_model(pb::GetModelRequest {}).await.unwrap().into_inner().fingerprint, support::FINGERPRINT);

    // The deployment moves on, one decoder after the other.
    *world.decoders[1].fingerprint.lock().unwrap() = "f2".into();
    world.settle().await;
    assert_eq!(world.client().get_model(pb::GetModelRequest {}).await.unwrap().into_inner().fingerprint, "f2");
}

#[tokio::test(start_paused = true)]
async fn peers_of_another_shape_are_not_used() {
    let world = Setup::default().build();
    *world.visions[0].hidden_size.lock().unwrap() = 4096;
    world.settle().await;
    assert!(!*world.gateway.watch_ready().borrow());
    let error = ask(&world, chat(vec![picture(b"one")])).await.error.unwrap();
    assert!(error.message().contains("4096") && error.message().contains("256"), "{error:?}");
}

#[tokio::test(start_paused = true)]
async fn peers_with_other_files_than_the_gateways_are_not_used() {
    for (role, file) in [("decoder-0", "config.json"), ("decoder-0", "tokenizer.json"), ("vision-0", "preprocessor_config.json")] {
        let world = Setup::default().build();
        let peer = if role == "decoder-0" { &world.decoders[0] } else { &world.visions[0] };
        let before = peer.file_hashes.lock().unwrap().insert(file.into(), "0123456789abcdef".into()).unwrap();
        world.settle().await;
        assert!(!*world.gateway.watch_ready().borrow());
        let error = ask(&world, chat(vec![picture(b"one")])).await.error.unwrap();
        assert_eq!(error.code(), Code::Unavailable);
        for expected in [role, file, "0123456789ab", &before[..12], "--model"] {
            assert!(error.message().contains(expected), "no {expected} in {error:?}");
        }
        // Started anew with the right files, it is used from the next probe on.
        peer.file_hashes.lock().unwrap().insert(file.into(), before);
        world.gateway.wait_ready().await;
        assert!(ask(&world, chat(vec![picture(b"one")])).await.error.is_none());
    }
}

#[tokio::test(start_paused = true)]
async fn peers_unlike_the_gateway_do_not_decide_what_is_served() {
    let world = Setup { decoders: 3, ..Default::default() }.build();
    for decoder in &world.decoders[..2] {
        *decoder.fingerprint.lock().unwrap() = "f2".into();
        decoder.file_hashes.lock().unwrap().insert("config.json".into(), "another".into());
    }
    world.settle().await;
    assert!(ask(&world, chat(vec![picture(b"one")])).await.error.is_none());
    assert_eq!(world.client().get_model(pb::GetModelRequest {}).await.unwrap().into_inner().fingerprint, support::FINGERPRINT);
}

#[tokio::test(start_paused = true)]
async fn gateway_with_weights_serves_its_own_checkpoint_only() {
    let checkpoint = Checkpoint::open(Source::Folder(support::demo())).unwrap();
    let ours = checkpoint.fingerprint().unwrap();
    let world = Setup { checkpoint, ..Default::default() }.build();
    world.settle().await;
    let error = ask(&world, chat(vec![picture(b"one")])).await.error.unwrap();
    let expected = format!("decoder-0 serves the checkpoint {}, expected {ours}, the gateway's own", support::FINGERPRINT);
    assert!(error.code() == Code::Unavailable && error.message().contains(&expected), "{error:?}");
    for peer in world.decoders.iter().chain(&world.visions) {
        peer.fingerprint.lock().unwrap().clone_from(&ours);
    }
    world.gateway.wait_ready().await;
    assert!(ask(&world, chat(vec![picture(b"one")])).await.error.is_none());
}

#[tokio::test(start_paused = true)]
async fn the_same_picture_goes_to_the_same_replicas() {
    let mut world = two().ready().await;
    let mut used = HashSet::new();
    for i in 0..16u8 {
        ask(&world, chat(vec![picture(&[i])])).await;
        let first = world.asked_names(4).await;
        ask(&world, chat(vec![picture(&[i]), text("And?")])).await;
        let again = world.asked_names(3).await;
        assert_eq!([&first[0], &first[2]], [&again[0], &again[1]], "the decoder still has the tokens");
        used.extend(first);
    }
    for name in ["decoder-0 reserve", "decoder-1 reserve", "vision-0 encode", "vision-1 encode"] {
        assert!(used.contains(name), "{name} is used too");
    }
}

#[tokio::test(start_paused = true)]
async fn loaded_decoder_is_passed_over() {
    let mut world = two().ready().await;
    world.script([Script::TokensThenNothing(vec![399])]);
    let mut decoders = HashSet::new();
    let mut streams = Vec::new();
    for _ in 0..12 {
        let mut stream = world.client().chat(chat(vec![picture(b"one")])).await.unwrap().into_inner();
        stream.message().await.unwrap();
        stream.message().await.unwrap();
        streams.push(stream);
        loop {
            let name = world.asked().await.name();
            if name.ends_with("generate") {
                decoders.insert(name);
                break;
            }
        }
    }
    assert_eq!(decoders.len(), 2, "{decoders:?}");
}

#[tokio::test(start_paused = true)]
async fn decoder_with_one_request_for_many_answers_is_loaded() {
    let mut world = two().ready().await;
    world.script([Script::TokensThenNothing(vec![399])]);
    let (mut decoders, mut streams) = (Vec::new(), Vec::new());
    for n in [1, 8, 1] {
        let sampling = Some(pb::SamplingOptions { n: Some(n), ..Default::default() });
        let mut stream = world.client().chat(pb::ChatRequest { sampling, ..chat(vec![text("?")]) }).await.unwrap().into_inner();
        stream.message().await.unwrap();
        stream.message().await.unwrap();
        streams.push(stream);
        decoders.push(world.asked_names(2).await.remove(1));
    }
    assert!(decoders[0] == decoders[1] && decoders[1] != decoders[2], "{decoders:?}");
}

#[tokio::test(start_paused = true)]
async fn full_or_failing_decoder_gives_way_to_another() {
    for code in [Code::ResourceExhausted, Code::Unavailable] {
        let mut world = two().ready().await;
        // Whichever is preferred for this picture: find it, then make it refuse.
        ask(&world, chat(vec![picture(b"one")])).await;
        let preferred = world.asked_names(4).await[0].clone();
        let (refusing, other) = if preferred == "decoder-0 reserve" { (0, "decoder-1") } else { (1, "decoder-0") };
        *world.decoders[refusing].reserve.lock().unwrap() = Err(code);
        assert!(ask(&world, chat(vec![picture(b"one")])).await.error.is_none());
        let names = world.asked_names(4).await;
        assert_eq!([names[0].clone(), names[1].clone()], [preferred, format!("{other} reserve")]);
        assert!(names[2].ends_with("encode") && names[3] == format!("{other} generate"), "{names:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn decoder_that_fails_before_the_first_token_is_replaced_and_the_caller_does_not_notice() {
    let world = two().ready().await;
    world.script([Script::Error(Code::Unavailable), Script::Tokens(vec![399], FinishReason::Stop)]);
    // Each decoder fails once: the second one too, so the request fails; from then on they work.
    let answer = ask(&world, chat(vec![text("?")])).await;
    assert_eq!((answer.error.unwrap().code(), answer.started.len()), (Code::Unavailable, 1));

    let world = two().ready().await;
    for (decoder, script) in world.decoders.iter().zip([Script::Error(Code::Unavailable), Script::Tokens(vec![399], FinishReason::Stop)]) {
        *decoder.scripts.lock().unwrap() = [script].into();
    }
    for i in 0..8u8 {
        let answer = ask(&world, chat(vec![picture(&[i])])).await;
        assert!(answer.error.is_none(), "{:?}", answer.error);
        assert_eq!((answer.started.len(), answer.text.as_str()), (1, "A"));
    }
}

#[tokio::test(start_paused = true)]
async fn decoder_that_fails_after_the_first_token_ends_the_answer() {
    let mut world = two().ready().await;
    world.script([Script::TokensThenError(vec![399], Code::Unavailable)]);
    let answer = ask(&world, chat(vec![text("?")])).await;
    let error = answer.error.unwrap();
    assert_eq!((error.code(), answer.text.as_str()), (Code::Unavailable, "A"));
    assert!(error.message().contains("decoder-"), "{error:?}");
    assert_eq!(world.asked_names(3).await[2], "generate dropped");
    assert_eq!(world.asked_more(), None);
}

#[tokio::test(start_paused = true)]
async fn vision_that_is_down_gives_way_to_another() {
    let mut world = two().ready().await;
    ask(&world, chat(vec![picture(b"one")])).await;
    let preferred = world.asked_names(4).await[1].clone();
    let failing = usize::from(preferred == "vision-1 encode");
    *world.visions[failing].encoding.lock().unwrap() = Encoding::Fails(Code::Unavailable, "draining");
    world.decoders.iter().for_each(|decoder| decoder.stored.lock().unwrap().clear());
    assert!(ask(&world, chat(vec![picture(b"one")])).await.error.is_none());
    let names = world.asked_names(4).await;
    assert_eq!(names[1..3], [preferred, format!("vision-{} encode", 1 - failing)]);
}

#[tokio::test(start_paused = true)]
async fn engines_that_have_ended_are_passed_over_and_asked_about_at_once() {
    let mut world = two().ready().await;
    ask(&world, chat(vec![picture(b"one")])).await;
    let names = world.asked_names(4).await;
    let (decoder, vision) = (usize::from(names[0] == "decoder-1 reserve"), usize::from(names[1] == "vision-1 encode"));
    // As both roles answer when their engine's thread has ended.
    *world.decoders[decoder].reserve.lock().unwrap() = Err(Code::Unavailable);
    *world.visions[vision].encoding.lock().unwrap() = Encoding::Fails(Code::Unavailable, "the vision engine has ended");
    *world.decoders[decoder].silent.lock().unwrap() = true;
    *world.visions[vision].silent.lock().unwrap() = true;
    assert!(ask(&world, chat(vec![picture(b"one")])).await.error.is_none());
    let names = world.asked_names(5).await;
    let [first, second] = [decoder, 1 - decoder].map(|i| format!("decoder-{i} reserve"));
    let [third, fourth] = [vision, 1 - vision].map(|i| format!("vision-{i} encode"));
    assert_eq!(names[..4], [first, second.clone(), third, fourth.clone()]);
    // The clock has not moved, so no probe was due by itself.
    world.decoders.iter().for_each(|decoder| decoder.stored.lock().unwrap().clear());
    assert!(ask(&world, chat(vec![picture(b"one")])).await.error.is_none());
    assert_eq!(world.asked_names(3).await[1..], [second, fourth], "behind the end of the first stream");
}

#[tokio::test(start_paused = true)]
async fn vision_that_may_not_ship_names_the_setting() {
    let world = Setup::default().ready().await;
    *world.visions[0].encoding.lock().unwrap() = Encoding::MayNotShip;
    let error = ask(&world, chat(vec![picture(b"one")])).await.error.unwrap();
    assert_eq!(error.code(), Code::FailedPrecondition);
    let expected = "vision vision-0 may not ship to decoder-0; add \"decoder-0\" to its vision.allowed_decoders";
    assert_eq!(error.message(), expected);
}

#[tokio::test(start_paused = true)]
async fn decoder_that_dies_is_named_and_taken_out_until_it_is_back() {
    let world = Setup::default().ready().await;
    let dead = &world.decoders[0].dead;
    dead.store(true, Ordering::Relaxed);
    let error = ask(&world, chat(vec![text("?")])).await.error.unwrap();
    assert_eq!((error.code(), error.message()), (Code::Unavailable, "decoder decoder-0 is not reachable; retry later"));
    let mut ready = world.gateway.watch_ready();
    ready.wait_for(|ready| !*ready).await.unwrap();
    dead.store(false, Ordering::Relaxed);
    ready.wait_for(|ready| *ready).await.unwrap();
    assert!(ask(&world, chat(vec![text("?")])).await.error.is_none());
}

#[tokio::test(start_paused = true)]
async fn requests_survive_the_death_of_one_decoder_of_two() {
    let mut world = two().ready().await;
    ask(&world, chat(vec![picture(b"one")])).await;
    let preferred = usize::from(world.asked_names(4).await[0] == "decoder-1 reserve");
    world.decoders[preferred].dead.store(true, Ordering::Relaxed);
    for _ in 0..3 {
        assert!(ask(&world, chat(vec![picture(b"one")])).await.error.is_none());
    }
}

//! Several answers to one prompt, and what of them the caller gets.

mod support;

use idefics_proto::{decoder::v1::FinishReason, gateway::v1 as pb};
use support::{Answer, Asked, Script, World, ask, chat, text};
use tonic::Code;

// Of the demo's vocabulary.
const A: u32 = 399;
const PINK: u32 = 463;
const RING: u32 = 483;

fn request(n: u32, stop: &str) -> pb::ChatRequest {
    let stop = Vec::from_iter((!stop.is_empty()).then(|| stop.to_owned()));
    pb::ChatRequest { sampling: Some(pb::SamplingOptions { n: Some(n), stop, ..Default::default() }), ..chat(vec![text("?")]) }
}

fn text_of(answer: &Answer, choice: u32) -> String {
    answer.deltas.iter().filter(|delta| delta.choice == choice).map(|delta| delta.text.as_str()).collect()
}

#[tokio::test(start_paused = true)]
async fn each_choice_has_its_own_text_and_end() {
    let mut world = World::new().await;
    let tokens = vec![(0, A), (1, PINK), (2, A), (1, RING), (0, PINK), (2, RING), (0, RING)];
    let ends = vec![(1, FinishReason::Stop), (0, FinishReason::Length), (2, FinishReason::Stop)];
    world.script([Script::Choices(tokens, ends)]);
    let answer = ask(&world, request(3, "")).await;
    assert_eq!([0, 1, 2].map(|choice| text_of(&answer, choice)), ["A pink ring", "pink ring", "A ring"]);
    assert_eq!(answer.reasons(), [pb::FinishReason::Length, pb::FinishReason::Stop, pb::FinishReason::Stop]);
    let finished = answer.finished.unwrap();
    assert_eq!(finished.usage.unwrap().completion_tokens, 7);
    let timings = finished.timings.unwrap();
    assert_eq!((timings.queue_ms, timings.prefill_ms, timings.decode_ms), (1.0, 2.0, 5.0), "up to the end of the last choice");
    let Asked::Reserve { request: reserve, .. } = world.asked().await else { panic!() };
    let Asked::Generate { request: generate, .. } = world.asked().await else { panic!() };
    assert_eq!((reserve.n, generate.n), (3, 3));
    assert_eq!(world.asked().await.name(), "generate dropped");
}

#[tokio::test(start_paused = true)]
async fn stop_text_ends_its_choice_only_and_the_decoder_is_told() {
    let mut world = World::new().await;
    // What the decoder sends of choice 0 before it hears of the end is nobody's.
    let tokens = vec![(0, A), (0, PINK), (1, A), (0, RING), (1, RING)];
    let ends = vec![(0, FinishReason::Cancelled), (1, FinishReason::Length)];
    world.script([Script::Choices(tokens, ends)]);
    let answer = ask(&world, request(2, "ink")).await;
    assert_eq!([0, 1].map(|choice| text_of(&answer, choice)), ["A p", "A ring"]);
    assert_eq!(answer.reasons(), [pb::FinishReason::Stop, pb::FinishReason::Length]);
    assert_eq!(answer.finished.unwrap().usage.unwrap().completion_tokens, 4);
    let mut asked = Vec::new();
    for _ in 0..4 {
        asked.push(world.asked().await);
    }
    let (Asked::Reserve { request: reserve, .. }, Some(Asked::CancelChoice { request: cancel, .. })) =
        (&asked[0], asked.iter().find(|asked| matches!(asked, Asked::CancelChoice { .. })))
    else {
        panic!("{asked:?}")
    };
    assert_eq!((&cancel.request_id, cancel.choice), (&reserve.request_id, 0));
}

#[tokio::test(start_paused = true)]
async fn last_choice_that_a_stop_text_ends_drops_the_stream() {
    let mut world = World::new().await;
    world.script([Script::Choices(vec![(1, PINK), (0, A), (0, PINK)], vec![])]);
    let answer = ask(&world, request(2, "ink")).await;
    assert_eq!(answer.reasons(), [pb::FinishReason::Stop; 2]);
    let timings = answer.finished.unwrap().timings.unwrap();
    assert_eq!((timings.queue_ms, timings.prefill_ms), (1.0, 2.0), "known since the first token");
    let mut names = world.asked_names(4).await;
    names.sort();
    assert_eq!(names, ["decoder-0 cancel choice 1", "decoder-0 generate", "decoder-0 reserve", "generate dropped"]);
    world.settle().await;
    assert_eq!(world.asked_more(), None);
}

#[tokio::test(start_paused = true)]
async fn choice_that_was_not_asked_for_is_the_decoders_fault() {
    let world = World::new().await;
    for script in [Script::Choices(vec![(2, A)], vec![]), Script::Choices(vec![], vec![(7, FinishReason::Stop)])] {
        world.script([script]);
        let error = ask(&world, request(2, "")).await.error.unwrap();
        assert_eq!(error.code(), Code::Internal, "{error:?}");
    }
}

//! What clients may hold: permits, bodies, buffers. Requests are sent by hand where their bodies matter.

mod support;

use bytes::Bytes;
use futures::stream;
use http_body::Frame;
use idefics_common::channel::in_process;
use idefics_gateway::GatewayConfig;
use idefics_proto::{
    decoder::v1::FinishReason,
    gateway::v1::{self as pb, gateway_service_server::GatewayService, generation_event::Event},
};
use std::{
    sync::{Arc, Weak},
    time::Duration,
};
use support::{END_OF_UTTERANCE, Script, Setup, World, ask, chat, picture, text};
use tonic::{
    Code, Request, Status, Streaming,
    body::Body,
    codegen::{Service, http},
};
use tonic_types::StatusExt;

/// One request at a time, and clients that may pause for a second.
async fn narrow() -> World {
    let config = GatewayConfig { max_concurrent_requests: 1, stalled_client_ms: 1_000, ..Default::default() };
    Setup { config, ..Default::default() }.ready().await
}

/// A body of these parts that then neither goes on nor ends.
fn unfinished(parts: impl IntoIterator<Item = Bytes>) -> Body {
    let parts: Vec<_> = parts.into_iter().map(|part| Ok::<_, Status>(Frame::data(part))).collect();
    Body::new(http_body_util::StreamBody::new(futures::StreamExt::chain(stream::iter(parts), stream::pending())))
}

/// Calls a method with a body, and returns the status with which it ended before any message.
async fn call(world: &World, method: &str, body: Body) -> Status {
    let uri = format!("/idefics.gateway.v1.GatewayService/{method}");
    let request = http::Request::post(uri).header("content-type", "application/grpc").body(body).unwrap();
    let response = in_process(world.gateway.clone().into_server()).call(request).await.unwrap();
    Status::from_header_map(response.headers()).expect("no message came")
}

async fn started(world: &World) -> Streaming<pb::ChatResponse> {
    let mut stream = world.client().chat(chat(vec![text("?")])).await.unwrap().into_inner();
    let first = stream.message().await.unwrap().unwrap().event.unwrap().event.unwrap();
    assert!(matches!(first, Event::Started(_)));
    stream
}

#[tokio::test(start_paused = true)]
async fn request_too_many_is_refused_before_its_body_is_read() {
    let world = narrow().await;
    world.script([Script::TokensThenNothing(vec![399])]);
    let running = started(&world).await;
    for method in ["Chat", "Generate", "EncodeImages", "Tokenize"] {
        // The body never ends: it is not waited for.
        let status = call(&world, method, unfinished([])).await;
        assert_eq!(status.code(), Code::ResourceExhausted, "{method}");
        assert!(status.get_details_retry_info().is_some_and(|info| info.retry_delay.is_some()));
        assert!(status.get_details_request_info().is_some_and(|info| !info.request_id.is_empty()));
    }
    world.client().get_model(pb::GetModelRequest {}).await.expect("what takes no work is answered");
    drop(running);
    world.settle().await;
    world.script([Script::Tokens(vec![399], FinishReason::Stop)]);
    assert!(ask(&world, chat(vec![text("?")])).await.error.is_none(), "the permit is free again");
}

#[tokio::test(start_paused = true)]
async fn draining_gateway_refuses_before_the_body_is_read() {
    let world = narrow().await;
    world.shutdown.stop_accepting.cancel();
    assert_eq!(call(&world, "Chat", unfinished([])).await.code(), Code::Unavailable);
}

#[tokio::test(start_paused = true)]
async fn upload_counts_as_a_request_until_its_client_goes() {
    let world = narrow().await;
    let mut upload = Box::pin(call(&world, "Chat", unfinished([Bytes::from_static(b"\0\0\0")])));
    assert!(futures::poll!(&mut upload).is_pending());
    assert_eq!(ask(&world, chat(vec![text("?")])).await.error.unwrap().code(), Code::ResourceExhausted);
    drop(upload);
    assert!(ask(&world, chat(vec![text("?")])).await.error.is_none());
}

#[tokio::test(start_paused = true)]
async fn upload_that_pauses_is_given_up() {
    let world = narrow().await;
    let status = call(&world, "EncodeImages", unfinished([Bytes::from_static(b"\0\0\0\0\x09abc")])).await;
    assert_eq!(status.code(), Code::DeadlineExceeded);
    assert!(status.message().contains("gateway.stalled_client_ms"), "{status:?}");
    assert!(ask(&world, chat(vec![text("?")])).await.error.is_none(), "the permit is free again");
}

#[tokio::test(start_paused = true)]
async fn upload_that_outlasts_its_deadline_is_given_up() {
    let world = narrow().await;
    let request = http::Request::post("/idefics.gateway.v1.GatewayService/Chat").header("content-type", "application/grpc");
    let request = request.header("grpc-timeout", "500m").body(unfinished([Bytes::from_static(b"\0\0\0")])).unwrap();
    let response = in_process(world.gateway.clone().into_server()).call(request).await.unwrap();
    let status = Status::from_header_map(response.headers()).expect("no message came");
    assert_eq!(status.code(), Code::DeadlineExceeded);
    assert!(status.message().contains("500 ms after receipt"), "{status:?}");
    assert!(ask(&world, chat(vec![text("?")])).await.error.is_none(), "the permit is free again");
}

#[tokio::test(start_paused = true)]
async fn upload_that_is_slow_but_goes_on_is_served() {
    let world = narrow().await;
    let message = prost::Message::encode_to_vec(&pb::TokenizeRequest {
        input: Some(pb::tokenize_request::Input::Text("A pink ring.".into())),
        image_options: None,
    });
    let frame = [&[0, 0, 0, 0, message.len() as u8][..], &message].concat();
    // Half a second a byte: longer than the limit in all.
    let bytes = futures::StreamExt::then(stream::iter(frame), async |byte| {
        tokio::time::sleep(Duration::from_millis(500)).await;
        Ok::<_, Status>(Frame::data(Bytes::from(vec![byte])))
    });
    let uri = "/idefics.gateway.v1.GatewayService/Tokenize";
    let request = http::Request::post(uri).header("content-type", "application/grpc");
    let request = request.body(Body::new(http_body_util::StreamBody::new(Box::pin(bytes)))).unwrap();
    let response = in_process(world.gateway.clone().into_server()).call(request).await.unwrap();
    assert!(Status::from_header_map(response.headers()).is_none(), "a message came");
}

#[tokio::test(start_paused = true)]
async fn small_questions_have_no_room_for_large_bodies() {
    let world = narrow().await;
    let status = call(&world, "GetModel", unfinished([Bytes::from_static(b"\0\x01\0\0\0"), vec![0; 5000].into()])).await;
    assert_eq!(status.code(), Code::OutOfRange);
}

#[tokio::test(start_paused = true)]
async fn client_that_does_not_read_loses_its_request() {
    let world = narrow().await;
    world.script([Script::TokensThenNothing(vec![399; 100])]);
    let mut stream = world.client().chat(chat(vec![text("?")])).await.unwrap().into_inner();
    // Time passes while nobody reads.
    world.settle().await;
    world.script([Script::Tokens(vec![399], FinishReason::Stop)]);
    assert!(ask(&world, chat(vec![text("?")])).await.error.is_none(), "the permit is free again");
    let mut events = 0;
    let error = loop {
        match stream.message().await {
            Ok(message) => assert!(message.is_some(), "an answer that is cut off ends with an error"),
            Err(status) => break status,
        }
        events += 1;
    };
    assert!(events < 100, "{events} events were kept");
    assert_eq!(error.code(), Code::DeadlineExceeded);
    assert!(error.message().contains("gateway.stalled_client_ms"), "{error:?}");
}

#[tokio::test(start_paused = true)]
async fn client_that_reads_slowly_is_served() {
    let world = narrow().await;
    world.script([Script::Tokens(vec![399; 100], FinishReason::Stop)]);
    let mut stream = started(&world).await;
    let mut events = 1;
    while stream.message().await.unwrap().is_some() {
        events += 1;
        // Longer than the limit in all; a buffer full of events, which comes as one, in less.
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // The tokens, the end of the choice, and what surrounds them.
    assert_eq!(events, 103);
}

/// A picture's bytes, and a handle that is gone when they are freed.
fn observed(data: &'static [u8]) -> (Bytes, Weak<()>) {
    struct Observed(&'static [u8], #[expect(dead_code, reason = "lives as long as the bytes")] Arc<()>);
    impl AsRef<[u8]> for Observed {
        fn as_ref(&self) -> &[u8] {
            self.0
        }
    }
    let alive = Arc::new(());
    let handle = Arc::downgrade(&alive);
    (Bytes::from_owner(Observed(data, alive)), handle)
}

#[tokio::test(start_paused = true)]
async fn pictures_are_freed_at_the_first_token() {
    let world = World::new().await;
    world.script([Script::TokensThenNothing(vec![399])]);
    let (data, held) = observed(b"one");
    let mut request = chat(vec![text("?"), picture(b"")]);
    request.messages[0].content[1].part = Some(pb::content_part::Part::Image(pb::Image { data }));
    // Past the wire, which would copy the bytes.
    let mut events = world.gateway.chat(Request::new(request)).await.unwrap().into_inner();
    for expected in ["started", "delta"] {
        let event = futures::StreamExt::next(&mut events).await.unwrap().unwrap().event.unwrap().event.unwrap();
        assert_eq!(expected, if matches!(event, Event::Started(_)) { "started" } else { "delta" });
    }
    assert_eq!(held.strong_count(), 0, "the answer goes on without the picture");
}

#[tokio::test(start_paused = true)]
async fn cache_salt_does_not_hold_the_body() {
    let world = World::new().await;
    world.script([Script::TokensThenNothing(vec![END_OF_UTTERANCE])]);
    let (cache_salt, held) = observed(b"salt");
    let request = pb::ChatRequest { cache_salt, ..chat(vec![text("?")]) };
    let _events = world.gateway.chat(Request::new(request)).await.unwrap();
    assert_eq!(held.strong_count(), 0);
}

//! How a request is named: to its caller and in errors.

mod support;

use idefics_common::channel::in_process;
use idefics_gateway::GatewayConfig;
use idefics_proto::gateway::v1 as pb;
use support::{Script, Setup, World, ask, chat, picture, text};
use tonic::{
    Code, Request, Status,
    body::Body,
    codegen::{Service, http},
};
use tonic_types::StatusExt;

const REQUEST_ID: &str = "x-request-id";

fn named<T>(message: T, id: &str) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert(REQUEST_ID, id.parse().unwrap());
    request
}

fn assert_named(status: &Status, id: &str) {
    assert_eq!(status.get_details_request_info().expect("RequestInfo").request_id, id, "{status:?}");
    assert_eq!(status.metadata().get(REQUEST_ID).expect("metadata"), id);
}

#[tokio::test(start_paused = true)]
async fn errors_name_the_request_beside_what_else_they_say() {
    let world = World::new().await;
    let mut client = world.client();
    // Every visible ASCII character may be in a name.
    let id = "a/b:c=\"{7}\"~!";
    let bad = pb::ChatRequest::default();
    let status = client.chat(named(bad, id)).await.unwrap_err();
    assert_named(&status, id);
    assert_eq!(status.get_details_bad_request().unwrap().field_violations[0].field, "messages");
    assert_named(&client.generate(named(pb::GenerateRequest::default(), id)).await.unwrap_err(), id);
    assert_named(&client.tokenize(named(pb::TokenizeRequest::default(), id)).await.unwrap_err(), id);
    assert_named(&client.encode_images(named(pb::EncodeImagesRequest::default(), id)).await.unwrap_err(), id);
    // Names of the gateway's own, too.
    let status = client.chat(pb::ChatRequest::default()).await.unwrap_err();
    assert_eq!(status.get_details_request_info().unwrap().request_id.len(), 32);
}

#[tokio::test(start_paused = true)]
async fn error_in_the_middle_of_an_answer_names_the_request() {
    let world = World::new().await;
    world.script([Script::TokensThenError(vec![399], Code::Unavailable)]);
    let status = ask(&world, named(chat(vec![text("?")]), "job-7")).await.error.unwrap();
    assert_named(&status, "job-7");
    assert!(status.get_details_retry_info().is_some());
}

#[tokio::test(start_paused = true)]
async fn answers_carry_the_callers_name_for_them() {
    let world = World::new().await;
    let mut client = world.client();
    let response = client.chat(named(chat(vec![text("?")]), "job-7")).await.unwrap();
    assert_eq!(response.metadata().get(REQUEST_ID).unwrap(), "job-7");
    let input = Some(pb::tokenize_request::Input::Text("x".into()));
    let response = client.tokenize(named(pb::TokenizeRequest { input, image_options: None }, "job-8")).await.unwrap();
    assert_eq!(response.metadata().get(REQUEST_ID).unwrap(), "job-8");
    // What cannot be a name is replaced.
    let answer = ask(&world, named(chat(vec![text("?")]), "two words")).await;
    assert_eq!(answer.started[0].request_id.len(), 32);
}

#[tokio::test(start_paused = true)]
async fn what_never_reaches_its_method_is_named_too() {
    let config = GatewayConfig { max_request_bytes: 64, stalled_client_ms: 1_000, ..Default::default() };
    let world = Setup { config, ..Default::default() }.ready().await;
    let status = world.client().chat(named(chat(vec![picture(&[0; 100])]), "too-long")).await.unwrap_err();
    assert_eq!(status.code(), Code::OutOfRange);
    assert_named(&status, "too-long");
    // A body that neither goes on nor ends.
    let nothing = futures::stream::pending::<Result<http_body::Frame<bytes::Bytes>, Status>>();
    let request = http::Request::post("/idefics.gateway.v1.GatewayService/Chat").header(REQUEST_ID, "stalled");
    let request = request.header("content-type", "application/grpc").body(Body::new(http_body_util::StreamBody::new(nothing))).unwrap();
    let response = in_process(world.gateway.clone().into_server()).call(request).await.unwrap();
    let status = Status::from_header_map(response.headers()).unwrap();
    assert_eq!(status.code(), Code::DeadlineExceeded);
    assert_named(&status, "stalled");
}

#[tokio::test(start_paused = true)]
async fn questions_about_the_model_are_named() {
    let world = World::new().await;
    let response = world.client().get_model(named(pb::GetModelRequest {}, "job-9")).await.unwrap();
    assert_eq!(response.metadata().get(REQUEST_ID).unwrap(), "job-9");
    *world.decoders[0].silent.lock().unwrap() = true;
    world.settle().await;
    assert_named(&world.client().get_model(named(pb::GetModelRequest {}, "job-9")).await.unwrap_err(), "job-9");
}

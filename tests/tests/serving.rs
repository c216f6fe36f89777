//! What the serving engine adds to an answer: reuse of what was computed before, and numbers about it.

use idefics_proto::gateway::v1::{ChatRequest, ChatResponse, EncodeImagesRequest, Image, Message, Role, TokenizeRequest, tokenize_request};
use idefics_tests::{
    client::{ask, channel, chat, gateway, health, image, text, until, within_deadline},
    golden,
    process::{Idefics, Server},
};
use std::{
    fs,
    io::{Read, Write},
    net::TcpStream,
};
use tonic::{Code, Request, codegen::http::uri::PathAndQuery};
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_prost::ProstCodec;
use tonic_types::StatusExt;

const IDEFICS: Idefics = Idefics(env!("CARGO_BIN_EXE_idefics-under-test"));

/// The samples of `/metrics`: name with labels, and value.
fn scrape(server: &Server) -> Vec<(String, f64)> {
    let line = server
        .log()
        .lines()
        .find_map(|line| serde_json::from_str::<serde_json::Value>(line).ok()?["fields"]["metrics_addr"].as_str().map(str::to_owned));
    let mut stream = TcpStream::connect(line.expect("the address of the metrics is logged")).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").unwrap();
    let mut response = String::new();
    stream.read_to_string(&mut response).unwrap();
    assert!(response.starts_with("HTTP/1.1 200"), "{response}");
    let samples = response.lines().filter(|line| line.starts_with("idefics_"));
    samples.filter_map(|line| line.rsplit_once(' ').map(|(name, value)| (name.to_owned(), value.parse().unwrap()))).collect()
}

fn value(samples: &[(String, f64)], name: &str) -> f64 {
    samples.iter().find(|(n, _)| n == name).unwrap_or_else(|| panic!("no {name} in {samples:#?}")).1
}

/// First and second turn about a picture.
fn turns(answer: &str) -> (ChatRequest, ChatRequest) {
    let picture = fs::read(golden::demo_picture("pictures/01.png")).unwrap();
    let first = chat(vec![image(picture), text("What is in this image?")]);
    let mut second = first.clone();
    second.messages.push(Message { role: Role::Assistant.into(), content: vec![text(answer)] });
    second.messages.push(Message { role: Role::User.into(), content: vec![text("Is the star left of the diamond?")] });
    (first, second)
}

#[tokio::test]
async fn second_turn_computes_only_what_is_new_and_metrics_say_so() {
    let server = Server::start(IDEFICS, "serve", None, &[("IDEFICS_SERVER__METRICS_ADDR", "127.0.0.1:0")]).ready();
    let mut client = gateway(&server).await;
    let (first, _) = turns("");
    let mut limited = first.clone();
    limited.sampling.as_mut().unwrap().max_new_tokens = Some(40);
    let reply = ask(&mut client, limited).await.unwrap();
    assert_eq!(reply.finished.usage.unwrap().cached_tokens, 0);
    let (_, second) = turns(reply.text.trim());
    let reply = ask(&mut client, second.clone()).await.unwrap();
    let usage = reply.finished.usage.unwrap();
    assert_eq!(reply.text.trim(), "Yes.");
    // Blocks of 16: the first turn's 32 prompt tokens are two of them, and its answer fills at least half of a third.
    assert!(usage.cached_tokens >= 32 && usage.cached_tokens < usage.prompt_tokens, "{usage:?}");

    let mut other_tenant = second;
    other_tenant.cache_salt = "another tenant".into();
    let reply = ask(&mut client, other_tenant).await.unwrap();
    assert_eq!((reply.finished.usage.unwrap().cached_tokens, reply.text.trim()), (0, "Yes."));

    // Blocks are given back in the step after the last token.
    let samples =
        until("blocks to be free", async || Some(scrape(&server)).filter(|s| value(s, "idefics_decoder_kv_blocks_used") == 0.0)).await;
    for (name, expected) in [
        ("idefics_gateway_requests_total{code=\"Ok\"}", 3.0),
        ("idefics_gateway_requests_running", 0.0),
        ("idefics_gateway_time_to_first_token_seconds_count", 3.0),
        ("idefics_decoder_requests_running", 0.0),
        ("idefics_decoder_requests_waiting", 0.0),
        ("idefics_decoder_cached_prompt_tokens_total", f64::from(usage.cached_tokens)),
        ("idefics_gateway_tokens_total{kind=\"cached\"}", f64::from(usage.cached_tokens)),
        // The first request's picture was computed and shipped; the decoder had it for the other two.
        ("idefics_vision_images_total{source=\"computed\"}", 1.0),
        ("idefics_vision_images_queued", 0.0),
        ("idefics_vision_images_ready", 0.0),
        ("idefics_vision_encode_seconds_count", 1.0),
        ("idefics_vision_ship_seconds_count", 1.0),
        ("idefics_vision_pass_sub_images_size_count", 1.0),
        ("idefics_decoder_image_store_lookups_total{result=\"miss\"}", 1.0),
        ("idefics_decoder_image_store_lookups_total{result=\"hit\"}", 2.0),
        ("idefics_decoder_image_store_images", 1.0),
        ("idefics_decoder_reservations", 0.0),
    ] {
        assert_eq!(value(&samples, name), expected, "{name}");
    }
    assert!(value(&samples, "idefics_decoder_kv_blocks") > 0.0);
    assert!(value(&samples, "idefics_decoder_step_seconds_count{phase=\"decode\"}") > 0.0);
}

#[tokio::test]
async fn prompt_lookup_gives_the_same_answers() {
    let server = Server::start(IDEFICS, "serve", None, &[("IDEFICS_DECODER__PROMPT_LOOKUP_TOKENS", "4")]).ready();
    let mut client = gateway(&server).await;
    let mut request = turns("").0;
    request.sampling.as_mut().unwrap().max_new_tokens = Some(40);
    let reply = ask(&mut client, request).await.unwrap();
    assert_eq!(reply.text.trim(), "A blue star, a purple diamond and a pink cross on a gray background.");
}

#[tokio::test]
async fn full_gateway_refuses_uploads_at_once_and_says_that_it_serves() {
    let server = Server::start(IDEFICS, "serve", None, &[("IDEFICS_GATEWAY__MAX_CONCURRENT_REQUESTS", "1")]).ready();
    // A request whose message never comes; it is sent again where one of the small ones below is there first.
    let mut unfinished = tonic::client::Grpc::new(channel(&server).await);
    let method = PathAndQuery::from_static("/idefics.gateway.v1.GatewayService/Chat");
    let upload = tokio::spawn(async move {
        loop {
            unfinished.ready().await.unwrap();
            let messages = Request::new(tokio_stream::pending::<ChatRequest>());
            let codec = ProstCodec::<_, ChatResponse>::default();
            unfinished.client_streaming(messages, method.clone(), codec).await.expect_err("it has no message");
        }
    });
    let mut client = gateway(&server).await;
    let small = || TokenizeRequest { input: Some(tokenize_request::Input::Text("x".into())), image_options: None };
    until("the gateway is full", async || client.tokenize(small()).await.err()).await;
    // Far more than the windows of the connection take.
    let images = vec![Image { data: vec![0; 60 << 20].into() }];
    let status = within_deadline(client.encode_images(EncodeImagesRequest { images, image_options: None })).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
    assert!(status.get_details_retry_info().is_some_and(|info| info.retry_delay.is_some()), "{status:?}");
    assert_eq!(health(&server, "").await, Some(ServingStatus::Serving));
    upload.abort();
    until("the gateway has room", async || client.tokenize(small()).await.ok()).await;
}

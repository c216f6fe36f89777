//! Gateway, vision and decoder as processes of their own, found by configuration.

use idefics_proto::{
    decoder::v1::{GetInfoRequest, PutImageTokensRequest, decoder_service_client::DecoderServiceClient},
    gateway::v1::{FinishReason, GenerateResponse, gateway_service_client::GatewayServiceClient, generation_event::Event},
    tensor::v1::{DataType, Tensor},
    vision::v1::{EncodeRequest, PreprocessOptions, vision_service_client::VisionServiceClient},
};
use idefics_tests::{
    checkpoint,
    client::{self, chat, complete, gateway, image, raw, text, until, within_deadline},
    golden::{self, Pictures},
    process::{Idefics, Server},
};
use std::{error::Error, ffi::OsString, fs, net::TcpListener, path::Path};
use tonic::{Code, Status, Streaming, transport::Channel};
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_reflection::pb::v1::{
    ServerReflectionRequest, server_reflection_client::ServerReflectionClient, server_reflection_request::MessageRequest,
    server_reflection_response::MessageResponse,
};

const IDEFICS: Idefics = Idefics(env!("CARGO_BIN_EXE_idefics-under-test"));

/// The three roles of one deployment.
struct Deployment {
    gateway: Server,
    vision: Server,
    decoder: Server,
}

impl Deployment {
    fn start(model: Option<&Path>) -> Self {
        let decoder = IDEFICS.role("decoder", model, &[]);
        let vision = IDEFICS.role("vision", model, &[("IDEFICS_VISION__ALLOWED_DECODERS", &list(&decoder.endpoint()))]);
        let peers = [("IDEFICS_GATEWAY__DECODERS", list(&decoder.endpoint())), ("IDEFICS_GATEWAY__VISIONS", list(&vision.endpoint()))];
        let gateway = IDEFICS.role("gateway", model, &peers.each_ref().map(|(name, value)| (*name, value.as_str())));
        Self { gateway, vision, decoder }
    }
}

/// A list of one, as configuration is written.
fn list(endpoint: &str) -> String {
    format!("[\"{endpoint}\"]")
}

/// An address where nobody listens.
fn free_address() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().to_string()
}

fn demo_picture() -> Vec<u8> {
    fs::read(golden::demo_picture("pictures/01.png")).unwrap()
}

#[test]
fn three_processes_answer_as_one() {
    let (model, pictures) = (checkpoint::random(), Pictures::write());
    let three = Deployment::start(Some(model.path()));
    for name in ["text", "split_by_default", "interleaved", "turns"] {
        let case = golden::random_case(name);
        let messages = pictures.folder().join("messages.json");
        golden::write_messages(case.messages.as_ref().unwrap(), &messages, |name| pictures.path(name));
        let mut args: Vec<OsString> = ["--endpoint", &three.gateway.endpoint(), "--logprobs", "8"].map(Into::into).into();
        args.extend(case.options.flags().into_iter().map(Into::into));
        args.extend(["--max-new-tokens".into(), case.max_new_tokens.to_string().into(), "--messages".into(), messages.into()]);
        let answer = IDEFICS.ask(args);
        assert_eq!(answer.prompt_token_ids, case.prompt_token_ids, "{name}");
        assert_eq!(answer.token_ids, case.token_ids, "{name}");
        // Image tokens that crossed the wire in bf16 would be 1e-3 off and more.
        let difference = golden::logprob_difference(&answer, &case.top5);
        assert!(difference <= golden::LOGPROB_TOLERANCE, "{name}: log-probabilities differ by {difference:.1e}");
    }
    let case = golden::encodes("random").into_iter().find(|case| case.name == "edges_split").unwrap();
    let mut args: Vec<OsString> =
        vec!["--endpoint".into(), three.gateway.endpoint().into(), "--image".into(), pictures.path(&case.images[0]).into()];
    args.extend(case.options.flags().into_iter().map(Into::into));
    let difference = IDEFICS.encode(args).distance(&case.image_tokens, 64);
    assert!(difference <= golden::IMAGE_TOKENS_TOLERANCE, "image tokens are {difference:.1e} away");
}

#[tokio::test]
async fn every_role_reports_health_and_reflection() {
    let three = Deployment::start(None);
    let all_in_one = IDEFICS.serve(None);
    for (server, service) in [
        (&three.gateway, "idefics.gateway.v1.GatewayService"),
        (&three.vision, "idefics.vision.v1.VisionService"),
        (&three.decoder, "idefics.decoder.v1.DecoderService"),
        (&all_in_one, "idefics.gateway.v1.GatewayService"),
    ] {
        for name in ["", service] {
            let serving = async || client::health(server, name).await.filter(|s| *s == ServingStatus::Serving);
            until(&format!("{service} is serving"), serving).await;
        }
        let services = reflected_services(server).await;
        for name in [service, "grpc.health.v1.Health"] {
            assert!(services.iter().any(|s| s == name), "{name} is not among {services:?}");
        }
    }
}

async fn reflected_services(server: &Server) -> Vec<String> {
    let request = ServerReflectionRequest { host: String::new(), message_request: Some(MessageRequest::ListServices(String::new())) };
    let mut client = ServerReflectionClient::new(client::channel(server).await);
    let mut answers = client.server_reflection_info(tokio_stream::once(request)).await.expect("reflection").into_inner();
    match answers.message().await.unwrap().unwrap().message_response {
        Some(MessageResponse::ListServicesResponse(list)) => list.service.into_iter().map(|s| s.name).collect(),
        other => panic!("reflection answered {other:?}"),
    }
}

#[tokio::test]
async fn absent_decoder_is_unavailable_and_said_to_be() {
    let vision = IDEFICS.role("vision", None, &[]);
    let decoders = list(&format!("http://{}", free_address()));
    let env = [("IDEFICS_GATEWAY__DECODERS", decoders.as_str()), ("IDEFICS_GATEWAY__VISIONS", &list(&vision.endpoint()))];
    let address = free_address();
    // It may well not call itself ready, so what is waited for is that it listens.
    let server = Server::start_at(IDEFICS, "gateway", &address, None, &env);
    until("the gateway listens", async || client::health(&server, "").await).await;
    let mut client = gateway(&server).await;
    for content in [vec![text("Is there a circle?")], vec![image(demo_picture()), text("What is in this image?")]] {
        // At first it may still be loading, which is UNAVAILABLE too.
        let named = async || {
            let status = client::ask(&mut client, chat(content.clone())).await.expect_err("there is no decoder");
            assert_eq!(status.code(), Code::Unavailable, "{status:?}");
            Some(status).filter(|status| status.message().contains("decoder"))
        };
        until("the message says what is missing", named).await;
    }
}

#[tokio::test]
async fn gateway_recovers_when_its_peers_come() {
    let (decoder_address, vision_address, address) = (free_address(), free_address(), free_address());
    let (decoders, visions) = (list(&format!("http://{decoder_address}")), list(&format!("http://{vision_address}")));
    let env = [("IDEFICS_GATEWAY__DECODERS", decoders.as_str()), ("IDEFICS_GATEWAY__VISIONS", visions.as_str())];
    let server = Server::start_at(IDEFICS, "gateway", &address, None, &env);
    let status = until("the gateway listens", async || client::health(&server, "").await).await;
    assert_eq!(status, ServingStatus::NotServing, "readiness tells the truth");
    let mut client = gateway(&server).await;
    let question = || chat(vec![image(demo_picture()), text("What is in this image?")]);
    assert_eq!(client::ask(&mut client, question()).await.expect_err("there are no peers").code(), Code::Unavailable);

    let _decoder = Server::start_at(IDEFICS, "decoder", &decoder_address, None, &[]).ready();
    let _vision = Server::start_at(IDEFICS, "vision", &vision_address, None, &[("IDEFICS_VISION__ALLOWED_DECODERS", &decoders)]).ready();
    let serving = async || client::health(&server, "").await.filter(|s| *s == ServingStatus::Serving);
    until("the gateway finds its peers", serving).await;
    let reply = client::ask(&mut client, question()).await.expect("the peers are there");
    assert!(reply.text.contains("star"), "{:?}", reply.text);
}

#[tokio::test]
async fn peers_with_another_checkpoint_are_refused() {
    let model = checkpoint::random();
    let decoder = IDEFICS.role("decoder", Some(model.path()), &[]);
    let vision = IDEFICS.role("vision", None, &[("IDEFICS_VISION__ALLOWED_DECODERS", &list(&decoder.endpoint()))]);
    let address = free_address();
    let (decoders, visions) = (list(&decoder.endpoint()), list(&vision.endpoint()));
    let env = [("IDEFICS_GATEWAY__DECODERS", decoders.as_str()), ("IDEFICS_GATEWAY__VISIONS", visions.as_str())];
    let server = Server::start_at(IDEFICS, "gateway", &address, None, &env);
    until("the gateway listens", async || client::health(&server, "").await).await;
    let status = client::ask(&mut gateway(&server).await, chat(vec![text("Hi")])).await.expect_err("the decoder has another model");
    assert!(matches!(status.code(), Code::FailedPrecondition | Code::Unavailable), "{status:?}");
}

#[tokio::test]
async fn vision_ships_only_to_decoders_that_it_allows() {
    let decoder = IDEFICS.role("decoder", None, &[]);
    let vision = IDEFICS.role("vision", None, &[]);
    let info = DecoderServiceClient::new(client::channel(&decoder).await).get_info(GetInfoRequest {}).await.unwrap().into_inner();
    let request = EncodeRequest {
        request_id: "test".into(),
        image: demo_picture().into(),
        options: Some(PreprocessOptions { split: false, longest_edge: 168, shortest_edge: 56 }),
        key: vec![7; 32].into(),
        model_fingerprint: info.model_fingerprint,
        ship_to: decoder.endpoint(),
    };
    let status = VisionServiceClient::new(client::channel(&vision).await).encode(request).await.expect_err("it is not allowed");
    assert!(matches!(status.code(), Code::PermissionDenied | Code::FailedPrecondition | Code::InvalidArgument), "{status:?}");
}

#[tokio::test]
async fn decoder_checks_every_tensor_that_it_is_sent() {
    let decoder = IDEFICS.role("decoder", None, &[]);
    let mut client = DecoderServiceClient::new(client::channel(&decoder).await);
    let info = client.get_info(GetInfoRequest {}).await.unwrap().into_inner();
    let (rows, cols) = (u64::from(info.tokens_per_image), u64::from(info.hidden_size));
    let good = PutImageTokensRequest {
        key: vec![7; 32].into(),
        model_fingerprint: info.model_fingerprint,
        image_tokens: Some(Tensor {
            dtype: DataType::F32.into(),
            shape: vec![rows, cols],
            data: vec![0; (rows * cols * 4) as usize].into(),
        }),
    };
    let refused = |what: &'static str, change: &dyn Fn(&mut PutImageTokensRequest)| {
        let mut request = good.clone();
        change(&mut request);
        (what, request)
    };
    fn tensor(request: &mut PutImageTokensRequest) -> &mut Tensor {
        request.image_tokens.as_mut().unwrap()
    }
    for (what, request) in [
        refused("no tensor", &|r| r.image_tokens = None),
        refused("a short key", &|r| r.key = vec![7; 31].into()),
        refused("another model", &|r| r.model_fingerprint = "0".repeat(64)),
        refused("no type", &|r| tensor(r).dtype = 0),
        refused("an unknown type", &|r| tensor(r).dtype = 99),
        refused("missing bytes", &|r| tensor(r).data = vec![0; 3].into()),
        refused("another width", &|r| tensor(r).shape = vec![rows * 2, cols / 2]),
        refused("half an image", &|r| *tensor(r) = Tensor { dtype: 1, shape: vec![1, cols], data: vec![0; cols as usize * 4].into() }),
        refused("a shape that overflows", &|r| tensor(r).shape = vec![1 << 62, 4]),
        refused("no rows", &|r| *tensor(r) = Tensor { dtype: 1, shape: vec![0, cols], data: Vec::new().into() }),
        refused("a NaN", &|r| {
            let mut data = vec![0; (rows * cols * 4) as usize];
            data[..4].copy_from_slice(&f32::NAN.to_le_bytes());
            tensor(r).data = data.into();
        }),
        refused("an infinity", &|r| {
            let mut data = vec![0; (rows * cols * 4) as usize];
            data[4..8].copy_from_slice(&f32::INFINITY.to_le_bytes());
            tensor(r).data = data.into();
        }),
    ] {
        let status = client.put_image_tokens(request).await.expect_err(what);
        assert!(matches!(status.code(), Code::InvalidArgument | Code::FailedPrecondition), "{what}: {status:?}");
    }
    client.put_image_tokens(good).await.expect("a good tensor is stored");
}

/// A long answer that has begun.
async fn streaming(client: &mut GatewayServiceClient<Channel>, new_tokens: u32) -> Streaming<GenerateResponse> {
    let mut stream = client.generate(raw("The shape is", vec![], new_tokens)).await.expect("accepted").into_inner();
    while let Some(message) = within_deadline(stream.message()).await.expect("no error") {
        if let Some(Event::Delta(_)) = message.event.and_then(|e| e.event) {
            return stream;
        }
    }
    panic!("the stream ended before its first token")
}

/// Asks until a call is refused, which must be soon and for the right reason.
async fn refused(client: &GatewayServiceClient<Channel>) {
    // A call that meets the connection's end is cancelled on this side and has not reached the server: it is made again.
    let met_the_end = |status: &Status| status.code() == Code::Cancelled && status.source().is_some();
    let refused = async || complete(&mut client.clone(), raw("The shape is", vec![], 1)).await.err().filter(|status| !met_the_end(status));
    let status = until("new calls are refused", refused).await;
    assert_eq!(status.code(), Code::Unavailable, "{status:?}");
}

async fn finish(mut stream: Streaming<GenerateResponse>) -> Option<FinishReason> {
    let mut reason = None;
    while let Some(message) = within_deadline(stream.message()).await.expect("the stream is not cut off") {
        if let Some(Event::Finished(finished)) = message.event.and_then(|e| e.event) {
            reason = finished.finish_reasons().next();
        }
    }
    reason
}

/// The random checkpoint, which seldom ends a turn by itself.
#[tokio::test]
async fn sigterm_finishes_streams_and_ends_cleanly() {
    let model = checkpoint::random();
    let server = IDEFICS.serve(Some(model.path()));
    let mut client = gateway(&server).await;
    let stream = streaming(&mut client, 300).await;
    server.terminate();
    refused(&client).await;
    assert_eq!(finish(stream).await, Some(FinishReason::Length));
    assert_eq!(server.wait().code(), Some(0));
}

#[tokio::test]
async fn sigterm_to_each_process_finishes_streams_and_ends_cleanly() {
    let model = checkpoint::random();
    let three = Deployment::start(Some(model.path()));
    let mut client = gateway(&three.gateway).await;
    let stream = streaming(&mut client, 300).await;
    for server in [&three.decoder, &three.vision, &three.gateway] {
        server.terminate();
    }
    refused(&client).await;
    assert_eq!(finish(stream).await, Some(FinishReason::Length));
    for server in [three.decoder, three.vision, three.gateway] {
        assert_eq!(server.wait().code(), Some(0));
    }
}

//! Bad input gets a clear error with the proper code, and the next request is served as if nothing had happened.

use idefics_proto::gateway::v1::{
    ChatRequest, ContentPart, EncodeImagesRequest, Image, ImageOptions, Message, Role, SamplingOptions, TokenizeRequest,
    content_part::Part, gateway_service_client::GatewayServiceClient, tokenize_request::Input,
};
use idefics_tests::{
    checkpoint,
    client::{self, Reply, chat, complete, gateway, image, raw, text, violated_fields, within_deadline},
    golden,
    process::{Idefics, Server},
    synthetic,
};
use image::{DynamicImage, ImageFormat, RgbImage};
use std::{ffi::OsString, fs, io::Cursor};
use tonic::{Code, Status, transport::Channel};

const IDEFICS: Idefics = Idefics(env!("CARGO_BIN_EXE_idefics-under-test"));
const IMAGE: u32 = 601;
const FAKE: u32 = 600;
const END_OF_UTTERANCE: u32 = 602;

fn good_picture() -> Vec<u8> {
    fs::read(golden::demo_picture("pictures/01.png")).unwrap()
}

fn encode(picture: impl Into<DynamicImage>, format: ImageFormat) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    picture.into().write_to(&mut bytes, format).unwrap();
    bytes.into_inner()
}

/// A server of the demo checkpoint and a client, with the question by which its health is judged.
struct Demo {
    _server: Server,
    client: GatewayServiceClient<Channel>,
}

impl Demo {
    async fn start() -> Self {
        let server = IDEFICS.serve(None);
        let client = gateway(&server).await;
        Self { _server: server, client }
    }

    /// Refused with this code; an invalid argument names its field. Afterwards a good question gets its right answer.
    async fn refuses(&mut self, what: &str, code: Code, request: ChatRequest) -> Status {
        let status = client::ask(&mut self.client, request).await.expect_err(what);
        self.check(what, code, &status).await;
        status
    }

    async fn check(&mut self, what: &str, code: Code, status: &Status) {
        assert_eq!(status.code(), code, "{what}: {status:?}");
        assert!(!status.message().is_empty() && !status.message().contains("panicked"), "{what}: {status:?}");
        if code == Code::InvalidArgument {
            assert!(!violated_fields(status).is_empty(), "{what} names no field: {status:?}");
        }
        self.answers().await;
    }

    async fn answers(&mut self) {
        let mut request = chat(vec![image(good_picture()), text("What is in this image?")]);
        request.sampling = Some(SamplingOptions { max_new_tokens: Some(40), ..Default::default() });
        let reply = client::ask(&mut self.client, request).await.expect("a good request is served");
        assert_eq!(reply.text.trim(), "A blue star, a purple diamond and a pink cross on a gray background.");
    }

    async fn serves(&mut self, what: &str, request: ChatRequest) -> Reply {
        client::ask(&mut self.client, request).await.unwrap_or_else(|status| panic!("{what}: {status:?}"))
    }
}

fn picture_question(picture: Vec<u8>) -> ChatRequest {
    chat(vec![image(picture), text("What is in this image?")])
}

#[tokio::test]
async fn unreadable_pictures_are_refused() {
    let mut demo = Demo::start().await;
    let picture = synthetic::picture(1, 200, 100);
    let (png, jpeg) = (encode(picture.clone(), ImageFormat::Png), encode(picture, ImageFormat::Jpeg));
    for (what, bytes) in [
        ("zero bytes", Vec::new()),
        ("one byte", vec![0x89]),
        ("text", b"this is not a picture".to_vec()),
        ("an SVG", b"<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"9\" height=\"9\"/>".to_vec()),
        ("zeros", vec![0; 4096]),
        ("a PNG's signature alone", png[..8].to_vec()),
        ("half a PNG", png[..png.len() / 2].to_vec()),
        ("half a JPEG's header", jpeg[..20].to_vec()),
        ("a safetensors file", fs::read(golden::folder().join("demo/image_tokens.safetensors")).unwrap()),
    ] {
        demo.refuses(what, Code::InvalidArgument, picture_question(bytes)).await;
    }
}

/// 65,000 x 65,000 pixels are 12 GiB: the size is read, and nothing else.
#[tokio::test]
async fn decompression_bombs_are_refused_by_their_size() {
    let mut demo = Demo::start().await;
    let status = demo.refuses("a PNG bomb", Code::InvalidArgument, picture_question(huge_png(65_000, 65_000))).await;
    assert!(status.message().contains("65000"), "the message has the size: {status:?}");
    demo.refuses("a long strip", Code::InvalidArgument, picture_question(huge_png(1, 0x7FFF_FFFF))).await;
    demo.refuses("a GIF bomb", Code::InvalidArgument, picture_question(huge_gif())).await;
}

/// A PNG that claims to be this large and holds next to nothing.
fn huge_png(width: u32, height: u32) -> Vec<u8> {
    let mut png = encode(RgbImage::new(1, 1), ImageFormat::Png);
    png[16..20].copy_from_slice(&width.to_be_bytes());
    png[20..24].copy_from_slice(&height.to_be_bytes());
    let crc = png[12..29].iter().fold(!0u32, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| if crc & 1 == 1 { (crc >> 1) ^ 0xEDB8_8320 } else { crc >> 1 })
    });
    png[29..33].copy_from_slice(&(!crc).to_be_bytes());
    png
}

/// A GIF with a canvas of 65,535 x 65,535 and one frame as large.
fn huge_gif() -> Vec<u8> {
    let mut gif = b"GIF89a\xFF\xFF\xFF\xFF\x80\x00\x00\x00\x00\x00\xFF\xFF\xFF".to_vec();
    gif.extend_from_slice(b"\x2C\x00\x00\x00\x00\xFF\xFF\xFF\xFF\x00\x02\x02\x4C\x01\x00\x3B");
    gif
}

#[tokio::test]
async fn pictures_of_extreme_shapes_are_served() {
    let mut demo = Demo::start().await;
    for (width, height) in [(1, 1), (1, 700), (700, 1), (3, 3), (2, 1), (13, 4000)] {
        let what = format!("{width}x{height}");
        let mut request = picture_question(encode(synthetic::picture(3, width, height), ImageFormat::Png));
        let reply = demo.serves(&what, request.clone()).await;
        assert_eq!(reply.started.image_tokens, 16, "{what}");
        request.image_options = Some(ImageOptions { split: Some(true), ..Default::default() });
        let reply = demo.serves(&format!("{what} split"), request).await;
        assert_eq!(reply.started.image_tokens, 80, "{what} split");
    }
    demo.answers().await;
}

/// The same pixels in another file give the same answer; the resize and the colours are checked bit by bit in `vision`.
#[tokio::test]
async fn every_lossless_format_is_served_alike() {
    let mut demo = Demo::start().await;
    let picture = image::load_from_memory(&good_picture()).unwrap().to_rgb8();
    let ask = |bytes: Vec<u8>| {
        let mut request = picture_question(bytes);
        request.sampling = Some(SamplingOptions { max_new_tokens: Some(40), ..Default::default() });
        request
    };
    for format in [ImageFormat::Png, ImageFormat::WebP, ImageFormat::Bmp, ImageFormat::Tiff] {
        let reply = demo.serves(&format!("{format:?}"), ask(encode(picture.clone(), format))).await;
        assert_eq!(reply.text.trim(), "A blue star, a purple diamond and a pink cross on a gray background.", "{format:?}");
    }
    let rgb16 = DynamicImage::ImageRgb8(picture.clone()).into_rgb16();
    let rgba = DynamicImage::ImageRgb8(picture.clone()).into_rgba8();
    for (what, bytes) in [("16 bits", encode(rgb16, ImageFormat::Png)), ("alpha", encode(rgba, ImageFormat::Png))] {
        let reply = demo.serves(what, ask(bytes)).await;
        assert_eq!(reply.text.trim(), "A blue star, a purple diamond and a pink cross on a gray background.", "{what}");
    }
    let gray = DynamicImage::ImageRgb8(picture.clone()).into_luma8();
    for (what, bytes) in [
        ("gray", encode(gray, ImageFormat::Png)),
        ("JPEG", encode(picture.clone(), ImageFormat::Jpeg)),
        ("GIF", encode(DynamicImage::ImageRgb8(picture).into_rgba8(), ImageFormat::Gif)),
    ] {
        demo.serves(what, ask(bytes)).await;
    }
}

/// The files with which `vision` checks its decoders, CMYK and palettes and orientations and animations among them.
#[tokio::test]
async fn every_mode_and_orientation_is_served() {
    let mut demo = Demo::start().await;
    let mut files: Vec<_> = fs::read_dir(golden::folder().join("preprocess/files")).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert!(files.len() > 50, "{files:?}");
    for some in files.chunks(16) {
        let images = some.iter().map(|file| Image { data: fs::read(file).unwrap().into() }).collect();
        let response = demo.client.encode_images(EncodeImagesRequest { images, image_options: None }).await;
        let response = response.unwrap_or_else(|status| panic!("{some:?}: {status:?}")).into_inner();
        assert_eq!(response.sub_images, vec![1; some.len()], "{some:?}");
        assert_eq!(response.image_tokens.unwrap().shape, [16 * some.len() as u64, 256], "{some:?}");
    }
    demo.answers().await;
}

#[tokio::test]
async fn marks_and_pictures_must_be_as_many() {
    let mut demo = Demo::start().await;
    for (prompt, pictures) in [("<image>", 0), ("no mark", 1), ("<image> and <image>", 1), ("<image>", 2)] {
        let request = raw(prompt, vec![good_picture(); pictures], 4);
        let status = complete(&mut demo.client, request).await.expect_err(prompt);
        demo.check(prompt, Code::InvalidArgument, &status).await;
    }
}

#[tokio::test]
async fn incomplete_conversations_are_refused() {
    let mut demo = Demo::start().await;
    let message = |role: Role, content: Vec<ContentPart>| Message { role: role.into(), content };
    let conversation = |messages: Vec<Message>| ChatRequest { messages, ..chat(vec![]) };
    for (what, request) in [
        ("no messages", conversation(vec![])),
        ("a message without content", chat(vec![])),
        ("a part without content", chat(vec![ContentPart { part: None }])),
        ("no role", conversation(vec![message(Role::Unspecified, vec![text("Hi")])])),
        ("an unknown role", conversation(vec![Message { role: 77, content: vec![text("Hi")] }])),
        ("an empty picture", chat(vec![ContentPart { part: Some(Part::Image(Image::default())) }, text("Hi")])),
    ] {
        demo.refuses(what, Code::InvalidArgument, request).await;
    }
}

#[tokio::test]
async fn options_out_of_range_are_refused_by_name() {
    let mut demo = Demo::start().await;
    let sampling =
        |field: &'static str, sampling: SamplingOptions| (field, ChatRequest { sampling: Some(sampling), ..chat(vec![text("Hi")]) });
    let images = |field: &'static str, options: ImageOptions| {
        (field, ChatRequest { image_options: Some(options), ..picture_question(good_picture()) })
    };
    let default = SamplingOptions::default;
    let mut cases = vec![
        sampling("max_new_tokens", SamplingOptions { max_new_tokens: Some(0), ..default() }),
        sampling("top_k", SamplingOptions { top_k: Some(u32::MAX), top_p: Some(2.0), ..default() }),
        sampling("logprobs", SamplingOptions { logprobs: Some(21), ..default() }),
        sampling("stop", SamplingOptions { stop: vec![String::new()], ..default() }),
        sampling("stop", SamplingOptions { stop: vec!["x".repeat(257)], ..default() }),
        sampling("stop", SamplingOptions { stop: (0..17).map(|i| i.to_string()).collect(), ..default() }),
        sampling("min_p", SamplingOptions { min_p: Some(1.1), ..default() }),
        sampling("typical_p", SamplingOptions { typical_p: Some(0.0), ..default() }),
        sampling("repetition_penalty", SamplingOptions { repetition_penalty: Some(0.0), ..default() }),
        sampling("presence_penalty", SamplingOptions { presence_penalty: Some(f32::NAN), ..default() }),
        sampling("frequency_penalty", SamplingOptions { frequency_penalty: Some(-2.1), ..default() }),
        sampling("logit_bias[603]", SamplingOptions { logit_bias: [(603, 1.0)].into(), ..default() }),
        sampling("logit_bias", SamplingOptions { logit_bias: (0..1025).map(|id| (id, 1.0)).collect(), ..default() }),
        sampling("stop_token_ids[1]", SamplingOptions { stop_token_ids: vec![2, 603], ..default() }),
        sampling("stop_token_ids", SamplingOptions { stop_token_ids: vec![2; 17], ..default() }),
        sampling("min_new_tokens", SamplingOptions { min_new_tokens: Some(5), max_new_tokens: Some(4), ..default() }),
        images("longest_edge", ImageOptions { longest_edge: Some(0), ..Default::default() }),
        images("longest_edge", ImageOptions { longest_edge: Some(169), ..Default::default() }),
        images("longest_edge", ImageOptions { longest_edge: Some(u32::MAX), ..Default::default() }),
        images("shortest_edge", ImageOptions { shortest_edge: Some(13), ..Default::default() }),
        images("shortest_edge", ImageOptions { shortest_edge: Some(169), ..Default::default() }),
        images("edge", ImageOptions { longest_edge: Some(56), shortest_edge: Some(70), ..Default::default() }),
    ];
    cases[1].0 = "top_p";
    for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -0.1, 2.1] {
        cases.push(sampling("temperature", SamplingOptions { temperature: Some(value), ..default() }));
    }
    for value in [f32::NAN, f32::INFINITY, -1.0, 0.0, 1.1] {
        cases.push(sampling("top_p", SamplingOptions { top_p: Some(value), ..default() }));
    }
    for (field, request) in cases {
        let what = format!("{field} of {:?} {:?}", request.sampling, request.image_options);
        let status = demo.refuses(&what, Code::InvalidArgument, request).await;
        assert!(violated_fields(&status).iter().any(|f| f.contains(field)), "{what}: {:?}", violated_fields(&status));
    }
}

#[tokio::test]
async fn prompt_past_the_context_is_out_of_range() {
    let mut demo = Demo::start().await;
    let long = "What is in this image? ".repeat(1000);
    let status = demo.refuses("a long text", Code::OutOfRange, chat(vec![text(&long)])).await;
    assert!(status.message().contains("4096"), "the message has the limit: {status:?}");
    let request = raw(&long, vec![], 4);
    let status = complete(&mut demo.client, request).await.expect_err("a long prompt");
    demo.check("a long prompt", Code::OutOfRange, &status).await;
}

#[tokio::test]
async fn special_tokens_typed_by_a_user_stay_text() {
    let mut demo = Demo::start().await;
    let typed = "<image> and <fake_token_around_image> and <end_of_utterance> and </s> and <s> and <unk>?";
    let specials = |ids: &[u32]| [IMAGE, FAKE, END_OF_UTTERANCE, 2, 1, 0].map(|special| ids.iter().filter(|id| **id == special).count());

    let reply = demo.serves("typed marks", chat(vec![text(typed)])).await;
    // Of the template: the end of the user's turn; and BOS in front.
    assert_eq!(specials(&reply.started.prompt_token_ids), [0, 0, 1, 0, 1, 0], "{:?}", reply.started.prompt_token_ids);
    assert_eq!(reply.started.image_tokens, 0);

    let reply = demo.serves("typed marks beside a picture", chat(vec![text(typed), image(good_picture()), text(typed)])).await;
    assert_eq!(specials(&reply.started.prompt_token_ids), [16, 2, 1, 0, 1, 0]);

    // In a raw prompt `<image>` is a mark.
    let reply = complete(&mut demo.client, raw("<image> and a text", vec![good_picture()], 4)).await.unwrap();
    assert_eq!(specials(&reply.started.prompt_token_ids), [16, 2, 0, 0, 1, 0]);

    let input = Some(Input::Text(typed.into()));
    let tokens = demo.client.tokenize(TokenizeRequest { input, image_options: None }).await.unwrap().into_inner();
    assert_eq!(specials(&tokens.token_ids), [0; 6]);
    demo.answers().await;
}

#[tokio::test]
async fn dropped_stream_leaves_the_server_healthy() {
    let model = checkpoint::random();
    let server = IDEFICS.serve(Some(model.path()));
    let mut client = gateway(&server).await;
    let case = golden::random_case("raw_text");
    // More dropped answers than fit side by side, if dropping did not free what they hold.
    for _ in 0..8 {
        let mut stream = client.generate(raw("The shape is", vec![], 1900)).await.unwrap().into_inner();
        for _ in 0..3 {
            within_deadline(stream.message()).await.unwrap().expect("the answer is long");
        }
    }
    let reply = complete(&mut client, raw(case.prompt.as_ref().unwrap(), vec![], case.max_new_tokens)).await.unwrap();
    assert_eq!(reply.token_ids, case.token_ids);
}

/// What a person at a terminal sees: an exit code and one clear message, no backtrace.
#[test]
fn command_line_says_what_is_wrong() {
    let server = IDEFICS.serve(None);
    let folder = tempfile::tempdir().unwrap();
    let broken = folder.path().join("broken.png");
    fs::write(&broken, &good_picture()[..300]).unwrap();
    let broken = broken.to_str().unwrap();
    let endpoint = server.endpoint();
    for (args, word) in [
        (&["ask", "--endpoint", &endpoint, "--image", broken, "What?"][..], "image"),
        (&["ask", "--endpoint", &endpoint, "--image", "/nowhere.png", "What?"], "/nowhere.png"),
        (&["ask", "--endpoint", &endpoint, "--temperature", "NaN", "What?"], "temperature"),
        (&["ask", "--endpoint", &endpoint, "--raw", "<image>"], "image"),
        (&["ask", "--endpoint", &endpoint, "--messages", "/nowhere.json"], "/nowhere.json"),
        (&["ask", "--endpoint", "http://127.0.0.1:1", "What?"], "127.0.0.1:1"),
        (&["ask", "--image", broken, "What?"], "image"),
        (&["inspect", "/nowhere"], "/nowhere"),
        (&["serve", "--no-such-flag"], "--no-such-flag"),
        (&["serve", "--config", "/nowhere.toml"], "/nowhere.toml"),
    ] {
        let output = IDEFICS.run(args.iter().map(OsString::from));
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{args:?} succeeded");
        assert!(said.contains(word) && !said.contains("panicked"), "{args:?} said: {said}");
    }
}

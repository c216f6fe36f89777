//! What a caller chooses about an answer: how tokens are sampled, when generation stops, what comes back with it.

use idefics_proto::gateway::v1::{
    ChatRequest, Conversation, FinishReason, GetModelRequest, ImageOptions, Message, Role, SamplingOptions, TokenizeRequest,
    tokenize_request::Input,
};
use idefics_tests::{
    checkpoint,
    client::{self, chat, complete, gateway, image, raw, text},
    golden::{self, Pictures},
    process::Idefics,
};
use std::{collections::HashSet, fs};

const IDEFICS: Idefics = Idefics(env!("CARGO_BIN_EXE_idefics-under-test"));

/// The random checkpoint's distributions are wide, so that sampling shows.
#[tokio::test]
async fn seeds_repeat_and_differ() {
    let model = checkpoint::random();
    let server = IDEFICS.serve(Some(model.path()));
    let mut client = gateway(&server).await;
    let case = golden::random_case("raw_text");
    let greedy = complete(&mut client, raw(case.prompt.as_ref().unwrap(), vec![], case.max_new_tokens)).await.unwrap();
    assert_eq!(greedy.token_ids, case.token_ids);

    let mut sampled = async |sampling: SamplingOptions| {
        let mut request = raw("The shape is", vec![], case.max_new_tokens);
        request.sampling = Some(SamplingOptions { max_new_tokens: Some(case.max_new_tokens), ..sampling });
        complete(&mut client, request).await.unwrap().token_ids
    };
    let hot = |seed| SamplingOptions { temperature: Some(1.0), seed: Some(seed), ..Default::default() };
    assert_eq!(sampled(hot(7)).await, sampled(hot(7)).await, "the same seed gives the same answer");
    let mut answers = HashSet::new();
    for seed in 0..4 {
        answers.insert(sampled(hot(seed)).await);
    }
    assert_eq!(answers.len(), 4, "other seeds give other answers");
    for only_the_best in [
        SamplingOptions { top_k: Some(1), ..hot(1) },
        SamplingOptions { top_p: Some(1e-6), ..hot(1) },
        SamplingOptions { temperature: Some(1e-3), ..hot(1) },
    ] {
        assert_eq!(sampled(only_the_best.clone()).await, case.token_ids, "{only_the_best:?} is greedy");
    }
}

#[test]
fn choices_share_a_prompt_and_differ() {
    let model = checkpoint::random();
    let server = IDEFICS.serve(Some(model.path()));
    let ask = |flags: &[&str]| {
        let common = ["--endpoint", &server.endpoint(), "--max-new-tokens", "8", "--temperature", "1", "--seed", "7"].map(str::to_owned);
        let flags = flags.iter().map(|flag| (*flag).to_owned());
        IDEFICS.ask(common.into_iter().chain(flags).chain(["--raw".to_owned(), "The shape is".to_owned()]))
    };
    let (alone, several) = (ask(&[]), ask(&["--n", "3"]));
    assert!(alone.choices.is_empty());
    assert_eq!((&several.token_ids, several.choices.len()), (&alone.token_ids, 3), "choice 0 is the answer alone");
    assert_eq!(several.choices[0].text, several.text);
    let distinct: HashSet<_> = several.choices.iter().map(|choice| &choice.token_ids).collect();
    assert_eq!(distinct.len(), 3);
    let tokens: usize = several.choices.iter().map(|choice| choice.token_ids.len()).sum();
    assert_eq!(several.usage.completion_tokens as usize, tokens);

    let output = IDEFICS.run(["ask", "--endpoint", &server.endpoint(), "--n", "2", "--max-new-tokens", "2", "--raw", "The shape is"]);
    let printed = String::from_utf8(output.stdout).unwrap();
    assert_eq!(printed.lines().filter(|line| line.starts_with("--- choice")).count(), 2, "{printed}");
}

#[tokio::test]
async fn stop_text_ends_the_answer_before_itself() {
    let server = IDEFICS.serve(None);
    let mut client = gateway(&server).await;
    let picture = fs::read(golden::demo_picture("pictures/01.png")).unwrap();
    let ask = |stop: &[&str]| {
        let mut request = chat(vec![image(picture.clone()), text("What is in this image?")]);
        request.sampling =
            Some(SamplingOptions { max_new_tokens: Some(40), stop: stop.iter().map(|s| (*s).to_owned()).collect(), ..Default::default() });
        request
    };
    let whole = client::ask(&mut client, ask(&[])).await.unwrap();
    assert_eq!(whole.text.trim(), "A blue star, a purple diamond and a pink cross on a gray background.");
    assert_eq!(whole.reason(), FinishReason::Stop);
    // Within a token, across tokens, and the one that comes first of several.
    for (stop, text) in [
        (&["diamond"][..], "A blue star, a purple "),
        (&["rple dia"], "A blue star, a pu"),
        (&["cross", "star"], "A blue "),
        (&["nothing of the kind"], whole.text.trim()),
    ] {
        let reply = client::ask(&mut client, ask(stop)).await.unwrap();
        assert_eq!(reply.text.trim_start(), text, "{stop:?}");
        assert_eq!(reply.reason(), FinishReason::Stop, "{stop:?}");
    }
}

#[tokio::test]
async fn max_new_tokens_and_the_context_end_an_answer_by_length() {
    let model = checkpoint::random();
    model.edit_json("config.json", |config| config["text_config"]["max_position_embeddings"] = 64.into());
    let server = IDEFICS.serve(Some(model.path()));
    let mut client = gateway(&server).await;
    let reply = complete(&mut client, raw("The shape is", vec![], 5)).await.unwrap();
    assert_eq!((reply.token_ids.len(), reply.reason()), (5, FinishReason::Length));
    let mut request = raw("The shape is", vec![], 0);
    request.sampling = None;
    let reply = complete(&mut client, request).await.unwrap();
    assert_eq!(reply.reason(), FinishReason::Length);
    assert_eq!(reply.started.prompt_tokens as usize + reply.token_ids.len(), 64, "the default fills the context");
}

#[tokio::test]
async fn tokenize_shows_what_a_model_gets() {
    let (model, pictures) = (checkpoint::random(), Pictures::write());
    let server = IDEFICS.serve(Some(model.path()));
    let mut client = gateway(&server).await;
    let case = golden::random_case("raw_image");
    let mut tokenize = async |input, split| {
        let image_options = Some(ImageOptions { split, ..Default::default() });
        client.tokenize(TokenizeRequest { input: Some(input), image_options }).await.unwrap().into_inner()
    };
    let prompt = tokenize(Input::Prompt(case.prompt.unwrap()), Some(false)).await;
    assert_eq!(prompt.token_ids, case.prompt_token_ids);
    assert_eq!((prompt.image_tokens, prompt.tokens.len()), (case.image_tokens, case.prompt_token_ids.len()));

    let case = golden::random_case("split_by_default");
    let png = fs::read(pictures.path("tall")).unwrap();
    for picture in [png, Vec::new()] {
        let content = vec![image(picture), text("What is in this image?")];
        let conversation = Conversation { messages: vec![Message { role: Role::User.into(), content }] };
        let chat = tokenize(Input::Conversation(conversation), None).await;
        assert_eq!(chat.token_ids, case.prompt_token_ids);
    }

    let plain = tokenize(Input::Text("The shape is".into()), None).await;
    assert_eq!(plain.token_ids, golden::random_case("raw_text").prompt_token_ids[1..], "plain text has no BOS");
}

#[tokio::test]
async fn the_model_is_described() {
    let model = checkpoint::random();
    let server = IDEFICS.serve(Some(model.path()));
    let described = gateway(&server).await.get_model(GetModelRequest {}).await.unwrap().into_inner();
    assert_eq!((described.vocab_size, described.hidden_size, described.tokens_per_image), (603, 128, 64));
    assert_eq!(described.max_model_tokens, 2048);
    let options = described.default_image_options.unwrap();
    assert_eq!((options.split, options.longest_edge, options.shortest_edge), (Some(true), Some(980), Some(378)));
    let mut stop = described.stop_token_ids;
    stop.sort_unstable();
    assert_eq!(stop, [2, 602]);
    let again = IDEFICS.serve(Some(checkpoint::random().path()));
    let again = gateway(&again).await.get_model(GetModelRequest {}).await.unwrap().into_inner();
    assert_eq!(described.fingerprint, again.fingerprint, "the same files give the same fingerprint");
}

#[tokio::test]
async fn parallel_requests_do_not_mix() {
    let (model, pictures) = (checkpoint::random(), Pictures::write());
    let server = IDEFICS.serve(Some(model.path()));
    let client = gateway(&server).await;
    let cases: Vec<_> = ["text", "image_alone", "interleaved", "turns_text", "same_twice", "unicode"].map(golden::random_case).into();
    let mut tasks = tokio::task::JoinSet::new();
    for case in cases.iter().chain(&cases).cloned() {
        let (mut client, request) = (client.clone(), request(&case, &pictures));
        tasks.spawn(async move {
            let reply = client::ask(&mut client, request).await.unwrap();
            assert_eq!(reply.token_ids, case.token_ids, "{}", case.name);
        });
    }
    client::within_deadline(tasks.join_all()).await;
}

/// The request of a case that is a conversation without splitting.
fn request(case: &golden::RandomCase, pictures: &Pictures) -> ChatRequest {
    let role = |name: &str| match name {
        "user" => Role::User,
        "assistant" => Role::Assistant,
        other => panic!("role {other}"),
    };
    let part = |part: &serde_json::Value| match part["path"].as_str() {
        Some(name) => image(fs::read(pictures.path(name)).unwrap()),
        None => text(part["text"].as_str().unwrap()),
    };
    let messages = case.messages.as_ref().unwrap().as_array().unwrap().iter().map(|message| Message {
        role: role(message["role"].as_str().unwrap()).into(),
        content: message["content"].as_array().unwrap().iter().map(part).collect(),
    });
    ChatRequest {
        messages: messages.collect(),
        image_options: Some(ImageOptions { split: Some(false), ..Default::default() }),
        sampling: Some(SamplingOptions { max_new_tokens: Some(case.max_new_tokens), ..Default::default() }),
        ..Default::default()
    }
}

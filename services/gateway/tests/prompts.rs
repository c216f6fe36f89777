//! Token ids equal those of the reference: `golden/make_prompts.py` made them, and the demo's own cases.

mod support;

use idefics_proto::{decoder::v1::FinishReason, gateway::v1 as pb};
use serde::Deserialize;
use std::path::Path;
use support::{Script, World, complete, text};

#[derive(Deserialize)]
struct Golden {
    chats: Vec<Chat>,
    raws: Vec<Raw>,
    texts: Vec<Ids>,
    typed: Vec<Ids>,
    decodes: Vec<Ids>,
}

#[derive(Deserialize)]
struct Chat {
    /// The role, then the parts; null is a picture.
    turns: Vec<Vec<Option<String>>>,
    split: bool,
    token_ids: Vec<u32>,
}

#[derive(Deserialize)]
struct Raw {
    prompt: String,
    images: usize,
    split: bool,
    token_ids: Vec<u32>,
}

#[derive(Deserialize)]
struct Ids {
    text: String,
    token_ids: Vec<u32>,
}

fn read<T: for<'a> Deserialize<'a>>(path: &str) -> T {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn golden() -> Golden {
    read("tests/golden/prompts.json")
}

fn role(name: &str) -> i32 {
    match name {
        "user" => pb::Role::User.into(),
        "assistant" => pb::Role::Assistant.into(),
        "system" => pb::Role::System.into(),
        other => panic!("no role {other}"),
    }
}

fn no_picture() -> pb::ContentPart {
    support::picture(&[])
}

async fn tokenize(world: &World, input: pb::tokenize_request::Input, split: bool) -> pb::TokenizeResponse {
    let image_options = Some(pb::ImageOptions { split: Some(split), ..Default::default() });
    world.client().tokenize(pb::TokenizeRequest { input: Some(input), image_options }).await.unwrap().into_inner()
}

async fn conversation(world: &World, messages: Vec<pb::Message>, split: bool) -> Vec<u32> {
    tokenize(world, pb::tokenize_request::Input::Conversation(pb::Conversation { messages }), split).await.token_ids
}

#[tokio::test(start_paused = true)]
async fn conversations_become_the_references_ids() {
    let world = World::new().await;
    for Chat { turns, split, token_ids } in golden().chats {
        let message = |turn: &Vec<Option<String>>| {
            let content = turn[1..].iter().map(|part| part.as_deref().map_or_else(no_picture, text)).collect();
            pb::Message { role: role(turn[0].as_deref().unwrap()), content }
        };
        assert_eq!(conversation(&world, turns.iter().map(message).collect(), split).await, token_ids, "{turns:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn raw_prompts_become_the_references_ids() {
    let world = World::new().await;
    for Raw { prompt, images, split, token_ids } in golden().raws {
        let response = tokenize(&world, pb::tokenize_request::Input::Prompt(prompt.clone()), split).await;
        assert_eq!(response.token_ids, token_ids, "{prompt:?}");
        assert_eq!(response.image_tokens as usize, images * 16 * if split { 5 } else { 1 }, "{prompt:?}");
        assert_eq!(response.tokens.len(), token_ids.len());
    }
}

#[tokio::test(start_paused = true)]
async fn special_tokens_in_plain_text_are_ordinary_characters() {
    let world = World::new().await;
    for Ids { text, token_ids } in golden().texts {
        let response = tokenize(&world, pb::tokenize_request::Input::Text(text.clone()), false).await;
        assert_eq!(response.token_ids, token_ids, "{text:?}");
        assert_eq!(response.image_tokens, 0);
    }
}

#[tokio::test(start_paused = true)]
async fn typed_special_tokens_reach_the_model_as_characters() {
    let world = World::new().await;
    for Ids { text: typed, token_ids } in golden().typed {
        assert_eq!(conversation(&world, vec![support::user(vec![text(&typed)])], false).await, token_ids, "{typed:?}");
        // In pieces it is the same text, and no special token either.
        for cut in (1..typed.len()).filter(|cut| typed.is_char_boundary(*cut)) {
            let (first, second) = typed.split_at(cut);
            assert_eq!(
                conversation(&world, vec![support::user(vec![text(first), text(second)])], false).await,
                token_ids,
                "{first:?} {second:?}"
            );
        }
    }
}

#[tokio::test(start_paused = true)]
async fn demo_cases_have_the_references_prompts() {
    let world = World::new().await;
    let cases: serde_json::Value = read("../../tests/golden/demo/cases.json");
    for case in cases["cases"].as_array().unwrap() {
        let message = |message: &serde_json::Value| {
            let part = |part: &serde_json::Value| part["text"].as_str().map_or_else(no_picture, text);
            pb::Message {
                role: role(message["role"].as_str().unwrap()),
                content: message["content"].as_array().unwrap().iter().map(part).collect(),
            }
        };
        let messages = case["messages"].as_array().unwrap().iter().map(message).collect();
        let expected: Vec<u32> = serde_json::from_value(case["prompt_token_ids"].clone()).unwrap();
        assert_eq!(conversation(&world, messages, false).await, expected, "{}", case["messages"]);
    }
}

#[tokio::test(start_paused = true)]
async fn demo_answers_have_the_references_text() {
    let world = World::new().await;
    let cases: serde_json::Value = read("../../tests/golden/demo/cases.json");
    for case in cases["cases"].as_array().unwrap() {
        let token_ids: Vec<u32> = serde_json::from_value(case["token_ids"].clone()).unwrap();
        world.script([Script::Tokens(token_ids.clone(), FinishReason::Stop)]);
        let answer = complete(&world, pb::GenerateRequest { prompt: "x".into(), ..Default::default() }).await;
        assert_eq!((answer.text.as_str(), answer.token_ids), (case["text"].as_str().unwrap(), token_ids));
    }
}

#[tokio::test(start_paused = true)]
async fn pieces_of_text_join_to_the_references_decoding() {
    let world = World::new().await;
    for Ids { text, token_ids } in golden().decodes {
        world.script([Script::Tokens(token_ids.clone(), FinishReason::Length)]);
        let answer = complete(&world, pb::GenerateRequest { prompt: "x".into(), ..Default::default() }).await;
        assert_eq!(answer.text, text, "{token_ids:?}");
        assert_eq!(answer.token_ids, token_ids);
    }
}

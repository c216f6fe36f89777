//! `idefics ask`: a question to the terminal, or as one JSON object.

use crate::{
    cli::AskArgs,
    endpoint::{Endpoint, describe, image_options, read_image},
};
use anyhow::{Context, Result, bail};
use idefics_proto::gateway::v1::{
    ChatRequest, ContentPart, Delta, FinishReason, Finished, GenerateRequest, GenerationEvent, Image, Message, Role, SamplingOptions,
    Started, Timings, TokenLogprobs, content_part::Part, generation_event::Event,
};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use std::{
    fmt::Write as _,
    io::Write as _,
    path::{Path, PathBuf},
};
use tonic::Streaming;

/// Asks and prints.
pub(crate) async fn run(args: AskArgs) -> Result<()> {
    let request = request(&args)?;
    let mut endpoint = Endpoint::open(&args.model).await?;
    let mut events = match request {
        Request::Chat(request) => Events::Chat(endpoint.client.chat(request).await.map_err(describe)?.into_inner()),
        Request::Generate(request) => Events::Generate(endpoint.client.generate(request).await.map_err(describe)?.into_inner()),
    };
    let n = args.n.unwrap_or(1) as usize;
    let mut answer = Answer { choices: vec![Choice::default(); n], ..Answer::default() };
    while let Some(event) = events.next().await? {
        match event {
            Event::Started(started) => answer.started = started,
            Event::Delta(delta) => {
                // Several answers at once would mix on the terminal.
                if !args.json && n == 1 {
                    print!("{}", delta.text);
                    std::io::stdout().flush()?;
                }
                answer.push(delta)?;
            }
            Event::PromptLogprobs(part) => answer.prompt_logprobs.extend(part.tokens),
            Event::Finished(finished) => answer.finished = Some(finished),
        }
    }
    let finished = answer.finished.take().context("the gateway ended the stream early")?;
    if args.json {
        println!("{}", to_json(&answer, &finished, endpoint.load_ms, &args));
    } else {
        if n > 1 {
            for (i, choice) in answer.choices.iter().enumerate() {
                println!("--- choice {i} ({})\n{}", name(choice.finish_reason), choice.text);
            }
        } else {
            println!();
        }
        eprintln!("{}", summary(&answer, &finished, endpoint.load_ms));
    }
    Ok(())
}

enum Request {
    Chat(ChatRequest),
    Generate(GenerateRequest),
}

enum Events {
    Chat(Streaming<idefics_proto::gateway::v1::ChatResponse>),
    Generate(Streaming<idefics_proto::gateway::v1::GenerateResponse>),
}

impl Events {
    async fn next(&mut self) -> Result<Option<Event>> {
        let event: Option<Option<GenerationEvent>> = match self {
            Self::Chat(stream) => stream.message().await.map_err(describe)?.map(|response| response.event),
            Self::Generate(stream) => stream.message().await.map_err(describe)?.map(|response| response.event),
        };
        event.map(|event| event.and_then(|e| e.event).context("the gateway sent an empty event; it may be of a newer version")).transpose()
    }
}

/// What has arrived so far.
#[derive(Default)]
struct Answer {
    started: Started,
    /// Of the prompt's tokens but the first.
    prompt_logprobs: Vec<TokenLogprobs>,
    choices: Vec<Choice>,
    finished: Option<Finished>,
}

#[derive(Clone, Default)]
struct Choice {
    text: String,
    token_ids: Vec<u32>,
    logprobs: Vec<TokenLogprobs>,
    finish_reason: FinishReason,
}

impl Answer {
    fn push(&mut self, delta: Delta) -> Result<()> {
        let reason = delta.finish_reason();
        let choice = self.choices.get_mut(delta.choice as usize).context("the gateway sent a choice that was not asked for")?;
        choice.text.push_str(&delta.text);
        choice.token_ids.extend(delta.token_ids);
        choice.logprobs.extend(delta.logprobs);
        choice.finish_reason = reason;
        Ok(())
    }
}

fn request(args: &AskArgs) -> Result<Request> {
    let sampling = Some(SamplingOptions {
        max_new_tokens: args.max_new_tokens,
        temperature: args.temperature,
        top_p: args.top_p,
        top_k: args.top_k,
        seed: args.seed,
        stop: args.stop.clone(),
        logprobs: args.logprobs,
        min_p: args.min_p,
        typical_p: args.typical_p,
        repetition_penalty: args.repetition_penalty,
        presence_penalty: args.presence_penalty,
        frequency_penalty: args.frequency_penalty,
        logit_bias: args.logit_bias.iter().copied().collect(),
        stop_token_ids: args.stop_token_ids.clone(),
        min_new_tokens: args.min_new_tokens,
        ignore_eos: args.ignore_eos,
        n: args.n,
        prompt_logprobs: args.prompt_logprobs,
    });
    let image_options = Some(image_options(&args.image_options));
    let images = args.images.iter().map(|path| read_image(path)).collect::<Result<Vec<_>>>()?;
    let prompt = args.prompt.clone().unwrap_or_default();
    if args.raw {
        return Ok(Request::Generate(GenerateRequest {
            prompt,
            images,
            image_options,
            sampling,
            return_prompt_token_ids: args.json,
            cache_salt: Default::default(),
            priority: args.priority,
        }));
    }
    let messages = match &args.messages {
        Some(file) => read_messages(file)?,
        None => {
            let parts = images.into_iter().map(Part::Image).chain([Part::Text(prompt)]);
            vec![Message { role: Role::User.into(), content: parts.map(|part| ContentPart { part: Some(part) }).collect() }]
        }
    };
    Ok(Request::Chat(ChatRequest {
        messages,
        image_options,
        sampling,
        return_prompt_token_ids: args.json,
        cache_salt: Default::default(),
        priority: args.priority,
    }))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileMessage {
    role: String,
    content: Vec<FilePart>,
}

#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "lowercase", deny_unknown_fields)]
enum FilePart {
    Text { text: String },
    Image { path: PathBuf },
}

/// Reads a conversation. Paths of pictures are relative to the current folder or, failing that, to the file's.
fn read_messages(file: &Path) -> Result<Vec<Message>> {
    let text = std::fs::read_to_string(file).with_context(|| format!("{} cannot be read", file.display()))?;
    let expected = "expected a list of {role, content: [{type: \"text\", text}, {type: \"image\", path}]}";
    let messages: Vec<FileMessage> = serde_json::from_str(&text).with_context(|| format!("{}: {expected}", file.display()))?;
    let folder = file.parent().unwrap_or(Path::new("."));
    messages
        .into_iter()
        .map(|message| {
            let role = match message.role.as_str() {
                "user" => Role::User,
                "assistant" => Role::Assistant,
                "system" => Role::System,
                other => bail!("{}: role is {other:?}, expected user, assistant or system", file.display()),
            };
            let content = message.content.into_iter().map(|part| {
                let part = match part {
                    FilePart::Text { text } => Part::Text(text),
                    FilePart::Image { path } => Part::Image(read_near(&path, folder)?),
                };
                Ok(ContentPart { part: Some(part) })
            });
            Ok(Message { role: role.into(), content: content.collect::<Result<_>>()? })
        })
        .collect()
}

fn read_near(path: &Path, folder: &Path) -> Result<Image> {
    if path.exists() { read_image(path) } else { read_image(&folder.join(path)) }
}

fn name(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
        FinishReason::Unspecified => "unspecified",
    }
}

/// Phases in order, in milliseconds.
fn phases(timings: &Timings, load_ms: Option<f64>) -> Vec<(&'static str, f64)> {
    let mut phases: Vec<_> = load_ms.map(|ms| ("load", ms)).into_iter().collect();
    phases.extend([
        ("preprocess", timings.preprocess_ms),
        ("encode_queue", timings.encode_queue_ms),
        ("encode", timings.encode_ms),
        ("ship", timings.ship_ms),
        ("queue", timings.queue_ms),
        ("prefill", timings.prefill_ms),
        ("decode", timings.decode_ms),
        ("total", timings.total_ms),
    ]);
    phases
}

fn to_json(answer: &Answer, finished: &Finished, load_ms: Option<f64>, args: &AskArgs) -> Value {
    let usage = finished.usage.unwrap_or_default();
    let timings: Map<String, Value> =
        phases(&finished.timings.unwrap_or_default(), load_ms).into_iter().map(|(name, ms)| (name.to_owned(), json!(ms))).collect();
    let choices = answer.choices.iter().map(|choice| choice_json(choice, args.logprobs.is_some()));
    let mut choices: Vec<Map<String, Value>> = choices.collect();
    // The first choice's fields stand in the object itself, with others or without.
    let mut object = choices.first().cloned().unwrap_or_default();
    object.insert("prompt_token_ids".into(), json!(answer.started.prompt_token_ids));
    if args.prompt_logprobs.is_some() {
        // One for each of the prompt's tokens; the first has none.
        let tokens = answer.prompt_logprobs.iter().map(logprobs_json);
        object.insert("prompt_logprobs".into(), std::iter::once(Value::Null).chain(tokens).collect());
    }
    let usage = json!({
        "prompt_tokens": usage.prompt_tokens,
        "image_tokens": usage.image_tokens,
        "completion_tokens": usage.completion_tokens,
        "cached_tokens": usage.cached_tokens,
    });
    object.insert("usage".into(), usage);
    object.insert("timings_ms".into(), timings.into());
    if choices.len() > 1 {
        let choices: Vec<Value> = choices.drain(..).map(Value::Object).collect();
        object.insert("choices".into(), choices.into());
    }
    object.into()
}

fn choice_json(choice: &Choice, with_logprobs: bool) -> Map<String, Value> {
    let mut object = Map::new();
    object.insert("text".into(), json!(choice.text));
    object.insert("token_ids".into(), json!(choice.token_ids));
    object.insert("finish_reason".into(), json!(name(choice.finish_reason)));
    if with_logprobs {
        object.insert("logprobs".into(), choice.logprobs.iter().map(logprobs_json).collect());
    }
    object
}

fn logprobs_json(logprobs: &TokenLogprobs) -> Value {
    let top: Vec<Value> = logprobs.top.iter().map(|t| json!({"token_id": t.token_id, "logprob": t.logprob})).collect();
    json!({"token_id": logprobs.token_id, "logprob": logprobs.logprob, "top": top})
}

/// Where the time went, on one line.
fn summary(answer: &Answer, finished: &Finished, load_ms: Option<f64>) -> String {
    let (usage, timings) = (finished.usage.unwrap_or_default(), finished.timings.unwrap_or_default());
    let reasons: Vec<&str> = answer.choices.iter().map(|choice| name(choice.finish_reason)).collect();
    let mut line = String::from("[");
    for (name, ms) in phases(&timings, load_ms) {
        // Writing to a string cannot fail.
        let _ = write!(line, "{} {ms:.1} ms, ", name.replace('_', " "));
    }
    let _ = write!(
        line,
        "{} prompt tokens ({} of images), {} generated, {}]",
        usage.prompt_tokens,
        usage.image_tokens,
        usage.completion_tokens,
        reasons.join(", ")
    );
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_file_is_read_with_pictures_beside_it() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("a.png"), b"picture").unwrap();
        let file = folder.path().join("messages.json");
        std::fs::write(&file, r#"[{"role": "user", "content": [{"type": "image", "path": "a.png"}, {"type": "text", "text": "hi"}]}]"#)
            .unwrap();
        let messages = read_messages(&file).unwrap();
        assert_eq!(messages[0].role(), Role::User);
        assert!(matches!(&messages[0].content[0].part, Some(Part::Image(image)) if image.data == "picture"));
        std::fs::write(&file, r#"[{"role": "robot", "content": []}]"#).unwrap();
        assert!(read_messages(&file).unwrap_err().to_string().contains("\"robot\""));
        std::fs::write(&file, r#"{"role": "user"}"#).unwrap();
        assert!(format!("{:#}", read_messages(&file).unwrap_err()).contains("expected a list"));
    }
}

//! Requests from the wire to values that make sense, or everything that is wrong with them.

mod sampling;

pub(crate) use sampling::Sampling;

use crate::{config::GatewayConfig, prompt::SPLIT_SUB_IMAGES};
use bytes::Bytes;
use idefics_common::{
    checkpoint::{Checkpoint, ImageDefaults},
    status::Violation,
};
use idefics_proto::gateway::v1 as pb;
use std::ops::RangeInclusive;

/// Who speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    User,
    Assistant,
    System,
}

/// A part of a turn.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    Text(String),
    Image(Picture),
}

impl Part {
    pub(crate) fn text(&self) -> Option<&str> {
        match self {
            Self::Text(text) => Some(text),
            Self::Image(_) => None,
        }
    }
}

/// A turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Turn {
    pub(crate) role: Role,
    pub(crate) parts: Vec<Part>,
}

/// An encoded picture and where in the request it came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Picture {
    pub(crate) data: Bytes,
    /// Path of its bytes, as in `messages[0].content[1].image.data`.
    pub(crate) field: String,
}

/// How pictures are cut and resized, defaults filled in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ImageOptions {
    pub(crate) split: bool,
    pub(crate) longest_edge: u32,
    pub(crate) shortest_edge: u32,
}

impl ImageOptions {
    pub(crate) fn sub_images(self) -> u32 {
        if self.split { SPLIT_SUB_IMAGES } else { 1 }
    }
}

/// What a `ChatRequest` and a `GenerateRequest` have in common.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Generation {
    pub(crate) image_options: ImageOptions,
    pub(crate) sampling: Sampling,
    pub(crate) return_prompt_token_ids: bool,
    pub(crate) cache_salt: Bytes,
    pub(crate) priority: i32,
}

/// A `ChatRequest`.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct ValidChat {
    pub(crate) turns: Vec<Turn>,
    pub(crate) generation: Generation,
}

/// A `GenerateRequest`; whether the prompt's marks fit its pictures is checked with the tokenizer.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct ValidGenerate {
    pub(crate) prompt: String,
    pub(crate) pictures: Vec<Picture>,
    pub(crate) generation: Generation,
}

/// A `TokenizeRequest`.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct ValidTokenize {
    pub(crate) input: TokenizeInput,
    pub(crate) image_options: ImageOptions,
}

/// What to tokenize.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum TokenizeInput {
    Text(String),
    Prompt(String),
    Conversation(Vec<Turn>),
}

/// An `EncodeImagesRequest`.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct ValidEncodeImages {
    pub(crate) pictures: Vec<Picture>,
    pub(crate) image_options: ImageOptions,
}

/// What a request may ask for.
#[derive(Clone, Debug)]
pub(crate) struct Limits {
    max_images: usize,
    max_image_bytes: usize,
    max_text_bytes: usize,
    max_messages: usize,
    max_stop_texts: usize,
    max_stop_bytes: usize,
    default_max_new_tokens: u32,
    vocab_size: u32,
    /// The checkpoint's own image options.
    pub(crate) default_image_options: ImageOptions,
    /// Edge of a patch and of the vision tower's largest picture, in pixels.
    patch_size: u32,
    image_size: u32,
}

/// Most violations that an answer carries; clients take no more than some kilobytes of status.
const MAX_VIOLATIONS: usize = 16;
/// Most parts of a message: each costs memory, even an empty one.
const MAX_PARTS: usize = 256;
const MAX_CACHE_SALT_BYTES: usize = 256;
const PRIORITIES: RangeInclusive<i32> = -10..=10;

impl Limits {
    pub(crate) fn new(config: &GatewayConfig, checkpoint: &Checkpoint) -> Self {
        let ImageDefaults { longest_edge, shortest_edge } = checkpoint.preprocessor.size;
        Self {
            max_images: config.max_images,
            max_image_bytes: config.max_image_bytes,
            max_text_bytes: config.max_text_bytes,
            max_messages: config.max_messages,
            max_stop_texts: config.max_stop_texts,
            max_stop_bytes: config.max_stop_bytes,
            default_max_new_tokens: config.default_max_new_tokens,
            vocab_size: checkpoint.config.text_config.vocab_size as u32,
            default_image_options: ImageOptions { split: checkpoint.preprocessor.do_image_splitting, longest_edge, shortest_edge },
            patch_size: checkpoint.config.vision_config.patch_size as u32,
            image_size: checkpoint.config.vision_config.image_size as u32,
        }
    }

    pub(crate) fn chat(&self, request: pb::ChatRequest) -> Result<ValidChat, Vec<Violation>> {
        let mut check = Check::new(self, "messages", "messages");
        let turns = check.turns("messages", request.messages, PictureBytes::Needed);
        let image_options = check.image_options(request.image_options);
        let sampling = check.sampling(request.sampling.unwrap_or_default());
        let cache_salt = check.cache_salt(request.cache_salt);
        let priority = check.priority(request.priority);
        let return_prompt_token_ids = request.return_prompt_token_ids;
        let generation = Generation { image_options, sampling, return_prompt_token_ids, cache_salt, priority };
        check.finish(ValidChat { turns, generation })
    }

    pub(crate) fn generate(&self, request: pb::GenerateRequest) -> Result<ValidGenerate, Vec<Violation>> {
        let mut check = Check::new(self, "prompt", "images");
        check.text("prompt", &request.prompt);
        if request.prompt.is_empty() {
            check.refuse("prompt", "is empty, expected text");
        }
        let pictures = check.pictures(request.images);
        let image_options = check.image_options(request.image_options);
        let sampling = check.sampling(request.sampling.unwrap_or_default());
        let return_prompt_token_ids = request.return_prompt_token_ids;
        let cache_salt = check.cache_salt(request.cache_salt);
        let priority = check.priority(request.priority);
        let prompt = request.prompt;
        let generation = Generation { image_options, sampling, return_prompt_token_ids, cache_salt, priority };
        check.finish(ValidGenerate { prompt, pictures, generation })
    }

    pub(crate) fn tokenize(&self, request: pb::TokenizeRequest) -> Result<ValidTokenize, Vec<Violation>> {
        use pb::tokenize_request::Input;
        let mut check = Check::new(self, "conversation.messages", "conversation.messages");
        let image_options = check.image_options(request.image_options);
        let input = match request.input {
            Some(Input::Text(text)) => {
                check.text("text", &text);
                TokenizeInput::Text(text)
            }
            Some(Input::Prompt(prompt)) => {
                check.text("prompt", &prompt);
                TokenizeInput::Prompt(prompt)
            }
            Some(Input::Conversation(conversation)) => {
                TokenizeInput::Conversation(check.turns("conversation.messages", conversation.messages, PictureBytes::Optional))
            }
            None => {
                check.refuse("input", "is missing, expected text, prompt or conversation");
                TokenizeInput::Text(String::new())
            }
        };
        check.finish(ValidTokenize { input, image_options })
    }

    pub(crate) fn encode_images(&self, request: pb::EncodeImagesRequest) -> Result<ValidEncodeImages, Vec<Violation>> {
        let mut check = Check::new(self, "images", "images");
        if request.images.is_empty() {
            check.refuse("images", "is empty, expected one picture or more");
        }
        let pictures = check.pictures(request.images);
        let image_options = check.image_options(request.image_options);
        check.finish(ValidEncodeImages { pictures, image_options })
    }
}

/// Whether a picture may come without its bytes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum PictureBytes {
    Needed,
    Optional,
}

/// One pass over a request.
struct Check<'a> {
    limits: &'a Limits,
    /// Fields that are named where all texts or all pictures together are too much.
    text_field: &'static str,
    image_field: &'static str,
    /// At most [`MAX_VIOLATIONS`].
    violations: Vec<Violation>,
    /// Violations beyond those.
    unlisted: usize,
    text_bytes: usize,
    images: usize,
}

impl<'a> Check<'a> {
    fn new(limits: &'a Limits, text_field: &'static str, image_field: &'static str) -> Self {
        Self { limits, text_field, image_field, violations: Vec::new(), unlisted: 0, text_bytes: 0, images: 0 }
    }

    fn refuse(&mut self, field: impl Into<String>, what: impl Into<String>) {
        if self.violations.len() < MAX_VIOLATIONS {
            self.violations.push(Violation::new(field, what));
        } else {
            self.unlisted += 1;
        }
    }

    fn finish<T>(mut self, valid: T) -> Result<T, Vec<Violation>> {
        let Limits { max_images, max_text_bytes, .. } = *self.limits;
        if self.images > max_images {
            let what = format!("has {} pictures, limit is {max_images}; send fewer or raise gateway.max_images", self.images);
            self.refuse(self.image_field, what);
        }
        if self.text_bytes > max_text_bytes {
            let what =
                format!("texts are {} bytes, limit is {max_text_bytes}; shorten them or raise gateway.max_text_bytes", self.text_bytes);
            self.refuse(self.text_field, what);
        }
        if self.unlisted > 0 {
            self.violations.push(Violation::new("", format!("{} more problems are not listed", self.unlisted)));
        }
        if self.violations.is_empty() { Ok(valid) } else { Err(self.violations) }
    }

    fn text(&mut self, field: &str, text: &str) {
        // The total is what is limited; a single text past it is named.
        let limit = self.limits.max_text_bytes;
        if text.len() > limit {
            self.refuse(field, format!("is {} bytes, limit is {limit}; shorten it or raise gateway.max_text_bytes", text.len()));
        } else {
            self.text_bytes += text.len();
        }
    }

    fn turns(&mut self, field: &str, messages: Vec<pb::Message>, bytes: PictureBytes) -> Vec<Turn> {
        let limit = self.limits.max_messages;
        if messages.is_empty() {
            self.refuse(field, "is empty, expected one message or more");
        }
        if messages.len() > limit {
            self.refuse(field, format!("has {} messages, limit is {limit}; send fewer or raise gateway.max_messages", messages.len()));
            return Vec::new();
        }
        messages.into_iter().enumerate().map(|(i, message)| self.turn(&format!("{field}[{i}]"), message, bytes)).collect()
    }

    fn turn(&mut self, field: &str, message: pb::Message, bytes: PictureBytes) -> Turn {
        use pb::content_part::Part as Value;
        let role = match pb::Role::try_from(message.role) {
            Ok(pb::Role::User) => Role::User,
            Ok(pb::Role::Assistant) => Role::Assistant,
            Ok(pb::Role::System) => Role::System,
            Ok(pb::Role::Unspecified) | Err(_) => {
                let what = format!("is {}, expected ROLE_USER, ROLE_ASSISTANT or ROLE_SYSTEM", role_name(message.role));
                self.refuse(format!("{field}.role"), what);
                Role::User
            }
        };
        if message.content.is_empty() {
            self.refuse(format!("{field}.content"), "is empty, expected one part or more");
        }
        if message.content.len() > MAX_PARTS {
            self.refuse(format!("{field}.content"), format!("has {} parts, limit is {MAX_PARTS}; join texts", message.content.len()));
            return Turn { role, parts: Vec::new() };
        }
        let mut parts = Vec::with_capacity(message.content.len());
        for (i, part) in message.content.into_iter().enumerate() {
            let field = format!("{field}.content[{i}]");
            match part.part {
                Some(Value::Text(text)) => {
                    self.text(&format!("{field}.text"), &text);
                    parts.push(Part::Text(text));
                }
                Some(Value::Image(image)) => parts.push(Part::Image(self.picture(format!("{field}.image.data"), image.data, bytes))),
                None => self.refuse(field, "is empty, expected text or image"),
            }
        }
        Turn { role, parts }
    }

    fn pictures(&mut self, images: Vec<pb::Image>) -> Vec<Picture> {
        if images.len() > self.limits.max_images {
            // Counted but not looked at: a message has room for millions of empty ones.
            self.images += images.len();
            return Vec::new();
        }
        let picture = |(i, image): (usize, pb::Image)| self.picture(format!("images[{i}].data"), image.data, PictureBytes::Needed);
        images.into_iter().enumerate().map(picture).collect()
    }

    fn picture(&mut self, field: String, data: Bytes, bytes: PictureBytes) -> Picture {
        let limit = self.limits.max_image_bytes;
        if data.is_empty() && bytes == PictureBytes::Needed {
            self.refuse(field.as_str(), "is empty, expected a JPEG, PNG, WebP, GIF, BMP or TIFF file");
        }
        if data.len() > limit {
            let what = format!("is {} bytes, limit is {limit}; shrink it or raise gateway.max_image_bytes", data.len());
            self.refuse(field.as_str(), what);
        }
        self.images += 1;
        Picture { data, field }
    }

    fn image_options(&mut self, options: Option<pb::ImageOptions>) -> ImageOptions {
        let options = options.unwrap_or_default();
        let Limits { default_image_options: default, patch_size, image_size, .. } = *self.limits;
        let (longest, shortest) =
            (options.longest_edge.unwrap_or(default.longest_edge), options.shortest_edge.unwrap_or(default.shortest_edge));
        // A default is at fault only together with the value that was given, so only given values are named.
        if options.longest_edge.is_some() && !(shortest.min(image_size)..=image_size).contains(&longest) {
            let what = format!("is {longest}, expected from the shortest edge, {shortest}, to {image_size}");
            self.refuse("image_options.longest_edge", what);
        }
        if options.shortest_edge.is_some() && !(patch_size..=longest.max(patch_size)).contains(&shortest) {
            let what = format!("is {shortest}, expected from {patch_size} to the longest edge, {longest}");
            self.refuse("image_options.shortest_edge", what);
        }
        ImageOptions { split: options.split.unwrap_or(default.split), longest_edge: longest, shortest_edge: shortest }
    }

    fn priority(&mut self, priority: i32) -> i32 {
        if !PRIORITIES.contains(&priority) {
            self.refuse("priority", format!("is {priority}, expected from {} to {}", PRIORITIES.start(), PRIORITIES.end()));
        }
        priority
    }

    fn cache_salt(&mut self, salt: Bytes) -> Bytes {
        if salt.len() > MAX_CACHE_SALT_BYTES {
            self.refuse("cache_salt", format!("has {} bytes, expected at most {MAX_CACHE_SALT_BYTES}", salt.len()));
            return Bytes::new();
        }
        // A slice of the request's body would keep all of it.
        Bytes::copy_from_slice(&salt)
    }
}

fn role_name(role: i32) -> String {
    pb::Role::try_from(role).map_or_else(|_| role.to_string(), |role| role.as_str_name().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::checkpoint;

    fn limits() -> Limits {
        let config =
            GatewayConfig { max_images: 2, max_image_bytes: 10, max_text_bytes: 100, max_messages: 40, ..GatewayConfig::default() };
        Limits::new(&config, &checkpoint())
    }

    fn message(parts: Vec<pb::content_part::Part>) -> pb::Message {
        let content = parts.into_iter().map(|part| pb::ContentPart { part: Some(part) }).collect();
        pb::Message { role: pb::Role::User.into(), content }
    }

    fn text(bytes: usize) -> pb::content_part::Part {
        pb::content_part::Part::Text("x".repeat(bytes))
    }

    fn image(bytes: usize) -> pb::content_part::Part {
        pb::content_part::Part::Image(pb::Image { data: vec![0; bytes].into() })
    }

    fn fields(result: Result<ValidChat, Vec<Violation>>) -> Vec<String> {
        result.err().unwrap_or_default().into_iter().map(|violation| violation.field).collect()
    }

    fn chat(parts: Vec<pb::content_part::Part>) -> pb::ChatRequest {
        pb::ChatRequest { messages: vec![message(parts)], ..Default::default() }
    }

    #[test]
    fn limits_are_inclusive() {
        assert_eq!(fields(limits().chat(chat(vec![text(100), image(10), image(10)]))), Vec::<String>::new());
        assert_eq!(fields(limits().chat(chat(vec![text(60), text(41)]))), ["messages"]);
        assert_eq!(fields(limits().chat(chat(vec![text(101)]))), ["messages[0].content[0].text"]);
        assert_eq!(fields(limits().chat(chat(vec![image(11)]))), ["messages[0].content[0].image.data"]);
        assert_eq!(fields(limits().chat(chat(vec![image(1), image(1), image(1)]))), ["messages"]);
        assert_eq!(fields(limits().chat(pb::ChatRequest::default())), ["messages"]);
    }

    #[test]
    fn an_answer_lists_no_more_problems_than_fit_into_it() {
        let messages = vec![pb::Message::default(); 40];
        let violations = limits().chat(pb::ChatRequest { messages, ..Default::default() }).unwrap_err();
        assert_eq!(violations.len(), MAX_VIOLATIONS + 1);
        assert!(violations[MAX_VIOLATIONS].description.contains("64 more"), "{violations:?}");
    }

    #[test]
    fn problems_beyond_the_limit_are_counted_but_not_kept() {
        let limits = limits();
        let mut check = Check::new(&limits, "", "");
        for i in 0..100_000 {
            check.refuse(format!("messages[{i}]"), "is bad");
        }
        assert_eq!((check.violations.len(), check.unlisted), (MAX_VIOLATIONS, 100_000 - MAX_VIOLATIONS));
        assert!(check.violations.capacity() <= 2 * MAX_VIOLATIONS);
    }

    #[test]
    fn too_many_pictures_are_not_looked_at_one_by_one() {
        let request = pb::EncodeImagesRequest { images: vec![pb::Image::default(); 1000], image_options: None };
        let violations = limits().encode_images(request).unwrap_err();
        assert_eq!(violations.iter().map(|violation| violation.field.as_str()).collect::<Vec<_>>(), ["images"]);
        assert!(violations[0].description.contains("has 1000 pictures, limit is 2"), "{violations:?}");
    }

    #[test]
    fn edges_are_checked_against_each_other_and_the_model() {
        let options = |longest_edge, shortest_edge| {
            let image_options = Some(pb::ImageOptions { split: None, longest_edge, shortest_edge });
            fields(limits().chat(pb::ChatRequest { image_options, ..chat(vec![text(1)]) }))
        };
        // The demo's own: longest edge 168 of at most 168, shortest edge 56.
        for (longest, shortest) in [(None, None), (Some(168), Some(168)), (Some(56), None), (None, Some(14)), (Some(20), Some(14))] {
            assert_eq!(options(longest, shortest), Vec::<String>::new(), "{longest:?} {shortest:?}");
        }
        assert_eq!(options(Some(169), None), ["image_options.longest_edge"]);
        assert_eq!(options(Some(55), None), ["image_options.longest_edge"], "the checkpoint's shortest edge is 56");
        assert_eq!(options(None, Some(13)), ["image_options.shortest_edge"]);
        assert_eq!(options(None, Some(169)), ["image_options.shortest_edge"]);
        assert_eq!(options(Some(0), Some(0)), ["image_options.shortest_edge"]);
        assert_eq!(options(Some(u32::MAX), Some(u32::MAX)), ["image_options.longest_edge"]);
    }

    #[test]
    fn priorities_are_from_minus_10_to_10() {
        let of = |priority| fields(limits().chat(pb::ChatRequest { priority, ..chat(vec![text(1)]) }));
        [-10, 0, 10].into_iter().for_each(|good| assert_eq!(of(good), Vec::<String>::new()));
        [-11, 11, i32::MIN, i32::MAX].into_iter().for_each(|bad| assert_eq!(of(bad), ["priority"]));
    }

    #[test]
    fn image_defaults_are_the_checkpoints() {
        let valid = limits().chat(chat(vec![text(1)])).unwrap();
        assert_eq!(valid.generation.image_options, ImageOptions { split: false, longest_edge: 168, shortest_edge: 56 });
    }

    #[test]
    fn pictures_to_be_counted_need_no_bytes() {
        let conversation = pb::Conversation { messages: vec![message(vec![image(0)])] };
        let request = pb::TokenizeRequest { input: Some(pb::tokenize_request::Input::Conversation(conversation)), image_options: None };
        assert!(limits().tokenize(request).is_ok());
        assert_eq!(limits().tokenize(pb::TokenizeRequest::default()).unwrap_err()[0].field, "input");
        assert_eq!(limits().encode_images(pb::EncodeImagesRequest::default()).unwrap_err()[0].field, "images");
        assert_eq!(limits().generate(pb::GenerateRequest::default()).unwrap_err()[0].field, "prompt");
    }
}

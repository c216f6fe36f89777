//! Lays a conversation out as the checkpoint's own chat template says, keeping track of what a user typed.
//!
//! The template sees a placeholder instead of each text, so that what it writes itself can be told from what was typed. It is
//! rendered a second time with the texts themselves: where both agree once the texts are put in (as they are, or trimmed, which
//! templates do), the layout is exactly the reference's. A template that changes texts in other ways is followed as long as
//! the result has no special token that the template did not write; otherwise the request is refused, never guessed at.

use crate::{
    GatewayError,
    tokenizer::{MarkedText, TextTokenizer, Unit},
    validate::{Part, Role, Turn},
};
use idefics_common::checkpoint::Checkpoint;
use minijinja::{Environment, Error, ErrorKind, Value, context, syntax::SyntaxConfig, value::Kwargs};
use serde::Serialize;

/// Enclose the number of a text in a placeholder. Unicode promises never to assign them, and no template contains them.
const OPEN: char = '\u{FDD0}';
const CLOSE: char = '\u{FDD1}';

/// Work allowed per part, and in total: Idefics2's own template needs about 30 per part.
const FUEL_PER_PART: u64 = 2_000;
const FUEL: u64 = 100_000;
/// Text that a unit of fuel pays for; minijinja charges one per 64 bytes that are written or made.
const BYTES_PER_FUEL: u64 = 4;

const NAME: &str = "chat_template";

/// Why a conversation has no layout.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum TemplateError {
    /// The checkpoint is a base model.
    Missing,
    /// The conversation is at fault.
    Invalid(String),
    /// The template is at fault.
    Broken(String),
}

/// The checkpoint's template, compiled.
pub(crate) struct ChatTemplate {
    environment: Environment<'static>,
    source_bytes: u64,
    exists: bool,
    bos_token: String,
}

impl ChatTemplate {
    pub(crate) fn new(checkpoint: &Checkpoint) -> Result<Self, GatewayError> {
        let refuse = |what: String| GatewayError::Template { checkpoint: checkpoint.name(), what };
        let mut environment = builtins().map_err(|e| refuse(e.to_string()))?;
        let source = checkpoint.chat_template.clone();
        if source.as_ref().is_some_and(|source| source.contains([OPEN, CLOSE])) {
            return Err(refuse("contains U+FDD0 or U+FDD1, which are reserved; remove them".into()));
        }
        let (exists, source_bytes) = (source.is_some(), source.as_ref().map_or(0, |source| source.len() as u64));
        if let Some(source) = source {
            environment.add_template_owned(NAME, source).map_err(|e| refuse(e.to_string()))?;
        }
        Ok(Self { environment, source_bytes, exists, bos_token: checkpoint.bos_token.clone() })
    }

    /// The conversation as one text, ready for an answer.
    pub(crate) fn render(&self, turns: &[Turn], tokenizer: &TextTokenizer) -> Result<MarkedText, TemplateError> {
        if !self.exists {
            return Err(TemplateError::Missing);
        }
        let texts: Vec<&str> = turns.iter().flat_map(|turn| &turn.parts).filter_map(Part::text).collect();
        let layout = self.render_with(turns, &texts, |number, _| format!("{OPEN}{number}{CLOSE}"))?;
        let reference = self.render_with(turns, &texts, |_, text| text.to_owned())?;
        let filled = fill(&layout, &texts, |text| text).filter(|marked| marked.text == reference);
        let filled = filled.or_else(|| fill(&layout, &texts, str::trim).filter(|marked| marked.text == reference));
        if let Some(marked) = filled {
            return Ok(marked);
        }
        if let Some(token) = texts.iter().find_map(|text| tokenizer.special_in(text)) {
            let what = format!("a text contains {token}, which this checkpoint's chat template mixes with its own; leave it out");
            return Err(TemplateError::Invalid(what));
        }
        let followed = MarkedText::authored(reference);
        if specials(tokenizer, &followed) == specials(tokenizer, &MarkedText::authored(layout)) {
            return Ok(followed);
        }
        let what = "texts join to a special token in this checkpoint's chat template; leave it out".into();
        Err(TemplateError::Invalid(what))
    }

    fn render_with(&self, turns: &[Turn], texts: &[&str], show: impl Fn(usize, &str) -> String) -> Result<String, TemplateError> {
        let mut shown = texts.iter().enumerate().map(|(number, text)| show(number, text));
        let mut parts = 0;
        let messages: Vec<Value> = turns
            .iter()
            .map(|turn| {
                let content = turn.parts.iter().map(|part| {
                    parts += 1;
                    match part {
                        Part::Text(_) => context! { type => "text", text => shown.next().unwrap_or_default() },
                        Part::Image(_) => context! { type => "image" },
                    }
                });
                context! { role => role(turn.role), content => content.collect::<Vec<Value>>() }
            })
            .collect();
        let bytes: u64 = texts.iter().map(|text| text.len() as u64).sum::<u64>() + self.source_bytes;
        let mut environment = self.environment.clone();
        environment.set_fuel(Some(FUEL + FUEL_PER_PART * parts + bytes / BYTES_PER_FUEL));
        let template = environment.get_template(NAME).map_err(|e| broken(&e))?;
        template.render(context! { messages, add_generation_prompt => true, bos_token => self.bos_token.as_str() }).map_err(|e| broken(&e))
    }
}

fn role(role: Role) -> &'static str {
    match role {
        Role::User => "user",
        Role::Assistant => "assistant",
        Role::System => "system",
    }
}

/// Puts `texts` where their placeholders stand; `None` if a placeholder is damaged.
fn fill(layout: &str, texts: &[&str], shape: impl Fn(&str) -> &str) -> Option<MarkedText> {
    let mut marked = MarkedText::default();
    let mut rest = layout;
    while let Some((before, after)) = rest.split_once(OPEN) {
        let (number, after) = after.split_once(CLOSE)?;
        let text = shape(texts.get(number.parse::<usize>().ok()?)?);
        marked.text.push_str(before);
        let start = marked.text.len();
        marked.text.push_str(text);
        marked.typed.push(start..marked.text.len());
        rest = after;
    }
    marked.text.push_str(rest);
    Some(marked)
}

fn specials(tokenizer: &TextTokenizer, text: &MarkedText) -> Vec<Unit> {
    tokenizer.units(text).into_iter().filter(|unit| matches!(unit, Unit::Special(_))).collect()
}

/// What `transformers` gives to templates: trimmed blocks, Python's string methods, `raise_exception`, a `tojson` without
/// HTML escapes.
fn builtins() -> Result<Environment<'static>, Error> {
    let mut environment = Environment::new();
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.add_function("raise_exception", |message: String| {
        Err::<Value, _>(Error::new(ErrorKind::InvalidOperation, message).with_source(Raised))
    });
    environment.add_filter("tojson", to_json);
    Ok(environment)
}

/// Marks the error of a template that called `raise_exception`.
#[derive(Debug, thiserror::Error)]
#[error("raised by the template")]
struct Raised;

fn broken(error: &Error) -> TemplateError {
    let raised = std::iter::successors(std::error::Error::source(error), |e| e.source()).any(|e| e.is::<Raised>());
    match error.detail() {
        Some(message) if raised => TemplateError::Invalid(format!("refused by the checkpoint's chat template: {message}")),
        _ => TemplateError::Broken(error.to_string()),
    }
}

/// `json.dumps(value, ensure_ascii=False, indent=indent)`.
fn to_json(value: &Value, options: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = options.get("indent")?;
    let fail = |e: serde_json::Error| Error::new(ErrorKind::InvalidOperation, "no JSON for this value").with_source(e);
    let mut json = Vec::new();
    match indent {
        Some(width) => {
            let width = " ".repeat(width.min(16));
            let formatter = serde_json::ser::PrettyFormatter::with_indent(width.as_bytes());
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut json, formatter)).map_err(fail)?;
        }
        None => value.serialize(&mut serde_json::Serializer::with_formatter(&mut json, Spaced)).map_err(fail)?,
    }
    Ok(String::from_utf8_lossy(&json).into_owned())
}

/// Python's separators: a space after each comma and colon.
struct Spaced;

impl serde_json::ser::Formatter for Spaced {
    fn begin_array_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        self.begin_array_value(writer, first)
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        testing::{checkpoint, with_template},
        validate::Picture,
    };
    use bytes::Bytes;

    fn user(texts: &[&str]) -> Vec<Turn> {
        vec![Turn { role: Role::User, parts: texts.iter().map(|text| Part::Text((*text).to_owned())).collect() }]
    }

    fn render(template: &str, turns: &[Turn]) -> Result<MarkedText, TemplateError> {
        let checkpoint = with_template(template);
        ChatTemplate::new(&checkpoint).unwrap().render(turns, &TextTokenizer::new(&checkpoint).unwrap())
    }

    fn typed(marked: &MarkedText) -> Vec<&str> {
        marked.typed.iter().map(|range| &marked.text[range.clone()]).collect()
    }

    #[test]
    fn idefics2_layout_is_that_of_the_model_card() {
        let checkpoint = checkpoint();
        let image = Part::Image(Picture { data: Bytes::new(), field: String::new() });
        let turns = [
            Turn { role: Role::User, parts: vec![image, Part::Text("What is this?".into())] },
            Turn { role: Role::Assistant, parts: vec![Part::Text("A cat.".into())] },
        ];
        let marked = ChatTemplate::new(&checkpoint).unwrap().render(&turns, &TextTokenizer::new(&checkpoint).unwrap()).unwrap();
        assert_eq!(marked.text, "User:<image>What is this?<end_of_utterance>\nAssistant: A cat.<end_of_utterance>\nAssistant:");
        assert_eq!(typed(&marked), ["What is this?", "A cat."]);
    }

    #[test]
    fn blocks_are_trimmed_and_python_methods_work() {
        let template = "{% for message in messages %}\n  {% if message['role'].upper() == 'USER' %}\nu:{{ message['content'][0]['text'].strip() }}\n  {% endif %}\n{% endfor %}\n";
        let marked = render(template, &user(&["  hello <image> \n"])).unwrap();
        assert_eq!((marked.text.as_str(), typed(&marked)), ("u:hello <image>\n", vec!["hello <image>"]));
    }

    #[test]
    fn template_that_changes_texts_is_followed_where_that_is_safe() {
        let template = "{{ messages[0]['content'][0]['text'] | upper }}<end_of_utterance>";
        assert_eq!(render(template, &user(&["hello"])).unwrap(), MarkedText::authored("HELLO<end_of_utterance>".into()));
        let Err(TemplateError::Invalid(why)) = render(template, &user(&["a <s> b"])) else { panic!() };
        assert!(why.contains("<s>"), "{why}");
        let joined = "{{ messages[0]['content'][0]['text'] | upper | lower }}{{ messages[0]['content'][1]['text'] | upper | lower }}";
        assert!(matches!(render(joined, &user(&["A<ima", "ge>"])), Err(TemplateError::Invalid(_))));
    }

    #[test]
    fn text_that_looks_like_a_placeholder_is_only_text() {
        let marked = render("{{ messages[0]['content'][0]['text'] }}", &user(&["\u{FDD0}1\u{FDD1}<image>"])).unwrap();
        assert_eq!(typed(&marked), ["\u{FDD0}1\u{FDD1}<image>"]);
    }

    #[test]
    fn exception_of_the_template_is_the_callers_fault() {
        let template = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('begin with the system') }}{% endif %}";
        let error = render(template, &user(&["x"])).unwrap_err();
        assert!(matches!(&error, TemplateError::Invalid(why) if why.contains("begin with the system")), "{error:?}");
        assert!(matches!(render("{{ messages[7].content }}", &user(&["x"])).unwrap_err(), TemplateError::Broken(_)));
    }

    #[test]
    fn work_and_output_of_a_template_are_bounded() {
        for template in ["{% for i in range(100000000) %}{% endfor %}", "{% for i in range(9999) %}{{ 'x' * 100000 }}{% endfor %}"] {
            assert!(matches!(render(template, &user(&["x"])), Err(TemplateError::Broken(_))), "{template}");
        }
        let long = "word ".repeat(50_000);
        assert_eq!(render("{{ messages[0]['content'][0]['text'] }}", &user(&[&long])).unwrap().text, long);
        let many = vec!["x"; 5_000];
        let checkpoint = checkpoint();
        let template = ChatTemplate::new(&checkpoint).unwrap();
        assert!(template.render(&user(&many), &TextTokenizer::new(&checkpoint).unwrap()).is_ok());
    }

    #[test]
    fn tojson_is_pythons() {
        let template = r#"{{ {"a": [1, true, none], "b": "é<>&'"} | tojson }}{{ {"a": [1, {}]} | tojson(indent=2) }}"#;
        let expected = "{\"a\": [1, true, null], \"b\": \"é<>&'\"}{\n  \"a\": [\n    1,\n    {}\n  ]\n}";
        assert_eq!(render(template, &user(&["x"])).unwrap().text, expected);
    }

    #[test]
    fn template_that_cannot_be_compiled_names_its_line() {
        let error = ChatTemplate::new(&with_template("line\n{% for %}")).err().unwrap().to_string();
        assert!(error.contains("chat template") && error.contains('2'), "{error}");
    }
}

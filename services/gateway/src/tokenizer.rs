//! Text to ids, exactly as the checkpoint's `tokenizer.json` says, except that special tokens come only from where they may.
//!
//! The reference cuts special tokens out of the whole string, then normalises (`▁` in front, spaces to `▁`) and merges each
//! stretch between them. Here the cut skips text that a user typed, and the rest is the same: a stretch of template text and
//! typed text is encoded as one, so merges cross their border as they do in the reference.

use crate::GatewayError;
use idefics_common::checkpoint::{Checkpoint, END_OF_UTTERANCE, FAKE_TOKEN_AROUND_IMAGE};
use std::{collections::HashSet, ops::Range};
use tokenizers::{
    AddedToken, Model, ModelWrapper, NormalizedString, Normalizer, OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer, Token,
    Tokenizer, normalizer,
};

/// The mark that stands for a picture, and the token that its image tokens have.
pub(crate) const IMAGE: &str = "<image>";

/// Text for the model, of which some was typed by a user.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct MarkedText {
    pub(crate) text: String,
    /// Bytes of `text` in which special tokens are ordinary characters; ascending, not overlapping.
    pub(crate) typed: Vec<Range<usize>>,
}

impl MarkedText {
    /// Text whose special tokens count.
    pub(crate) fn authored(text: String) -> Self {
        Self { text, typed: Vec::new() }
    }

    /// Text whose special tokens are ordinary characters.
    pub(crate) fn typed(text: String) -> Self {
        Self { typed: std::iter::once(0..text.len()).collect(), text }
    }
}

/// A part of a [`MarkedText`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Unit {
    /// A special token.
    Special(u32),
    /// The bytes of a stretch between special tokens.
    Stretch(Range<usize>),
}

/// The vocabulary would spell a special token even one character at a time.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TokenizeError {
    /// No spelling of the text avoids a special token.
    #[error("the tokenizer has no ordinary tokens for the text {0:?}; leave it out")]
    Unspeakable(String),
    /// The tokenizer's own error.
    #[error("the tokenizer failed: {0}")]
    Failed(#[from] tokenizers::Error),
}

/// The checkpoint's tokenizer.
pub(crate) struct TextTokenizer {
    tokenizer: Tokenizer,
    /// Longest first.
    special: Vec<(AddedToken, u32)>,
    /// Added tokens that are not special, as fine-tunes have; longest first.
    ordinary: Vec<(AddedToken, u32)>,
    special_ids: HashSet<u32>,
    unknown: Option<(String, u32)>,
    pub(crate) bos_id: u32,
    pub(crate) image_id: u32,
    pub(crate) fake_id: u32,
}

impl TextTokenizer {
    pub(crate) fn new(checkpoint: &Checkpoint) -> Result<Self, GatewayError> {
        let refuse = |what: String| GatewayError::Tokenizer { checkpoint: checkpoint.name(), what };
        let tokenizer = Tokenizer::from_bytes(&checkpoint.tokenizer_json).map_err(|e| refuse(e.to_string()))?;
        let id_of = |token: &str| tokenizer.token_to_id(token).ok_or_else(|| refuse(format!("{token} is missing")));
        let (bos_id, image_id, fake_id) = (id_of(&checkpoint.bos_token)?, id_of(IMAGE)?, id_of(FAKE_TOKEN_AROUND_IMAGE)?);
        if image_id != checkpoint.config.image_token_id {
            return Err(refuse(format!(
                "{IMAGE} has id {image_id}, expected {}, the image_token_id of config.json",
                checkpoint.config.image_token_id
            )));
        }
        let mut added: Vec<(AddedToken, u32)> = tokenizer.get_added_tokens_decoder().into_iter().map(|(id, token)| (token, id)).collect();
        // The processor declares these special wherever the file does not.
        let end_of_utterance = tokenizer.token_to_id(END_OF_UTTERANCE).map(|id| (END_OF_UTTERANCE, id));
        let needed = [(checkpoint.bos_token.as_str(), bos_id), (IMAGE, image_id), (FAKE_TOKEN_AROUND_IMAGE, fake_id)];
        for (token, id) in needed.into_iter().chain(end_of_utterance) {
            match added.iter_mut().find(|(_, known)| *known == id) {
                Some((declared, _)) => declared.special = true,
                None => added.push((AddedToken::from(token, true), id)),
            }
        }
        added.sort_by(|(a, _), (b, _)| b.content.len().cmp(&a.content.len()).then_with(|| a.content.cmp(&b.content)));
        if let Some((token, id)) = added.iter().find(|(_, id)| *id as usize >= checkpoint.config.text_config.vocab_size) {
            let vocab_size = checkpoint.config.text_config.vocab_size;
            return Err(refuse(format!("{} has id {id}, expected below the vocab_size {vocab_size} of config.json", token.content)));
        }
        let (special, ordinary): (Vec<_>, Vec<_>) = added.into_iter().partition(|(token, _)| token.special);
        let unknown = match tokenizer.get_model() {
            ModelWrapper::BPE(bpe) => bpe.get_unk_token().clone().and_then(|token| tokenizer.token_to_id(&token).map(|id| (token, id))),
            _ => None,
        };
        let special_ids = special.iter().map(|(_, id)| *id).collect();
        Ok(Self { tokenizer, special, ordinary, special_ids, unknown, bos_id, image_id, fake_id })
    }

    /// Cuts out the special tokens that are not in typed text, leftmost first, the longest where several start.
    pub(crate) fn units(&self, text: &MarkedText) -> Vec<Unit> {
        cut(&text.text, 0..text.text.len(), &text.typed, &self.special)
    }

    /// The special token that a text contains, if it does.
    pub(crate) fn special_in(&self, text: &str) -> Option<&str> {
        self.special.iter().map(|(token, _)| token.content.as_str()).find(|token| text.contains(token))
    }

    /// Ids of one stretch of `text`; never a special one.
    pub(crate) fn encode(&self, text: &str, stretch: Range<usize>) -> Result<Vec<u32>, TokenizeError> {
        let mut ids = Vec::new();
        for unit in cut(text, stretch, &[], &self.ordinary) {
            match unit {
                Unit::Special(id) => ids.push(id),
                Unit::Stretch(range) => self.encode_ordinary(&text[range.clone()], range.start == 0, &mut ids)?,
            }
        }
        Ok(ids)
    }

    /// Text of ids, special ones left out.
    pub(crate) fn decode(&self, ids: &[u32]) -> String {
        // Decoding fails only for decoders that parse the tokens themselves; there is nothing better to show than nothing.
        self.tokenizer.decode(ids, true).unwrap_or_default()
    }

    /// The vocabulary's entry.
    pub(crate) fn token(&self, id: u32) -> Option<String> {
        self.tokenizer.id_to_token(id)
    }

    pub(crate) fn is_special(&self, id: u32) -> bool {
        self.special_ids.contains(&id)
    }

    /// Normalises, splits and merges `text`. Some pre-tokenizers treat the text's `first` stretch differently.
    fn encode_ordinary(&self, text: &str, first: bool, ids: &mut Vec<u32>) -> Result<(), TokenizeError> {
        // A character in front, already tokenised to nothing, moves the stretch away from offset 0.
        let mut pieces = if first { PreTokenizedString::from(text) } else { PreTokenizedString::from(format!("|{text}")) };
        if !first {
            pieces.split(|_, whole| {
                let slice = |range: Range<usize>| whole.slice(normalizer::Range::Original(range)).ok_or("a stretch cannot be cut");
                Ok([(slice(0..1)?, Some(Vec::new())), (slice(1..1 + text.len())?, None)])
            })?;
        }
        if let Some(normalizer) = self.tokenizer.get_normalizer() {
            pieces.normalize(|piece: &mut NormalizedString| normalizer.normalize(piece))?;
        }
        if let Some(pre_tokenizer) = self.tokenizer.get_pre_tokenizer() {
            pre_tokenizer.pre_tokenize(&mut pieces)?;
        }
        pieces.tokenize(|piece| self.merge(piece.get()))?;
        for (_, _, tokens) in pieces.get_splits(OffsetReferential::Normalized, OffsetType::None) {
            for token in tokens.iter().flatten() {
                if self.is_special(token.id) && !self.is_unknown(token.id) {
                    return Err(TokenizeError::Unspeakable(token.value.clone()));
                }
                ids.push(token.id);
            }
        }
        Ok(())
    }

    /// The model's tokens, or those of single characters where a vocabulary spells a special token out of ordinary text.
    fn merge(&self, text: &str) -> tokenizers::Result<Vec<Token>> {
        let model = self.tokenizer.get_model();
        let tokens = model.tokenize(text)?;
        let spells_special = |token: &Token| {
            self.is_special(token.id)
                && !self.unknown.as_ref().is_some_and(|(unknown, id)| *id == token.id && !text.contains(unknown.as_str()))
        };
        if !tokens.iter().any(spells_special) {
            return Ok(tokens);
        }
        let mut tokens = Vec::new();
        for character in text.chars() {
            tokens.extend(model.tokenize(character.encode_utf8(&mut [0; 4]))?);
        }
        Ok(tokens)
    }

    fn is_unknown(&self, id: u32) -> bool {
        self.unknown.as_ref().is_some_and(|(_, unknown)| *unknown == id)
    }
}

/// Cuts the `tokens` out of `within`, but for those that touch a `typed` range.
fn cut(text: &str, within: Range<usize>, typed: &[Range<usize>], tokens: &[(AddedToken, u32)]) -> Vec<Unit> {
    let mut units = Vec::new();
    let (mut stretch, mut at) = (within.start, within.start);
    while at < within.end {
        let rest = &text[at..within.end];
        let found = tokens.iter().find(|(token, _)| {
            rest.starts_with(token.content.as_str()) && !touches(typed, at..at + token.content.len()) && stands_alone(token, text, at)
        });
        let Some((token, id)) = found else {
            at += rest.chars().next().map_or(1, char::len_utf8);
            continue;
        };
        let (mut start, mut end) = (at, at + token.content.len());
        if token.lstrip {
            start = stretch + text[stretch..start].trim_end().len();
        }
        if token.rstrip {
            end = within.end - text[end..within.end].trim_start().len();
        }
        if stretch < start {
            units.push(Unit::Stretch(stretch..start));
        }
        units.push(Unit::Special(*id));
        (stretch, at) = (end, end);
    }
    if stretch < within.end {
        units.push(Unit::Stretch(stretch..within.end));
    }
    units
}

fn touches(typed: &[Range<usize>], range: Range<usize>) -> bool {
    let next = typed.partition_point(|typed| typed.end <= range.start);
    typed[next..].iter().find(|typed| !typed.is_empty()).is_some_and(|typed| typed.start < range.end)
}

fn stands_alone(token: &AddedToken, text: &str, at: usize) -> bool {
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    let before = text[..at].chars().next_back().is_some_and(is_word);
    let after = text[at + token.content.len()..].chars().next().is_some_and(is_word);
    !token.single_word || !(before || after)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{checkpoint, edited};
    use proptest::prelude::*;
    use serde_json::{Value, json};
    use std::sync::LazyLock;

    fn tokenizer(edit: impl FnOnce(&mut Value)) -> TextTokenizer {
        TextTokenizer::new(&edited(edit)).unwrap()
    }

    fn ids(tokenizer: &TextTokenizer, text: &MarkedText) -> Vec<u32> {
        let encode = |unit| match unit {
            Unit::Special(id) => vec![id],
            Unit::Stretch(range) => tokenizer.encode(&text.text, range).unwrap(),
        };
        tokenizer.units(text).into_iter().flat_map(encode).collect()
    }

    fn reference(tokenizer: &TextTokenizer, text: &str) -> Vec<u32> {
        tokenizer.tokenizer.encode(text, false).unwrap().get_ids().to_vec()
    }

    /// Layouts of `tokenizer.json` that are around: the demo's, Metaspace ones, fine-tunes with tokens of their own.
    static LAYOUTS: LazyLock<Vec<(&str, TextTokenizer)>> = LazyLock::new(|| {
        let metaspace = |scheme: &'static str, split: bool| {
            move |json: &mut Value| {
                json["normalizer"] = Value::Null;
                json["pre_tokenizer"] = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split});
            }
        };
        let added = |token: &'static str, option: &'static str| {
            move |json: &mut Value| {
                let tokens = json["added_tokens"].as_array_mut().unwrap();
                tokens.iter_mut().find(|t| t["content"] == token).unwrap()[option] = json!(true);
            }
        };
        let ordinary = |json: &mut Value| {
            let id = json["model"]["vocab"]["er"].clone();
            let token = json!({"id": id, "content": "er", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": false});
            json["added_tokens"].as_array_mut().unwrap().push(token);
        };
        vec![
            ("as it is", tokenizer(|_| ())),
            ("Metaspace first", tokenizer(metaspace("first", false))),
            ("Metaspace always", tokenizer(metaspace("always", true))),
            ("Metaspace never", tokenizer(metaspace("never", true))),
            ("lstrip", tokenizer(added("<image>", "lstrip"))),
            ("rstrip", tokenizer(added("<end_of_utterance>", "rstrip"))),
            ("single word", tokenizer(added("<s>", "single_word"))),
            ("ordinary added token", tokenizer(ordinary)),
        ]
    });

    const PIECES: [&str; 18] = [
        "<image>",
        "<s>",
        "</s>",
        "<end_of_utterance>",
        "<fake_token_around_image>",
        "<unk>",
        " ",
        "  ",
        "\n",
        "What is",
        "circle",
        "a",
        "é",
        "你",
        "👍",
        "▁",
        "<",
        ">",
    ];

    proptest! {
        #![proptest_config(ProptestConfig { cases: 256, rng_seed: proptest::test_runner::RngSeed::Fixed(3), failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn authored_text_is_tokenized_as_the_tokenizer_itself_does(pieces in prop::collection::vec(prop::sample::select(PIECES.to_vec()), 0..12)) {
            let text = pieces.concat();
            for (layout, tokenizer) in LAYOUTS.iter() {
                prop_assert_eq!(ids(tokenizer, &MarkedText::authored(text.clone())), reference(tokenizer, &text), "{} {:?}", layout, text);
            }
        }

        #[test]
        fn typed_text_never_has_special_ids(pieces in prop::collection::vec(prop::sample::select(PIECES.to_vec()), 0..12)) {
            let text = pieces.concat();
            for (layout, tokenizer) in LAYOUTS.iter() {
                let ids = ids(tokenizer, &MarkedText::typed(text.clone()));
                prop_assert!(ids.iter().all(|id| !tokenizer.is_special(*id)), "{} {:?} {:?}", layout, text, ids);
            }
        }
    }

    #[test]
    fn vocabulary_that_spells_a_special_token_is_not_believed() {
        // Merges that lead from characters to `<s>`.
        let tokenizer = tokenizer(|json| {
            let merges = json["model"]["merges"].as_array_mut().unwrap();
            merges.insert(0, json!(["<", "s"]));
            merges.insert(1, json!(["<s", ">"]));
            let vocab = json["model"]["vocab"].as_object_mut().unwrap();
            let last = vocab.iter().find(|(_, id)| **id == json!(599)).unwrap().0.clone();
            vocab.remove(&last);
            vocab.insert("<s".into(), json!(599));
            json["model"]["merges"]
                .as_array_mut()
                .unwrap()
                .retain(|merge| merge[0].as_str().unwrap().to_owned() + merge[1].as_str().unwrap() != last);
        });
        assert!(reference(&tokenizer, "a<s>b").contains(&tokenizer.bos_id));
        let ids = ids(&tokenizer, &MarkedText::typed("a<s>b".into()));
        assert!(!ids.contains(&tokenizer.bos_id), "{ids:?}");
        assert_eq!(tokenizer.decode(&ids), "a<s>b");
    }

    #[test]
    fn special_token_is_cut_only_where_nothing_of_it_was_typed() {
        let tokenizer = TextTokenizer::new(&checkpoint()).unwrap();
        let marked = |parts: &[(&str, bool)]| {
            let mut marked = MarkedText::default();
            for (text, typed) in parts {
                let start = marked.text.len();
                marked.text.push_str(text);
                if *typed {
                    marked.typed.push(start..marked.text.len());
                }
            }
            marked
        };
        let specials =
            |parts: &[(&str, bool)]| tokenizer.units(&marked(parts)).iter().filter(|unit| matches!(unit, Unit::Special(_))).count();
        assert_eq!(specials(&[("<image>", false)]), 1);
        assert_eq!(specials(&[("<image>", true)]), 0);
        assert_eq!(specials(&[("<ima", false), ("ge>", true)]), 0);
        assert_eq!(specials(&[("<", true), ("image>", false)]), 0);
        assert_eq!(specials(&[("<image", false), ("", true), (">", false)]), 1);
        assert_eq!(specials(&[("<image>", true), ("<image>", false), ("<image>", true)]), 1);
    }

    #[test]
    fn tokenizer_of_another_model_is_refused() {
        let error = |edit: fn(&mut Value)| TextTokenizer::new(&edited(edit)).err().unwrap().to_string();
        let missing = error(|json| json["added_tokens"].as_array_mut().unwrap().retain(|t| t["content"] != "<image>"));
        assert!(missing.contains("<image> is missing"), "{missing}");
        let mut checkpoint = checkpoint();
        checkpoint.config.image_token_id = 7;
        let other = TextTokenizer::new(&checkpoint).err().unwrap().to_string();
        assert!(other.contains("601") && other.contains('7'), "{other}");
    }
}

//! Ids to text, piece by piece: whole characters only, and nothing from a stop text on.

use crate::tokenizer::TextTokenizer;
use std::sync::Arc;

/// Turns ids into text. All pieces together equal what decoding all ids at once gives, special tokens left out.
///
/// Characters outside the vocabulary come as runs of byte tokens, and the reference decodes a run as a whole: if any of it is
/// not UTF-8, each byte of it becomes U+FFFD. So a run is shown when it ends, and an invalid one looks as in the reference.
pub(crate) struct Detokenizer {
    tokenizer: Arc<TextTokenizer>,
    /// The ids of the last piece, which the decoder needs as context, then those without text yet.
    window: Vec<u32>,
    /// How many of `window` have been shown.
    shown: usize,
}

impl Detokenizer {
    pub(crate) fn new(tokenizer: Arc<TextTokenizer>) -> Self {
        Self { tokenizer, window: Vec::new(), shown: 0 }
    }

    /// The text that `id` completes, perhaps none.
    pub(crate) fn push(&mut self, id: u32) -> String {
        let Some(token) = self.tokenizer.token(id).filter(|_| !self.tokenizer.is_special(id)) else { return String::new() };
        self.window.push(id);
        if is_byte(&token) { String::new() } else { self.take(Last::No) }
    }

    /// The text that was waiting for more ids.
    pub(crate) fn finish(&mut self) -> String {
        self.take(Last::Yes)
    }

    fn take(&mut self, last: Last) -> String {
        let before = self.tokenizer.decode(&self.window[..self.shown]);
        let now = self.tokenizer.decode(&self.window);
        // Byte-level vocabularies show the start of a character as U+FFFD until the rest is there.
        if last == Last::No && now.ends_with(char::REPLACEMENT_CHARACTER) {
            return String::new();
        }
        let piece = now.strip_prefix(&before).unwrap_or(&now).to_owned();
        self.window.drain(..self.shown);
        self.shown = self.window.len();
        piece
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Last {
    Yes,
    No,
}

fn is_byte(token: &str) -> bool {
    token.len() == 6
        && token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>')).is_some_and(|hex| u8::from_str_radix(hex, 16).is_ok())
}

/// Ends text before the first stop text in it, wherever pieces are cut.
pub(crate) struct StopTexts {
    stops: Vec<String>,
    /// Text that may be the start of a stop text.
    held: String,
}

/// Text that may be shown.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) text: String,
    /// A stop text followed; nothing comes after.
    pub(crate) stopped: bool,
}

impl StopTexts {
    pub(crate) fn new(stops: Vec<String>) -> Self {
        Self { stops, held: String::new() }
    }

    /// What of the text so far is certain to be shown.
    pub(crate) fn push(&mut self, text: &str) -> Piece {
        self.held.push_str(text);
        // The first to be complete counts, and of those the longest: then it does not matter where pieces are cut.
        let found = self.stops.iter().filter_map(|stop| self.held.find(stop).map(|start| (start + stop.len(), start))).min();
        if let Some((_, start)) = found {
            self.held.truncate(start);
            return Piece { text: std::mem::take(&mut self.held), stopped: true };
        }
        let certain = self.held.len() - self.stops.iter().map(|stop| overlap(&self.held, stop)).max().unwrap_or(0);
        let kept = self.held.split_off(certain);
        Piece { text: std::mem::replace(&mut self.held, kept), stopped: false }
    }

    /// The text that was held back.
    pub(crate) fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// Length of the longest end of `text` that starts `stop`.
fn overlap(text: &str, stop: &str) -> usize {
    let longest = text.len().min(stop.len().saturating_sub(1));
    (1..=longest).rev().find(|n| stop.is_char_boundary(*n) && text.ends_with(&stop[..*n])).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::checkpoint;
    use proptest::prelude::*;
    use std::sync::LazyLock;

    static TOKENIZER: LazyLock<Arc<TextTokenizer>> = LazyLock::new(|| Arc::new(TextTokenizer::new(&checkpoint()).unwrap()));

    fn bytes(text: &str) -> Vec<u32> {
        text.bytes().map(|b| 3 + u32::from(b)).collect()
    }

    #[test]
    fn characters_are_never_split() {
        let mut detokenizer = Detokenizer::new(Arc::clone(&TOKENIZER));
        let pieces: Vec<String> = [vec![399], bytes("你👍"), vec![463]].concat().into_iter().map(|id| detokenizer.push(id)).collect();
        assert_eq!(pieces, ["A", "", "", "", "", "", "", "", "你👍 pink"]);
    }

    #[test]
    fn bytes_that_are_no_character_become_the_references_replacement() {
        let mut detokenizer = Detokenizer::new(Arc::clone(&TOKENIZER));
        bytes("你")[..2].iter().for_each(|id| assert_eq!(detokenizer.push(*id), ""));
        assert_eq!(detokenizer.finish(), "\u{FFFD}\u{FFFD}");
    }

    #[test]
    fn special_tokens_and_unknown_ids_have_no_text() {
        let mut detokenizer = Detokenizer::new(Arc::clone(&TOKENIZER));
        for id in [0, 1, 2, 600, 601, 602, 603, u32::MAX] {
            assert_eq!(detokenizer.push(id), "");
        }
        assert_eq!(detokenizer.finish(), "");
    }

    /// What comes out when `text` goes in by pieces of the given lengths.
    fn run(stops: &[String], text: &str, cuts: &[usize]) -> (String, bool) {
        let mut texts = StopTexts::new(stops.to_vec());
        let (mut out, mut chars, mut cuts) = (String::new(), text.chars().peekable(), cuts.iter().cycle());
        while chars.peek().is_some() {
            let piece: String = chars.by_ref().take(*cuts.next().unwrap_or(&1)).collect();
            let piece = texts.push(&piece);
            out += &piece.text;
            if piece.stopped {
                return (out, true);
            }
        }
        (out + &texts.finish(), false)
    }

    proptest! {
        #![proptest_config(ProptestConfig { rng_seed: proptest::test_runner::RngSeed::Fixed(5), failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn stop_texts_do_not_depend_on_how_the_text_is_cut(
            stops in prop::collection::vec("[abé]{1,4}", 0..4),
            text in "[abcé]{0,20}",
            cuts in prop::collection::vec(1usize..6, 1..5),
        ) {
            // Character by character, the first stop text that is complete ends it.
            let end = (0..=text.len()).filter(|end| text.is_char_boundary(*end)).find_map(|end| {
                let longest = stops.iter().filter(|stop| text[..end].ends_with(stop.as_str())).map(String::len).max()?;
                Some(end - longest)
            });
            let expected = (text[..end.unwrap_or(text.len())].to_owned(), end.is_some());
            prop_assert_eq!(run(&stops, &text, &cuts), expected.clone());
            prop_assert_eq!(run(&stops, &text, &[1]), expected);
        }

        #[test]
        fn pieces_join_to_the_decoding_of_all_ids(ids in prop::collection::vec(prop_oneof![0u32..610, 3u32..259, 380u32..600], 0..40)) {
            let tokenizer = Arc::clone(&TOKENIZER);
            let mut detokenizer = Detokenizer::new(Arc::clone(&tokenizer));
            let mut text: String = ids.iter().map(|id| detokenizer.push(*id)).collect();
            text += &detokenizer.finish();
            prop_assert_eq!(text, tokenizer.decode(&ids));
        }
    }
}

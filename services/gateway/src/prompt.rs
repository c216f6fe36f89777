//! The prompt as the model sees it: BOS, text, and for each picture its image tokens between `<fake_token_around_image>`.
//!
//! Reference: `processing_idefics2.py` of `transformers` 4.57.6, which does the same on the string before it is tokenized.

use crate::tokenizer::{IMAGE, MarkedText, TextTokenizer, TokenizeError, Unit};
use idefics_common::{checkpoint::FAKE_TOKEN_AROUND_IMAGE, status::Violation};

/// Ids ready for the decoder.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Prompt {
    pub(crate) token_ids: Vec<u32>,
    /// In order; each `tokens_per_image` long.
    pub(crate) image_spans: Vec<ImageSpan>,
    /// How many of the ids are image tokens.
    pub(crate) image_tokens: u32,
}

/// Where one sub-image stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ImageSpan {
    /// Which of the prompt's marks, from 0.
    pub(crate) image: usize,
    /// Which of its sub-images, from 0.
    pub(crate) sub_image: u32,
    /// Index of the first image token.
    pub(crate) start: u32,
}

/// What one `<image>` mark becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ImageLayout {
    pub(crate) tokens_per_image: usize,
    /// 1, or 5 when split.
    pub(crate) sub_images: u32,
}

/// Pictures in a split one: four crops, then the whole.
pub(crate) const SPLIT_SUB_IMAGES: u32 = 5;

/// Builds the prompt of a text with `<image>` marks.
pub(crate) fn build(tokenizer: &TextTokenizer, text: &MarkedText, layout: ImageLayout) -> Result<Prompt, TokenizeError> {
    let units = tokenizer.units(text);
    let mut prompt = Prompt::default();
    let mut fakes = 0;
    if units.first() != Some(&Unit::Special(tokenizer.bos_id)) {
        prompt.token_ids.push(tokenizer.bos_id);
    }
    let mut images = 0;
    for unit in units {
        match unit {
            Unit::Special(id) if id == tokenizer.fake_id => fakes += 1,
            Unit::Special(id) if id == tokenizer.image_id => {
                for sub_image in 0..layout.sub_images {
                    push_fakes(&mut prompt, tokenizer, fakes + 1);
                    prompt.image_spans.push(ImageSpan { image: images, sub_image, start: prompt.token_ids.len() as u32 });
                    prompt.token_ids.extend(std::iter::repeat_n(id, layout.tokens_per_image));
                    fakes = 1;
                }
                images += 1;
            }
            Unit::Special(id) => {
                push_fakes(&mut prompt, tokenizer, std::mem::take(&mut fakes));
                prompt.token_ids.push(id);
            }
            Unit::Stretch(range) => {
                push_fakes(&mut prompt, tokenizer, std::mem::take(&mut fakes));
                prompt.token_ids.extend(tokenizer.encode(&text.text, range)?);
            }
        }
    }
    push_fakes(&mut prompt, tokenizer, fakes);
    prompt.image_tokens = (prompt.image_spans.len() * layout.tokens_per_image) as u32;
    Ok(prompt)
}

/// A run of closing and opening fakes: every two become one, as replacing the doubled string does.
fn push_fakes(prompt: &mut Prompt, tokenizer: &TextTokenizer, run: usize) {
    prompt.token_ids.extend(std::iter::repeat_n(tokenizer.fake_id, run.div_ceil(2)));
}

/// Checks the marks of a raw prompt against its pictures; `pictures` is `None` where they do not matter.
pub(crate) fn check_marks(tokenizer: &TextTokenizer, text: &MarkedText, pictures: Option<usize>) -> Vec<Violation> {
    let units = tokenizer.units(text);
    let count = |id: u32| units.iter().filter(|unit| **unit == Unit::Special(id)).count();
    let (marks, fakes) = (count(tokenizer.image_id), count(tokenizer.fake_id));
    let mut violations = Vec::new();
    if let Some(pictures) = pictures.filter(|pictures| *pictures != marks) {
        let what = format!("has {marks} {IMAGE} marks, expected {pictures}, the number of pictures");
        violations.push(Violation::new("prompt", what));
    }
    if fakes > 0 {
        let what = format!("contains {FAKE_TOKEN_AROUND_IMAGE}, which is put around each {IMAGE} mark by itself; leave it out");
        violations.push(Violation::new("prompt", what));
    }
    violations
}

//! What is asked: conversations drawn from a seed, the same bytes for the same seed.

use crate::{pictures, range::Range};
use bytes::Bytes;
use clap::Args;
use idefics_proto::gateway::v1::{ChatRequest, ContentPart, Image, ImageOptions, Message, Role, SamplingOptions, content_part::Part};
use prost::Message as _;
use rand::Rng;
use rand::{SeedableRng, seq::IndexedRandom};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

/// Pictures that come again and again.
const POPULAR_PICTURES: u64 = 4;
/// Random streams of the popular pictures; those below belong to the conversations.
const POPULAR_STREAMS: u64 = 1 << 63;
/// Share of multi-turn conversations that are about a picture.
const PICTURES_IN_MULTI_TURN: f64 = 0.5;
/// What prompts are made of.
const WORDS: [&str; 24] = [
    "is", "there", "a", "red", "circle", "left", "of", "the", "blue", "square", "what", "number", "stands", "on", "sign", "and", "which",
    "color", "has", "bar", "green", "star", "above", "image",
];

/// What the requests are drawn from.
#[derive(Args, Clone, Debug, Serialize)]
pub struct WorkloadConfig {
    /// Everything random comes from this
    #[arg(long, default_value_t = 0, value_name = "S")]
    pub seed: u64,
    /// Weight of conversations of one turn without a picture
    #[arg(long, default_value_t = 0.4, value_name = "W")]
    pub text: f64,
    /// Weight of conversations of one turn about one picture
    #[arg(long, default_value_t = 0.3, value_name = "W")]
    pub image: f64,
    /// Weight of conversations of one turn about one picture, cut into four crops and a whole
    #[arg(long, default_value_t = 0.1, value_name = "W")]
    pub split_image: f64,
    /// Weight of conversations of two turns; the second resends the first and its answer
    #[arg(long, default_value_t = 0.2, value_name = "W")]
    pub multi_turn: f64,
    /// Words in a turn
    #[arg(long, default_value_t = Range { least: 8, most: 32 }, value_name = "FROM..TO")]
    pub prompt_words: Range,
    /// Tokens in an answer
    #[arg(long, default_value_t = Range { least: 16, most: 32 }, value_name = "FROM..TO")]
    pub output_tokens: Range,
    /// Edges of pictures, in pixels
    #[arg(long, default_value_t = Range { least: 64, most: 512 }, value_name = "FROM..TO")]
    pub picture_edge: Range,
    /// Scale each edge up to at least N pixels [default: the checkpoint's]
    #[arg(long, value_name = "N")]
    pub shortest_edge: Option<u32>,
    /// Scale the longer edge down to at most N pixels [default: the checkpoint's]
    #[arg(long, value_name = "N")]
    pub longest_edge: Option<u32>,
    /// Share of pictures that are one of four that come again and again
    #[arg(long, default_value_t = 0.25, value_name = "SHARE")]
    pub repeated_pictures: f64,
}

/// What a request is, for reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// One turn without a picture.
    Text,
    /// One turn about one picture, cut as the checkpoint says.
    Image,
    /// One turn about one picture in five sub-images.
    SplitImage,
    /// The first of two turns.
    FirstTurn,
    /// The second of two turns.
    SecondTurn,
}

/// One or two requests; the second depends on the answer to the first.
#[derive(Clone, Debug)]
pub struct Conversation {
    /// What the first request is.
    pub kind: Kind,
    /// The first request.
    pub first: ChatRequest,
    follow_up: Option<FollowUp>,
}

#[derive(Clone, Debug)]
struct FollowUp {
    question: String,
    max_new_tokens: u32,
}

impl Conversation {
    /// The second request, given the answer to the first.
    pub fn second(&self, answer: &str) -> Option<ChatRequest> {
        let follow_up = self.follow_up.as_ref()?;
        let mut request = self.first.clone();
        // What the demo checkpoint says past its end of turn may have no text at all.
        let answer = if answer.trim().is_empty() { "Yes." } else { answer.trim() };
        for (role, said) in [(Role::Assistant, answer), (Role::User, &follow_up.question)] {
            request.messages.push(Message { role: role.into(), content: vec![text(said.to_owned())] });
        }
        request.sampling = Some(greedy(follow_up.max_new_tokens));
        Some(request)
    }
}

impl WorkloadConfig {
    /// What is wrong with it.
    ///
    /// # Errors
    /// Names the option, what was expected and what was found.
    pub fn check(&self) -> Result<(), String> {
        let weights = [self.text, self.image, self.split_image, self.multi_turn];
        if weights.iter().any(|w| !(0.0..=f64::MAX).contains(w)) || weights.iter().sum::<f64>() <= 0.0 {
            return Err(format!(
                "--text, --image, --split-image and --multi-turn are {weights:?}, expected numbers from 0 up that are not all 0"
            ));
        }
        if !(0.0..=1.0).contains(&self.repeated_pictures) {
            return Err(format!("--repeated-pictures is {}, expected a share from 0 to 1", self.repeated_pictures));
        }
        Ok(())
    }

    /// The first `count` conversations; more of them begin with the same ones. A `variant` other than 0 asks the same again so
    /// that no cache knows it: under a cache salt of its own, with pictures of the same sizes and other bytes.
    pub fn conversations(&self, count: usize, variant: u32) -> Vec<Conversation> {
        let popular: Vec<Bytes> =
            (0..POPULAR_PICTURES).map(|i| pictures::draw(&mut self.rng(POPULAR_STREAMS + i), self.picture_edge, variant)).collect();
        (0..count as u64).map(|index| self.conversation(index, variant, &popular)).collect()
    }

    fn rng(&self, stream: u64) -> ChaCha8Rng {
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        rng.set_stream(stream);
        rng
    }

    fn conversation(&self, index: u64, variant: u32, popular: &[Bytes]) -> Conversation {
        let mut rng = self.rng(index);
        let kind = self.kind(&mut rng);
        let with_picture = match kind {
            Kind::Text => false,
            Kind::Image | Kind::SplitImage => true,
            Kind::FirstTurn | Kind::SecondTurn => rng.random_bool(PICTURES_IN_MULTI_TURN),
        };
        let mut content = Vec::new();
        if with_picture {
            let repeated = rng.random_bool(self.repeated_pictures).then(|| popular.choose(&mut rng).cloned()).flatten();
            let data = repeated.unwrap_or_else(|| pictures::draw(&mut rng, self.picture_edge, variant));
            content.push(ContentPart { part: Some(Part::Image(Image { data })) });
        }
        content.push(text(self.question(&mut rng)));
        let first = ChatRequest {
            messages: vec![Message { role: Role::User.into(), content }],
            image_options: Some(ImageOptions {
                split: (kind == Kind::SplitImage).then_some(true),
                longest_edge: self.longest_edge,
                shortest_edge: self.shortest_edge,
            }),
            sampling: Some(greedy(self.output_tokens.draw(&mut rng))),
            cache_salt: if variant == 0 { Bytes::new() } else { variant.to_le_bytes().to_vec().into() },
            ..Default::default()
        };
        let follow_up = (kind == Kind::FirstTurn)
            .then(|| FollowUp { question: self.question(&mut rng), max_new_tokens: self.output_tokens.draw(&mut rng) });
        Conversation { kind, first, follow_up }
    }

    fn kind(&self, rng: &mut ChaCha8Rng) -> Kind {
        let weights =
            [(Kind::Text, self.text), (Kind::Image, self.image), (Kind::SplitImage, self.split_image), (Kind::FirstTurn, self.multi_turn)];
        weights.choose_weighted(rng, |(_, weight)| *weight).map_or(Kind::Text, |(kind, _)| *kind)
    }

    fn question(&self, rng: &mut ChaCha8Rng) -> String {
        let words: Vec<&str> = (0..self.prompt_words.draw(rng)).filter_map(|_| WORDS.choose(rng).copied()).collect();
        words.join(" ") + "?"
    }
}

/// Names the conversations: equal for equal bytes, hexadecimal.
pub fn digest(conversations: &[Conversation]) -> String {
    let mut hasher = blake3::Hasher::new();
    for conversation in conversations {
        let second = conversation.second("").unwrap_or_default();
        for request in [&conversation.first, &second] {
            let bytes = request.encode_to_vec();
            hasher.update(&(bytes.len() as u64).to_le_bytes());
            hasher.update(&bytes);
        }
    }
    hasher.finalize().to_hex().to_string()
}

fn text(text: String) -> ContentPart {
    ContentPart { part: Some(Part::Text(text)) }
}

/// Exactly `tokens` tokens, whatever the model says.
fn greedy(tokens: u32) -> SamplingOptions {
    SamplingOptions { max_new_tokens: Some(tokens), ignore_eos: true, ..Default::default() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::defaults;
    use std::collections::{BTreeMap, BTreeSet};

    fn images(conversations: &[Conversation]) -> Vec<Bytes> {
        let parts = conversations.iter().flat_map(|c| &c.first.messages[0].content);
        parts.filter_map(|part| if let Some(Part::Image(image)) = &part.part { Some(image.data.clone()) } else { None }).collect()
    }

    #[test]
    fn same_seed_gives_the_same_bytes_and_other_seeds_others() {
        let config = defaults();
        let few = config.conversations(20, 0);
        assert_eq!(digest(&few), digest(&config.conversations(20, 0)));
        assert_eq!(digest(&few), digest(&config.conversations(30, 0)[..20]), "more conversations begin with the same ones");
        let other = WorkloadConfig { seed: 1, ..config };
        assert_ne!(digest(&few), digest(&other.conversations(20, 0)));
    }

    #[test]
    fn variants_differ_in_salt_and_pictures_only() {
        let config = WorkloadConfig { repeated_pictures: 0.0, ..defaults() };
        let (first, second) = (config.conversations(30, 1), config.conversations(30, 2));
        let bare = |conversations: &[Conversation]| {
            let mut conversations = conversations.to_vec();
            for conversation in &mut conversations {
                conversation.first.cache_salt.clear();
                conversation.first.messages[0].content.retain(|part| matches!(part.part, Some(Part::Text(_))));
            }
            digest(&conversations)
        };
        assert_eq!(bare(&first), bare(&second));
        let (first, second) = (images(&first), images(&second));
        let distinct: BTreeSet<&Bytes> = first.iter().chain(&second).collect();
        assert_eq!((first.len(), distinct.len()), (second.len(), 2 * first.len()));
    }

    #[test]
    fn kinds_and_repetitions_have_their_shares() {
        let config = WorkloadConfig { picture_edge: Range { least: 16, most: 32 }, repeated_pictures: 0.5, ..defaults() };
        let conversations = config.conversations(1000, 0);
        let mut kinds: BTreeMap<Kind, i32> = BTreeMap::new();
        for conversation in &conversations {
            *kinds.entry(conversation.kind).or_default() += 1;
            assert_eq!(conversation.second("An answer.").is_some(), conversation.kind == Kind::FirstTurn);
        }
        // Four standard deviations of a binomial of 1000 are 63 at most.
        for (kind, expected) in [(Kind::Text, 400), (Kind::Image, 300), (Kind::SplitImage, 100), (Kind::FirstTurn, 200)] {
            assert!((kinds[&kind] - expected).abs() < 63, "{kind:?}: {}", kinds[&kind]);
        }
        let images = images(&conversations);
        let distinct: BTreeSet<&Bytes> = images.iter().collect();
        let repeated = 1.0 - (distinct.len() - POPULAR_PICTURES as usize) as f64 / images.len() as f64;
        assert!((repeated - 0.5).abs() < 0.1, "{repeated}");
    }

    #[test]
    fn second_turn_resends_the_first_with_its_answer() {
        let config = WorkloadConfig { text: 0.0, image: 0.0, split_image: 0.0, multi_turn: 1.0, ..defaults() };
        let conversation = &config.conversations(1, 0)[0];
        let second = conversation.second(" A star. ").unwrap();
        assert_eq!(second.messages.len(), 3);
        assert_eq!(second.messages[0], conversation.first.messages[0]);
        assert_eq!(second.messages[1].content, [text("A star.".into())]);
    }

    #[test]
    fn impossible_mixes_are_refused() {
        assert!(defaults().check().is_ok());
        for bad in [
            WorkloadConfig { text: -1.0, ..defaults() },
            WorkloadConfig { text: f64::NAN, ..defaults() },
            WorkloadConfig { text: 0.0, image: 0.0, split_image: 0.0, multi_turn: 0.0, ..defaults() },
            WorkloadConfig { repeated_pictures: 1.5, ..defaults() },
        ] {
            assert!(bad.check().is_err(), "{bad:?}");
        }
    }
}

//! From logits to a token, as one request wants it: `processors`, then the most likely token, or `warpers` and a draw.
//!
//! Order and meaning are those of the logits processors of `transformers` 4.57 (`generation/logits_process.py`, put in order
//! by `GenerationMixin._get_logits_processor`); presence and frequency penalties are OpenAI's and come where that function
//! puts processors of the caller's own.

#[cfg(test)]
mod golden;
mod logprobs;
mod processors;
mod warpers;

use crate::sequence::{Logprobs, SamplingParams};
pub(crate) use logprobs::logprobs;
use processors::History;
use rand::{Rng, RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;
use warpers::Candidate;

/// Chooses the tokens of one sequence. What it chooses depends on its parameters, its prompt, what it chose before and the
/// logits; never on other sequences, nor on when the sequence gave its blocks back.
pub struct Sampler {
    params: SamplingParams,
    history: History,
    // A named generator, so that a seed gives the same tokens in every release.
    rng: ChaCha8Rng,
}

/// A draw that needs nothing but logits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Draw {
    /// 0 takes the most likely token.
    pub temperature: f32,
    /// 0 keeps all.
    pub top_k: u32,
    /// 1 keeps all.
    pub top_p: f32,
}

/// Memory that the samplers of a thread share; it carries nothing from one token to the next.
#[derive(Default)]
pub struct Scratch {
    scores: Vec<f32>, // [vocab], what is excluded is not finite
    keys: Vec<f32>,
    candidates: Vec<Candidate>, // by id
    ranked: Vec<Candidate>,
}

impl Sampler {
    /// A sampler at the start of its random stream, for a sequence that begins with `prompt`.
    pub fn new(params: SamplingParams, prompt: &[u32]) -> Self {
        Self { history: History::new(&params, prompt), rng: ChaCha8Rng::seed_from_u64(params.seed), params }
    }

    /// Draws from another random stream of the same seed: what it draws is independent of what other streams do.
    #[must_use]
    pub fn with_stream(mut self, stream: u64) -> Self {
        self.rng.set_stream(stream);
        self
    }

    /// The next token, which counts as generated from here on. `banned` is never chosen; `stop` are the checkpoint's own stop
    /// ids. Log-probabilities are of the model's own distribution, before anything that the request asks for. `None` if no
    /// logit is finite.
    pub fn sample(&mut self, logits: &[f32], banned: &[u32], stop: &[u32], scratch: &mut Scratch) -> Option<(u32, Option<Logprobs>)> {
        self.score(logits, banned, stop, scratch);
        let token_id = if self.params.temperature == 0.0 {
            greedy(&scratch.scores)?
        } else {
            let total = warpers::distribution(&self.params, scratch)?;
            draw(&scratch.candidates, total, self.rng.random())?
        };
        self.history.push(token_id);
        Some((token_id, self.params.logprobs.map(|n| logprobs(logits, token_id, n as usize))))
    }

    /// How the next tokens are drawn, if logits, temperature, top-k and top-p say it all: no processor has a say.
    pub fn plain_draw(&self) -> Option<Draw> {
        let p = &self.params;
        let plain = !self.history.matters(p) && p.logit_bias.is_empty() && p.min_p == 0.0 && p.typical_p == 1.0;
        plain.then_some(Draw { temperature: p.temperature, top_k: p.top_k, top_p: p.top_p })
    }

    /// How many of the likeliest tokens are wanted with each token's log-probability, if that is.
    pub fn logprobs(&self) -> Option<usize> {
        self.params.logprobs.map(|top| top as usize)
    }

    /// The bits that the next draws take, in order. They are used up only by [`accept`](Self::accept).
    pub fn random_bits(&self) -> impl Iterator<Item = u64> + use<> {
        let is_greedy = self.params.temperature == 0.0;
        let mut rng = self.rng.clone();
        std::iter::repeat_with(move || if is_greedy { 0 } else { rng.next_u64() })
    }

    /// Counts `token_id`, which the device drew with the next of [`random_bits`](Self::random_bits), as generated.
    pub fn accept(&mut self, token_id: u32) -> u32 {
        if self.params.temperature != 0.0 {
            self.rng.next_u64();
        }
        self.history.push(token_id);
        token_id
    }

    /// Whether `token_id` ends generation; `stop` as in [`sample`](Self::sample).
    pub fn ends_at(&self, token_id: u32, stop: &[u32]) -> bool {
        processors::stop_token_ids(&self.params, stop).any(|id| id == token_id)
    }

    fn score(&self, logits: &[f32], banned: &[u32], stop: &[u32], scratch: &mut Scratch) {
        let scores = &mut scratch.scores;
        scores.clear();
        scores.extend(logits.iter().map(|logit| if logit.is_finite() { *logit } else { f32::NEG_INFINITY }));
        processors::apply(&self.params, &self.history, banned, stop, scores);
    }
}

/// The highest score; the first of equals, as `torch.argmax` has it.
fn greedy(scores: &[f32]) -> Option<u32> {
    let mut best: Option<(u32, f32)> = None;
    for (id, &score) in scores.iter().enumerate() {
        if score.is_finite() && best.is_none_or(|(_, top)| score > top) {
            best = Some((id as u32, score));
        }
    }
    best.map(|(id, _)| id)
}

/// The token at `uniform`, from 0 to 1, of the candidates' distribution. By id and not by rank: logits that differ in their last
/// bits then nearly always give the same token.
fn draw(candidates: &[Candidate], total: f64, uniform: f64) -> Option<u32> {
    let mut left = uniform * total;
    for c in candidates {
        left -= f64::from(c.weight);
        if left < 0.0 {
            return Some(c.token_id);
        }
    }
    // Rounding may leave a last crumb.
    candidates.iter().rev().find(|c| c.weight > 0.0).map(|c| c.token_id)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GREEDY: SamplingParams = SamplingParams::GREEDY;
    const STOP: [u32; 2] = [0, 2];

    fn counts(params: SamplingParams, logits: &[f32], banned: &[u32], draws: usize) -> Vec<usize> {
        let (mut sampler, mut scratch) = (Sampler::new(params, &[]), Scratch::default());
        let mut counts = vec![0; logits.len()];
        for _ in 0..draws {
            counts[sampler.sample(logits, banned, &[], &mut scratch).unwrap().0 as usize] += 1;
        }
        counts
    }

    fn tokens(params: SamplingParams, prompt: &[u32], logits: &[f32], n: usize) -> Vec<u32> {
        let (mut sampler, mut scratch) = (Sampler::new(params, prompt), Scratch::default());
        (0..n).map(|_| sampler.sample(logits, &[], &STOP, &mut scratch).unwrap().0).collect()
    }

    #[test]
    fn greedy_takes_the_first_of_the_most_likely_that_is_not_banned() {
        let sample = |logits: &[f32]| Sampler::new(GREEDY, &[]).sample(logits, &[1], &[], &mut Scratch::default()).map(|(id, _)| id);
        assert_eq!(sample(&[0.0, 5.0, 3.0, 3.0]), Some(2));
        assert_eq!(sample(&[f32::NAN, 1.0]), None);
    }

    #[test]
    fn draws_follow_the_softmax() {
        let logits = [1.0f32, 0.0, 2.0, f32::NEG_INFINITY];
        let params = SamplingParams { temperature: 0.5, ..GREEDY };
        let draws = 20_000;
        let counts = counts(params, &logits, &[], draws);
        let weights: Vec<f64> = logits.iter().map(|l| (f64::from(*l) / 0.5).exp()).collect();
        let total: f64 = weights.iter().sum();
        for (count, weight) in counts.iter().zip(weights) {
            let p = weight / total;
            // Five standard deviations of a binomial count.
            let tolerance = 5.0 * (draws as f64 * p * (1.0 - p)).sqrt();
            assert!((*count as f64 - draws as f64 * p).abs() <= tolerance, "{counts:?}");
        }
    }

    #[test]
    fn warpers_cut_the_tail() {
        let logits: Vec<f32> = [0.5f32, 0.3, 0.1, 0.06, 0.04].iter().map(|p| p.ln()).collect();
        let hot = SamplingParams { temperature: 1.0, ..GREEDY };
        let kept = |params| counts(params, &logits, &[], 4_000).iter().filter(|c| **c > 0).count();
        assert_eq!(kept(hot.clone()), 5);
        assert_eq!(kept(SamplingParams { top_k: 2, ..hot.clone() }), 2);
        assert_eq!(kept(SamplingParams { top_p: 0.85, ..hot.clone() }), 3);
        assert_eq!(kept(SamplingParams { top_p: 0.45, ..hot.clone() }), 1);
        assert_eq!(kept(SamplingParams { min_p: 0.15, ..hot.clone() }), 3);
        // Top-p applies to what top-k leaves: 0.5 of 0.8 is 0.625.
        assert_eq!(kept(SamplingParams { top_k: 2, top_p: 0.6, ..hot.clone() }), 1);
        assert_eq!(kept(SamplingParams { top_k: 2, top_p: 0.7, ..hot.clone() }), 2);
        // The entropy is 1.24 nats, so 0.3 (1.20 nats) is the most typical, then 0.5 (0.69 nats).
        assert_eq!(counts(SamplingParams { typical_p: 0.25, ..hot.clone() }, &logits, &[], 100), [0, 100, 0, 0, 0]);
        assert_eq!(kept(SamplingParams { typical_p: 0.35, ..hot }), 2);
    }

    #[test]
    fn coldest_temperature_is_greedy() {
        let params = SamplingParams { temperature: f32::MIN_POSITIVE, ..GREEDY };
        assert_eq!(counts(params, &[9.0, 11.0, -3.0], &[], 20), [0, 20, 0]);
    }

    #[test]
    fn banned_ids_are_never_drawn_whatever_the_bias_and_seeds_repeat() {
        let logits = [9.0, 1.0, 1.0];
        let params = SamplingParams { temperature: 1.0, logit_bias: vec![(0, 100.0)], ..GREEDY };
        assert_eq!(counts(params.clone(), &logits, &[0], 500)[0], 0);
        assert_eq!(counts(SamplingParams { temperature: 0.0, ..params.clone() }, &logits, &[0], 5)[0], 0);
        let unbiased = SamplingParams { logit_bias: vec![], ..params };
        let draws = || tokens(unbiased.clone(), &[], &[1.0, 1.0, 1.0], 50);
        assert_eq!(draws(), draws());
    }

    #[test]
    fn device_that_draws_gets_the_bits_that_the_host_would_use() {
        let params = SamplingParams { temperature: 1.0, ..GREEDY };
        let logits: Vec<f32> = (0..50).map(|i| (i * 7 % 11) as f32 / 3.0).collect();
        let (mut host, mut device, mut scratch) =
            (Sampler::new(params.clone(), &[]), Sampler::new(params.clone(), &[]), Scratch::default());
        for _ in 0..20 {
            let bits = device.random_bits().next().unwrap();
            let total = warpers::distribution(&params, {
                host.score(&logits, &[], &[], &mut scratch);
                &mut scratch
            });
            let expected = draw(&scratch.candidates, total.unwrap(), (bits >> 11) as f64 / 2f64.powi(53)).unwrap();
            assert_eq!(host.sample(&logits, &[], &[], &mut scratch).unwrap().0, expected);
            device.accept(expected);
        }
    }

    #[test]
    fn draws_are_left_to_the_device_only_if_logits_say_it_all() {
        let plain = |params: SamplingParams| Sampler::new(params, &[1]).plain_draw();
        assert_eq!(plain(GREEDY), Some(Draw { temperature: 0.0, top_k: 0, top_p: 1.0 }));
        let warm = SamplingParams { temperature: 0.7, top_k: 5, top_p: 0.9, stop_token_ids: vec![7], logprobs: Some(3), ..GREEDY };
        assert_eq!(plain(warm), Some(Draw { temperature: 0.7, top_k: 5, top_p: 0.9 }));
        for params in [
            SamplingParams { min_p: 0.1, ..GREEDY },
            SamplingParams { typical_p: 0.9, ..GREEDY },
            SamplingParams { repetition_penalty: 1.1, ..GREEDY },
            SamplingParams { presence_penalty: 0.1, ..GREEDY },
            SamplingParams { frequency_penalty: -0.1, ..GREEDY },
            SamplingParams { logit_bias: vec![(1, 1.0)], ..GREEDY },
        ] {
            assert_eq!(plain(params.clone()), None, "{params:?}");
        }
        let mut waiting = Sampler::new(SamplingParams { min_new_tokens: 1, ..GREEDY }, &[]);
        assert_eq!(waiting.plain_draw(), None);
        waiting.accept(3);
        assert!(waiting.plain_draw().is_some());
    }

    #[test]
    fn stop_ids_wait_for_the_minimum() {
        let logits = [9.0, 1.0, 8.0, 7.0];
        let params = SamplingParams { min_new_tokens: 2, stop_token_ids: vec![3], ..GREEDY };
        assert_eq!(tokens(params.clone(), &[], &logits, 3), [1, 1, 0]);
        let sampler = Sampler::new(params.clone(), &[]);
        assert_eq!([0, 1, 2, 3].map(|id| sampler.ends_at(id, &STOP)), [true, false, true, true]);
        // Without the checkpoint's own stop ids, only the request's are held back, and only they end the answer.
        let params = SamplingParams { ignore_eos: true, ..params };
        assert_eq!(tokens(SamplingParams { logit_bias: vec![(3, 5.0)], ..params.clone() }, &[], &logits, 3), [0, 0, 3]);
        let sampler = Sampler::new(params, &[]);
        assert_eq!([0, 1, 2, 3].map(|id| sampler.ends_at(id, &STOP)), [false, false, false, true]);
    }

    #[test]
    fn greedy_penalties_count_what_was_generated() {
        let logits = [1.0, 3.0, 2.5, 0.2];
        // Prompt tokens weigh on the repetition penalty only.
        assert_eq!(tokens(SamplingParams { repetition_penalty: 2.0, ..GREEDY }, &[1, 1], &logits, 3), [2, 1, 1]);
        assert_eq!(tokens(SamplingParams { presence_penalty: 1.0, ..GREEDY }, &[1, 1], &logits, 4), [1, 2, 1, 1]);
        assert_eq!(tokens(SamplingParams { frequency_penalty: 1.0, ..GREEDY }, &[1, 1], &logits, 5), [1, 2, 1, 2, 0]);
        assert_eq!(tokens(SamplingParams { frequency_penalty: -2.0, ..GREEDY }, &[2, 2], &logits, 3), [1, 1, 1]);
    }
}

//! From logits to a token: temperature, top-k, top-p, and log-probabilities.
//!
//! Order and meaning are those of the logits processors of `transformers` (`generation/logits_process.py`).

use crate::sequence::{Logprobs, SamplingParams, TokenLogprob};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Chooses the tokens of one sequence. What it draws depends on its seed and the logits only, never on other sequences.
pub struct Sampler {
    params: SamplingParams,
    // A named generator, so that a seed gives the same tokens in every release.
    rng: ChaCha8Rng,
    candidates: Vec<TokenLogprob>,
}

impl Sampler {
    /// A sampler at the start of its random stream.
    pub fn new(params: SamplingParams) -> Self {
        Self { params, rng: ChaCha8Rng::seed_from_u64(params.seed), candidates: Vec::new() }
    }

    /// The next token; `banned` is never chosen. Log-probabilities are of the model's own distribution, before bans,
    /// temperature, top-k and top-p. `None` if no logit is finite.
    pub fn sample(&mut self, logits: &[f32], banned: &[u32]) -> Option<(u32, Option<Logprobs>)> {
        let token_id = if self.params.temperature == 0.0 { greedy(logits, banned)? } else { self.draw(logits, banned)? };
        Some((token_id, self.params.logprobs.map(|n| logprobs(logits, token_id, n as usize))))
    }

    fn draw(&mut self, logits: &[f32], banned: &[u32]) -> Option<u32> {
        let temperature = self.params.temperature;
        let candidates = &mut self.candidates;
        candidates.clear();
        candidates.extend(allowed(logits, banned).map(|(token_id, logit)| TokenLogprob { token_id, logprob: logit / temperature }));
        let top_k = self.params.top_k as usize;
        if top_k > 0 && top_k < candidates.len() {
            candidates.select_nth_unstable_by(top_k - 1, most_likely_first);
            candidates.truncate(top_k);
        }
        let max = candidates.iter().map(|c| c.logprob).reduce(f32::max)?;
        let mut total = 0f64;
        for c in candidates.iter_mut() {
            c.logprob = (c.logprob - max).exp();
            total += f64::from(c.logprob);
        }
        if self.params.top_p < 1.0 {
            let top_p = f64::from(self.params.top_p);
            // Tokens below this share of the probability cannot be in the smallest set that reaches top_p: all of them
            // together stay below the 1 - top_p that it leaves out. Dropping them first keeps the sort short.
            let floor = (total * (1.0 - top_p) / candidates.len() as f64) as f32;
            candidates.retain(|c| c.logprob >= floor);
            candidates.sort_unstable_by(most_likely_first);
            let (mut sum, mut kept) = (0f64, 0);
            while kept < candidates.len() && (kept == 0 || sum < top_p * total) {
                sum += f64::from(candidates[kept].logprob);
                kept += 1;
            }
            candidates.truncate(kept);
            total = sum;
        }
        let mut left = self.rng.random::<f64>() * total;
        for c in candidates.iter() {
            left -= f64::from(c.logprob);
            if left < 0.0 {
                return Some(c.token_id);
            }
        }
        // Rounding may leave a last crumb.
        candidates.iter().rev().find(|c| c.logprob > 0.0).map(|c| c.token_id)
    }
}

/// Finite logits that may be chosen.
fn allowed<'a>(logits: &'a [f32], banned: &'a [u32]) -> impl Iterator<Item = (u32, f32)> + 'a {
    logits.iter().enumerate().map(|(i, l)| (i as u32, *l)).filter(|(id, logit)| logit.is_finite() && !banned.contains(id))
}

/// The most likely token; the first of equals, as `torch.argmax` has it.
fn greedy(logits: &[f32], banned: &[u32]) -> Option<u32> {
    let mut best: Option<(u32, f32)> = None;
    for (id, &logit) in logits.iter().enumerate() {
        if logit.is_finite() && best.is_none_or(|(_, top)| logit > top) && !banned.contains(&(id as u32)) {
            best = Some((id as u32, logit));
        }
    }
    best.map(|(id, _)| id)
}

/// By falling value, equal ones by id.
fn most_likely_first(a: &TokenLogprob, b: &TokenLogprob) -> std::cmp::Ordering {
    b.logprob.total_cmp(&a.logprob).then(a.token_id.cmp(&b.token_id))
}

fn logprobs(logits: &[f32], token_id: u32, top: usize) -> Logprobs {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|l| f64::from(l - max).exp()).sum();
    let of = |logit: f32| (f64::from(logit - max) - sum.ln()) as f32;
    let mut tops: Vec<TokenLogprob> = Vec::with_capacity(top + 1);
    for (id, &logit) in logits.iter().enumerate() {
        if tops.len() == top && tops.last().is_none_or(|last| logit <= last.logprob) {
            continue;
        }
        let candidate = TokenLogprob { token_id: id as u32, logprob: logit };
        let at = tops.partition_point(|t| most_likely_first(t, &candidate).is_lt());
        tops.insert(at, candidate);
        tops.truncate(top);
    }
    for t in &mut tops {
        t.logprob = of(t.logprob);
    }
    Logprobs { logprob: of(logits[token_id as usize]), top: tops }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GREEDY: SamplingParams = SamplingParams { temperature: 0.0, top_p: 1.0, top_k: 0, seed: 7, logprobs: None };

    fn counts(params: SamplingParams, logits: &[f32], banned: &[u32], draws: usize) -> Vec<usize> {
        let mut sampler = Sampler::new(params);
        let mut counts = vec![0; logits.len()];
        for _ in 0..draws {
            counts[sampler.sample(logits, banned).unwrap().0 as usize] += 1;
        }
        counts
    }

    #[test]
    fn greedy_takes_the_first_of_the_most_likely_that_is_not_banned() {
        assert_eq!(Sampler::new(GREEDY).sample(&[0.0, 5.0, 3.0, 3.0], &[1]).unwrap().0, 2);
        assert!(Sampler::new(GREEDY).sample(&[f32::NAN, 1.0], &[1]).is_none());
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
    fn top_k_and_top_p_cut_the_tail() {
        let logits: Vec<f32> = [0.5f32, 0.3, 0.1, 0.06, 0.04].iter().map(|p| p.ln()).collect();
        let hot = SamplingParams { temperature: 1.0, ..GREEDY };
        let kept = |params| counts(params, &logits, &[], 4_000).iter().filter(|c| **c > 0).count();
        assert_eq!(kept(hot), 5);
        assert_eq!(kept(SamplingParams { top_k: 2, ..hot }), 2);
        assert_eq!(kept(SamplingParams { top_p: 0.85, ..hot }), 3);
        assert_eq!(kept(SamplingParams { top_p: 0.45, ..hot }), 1);
        // Top-p applies to what top-k leaves: 0.5 of 0.8 is 0.625.
        assert_eq!(kept(SamplingParams { top_k: 2, top_p: 0.6, ..hot }), 1);
        assert_eq!(kept(SamplingParams { top_k: 2, top_p: 0.7, ..hot }), 2);
    }

    #[test]
    fn banned_ids_are_never_drawn_and_seeds_repeat() {
        let logits = [9.0, 1.0, 1.0];
        let params = SamplingParams { temperature: 1.0, ..GREEDY };
        assert_eq!(counts(params, &logits, &[0], 500)[0], 0);
        assert_eq!(counts(params, &logits, &[], 50), counts(params, &logits, &[], 50));
    }

    #[test]
    fn logprobs_are_the_log_softmax() {
        let logits = [1.0f32, 3.0, 2.0];
        let params = SamplingParams { logprobs: Some(2), ..GREEDY };
        let (token_id, logprobs) = Sampler::new(params).sample(&logits, &[1]).unwrap();
        let logprobs = logprobs.unwrap();
        let total: f64 = logits.iter().map(|l| f64::from(*l).exp()).sum();
        assert_eq!((token_id, logprobs.top[0].token_id, logprobs.top[1].token_id), (2, 1, 2));
        for (found, logit) in [(logprobs.logprob, 2f64), (logprobs.top[0].logprob, 3.0), (logprobs.top[1].logprob, 2.0)] {
            assert!((f64::from(found) - (logit - total.ln())).abs() < 1e-6, "f32 rounding of values near 1");
        }
    }
}

//! What a draw chooses from: temperature, top-k, top-p, min-p and typical-p, in this order.
//!
//! Work is linear in the vocabulary: nothing is sorted. Where a set is defined by a sorted order (top-p, typical-p), its last
//! member is found by selection, and what ranks behind it is dropped.

use super::Scratch;
use crate::sequence::SamplingParams;
use std::cmp::Ordering;

/// A token that may be drawn.
#[derive(Clone, Copy, Debug)]
pub(super) struct Candidate {
    pub(super) token_id: u32,
    /// What it is ranked by.
    score: f32,
    /// Its probability, relative to the most likely token's.
    pub(super) weight: f32,
}

/// Fills `scratch.candidates` from `scratch.scores`; returns the sum of their weights. `None` if no score is finite.
pub(super) fn distribution(params: &SamplingParams, scratch: &mut Scratch) -> Option<f64> {
    let Scratch { scores, keys, candidates, ranked } = scratch;
    let allowed = || scores.iter().copied().filter(|score| score.is_finite());
    let max = allowed().reduce(f32::max)?;
    let threshold = if params.top_k == 0 { f32::MIN } else { top_k(allowed(), params.top_k as usize, keys) };
    candidates.clear();
    candidates.extend(scores.iter().enumerate().filter(|(_, score)| score.is_finite() && **score >= threshold).map(|(id, score)| {
        // The difference first: a quotient may overflow.
        let score = (score - max) / params.temperature;
        Candidate { token_id: id as u32, score, weight: score.exp() }
    }));
    if params.top_p < 1.0 {
        top_p(candidates, f64::from(params.top_p), ranked);
    }
    // The most likely token has weight 1, here and behind top-k and top-p.
    if params.min_p > 0.0 {
        candidates.retain(|c| c.weight >= params.min_p);
    }
    if params.typical_p < 1.0 {
        typical(candidates, f64::from(params.typical_p), ranked);
    }
    Some(total(candidates))
}

/// Score of the `k`-th of `scores` (TopKLogitsWarper: its equals stay too).
fn top_k(scores: impl Iterator<Item = f32>, k: usize, keys: &mut Vec<f32>) -> f32 {
    keys.clear();
    keys.extend(scores);
    if k < keys.len() { *keys.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a)).1 } else { f32::MIN }
}

/// Keeps the smallest set of most likely tokens that reaches `mass` (TopPLogitsWarper). Of equals at its border the higher ids
/// stay: the reference sorts upwards and drops from below, and leaves the order of equals to its sort.
fn top_p(candidates: &mut Vec<Candidate>, mass: f64, ranked: &mut Vec<Candidate>) {
    let most_likely_first = |a: &Candidate, b: &Candidate| b.score.total_cmp(&a.score).then(b.token_id.cmp(&a.token_id));
    let total = total(candidates);
    // Tokens below this share of the probability cannot be in the set: all of them together stay below the 1 - mass that it
    // leaves out. Dropping them first keeps the selection short.
    let floor = (total * (1.0 - mass) / candidates.len() as f64) as f32;
    ranked.clear();
    ranked.extend(candidates.iter().filter(|c| c.weight >= floor));
    if let Some(last) = reaches(ranked, mass * total, most_likely_first) {
        candidates.retain(|c| most_likely_first(c, &last).is_le());
    }
}

/// Keeps the tokens whose information is nearest to the distribution's entropy, until they reach `mass`
/// (TypicalLogitsWarper; Meister et al., "Locally Typical Sampling", arXiv 2202.00666). Equals at the border all stay.
fn typical(candidates: &mut Vec<Candidate>, mass: f64, ranked: &mut Vec<Candidate>) {
    let total = total(candidates);
    let log_total = total.ln();
    let information = |c: &Candidate| log_total - f64::from(c.score);
    // A weight of 0 may come with an infinite score.
    let entropy: f64 = candidates.iter().filter(|c| c.weight > 0.0).map(|c| f64::from(c.weight) / total * information(c)).sum();
    let distance = |c: &Candidate| (information(c) - entropy).abs() as f32;
    ranked.clear();
    ranked.extend(candidates.iter().map(|c| Candidate { score: distance(c), ..*c }));
    let nearest_first = |a: &Candidate, b: &Candidate| a.score.total_cmp(&b.score).then(a.token_id.cmp(&b.token_id));
    if let Some(last) = reaches(ranked, mass * total, nearest_first) {
        candidates.retain(|c| distance(c) <= last.score);
    }
}

/// The last of the shortest beginning, in the given order, whose weights reach `mass`; the last of all if none does. Halves the
/// range that holds it, so that the work is linear on average.
fn reaches(ranked: &mut [Candidate], mass: f64, order: impl Fn(&Candidate, &Candidate) -> Ordering) -> Option<Candidate> {
    let (mut start, mut end, mut before) = (0, ranked.len(), 0f64);
    while end - start > 1 {
        let half = (end - start) / 2;
        let range = &mut ranked[start..end];
        range.select_nth_unstable_by(half, &order);
        let sum = before + total(&range[..half]);
        if sum >= mass {
            end = start + half;
        } else {
            start += half;
            before = sum;
        }
    }
    ranked.get(start).copied()
}

fn total(candidates: &[Candidate]) -> f64 {
    candidates.iter().map(|c| f64::from(c.weight)).sum()
}

//! What changes scores before a token is chosen, greedily or by lot: bias, penalties, the minimum length, bans.

use crate::sequence::SamplingParams;
use std::collections::HashMap;

/// What a sequence has said so far, as far as its processors ask for it.
pub(super) struct History {
    /// How often each token was generated; 0 for those that only the prompt has, which are here if they are penalised.
    counts: HashMap<u32, u32>,
    num_generated: u32,
    penalties: bool,
}

impl History {
    pub(super) fn new(params: &SamplingParams, prompt: &[u32]) -> Self {
        let repetition = params.repetition_penalty != 1.0;
        let counts = if repetition { prompt.iter().map(|id| (*id, 0)).collect() } else { HashMap::new() };
        Self { counts, num_generated: 0, penalties: repetition || params.presence_penalty != 0.0 || params.frequency_penalty != 0.0 }
    }

    /// Whether what was said so far changes the scores of the next token.
    pub(super) fn matters(&self, params: &SamplingParams) -> bool {
        self.penalties || self.num_generated < params.min_new_tokens
    }

    pub(super) fn push(&mut self, token_id: u32) {
        self.num_generated += 1;
        if self.penalties {
            *self.counts.entry(token_id).or_default() += 1;
        }
    }
}

/// Ids that end the sequence: the request's, and the checkpoint's own unless it ignores them.
pub(super) fn stop_token_ids<'a>(params: &'a SamplingParams, stop: &'a [u32]) -> impl Iterator<Item = u32> + 'a {
    let own = if params.ignore_eos { &[] } else { stop };
    params.stop_token_ids.iter().chain(own).copied()
}

/// Changes `scores` `[vocab]` in place. The cost is that of the ids that are named, not of the vocabulary.
pub(super) fn apply(params: &SamplingParams, history: &History, banned: &[u32], stop: &[u32], scores: &mut [f32]) {
    // SequenceBiasLogitsProcessor with sequences of one token.
    for (id, bias) in &params.logit_bias {
        change(scores, *id, |score| score + bias);
    }
    // RepetitionPenaltyLogitsProcessor: prompt and generated tokens, each once.
    let penalty = params.repetition_penalty;
    if penalty != 1.0 {
        for id in history.counts.keys() {
            change(scores, *id, |score| if score < 0.0 { score * penalty } else { score / penalty });
        }
    }
    // MinNewTokensLengthLogitsProcessor.
    if history.num_generated < params.min_new_tokens {
        stop_token_ids(params, stop).for_each(|id| change(scores, id, |_| f32::NEG_INFINITY));
    }
    // SuppressTokensLogitsProcessor: behind the bias, which therefore cannot lift a ban.
    for id in banned {
        change(scores, *id, |_| f32::NEG_INFINITY);
    }
    // OpenAI's formula: score - count * frequency_penalty - (count > 0) * presence_penalty, over generated tokens.
    let (frequency, presence) = (params.frequency_penalty, params.presence_penalty);
    if frequency != 0.0 || presence != 0.0 {
        for (id, count) in history.counts.iter().filter(|(_, count)| **count > 0) {
            change(scores, *id, |score| score - *count as f32 * frequency - presence);
        }
    }
}

fn change(scores: &mut [f32], id: u32, to: impl FnOnce(f32) -> f32) {
    if let Some(score) = scores.get_mut(id as usize) {
        *score = to(*score);
    }
}

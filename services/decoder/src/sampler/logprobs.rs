//! Log-probabilities of the model's own distribution.

use crate::sequence::{Logprobs, TokenLogprob};

/// Of `token_id` and of the `top` most likely tokens. Not a number if any logit is not.
pub(crate) fn logprobs(logits: &[f32], token_id: u32, top: usize) -> Logprobs {
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

/// By falling value, equal ones by id.
fn most_likely_first(a: &TokenLogprob, b: &TokenLogprob) -> std::cmp::Ordering {
    b.logprob.total_cmp(&a.logprob).then(a.token_id.cmp(&b.token_id))
}

#[cfg(test)]
mod tests {
    use crate::{
        sampler::{Sampler, Scratch},
        sequence::SamplingParams,
    };

    #[test]
    fn logprobs_are_the_log_softmax_before_what_the_request_asks_for() {
        let logits = [1.0f32, 3.0, 2.0];
        let params = SamplingParams { logprobs: Some(2), logit_bias: vec![(2, 50.0)], repetition_penalty: 3.0, ..SamplingParams::GREEDY };
        let (token_id, logprobs) = Sampler::new(params, &[0, 1]).sample(&logits, &[1], &[0], &mut Scratch::default()).unwrap();
        let logprobs = logprobs.unwrap();
        let total: f64 = logits.iter().map(|l| f64::from(*l).exp()).sum();
        assert_eq!((token_id, logprobs.top[0].token_id, logprobs.top[1].token_id), (2, 1, 2));
        for (found, logit) in [(logprobs.logprob, 2f64), (logprobs.top[0].logprob, 3.0), (logprobs.top[1].logprob, 2.0)] {
            assert!((f64::from(found) - (logit - total.ln())).abs() < 1e-6, "f32 rounding of values near 1");
        }
    }
}

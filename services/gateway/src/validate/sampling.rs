//! How tokens are chosen and when generation stops.

use super::Check;
use idefics_proto::{decoder::v1::SamplingParams, gateway::v1 as pb};
use std::ops::RangeInclusive;

/// `SamplingOptions`, defaults filled in.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Sampling {
    pub(crate) max_new_tokens: u32,
    /// Answers to generate.
    pub(crate) n: u32,
    /// Most likely tokens for each place of the prompt.
    pub(crate) prompt_logprobs: Option<u32>,
    pub(crate) stop: Vec<String>,
    /// What the decoder is told.
    pub(crate) params: SamplingParams,
}

const TEMPERATURES: RangeInclusive<f32> = 0.0..=2.0;
const MIN_PS: RangeInclusive<f32> = 0.0..=1.0;
// Both ends are far beyond use, and near enough that no logit overflows.
const REPETITION_PENALTIES: RangeInclusive<f32> = 0.01..=100.0;
// OpenAI's.
const PENALTIES: RangeInclusive<f32> = -2.0..=2.0;
const LOGIT_BIASES: RangeInclusive<f32> = -100.0..=100.0;
const MAX_LOGIT_BIASES: usize = 1024;
const MAX_STOP_TOKEN_IDS: usize = 16;
const MAX_LOGPROBS: u32 = 20;
const CHOICES: RangeInclusive<u32> = 1..=16;

impl Check<'_> {
    pub(super) fn sampling(&mut self, options: pb::SamplingOptions) -> Sampling {
        if options.max_new_tokens == Some(0) {
            self.refuse("sampling.max_new_tokens", "is 0, expected 1 or more");
        }
        let max_new_tokens = options.max_new_tokens.unwrap_or(self.limits.default_max_new_tokens);
        let min_new_tokens = options.min_new_tokens.unwrap_or(0);
        if min_new_tokens > max_new_tokens {
            self.refuse("sampling.min_new_tokens", format!("is {min_new_tokens}, expected at most max_new_tokens, {max_new_tokens}"));
        }
        for (field, value) in [("logprobs", options.logprobs), ("prompt_logprobs", options.prompt_logprobs)] {
            if let Some(logprobs) = value.filter(|n| *n > MAX_LOGPROBS) {
                self.refuse(format!("sampling.{field}"), format!("is {logprobs}, expected from 0 to {MAX_LOGPROBS}"));
            }
        }
        let n = options.n.unwrap_or(1);
        if !CHOICES.contains(&n) {
            self.refuse("sampling.n", format!("is {n}, expected from {} to {}", CHOICES.start(), CHOICES.end()));
        }
        let params = SamplingParams {
            // -0.0 is within the range; the decoder compares with 0.
            temperature: self.number("temperature", options.temperature, 0.0, TEMPERATURES).abs(),
            top_k: options.top_k.unwrap_or(0),
            top_p: self.probability("top_p", options.top_p),
            min_p: self.number("min_p", options.min_p, 0.0, MIN_PS),
            typical_p: self.probability("typical_p", options.typical_p),
            repetition_penalty: self.number("repetition_penalty", options.repetition_penalty, 1.0, REPETITION_PENALTIES),
            presence_penalty: self.number("presence_penalty", options.presence_penalty, 0.0, PENALTIES),
            frequency_penalty: self.number("frequency_penalty", options.frequency_penalty, 0.0, PENALTIES),
            seed: options.seed,
            min_new_tokens,
            ignore_eos: options.ignore_eos,
            logprobs: options.logprobs,
            logit_bias: options.logit_bias,
            stop_token_ids: options.stop_token_ids,
        };
        self.logit_bias(&params);
        self.stop_token_ids(&params);
        self.stop_texts(&options.stop);
        Sampling { max_new_tokens, n, prompt_logprobs: options.prompt_logprobs, stop: options.stop, params }
    }

    fn number(&mut self, field: &str, value: Option<f32>, default: f32, range: RangeInclusive<f32>) -> f32 {
        let value = value.unwrap_or(default);
        if !range.contains(&value) {
            let what = format!("is {value}, expected from {} to {}", range.start(), range.end());
            self.refuse(format!("sampling.{field}"), what);
        }
        value
    }

    fn probability(&mut self, field: &str, value: Option<f32>) -> f32 {
        let value = value.unwrap_or(1.0);
        if !(value > 0.0 && value <= 1.0) {
            self.refuse(format!("sampling.{field}"), format!("is {value}, expected above 0 and up to 1"));
        }
        value
    }

    fn logit_bias(&mut self, params: &SamplingParams) {
        let count = params.logit_bias.len();
        if count > MAX_LOGIT_BIASES {
            self.refuse("sampling.logit_bias", format!("has {count} ids, limit is {MAX_LOGIT_BIASES}; send fewer"));
            return;
        }
        let mut ids: Vec<_> = params.logit_bias.iter().collect();
        ids.sort_unstable_by_key(|(id, _)| **id);
        for (id, bias) in ids {
            let field = format!("sampling.logit_bias[{id}]");
            self.token_id(&field, *id);
            if !LOGIT_BIASES.contains(bias) {
                self.refuse(field, format!("is {bias}, expected from {} to {}", LOGIT_BIASES.start(), LOGIT_BIASES.end()));
            }
        }
    }

    fn stop_token_ids(&mut self, params: &SamplingParams) {
        let count = params.stop_token_ids.len();
        if count > MAX_STOP_TOKEN_IDS {
            self.refuse("sampling.stop_token_ids", format!("has {count} ids, limit is {MAX_STOP_TOKEN_IDS}; send fewer"));
        }
        for (i, id) in params.stop_token_ids.iter().enumerate().take(MAX_STOP_TOKEN_IDS) {
            self.token_id(&format!("sampling.stop_token_ids[{i}]"), *id);
        }
    }

    fn token_id(&mut self, field: &str, id: u32) {
        let vocab_size = self.limits.vocab_size;
        if id >= vocab_size {
            self.refuse(field, format!("token id is {id}, expected below the vocabulary's size, {vocab_size}"));
        }
    }

    fn stop_texts(&mut self, stop: &[String]) {
        let (max_stop_texts, max_stop_bytes) = (self.limits.max_stop_texts, self.limits.max_stop_bytes);
        if stop.len() > max_stop_texts {
            let what = format!("has {} texts, limit is {max_stop_texts}; send fewer or raise gateway.max_stop_texts", stop.len());
            self.refuse("sampling.stop", what);
        }
        for (i, stop) in stop.iter().enumerate().take(max_stop_texts) {
            if !(1..=max_stop_bytes).contains(&stop.len()) {
                self.refuse(format!("sampling.stop[{i}]"), format!("is {} bytes, expected from 1 to {max_stop_bytes}", stop.len()));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{config::GatewayConfig, testing::checkpoint, validate::Limits};

    const NONE: [&str; 0] = [];

    fn check(options: pb::SamplingOptions) -> (Sampling, Vec<String>) {
        let limits = Limits::new(&GatewayConfig::default(), &checkpoint());
        let mut check = Check::new(&limits, "", "");
        let sampling = check.sampling(options);
        (sampling, check.violations.into_iter().map(|violation| violation.field).collect())
    }

    fn fields(options: pb::SamplingOptions) -> Vec<String> {
        check(options).1
    }

    #[test]
    fn sampling_ranges_are_those_of_the_contract() {
        type Set = fn(&mut pb::SamplingOptions, f32);
        let never = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY];
        let cases: [(&str, Set, &[f32], &[f32]); 7] = [
            ("temperature", |o, v| o.temperature = Some(v), &[0.0, -0.0, 2.0, f32::MIN_POSITIVE], &[-0.1, 2.1]),
            ("top_p", |o, v| o.top_p = Some(v), &[1.0, f32::MIN_POSITIVE], &[0.0, -1.0, 1.1]),
            ("min_p", |o, v| o.min_p = Some(v), &[0.0, 1.0], &[-0.1, 1.1]),
            ("typical_p", |o, v| o.typical_p = Some(v), &[1.0, f32::MIN_POSITIVE], &[0.0, -1.0, 1.1]),
            ("repetition_penalty", |o, v| o.repetition_penalty = Some(v), &[0.01, 1.0, 100.0], &[0.0, -1.0, 0.009, 101.0]),
            ("presence_penalty", |o, v| o.presence_penalty = Some(v), &[-2.0, 2.0], &[-2.1, 2.1]),
            ("frequency_penalty", |o, v| o.frequency_penalty = Some(v), &[-2.0, 2.0], &[-2.1, 2.1]),
        ];
        for (field, set, good, bad) in cases {
            let of = |value: f32| {
                let mut options = pb::SamplingOptions::default();
                set(&mut options, value);
                fields(options)
            };
            good.iter().for_each(|value| assert_eq!(of(*value), NONE, "{field} {value}"));
            bad.iter().chain(&never).for_each(|value| assert_eq!(of(*value), [format!("sampling.{field}")], "{value}"));
        }
        let stop = |stop: Vec<String>| fields(pb::SamplingOptions { stop, ..Default::default() });
        assert_eq!(stop(vec!["x".repeat(256); 16]), NONE);
        assert_eq!(stop(vec!["x".into(); 17]), ["sampling.stop"]);
        assert_eq!(stop(vec!["x".repeat(257), String::new()]), ["sampling.stop[0]", "sampling.stop[1]"]);
        let n = |n| fields(pb::SamplingOptions { n: Some(n), ..Default::default() });
        [1, 16].into_iter().for_each(|good| assert_eq!(n(good), NONE));
        let prompt_logprobs = |n| fields(pb::SamplingOptions { prompt_logprobs: Some(n), ..Default::default() });
        assert_eq!((prompt_logprobs(20), prompt_logprobs(21)), (vec![], vec!["sampling.prompt_logprobs".to_owned()]));
        [0, 17, u32::MAX].into_iter().for_each(|bad| assert_eq!(n(bad), ["sampling.n"]));
    }

    #[test]
    fn ids_are_below_the_vocabulary_and_not_too_many() {
        let vocab_size = checkpoint().config.text_config.vocab_size as u32;
        let bias = |bias: Vec<(u32, f32)>| fields(pb::SamplingOptions { logit_bias: bias.into_iter().collect(), ..Default::default() });
        assert_eq!(bias(vec![(0, -100.0), (vocab_size - 1, 100.0)]), NONE);
        let outside = format!("sampling.logit_bias[{vocab_size}]");
        assert_eq!(
            bias(vec![(3, f32::NAN), (vocab_size, 1.0), (1, 100.5)]),
            ["sampling.logit_bias[1]", "sampling.logit_bias[3]", &outside]
        );
        assert_eq!(bias((0..1025).map(|id| (id, 0.0)).collect()), ["sampling.logit_bias"]);
        let stop = |stop_token_ids| fields(pb::SamplingOptions { stop_token_ids, ..Default::default() });
        assert_eq!(stop(vec![vocab_size - 1; 16]), NONE);
        assert_eq!(stop(vec![1, vocab_size, 2, u32::MAX]), ["sampling.stop_token_ids[1]", "sampling.stop_token_ids[3]"]);
        assert_eq!(stop(vec![1; 17]), ["sampling.stop_token_ids"]);
    }

    #[test]
    fn minimum_is_at_most_the_maximum() {
        let of = |min, max| fields(pb::SamplingOptions { min_new_tokens: Some(min), max_new_tokens: max, ..Default::default() });
        assert_eq!((of(5, Some(5)), of(256, None)), (vec![], vec![]));
        assert_eq!((of(6, Some(5)), of(257, None)), (vec!["sampling.min_new_tokens".into()], vec!["sampling.min_new_tokens".into()]));
    }

    #[test]
    fn defaults_change_nothing() {
        let (sampling, _) = check(pb::SamplingOptions::default());
        let params = SamplingParams { top_p: 1.0, typical_p: 1.0, repetition_penalty: 1.0, ..Default::default() };
        assert_eq!(sampling, Sampling { max_new_tokens: 256, n: 1, prompt_logprobs: None, stop: vec![], params });
    }
}

//! Numbers about requests: how many, how fast, how long.

use crate::{quantiles::Quantiles, runner::Outcome};
use clap::Args;
use serde::Serialize;
use std::{collections::BTreeMap, time::Duration};

/// What an answer must keep to count as good.
#[derive(Args, Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Slo {
    /// Goodput counts answers whose first token came within this time only
    #[arg(long, value_name = "MS")]
    pub slo_ttft_ms: Option<f64>,
    /// Goodput counts answers whose mean time from token to token was within this only
    #[arg(long, value_name = "MS")]
    pub slo_itl_ms: Option<f64>,
}

/// The part of a run that rates are taken over, since its start.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Window {
    /// Its beginning, in seconds.
    pub from_s: f64,
    /// Its end, in seconds.
    pub to_s: f64,
}

impl Window {
    fn contains(self, at: Duration) -> bool {
        (self.from_s..=self.to_s).contains(&at.as_secs_f64())
    }

    fn per_second(self, count: usize) -> f64 {
        let seconds = self.to_s - self.from_s;
        if seconds > 0.0 { count as f64 / seconds } else { 0.0 }
    }
}

/// Numbers about some requests of a run. Rates are over its window, all else over the whole run.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Summary {
    /// Requests sent.
    pub sent: usize,
    /// Of those, answered completely.
    pub answered: usize,
    /// Of those, refused because the server was full.
    pub refused: usize,
    /// All others, by code.
    pub errors: BTreeMap<String, usize>,
    /// What the first error of each code said.
    pub error_messages: BTreeMap<String, String>,
    /// Answers per second.
    pub requests_per_s: f64,
    /// Answers per second that kept the objectives.
    pub goodput_per_s: f64,
    /// Tokens per second of all answers, complete or not.
    pub output_tokens_per_s: f64,
    /// Tokens of all complete answers.
    pub output_tokens: u64,
    /// Tokens of the prompts of all complete answers.
    pub prompt_tokens: u64,
    /// Of those, the ones that were not computed because an earlier request had the same beginning.
    pub cached_prompt_tokens: u64,
    /// From when a request was due to its first token.
    pub ttft_ms: Option<Quantiles>,
    /// From one token to the next, over all tokens.
    pub inter_token_ms: Option<Quantiles>,
    /// The mean of a request's times from token to token, over requests.
    pub time_per_output_token_ms: Option<Quantiles>,
    /// From when a request was due to the end of its answer.
    pub total_ms: Option<Quantiles>,
    /// From when a request was due to its refusal.
    pub refusal_ms: Option<Quantiles>,
    /// The prompt's forward passes, as the server says.
    pub prefill_ms: Option<Quantiles>,
    /// Time to first token less what vision and decoder say they did or waited for before it: what gateway, connections and
    /// driver add. For requests with several pictures, which are encoded side by side, it is too little.
    pub added_ttft_ms: Option<Quantiles>,
}

impl Summary {
    /// Numbers about `outcomes`.
    pub fn of<'a>(outcomes: impl IntoIterator<Item = &'a Outcome>, window: Window, slo: Slo) -> Self {
        let mut summary = Self::default();
        let (mut answers_in_window, mut good_in_window, mut tokens_in_window) = (0, 0, 0);
        let [mut ttft, mut inter_token, mut per_token, mut total, mut refusal, mut prefill, mut added] = [const { Vec::new() }; 7];
        for outcome in outcomes {
            summary.sent += 1;
            tokens_in_window += outcome.token_times.iter().filter(|at| window.contains(**at)).count();
            let since_due = |at: Duration| ms(at.saturating_sub(outcome.due));
            match &outcome.result {
                Ok(answer) => {
                    summary.answered += 1;
                    summary.output_tokens += u64::from(answer.completion_tokens);
                    summary.prompt_tokens += u64::from(answer.prompt_tokens);
                    summary.cached_prompt_tokens += u64::from(answer.cached_tokens);
                    let first_token = outcome.token_times.first().map(|at| since_due(*at));
                    let gaps: Vec<f64> = outcome.token_times.windows(2).map(|pair| ms(pair[1] - pair[0])).collect();
                    let mean_gap = (!gaps.is_empty()).then(|| gaps.iter().sum::<f64>() / gaps.len() as f64);
                    if window.contains(outcome.ended) {
                        answers_in_window += 1;
                        good_in_window += usize::from(slo.is_kept(first_token, mean_gap));
                    }
                    ttft.extend(first_token);
                    added.extend(first_token.map(|ttft_ms| ttft_ms - answer.before_first_token_ms));
                    per_token.extend(mean_gap);
                    inter_token.extend(gaps);
                    total.push(since_due(outcome.ended));
                    prefill.push(answer.prefill_ms);
                }
                Err(failure) if failure.is_refusal() => {
                    summary.refused += 1;
                    refusal.push(since_due(outcome.ended));
                }
                Err(failure) => {
                    *summary.errors.entry(failure.code.clone()).or_default() += 1;
                    summary.error_messages.entry(failure.code.clone()).or_insert_with(|| failure.message.clone());
                }
            }
        }
        summary.requests_per_s = window.per_second(answers_in_window);
        summary.goodput_per_s = window.per_second(good_in_window);
        summary.output_tokens_per_s = window.per_second(tokens_in_window);
        let values = [ttft, inter_token, per_token, total, refusal, prefill, added].map(Quantiles::of);
        [
            summary.ttft_ms,
            summary.inter_token_ms,
            summary.time_per_output_token_ms,
            summary.total_ms,
            summary.refusal_ms,
            summary.prefill_ms,
            summary.added_ttft_ms,
        ] = values;
        summary
    }

    /// Requests that were neither answered nor refused.
    pub fn num_errors(&self) -> usize {
        self.errors.values().sum()
    }
}

impl Slo {
    fn is_kept(self, ttft_ms: Option<f64>, mean_gap_ms: Option<f64>) -> bool {
        let within = |value: Option<f64>, limit: Option<f64>| limit.is_none_or(|limit| value.is_none_or(|value| value <= limit));
        within(ttft_ms, self.slo_ttft_ms) && within(mean_gap_ms, self.slo_itl_ms)
    }
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        client::{Answer, Failure},
        workload::Kind,
    };

    const WHOLE: Window = Window { from_s: 0.0, to_s: 2.0 };

    /// Due at `due`, one token at each of `tokens`, ended with the last; all in milliseconds.
    fn answered(due: u64, tokens: &[u64]) -> Outcome {
        let token_times: Vec<Duration> = tokens.iter().map(|at| Duration::from_millis(*at)).collect();
        let answer = Answer { completion_tokens: tokens.len() as u32, prompt_tokens: 10, cached_tokens: 4, ..Default::default() };
        let ended = token_times[token_times.len() - 1];
        Outcome { kind: Kind::Text, due: Duration::from_millis(due), token_times, ended, result: Ok(answer) }
    }

    fn failed(due: u64, ended: u64, code: &str) -> Outcome {
        let result = Err(Failure { code: code.into(), message: "why".into() });
        let [due, ended] = [due, ended].map(Duration::from_millis);
        Outcome { kind: Kind::Text, due, token_times: vec![], ended, result }
    }

    #[test]
    fn refusals_are_not_errors_and_each_request_counts_once() {
        let outcomes = [answered(0, &[100, 150]), failed(10, 12, "ResourceExhausted"), failed(10, 900, "Internal")];
        let summary = Summary::of(&outcomes, WHOLE, Slo::default());
        assert_eq!((summary.sent, summary.answered, summary.refused, summary.num_errors()), (3, 1, 1, 1));
        assert_eq!(summary.errors, BTreeMap::from([("Internal".to_owned(), 1)]));
        assert_eq!(summary.refusal_ms.unwrap().p50, 2.0);
        assert_eq!((summary.requests_per_s, summary.output_tokens_per_s), (0.5, 1.0));
        assert_eq!((summary.prompt_tokens, summary.cached_prompt_tokens), (10, 4));
    }

    #[test]
    fn latency_counts_from_when_a_request_was_due() {
        let summary = Summary::of(&[answered(100, &[400, 410, 440])], WHOLE, Slo::default());
        assert_eq!(summary.ttft_ms.unwrap().p50, 300.0);
        assert_eq!(summary.total_ms.unwrap().p50, 340.0);
        assert_eq!((summary.inter_token_ms.unwrap().p50, summary.inter_token_ms.unwrap().p99), (10.0, 30.0));
        assert_eq!(summary.time_per_output_token_ms.unwrap().p50, 20.0);
    }

    #[test]
    fn added_time_is_what_the_other_roles_do_not_account_for() {
        let mut outcome = answered(100, &[400, 410]);
        outcome.result = outcome.result.map(|answer| Answer { before_first_token_ms: 298.5, ..answer });
        assert_eq!(Summary::of(&[outcome], WHOLE, Slo::default()).added_ttft_ms.unwrap().p50, 1.5);
    }

    #[test]
    fn goodput_counts_answers_within_the_objectives_and_the_window() {
        let outcomes = [answered(0, &[100, 200]), answered(0, &[900, 910]), answered(0, &[100, 1900]), answered(0, &[50, 60])];
        let goodput = |slo| Summary::of(&outcomes, WHOLE, slo).goodput_per_s;
        assert_eq!(goodput(Slo::default()), 2.0);
        assert_eq!(goodput(Slo { slo_ttft_ms: Some(500.0), slo_itl_ms: None }), 1.5);
        assert_eq!(goodput(Slo { slo_ttft_ms: Some(500.0), slo_itl_ms: Some(100.0) }), 1.0);
        let window = Window { from_s: 0.1, to_s: 1.1 };
        let summary = Summary::of(&outcomes, window, Slo::default());
        assert_eq!((summary.requests_per_s, summary.answered), (2.0, 4));
        assert_eq!(summary.output_tokens_per_s, 5.0);
    }

    #[test]
    fn nothing_sent_is_all_zero() {
        let summary = Summary::of(&[], Window { from_s: 0.0, to_s: 0.0 }, Slo::default());
        assert_eq!(summary, Summary::default());
    }
}

//! Whether a deployment keeps its goodput when it is asked for more than it can do.

use crate::{
    arrivals::{Until, poisson},
    bench::{Bench, RunReport},
    quantiles::Quantiles,
    runner::Load,
};
use anyhow::Result;
use serde::Serialize;
use std::time::Duration;

/// From one rate of the ramp to the next.
const RATE_STEP: f64 = 1.25;
/// The ramp ends when the goodput has not grown for this many steps.
const FLAT_STEPS: usize = 2;
/// By how much it must grow to count as growing.
const GROWTH: f64 = 1.03;
/// Longest ramp; 1.25^16 is 35 times the first rate.
const MAX_STEPS: usize = 16;
/// The first rate, over what the deployment answers one request at a time.
const FIRST_RATE: f64 = 0.75;
/// Overload, over the rate of the peak.
const OVERLOAD: f64 = 2.0;
/// Least goodput under overload, over the peak's.
const LEAST_RELATIVE_GOODPUT: f64 = 0.95;
/// Longest median of refusals under overload, in milliseconds.
const MOST_REFUSAL_MS: f64 = 50.0;

/// How a deployment bears overload.
#[derive(Clone, Debug, Serialize)]
pub struct OverloadReport {
    /// The rising rates.
    pub ramp: Vec<Step>,
    /// The rate with the highest goodput, in conversations per second.
    pub peak_rate: f64,
    /// That rate and twice that rate side by side, several times.
    pub rounds: Vec<Round>,
    /// Goodput at the rate of the peak: the median over rounds. The highest of the ramp is too high by its own noise.
    pub peak_goodput_per_s: f64,
    /// Goodput at twice that rate over goodput at that rate: the median over rounds.
    pub relative_goodput: f64,
    /// Median time to a refusal at twice that rate: the median over rounds; absent if nothing was refused.
    pub refusal_ms: Option<f64>,
}

/// A run at one rate.
#[derive(Clone, Debug, Serialize)]
pub struct Step {
    /// Conversations per second.
    pub rate: f64,
    /// The measurement.
    pub run: RunReport,
}

/// The rate of the peak and twice that rate, one right after the other.
#[derive(Clone, Debug, Serialize)]
pub struct Round {
    /// At the rate of the peak.
    pub peak: Step,
    /// At twice that rate.
    pub overload: Step,
}

/// How to find the peak and compare with it.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// How long conversations begin at each rate.
    pub duration: Duration,
    /// The first rate; none: found with `probes`.
    pub first_rate: Option<f64>,
    /// Conversations one at a time that find the first rate.
    pub probes: usize,
    /// How often the peak and twice its rate are compared.
    pub rounds: usize,
}

/// Raises the rate until the goodput stops growing, then compares the rate of the peak with twice that rate. `progress` is told
/// of each step.
///
/// # Errors
/// As [`Bench::measure`].
pub async fn overload(bench: &Bench, plan: Plan, mut progress: impl FnMut(&Step)) -> Result<OverloadReport> {
    let first_rate = match plan.first_rate {
        Some(rate) => rate,
        None => {
            let alone = bench.measure(plan.probes, 1, Load::Closed { concurrency: 1 }).await?;
            FIRST_RATE * alone.conversations as f64 / (alone.window.to_s - alone.window.from_s)
        }
    };
    let mut variants = 2..;
    let mut at_rate = async |rate: f64| -> Result<Step> {
        let arrivals = poisson(bench.workload.seed, rate, Until::Time(plan.duration));
        let run = bench.measure(arrivals.len(), variants.next().unwrap_or(0), Load::Open { rate, arrivals }).await?;
        let step = Step { rate, run };
        progress(&step);
        Ok(step)
    };
    let mut ramp: Vec<Step> = Vec::new();
    let mut rate = first_rate;
    while ramp.len() < MAX_STEPS && is_growing(&ramp.iter().map(Step::goodput).collect::<Vec<_>>()) {
        ramp.push(at_rate(rate).await?);
        rate *= RATE_STEP;
    }
    let peak_rate = ramp.iter().max_by(|a, b| a.goodput().total_cmp(&b.goodput())).map_or(first_rate, |step| step.rate);
    let mut rounds = Vec::new();
    for round in 0..plan.rounds {
        // Each goes first as often as the other: what drifts meanwhile cancels out.
        let [first, second] = if round % 2 == 0 { [1.0, OVERLOAD] } else { [OVERLOAD, 1.0] };
        let (first, second) = (at_rate(first * peak_rate).await?, at_rate(second * peak_rate).await?);
        let (peak, overload) = if round % 2 == 0 { (first, second) } else { (second, first) };
        rounds.push(Round { peak, overload });
    }
    let median = |values: Vec<f64>| Quantiles::of(values).map(|quantiles| quantiles.p50);
    let refusals = rounds.iter().filter_map(|round| round.overload.run.total.refusal_ms).map(|refusal| refusal.p50);
    Ok(OverloadReport {
        peak_rate,
        peak_goodput_per_s: median(rounds.iter().map(|round| round.peak.goodput()).collect()).unwrap_or(0.0),
        relative_goodput: median(rounds.iter().map(Round::relative_goodput).collect()).unwrap_or(0.0),
        refusal_ms: median(refusals.collect()),
        ramp,
        rounds,
    })
}

impl Round {
    /// Goodput under overload over goodput at the peak.
    pub fn relative_goodput(&self) -> f64 {
        self.overload.goodput() / self.peak.goodput()
    }
}

impl Step {
    /// Good answers per second.
    pub fn goodput(&self) -> f64 {
        self.run.total.goodput_per_s
    }
}

impl OverloadReport {
    /// Every run, as they ran but for the order within rounds.
    pub fn steps(&self) -> impl Iterator<Item = &Step> {
        self.ramp.iter().chain(self.rounds.iter().flat_map(|round| [&round.peak, &round.overload]))
    }

    /// What must not happen, each as a line.
    pub fn problems(&self) -> Vec<String> {
        let at_step = |step: &Step| step.run.problems().into_iter().map(|problem| format!("rate {:.2}: {problem}", step.rate)).collect();
        let mut problems: Vec<String> = self.steps().flat_map(|step| -> Vec<String> { at_step(step) }).collect();
        // A ratio to a peak of 0 is no number.
        if self.relative_goodput.is_nan() || self.relative_goodput < LEAST_RELATIVE_GOODPUT {
            problems.push(format!(
                "goodput at twice the rate of the peak is {:.1}% of the peak, expected at least {:.0}%",
                100.0 * self.relative_goodput,
                100.0 * LEAST_RELATIVE_GOODPUT
            ));
        }
        if let Some(refusal_ms) = self.refusal_ms.filter(|refusal_ms| *refusal_ms >= MOST_REFUSAL_MS) {
            problems.push(format!("the median refusal takes {refusal_ms:.1} ms, expected less than {MOST_REFUSAL_MS} ms"));
        }
        problems
    }
}

/// Whether the last steps still raised the highest goodput.
fn is_growing(goodputs: &[f64]) -> bool {
    let Some(earlier) = goodputs.len().checked_sub(FLAT_STEPS).filter(|earlier| *earlier > 0) else { return true };
    let highest = |goodputs: &[f64]| goodputs.iter().copied().fold(0.0, f64::max);
    highest(&goodputs[earlier..]) > GROWTH * highest(&goodputs[..earlier])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ramp_ends_when_two_steps_bring_nothing() {
        assert!(is_growing(&[]));
        assert!(is_growing(&[5.0, 5.0]));
        assert!(is_growing(&[5.0, 6.0, 6.0]));
        assert!(is_growing(&[5.0, 5.0, 6.0]));
        assert!(!is_growing(&[5.0, 6.0, 6.1, 5.9]));
    }
}

//! Whether a deployment keeps its goodput when it is asked for more than it can do.

use crate::{
    arrivals::{Until, poisson},
    bench::{Bench, RunReport},
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
    /// The highest goodput.
    pub peak_goodput_per_s: f64,
    /// Twice the rate of the peak.
    pub overload: Step,
    /// Goodput under overload over the peak's.
    pub relative_goodput: f64,
    /// Median time to a refusal under overload; absent if nothing was refused.
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

/// Raises the rate until the goodput stops growing, each for `duration`, then doubles the rate of the peak. The first rate is
/// `first_rate`, or found with `probes` conversations one at a time. `progress` is told of each step.
///
/// # Errors
/// As [`Bench::measure`].
pub async fn overload(
    bench: &Bench,
    duration: Duration,
    first_rate: Option<f64>,
    probes: usize,
    mut progress: impl FnMut(&Step),
) -> Result<OverloadReport> {
    let first_rate = match first_rate {
        Some(rate) => rate,
        None => {
            let alone = bench.measure(probes, 1, Load::Closed { concurrency: 1 }).await?;
            FIRST_RATE * alone.conversations as f64 / (alone.window.to_s - alone.window.from_s)
        }
    };
    let mut variants = 2..;
    let mut at_rate = async |rate: f64| -> Result<Step> {
        let arrivals = poisson(bench.workload.seed, rate, Until::Time(duration));
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
    let (peak_rate, peak_goodput_per_s) =
        ramp.iter().map(|step| (step.rate, step.goodput())).fold((first_rate, 0.0), |peak, step| if step.1 > peak.1 { step } else { peak });
    let overload = at_rate(OVERLOAD * peak_rate).await?;
    Ok(OverloadReport {
        relative_goodput: overload.goodput() / peak_goodput_per_s,
        refusal_ms: overload.run.total.refusal_ms.map(|refusal| refusal.p50),
        ramp,
        peak_rate,
        peak_goodput_per_s,
        overload,
    })
}

impl Step {
    /// Good answers per second.
    pub fn goodput(&self) -> f64 {
        self.run.total.goodput_per_s
    }
}

impl OverloadReport {
    /// What must not happen, each as a line.
    pub fn problems(&self) -> Vec<String> {
        let steps = self.ramp.iter().chain([&self.overload]);
        let mut problems: Vec<String> = steps
            .flat_map(|step| step.run.problems().into_iter().map(move |problem| format!("rate {:.2}: {problem}", step.rate)))
            .collect();
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

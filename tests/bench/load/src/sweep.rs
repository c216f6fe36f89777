//! The same requests at rising concurrency, beside the same requests one at a time.

use crate::{
    bench::{Bench, RunReport},
    runner::Load,
};
use anyhow::Result;
use serde::Serialize;

/// A sweep.
#[derive(Clone, Debug, Serialize)]
pub struct SweepReport {
    /// One per level, as they ran; the first has concurrency 1.
    pub levels: Vec<Level>,
}

/// One concurrency.
#[derive(Clone, Debug, Serialize)]
pub struct Level {
    /// Clients.
    pub concurrency: usize,
    /// Requests per second over those at concurrency 1.
    pub throughput_ratio: f64,
    /// Median time to first token over that at concurrency 1.
    pub ttft_ratio: Option<f64>,
    /// The measurement.
    pub run: RunReport,
}

/// Runs the same `count` conversations at concurrency 1 and at each of `levels`. `progress` is told of each level.
///
/// # Errors
/// As [`Bench::measure`].
pub async fn sweep(bench: &Bench, count: usize, levels: &[usize], mut progress: impl FnMut(&Level)) -> Result<SweepReport> {
    let mut report = SweepReport { levels: Vec::new() };
    let all = std::iter::once(1).chain(levels.iter().copied().filter(|level| *level != 1));
    for (variant, concurrency) in (1..).zip(all) {
        let run = bench.measure(count, variant, Load::Closed { concurrency }).await?;
        let alone = report.levels.first().map_or(&run, |level| &level.run);
        let median = |run: &RunReport| run.total.ttft_ms.map(|ttft| ttft.p50);
        let level = Level {
            concurrency,
            throughput_ratio: run.total.requests_per_s / alone.total.requests_per_s,
            ttft_ratio: median(&run).zip(median(alone)).map(|(now, alone)| now / alone),
            run,
        };
        progress(&level);
        report.levels.push(level);
    }
    Ok(report)
}

impl SweepReport {
    /// What must not happen, each as a line.
    pub fn problems(&self) -> Vec<String> {
        let problems = self
            .levels
            .iter()
            .flat_map(|level| level.run.problems().into_iter().map(move |problem| format!("concurrency {}: {problem}", level.concurrency)));
        problems.collect()
    }
}

//! One measurement: the same steps for every mode.

use crate::{
    client::Client,
    observer::{Observer, RoleReports, leaked_blocks},
    runner::{self, Load, Outcome},
    summary::{Slo, Summary, Window},
    workload::{Kind, WorkloadConfig, digest},
};
use anyhow::Result;
use serde::Serialize;
use std::{collections::BTreeMap, time::Duration};

/// Share of an open run that rates leave out: the server fills up first.
const WARMUP_SHARE: f64 = 0.2;

/// A deployment and what it is asked.
pub struct Bench {
    /// Sends the requests.
    pub client: Client,
    /// Watches the servers.
    pub observer: Observer,
    /// What is asked.
    pub workload: WorkloadConfig,
    /// What answers must keep to be good.
    pub slo: Slo,
    /// How long the processes rest before their memory is read for the last time.
    pub settle: Duration,
}

/// A measurement.
#[derive(Clone, Debug, Serialize)]
pub struct RunReport {
    /// When conversations began.
    pub load: Load,
    /// Conversations begun.
    pub conversations: usize,
    /// Equal for the same requests, byte for byte.
    pub workload_blake3: String,
    /// What rates are over.
    pub window: Window,
    /// All requests.
    pub total: Summary,
    /// Requests by kind.
    pub by_kind: BTreeMap<Kind, Summary>,
    /// Blocks of the KV cache that were not given back; absent without metrics of a decoder.
    pub leaked_kv_blocks: Option<f64>,
    /// The servers.
    pub roles: RoleReports,
}

impl Bench {
    /// Sends the first `count` conversations of the workload under `load`. Runs with different `variant`s share no cache.
    ///
    /// # Errors
    /// If a role shows no metrics. Requests that fail are part of the report.
    pub async fn measure(&self, count: usize, variant: u32, load: Load) -> Result<RunReport> {
        let conversations = self.workload.conversations(count, variant);
        let workload_blake3 = digest(&conversations);
        let watch = self.observer.watch().await?;
        let outcomes = runner::run(&self.client, conversations, &load).await;
        let roles = watch.finish(self.settle).await?;
        let window = window(&load, &outcomes);
        let mut by_kind: BTreeMap<Kind, Vec<&Outcome>> = BTreeMap::new();
        for outcome in &outcomes {
            by_kind.entry(outcome.kind).or_default().push(outcome);
        }
        Ok(RunReport {
            load,
            conversations: count,
            workload_blake3,
            window,
            total: Summary::of(&outcomes, window, self.slo),
            by_kind: by_kind.into_iter().map(|(kind, outcomes)| (kind, Summary::of(outcomes, window, self.slo))).collect(),
            leaked_kv_blocks: leaked_blocks(&roles),
            roles,
        })
    }
}

impl RunReport {
    /// What must not happen under any load, each as a line.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        for (code, count) in &self.total.errors {
            let message = self.total.error_messages.get(code).map_or("", String::as_str);
            problems.push(format!("{count} requests ended with {code}: {message}"));
        }
        if let Some(blocks) = self.leaked_kv_blocks.filter(|blocks| *blocks != 0.0) {
            problems.push(format!("{blocks} blocks of the KV cache were not given back"));
        }
        problems
    }
}

/// Closed: from the first request to the last answer. Open: while requests arrive, but for the beginning.
fn window(load: &Load, outcomes: &[Outcome]) -> Window {
    match load {
        Load::Open { arrivals, .. } => {
            let to_s = arrivals.last().map_or(0.0, Duration::as_secs_f64);
            Window { from_s: WARMUP_SHARE * to_s, to_s }
        }
        Load::Closed { .. } => {
            let to_s = outcomes.iter().map(|outcome| outcome.ended.as_secs_f64()).fold(0.0, f64::max);
            Window { from_s: 0.0, to_s }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn open_window_is_while_requests_arrive_without_the_beginning() {
        let arrivals = [1, 5, 10].map(Duration::from_secs).to_vec();
        let load = Load::Open { rate: 0.3, arrivals };
        assert_eq!(window(&load, &[]), Window { from_s: 2.0, to_s: 10.0 });
    }
}

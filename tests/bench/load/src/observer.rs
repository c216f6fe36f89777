//! What the servers say of themselves before, during and after a run: metrics of every role, memory of every process.

use crate::{
    deployment::{Deployment, Resources},
    metrics::{Samples, scrape},
};
use anyhow::Result;
use serde::Serialize;
use std::{collections::BTreeMap, sync::Arc, time::Duration};
use tokio::{sync::oneshot, time::Instant};

/// How often a run is looked at.
const INTERVAL: Duration = Duration::from_millis(250);
/// How long blocks and permits may take to be given back after the last answer.
const QUIET_TIMEOUT: Duration = Duration::from_secs(10);
/// Gauges that are 0 when nothing runs.
const LOAD_GAUGES: [&str; 4] = [
    "idefics_decoder_kv_blocks_used",
    "idefics_decoder_requests_running",
    "idefics_decoder_requests_waiting",
    "idefics_gateway_requests_running",
];
/// Name of this process in reports: what it takes is taken from the servers where they share a machine.
const DRIVER: &str = "driver";
/// Blocks of the KV cache that requests hold.
const BLOCKS_USED: &str = LOAD_GAUGES[0];

/// Whom to watch.
#[derive(Clone, Default)]
pub struct Observer {
    /// Name and metrics address of each role.
    pub metrics: Vec<(String, String)>,
    /// Processes that the driver started.
    pub deployment: Option<Arc<Deployment>>,
}

/// A value over a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Course {
    /// Before the first request.
    pub before: f64,
    /// The highest that was seen.
    pub peak: f64,
    /// After the last answer, when nothing ran any more.
    pub after: f64,
}

/// A role over a run.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct RoleReport {
    /// Resident memory of the process in bytes; absent if the driver did not start it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rss_bytes: Option<Course>,
    /// Processor time that the process took, in seconds; absent likewise.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_s: Option<f64>,
    /// Gauges by name with labels.
    pub gauges: BTreeMap<String, Course>,
    /// By how much counters, counts and sums of histograms went up.
    pub increases: BTreeMap<String, f64>,
}

/// All roles over a run, by name.
pub type RoleReports = BTreeMap<String, RoleReport>;

/// A look at all roles.
type Look = BTreeMap<String, RoleLook>;

/// A role at one time.
#[derive(Clone, Debug, Default)]
struct RoleLook {
    samples: Samples,
    resources: Option<Resources>,
}

/// A run that is being watched.
pub struct Watch {
    observer: Observer,
    before: Look,
    stop: oneshot::Sender<()>,
    looks: tokio::task::JoinHandle<Vec<Look>>,
}

impl Observer {
    /// Watches every role of a deployment, and keeps it.
    pub fn of(deployment: Arc<Deployment>) -> Self {
        let metrics = deployment.roles.iter().map(|role| (role.name.to_owned(), role.metrics_addr.clone())).collect();
        Self { metrics, deployment: Some(deployment) }
    }

    /// Looks once nothing runs, or after ten seconds if others keep the servers busy, and then every quarter of a second until
    /// [`Watch::finish`].
    ///
    /// # Errors
    /// If a role shows no metrics.
    pub async fn watch(&self) -> Result<Watch> {
        let before = self.look_when_quiet(&Look::new()).await?;
        let (stop, mut stopped) = oneshot::channel();
        let observer = self.clone();
        let looks = tokio::spawn(async move {
            let mut looks = Vec::new();
            while tokio::time::timeout(INTERVAL, &mut stopped).await.is_err() {
                // A look that fails is one less; the last one must not fail.
                looks.extend(observer.look().await.ok());
            }
            looks
        });
        Ok(Watch { observer: self.clone(), before, stop, looks })
    }

    /// Looks until nothing runs beyond what ran at `baseline`: a role shows that it has given back what an answer held shortly
    /// after the answer's end.
    async fn look_when_quiet(&self, baseline: &Look) -> Result<Look> {
        let asked_at = Instant::now();
        loop {
            let look = self.look().await?;
            if is_quiet(baseline, &look) || asked_at.elapsed() >= QUIET_TIMEOUT {
                return Ok(look);
            }
            tokio::time::sleep(INTERVAL).await;
        }
    }

    async fn look(&self) -> Result<Look> {
        let mut look = Look::new();
        for (name, address) in &self.metrics {
            look.entry(name.clone()).or_default().samples = scrape(address).await?;
        }
        for role in self.deployment.iter().flat_map(|deployment| &deployment.roles) {
            look.entry(role.name.to_owned()).or_default().resources = role.resources();
        }
        look.entry(DRIVER.to_owned()).or_default().resources = Resources::of_driver();
        Ok(look)
    }
}

impl Watch {
    /// Waits until nothing runs, then lets `settle` pass and looks for the last time.
    ///
    /// # Errors
    /// If a role shows no metrics.
    pub async fn finish(self, settle: Duration) -> Result<RoleReports> {
        // Fails only if the task has ended, which the next line says.
        self.stop.send(()).ok();
        let mut looks = self.looks.await?;
        self.observer.look_when_quiet(&self.before).await?;
        tokio::time::sleep(settle).await;
        let after = self.observer.look().await?;
        looks.extend([self.before.clone(), after.clone()]);
        Ok(report(&self.before, &looks, &after))
    }
}

/// Blocks of the KV cache that requests held after a run beyond those before it; absent without metrics of a decoder.
pub fn leaked_blocks(reports: &RoleReports) -> Option<f64> {
    let courses: Vec<&Course> = reports.values().filter_map(|report| report.gauges.get(BLOCKS_USED)).collect();
    if courses.is_empty() { None } else { Some(courses.iter().map(|course| course.after - course.before).sum()) }
}

/// By how much a counter went up, over all roles.
pub fn increase(reports: &RoleReports, name: &str) -> f64 {
    reports.values().filter_map(|report| report.increases.get(name)).sum()
}

fn is_quiet(before: &Look, now: &Look) -> bool {
    now.iter().all(|(role, now)| {
        LOAD_GAUGES.iter().all(|name| {
            let value = |look: &Look| look.get(role).and_then(|look| look.samples.gauges.get(*name)).copied().unwrap_or(0.0);
            now.samples.gauges.get(*name).is_none_or(|now| *now <= value(before))
        })
    })
}

fn report(before: &Look, looks: &[Look], after: &Look) -> RoleReports {
    let role_report = |role: &String, last: &RoleLook| {
        // What a role has not recorded yet is 0.
        let course = |value: &dyn Fn(&RoleLook) -> Option<f64>| {
            let at = |look: &Look| look.get(role).and_then(value).unwrap_or(0.0);
            Course { before: at(before), peak: looks.iter().map(at).fold(f64::MIN, f64::max), after: at(after) }
        };
        let gauges = last.samples.gauges.keys().map(|name| (name.clone(), course(&|look| look.samples.gauges.get(name).copied())));
        let increases = last.samples.counters.iter().map(|(name, value)| {
            let earlier = before.get(role).and_then(|look| look.samples.counters.get(name)).unwrap_or(&0.0);
            (name.clone(), value - earlier)
        });
        RoleReport {
            rss_bytes: last.resources.map(|_| course(&|look| look.resources.map(|taken| taken.rss_bytes as f64))),
            cpu_s: last.resources.map(|_| course(&|look| look.resources.map(|taken| taken.cpu_s))).map(|cpu| cpu.after - cpu.before),
            gauges: gauges.collect(),
            increases: increases.collect(),
        }
    };
    after.iter().map(|(role, look)| (role.clone(), role_report(role, look))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpListener,
    };

    fn look(blocks: f64, requests: f64, rss_bytes: u64) -> Look {
        let samples = Samples {
            gauges: BTreeMap::from([(BLOCKS_USED.to_owned(), blocks)]),
            counters: BTreeMap::from([("requests".to_owned(), requests)]),
        };
        Look::from([("decoder".to_owned(), RoleLook { samples, resources: Some(Resources { rss_bytes, cpu_s: requests / 2.0 }) })])
    }

    #[test]
    fn leaks_peaks_and_increases_are_seen() {
        let (before, during, after) = (look(0.0, 2.0, 100), look(9.0, 5.0, 400), look(1.0, 7.0, 300));
        let reports = report(&before, &[during, before.clone(), after.clone()], &after);
        assert_eq!(leaked_blocks(&reports), Some(1.0));
        assert_eq!(increase(&reports, "requests"), 5.0);
        let decoder = &reports["decoder"];
        assert_eq!(decoder.gauges[BLOCKS_USED], Course { before: 0.0, peak: 9.0, after: 1.0 });
        assert_eq!(decoder.rss_bytes, Some(Course { before: 100.0, peak: 400.0, after: 300.0 }));
        assert_eq!(decoder.cpu_s, Some(2.5));
        assert!(!is_quiet(&before, &after) && is_quiet(&before, &look(0.0, 9.0, 0)));
    }

    #[tokio::test]
    async fn what_an_earlier_answer_still_holds_is_not_the_baseline() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let role = tokio::spawn(async move {
            for blocks in [11, 11].into_iter().chain(std::iter::repeat(0)) {
                let (mut stream, _) = listener.accept().await.unwrap();
                assert!(stream.read(&mut [0; 256]).await.unwrap() > 0);
                let body = format!("# TYPE {BLOCKS_USED} gauge\n{BLOCKS_USED} {blocks}\n");
                stream.write_all(format!("HTTP/1.0 200 OK\r\n\r\n{body}").as_bytes()).await.unwrap();
            }
        });
        let observer = Observer { metrics: vec![("decoder".into(), address)], deployment: None };
        let reports = observer.watch().await.unwrap().finish(Duration::ZERO).await.unwrap();
        assert_eq!(leaked_blocks(&reports), Some(0.0));
        role.abort();
    }

    #[test]
    fn first_samples_of_a_role_count_from_zero() {
        let after = look(0.0, 3.0, 1);
        let reports = report(&Look::new(), std::slice::from_ref(&after), &after);
        assert_eq!(increase(&reports, "requests"), 3.0);
        assert_eq!(leaked_blocks(&RoleReports::new()), None);
    }
}

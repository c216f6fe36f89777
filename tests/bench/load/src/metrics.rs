//! Prometheus metrics of the roles, read without knowing their names.

use anyhow::{Context, Result, bail};
use serde::Serialize;
use std::{collections::BTreeMap, time::Duration};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

/// Longest wait for a role's metrics.
const SCRAPE_TIMEOUT: Duration = Duration::from_secs(5);

/// The samples of one role at one time, name with labels to value. Buckets of histograms are left out.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub(crate) struct Samples {
    /// What goes up and down.
    pub(crate) gauges: BTreeMap<String, f64>,
    /// What only goes up: counters, counts and sums.
    pub(crate) counters: BTreeMap<String, f64>,
}

/// Reads `http://ADDRESS/metrics`.
///
/// # Errors
/// If nobody answers in time, or the answer is not 200.
pub(crate) async fn scrape(address: &str) -> Result<Samples> {
    let read = async {
        let mut stream = TcpStream::connect(address).await?;
        // HTTP/1.0: the body ends with the connection.
        stream.write_all(format!("GET /metrics HTTP/1.0\r\nHost: {address}\r\n\r\n").as_bytes()).await?;
        let mut response = String::new();
        stream.read_to_string(&mut response).await?;
        std::io::Result::Ok(response)
    };
    let response = tokio::time::timeout(SCRAPE_TIMEOUT, read).await.with_context(|| format!("no metrics from {address} in time"))?;
    let response = response.with_context(|| format!("no metrics at {address}; start the roles with --metrics-addr"))?;
    let Some((head, body)) = response.split_once("\r\n\r\n") else { bail!("{address} does not speak HTTP") };
    match head.lines().next() {
        Some(status) if status.split(' ').nth(1) == Some("200") => Ok(parse(body)),
        status => bail!("{address}/metrics answered {}, expected 200", status.unwrap_or_default()),
    }
}

/// Reads Prometheus' text format.
fn parse(text: &str) -> Samples {
    let mut samples = Samples::default();
    let mut types: BTreeMap<&str, &str> = BTreeMap::new();
    for line in text.lines() {
        if let Some(declared) = line.strip_prefix("# TYPE ") {
            types.extend(declared.split_once(' '));
            continue;
        }
        let Some((series, value)) = line.rsplit_once(' ') else { continue };
        let Ok(value) = value.parse() else { continue };
        let name = series.split('{').next().unwrap_or(series);
        if types.get(name) == Some(&"gauge") {
            samples.gauges.insert(series.to_owned(), value);
        } else if !line.starts_with('#') && !name.ends_with("_bucket") {
            samples.counters.insert(series.to_owned(), value);
        }
    }
    samples
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gauges_and_counters_are_told_apart() {
        let text = "# HELP idefics_blocks Blocks\n# TYPE idefics_blocks gauge\nidefics_blocks 3\n\n\
            # TYPE idefics_requests_total counter\nidefics_requests_total{code=\"Ok\"} 4\n\n\
            # TYPE idefics_step_seconds histogram\nidefics_step_seconds_bucket{le=\"1\"} 2\nidefics_step_seconds_sum 0.5\n\
            idefics_step_seconds_count 2\n";
        let samples = parse(text);
        assert_eq!(samples.gauges, BTreeMap::from([("idefics_blocks".into(), 3.0)]));
        let counters =
            [("idefics_requests_total{code=\"Ok\"}", 4.0), ("idefics_step_seconds_count", 2.0), ("idefics_step_seconds_sum", 0.5)];
        assert_eq!(samples.counters, BTreeMap::from(counters.map(|(name, value)| (name.to_owned(), value))));
    }
}

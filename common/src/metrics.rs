//! Prometheus metrics of a process, at `/metrics` of an address of their own.

use crate::{listen, serve::Shutdown};
use axum::{Router, routing::get};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use std::{net::SocketAddr, time::Duration};
use tokio::net::TcpListener;

/// Upper bounds of the histograms of durations, in seconds: from a decode step on a card to a long prefill on a CPU.
const SECONDS_BUCKETS: [f64; 16] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0];
/// Upper bounds of the histograms of counts: tokens of a step, sequences of a batch, patches of a pass.
const COUNT_BUCKETS: [f64; 14] = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0];
/// Histograms forget what is older than their window at each upkeep.
const UPKEEP_INTERVAL: Duration = Duration::from_secs(5);

/// An exporter that is bound; what the process records from now on is shown.
pub struct MetricsServer {
    listener: TcpListener,
    handle: PrometheusHandle,
}

impl MetricsServer {
    /// Binds `HOST:PORT` and installs the process-wide recorder.
    ///
    /// # Errors
    /// If the address does not resolve or cannot be bound, or a recorder is installed already.
    pub async fn bind(address: &str) -> Result<Self, String> {
        let listener = listen::bind(address, "--metrics-addr").await.map_err(|e| e.to_string())?;
        let builder = PrometheusBuilder::new()
            .set_buckets_for_metric(Matcher::Suffix("_seconds".into()), &SECONDS_BUCKETS)
            .and_then(|builder| builder.set_buckets_for_metric(Matcher::Suffix("_size".into()), &COUNT_BUCKETS));
        let handle = builder.and_then(|builder| builder.install_recorder()).map_err(|e| e.to_string())?;
        Ok(Self { listener, handle })
    }

    /// Where it listens.
    ///
    /// # Errors
    /// If the system does not say.
    pub fn local_addr(&self) -> std::io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Answers until the process has drained.
    ///
    /// # Errors
    /// If the listener fails.
    pub async fn serve(self, shutdown: Shutdown) -> std::io::Result<()> {
        let Self { listener, handle } = self;
        let upkeep = handle.clone();
        let upkeep = async move {
            let mut interval = tokio::time::interval(UPKEEP_INTERVAL);
            loop {
                interval.tick().await;
                upkeep.run_upkeep();
            }
        };
        let router = Router::new().route("/metrics", get(async move || handle.render()));
        let served = axum::serve(listener, router).with_graceful_shutdown(async move { shutdown.cancel.cancelled().await });
        tokio::select! {
            result = served => result,
            () = upkeep => Ok(()),
        }
    }
}

//! A role's gRPC server: HTTP/2 settings for megabytes, health, reflection, and a shutdown that finishes what runs.

use crate::{
    channel::{CONNECTION_WINDOW_BYTES, MAX_FRAME_BYTES, STREAM_WINDOW_BYTES},
    config::Validate,
    infrastructure, listen, status,
};
use serde::{Deserialize, Serialize};
use std::{
    net::SocketAddr,
    sync::{Arc, OnceLock},
    time::Duration,
};
use tokio::{net::TcpListener, sync::Mutex};
use tokio_stream::{StreamExt, wrappers::TcpListenerStream};
use tokio_util::sync::CancellationToken;
use tonic::{
    body::Body,
    service::{Routes, RoutesBuilder},
    transport::{Error as TransportError, Server},
};
use tonic_health::{ServingStatus, server::HealthReporter};
use tower::ServiceExt;

/// How a role serves.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ServerConfig {
    /// `HOST:PORT` to listen on, resolved at start; port 0 takes a free one, which the `ready` log line names.
    pub grpc_addr: String,
    /// `HOST:PORT` of `/metrics` for Prometheus; none unless given.
    pub metrics_addr: Option<String>,
    /// After SIGTERM, streams may go on for this long before they are cancelled with `UNAVAILABLE`.
    pub drain_ms: u64,
    /// A connection is closed gracefully at this age, so that clients find new replicas. 0 means never.
    pub max_connection_age_ms: u64,
    /// Calls at the same time on one connection; a client's further ones wait on its own side.
    pub max_concurrent_streams: u32,
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            grpc_addr: "127.0.0.1:50051".into(),
            metrics_addr: None,
            drain_ms: 30_000,
            max_connection_age_ms: 0,
            max_concurrent_streams: 256,
        }
    }
}

impl Validate for ServerConfig {
    fn problems(&self, problems: &mut Vec<String>) {
        for (key, address) in [("grpc_addr", Some(&self.grpc_addr)), ("metrics_addr", self.metrics_addr.as_ref())] {
            if let Some(Err(problem)) = address.map(|address| listen::check(address)) {
                problems.push(format!("server.{key} {problem}"));
            }
        }
        if self.max_concurrent_streams == 0 {
            problems.push("server.max_concurrent_streams is 0, expected 1 or more".into());
        }
    }
}

/// What can be done to a server from outside while it runs.
#[derive(Clone)]
pub struct ServerHandle {
    reporter: HealthReporter,
    services: Vec<&'static str>,
    routes: Arc<OnceLock<Routes>>,
    reported: Arc<Mutex<Reported>>,
}

/// What health was told.
#[derive(Default)]
struct Reported {
    serving: Option<bool>,
    /// Nothing is told any more.
    has_ended: bool,
}

impl ServerHandle {
    /// Puts the services in place. Until then every call but those to health and reflection is answered `UNAVAILABLE`.
    pub fn install(&self, routes: RoutesBuilder) {
        if self.routes.set(routes.routes()).is_err() {
            tracing::warn!("services were installed twice; the first stay");
        }
    }

    /// Reports every service, and the process as a whole, as serving or not. Watchers hear of it if it is news; once the server
    /// shuts down, nothing is.
    pub async fn set_serving(&self, serving: bool) {
        let mut reported = self.reported.lock().await;
        if !reported.has_ended {
            self.report(serving, &mut reported).await;
        }
    }

    /// Reports that nothing is served, for good.
    async fn end_serving(&self) {
        let mut reported = self.reported.lock().await;
        reported.has_ended = true;
        self.report(false, &mut reported).await;
    }

    async fn report(&self, serving: bool, reported: &mut Reported) {
        if reported.serving == Some(serving) {
            return;
        }
        let status = if serving { ServingStatus::Serving } else { ServingStatus::NotServing };
        for service in self.services.iter().copied().chain([""]) {
            self.reporter.set_service_status(service, status).await;
        }
        reported.serving = Some(serving);
    }
}

/// The two ends of a shutdown: a role stops accepting at `stop_accepting`, and cancels what still runs at `cancel`.
#[derive(Clone, Debug, Default)]
pub struct Shutdown {
    /// SIGTERM came: no new work.
    pub stop_accepting: CancellationToken,
    /// The drain limit has passed: running streams end with `UNAVAILABLE`.
    pub cancel: CancellationToken,
}

impl Shutdown {
    /// Waits for SIGTERM or SIGINT, then lets `drain` pass before it cancels. A second signal cancels at once.
    ///
    /// # Errors
    /// If the signal handlers cannot be installed.
    pub fn on_signals(&self, drain: Duration) -> std::io::Result<()> {
        use tokio::signal::unix::{SignalKind, signal};
        let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        let this = self.clone();
        tokio::spawn(async move {
            tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
            tracing::info!(drain_ms = drain.as_millis() as u64, "draining");
            this.stop_accepting.cancel();
            tokio::select! { () = tokio::time::sleep(drain) => {}, _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
            this.cancel.cancel();
        });
        Ok(())
    }
}

/// A server that is bound but does not answer yet.
pub struct RoleServer {
    listener: TcpListener,
    config: ServerConfig,
    base: axum::Router,
    handle: ServerHandle,
    infrastructure_ended: CancellationToken,
}

impl RoleServer {
    /// Binds the address and prepares health (NOT_SERVING until told otherwise) and reflection. `services` are the full
    /// names, as in `idefics.vision.v1.VisionService`.
    ///
    /// # Errors
    /// If the address does not resolve or cannot be bound.
    pub async fn bind(config: ServerConfig, services: Vec<&'static str>) -> std::io::Result<Self> {
        let listener = listen::bind(&config.grpc_addr, "--grpc-addr").await?;
        let infrastructure_ended = CancellationToken::new();
        let (reporter, base) = infrastructure::routes(infrastructure_ended.clone());
        let handle = ServerHandle { reporter, services, routes: Arc::default(), reported: Arc::default() };
        handle.set_serving(false).await;
        Ok(Self { listener, config, base, handle, infrastructure_ended })
    }

    /// Where it listens.
    ///
    /// # Errors
    /// If the system does not say.
    pub fn local_addr(&self) -> std::io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// To install the services and report health.
    pub fn handle(&self) -> ServerHandle {
        self.handle.clone()
    }

    /// Serves until shutdown: at `stop_accepting` health turns NOT_SERVING, then the streams of health and reflection end, and
    /// no connection is taken any more; returns when the last stream of the role has ended, at the latest a second after
    /// `cancel`.
    ///
    /// # Errors
    /// If the listener fails.
    pub async fn serve(self, shutdown: Shutdown) -> Result<(), TransportError> {
        let Self { listener, config, base, handle, infrastructure_ended } = self;
        // `Server::tcp_nodelay` does not reach sockets that are handed over; with Nagle's algorithm a call takes 50 ms.
        let incoming = TcpListenerStream::new(listener).map(|socket| socket.inspect(|socket| drop(socket.set_nodelay(true))));
        let mut server = Server::builder()
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .max_frame_size(MAX_FRAME_BYTES)
            .max_concurrent_streams(config.max_concurrent_streams)
            .http2_keepalive_interval(Some(Duration::from_secs(20)))
            .http2_keepalive_timeout(Some(Duration::from_secs(10)));
        if config.max_connection_age_ms > 0 {
            server = server.max_connection_age(Duration::from_millis(config.max_connection_age_ms));
        }
        let installed = Arc::clone(&handle.routes);
        let late = tower::service_fn(move |request: http::Request<axum::body::Body>| {
            let routes = installed.get().cloned();
            async move {
                match routes {
                    Some(routes) => routes.oneshot(request.map(Body::new)).await,
                    None => Ok(status::unavailable("the model is still loading", Duration::from_secs(1)).into_http()),
                }
            }
        });
        let routes = Routes::from(base.fallback_service(late));
        let stop = shutdown.stop_accepting.clone();
        let serving = server.add_routes(routes).serve_with_incoming_shutdown(incoming, async move {
            stop.cancelled().await;
            handle.end_serving().await;
            infrastructure_ended.cancel();
        });
        tokio::select! {
            result = serving => result,
            () = async {
                shutdown.cancel.cancelled().await;
                // Streams see the cancellation themselves; this is for those that cannot send their last message.
                tokio::time::sleep(Duration::from_secs(1)).await;
            } => Ok(()),
        }
    }
}

//! Runs a role, or all of them, until SIGTERM.

use crate::{
    cli::ServeArgs,
    config::Config,
    device::Processor,
    progress::{self, DECODER_PREFIXES, VISION_PREFIXES},
    roles::{self, Alive, Model},
};
use anyhow::{Context, Result};
use idefics_common::{
    checkpoint::Checkpoint,
    config,
    metrics::MetricsServer,
    serve::{RoleServer, ServerHandle, Shutdown},
    telemetry,
};
use idefics_gateway::{Gateway, Peers};
use serde_json::json;
use std::{path::PathBuf, time::Duration};
use tokio::sync::watch;
use tonic::service::RoutesBuilder;

/// What a process serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    All,
    Gateway,
    Vision,
    Decoder,
}

impl Role {
    fn name(self) -> &'static str {
        match self {
            Self::All => "serve",
            Self::Gateway => "gateway",
            Self::Vision => "vision",
            Self::Decoder => "decoder",
        }
    }

    /// Services that the process answers for. All in one, the internal ones stay internal.
    fn services(self) -> Vec<&'static str> {
        match self {
            Self::All | Self::Gateway => vec![idefics_gateway::SERVICE_NAME],
            Self::Vision => vec![idefics_vision::SERVICE_NAME],
            Self::Decoder => vec![idefics_decoder::SERVICE_NAME],
        }
    }
}

/// Runs until a signal ends it.
pub(crate) async fn run(args: ServeArgs, role: Role) -> Result<()> {
    let config = load_config(&args)?;
    telemetry::init(config.log.format, &config.log.filter).map_err(anyhow::Error::msg)?;
    let shutdown = Shutdown::default();
    shutdown.on_signals(Duration::from_millis(config.server.drain_ms))?;
    if let Some(address) = &config.server.metrics_addr {
        let metrics = MetricsServer::bind(address).await.map_err(anyhow::Error::msg)?;
        tracing::info!(role = role.name(), metrics_addr = %metrics.local_addr()?, "metrics");
        tokio::spawn(metrics.serve(shutdown.clone()));
    }
    let server = RoleServer::bind(config.server.clone(), role.services()).await?;
    let (address, handle) = (server.local_addr()?, server.handle());
    tracing::info!(role = role.name(), grpc_addr = %address, version = env!("CARGO_PKG_VERSION"), "listening");
    let serving = tokio::spawn(server.serve(shutdown.clone()));

    let (routes, mut readiness) = tokio::select! {
        started = start(args.model, config, role, shutdown.clone()) => started?,
        () = shutdown.stop_accepting.cancelled() => return serving.await?.context("the server failed"),
    };
    handle.install(routes);
    tokio::select! {
        () = readiness.wait() => {
            handle.set_serving(true).await;
            tracing::info!(role = role.name(), grpc_addr = %address, "ready");
        }
        () = shutdown.stop_accepting.cancelled() => {}
    }
    let watching = tokio::spawn(follow(readiness, handle, shutdown));
    let served = serving.await?;
    watching.abort();
    served.context("the server failed")?;
    tracing::info!(role = role.name(), "stopped");
    Ok(())
}

fn load_config(args: &ServeArgs) -> Result<Config> {
    let mut flags = json!({});
    if let Some(address) = &args.grpc_addr {
        flags["server"]["grpc_addr"] = json!(address);
    }
    if let Some(address) = &args.metrics_addr {
        flags["server"]["metrics_addr"] = json!(address);
    }
    if let Some(device) = args.device {
        flags["backend"]["device"] = json!(device);
    }
    if let Some(format) = args.log_format {
        flags["log"]["format"] = json!(telemetry::LogFormat::from(format));
    }
    if let Some(filter) = &args.log_filter {
        flags["log"]["filter"] = json!(filter);
    }
    Ok(config::load(args.config.as_deref(), flags)?)
}

/// Loads what the role needs, on a blocking thread.
async fn start(model: Option<PathBuf>, config: Config, role: Role, shutdown: Shutdown) -> Result<(RoutesBuilder, Readiness)> {
    if role == Role::Gateway {
        // A gateway needs the checkpoint's small files only.
        let gateway = tokio::task::spawn_blocking(move || -> Result<Gateway> {
            let checkpoint = Checkpoint::open(crate::demo::source(model.as_deref()))?;
            let peers = Peers::from_config(&config.gateway).map_err(anyhow::Error::msg)?;
            Ok(Gateway::new(config.gateway, checkpoint, peers, shutdown)?)
        });
        return Ok(gateway_routes(gateway.await??, Vec::new()));
    }
    let started_at = std::time::Instant::now();
    let handle = tokio::runtime::Handle::current();
    let started = tokio::task::spawn_blocking(move || -> Result<(RoutesBuilder, Readiness)> {
        let _runtime = handle.enter();
        let model = Model::open(model.as_deref())?;
        tracing::info!(model = model.checkpoint.name(), fingerprint = &model.fingerprint[..16], "loading");
        let mut routes = RoutesBuilder::default();
        Ok(match role {
            Role::All | Role::Gateway => {
                let (gateway, alive) = roles::all_in_one(&model, &config, &shutdown)?;
                gateway_routes(gateway, alive)
            }
            Role::Vision => {
                let bar = progress::bar(&model.weights, &VISION_PREFIXES);
                let (vision, alive) = roles::vision(&model, &config, &mut Processor::open(&config)?, &bar, shutdown)?;
                bar.finish_and_clear();
                routes.add_service(vision.into_server());
                (routes, Readiness { all: vec![alive] })
            }
            Role::Decoder => {
                let bar = progress::bar(&model.weights, &DECODER_PREFIXES);
                let (decoder, alive) = roles::decoder(&model, &config, &mut Processor::open(&config)?, &bar, shutdown)?;
                bar.finish_and_clear();
                routes.add_service(decoder.into_server());
                (routes, Readiness { all: vec![alive] })
            }
        })
    });
    let started = started.await??;
    tracing::info!(elapsed_ms = started_at.elapsed().as_millis() as u64, "loaded");
    Ok(started)
}

fn gateway_routes(gateway: Gateway, alive: Vec<Alive>) -> (RoutesBuilder, Readiness) {
    let all = alive.into_iter().chain([gateway.watch_ready()]).collect();
    let mut routes = RoutesBuilder::default();
    routes.add_service(gateway.into_server());
    (routes, Readiness { all })
}

/// Whether everything that a process needs is there: engines that run, peers that answer.
struct Readiness {
    all: Vec<watch::Receiver<bool>>,
}

impl Readiness {
    fn now(&self) -> bool {
        self.all.iter().all(|ready| *ready.borrow())
    }

    /// Returns once everything is there.
    async fn wait(&mut self) {
        while !self.now() {
            self.changed().await;
        }
    }

    /// Returns when a part has changed. A part whose sender is gone stays what it was.
    async fn changed(&mut self) {
        let mut changes: Vec<_> = self
            .all
            .iter_mut()
            .map(|ready| {
                Box::pin(async {
                    if ready.changed().await.is_err() {
                        std::future::pending::<()>().await;
                    }
                })
            })
            .collect();
        std::future::poll_fn(|context| {
            let changed = changes.iter_mut().any(|change| change.as_mut().poll(context).is_ready());
            if changed { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
        })
        .await;
    }
}

/// Keeps health true to readiness until shutdown.
async fn follow(mut readiness: Readiness, handle: ServerHandle, shutdown: Shutdown) {
    loop {
        tokio::select! {
            biased;
            () = shutdown.stop_accepting.cancelled() => return,
            () = readiness.changed() => {
                let ready = readiness.now();
                tracing::info!(ready, "readiness changed");
                handle.set_serving(ready).await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use idefics_common::{
        channel::{ChannelConfig, remote},
        serve::ServerConfig,
    };
    use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};

    #[tokio::test]
    async fn health_follows_the_engine() {
        let config = ServerConfig { grpc_addr: "localhost:0".into(), ..ServerConfig::default() };
        let server = RoleServer::bind(config, vec![idefics_decoder::SERVICE_NAME]).await.unwrap();
        let (address, handle, shutdown) = (server.local_addr().unwrap(), server.handle(), Shutdown::default());
        handle.set_serving(true).await;
        tokio::spawn(server.serve(shutdown.clone()));
        let (alive, engine) = watch::channel(true);
        tokio::spawn(follow(Readiness { all: vec![engine] }, handle, shutdown));
        let mut client = HealthClient::new(remote(&format!("http://{address}"), &ChannelConfig::default()).unwrap());
        for service in ["", idefics_decoder::SERVICE_NAME] {
            alive.send_replace(true);
            let mut watcher = client.watch(HealthCheckRequest { service: service.into() }).await.unwrap().into_inner();
            let mut turns = async |expected| while watcher.message().await.unwrap().unwrap().status() != expected {};
            turns(ServingStatus::Serving).await;
            // As the guard in the engine's thread does, however the thread ends.
            alive.send_replace(false);
            turns(ServingStatus::NotServing).await;
        }
    }
}

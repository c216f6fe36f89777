//! The gateway that the command line talks to: one in this process, or a running one.

use crate::{
    cli::{ImageArgs, ModelArgs},
    config::Config,
    roles::{self, Model},
};
use anyhow::{Context, Result, bail};
use bytes::Bytes;
use idefics_common::{
    channel::{ChannelConfig, GrpcChannel, MAX_MESSAGE_BYTES, in_process, remote},
    config,
    serve::Shutdown,
    telemetry::{self, LogFormat},
};
use idefics_proto::gateway::v1::{Image, ImageOptions, gateway_service_client::GatewayServiceClient};
use serde_json::json;
use std::{
    path::Path,
    time::{Duration, Instant},
};
use tonic::{Code, Status};
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};

/// How long `--endpoint` waits for a gateway that starts or loads.
const PATIENCE: Duration = Duration::from_secs(10);
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// A client of a gateway.
pub(crate) struct Endpoint {
    pub(crate) client: GatewayServiceClient<GrpcChannel>,
    /// Time to load the model, if it was loaded here.
    pub(crate) load_ms: Option<f64>,
}

impl Endpoint {
    /// Connects to `--endpoint`, or starts every role in this process.
    pub(crate) async fn open(args: &ModelArgs) -> Result<Self> {
        // Errors, where `auto` computes, and what a card lacks.
        telemetry::init(LogFormat::Text, "error,idefics::device=info,idefics_kernels=warn").map_err(anyhow::Error::msg)?;
        let (channel, load_ms) = match &args.endpoint {
            Some(uri) => {
                let channel = remote(uri, &ChannelConfig::default()).map_err(anyhow::Error::msg).context("--endpoint")?;
                wait_until_serving(uri, channel.clone()).await?;
                (channel, None)
            }
            None => {
                let started_at = Instant::now();
                let channel = start(args).await?;
                (channel, Some(started_at.elapsed().as_secs_f64() * 1e3))
            }
        };
        let client =
            GatewayServiceClient::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES).max_encoding_message_size(MAX_MESSAGE_BYTES);
        Ok(Self { client, load_ms })
    }
}

/// Waits for a gateway that is just starting. One that answers but does not serve in time gets the call all the same, and says
/// why it cannot answer it.
async fn wait_until_serving(uri: &str, channel: GrpcChannel) -> Result<()> {
    let mut client = HealthClient::new(channel);
    let deadline = Instant::now() + PATIENCE;
    loop {
        let answer = client.check(HealthCheckRequest::default()).await;
        match answer {
            Ok(response) if response.get_ref().status() == ServingStatus::Serving => return Ok(()),
            Err(status) if status.code() == Code::Unavailable && Instant::now() > deadline => {
                let waited_s = PATIENCE.as_secs();
                bail!(
                    "no gateway answers at {uri} within {waited_s} s ({}); start one with `idefics serve` or correct --endpoint",
                    status.message()
                )
            }
            _ if Instant::now() > deadline => return Ok(()),
            _ => tokio::time::sleep(POLL_INTERVAL).await,
        }
    }
}

async fn start(args: &ModelArgs) -> Result<GrpcChannel> {
    let (folder, file) = (args.model.clone(), args.config.clone());
    let flags = args.device.map_or_else(|| json!({}), |device| json!({ "backend": { "device": device } }));
    let handle = tokio::runtime::Handle::current();
    let gateway = tokio::task::spawn_blocking(move || -> Result<_> {
        let _runtime = handle.enter();
        let config: Config = config::load(file.as_deref(), flags)?;
        let model = Model::open(folder.as_deref())?;
        Ok(roles::all_in_one(&model, &config, &Shutdown::default())?.0)
    })
    .await??;
    gateway.wait_ready().await;
    Ok(in_process(gateway.into_server()))
}

/// Options that the caller gave.
pub(crate) fn image_options(args: &ImageArgs) -> ImageOptions {
    ImageOptions { split: args.split(), longest_edge: args.longest_edge, shortest_edge: args.shortest_edge }
}

/// Reads a picture's file.
pub(crate) fn read_image(path: &Path) -> Result<Image> {
    let data = std::fs::read(path).with_context(|| format!("picture {} cannot be read", path.display()))?;
    Ok(Image { data: Bytes::from(data) })
}

/// A status as a person reads it.
pub(crate) fn describe(status: Status) -> anyhow::Error {
    anyhow::anyhow!("{} ({:?})", status.message(), status.code())
}

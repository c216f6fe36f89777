//! One channel type for a service in this process and one behind a network.

use serde::{Deserialize, Serialize};
use std::time::Duration;
use tonic::{
    Status,
    body::Body,
    codegen::StdError,
    transport::{Channel, Endpoint},
};
use tower::{Service, ServiceExt, util::BoxCloneSyncService};

/// What every generated client is built on.
///
/// Its error is a [`Status`] rather than a boxed error: the futures of clients over boxed errors are not provably `Send`.
pub type GrpcChannel = BoxCloneSyncService<http::Request<Body>, http::Response<Body>, Status>;

/// Largest message that any client or server of ours takes. tonic's default of 4 MiB is below two split pictures' tokens.
pub const MAX_MESSAGE_BYTES: usize = 256 << 20;

/// HTTP/2 windows and frames for messages of megabytes; hyper's adaptive window is slower than fixed large ones.
pub(crate) const STREAM_WINDOW_BYTES: u32 = 8 << 20;
pub(crate) const CONNECTION_WINDOW_BYTES: u32 = 16 << 20;
pub(crate) const MAX_FRAME_BYTES: u32 = 1 << 20;

/// How a role connects to its peers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ChannelConfig {
    /// Longest time to establish a connection.
    pub connect_timeout_ms: u64,
    /// A ping is sent on a connection this often, so that a dead peer is noticed.
    pub keepalive_interval_ms: u64,
    /// A connection whose ping is unanswered for this long is closed.
    pub keepalive_timeout_ms: u64,
}

impl Default for ChannelConfig {
    fn default() -> Self {
        Self { connect_timeout_ms: 2_000, keepalive_interval_ms: 10_000, keepalive_timeout_ms: 5_000 }
    }
}

/// A channel to a server in this process: the generated server is called directly.
pub fn in_process<S>(server: S) -> GrpcChannel
where
    S: Service<http::Request<Body>, Response = http::Response<Body>> + Clone + Send + Sync + 'static,
    S::Error: Into<StdError>,
    S::Future: Send + 'static,
{
    BoxCloneSyncService::new(server.map_err(|e| Status::from_error(e.into())))
}

/// A channel to `uri` (`http://host:port`) that connects at its first call and again whenever the connection is lost.
///
/// # Errors
/// If `uri` is not one.
pub fn remote(uri: &str, config: &ChannelConfig) -> Result<GrpcChannel, String> {
    let endpoint =
        Endpoint::from_shared(uri.to_owned()).map_err(|e| format!("{uri:?} is not a URI such as http://127.0.0.1:50052: {e}"))?;
    if !matches!(endpoint.uri().scheme_str(), Some("http")) || endpoint.uri().authority().is_none() {
        return Err(format!("{uri:?} is not a URI such as http://127.0.0.1:50052"));
    }
    let channel: Channel = endpoint
        .connect_timeout(Duration::from_millis(config.connect_timeout_ms))
        .http2_keep_alive_interval(Duration::from_millis(config.keepalive_interval_ms))
        .keep_alive_timeout(Duration::from_millis(config.keepalive_timeout_ms))
        .keep_alive_while_idle(true)
        .tcp_nodelay(true)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_frame_size(MAX_FRAME_BYTES)
        .connect_lazy();
    Ok(BoxCloneSyncService::new(channel.map_err(|e| Status::from_error(Box::new(e)))))
}

//! The configuration of the binary: a section per part.

use crate::device::Device;
use idefics_common::{config::Validate, serve::ServerConfig, telemetry::LogFormat};
use idefics_gateway::GatewayConfig;
use idefics_kernels::cuda::{AttentionKernels, CudaOptions};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Every section; a role reads its own.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Config {
    /// How a role serves.
    pub(crate) server: ServerConfig,
    /// What is logged.
    pub(crate) log: LogConfig,
    /// Which processor computes.
    pub(crate) backend: BackendConfig,
    /// The CPU backend.
    pub(crate) cpu: CpuConfig,
    /// The gateway role.
    pub(crate) gateway: GatewayConfig,
    /// The vision role.
    pub(crate) vision: idefics_vision::Config,
    /// The decoder role.
    pub(crate) decoder: idefics_decoder::Config,
}

/// Section `log`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct LogConfig {
    /// `text` or `json`.
    pub(crate) format: LogFormat,
    /// Directives as in `info,h2=warn`.
    pub(crate) filter: String,
}

impl Default for LogConfig {
    fn default() -> Self {
        Self { format: LogFormat::Text, filter: "info".into() }
    }
}

/// Section `backend`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct BackendConfig {
    /// `auto`, `cpu` or `cuda:N`.
    pub(crate) device: Device,
    /// Folder for compiled CUDA kernels; absent means below the user's cache folder.
    pub(crate) kernel_cache: Option<PathBuf>,
    /// CUDA kernels for attention over many queries: `auto`, `mma` or `wgmma`.
    pub(crate) attention: AttentionKernels,
    /// Whether a CUDA kernel may start while those ahead of it still run (programmatic dependent launch).
    pub(crate) early_launch: bool,
}

impl Default for BackendConfig {
    fn default() -> Self {
        let CudaOptions { cache_folder, attention, early_launch, .. } = CudaOptions::default();
        Self { device: Device::default(), kernel_cache: cache_folder, attention, early_launch }
    }
}

impl BackendConfig {
    /// How the card `ordinal` is opened.
    pub(crate) fn cuda(&self, ordinal: usize) -> CudaOptions {
        CudaOptions { ordinal, cache_folder: self.kernel_cache.clone(), attention: self.attention, early_launch: self.early_launch }
    }
}

/// Section `cpu`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct CpuConfig {
    /// Threads that compute; 0 means one per processor.
    pub(crate) threads: usize,
}

impl Validate for Config {
    fn problems(&self, problems: &mut Vec<String>) {
        self.server.problems(problems);
        self.gateway.problems(problems);
        self.vision.problems(problems);
        self.decoder.problems(problems);
    }
}

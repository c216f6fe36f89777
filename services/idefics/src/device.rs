//! Which processor computes: chosen by `--device`, opened once per engine.

use crate::config::Config;
use anyhow::{Context, Result};
use idefics_kernels::{
    Error,
    cpu::{Cpu, CpuOptions},
    cuda::{Cuda, CudaOptions},
};
use serde::{Deserialize, Serialize};
use std::{fmt, panic::catch_unwind, str::FromStr};

/// A choice of processor, as written: `auto`, `cpu`, `cuda` or `cuda:1`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) enum Device {
    /// The first card if it can be used, the CPU if not.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// A card, as the driver counts them.
    Cuda(usize),
}

impl FromStr for Device {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(0)),
            _ => {
                let ordinal = text.strip_prefix("cuda:").and_then(|n| n.parse().ok());
                ordinal.map(Self::Cuda).ok_or_else(|| format!("device is {text:?}, expected auto, cpu, cuda or cuda:N"))
            }
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
        }
    }
}

impl TryFrom<String> for Device {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Device> for String {
    fn from(device: Device) -> Self {
        device.to_string()
    }
}

/// An open processor, from which every engine of the process gets its backend.
pub(crate) enum Processor {
    /// Engines share the threads.
    Cpu(Cpu),
    /// Each engine has a stream and memory of its own on the card.
    Cuda {
        /// Opened to see whether it works; the first engine takes it.
        opened: Option<Box<Cuda>>,
        options: CudaOptions,
    },
}

impl Processor {
    /// Opens what the configuration names. Blocks: a card's kernels are compiled if they are not in the cache.
    ///
    /// # Errors
    /// If it cannot be used. `auto` takes the CPU instead and says why.
    pub(crate) fn open(config: &Config) -> Result<Self> {
        let cuda = |ordinal| {
            let options = config.backend.cuda(ordinal);
            // Where a library lacks a function that opening a card needs, the bindings panic.
            let opened = catch_unwind(|| Cuda::open(&options)).unwrap_or_else(|_| {
                Err(Error::Device(
                    "the driver, NVRTC or cuBLASLt lacks a function of CUDA 13; update it, or take the other off LD_LIBRARY_PATH".into(),
                ))
            });
            opened.map(|cuda| Self::Cuda { opened: Some(Box::new(cuda)), options })
        };
        match config.backend.device {
            Device::Cpu => Self::cpu(config),
            Device::Cuda(ordinal) => cuda(ordinal).with_context(|| format!("cuda:{ordinal} cannot be used; --device cpu needs no card")),
            Device::Auto => match cuda(0) {
                Ok(card) => Ok(card),
                Err(error) => {
                    // A machine without a driver is as it should be; a card that cannot be used is not.
                    if Cuda::has_driver() {
                        tracing::warn!("computing on the CPU, not on the card: {error}");
                    } else {
                        tracing::info!("computing on the CPU: {error}");
                    }
                    Self::cpu(config)
                }
            },
        }
    }

    fn cpu(config: &Config) -> Result<Self> {
        let threads = (config.cpu.threads > 0).then_some(config.cpu.threads);
        Ok(Self::Cpu(Cpu::new(CpuOptions { threads, ..CpuOptions::default() })?))
    }

    /// Hands the backend of one engine to `start`.
    pub(crate) fn start<E: StartEngine>(&mut self, start: E) -> Result<E::Engine> {
        match self {
            Self::Cpu(cpu) => Ok(start.start(cpu.clone())?),
            Self::Cuda { opened, options } => {
                let cuda = match opened.take() {
                    Some(cuda) => *cuda,
                    None => Cuda::open(options)?,
                };
                Ok(start.start(cuda)?)
            }
        }
    }
}

/// What starts an engine, on whichever backend.
pub(crate) trait StartEngine {
    /// A handle on the engine.
    type Engine;

    /// Starts it; blocks until its model is loaded.
    fn start<B: idefics_kernels::Backend>(self, backend: B) -> idefics_kernels::Result<Self::Engine>;
}

impl StartEngine for idefics_decoder::EngineOptions {
    type Engine = idefics_decoder::Engine;

    fn start<B: idefics_kernels::Backend>(self, backend: B) -> idefics_kernels::Result<Self::Engine> {
        idefics_decoder::Engine::start(backend, self)
    }
}

impl StartEngine for idefics_vision::EngineOptions {
    type Engine = idefics_vision::Engine;

    fn start<B: idefics_kernels::Backend>(self, backend: B) -> idefics_kernels::Result<Self::Engine> {
        idefics_vision::Engine::start(backend, self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::BackendConfig;
    use idefics_kernels::cuda::AttentionKernels;
    use serde_json::json;

    #[test]
    fn devices_are_read_as_they_are_written() {
        for (text, device) in [("auto", Device::Auto), ("cpu", Device::Cpu), ("cuda:0", Device::Cuda(0)), ("cuda:13", Device::Cuda(13))] {
            assert_eq!((text.parse(), device.to_string().as_str()), (Ok(device), text));
        }
        assert_eq!("cuda".parse(), Ok(Device::Cuda(0)));
        for bad in ["", "gpu", "cuda:", "cuda:-1", "cuda:x", "CPU"] {
            assert!(bad.parse::<Device>().unwrap_err().contains("expected auto, cpu, cuda or cuda:N"), "{bad}");
        }
    }

    #[test]
    fn attention_kernels_are_read_as_they_are_written() {
        let read = |text| serde_json::from_value::<BackendConfig>(json!({ "attention": text })).map(|config| config.attention);
        for (text, kernels) in [("auto", AttentionKernels::Auto), ("mma", AttentionKernels::Mma), ("wgmma", AttentionKernels::Wgmma)] {
            assert_eq!((read(text).unwrap(), text.parse()), (kernels, Ok(kernels)));
        }
        for bad in ["", "flash", "WGMMA"] {
            assert!(read(bad).unwrap_err().to_string().contains("expected one of `auto`, `mma`, `wgmma`"), "{bad}");
            assert!(bad.parse::<AttentionKernels>().unwrap_err().contains("expected auto, mma or wgmma"), "{bad}");
        }
    }

    #[test]
    fn early_launch_is_on_unless_the_configuration_says_no() {
        let read = |section| serde_json::from_value::<BackendConfig>(section).map(|config| config.cuda(1).early_launch);
        for (section, early) in [(json!({}), true), (json!({ "early_launch": true }), true), (json!({ "early_launch": false }), false)] {
            assert_eq!(read(section).unwrap(), early);
        }
        assert!(read(json!({ "early_launch": "sometimes" })).unwrap_err().to_string().contains("expected a boolean"));
    }
}

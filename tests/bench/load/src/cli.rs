//! The command line.

use crate::{
    deployment::{Deployment, DeploymentConfig},
    observer::Observer,
    summary::Slo,
    workload::WorkloadConfig,
};
use anyhow::{Result, bail};
use clap::{Args, Parser, Subcommand};
use serde::Serialize;
use std::{path::PathBuf, sync::Arc};

/// Puts load on an idefics deployment and reports how it bears it.
#[derive(Debug, Parser)]
#[command(name = "idefics-load", version, about, max_term_width = 120)]
pub struct Cli {
    /// What to measure.
    #[command(subcommand)]
    pub mode: Mode,
}

/// What to measure.
#[derive(Debug, Subcommand)]
pub enum Mode {
    /// Measure once, at a rate (open loop) or with a number of clients (closed loop)
    Run {
        /// Target, workload, measurement.
        #[command(flatten)]
        common: CommonArgs,
        /// The load.
        #[command(flatten)]
        load: LoadArgs,
    },
    /// Send the same requests at each concurrency (closed loop) and compare with one at a time
    Sweep {
        /// Target, workload, measurement.
        #[command(flatten)]
        common: CommonArgs,
        /// Clients, level by level; 1 is added in front
        #[arg(long, value_delimiter = ',', default_values_t = [1, 2, 4, 8, 16, 32, 64], value_name = "C,C,...")]
        concurrency: Vec<usize>,
        /// Conversations at each level
        #[arg(long, default_value_t = 256, value_name = "N")]
        requests: usize,
    },
    /// Raise the rate (open loop) to the peak of goodput, then double it
    Overload {
        /// Target, workload, measurement.
        #[command(flatten)]
        common: CommonArgs,
        /// Seconds at each rate
        #[arg(long, default_value_t = 20.0, value_name = "S")]
        duration: f64,
        /// The first rate of the ramp, in conversations per second [default: 3/4 of what one client at a time gets]
        #[arg(long, value_name = "R")]
        rate: Option<f64>,
        /// Conversations that find the first rate
        #[arg(long, default_value_t = 32, value_name = "N")]
        requests: usize,
        /// How often the peak and twice its rate are compared, side by side
        #[arg(long, default_value_t = 3, value_name = "N")]
        rounds: usize,
    },
}

/// When conversations begin.
#[derive(Args, Clone, Debug)]
pub struct LoadArgs {
    /// Conversations per second, as a Poisson process, whatever the server does (open loop)
    #[arg(long, value_name = "R", required_unless_present = "concurrency")]
    pub rate: Option<f64>,
    /// Clients, each beginning its next conversation when its last one has ended (closed loop)
    #[arg(long, value_name = "C", conflicts_with_all = ["rate", "duration"])]
    pub concurrency: Option<usize>,
    /// Conversations
    #[arg(long, value_name = "N", default_value_t = 256, conflicts_with = "duration")]
    pub requests: usize,
    /// Seconds during which conversations begin
    #[arg(long, value_name = "S")]
    pub duration: Option<f64>,
}

/// What every mode needs.
#[derive(Args, Clone, Debug)]
pub struct CommonArgs {
    /// Who is measured.
    #[command(flatten)]
    pub target: TargetArgs,
    /// What is asked.
    #[command(flatten, next_help_heading = "Workload")]
    pub workload: WorkloadConfig,
    /// What answers must keep.
    #[command(flatten, next_help_heading = "Objectives")]
    pub slo: Slo,
    /// A request that takes longer is an error, in seconds
    #[arg(long, default_value_t = 600.0, value_name = "S", help_heading = "Measurement")]
    pub timeout: f64,
    /// Conversations before the measurement
    #[arg(long, default_value_t = 8, value_name = "N", help_heading = "Measurement")]
    pub warmup: usize,
    /// How long the processes rest before their memory is read, in seconds
    #[arg(long, default_value_t = 1.0, value_name = "S", help_heading = "Measurement")]
    pub settle: f64,
    /// Folder for reports (JSON), plots (SVG), and the logs of roles that were started
    #[arg(long, value_name = "DIR", help_heading = "Measurement")]
    pub out: Option<PathBuf>,
    /// End with an error if requests fail, blocks leak, overload costs more than 5% of goodput, or the median refusal takes
    /// 50 ms
    #[arg(long, help_heading = "Measurement")]
    pub check: bool,
}

/// Who is measured.
#[derive(Args, Clone, Debug, Serialize)]
pub struct TargetArgs {
    /// A running gateway, as http://127.0.0.1:50051
    #[arg(long, value_name = "URL", required_unless_present = "bin")]
    pub endpoint: Option<String>,
    /// Address of a role's metrics, with --endpoint; may be repeated
    #[arg(long, value_name = "HOST:PORT", requires = "endpoint")]
    pub metrics_addr: Vec<String>,
    /// The idefics binary: starts gateway, vision and decoder for the measurement
    #[arg(long, value_name = "FILE", conflicts_with = "endpoint")]
    pub bin: Option<PathBuf>,
    /// Their checkpoint, or `embedded`, with --bin
    #[arg(long, value_name = "DIR", requires = "bin", default_value = "embedded")]
    pub model: PathBuf,
    /// A setting of theirs, as decoder.prompt_lookup_tokens=4, with --bin; may be repeated
    #[arg(long = "set", value_name = "KEY=VALUE", requires = "bin", value_parser = parse_setting)]
    pub settings: Vec<(String, String)>,
}

impl TargetArgs {
    /// The gateway's endpoint and who is watched; starts the roles if it is to, with their logs in `log_folder`. Blocks.
    ///
    /// # Errors
    /// If the roles do not start.
    pub fn resolve(&self, log_folder: Option<PathBuf>) -> Result<(String, Observer)> {
        match (&self.endpoint, &self.bin) {
            (Some(endpoint), None) => {
                let metrics = self.metrics_addr.iter().map(|address| (address.clone(), address.clone())).collect();
                Ok((endpoint.clone(), Observer { metrics, deployment: None }))
            }
            (None, Some(bin)) => {
                let model = (self.model.as_os_str() != "embedded").then(|| self.model.clone());
                let config = DeploymentConfig { bin: bin.clone(), model, settings: self.settings.clone(), log_folder };
                let deployment = Deployment::start(&config)?;
                Ok((deployment.endpoint.clone(), Observer::of(Arc::new(deployment))))
            }
            _ => bail!("expected either --endpoint or --bin"),
        }
    }
}

impl CommonArgs {
    /// What is wrong with it.
    ///
    /// # Errors
    /// Names the option, what was expected and what was found.
    pub fn check(&self) -> Result<(), String> {
        self.workload.check()?;
        expect_positive("--timeout", self.timeout)?;
        if !(0.0..=86_400.0).contains(&self.settle) {
            return Err(format!("--settle is {}, expected seconds from 0 to 86400", self.settle));
        }
        Ok(())
    }
}

/// Refuses what is no duration or rate.
///
/// # Errors
/// Names the option, what was expected and what was found.
pub fn expect_positive(option: &str, value: f64) -> Result<(), String> {
    if value > 0.0 && value <= 1e6 { Ok(()) } else { Err(format!("{option} is {value}, expected a number above 0, up to 1000000")) }
}

fn parse_setting(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if key.contains('.') => Ok((key.to_owned(), value.to_owned())),
        _ => Err(format!("expected KEY=VALUE such as decoder.max_num_seqs=32, found {text:?}")),
    }
}

/// The workload that the command line has by default.
#[cfg(test)]
pub(crate) fn defaults() -> WorkloadConfig {
    let cli = Cli::parse_from(["idefics-load", "run", "--endpoint", "http://localhost:1", "--rate", "1"]);
    match cli.mode {
        Mode::Run { common, .. } => common.workload,
        _ => unreachable!("`run` was asked for"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn command_line_is_consistent() {
        Cli::command().debug_assert();
        let parse = |line: &str| Cli::try_parse_from(line.split(' '));
        assert!(parse("idefics-load sweep --bin target/release/idefics --concurrency 1,2 --set decoder.max_num_seqs=4").is_ok());
        assert!(parse("idefics-load run --endpoint http://localhost:1 --rate 2 --duration 5").is_ok());
        for bad in [
            "idefics-load sweep",
            "idefics-load run --endpoint http://localhost:1",
            "idefics-load run --endpoint http://localhost:1 --rate 2 --concurrency 2",
            "idefics-load run --endpoint http://localhost:1 --bin idefics --rate 2",
            "idefics-load run --bin idefics --rate 2 --set max_num_seqs",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn values_that_make_no_sense_are_refused() {
        for bad in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            assert!(expect_positive("--rate", bad).is_err(), "{bad}");
        }
        assert!(expect_positive("--rate", 0.5).is_ok());
    }
}

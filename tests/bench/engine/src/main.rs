//! Measures the vision and decoder engines alone: load, vision encode, prefill and decode, without gRPC, preprocessing or a
//! gateway. One line of JSON on standard output for each measurement, as soon as it is there.
#![forbid(unsafe_code)]

mod cases;
mod decoder;
mod vision;

use anyhow::{Context, Result};
use cases::{DecodeCase, Device, PictureCase};
use clap::{ArgAction, Parser};
use idefics_common::checkpoint::{Checkpoint, Source};
use idefics_kernels::{
    Backend,
    cpu::{Cpu, CpuOptions},
    cuda::{AttentionKernels, Cuda, CudaOptions},
    weights::Weights,
};
use serde_json::{Value, json};
use std::{path::PathBuf, process::ExitCode};
use tokio::{runtime::Builder, sync::watch};

/// Measures the engines of idefics-serve alone.
#[derive(Debug, Parser)]
#[command(name = "idefics-engine-bench", version, about, max_term_width = 120)]
struct Cli {
    /// Checkpoint folder in the Hugging Face layout of HuggingFaceM4/idefics2-8b
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// What computes: cpu or cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    device: Device,
    /// Folder for compiled CUDA kernels [default: below the user's cache folder]
    #[arg(long, value_name = "DIR")]
    kernel_cache: Option<PathBuf>,
    /// CUDA kernels for attention over many queries: auto, mma or wgmma
    #[arg(long, value_name = "KERNELS", default_value = "auto")]
    attention: AttentionKernels,
    /// Whether a CUDA kernel may start while those ahead of it still run: true or false
    #[arg(long, value_name = "BOOL", default_value_t = true, action = ArgAction::Set)]
    early_launch: bool,
    /// Threads of the CPU backend [default: one per processor]
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Pictures to encode, as 980x980, or 980x980:split for four crops and the whole
    #[arg(long, value_delimiter = ',', value_name = "WxH,...")]
    pictures: Vec<PictureCase>,
    #[command(flatten)]
    decoder: DecoderArgs,
    /// Measurements of each picture and prompt length, after one that does not count; the median is reported
    #[arg(long, default_value_t = 5, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    repeats: u32,
}

/// What the decoder does, and its settings.
#[derive(Debug, clap::Args)]
struct DecoderArgs {
    /// Lengths of prompts to prefill, in tokens
    #[arg(long, value_delimiter = ',', value_name = "N,...")]
    prefill: Vec<usize>,
    /// Sequences that decode together, and tokens that each has before, as 64x512
    #[arg(long, value_delimiter = ',', value_name = "BxN,...")]
    decode: Vec<DecodeCase>,
    /// Decode steps that count in each case
    #[arg(long, default_value_t = 32, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    steps: u32,
    /// Bytes of the KV cache [default: what the largest case needs]
    #[arg(long, value_name = "BYTES")]
    kv_cache_bytes: Option<usize>,
    /// Longest sequence, in tokens [default: the checkpoint's, or what the KV cache holds]
    #[arg(long, default_value_t = 0, value_name = "N")]
    max_model_tokens: usize,
    /// Sequences that run at once
    #[arg(long, default_value_t = 64, value_name = "N")]
    max_num_seqs: usize,
    /// Tokens in one forward pass
    #[arg(long, default_value_t = 2048, value_name = "N")]
    max_num_batched_tokens: usize,
}

/// A checkpoint whose weights are mapped.
struct Model {
    checkpoint: Checkpoint,
    weights: Weights,
}

/// Prints measurements and remembers whether one failed.
#[derive(Default)]
struct Report {
    failed: bool,
}

impl Report {
    /// Prints what `measured` holds, or its error, under the fields of `case`.
    fn line(&mut self, case: Value, measured: Result<Value>) {
        let more = measured.unwrap_or_else(|error| {
            self.failed = true;
            json!({ "error": format!("{error:#}") })
        });
        let mut line = case;
        if let (Value::Object(line), Value::Object(more)) = (&mut line, more) {
            line.extend(more);
        }
        println!("{line}");
    }
}

fn main() -> ExitCode {
    match run(&Cli::parse()) {
        Ok(Report { failed: false }) => ExitCode::SUCCESS,
        Ok(Report { failed: true }) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> Result<Report> {
    let checkpoint = Checkpoint::open(Source::Folder(cli.model.clone()))?;
    let model = Model { checkpoint, weights: Weights::open(&cli.model)? };
    match cli.device {
        Device::Cpu => {
            let cpu = Cpu::new(CpuOptions { threads: cli.threads, ..CpuOptions::default() })?;
            measure(cli, &model, || Ok(cpu.clone()))
        }
        Device::Cuda(ordinal) => {
            let Cli { attention, early_launch, .. } = *cli;
            let options = CudaOptions { ordinal, cache_folder: cli.kernel_cache.clone(), attention, early_launch };
            measure(cli, &model, || Cuda::open(&options).with_context(|| format!("cuda:{ordinal} cannot be used")))
        }
    }
}

/// One engine after the other, so that each has the device to itself. A failure of one is no reason not to measure the other.
fn measure<B: Backend>(cli: &Cli, model: &Model, open: impl Fn() -> Result<B>) -> Result<Report> {
    let mut report = Report::default();
    if !cli.pictures.is_empty() {
        vision::measure(&cli.pictures, cli.repeats, model, &open, &mut report);
    }
    if !cli.decoder.prefill.is_empty() || !cli.decoder.decode.is_empty() {
        decoder::measure(&cli.decoder, cli.repeats, model, &open, &mut report);
    }
    Ok(report)
}

/// Returns when an engine's thread has given its memory back, after the last handle on it was dropped: neither the next engine
/// nor the end of the process may come in its way.
fn wait_for_end(mut alive: watch::Receiver<bool>) {
    if let Ok(runtime) = Builder::new_current_thread().build() {
        // An error says that the thread is gone.
        runtime.block_on(alive.wait_for(|alive| !*alive)).ok();
    }
}

/// The median of `values`, which are not empty; the mean of the middle two if they are even in number.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len() % 2 == 1 { values[middle] } else { (values[middle - 1] + values[middle]) / 2.0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn early_launch_can_be_turned_off() {
        let parse = |flags: &[&str]| {
            Cli::try_parse_from(["idefics-engine-bench", "--model", "model"].iter().chain(flags)).map(|cli| cli.early_launch)
        };
        assert!(parse(&[]).unwrap() && parse(&["--early-launch", "true"]).unwrap());
        assert!(!parse(&["--early-launch", "false"]).unwrap());
        assert!(parse(&["--early-launch"]).is_err());
    }

    #[test]
    fn median_is_of_the_middle() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), 2.5);
    }
}

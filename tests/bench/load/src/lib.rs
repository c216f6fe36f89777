//! Puts load on an idefics deployment and reports how it bears it: open loop (Poisson arrivals, latency from the scheduled
//! arrival) or closed loop, a seeded mix of conversations, and what the servers say of themselves meanwhile.
//!
//! A measurement: [`workload`] draws conversations, [`arrivals`] says when they begin, [`runner`] sends them through [`client`],
//! [`observer`] watches the servers, [`summary`] makes numbers of the outcomes. [`sweep`] and [`overload`] repeat it.
#![forbid(unsafe_code)]

pub mod arrivals;
pub mod bench;
pub mod cli;
pub mod client;
pub mod deployment;
mod metrics;
pub mod observer;
pub mod overload;
mod pictures;
mod plot;
pub mod quantiles;
pub mod range;
pub mod runner;
pub mod summary;
pub mod sweep;
mod table;
pub mod workload;

use anyhow::{Context, Result, anyhow};
use arrivals::{Until, poisson};
use bench::Bench;
use clap::Parser;
use cli::{Cli, CommonArgs, LoadArgs, Mode, expect_positive};
use client::Client;
use overload::Plan;
use runner::Load;
use serde::Serialize;
use serde_json::json;
use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, SystemTime},
};
use tokio::signal::unix::{SignalKind, signal};

/// Variant of the conversations before a measurement: no measurement has it.
const WARMUP_VARIANT: u32 = u32::MAX;

/// Parses the command line, measures, and writes the report.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&error.into()),
    };
    // What is dropped on a signal ends the roles that were started.
    let outcome = runtime.block_on(async {
        tokio::select! {
            outcome = run(cli) => outcome,
            signal = interrupted() => Err(signal.map_or_else(Into::into, |()| anyhow!("interrupted"))),
        }
    });
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error),
    }
}

fn fail(error: &anyhow::Error) -> ExitCode {
    eprintln!("error: {error:#}");
    ExitCode::FAILURE
}

/// Returns at SIGTERM or SIGINT.
async fn interrupted() -> std::io::Result<()> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
    Ok(())
}

async fn run(cli: Cli) -> Result<()> {
    match cli.mode {
        Mode::Run { common, load } => {
            let (count, load) = conversations_and_load(&load, common.workload.seed).map_err(anyhow::Error::msg)?;
            let (bench, report) = open(common).await?;
            let run = bench.measure(count, 0, load).await?;
            println!("{}", table::details(&run));
            report.write("run", &run)?;
            report.check(run.problems())
        }
        Mode::Sweep { common, concurrency, requests } => {
            if concurrency.contains(&0) || requests == 0 {
                return Err(anyhow!("--concurrency or --requests has 0, expected numbers from 1 up"));
            }
            let (bench, report) = open(common).await?;
            println!("{}", table::HEADER);
            let sweep = sweep::sweep(&bench, requests, &concurrency, |level| {
                let label = format!("c={} x{:.2}", level.concurrency, level.throughput_ratio);
                println!("{}", table::row(&label, &level.run.total));
            })
            .await?;
            for level in &sweep.levels {
                let ttft = level.ttft_ratio.map_or("-".to_owned(), |ratio| format!("{ratio:.2}"));
                println!("concurrency {}: throughput x{:.2}, time to first token x{ttft}", level.concurrency, level.throughput_ratio);
            }
            if let Some(level) = sweep.levels.last() {
                println!("\nconcurrency {}:\n{}", level.concurrency, table::details(&level.run));
            }
            report.write("sweep", &sweep)?;
            report.file("sweep.svg", |file| plot::sweep(&sweep, file))?;
            report.check(sweep.problems())
        }
        Mode::Overload { common, duration, rate, requests, rounds } => {
            expect_positive("--duration", duration).map_err(anyhow::Error::msg)?;
            expect_positive("--rate", rate.unwrap_or(1.0)).map_err(anyhow::Error::msg)?;
            let plan =
                Plan { duration: Duration::from_secs_f64(duration), first_rate: rate, probes: requests.max(1), rounds: rounds.max(1) };
            let (bench, report) = open(common).await?;
            println!("{}", table::HEADER);
            let progress = |step: &overload::Step| println!("{}", table::row(&format!("rate {:.2}", step.rate), &step.run.total));
            let overload = overload::overload(&bench, plan, progress).await?;
            if let Some(round) = overload.rounds.last() {
                println!("\nrate {:.2}:\n{}", round.overload.rate, table::details(&round.overload.run));
            }
            for round in &overload.rounds {
                println!("goodput {:.2}/s, {:.2}/s at twice the rate", round.peak.goodput(), round.overload.goodput());
            }
            let refusal = overload.refusal_ms.map_or("-".to_owned(), |refusal_ms| format!("{refusal_ms:.1} ms"));
            println!(
                "peak {:.2}/s at {:.2} conversations/s; {:.1}% of it at twice the rate; median refusal {refusal}",
                overload.peak_goodput_per_s,
                overload.peak_rate,
                100.0 * overload.relative_goodput,
            );
            report.write("overload", &overload)?;
            report.file("overload.svg", |file| plot::overload(&overload, file))?;
            report.check(overload.problems())
        }
    }
}

fn conversations_and_load(load: &LoadArgs, seed: u64) -> Result<(usize, Load), String> {
    let count = load.requests;
    match (load.rate, load.concurrency) {
        (Some(rate), _) => {
            expect_positive("--rate", rate)?;
            let until = match load.duration {
                Some(duration) => {
                    expect_positive("--duration", duration)?;
                    Until::Time(Duration::from_secs_f64(duration))
                }
                None => Until::Count(count),
            };
            let arrivals = poisson(seed, rate, until);
            Ok((arrivals.len(), Load::Open { rate, arrivals }))
        }
        (None, Some(concurrency)) if concurrency > 0 => Ok((count, Load::Closed { concurrency })),
        _ => Err("--concurrency is 0, expected 1 or more".into()),
    }
}

/// Starts or finds the deployment, and warms it up.
async fn open(common: CommonArgs) -> Result<(Bench, Report)> {
    common.check().map_err(anyhow::Error::msg)?;
    let (target, log_folder) = (common.target.clone(), common.out.clone());
    let (endpoint, observer) = tokio::task::spawn_blocking(move || target.resolve(log_folder)).await??;
    let client = Client::connect(&endpoint, Duration::from_secs_f64(common.timeout)).await?;
    let model = client.model().await?;
    let settle = Duration::from_secs_f64(common.settle);
    let header = json!({
        "unix_time_s": SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |time| time.as_secs()),
        "processor": processor(),
        "cores": std::thread::available_parallelism().map_or(0, usize::from),
        "model": { "name": model.name, "fingerprint": model.fingerprint, "version": model.version },
        "target": common.target,
        "workload": common.workload,
        "slo": common.slo,
    });
    let bench = Bench { client, observer, workload: common.workload, slo: common.slo, settle };
    let load = Load::Closed { concurrency: common.warmup.clamp(1, 4) };
    runner::run(&bench.client, bench.workload.conversations(common.warmup, WARMUP_VARIANT), &load).await;
    Ok((bench, Report { header, out: common.out, check: common.check }))
}

fn processor() -> Option<String> {
    let info = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    Some(info.lines().find(|line| line.starts_with("model name"))?.split_once(':')?.1.trim().to_owned())
}

/// Where reports go.
struct Report {
    header: serde_json::Value,
    out: Option<PathBuf>,
    check: bool,
}

impl Report {
    fn write(&self, name: &str, body: &impl Serialize) -> Result<()> {
        let report = json!({ "header": self.header, name: body });
        self.file(&format!("{name}.json"), |file| Ok(std::fs::write(file, serde_json::to_vec_pretty(&report)?)?))
    }

    /// Lets `write` write the file `name` into the folder, if there is one.
    fn file(&self, name: &str, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
        let Some(folder) = &self.out else { return Ok(()) };
        std::fs::create_dir_all(folder).with_context(|| format!("{} cannot be made", folder.display()))?;
        let file = folder.join(name);
        write(&file).with_context(|| format!("{} cannot be written", file.display()))
    }

    fn check(&self, problems: Vec<String>) -> Result<()> {
        for problem in &problems {
            println!("PROBLEM: {problem}");
        }
        if self.check && !problems.is_empty() {
            return Err(anyhow!("{} checks failed", problems.len()));
        }
        Ok(())
    }
}

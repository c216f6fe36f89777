//! The `idefics` binary as a library: a subcommand per role, all roles in one process, and a client for the command line.
#![forbid(unsafe_code)]

mod ask;
mod cli;
mod config;
mod demo;
mod device;
mod encode;
mod endpoint;
mod inspect;
mod progress;
mod roles;
mod serve;

use clap::Parser;
use cli::{Cli, Command};
use idefics_common::engine_thread;
use std::{process::ExitCode, time::Duration};

// Image tokens are megabytes that come and go; glibc's allocator returns them to the system each time.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Parses the command line and runs it.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<()> {
    match cli.command {
        Command::Ask(args) => block_on(ask::run(*args)),
        Command::Encode(args) => block_on(encode::run(args)),
        Command::Inspect(args) => inspect::run(&args),
        Command::Serve(args) => block_on(serve::run(args, serve::Role::All)),
        Command::Gateway(args) => block_on(serve::run(args, serve::Role::Gateway)),
        Command::Vision(args) => block_on(serve::run(args, serve::Role::Vision)),
        Command::Decoder(args) => block_on(serve::run(args, serve::Role::Decoder)),
    }
}

/// Longest time that the process waits for its engines to give the device back.
const ENGINES_END: Duration = Duration::from_secs(3);

/// Runs `work` and returns when it is done and its engines are gone, even if a thread is still stuck in a load that nobody waits for
/// any more.
fn block_on(work: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let result = runtime.block_on(work);
    runtime.shutdown_background();
    if !engine_thread::wait_for_end(ENGINES_END) {
        tracing::warn!(limit_ms = ENGINES_END.as_millis() as u64, "an engine still holds its device at the end of the process");
    }
    result
}

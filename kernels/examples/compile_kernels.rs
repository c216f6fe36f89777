//! Compiles every CUDA kernel with NVRTC, without a card, and compares registers and spills with the recorded ones.
//!
//! `cargo run -p idefics-kernels --example compile_kernels [-- --record]`, with the folder of libnvrtc on `LD_LIBRARY_PATH`. Fails
//! if a kernel does not compile without warnings, or takes more registers or spills more than `cu/resources.tsv` says; `--record`
//! rewrites that file.

use idefics_kernels::cuda::{nvrtc, source::SOURCES};
use std::{collections::BTreeMap, fmt, fs, path::Path, process::ExitCode};

/// A100, H100, B200, RTX PRO 6000 Blackwell: each with instructions, or limits, that the others do not have.
const COMPUTE_CAPABILITIES: [(i32, i32); 4] = [(8, 0), (9, 0), (10, 0), (12, 0)];

/// What ptxas says of a kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Resources {
    registers: u32,
    /// Bytes of stack: local arrays and spills.
    stack_bytes: u32,
    spill_bytes: u32,
}

/// A kernel for an architecture.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Kernel {
    source: String,
    name: String,
    architecture: String,
}

impl fmt::Display for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}\t{}\t{}", self.source, self.name, self.architecture)
    }
}

type Table = BTreeMap<Kernel, Resources>;

/// Reads the lines that `--ptxas-options=-v` prints.
fn parse(source: &str, architecture: &str, log: &str, table: &mut Table) {
    let number_before = |line: &str, unit: &str| -> Option<u32> { line.split(unit).next()?.split_whitespace().last()?.parse().ok() };
    let (mut name, mut resources) = (String::new(), Resources::default());
    for line in log.lines() {
        if let Some(rest) = line.split("entry function '").nth(1) {
            (name, resources) = (rest.split('\'').next().unwrap_or_default().to_owned(), Resources::default());
        } else if line.contains("bytes stack frame") {
            resources.stack_bytes = number_before(line, "bytes stack frame").unwrap_or(0);
            let spilled = |unit| line.split(", ").find_map(|part| part.ends_with(unit).then(|| number_before(part, "bytes")).flatten());
            resources.spill_bytes = spilled("spill stores").unwrap_or(0) + spilled("spill loads").unwrap_or(0);
        } else if line.contains(" registers") {
            resources.registers = number_before(line, "registers").unwrap_or(0);
            table.insert(Kernel { source: source.into(), name: name.clone(), architecture: architecture.into() }, resources);
        }
    }
}

fn read(path: &Path) -> Table {
    let text = fs::read_to_string(path).unwrap_or_default();
    let rows = text.lines().skip(1).filter_map(|line| {
        let cells: Vec<&str> = line.split('\t').collect();
        let [source, name, architecture, registers, stack, spill] = cells[..] else { return None };
        let kernel = Kernel { source: source.into(), name: name.into(), architecture: architecture.into() };
        Some((kernel, Resources { registers: registers.parse().ok()?, stack_bytes: stack.parse().ok()?, spill_bytes: spill.parse().ok()? }))
    });
    rows.collect()
}

fn write(path: &Path, table: &Table) -> std::io::Result<()> {
    let mut text = "source\tkernel\tarchitecture\tregisters\tstack_bytes\tspill_bytes\n".to_owned();
    for (kernel, r) in table {
        text += &format!("{kernel}\t{}\t{}\t{}\n", r.registers, r.stack_bytes, r.spill_bytes);
    }
    fs::write(path, text)
}

fn main() -> ExitCode {
    let record = std::env::args().any(|arg| arg == "--record");
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("cu").join("resources.tsv");
    let (recorded, mut found, mut failures) = (read(&path), Table::new(), Vec::new());
    for source in SOURCES {
        for compute_capability in COMPUTE_CAPABILITIES.into_iter().filter(|one| source.is_for(*one)) {
            let architecture = nvrtc::architecture(compute_capability);
            match nvrtc::compile(source, compute_capability) {
                Ok(compiled) => {
                    // A loss of performance: when products of warpgroups wait for each other, as a register could be touched in between.
                    let warns = |line: &&str| line.contains("warning") || line.contains("Potential Performance Loss");
                    let warnings = compiled.log.lines().filter(warns);
                    failures.extend(warnings.map(|line| format!("{} for {architecture}: {line}", source.name)));
                    parse(source.name, &architecture, &compiled.log, &mut found);
                }
                Err(error) => failures.push(error.to_string()),
            }
        }
    }
    for (kernel, now) in &found {
        println!("{kernel}\t{} registers\t{} bytes of stack\t{} spilled", now.registers, now.stack_bytes, now.spill_bytes);
        match recorded.get(kernel) {
            _ if record => {}
            None => failures.push(format!("{kernel} is not in {}; run with --record", path.display())),
            Some(then) if now.registers > then.registers || now.spill_bytes > then.spill_bytes || now.stack_bytes > then.stack_bytes => {
                failures.push(format!("{kernel} takes {now:?}, recorded is {then:?}; make it leaner, or run with --record and say why"));
            }
            Some(_) => {}
        }
    }
    if found.is_empty() && failures.is_empty() {
        failures.push("ptxas printed no kernel at all".into());
    }
    if record
        && failures.is_empty()
        && let Err(error) = write(&path, &found)
    {
        failures.push(format!("{} cannot be written: {error}", path.display()));
    }
    failures.iter().for_each(|failure| eprintln!("error: {failure}"));
    if failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

//! Compiles every CUDA kernel with NVRTC, without a card, and compares registers and spills with the recorded ones.
//!
//! `cargo run -p idefics-kernels --example compile_kernels [-- --record] [--cubins FOLDER]`, with the folder of libnvrtc on
//! `LD_LIBRARY_PATH`. Fails if a kernel does not compile without warnings, or takes more registers or spills more than
//! `cu/resources.tsv` says; `--record` rewrites that file, `--cubins` keeps the machine code.

use idefics_kernels::cuda::{
    nvrtc::{self, Compiled},
    source::{SOURCES, Source},
};
use std::{
    collections::BTreeMap,
    fmt, fs,
    path::Path,
    process::ExitCode,
    sync::{Mutex, PoisonError},
    thread,
};

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

type Answer = (&'static Source, String, idefics_kernels::Result<Compiled>);

/// Compiles every source for every architecture that it is for, on all processors.
fn compile_all() -> Vec<Answer> {
    let capabilities = |source: &'static Source| COMPUTE_CAPABILITIES.into_iter().filter(|one| source.is_for(*one));
    let jobs = Mutex::new(SOURCES.iter().flat_map(|source| capabilities(source).map(move |capability| (source, capability))));
    let next = || jobs.lock().unwrap_or_else(PoisonError::into_inner).next();
    let work = || {
        let compile = |(source, capability)| (source, nvrtc::architecture(capability), nvrtc::compile(source, capability));
        std::iter::from_fn(next).map(compile).collect::<Vec<_>>()
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..thread::available_parallelism().map_or(1, |n| n.get())).map(|_| scope.spawn(work)).collect();
        workers.into_iter().flat_map(|worker| worker.join().expect("a worker does not panic")).collect()
    })
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let record = arguments.iter().any(|argument| argument == "--record");
    let cubins = arguments.iter().position(|argument| argument == "--cubins").map(|at| arguments.get(at + 1).expect("--cubins FOLDER"));
    let cubins = cubins.map(Path::new);
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("cu").join("resources.tsv");
    let (recorded, mut found, mut failures) = (read(&path), Table::new(), Vec::new());
    for (source, architecture, answer) in compile_all() {
        match answer {
            Ok(compiled) => {
                // A loss of performance: when products of warpgroups wait for each other, as a register could be touched in between.
                let warns = |line: &&str| ["warning", "Potential Performance Loss", "(C75"].iter().any(|word| line.contains(word));
                let warnings = compiled.log.lines().filter(warns);
                failures.extend(warnings.map(|line| format!("{} for {architecture}: {line}", source.name)));
                parse(source.name, &architecture, &compiled.log, &mut found);
                if let Some(folder) = cubins {
                    let file = folder.join(format!("{}.{architecture}.cubin", source.name));
                    let kept = fs::create_dir_all(folder).and_then(|()| fs::write(&file, &compiled.cubin));
                    failures.extend(kept.err().map(|error| format!("{} cannot be written: {error}", file.display())));
                }
            }
            Err(error) => failures.push(error.to_string()),
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
    if !record {
        let missing = recorded.keys().filter(|kernel| !found.contains_key(kernel));
        failures.extend(missing.map(|kernel| format!("{kernel} is in {} and was not compiled; run with --record", path.display())));
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

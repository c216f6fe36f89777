//! The ops of the CPU backend beside what the machine can do, and beside the `gemm` crate.
//!
//! `cargo bench -p idefics-kernels -- [FILTER] [--threads N] [--isa portable|avx2|avx512]`: cases whose name contains FILTER.
//! Rounds of ours and of the peer alternate; times are medians, ratios are medians of the rounds' ratios. Nothing asserts.
//! With one thread all times are the CPU time of the thread, which busy neighbours disturb less.

mod cases;
mod ceilings;
mod clock;

use ceilings::Ceilings;
use clock::Clock;
use idefics_kernels::{
    DType, Matrix,
    cpu::{Cpu, CpuOptions, Isa},
    weights::{WeightView, Weights},
};
use std::time::{Duration, Instant};

type AnyResult<T = ()> = Result<T, Box<dyn std::error::Error>>;

/// Longest time for the rounds of one case.
const CASE_TIME: Duration = Duration::from_millis(1200);

fn main() -> AnyResult {
    let mut options = CpuOptions::default();
    let mut filter = String::new();
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        match arg.as_str() {
            // What cargo adds.
            "--bench" => {}
            "--threads" => options.threads = Some(args.next().ok_or("--threads needs a number")?.parse()?),
            "--isa" => {
                let name = args.next().ok_or("--isa needs a name")?;
                options.isa = Isa::ALL.into_iter().find(|isa| isa.to_string() == name);
            }
            _ => filter = arg,
        }
    }
    let cpu = Cpu::new(options)?;
    println!("{} threads, {}", cpu.threads(), cpu.isa());
    for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
        let ceilings = Ceilings::measure(cpu.threads(), isa);
        for threads in [1, cpu.threads()] {
            let (read, flops) = (ceilings.read(threads) / 1e9, ceilings.flops(threads) / 1e9);
            println!("ceiling {isa:8} {threads} threads: {read:6.1} GB/s read, {flops:6.1} GFLOP/s multiply-add");
        }
    }
    let ceilings = Ceilings::measure(cpu.threads(), cpu.isa());
    println!("{:42} {:>10} {:>10} {:>10} {:>6} {:>12}", "case", "ms", "GB/s", "GFLOP/s", "%", "gemm / ours");
    cases::run(&mut Bench { cpu, ceilings, filter })
}

/// What a case must move and compute.
#[derive(Clone, Copy)]
enum Bound {
    /// Bytes read from memory.
    Bytes(f64),
    /// Multiplications and additions.
    Flops(f64),
}

struct Bench {
    cpu: Cpu,
    ceilings: Ceilings,
    filter: String,
}

impl Bench {
    fn wants(&self, name: &str) -> bool {
        name.contains(&self.filter)
    }

    /// Times `ours` and the peer in turn and prints a line.
    fn report(&self, name: &str, bound: Bound, mut ours: impl FnMut(), mut peer: Option<&mut dyn FnMut()>) {
        let clock = Clock::for_threads(self.cpu.threads());
        let time = |f: &mut dyn FnMut()| {
            let start = clock.seconds();
            f();
            clock.seconds() - start
        };
        let once = time(&mut ours);
        // A round is long enough for the clock.
        let repeats = (2e-3 / once).ceil().clamp(1.0, 1000.0) as usize;
        let (mut times, mut ratios) = (Vec::new(), Vec::new());
        let start = Instant::now();
        while times.len() < 3 || (start.elapsed() < CASE_TIME && times.len() < 101) {
            let own = time(&mut || (0..repeats).for_each(|_| ours())) / repeats as f64;
            times.push(own);
            if let Some(peer) = &mut peer {
                ratios.push(time(&mut || (0..repeats).for_each(|_| peer())) / repeats as f64 / own);
            }
        }
        let seconds = median(&mut times);
        let threads = self.cpu.threads();
        let (bytes, flops, share) = match bound {
            Bound::Bytes(bytes) => (bytes / seconds, 0.0, bytes / seconds / self.ceilings.read(threads)),
            Bound::Flops(flops) => (0.0, flops / seconds, flops / seconds / self.ceilings.flops(threads)),
        };
        let shown = |value: f64| if value == 0.0 { String::new() } else { format!("{:.1}", value / 1e9) };
        let ratio = if ratios.is_empty() { String::new() } else { format!("{:.2}", median(&mut ratios)) };
        let (ms, percent) = (seconds * 1e3, share * 100.0);
        println!("{name:42} {ms:10.3} {:>10} {:>10} {percent:6.1} {ratio:>12}", shown(bytes), shown(flops));
    }
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Weights in a mapped file, as they are served.
struct WeightFile {
    weights: Weights,
    _folder: tempfile::TempDir,
}

impl WeightFile {
    /// `count` bf16 matrices `[rows, cols]` of magnitudes between 0.5 and 1.
    fn new(count: usize, rows: usize, cols: usize) -> AnyResult<Self> {
        let folder = tempfile::tempdir()?;
        let bytes = 2 * rows * cols;
        let entry =
            |i: usize| format!(r#""{i}":{{"dtype":"BF16","shape":[{rows},{cols}],"data_offsets":[{},{}]}}"#, i * bytes, (i + 1) * bytes);
        let mut header = format!("{{{}}}", (0..count).map(entry).collect::<Vec<_>>().join(","));
        while header.len() % 8 != 0 {
            header.push(' ');
        }
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend(header.bytes());
        let mut state = 1u64;
        for _ in 0..count * rows * cols / 4 {
            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
            file.extend(((state ^ (state >> 33)) & 0x807f_807f_807f_807f | 0x3f00_3f00_3f00_3f00).to_le_bytes());
        }
        file.resize(8 + header.len() + count * bytes, 0);
        std::fs::write(folder.path().join("model.safetensors"), file)?;
        Ok(Self { weights: Weights::open(folder.path())?, _folder: folder })
    }

    fn views(&self) -> Vec<WeightView> {
        self.weights.iter().cloned().collect()
    }

    fn load(&self, cpu: &Cpu) -> AnyResult<Vec<Matrix<Cpu>>> {
        use idefics_kernels::Backend;
        Ok(self.views().iter().map(|view| cpu.load_weight(std::slice::from_ref(view))).collect::<Result<_, _>>()?)
    }
}

/// The elements of a bf16 matrix as f32, which the peer is given for nothing.
fn widened(view: &WeightView) -> Vec<f32> {
    assert_eq!(view.dtype, DType::Bf16);
    view.bytes().as_chunks::<2>().0.iter().map(|[a, b]| half::bf16::from_le_bytes([*a, *b]).to_f32()).collect()
}

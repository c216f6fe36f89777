//! The engine on the CPU, where the host chooses tokens.

mod common;

#[path = "engine/cases.rs"]
mod cases;
#[path = "common/requests.rs"]
mod requests;

use idefics_kernels::cpu::{Cpu, CpuOptions};

fn backend() -> Cpu {
    Cpu::new(CpuOptions::default()).unwrap()
}

//! What the machine itself can do: reading memory, and multiplying in registers.

use crate::clock::Clock;
use idefics_kernels::cpu::Isa;
use std::{hint::black_box, sync::Barrier};

/// Ceilings of one machine, with one thread and with all.
pub(crate) struct Ceilings {
    /// Bytes per second read, by threads.
    read: Vec<f64>,
    /// Operations per second, by threads, of the instruction set measured.
    flops: Vec<f64>,
}

impl Ceilings {
    /// Measures for 1 to `threads` threads; half a second each.
    pub(crate) fn measure(threads: usize, isa: Isa) -> Self {
        Self {
            read: (1..=threads).map(read_bandwidth).collect(),
            flops: (1..=threads).map(|threads| multiply_adds(threads, isa)).collect(),
        }
    }

    pub(crate) fn read(&self, threads: usize) -> f64 {
        self.read[threads - 1]
    }

    pub(crate) fn flops(&self, threads: usize) -> f64 {
        self.flops[threads - 1]
    }
}

/// Runs `f` on several threads at once, some rounds; gives the shortest time of a round.
fn race(threads: usize, rounds: usize, f: impl Fn(usize) + Sync) -> f64 {
    let (barrier, clock) = (Barrier::new(threads), Clock::for_threads(threads));
    let times = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|thread| {
                let (barrier, f) = (&barrier, &f);
                scope.spawn(move || {
                    let mut times = Vec::new();
                    for _ in 0..rounds {
                        barrier.wait();
                        let start = clock.seconds();
                        f(thread);
                        barrier.wait();
                        times.push(clock.seconds() - start);
                    }
                    times
                })
            })
            .collect();
        workers.into_iter().map(|worker| worker.join().unwrap_or_default()).next().unwrap_or_default()
    });
    times.into_iter().fold(f64::INFINITY, f64::min)
}

/// Bytes per second of plain sums over memory far larger than the caches.
fn read_bandwidth(threads: usize) -> f64 {
    const WORDS: usize = 32 << 20;
    let data: Vec<u64> = (0..WORDS as u64).collect();
    let share = WORDS / threads;
    let seconds = race(threads, 5, |thread| {
        let mut sums = [0u64; 16];
        for chunk in data[thread * share..(thread + 1) * share].as_chunks::<16>().0 {
            for (sum, x) in sums.iter_mut().zip(chunk) {
                *sum = sum.wrapping_add(*x);
            }
        }
        black_box(sums);
    });
    (share * threads * 8) as f64 / seconds
}

/// Operations per second of independent multiply-adds in registers.
fn multiply_adds(threads: usize, isa: Isa) -> f64 {
    const STEPS: usize = 1 << 22;
    let lanes = match isa {
        Isa::Portable => 4,
        Isa::Avx2 => 8,
        Isa::Avx512 => 16,
    };
    let seconds = race(threads, 5, |_| match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the caller's backend was made for this instruction set, so the machine has it.
        Isa::Avx2 => unsafe { x86::avx2(STEPS) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Isa::Avx512 => unsafe { x86::avx512(STEPS) },
        _ => portable(STEPS),
    });
    (2 * 10 * lanes * STEPS * threads) as f64 / seconds
}

fn portable(steps: usize) {
    let (a, b) = (black_box([1.000_001f32; 4]), black_box([1e-7f32; 4]));
    let mut acc = [[0f32; 4]; 10];
    for _ in 0..steps {
        for acc in &mut acc {
            for lane in 0..4 {
                acc[lane] = acc[lane] * a[lane] + b[lane];
            }
        }
    }
    black_box(acc);
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::{arch::x86_64::*, hint::black_box};

    /// # Safety
    /// The machine has AVX2 and FMA.
    #[target_feature(enable = "avx2,fma")]
    pub(super) unsafe fn avx2(steps: usize) {
        let (a, b) = (_mm256_set1_ps(black_box(1.000_001)), _mm256_set1_ps(black_box(1e-7)));
        let mut acc = [_mm256_setzero_ps(); 10];
        for _ in 0..steps {
            for acc in &mut acc {
                *acc = _mm256_fmadd_ps(*acc, a, b);
            }
        }
        black_box(acc);
    }

    /// # Safety
    /// The machine has AVX-512 F.
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn avx512(steps: usize) {
        let (a, b) = (_mm512_set1_ps(black_box(1.000_001)), _mm512_set1_ps(black_box(1e-7)));
        let mut acc = [_mm512_setzero_ps(); 10];
        for _ in 0..steps {
            for acc in &mut acc {
                *acc = _mm512_fmadd_ps(*acc, a, b);
            }
        }
        black_box(acc);
    }
}

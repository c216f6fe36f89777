//! The clock of the rounds.

use std::time::Instant;

#[derive(Clone, Copy)]
pub(crate) enum Clock {
    /// Time of day, from a start.
    Wall(Instant),
    /// CPU time of the calling thread: what runs beside it on the machine counts for nothing but its use of the memory.
    Thread,
}

impl Clock {
    /// The one to use for work that `threads` threads do.
    pub(crate) fn for_threads(threads: usize) -> Self {
        if threads == 1 && cfg!(target_os = "linux") { Self::Thread } else { Self::Wall(Instant::now()) }
    }

    pub(crate) fn seconds(self) -> f64 {
        match self {
            Self::Wall(start) => start.elapsed().as_secs_f64(),
            Self::Thread => thread_seconds(),
        }
    }
}

#[cfg(target_os = "linux")]
fn thread_seconds() -> f64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the structure is there to be written.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}

#[cfg(not(target_os = "linux"))]
fn thread_seconds() -> f64 {
    0.0
}

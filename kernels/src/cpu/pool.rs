//! The threads of a CPU backend: an op is cut into tiles, which the calling thread and idle helpers take one by one.
//!
//! Two engines may share a pool. The caller always works on its own op and never waits for a helper that is busy with
//! another's, which it would with a work-stealing pool that queues a task per thread.

use crate::{Error, Result};
use std::{
    any::Any,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::JoinHandle,
};

/// How often a helper looks for work before it sleeps: some 20 to 90 µs, more than the serial ops between two large ones take,
/// less than it takes to wake a thread twice.
const SPINS: usize = 2_000;

/// Helper threads that wait for jobs.
pub(crate) struct Pool {
    shared: Arc<Shared>,
    helpers: Vec<JoinHandle<()>>,
}

struct Shared {
    state: Mutex<State>,
    wake: Condvar,
    /// Counts jobs and the end, so that a helper sees them without the lock.
    epoch: AtomicUsize,
}

struct State {
    /// Jobs on which a helper may start.
    jobs: Vec<JobRef>,
    sleeping: usize,
    stop: bool,
}

/// A job on the stack of its caller, who takes it from the list and waits for its helpers before it returns.
#[derive(Clone, Copy, PartialEq, Eq)]
struct JobRef(*const Job<'static>);

// SAFETY: a `Job` is shared between threads by design: its fields are atomics, a mutex, and a function that is `Sync`.
unsafe impl Send for JobRef {}

struct Job<'a> {
    run: &'a (dyn Fn(usize) + Sync),
    tiles: usize,
    /// Next tile to take.
    next: AtomicUsize,
    /// Helpers at work on it; raised under the lock of the list.
    helpers: AtomicUsize,
    panicked: AtomicBool,
    payload: Mutex<Option<Box<dyn Any + Send>>>,
}

impl Job<'_> {
    fn work(&self) {
        loop {
            let tile = self.next.fetch_add(1, Ordering::Relaxed);
            if tile >= self.tiles {
                return;
            }
            (self.run)(tile);
        }
    }

    fn is_exhausted(&self) -> bool {
        self.next.load(Ordering::Relaxed) >= self.tiles
    }
}

impl Pool {
    /// A pool in which `threads` threads work at an op, the caller among them.
    pub(crate) fn new(threads: usize) -> Result<Self> {
        let state = Mutex::new(State { jobs: Vec::with_capacity(8), sleeping: 0, stop: false });
        let shared = Arc::new(Shared { state, wake: Condvar::new(), epoch: AtomicUsize::new(0) });
        let mut pool = Self { shared, helpers: Vec::new() };
        for i in 1..threads {
            let shared = pool.shared.clone();
            let helper = std::thread::Builder::new().name(format!("cpu-{i}")).spawn(move || shared.help());
            pool.helpers.push(helper.map_err(|e| Error::Device(format!("cannot start thread {i} of {threads}: {e}")))?);
        }
        Ok(pool)
    }

    pub(crate) fn threads(&self) -> usize {
        self.helpers.len() + 1
    }

    /// Calls `run` once for each of `0..tiles`, in any order, from several threads; returns when all are done.
    pub(crate) fn for_each(&self, tiles: usize, run: impl Fn(usize) + Sync) {
        if self.helpers.is_empty() || tiles <= 1 {
            (0..tiles).for_each(run);
            return;
        }
        let job = Job {
            run: &run,
            tiles,
            next: AtomicUsize::new(0),
            helpers: AtomicUsize::new(0),
            panicked: AtomicBool::new(false),
            payload: Mutex::new(None),
        };
        let open = self.shared.open(&job);
        job.work();
        drop(open);
        if job.panicked.load(Ordering::Acquire)
            && let Some(payload) = lock(&job.payload).take()
        {
            resume_unwind(payload);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        lock(&self.shared.state).stop = true;
        self.shared.epoch.fetch_add(1, Ordering::Release);
        self.shared.wake.notify_all();
        for helper in self.helpers.drain(..) {
            // A helper catches what a tile throws, so there is nothing to pass on.
            let _ = helper.join();
        }
    }
}

/// A job in the list; dropping it, also while unwinding, ends all use of the job by others.
struct Open<'a> {
    shared: &'a Shared,
    job: &'a Job<'a>,
}

impl Open<'_> {
    fn job_ref(job: &Job<'_>) -> JobRef {
        JobRef(std::ptr::from_ref(job).cast())
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        let this = Open::job_ref(self.job);
        lock(&self.shared.state).jobs.retain(|job| *job != this);
        // What a caller that unwinds leaves undone is not worth doing.
        self.job.next.store(self.job.tiles, Ordering::Relaxed);
        let mut spins = 0;
        while self.job.helpers.load(Ordering::Acquire) > 0 {
            spins += 1;
            if spins < SPINS { std::hint::spin_loop() } else { std::thread::yield_now() }
        }
    }
}

impl Shared {
    fn open<'a>(&'a self, job: &'a Job<'a>) -> Open<'a> {
        let sleeping = {
            let mut state = lock(&self.state);
            state.jobs.push(Open::job_ref(job));
            state.sleeping
        };
        self.epoch.fetch_add(1, Ordering::Release);
        for _ in 0..sleeping.min(job.tiles - 1) {
            self.wake.notify_one();
        }
        Open { shared: self, job }
    }

    /// The life of a helper.
    fn help(&self) {
        while let Some(job) = self.next_job() {
            // SAFETY: `next_job` counted us in under the lock while the job was in the list; its caller waits until the count
            // is back to 0, which is our last access.
            let job = unsafe { &*job.0 };
            if let Err(payload) = catch_unwind(AssertUnwindSafe(|| job.work())) {
                job.next.store(job.tiles, Ordering::Relaxed);
                *lock(&job.payload) = Some(payload);
                job.panicked.store(true, Ordering::Release);
            }
            job.helpers.fetch_sub(1, Ordering::Release);
        }
    }

    /// Waits for a job and counts the calling helper in; `None` when the pool ends.
    fn next_job(&self) -> Option<JobRef> {
        loop {
            let seen = self.epoch.load(Ordering::Acquire);
            if let Some(found) = self.take(&mut lock(&self.state)) {
                return found;
            }
            let mut spins = 0;
            while spins < SPINS && self.epoch.load(Ordering::Acquire) == seen {
                std::hint::spin_loop();
                spins += 1;
            }
            if spins < SPINS {
                continue;
            }
            let mut state = lock(&self.state);
            loop {
                if let Some(found) = self.take(&mut state) {
                    return found;
                }
                state.sleeping += 1;
                state = self.wake.wait(state).unwrap_or_else(PoisonError::into_inner);
                state.sleeping -= 1;
            }
        }
    }

    /// The open job with the fewest helpers; `Some(None)` when the pool ends.
    fn take(&self, state: &mut State) -> Option<Option<JobRef>> {
        if state.stop {
            return Some(None);
        }
        let mut best: Option<(usize, JobRef)> = None;
        for job in &state.jobs {
            // SAFETY: a job in the list is alive: its caller takes it out, under the lock that we hold, before it returns.
            let at = unsafe { &*job.0 };
            let helpers = at.helpers.load(Ordering::Relaxed);
            if !at.is_exhausted() && best.is_none_or(|(least, _)| helpers < least) {
                best = Some((helpers, *job));
            }
        }
        let (_, job) = best?;
        // SAFETY: as above.
        unsafe { &*job.0 }.helpers.fetch_add(1, Ordering::Relaxed);
        Some(Some(job))
    }
}

/// Locks, also after a panic elsewhere: the states guarded here are valid after every statement.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_tile_runs_once() {
        for threads in [1, 2, 5] {
            let pool = Pool::new(threads).unwrap();
            for tiles in [0, 1, 2, 7, 1000] {
                let counts: Vec<_> = (0..tiles).map(|_| AtomicUsize::new(0)).collect();
                pool.for_each(tiles, |tile| {
                    counts[tile].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn panicking_tile_panics_in_the_caller_and_leaves_the_pool_usable() {
        let pool = Pool::new(3).unwrap();
        for round in 0..50 {
            let result = catch_unwind(AssertUnwindSafe(|| pool.for_each(20, |tile| assert_ne!(tile, round % 20, "boom"))));
            assert!(result.is_err());
            let done = AtomicUsize::new(0);
            pool.for_each(20, |_| {
                done.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(done.load(Ordering::Relaxed), 20);
        }
    }

    #[test]
    fn callers_that_share_a_pool_all_finish() {
        let pool = Pool::new(2).unwrap();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for tiles in 0..500 {
                        let sum = AtomicUsize::new(0);
                        pool.for_each(tiles, |tile| {
                            sum.fetch_add(tile + 1, Ordering::Relaxed);
                        });
                        assert_eq!(sum.load(Ordering::Relaxed), tiles * (tiles + 1) / 2);
                    }
                });
            }
        });
    }
}

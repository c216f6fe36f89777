//! The thread that owns a device: it loads a model, then works until there is nothing left to do or the device fails.

use std::{
    sync::{Condvar, Mutex, PoisonError, mpsc},
    thread,
    time::Duration,
};
use tokio::sync::watch;

/// Engines of this process that run.
static RUNNING: Mutex<usize> = Mutex::new(0);
static ENDED: Condvar = Condvar::new();

/// Waits until no engine runs, at most for `limit`; returns whether that is so. For the end of a process whose engines have been let
/// go: a driver that is unloaded while an engine still gives memory back may bring the process down.
pub fn wait_for_end(limit: Duration) -> bool {
    let running = RUNNING.lock().unwrap_or_else(PoisonError::into_inner);
    let (running, _) = ENDED.wait_timeout_while(running, limit, |running| *running > 0).unwrap_or_else(PoisonError::into_inner);
    *running == 0
}

/// Starts a thread that loads a `T` and runs it; blocks until it is loaded. What comes out is true for as long as the thread
/// lives, however it ends. `T` never leaves the thread.
///
/// # Errors
/// Those of `load`; `failed` makes one of a thread that cannot be started, or panicked while it loaded.
pub fn start<T, E: Send + 'static>(
    name: &str,
    load: impl FnOnce() -> Result<T, E> + Send + 'static,
    run: impl FnOnce(T) + Send + 'static,
    failed: fn(String) -> E,
) -> Result<watch::Receiver<bool>, E> {
    let (alive_sender, alive) = watch::channel(true);
    let (loaded_sender, loaded) = mpsc::channel();
    let spawned = thread::Builder::new().name(name.to_owned()).spawn(move || {
        let _alive = AliveGuard(alive_sender);
        match load() {
            Ok(engine) => {
                let _running = RunningGuard::new();
                drop(loaded_sender.send(Ok(())));
                run(engine);
            }
            Err(error) => drop(loaded_sender.send(Err(error))),
        }
    });
    spawned.map_err(|e| failed(format!("the thread {name} cannot be started: {e}")))?;
    loaded.recv().unwrap_or_else(|_| Err(failed(format!("the thread {name} ended while it loaded"))))?;
    Ok(alive)
}

/// Says that the thread has ended, however it ends.
struct AliveGuard(watch::Sender<bool>);

impl Drop for AliveGuard {
    fn drop(&mut self) {
        self.0.send_replace(false);
    }
}

/// Counts an engine as running.
struct RunningGuard;

impl RunningGuard {
    fn new() -> Self {
        *RUNNING.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        Self
    }
}

impl Drop for RunningGuard {
    fn drop(&mut self) {
        *RUNNING.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        ENDED.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn end_is_waited_for_until_the_engine_is_gone() {
        struct Engine(mpsc::Sender<()>);
        impl Drop for Engine {
            fn drop(&mut self) {
                let _ = self.0.send(());
            }
        }
        let ((gone_sender, gone), (end, ended)) = (mpsc::channel(), mpsc::channel::<()>());
        let run = move |_engine: Engine| {
            let _ = ended.recv();
        };
        drop(start("engine", move || Ok::<_, String>(Engine(gone_sender)), run, |what| what).unwrap());
        assert!(!wait_for_end(Duration::ZERO), "it runs");
        drop(end);
        // Other tests' engines end too; as many seconds as a loaded machine may take.
        assert!(wait_for_end(Duration::from_secs(60)));
        assert!(gone.try_recv().is_ok(), "it was given back before the wait was over");
    }

    #[tokio::test]
    async fn thread_is_alive_until_it_ends_or_panics() {
        for panics in [false, true] {
            let (end, ended) = mpsc::channel::<()>();
            let run = move |()| {
                assert!(ended.recv().is_err() && !panics, "told to");
            };
            let mut alive = start("engine", || Ok(()), run, |what| what).unwrap();
            assert!(*alive.borrow());
            drop(end);
            alive.wait_for(|alive| !*alive).await.unwrap();
        }
    }

    #[test]
    fn load_that_fails_or_panics_is_an_error() {
        let failed = start("engine", || Err::<(), _>("no room".to_owned()), drop, |what| what);
        assert_eq!(failed.unwrap_err(), "no room");
        let panicked = start("engine", || -> Result<(), String> { panic!("told to") }, drop, |what| what);
        assert_eq!(panicked.unwrap_err(), "the thread engine ended while it loaded");
    }
}

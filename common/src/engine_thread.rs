//! The thread that owns a device: it loads a model, then works until there is nothing left to do or the device fails.

use std::{sync::mpsc, thread};
use tokio::sync::watch;

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

#[cfg(test)]
mod tests {
    use super::*;

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

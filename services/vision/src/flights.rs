//! Calls for the same thing at the same time: one does it, all get it.

use futures::future::{BoxFuture, FutureExt, Shared, WeakShared};
use std::{
    collections::HashMap,
    hash::Hash,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// Work that several calls may wait for. It goes on while one of them does, and is dropped with the last.
pub(crate) type Flight<T> = Shared<BoxFuture<'static, T>>;

struct Entry<T: Clone> {
    flight: WeakShared<BoxFuture<'static, T>>,
    number: u64,
}

struct Entries<K, T: Clone> {
    by_key: HashMap<K, Entry<T>>,
    next_number: u64,
}

/// What is being worked at.
pub(crate) struct Flights<K, T: Clone>(Arc<Mutex<Entries<K, T>>>);

/// Takes a flight off the list when its work ends or is dropped.
struct Leave<K: Copy + Eq + Hash, T: Clone> {
    entries: Arc<Mutex<Entries<K, T>>>,
    key: K,
    number: u64,
}

impl<K: Copy + Eq + Hash, T: Clone> Drop for Leave<K, T> {
    fn drop(&mut self) {
        let mut entries = lock(&self.entries);
        // A later flight may have the place already: the last call of this one had gone, and its work was being dropped.
        if entries.by_key.get(&self.key).is_some_and(|entry| entry.number == self.number) {
            entries.by_key.remove(&self.key);
        }
    }
}

/// How a call comes to its result.
pub(crate) enum Boarding<T: Clone, D> {
    /// `instead` had it.
    Done(D),
    /// Another call's flight.
    Joined(Flight<T>),
    /// A new flight.
    Started(Flight<T>),
}

impl<K, T> Flights<K, T>
where
    K: Copy + Eq + Hash + Send + Sync + 'static,
    T: Clone + Send + Sync + 'static,
{
    /// Nothing is being worked at.
    pub(crate) fn new() -> Self {
        Self(Arc::new(Mutex::new(Entries { by_key: HashMap::new(), next_number: 0 })))
    }

    /// The flight of `key`, if there is one; else what `instead` has; else a new flight with the work of `start`.
    ///
    /// Asked under one lock: work that leaves its result where `instead` finds it, before it ends, is never done twice.
    /// Neither closure may drop a flight.
    ///
    /// # Errors
    /// Those of `start`.
    pub(crate) fn board<D, E>(
        &self,
        key: K,
        instead: impl FnOnce() -> Option<D>,
        start: impl FnOnce() -> Result<BoxFuture<'static, T>, E>,
    ) -> Result<Boarding<T, D>, E> {
        let mut entries = lock(&self.0);
        if let Some(flight) = entries.by_key.get(&key).and_then(|entry| entry.flight.upgrade()) {
            return Ok(Boarding::Joined(flight));
        }
        if let Some(done) = instead() {
            return Ok(Boarding::Done(done));
        }
        let work = start()?;
        let number = entries.next_number;
        entries.next_number += 1;
        let leave = Leave { entries: Arc::clone(&self.0), key, number };
        let flight = async move {
            let _leave = leave;
            work.await
        };
        let flight = flight.boxed().shared();
        if let Some(weak) = flight.downgrade() {
            entries.by_key.insert(key, Entry { flight: weak, number });
        }
        Ok(Boarding::Started(flight))
    }
}

fn lock<K, T: Clone>(entries: &Mutex<Entries<K, T>>) -> MutexGuard<'_, Entries<K, T>> {
    entries.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::convert::Infallible;
    use tokio::sync::oneshot;

    type Numbers = Flights<u8, Option<u32>>;

    /// A flight to `key` whose result is sent later, or the one there is.
    fn board(flights: &Numbers, key: u8) -> (Flight<Option<u32>>, Option<oneshot::Sender<u32>>) {
        let (sender, receiver) = oneshot::channel();
        let start = || Ok::<_, Infallible>(async move { receiver.await.ok() }.boxed());
        match flights.board(key, || None::<()>, start) {
            Ok(Boarding::Started(flight)) => (flight, Some(sender)),
            Ok(Boarding::Joined(flight)) => (flight, None),
            _ => panic!("nothing is done instead"),
        }
    }

    #[tokio::test]
    async fn all_get_what_one_did() {
        let flights = Numbers::new();
        let (first, sender) = board(&flights, 1);
        let (second, none) = board(&flights, 1);
        assert!(none.is_none() && board(&flights, 2).1.is_some());
        sender.unwrap().send(7).unwrap();
        assert_eq!((first.await, second.await), (Some(7), Some(7)));
        assert!(lock(&flights.0).by_key.is_empty());
        assert!(board(&flights, 1).1.is_some());
    }

    #[tokio::test]
    async fn the_last_call_takes_the_work_with_it() {
        let flights = Numbers::new();
        let (mut first, sender) = board(&flights, 1);
        let sender = sender.unwrap();
        let (second, _) = board(&flights, 1);
        // The call that has driven the work so far goes; the other one drives it on.
        assert!((&mut first).now_or_never().is_none());
        drop(first);
        assert!(!sender.is_closed());
        drop(second);
        assert!(sender.is_closed() && lock(&flights.0).by_key.is_empty());
    }

    #[tokio::test]
    async fn another_call_drives_the_work_on() {
        let flights = Numbers::new();
        let (mut first, sender) = board(&flights, 1);
        let (second, _) = board(&flights, 1);
        assert!((&mut first).now_or_never().is_none());
        let second = tokio::spawn(second);
        drop(first);
        sender.unwrap().send(7).unwrap();
        assert_eq!(second.await.unwrap(), Some(7));
    }
}

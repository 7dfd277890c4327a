//! The work queue: which keys need a look, and when.
//!
//! [`state::QueueState`] is the queue as a value that is told the time; [`Queue`] shares one between tasks and waits.

use std::{
    fmt,
    sync::{Arc, Mutex},
};

use futures::{FutureExt, pin_mut, select_biased};
use tokio::{
    sync::Notify,
    time::{Instant, sleep_until},
};

pub use state::{Full, Next, QueueState};

use crate::{backoff::Backoff, env::SharedEnv, sync::lock};

mod state;

/// A [`QueueState`] that several tasks use. One task takes; any number add.
pub struct Queue<K> {
    shared: Arc<Shared<K>>,
}

struct Shared<K> {
    state: Mutex<QueueState<K>>,
    env: SharedEnv,
    /// Something may be ready sooner than the taker thinks.
    work: Notify,
    /// A key left; an adder may find room.
    room: Notify,
}

impl<K> Clone for Queue<K> {
    fn clone(&self) -> Self {
        Self { shared: Arc::clone(&self.shared) }
    }
}

impl<K> fmt::Debug for Queue<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Queue").finish_non_exhaustive()
    }
}

impl<K: Ord + Clone> Queue<K> {
    /// An empty queue for at most `capacity` different keys; failures wait by `backoff`.
    #[must_use]
    pub fn new(env: SharedEnv, capacity: usize, backoff: Backoff) -> Self {
        let state = Mutex::new(QueueState::new(capacity, backoff));
        Self { shared: Arc::new(Shared { state, env, work: Notify::new(), room: Notify::new() }) }
    }

    /// Adds a key that is due now, when there is room.
    ///
    /// # Errors
    /// [`Full`]: the key was not added.
    pub fn try_add(&self, key: K) -> Result<(), Full> {
        lock(&self.shared.state).add(key, Instant::now())?;
        self.shared.work.notify_one();
        Ok(())
    }

    /// Adds a key that is due now, behind all others that are, when there is room.
    ///
    /// # Errors
    /// [`Full`]: the key was not added.
    pub fn try_add_behind(&self, key: K) -> Result<(), Full> {
        lock(&self.shared.state).add_behind(key, Instant::now())?;
        self.shared.work.notify_one();
        Ok(())
    }

    /// Adds a key that is due now, as soon as there is room.
    pub async fn add(&self, key: K) {
        self.added(|| self.try_add(key.clone())).await;
    }

    /// Adds a key that is due now, behind all others that are, as soon as there is room.
    pub async fn add_behind(&self, key: K) {
        self.added(|| self.try_add_behind(key.clone())).await;
    }

    /// Tries again whenever a key leaves.
    async fn added(&self, add: impl Fn() -> Result<(), Full>) {
        loop {
            let room = self.shared.room.notified();
            pin_mut!(room);
            // Registered before the look at the state, so a key that leaves in between is not missed.
            room.as_mut().enable();
            if add().is_ok() {
                return;
            }
            room.await;
        }
    }

    /// Waits until a key is due; answers up to `limit` keys, each of which is now the caller's until [`Self::done`].
    ///
    /// Dropping the future loses nothing.
    pub async fn take(&self, limit: usize) -> Vec<K> {
        loop {
            let next = {
                let mut state = lock(&self.shared.state);
                let keys = state.take(Instant::now(), limit);
                if !keys.is_empty() {
                    return keys;
                }
                state.next_due()
            };
            match next {
                None => self.shared.work.notified().await,
                Some(due) => {
                    let (work, timer) = (self.shared.work.notified().fuse(), sleep_until(due).fuse());
                    pin_mut!(work, timer);
                    select_biased! { () = work => {}, () = timer => {} }
                }
            }
        }
    }

    /// Gives a taken key back.
    pub fn done(&self, key: &K, next: Next) {
        let random = self.shared.env.random_u64();
        lock(&self.shared.state).done(key, next, Instant::now(), random);
        self.shared.work.notify_one();
        self.shared.room.notify_waiters();
    }

    /// Keys that wait or are taken.
    #[must_use]
    pub fn len(&self) -> usize {
        lock(&self.shared.state).len()
    }

    /// True when no key waits or is taken.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::advance;

    use super::*;
    use crate::env::SeededEnv;

    const BACKOFF: Backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(60));

    fn queue(capacity: usize) -> (Queue<u32>, SharedEnv) {
        let env: SharedEnv = Arc::new(SeededEnv::new(1));
        (Queue::new(Arc::clone(&env), capacity, BACKOFF), env)
    }

    /// Lets a key wait for so many seconds.
    async fn later(queue: &Queue<u32>, key: u32, seconds: u64) {
        queue.add(key).await;
        assert_eq!(queue.take(1).await, [key]);
        queue.done(&key, Next::After(Duration::from_secs(seconds)));
    }

    #[tokio::test(start_paused = true)]
    async fn take_sleeps_until_the_first_key_is_due() {
        let (queue, _) = queue(10);
        let start = Instant::now();
        later(&queue, 1, 5).await;
        assert_eq!(queue.take(10).await, [1]);
        assert_eq!(start.elapsed(), Duration::from_secs(5));
    }

    #[tokio::test(start_paused = true)]
    async fn an_earlier_key_wakes_a_sleeping_taker() {
        let (queue, env) = queue(10);
        let start = Instant::now();
        later(&queue, 1, 500).await;
        let adder = queue.clone();
        let task = env.spawn(
            "adder",
            Box::pin(async move {
                tokio::time::sleep(Duration::from_secs(2)).await;
                adder.try_add(2).unwrap();
            }),
        );
        assert_eq!(queue.take(10).await, [2]);
        assert_eq!(start.elapsed(), Duration::from_secs(2));
        task.join().await;
    }

    #[tokio::test(start_paused = true)]
    async fn add_waits_for_room() {
        let (queue, env) = queue(1);
        queue.add(1).await;
        assert_eq!(queue.try_add(2), Err(Full));
        queue.try_add(1).expect("a key that is in the queue needs no room");
        let adder = queue.clone();
        let task = env.spawn("adder", Box::pin(async move { adder.add(2).await }));
        assert_eq!(queue.take(10).await, [1]);
        queue.done(&1, Next::Settled);
        task.join().await;
        assert_eq!(queue.take(10).await, [2]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_dropped_take_loses_no_key() {
        let (queue, _) = queue(10);
        assert!(queue.take(1).now_or_never().is_none());
        queue.try_add(1).unwrap();
        advance(Duration::from_secs(1)).await;
        assert_eq!(queue.take(1).now_or_never(), Some(vec![1]));
    }
}

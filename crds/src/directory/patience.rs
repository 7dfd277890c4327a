//! Deletions that have to wait: what a [`Directory`](super::Directory) promises of them, once for every source.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use futures::{
    FutureExt as _, StreamExt as _, pin_mut, select_biased,
    stream::{self, BoxStream},
};
use tokio::time::Instant;

use super::{Change, Changes};

/// How long a deletion waits: Cilium's for node records.
pub const DELETE_DELAY: Duration = Duration::from_secs(30);

/// Which deletions wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Patience {
    /// All of them.
    Always,
    /// Those that are found out by a listing, and those after which nothing is left.
    AfterLoss,
}

/// Deletions that wait, because the thing may come back: another writer may be restarting, or the store was emptied.
///
/// While the source holds nothing at all no deletion falls due; [`Self::restart`] starts the wait again when it has come
/// back.
#[derive(Debug, Clone)]
pub struct DelayedDeletes<K> {
    delay: Duration,
    waiting: BTreeMap<K, Instant>,
}

impl<K: Ord + Clone> DelayedDeletes<K> {
    /// None yet; each will wait for so long.
    #[must_use]
    pub fn new(delay: Duration) -> Self {
        Self { delay, waiting: BTreeMap::new() }
    }

    /// Something is gone from the source since `now`. What waits already goes on waiting.
    pub fn schedule(&mut self, key: K, now: Instant) {
        self.waiting.entry(key).or_insert(now + self.delay);
    }

    /// It is back: true when it was waiting.
    pub fn cancel(&mut self, key: &K) -> bool {
        self.waiting.remove(key).is_some()
    }

    /// The source has come back from having nothing: every wait starts anew.
    pub fn restart(&mut self, now: Instant) {
        for due in self.waiting.values_mut() {
            *due = now + self.delay;
        }
    }

    /// Whether anything waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// When the next one falls due.
    #[must_use]
    pub fn next_due(&self) -> Option<Instant> {
        self.waiting.values().min().copied()
    }

    /// Takes out what is due. While the source is empty nothing is due before another full delay has passed.
    pub fn take_due(&mut self, now: Instant, source_is_empty: bool) -> Vec<K> {
        if source_is_empty {
            for due in self.waiting.values_mut() {
                *due = (*due).max(now + self.delay);
            }
            return Vec::new();
        }
        let due: Vec<K> = self.waiting.iter().filter(|(_, due)| **due <= now).map(|(key, _)| key.clone()).collect();
        for key in &due {
            self.waiting.remove(key);
        }
        due
    }
}

/// What a source holds, and what its subscriber still holds of what the source has lost.
#[derive(Debug, Clone)]
pub struct Presence<K> {
    patience: Patience,
    present: BTreeSet<K>,
    waiting: DelayedDeletes<K>,
}

impl<K: Ord + Clone> Presence<K> {
    /// Nothing is there yet.
    #[must_use]
    pub fn new(patience: Patience) -> Self {
        Self { patience, present: BTreeSet::new(), waiting: DelayedDeletes::new(DELETE_DELAY) }
    }

    /// It is there.
    pub fn put(&mut self, key: K, now: Instant) {
        self.waiting.cancel(&key);
        if self.present.is_empty() {
            self.waiting.restart(now);
        }
        self.present.insert(key);
    }

    /// A listing does not name it any more: its deletion waits.
    pub fn missing(&mut self, key: K, now: Instant) {
        self.present.remove(&key);
        self.waiting.schedule(key, now);
    }

    /// It was deleted in plain sight. The answer is true when that is told at once; otherwise it waits.
    pub fn deleted(&mut self, key: K, now: Instant) -> bool {
        let is_last = self.present.len() == 1 && self.present.contains(&key);
        if self.patience == Patience::Always || is_last {
            self.missing(key, now);
            return false;
        }
        self.present.remove(&key);
        true
    }
}

/// The changes of a source, with the deletions that wait. `step` makes changes of an update and says in [`Presence`]
/// what there is.
pub fn with_patience<U, K, V>(
    updates: BoxStream<'static, U>,
    patience: Patience,
    step: impl FnMut(U, &mut Presence<K>, Instant) -> Vec<Change<K, V>> + Send + 'static,
) -> Changes<K, V>
where
    U: Send + 'static,
    K: Ord + Clone + Send + 'static,
    V: Send + 'static,
{
    let follower = Follower { updates, presence: Presence::new(patience), step };
    stream::unfold(follower, Follower::next).flat_map(stream::iter).boxed()
}

struct Follower<U, K, S> {
    updates: BoxStream<'static, U>,
    presence: Presence<K>,
    step: S,
}

impl<U, K: Ord + Clone, S> Follower<U, K, S> {
    async fn next<V>(mut self) -> Option<(Vec<Change<K, V>>, Self)>
    where
        S: FnMut(U, &mut Presence<K>, Instant) -> Vec<Change<K, V>>,
    {
        loop {
            let due = self.presence.waiting.next_due();
            let timer = async {
                match due {
                    Some(time) => tokio::time::sleep_until(time).await,
                    None => std::future::pending().await,
                }
            };
            let update = {
                let timer = timer.fuse();
                pin_mut!(timer);
                select_biased! {
                    update = self.updates.next().fuse() => Some(update?),
                    () = timer => None,
                }
            };
            let now = Instant::now();
            let changes = match update {
                Some(update) => (self.step)(update, &mut self.presence, now),
                None => {
                    let is_empty = self.presence.present.is_empty();
                    self.presence.waiting.take_due(now, is_empty).into_iter().map(Change::Delete).collect()
                }
            };
            if !changes.is_empty() {
                return Some((changes, self));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_deletion_waits_and_is_cancelled_by_a_return() {
        let mut deletes = DelayedDeletes::new(Duration::from_secs(30));
        let start = Instant::now();
        let at = |s| start + Duration::from_secs(s);
        deletes.schedule("a", at(0));
        deletes.schedule("b", at(10));
        deletes.schedule("a", at(20));
        assert_eq!(deletes.next_due(), Some(at(30)));
        assert!(deletes.take_due(at(29), false).is_empty());
        assert_eq!(deletes.take_due(at(30), false), ["a"]);
        assert!(deletes.cancel(&"b") && !deletes.cancel(&"b"));
        assert!(deletes.take_due(at(99), false).is_empty() && deletes.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_is_due_while_the_source_is_empty() {
        let mut deletes = DelayedDeletes::new(Duration::from_secs(30));
        let start = Instant::now();
        let at = |s| start + Duration::from_secs(s);
        deletes.schedule("a", at(0));
        assert!(deletes.take_due(at(1000), true).is_empty());
        assert_eq!(deletes.next_due(), Some(at(1030)), "the source is looked at again then");
        deletes.restart(at(1020));
        assert!(deletes.take_due(at(1049), false).is_empty());
        assert_eq!(deletes.take_due(at(1050), false), ["a"]);
    }

    #[tokio::test(start_paused = true)]
    async fn what_goes_in_plain_sight_is_told_at_once_unless_it_is_the_last() {
        let now = Instant::now();
        let mut presence = Presence::new(Patience::AfterLoss);
        presence.put("a", now);
        presence.put("b", now);
        assert!(presence.deleted("a", now));
        assert!(!presence.deleted("b", now));
        let mut presence = Presence::new(Patience::Always);
        presence.put("a", now);
        presence.put("b", now);
        assert!(!presence.deleted("a", now));
    }
}

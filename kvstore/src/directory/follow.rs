//! From keys to records: one subscription, with the deletions that have to wait.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use basal_crds::directory::{Change, Changes};
use futures::{
    FutureExt, StreamExt, pin_mut, select_biased,
    stream::{self, BoxStream},
};
use tokio::time::Instant;

use crate::{
    kv::{KeyValue, WatchEvent},
    list_watch::{DelayedDeletes, ListWatch, Update, list_watch},
    session::Session,
};

/// How long a deletion waits: Cilium's for node records.
const DELETE_DELAY: Duration = Duration::from_secs(30);

/// Which deletions wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Patience {
    /// All of them.
    Always,
    /// Those that are found out by a listing, and those after which nothing is left.
    AfterLoss,
}

/// Follows keys as records. `read` makes a record of a key and its value, `key_of` the name of a key alone. `seen` hears
/// at once what stands at a key, or that nothing does, however long the subscriber has to wait for the news.
pub(super) fn follow<K, V>(
    session: &Session,
    what: ListWatch,
    patience: Patience,
    read: fn(&KeyValue) -> Result<(K, V), String>,
    key_of: fn(&str) -> Option<K>,
    seen: impl Fn(&str, Option<(&K, &V)>) + Send + 'static,
) -> Changes<K, V>
where
    K: Ord + Clone + Send + 'static,
    V: Send + 'static,
{
    let updates = list_watch(Arc::clone(session.env()), Arc::clone(session.kv()), what);
    let follower = Follower {
        updates,
        patience,
        read,
        key_of,
        seen: Box::new(seen),
        present: BTreeSet::new(),
        waiting: DelayedDeletes::new(DELETE_DELAY),
    };
    stream::unfold(follower, Follower::next).flat_map(stream::iter).boxed()
}

type Seen<K, V> = Box<dyn Fn(&str, Option<(&K, &V)>) + Send>;

struct Follower<K, V> {
    updates: BoxStream<'static, Update>,
    patience: Patience,
    read: fn(&KeyValue) -> Result<(K, V), String>,
    key_of: fn(&str) -> Option<K>,
    seen: Seen<K, V>,
    /// What the source holds.
    present: BTreeSet<K>,
    /// What the subscriber has and the source has not.
    waiting: DelayedDeletes<K>,
}

impl<K: Ord + Clone, V> Follower<K, V> {
    async fn next(mut self) -> Option<(Vec<Change<K, V>>, Self)> {
        let changes = loop {
            let due = self.waiting.next_due();
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
                None => self.waiting.take_due(now, self.present.is_empty()).into_iter().map(Change::Delete).collect(),
                Some(Update::Interrupted(error)) => vec![Change::Stale(error.to_string())],
                Some(Update::Listed(listing)) => {
                    let mut changes: Vec<_> = listing.changed.iter().map(|kv| self.put(kv, now)).collect();
                    for key in &listing.missing {
                        self.delete_later(key, now);
                    }
                    changes.push(Change::InSync);
                    changes
                }
                Some(Update::Changed(batch)) => {
                    let changes = batch.events.iter().filter_map(|event| match event {
                        WatchEvent::Put(kv) => Some(self.put(kv, now)),
                        WatchEvent::Delete { key, .. } => self.delete(key, now),
                    });
                    changes.collect()
                }
            };
            if !changes.is_empty() {
                break changes;
            }
        };
        Some((changes, self))
    }

    fn put(&mut self, kv: &KeyValue, now: Instant) -> Change<K, V> {
        match (self.read)(kv) {
            Ok((key, value)) => {
                (self.seen)(&kv.key, Some((&key, &value)));
                self.is_present(key.clone(), now);
                Change::Upsert(key, value)
            }
            Err(problem) => {
                // A record that cannot be read is there all the same.
                if let Some(key) = (self.key_of)(&kv.key) {
                    self.is_present(key, now);
                }
                Change::Invalid { name: kv.key.clone(), problem }
            }
        }
    }

    fn is_present(&mut self, key: K, now: Instant) {
        self.waiting.cancel(&key);
        if self.present.is_empty() {
            self.waiting.restart(now);
        }
        self.present.insert(key);
    }

    fn delete_later(&mut self, key: &str, now: Instant) {
        (self.seen)(key, None);
        if let Some(key) = (self.key_of)(key) {
            self.present.remove(&key);
            self.waiting.schedule(key, now);
        }
    }

    fn delete(&mut self, key: &str, now: Instant) -> Option<Change<K, V>> {
        let name = (self.key_of)(key)?;
        let is_last = self.present.len() == 1 && self.present.contains(&name);
        if self.patience == Patience::Always || is_last {
            self.delete_later(key, now);
            return None;
        }
        (self.seen)(key, None);
        self.present.remove(&name);
        Some(Change::Delete(name))
    }
}

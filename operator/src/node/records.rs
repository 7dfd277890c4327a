//! The node records in etcd, as a view that a watch keeps.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex},
};

use basal_kvstore::{
    kv::{KeyValue, Revision, WatchEvent},
    list_watch::Update,
};
use basal_runtime::sync::lock;
use tokio::sync::{Notify, watch};

/// One record as it stands in etcd.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// Its text.
    pub value: Vec<u8>,
    /// The revision that wrote it.
    pub mod_revision: Revision,
}

/// The records of one cluster, by the part of the key behind the prefix. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct Records {
    state: Arc<Mutex<State>>,
    more: Arc<Notify>,
    synced: Arc<watch::Sender<bool>>,
}

#[derive(Debug, Default)]
struct State {
    records: BTreeMap<String, Seen>,
    /// Every change up to this revision is in `records`.
    revision: Revision,
    /// Names whose record changed since they were last asked for.
    changed: BTreeSet<String>,
}

impl Records {
    /// The records of a store that has none: listed, and empty for ever.
    #[must_use]
    pub fn none() -> Self {
        let records = Self::default();
        records.synced.send_replace(true);
        records
    }

    /// Takes what a watch says.
    pub fn apply(&self, prefix: &str, update: Update) {
        let mut state = lock(&self.state);
        let name = |key: &str| key.strip_prefix(prefix).unwrap_or(key).to_owned();
        match update {
            Update::Interrupted(_) => {}
            Update::Listed(listing) => {
                for kv in listing.changed {
                    state.put(name(&kv.key), kv);
                }
                for key in listing.missing {
                    state.remove(name(&key));
                }
                state.revision = listing.header.revision;
                self.synced.send_replace(true);
            }
            Update::Changed(batch) => {
                for event in batch.events {
                    match event {
                        WatchEvent::Put(kv) => {
                            state.put(name(&kv.key), kv);
                        }
                        WatchEvent::Delete { key, .. } => {
                            state.remove(name(&key));
                        }
                    }
                }
                state.revision = batch.header.revision;
            }
        }
        self.more.notify_one();
    }

    /// Waits for names whose record changed; answers all that there are. For one consumer.
    pub async fn changes(&self) -> BTreeSet<String> {
        loop {
            let changed = std::mem::take(&mut lock(&self.state).changed);
            if !changed.is_empty() {
                return changed;
            }
            self.more.notified().await;
        }
    }

    /// Whether the records were listed.
    #[must_use]
    pub fn synced(&self) -> bool {
        *self.synced.borrow()
    }

    /// Waits until the records were listed.
    pub async fn wait_synced(&self) {
        let mut synced = self.synced.subscribe();
        // The only error is that the sender is gone, and `self` holds it.
        synced.wait_for(|synced| *synced).await.map(drop).unwrap_or_default();
    }

    /// One record.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<Seen> {
        lock(&self.state).records.get(name).cloned()
    }

    /// The names of all records.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        lock(&self.state).records.keys().cloned().collect()
    }

    /// Mends one record of which the watch did not tell; `None` is one that is gone.
    pub(crate) fn correct(&self, name: String, found: Option<KeyValue>) {
        let mut state = lock(&self.state);
        match found {
            Some(kv) => state.put(name, kv),
            None => state.remove(name),
        }
        self.more.notify_one();
    }

    /// Whether every change up to a revision is in the view.
    #[must_use]
    pub fn has_seen(&self, revision: Revision) -> bool {
        lock(&self.state).revision >= revision
    }
}

impl State {
    fn put(&mut self, name: String, kv: KeyValue) {
        self.records.insert(name.clone(), Seen { value: kv.value, mod_revision: kv.mod_revision });
        self.changed.insert(name);
    }

    fn remove(&mut self, name: String) {
        self.records.remove(&name);
        self.changed.insert(name);
    }
}

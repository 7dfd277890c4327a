//! The store under both faces: keys in order, one revision counter, a log of changes, compaction.
//!
//! Semantics: etcd API v3, "Revisions", "Compaction" and "Transaction". A store starts at revision 1; each batch of
//! writes that changes anything raises the revision by one. Nothing here waits or knows the time.

use std::collections::BTreeMap;

use basal_kvstore::kv::{LeaseId, Revision};

/// A value with the counters that etcd keeps for its key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored<V> {
    /// The value.
    pub value: V,
    /// The revision that created the key.
    pub create_revision: Revision,
    /// The revision that wrote the key last.
    pub mod_revision: Revision,
    /// How often the key was written since it was created.
    pub version: i64,
    /// The lease of the key, or 0.
    pub lease: LeaseId,
}

/// One key's change in one revision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change<V> {
    /// The revision that made the change.
    pub revision: Revision,
    /// The key.
    pub key: String,
    /// What stood there before; `None` for a new key.
    pub before: Option<Stored<V>>,
    /// What stands there since; `None` for a deleted key.
    pub after: Option<Stored<V>>,
}

/// A revision that cannot be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NoSuchRevision {
    /// Compacted away.
    #[error("revision {0} is compacted away")]
    Compacted(Revision),
    /// Not reached yet.
    #[error("revision {0} is in the future")]
    Future(Revision),
}

/// The store. `V` should be cheap to clone, because the log keeps old values.
#[derive(Debug, Clone)]
pub struct Store<V> {
    revision: Revision,
    compacted: Revision,
    live: BTreeMap<String, Stored<V>>,
    log: Vec<Change<V>>,
}

impl<V> Default for Store<V> {
    fn default() -> Self {
        Self { revision: 1, compacted: 0, live: BTreeMap::new(), log: Vec::new() }
    }
}

impl<V: Clone> Store<V> {
    /// The revision of the last change.
    pub fn revision(&self) -> Revision {
        self.revision
    }

    /// A key as it is now.
    pub fn get(&self, key: &str) -> Option<&Stored<V>> {
        self.live.get(key)
    }

    /// The keys that start with `prefix`, from `from` on, as they are now, in ascending order of bytes.
    pub fn scan<'a>(&'a self, prefix: &'a str, from: &str) -> impl Iterator<Item = (&'a str, &'a Stored<V>)> {
        self.live
            .range(prefix.max(from).to_owned()..)
            .take_while(move |(key, _)| key.starts_with(prefix))
            .map(|(key, stored)| (key.as_str(), stored))
    }

    /// The store as it was at an earlier revision, without a log.
    ///
    /// # Errors
    /// When that revision is compacted away or not reached yet.
    pub fn at(&self, revision: Revision) -> Result<Self, NoSuchRevision> {
        if revision > self.revision {
            return Err(NoSuchRevision::Future(revision));
        }
        if revision < self.compacted {
            return Err(NoSuchRevision::Compacted(revision));
        }
        let mut live = self.live.clone();
        for change in self.log.iter().rev().take_while(|change| change.revision > revision) {
            match &change.before {
                Some(stored) => live.insert(change.key.clone(), stored.clone()),
                None => live.remove(&change.key),
            };
        }
        Ok(Self { revision, compacted: revision, live, log: Vec::new() })
    }

    /// The store as it was at an earlier revision, with its log: what a snapshot of that moment holds.
    ///
    /// # Errors
    /// When that revision is compacted away or not reached yet.
    pub fn snapshot_at(&self, revision: Revision) -> Result<Self, NoSuchRevision> {
        let end = self.log.partition_point(|change| change.revision <= revision);
        Ok(Self { compacted: self.compacted, log: self.log[..end].to_vec(), ..self.at(revision)? })
    }

    /// Every change from a revision on, that one included, oldest first.
    ///
    /// # Errors
    /// When changes of that revision are compacted away. A future revision is fine: nothing has happened there yet.
    pub fn changes_since(&self, from: Revision) -> Result<&[Change<V>], NoSuchRevision> {
        if from < self.compacted {
            return Err(NoSuchRevision::Compacted(from));
        }
        let first = self.log.partition_point(|change| change.revision < from);
        Ok(&self.log[first..])
    }

    /// Forgets what was before a revision; that revision itself stays readable.
    ///
    /// # Errors
    /// When it is compacted already, or not reached yet.
    pub fn compact(&mut self, revision: Revision) -> Result<(), NoSuchRevision> {
        if revision > self.revision {
            return Err(NoSuchRevision::Future(revision));
        }
        if revision <= self.compacted {
            return Err(NoSuchRevision::Compacted(revision));
        }
        self.compacted = revision;
        self.log.retain(|change| change.revision >= revision);
        Ok(())
    }

    /// Begins a batch of writes that share one revision.
    pub fn write(&mut self) -> Batch<'_, V> {
        let revision = self.revision + 1;
        Batch { store: self, revision }
    }
}

/// Writes that share one revision. The revision is used up only when something changes.
#[derive(Debug)]
pub struct Batch<'a, V> {
    store: &'a mut Store<V>,
    revision: Revision,
}

impl<V: Clone> Batch<'_, V> {
    /// The store as it is within the batch: earlier writes are visible.
    pub fn store(&self) -> &Store<V> {
        self.store
    }

    /// The revision that the writes get.
    pub fn revision(&self) -> Revision {
        self.revision
    }

    /// Writes a key.
    pub fn put(&mut self, key: &str, value: V, lease: LeaseId) {
        let before = self.store.live.get(key).cloned();
        let after = Stored {
            value,
            create_revision: before.as_ref().map_or(self.revision, |old| old.create_revision),
            mod_revision: self.revision,
            version: before.as_ref().map_or(1, |old| old.version + 1),
            lease,
        };
        self.store.live.insert(key.to_owned(), after.clone());
        self.record(key, before, Some(after));
    }

    /// Deletes a key; false when there was none.
    pub fn delete(&mut self, key: &str) -> bool {
        let Some(before) = self.store.live.remove(key) else { return false };
        self.record(key, Some(before), None);
        true
    }

    fn record(&mut self, key: &str, before: Option<Stored<V>>, after: Option<Stored<V>>) {
        self.store.revision = self.revision;
        self.store.log.push(Change { revision: self.revision, key: key.to_owned(), before, after });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(store: &Store<u8>) -> Vec<(String, u8)> {
        store.scan("", "").map(|(key, stored)| (key.to_owned(), stored.value)).collect()
    }

    #[test]
    fn an_earlier_revision_can_be_read_until_it_is_compacted() {
        let mut store = Store::default();
        store.write().put("a", 1, 0);
        store.write().put("a", 2, 0);
        let mut batch = store.write();
        batch.put("b", 3, 0);
        batch.delete("a");
        assert_eq!(store.revision(), 4);
        assert_eq!(keys(&store.at(2).unwrap()), [("a".to_owned(), 1)]);
        assert_eq!(keys(&store.at(3).unwrap()), [("a".to_owned(), 2)]);
        assert_eq!(keys(&store), [("b".to_owned(), 3)]);
        store.compact(3).unwrap();
        assert_eq!(store.at(2).unwrap_err(), NoSuchRevision::Compacted(2));
        assert_eq!(keys(&store.at(3).unwrap()), [("a".to_owned(), 2)]);
        assert_eq!(store.at(5).unwrap_err(), NoSuchRevision::Future(5));
        assert_eq!(store.changes_since(2).unwrap_err(), NoSuchRevision::Compacted(2));
        assert_eq!(store.changes_since(4).unwrap().len(), 2);
        assert_eq!(store.changes_since(9).unwrap(), []);
    }

    #[test]
    fn a_batch_that_changes_nothing_uses_no_revision() {
        let mut store = Store::<u8>::default();
        assert!(!store.write().delete("a"));
        assert_eq!(store.revision(), 1);
    }

    #[test]
    fn counters_start_anew_when_a_key_is_created_again() {
        let mut store = Store::default();
        store.write().put("a", 1, 0);
        store.write().put("a", 2, 7);
        let second = store.get("a").unwrap();
        assert_eq!((second.create_revision, second.mod_revision, second.version, second.lease), (2, 3, 2, 7));
        store.write().delete("a");
        store.write().put("a", 3, 0);
        let again = store.get("a").unwrap();
        assert_eq!((again.create_revision, again.mod_revision, again.version, again.lease), (5, 5, 1, 0));
    }

    #[test]
    fn a_scan_keeps_to_its_prefix_and_start() {
        let mut store = Store::default();
        for key in ["a", "b/1", "b/2", "b/3", "c"] {
            store.write().put(key, 0, 0);
        }
        let scan = |prefix, from| store.scan(prefix, from).map(|(key, _)| key).collect::<Vec<_>>().join(" ");
        assert_eq!(scan("b/", ""), "b/1 b/2 b/3");
        assert_eq!(scan("b/", "b/1\0"), "b/2 b/3");
        assert_eq!(scan("b/", "c"), "");
        assert_eq!(scan("", "b/3"), "b/3 c");
    }
}

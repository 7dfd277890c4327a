//! From keys to records: one subscription.

use std::sync::Arc;

use basal_crds::directory::{
    Change, Changes,
    patience::{Patience, Presence, with_patience},
};
use tokio::time::Instant;

use crate::{
    kv::{KeyValue, WatchEvent},
    list_watch::{ListWatch, Update, list_watch},
    session::Session,
};

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
    let reader = Reader { read, key_of, seen: Box::new(seen) };
    with_patience(updates, patience, move |update, presence, now| reader.take(update, presence, now))
}

type Seen<K, V> = Box<dyn Fn(&str, Option<(&K, &V)>) + Send>;

struct Reader<K, V> {
    read: fn(&KeyValue) -> Result<(K, V), String>,
    key_of: fn(&str) -> Option<K>,
    seen: Seen<K, V>,
}

impl<K: Ord + Clone, V> Reader<K, V> {
    fn take(&self, update: Update, presence: &mut Presence<K>, now: Instant) -> Vec<Change<K, V>> {
        match update {
            Update::Interrupted(error) => vec![Change::Stale(error.to_string())],
            Update::Listed(listing) => {
                let mut changes: Vec<_> = listing.changed.iter().map(|kv| self.put(kv, presence, now)).collect();
                for key in &listing.missing {
                    (self.seen)(key, None);
                    if let Some(key) = (self.key_of)(key) {
                        presence.missing(key, now);
                    }
                }
                changes.push(Change::InSync);
                changes
            }
            Update::Changed(batch) => {
                let changes = batch.events.iter().filter_map(|event| match event {
                    WatchEvent::Put(kv) => Some(self.put(kv, presence, now)),
                    WatchEvent::Delete { key, .. } => {
                        (self.seen)(key, None);
                        let name = (self.key_of)(key)?;
                        presence.deleted(name.clone(), now).then_some(Change::Delete(name))
                    }
                });
                changes.collect()
            }
        }
    }

    fn put(&self, kv: &KeyValue, presence: &mut Presence<K>, now: Instant) -> Change<K, V> {
        match (self.read)(kv) {
            Ok((key, value)) => {
                (self.seen)(&kv.key, Some((&key, &value)));
                presence.put(key.clone(), now);
                Change::Upsert(key, value)
            }
            Err(problem) => {
                // A record that cannot be read is there all the same.
                if let Some(key) = (self.key_of)(&kv.key) {
                    presence.put(key, now);
                }
                Change::Invalid { name: kv.key.clone(), problem }
            }
        }
    }
}

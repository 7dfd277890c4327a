//! From objects to what they say of nodes, addresses and identities: one subscription.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use basal_crds::directory::{
    Change, Changes,
    patience::{Patience, Presence, with_patience},
};
use tokio::time::Instant;

use crate::{
    cache::Version,
    object::{Object, ObjectKey, Resource},
    port::{ObjectEvent, Objects, Scope},
};

/// Follows what the objects of a kind say. `read` answers what one object says of what; of several objects that speak of
/// one thing the one that was written last counts. `seen` hears at once what is said of a thing, or that nothing is any
/// more, however long the subscriber has to wait for the news.
pub(super) fn follow<K, V>(
    objects: &dyn Objects,
    resource: Resource,
    patience: Patience,
    read: impl Fn(&Object) -> Result<Vec<(K, V)>, String> + Send + 'static,
    seen: impl Fn(&K, Option<&V>) + Send + 'static,
) -> Changes<K, V>
where
    K: Ord + Clone + Send + 'static,
    V: Clone + PartialEq + Send + 'static,
{
    let mut reader = Reader { sayings: Sayings::default(), listed: None, read, seen };
    with_patience(objects.watch(resource, &Scope::default()), patience, move |update, presence, now| match update {
        Ok(event) => reader.take(event, presence, now),
        Err(error) => vec![Change::Stale(error.to_string())],
    })
}

struct Reader<K, V, R, S> {
    sayings: Sayings<K, V>,
    /// While a list is under way: the objects that it named so far.
    listed: Option<BTreeSet<ObjectKey>>,
    read: R,
    seen: S,
}

/// How something is no longer said.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Gone {
    /// In plain sight.
    Seen,
    /// A list does not have it.
    Missing,
}

impl<K, V, R, S> Reader<K, V, R, S>
where
    K: Ord + Clone,
    V: Clone + PartialEq,
    R: Fn(&Object) -> Result<Vec<(K, V)>, String>,
    S: Fn(&K, Option<&V>),
{
    fn take(&mut self, event: ObjectEvent, presence: &mut Presence<K>, now: Instant) -> Vec<Change<K, V>> {
        match event {
            ObjectEvent::Restarted => {
                self.listed = Some(BTreeSet::new());
                Vec::new()
            }
            ObjectEvent::Listed(object) => {
                if let Some(listed) = &mut self.listed {
                    listed.insert(object.key());
                }
                self.put(&object, presence, now)
            }
            ObjectEvent::Applied(object) => self.put(&object, presence, now),
            ObjectEvent::Deleted(object) => {
                let differences = self.sayings.remove(&object.key());
                self.tell(differences, Gone::Seen, presence, now)
            }
            ObjectEvent::InSync => {
                let listed = self.listed.take().unwrap_or_default();
                let mut changes = Vec::new();
                for key in self.sayings.objects_beside(&listed) {
                    let differences = self.sayings.remove(&key);
                    changes.extend(self.tell(differences, Gone::Missing, presence, now));
                }
                changes.push(Change::InSync);
                changes
            }
        }
    }

    fn put(&mut self, object: &Object, presence: &mut Presence<K>, now: Instant) -> Vec<Change<K, V>> {
        let key = object.key();
        match (self.read)(object) {
            Ok(said) => {
                let differences = self.sayings.put(&key, &Version::new(object.resource_version()), said);
                self.tell(differences, Gone::Seen, presence, now)
            }
            Err(problem) => {
                // What it said before stands.
                self.sayings.note(&key);
                vec![Change::Invalid { name: format!("{} {key}", object.kind()), problem }]
            }
        }
    }

    fn tell(
        &self,
        differences: Vec<Difference<K, V>>,
        gone: Gone,
        presence: &mut Presence<K>,
        now: Instant,
    ) -> Vec<Change<K, V>> {
        let mut changes = Vec::new();
        for Difference { key, before, after } in differences {
            (self.seen)(&key, after.as_ref());
            match after {
                Some(value) => {
                    presence.put(key.clone(), now);
                    if before.as_ref() != Some(&value) {
                        changes.push(Change::Upsert(key, value));
                    }
                }
                None if gone == Gone::Missing => presence.missing(key, now),
                None if presence.deleted(key.clone(), now) => changes.push(Change::Delete(key)),
                None => {}
            }
        }
        changes
    }
}

/// What is said of a thing, before and after a change.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Difference<K, V> {
    key: K,
    before: Option<V>,
    after: Option<V>,
}

/// What one object says of a thing.
#[derive(Debug)]
struct Saying<V> {
    object: Arc<ObjectKey>,
    version: Version,
    value: V,
}

/// What all objects say.
#[derive(Debug)]
struct Sayings<K, V> {
    /// What each object speaks of.
    by_object: BTreeMap<Arc<ObjectKey>, Vec<K>>,
    /// Mostly one object each: an address that changes hands has two for a moment.
    by_key: BTreeMap<K, Vec<Saying<V>>>,
}

impl<K, V> Default for Sayings<K, V> {
    fn default() -> Self {
        Self { by_object: BTreeMap::new(), by_key: BTreeMap::new() }
    }
}

impl<K: Ord + Clone, V: Clone> Sayings<K, V> {
    /// What counts.
    fn value(&self, key: &K) -> Option<&V> {
        let newest = self.by_key.get(key)?.iter().max_by(|one, other| one.version.cmp(&other.version));
        newest.map(|saying| &saying.value)
    }

    /// An object says this now, and nothing else.
    fn put(&mut self, object: &ObjectKey, version: &Version, said: Vec<(K, V)>) -> Vec<Difference<K, V>> {
        self.change(object, Some(version), said)
    }

    /// An object is gone.
    fn remove(&mut self, object: &ObjectKey) -> Vec<Difference<K, V>> {
        self.change(object, None, Vec::new())
    }

    /// An object exists, whatever it says.
    fn note(&mut self, object: &ObjectKey) {
        if !self.by_object.contains_key(object) {
            self.by_object.insert(Arc::new(object.clone()), Vec::new());
        }
    }

    fn objects_beside(&self, listed: &BTreeSet<ObjectKey>) -> Vec<ObjectKey> {
        self.by_object.keys().filter(|key| !listed.contains(&***key)).map(|key| ObjectKey::clone(key)).collect()
    }

    fn change(&mut self, object: &ObjectKey, version: Option<&Version>, said: Vec<(K, V)>) -> Vec<Difference<K, V>> {
        let (name, earlier) = match self.by_object.remove_entry(object) {
            Some((name, earlier)) => (name, earlier),
            None => (Arc::new(object.clone()), Vec::new()),
        };
        let keys: BTreeSet<K> = earlier.iter().chain(said.iter().map(|(key, _)| key)).cloned().collect();
        let mut differences: Vec<Difference<K, V>> =
            keys.into_iter().map(|key| Difference { before: self.value(&key).cloned(), after: None, key }).collect();
        for key in earlier {
            if let Some(sayings) = self.by_key.get_mut(&key) {
                sayings.retain(|saying| saying.object != name);
                if sayings.is_empty() {
                    self.by_key.remove(&key);
                }
            }
        }
        if let Some(version) = version {
            let mut speaks_of = Vec::with_capacity(said.len());
            for (key, value) in said {
                speaks_of.push(key.clone());
                let saying = Saying { object: Arc::clone(&name), version: version.clone(), value };
                let sayings = self.by_key.entry(key).or_default();
                // Most things have one for ever, and there are tens of thousands of them.
                sayings.reserve_exact(1);
                sayings.push(saying);
            }
            self.by_object.insert(name, speaks_of);
        }
        for difference in &mut differences {
            difference.after = self.value(&difference.key).cloned();
        }
        differences
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Said = Vec<(&'static str, u32)>;

    fn put(sayings: &mut Sayings<&'static str, u32>, object: &str, version: &str, said: Said) -> Vec<(u32, u32)> {
        let differences = sayings.put(&ObjectKey::cluster(object), &Version::new(version), said);
        numbers(differences)
    }

    /// 0 stands for nothing.
    fn numbers(differences: Vec<Difference<&'static str, u32>>) -> Vec<(u32, u32)> {
        let number = |value: Option<u32>| value.unwrap_or_default();
        differences.into_iter().map(|d| (number(d.before), number(d.after))).collect()
    }

    #[test]
    fn the_object_that_was_written_last_counts_whatever_the_order_of_news() {
        let mut sayings = Sayings::default();
        assert_eq!(put(&mut sayings, "new", "10", vec![("ip", 2)]), [(0, 2)]);
        assert_eq!(put(&mut sayings, "old", "9", vec![("ip", 1)]), [(2, 2)]);
        assert_eq!(numbers(sayings.remove(&ObjectKey::cluster("old"))), [(2, 2)]);
        assert_eq!(put(&mut sayings, "old", "11", vec![("ip", 3)]), [(2, 3)]);
        assert_eq!(numbers(sayings.remove(&ObjectKey::cluster("old"))), [(3, 2)], "the other one still says so");
        assert_eq!(numbers(sayings.remove(&ObjectKey::cluster("new"))), [(2, 0)]);
        assert!(sayings.by_key.is_empty() && sayings.by_object.is_empty());
    }

    #[test]
    fn what_an_object_no_longer_says_is_gone() {
        let mut sayings = Sayings::default();
        put(&mut sayings, "a", "1", vec![("v4", 1), ("v6", 2)]);
        assert_eq!(put(&mut sayings, "a", "2", vec![("v4", 3)]), [(1, 3), (2, 0)]);
        assert_eq!(put(&mut sayings, "a", "3", vec![]), [(3, 0)]);
        let listed = BTreeSet::new();
        assert_eq!(sayings.objects_beside(&listed), [ObjectKey::cluster("a")], "it exists all the same");
    }
}

//! The copy as a value: a reducer over the events of a watch.

use std::{
    cmp::Ordering,
    collections::{BTreeMap, BTreeSet},
    fmt,
    sync::Arc,
};

use crate::{
    object::{Object, ObjectKey},
    port::ObjectEvent,
};

/// A resourceVersion. Those of one kind can be compared: they are decimal numbers that grow (Kubernetes 1.35, "Resource
/// versions are comparable"). One that is no number is older than every number.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Version(String);

impl Version {
    /// Takes a resourceVersion as it stands in an object.
    #[must_use]
    pub fn new(text: &str) -> Self {
        Self(text.to_owned())
    }

    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The digits without leading zeros; shorter ones are smaller numbers.
    fn number(&self) -> Option<&str> {
        let digits = !self.0.is_empty() && self.0.bytes().all(|byte| byte.is_ascii_digit());
        digits.then(|| self.0.trim_start_matches('0'))
    }
}

impl Ord for Version {
    fn cmp(&self, other: &Self) -> Ordering {
        let order = |version: &Self| version.number().map(|digits| (digits.len(), digits.to_owned()));
        order(self).cmp(&order(other)).then_with(|| self.0.cmp(&other.0))
    }
}

impl PartialOrd for Version {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What a parser made of an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Value<T> {
    /// What it returned.
    Valid(T),
    /// What is wrong with the object. It stays known: its owner must hear of it.
    Invalid(String),
}

/// What is kept of an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cached<T> {
    /// `metadata.uid`.
    pub uid: String,
    /// `metadata.resourceVersion`.
    pub version: Version,
    /// `metadata.generation`.
    pub generation: i64,
    /// Whether `metadata.deletionTimestamp` is set.
    pub deleting: bool,
    /// The object itself.
    pub value: Value<T>,
}

impl<T> Cached<T> {
    /// The object, when it is valid.
    #[must_use]
    pub fn valid(&self) -> Option<&T> {
        match &self.value {
            Value::Valid(value) => Some(value),
            Value::Invalid(_) => None,
        }
    }
}

/// Objects in the order of their keys.
#[derive(Debug, Clone)]
pub struct Store<T> {
    objects: BTreeMap<ObjectKey, Arc<Cached<T>>>,
    /// While a list is under way: the keys that it named so far.
    listed: Option<BTreeSet<ObjectKey>>,
    /// The newest version that an event carried.
    newest: Version,
}

impl<T> Default for Store<T> {
    fn default() -> Self {
        Self { objects: BTreeMap::new(), listed: None, newest: Version::default() }
    }
}

impl<T> Store<T> {
    /// Takes an event and answers the keys whose object it changed. A list replaces the copy by set difference: what it
    /// names is taken at once, and what it does not name goes when it is complete. A list that breaks off removes
    /// nothing.
    pub fn apply(&mut self, event: ObjectEvent, parse: impl Fn(&Object) -> Result<T, String>) -> BTreeSet<ObjectKey> {
        match event {
            ObjectEvent::Restarted => {
                self.listed = Some(BTreeSet::new());
                BTreeSet::new()
            }
            ObjectEvent::Listed(object) => {
                if let Some(listed) = &mut self.listed {
                    listed.insert(object.key());
                }
                self.put(&object, parse)
            }
            ObjectEvent::Applied(object) => self.put(&object, parse),
            ObjectEvent::Deleted(object) => {
                self.see(&Version::new(object.resource_version()));
                let key = object.key();
                self.objects.remove(&key).map(|_gone| key).into_iter().collect()
            }
            ObjectEvent::InSync => {
                let listed = self.listed.take().unwrap_or_default();
                let gone: BTreeSet<ObjectKey> =
                    self.objects.keys().filter(|key| !listed.contains(*key)).cloned().collect();
                self.objects.retain(|key, _| listed.contains(key));
                gone
            }
        }
    }

    fn put(&mut self, object: &Object, parse: impl Fn(&Object) -> Result<T, String>) -> BTreeSet<ObjectKey> {
        let (key, version) = (object.key(), Version::new(object.resource_version()));
        self.see(&version);
        if self.objects.get(&key).is_some_and(|known| known.uid == object.uid() && known.version == version) {
            return BTreeSet::new();
        }
        let cached = Cached {
            uid: object.uid().to_owned(),
            version,
            generation: object.generation(),
            deleting: object.is_deleting(),
            value: parse(object).map_or_else(Value::Invalid, Value::Valid),
        };
        self.objects.insert(key.clone(), Arc::new(cached));
        BTreeSet::from([key])
    }

    fn see(&mut self, version: &Version) {
        if *version > self.newest {
            self.newest = version.clone();
        }
    }

    /// One object.
    #[must_use]
    pub fn get(&self, key: &ObjectKey) -> Option<&Arc<Cached<T>>> {
        self.objects.get(key)
    }

    /// All objects, by key.
    pub fn iter(&self) -> impl Iterator<Item = (&ObjectKey, &Arc<Cached<T>>)> {
        self.objects.iter()
    }

    /// The valid objects, by key.
    pub fn valid(&self) -> impl Iterator<Item = (&ObjectKey, &T)> {
        self.objects.iter().filter_map(|(key, cached)| Some((key, cached.valid()?)))
    }

    /// Objects, invalid ones included.
    #[must_use]
    pub fn len(&self) -> usize {
        self.objects.len()
    }

    /// True when there is no object.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.objects.is_empty()
    }

    /// Whether the copy holds this version of the object or a newer one, or knows of a later change anywhere in the
    /// kind: events come in the order of their versions, so the object's own must have come before.
    #[must_use]
    pub fn has_seen(&self, key: &ObjectKey, version: &Version) -> bool {
        // While a list comes in, in the order of names, a later version says nothing of names that follow.
        let by_order = self.listed.is_none() && self.newest >= *version;
        by_order || self.objects.get(key).is_some_and(|known| known.version >= *version)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn object(name: &str, version: u64, spec: i64) -> Object {
        let metadata = json!({"name": name, "uid": name, "resourceVersion": version.to_string()});
        Object(json!({"metadata": metadata, "spec": spec}))
    }

    /// A negative number is no valid object.
    fn parse(object: &Object) -> Result<i64, String> {
        match object.0["spec"].as_i64() {
            Some(number) if number >= 0 => Ok(number),
            _ => Err("spec: must not be negative".to_owned()),
        }
    }

    fn names(keys: BTreeSet<ObjectKey>) -> Vec<String> {
        keys.into_iter().map(|key| key.name).collect()
    }

    #[test]
    fn versions_compare_as_numbers() {
        assert!(Version::new("10") > Version::new("9"));
        assert!(Version::new("18446744073709551616") > Version::new("18446744073709551615"));
        assert!(Version::new("1") > Version::new("opaque"));
        assert!(Version::new("1") > Version::new(""));
    }

    #[test]
    fn a_list_removes_what_it_does_not_name_and_only_when_it_is_complete() {
        let mut store = Store::default();
        for event in
            [ObjectEvent::Restarted, ObjectEvent::Listed(object("a", 1, 1)), ObjectEvent::Listed(object("b", 2, 1))]
        {
            store.apply(event, parse);
        }
        assert_eq!(names(store.apply(ObjectEvent::InSync, parse)), [""; 0]);
        // A list that breaks off, then a whole one.
        store.apply(ObjectEvent::Restarted, parse);
        assert_eq!(names(store.apply(ObjectEvent::Listed(object("a", 1, 1)), parse)), [""; 0]);
        store.apply(ObjectEvent::Restarted, parse);
        assert_eq!(store.len(), 2);
        assert_eq!(names(store.apply(ObjectEvent::Listed(object("c", 5, 1)), parse)), ["c"]);
        assert_eq!(names(store.apply(ObjectEvent::InSync, parse)), ["a", "b"]);
        assert_eq!(store.iter().map(|(key, _)| key.name.as_str()).collect::<Vec<_>>(), ["c"]);
    }

    #[test]
    fn an_invalid_object_is_kept_and_heals() {
        let mut store = Store::default();
        let key = ObjectKey::cluster("a");
        assert_eq!(names(store.apply(ObjectEvent::Applied(object("a", 1, 7)), parse)), ["a"]);
        assert_eq!(names(store.apply(ObjectEvent::Applied(object("a", 2, -7)), parse)), ["a"]);
        let cached = store.get(&key).unwrap();
        assert_eq!(cached.value, Value::Invalid("spec: must not be negative".into()));
        assert_eq!((store.len(), store.valid().count()), (1, 0));
        store.apply(ObjectEvent::Applied(object("a", 3, 8)), parse);
        assert_eq!(store.get(&key).unwrap().valid(), Some(&8));
        assert_eq!(names(store.apply(ObjectEvent::Deleted(object("a", 4, -8)), parse)), ["a"]);
        assert!(store.is_empty());
    }

    #[test]
    fn own_writes_are_seen_by_their_event_or_a_later_one() {
        let mut store = Store::default();
        let (a, written) = (ObjectKey::cluster("a"), Version::new("10"));
        store.apply(ObjectEvent::Applied(object("a", 9, 1)), parse);
        assert!(!store.has_seen(&a, &written));
        store.apply(ObjectEvent::Applied(object("b", 11, 1)), parse);
        assert!(store.has_seen(&a, &written));
        // In a list the order is that of names.
        let mut store = Store::default();
        store.apply(ObjectEvent::Restarted, parse);
        store.apply(ObjectEvent::Listed(object("0", 12, 1)), parse);
        assert!(!store.has_seen(&a, &written));
        store.apply(ObjectEvent::Listed(object("a", 10, 1)), parse);
        assert!(store.has_seen(&a, &written));
    }

    proptest! {
        /// Whatever came before, a complete list leaves exactly what it names, and the changed keys are the difference.
        #[test]
        fn a_complete_list_wins(before in prop::collection::btree_map("[a-d]", (1..9_u64, -1..3_i64), 0..4),
                                after in prop::collection::btree_map("[a-d]", (1..9_u64, -1..3_i64), 0..4)) {
            let mut store = Store::default();
            let list = |store: &mut Store<i64>, objects: &BTreeMap<String, (u64, i64)>| {
                let mut changed = store.apply(ObjectEvent::Restarted, parse);
                for (name, (version, spec)) in objects {
                    changed.extend(store.apply(ObjectEvent::Listed(object(name, *version, *spec)), parse));
                }
                changed.extend(store.apply(ObjectEvent::InSync, parse));
                changed
            };
            list(&mut store, &before);
            let changed = list(&mut store, &after);
            let held: BTreeMap<String, u64> = store.iter()
                .map(|(key, cached)| (key.name.clone(), cached.version.as_str().parse().unwrap())).collect();
            prop_assert_eq!(held, after.iter().map(|(name, (version, _))| (name.clone(), *version)).collect());
            let version = |objects: &BTreeMap<String, (u64, i64)>, name: &str| objects.get(name).map(|o| o.0);
            let differ: BTreeSet<String> = before.keys().chain(after.keys())
                .filter(|name| version(&before, name) != version(&after, name)).cloned().collect();
            prop_assert_eq!(names(changed).into_iter().collect::<BTreeSet<_>>(), differ);
        }
    }
}

//! What a control loop wrote last, so that it does not plan from before its own write.

use std::{collections::BTreeMap, time::Duration};

use tokio::time::Instant;

use super::{Cache, Version};
use crate::object::{Object, ObjectKey};

/// How long a write is waited for. An object that was deleted during a gap of the watch never shows it; going on is
/// safe, because every write carries the version that it was made from.
const PATIENCE: Duration = Duration::from_secs(30);

/// The last write to each object of one kind.
#[derive(Debug, Default)]
pub struct OwnWrites {
    writes: BTreeMap<ObjectKey, (Version, Instant)>,
}

impl OwnWrites {
    /// Remembers the answer to a write.
    pub fn record(&mut self, written: &Object, now: Instant) {
        self.writes.insert(written.key(), (Version::new(written.resource_version()), now));
    }

    /// Whether the cache has seen the last write to the object, or has had long enough.
    pub fn caught_up<T: Send + Sync + 'static>(&mut self, key: &ObjectKey, cache: &Cache<T>, now: Instant) -> bool {
        let behind =
            self.writes.get(key).is_some_and(|(version, at)| now < *at + PATIENCE && !cache.has_seen(key, version));
        if !behind {
            self.writes.remove(key);
        }
        !behind
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::{object::resources::NODE, port::ObjectEvent};

    fn node(version: u64) -> Object {
        Object(json!({"metadata": {"name": "a", "uid": "u", "resourceVersion": version.to_string()}}))
    }

    #[tokio::test(start_paused = true)]
    async fn a_write_is_waited_for_until_it_is_seen_or_too_long_ago() {
        let cache: Cache<()> = Cache::new(NODE, |_| Ok(()));
        let (key, now) = (ObjectKey::cluster("a"), Instant::now());
        let mut writes = OwnWrites::default();
        assert!(writes.caught_up(&key, &cache, now));
        writes.record(&node(5), now);
        assert!(!writes.caught_up(&key, &cache, now));
        cache.apply(ObjectEvent::Applied(node(4)));
        assert!(!writes.caught_up(&key, &cache, now));
        cache.apply(ObjectEvent::Applied(node(5)));
        assert!(writes.caught_up(&key, &cache, now));
        writes.record(&node(9), now);
        assert!(!writes.caught_up(&key, &cache, now + PATIENCE - Duration::from_millis(1)));
        assert!(writes.caught_up(&key, &cache, now + PATIENCE));
    }
}

//! An ordered copy of a kind's objects, kept by a watch, of which only what a parser returns stays in memory.
//!
//! [`store::Store`] is the copy as a value; [`Cache`] shares one and tells subscribers which keys changed.

use std::{
    collections::BTreeSet,
    fmt,
    sync::{Arc, Mutex, Weak},
};

use basal_runtime::{
    env::{Env, TaskHandle},
    readiness::Guard,
    sync::lock,
};
use futures::StreamExt;
use tokio::{sync::Notify, sync::watch};
use tracing::{debug, warn};

pub use own_writes::OwnWrites;
pub use store::{Cached, Store, Value, Version};

use crate::{
    object::{Object, ObjectKey, Resource},
    port::{ObjectEvent, Objects, ReadError, Scope},
};

mod own_writes;
mod store;

/// Reads what a cache keeps of an object; the error says which field is wrong.
pub type Parse<T> = fn(&Object) -> Result<T, String>;

/// A [`Store`] that a watch fills. Clones share it.
pub struct Cache<T> {
    shared: Arc<Shared<T>>,
}

struct Shared<T> {
    resource: Resource,
    parse: Parse<T>,
    store: Mutex<Store<T>>,
    synced: watch::Sender<bool>,
    failure: Mutex<Option<ReadError>>,
    subscribers: Mutex<Vec<Weak<Pending>>>,
}

/// The keys that one subscriber has not taken yet. It is a set, so a slow subscriber costs no more than the keys.
#[derive(Default)]
struct Pending {
    keys: Mutex<BTreeSet<ObjectKey>>,
    more: Notify,
}

impl Pending {
    fn add(&self, keys: impl IntoIterator<Item = ObjectKey>) {
        lock(&self.keys).extend(keys);
        self.more.notify_one();
    }
}

/// The changes of a cache, for one subscriber.
pub struct Changes {
    pending: Arc<Pending>,
}

impl Changes {
    /// Waits for changed keys; answers all that there are. Dropping the future loses none.
    pub async fn next(&self) -> BTreeSet<ObjectKey> {
        loop {
            let keys = std::mem::take(&mut *lock(&self.pending.keys));
            if !keys.is_empty() {
                return keys;
            }
            self.pending.more.notified().await;
        }
    }
}

impl fmt::Debug for Changes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Changes").field("pending", &lock(&self.pending.keys).len()).finish()
    }
}

impl<T> Clone for Cache<T> {
    fn clone(&self) -> Self {
        Self { shared: Arc::clone(&self.shared) }
    }
}

impl<T> fmt::Debug for Cache<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let store = lock(&self.shared.store);
        f.debug_struct("Cache").field("kind", &self.shared.resource.kind).field("objects", &store.len()).finish()
    }
}

impl<T: Send + Sync + 'static> Cache<T> {
    /// An empty cache that nothing fills yet.
    #[must_use]
    pub fn new(resource: Resource, parse: Parse<T>) -> Self {
        let shared = Shared {
            resource,
            parse,
            store: Mutex::new(Store::default()),
            synced: watch::Sender::new(false),
            failure: Mutex::new(None),
            subscribers: Mutex::new(Vec::new()),
        };
        Self { shared: Arc::new(shared) }
    }

    /// A cache that a task fills for as long as the task lives. `ready` holds from the first complete list on; later
    /// gaps do not take it back, since the copy stays usable.
    pub fn follow(
        objects: &dyn Objects,
        env: &dyn Env,
        resource: Resource,
        scope: &Scope,
        parse: Parse<T>,
        ready: Guard,
    ) -> (Self, TaskHandle) {
        let cache = Self::new(resource, parse);
        let (follower, mut events) = (cache.clone(), objects.watch(resource, scope));
        let task = env.spawn(
            resource.plural,
            Box::pin(async move {
                ready.not_ready("the first list is not complete");
                while let Some(event) = events.next().await {
                    match event {
                        Ok(event) => follower.apply(event),
                        Err(error) => follower.failed(error, &ready),
                    }
                    if follower.synced() {
                        ready.ready();
                    }
                }
            }),
        );
        (cache, task)
    }

    /// Takes one event of a watch.
    pub fn apply(&self, event: ObjectEvent) {
        let in_sync = event == ObjectEvent::InSync;
        let changed = lock(&self.shared.store).apply(event, self.shared.parse);
        if in_sync {
            *lock(&self.shared.failure) = None;
            debug!(kind = self.shared.resource.kind, objects = self.len(), "list complete");
            self.shared.synced.send_replace(true);
        }
        if !changed.is_empty() {
            lock(&self.shared.subscribers).retain(|subscriber| match subscriber.upgrade() {
                Some(pending) => {
                    pending.add(changed.iter().cloned());
                    true
                }
                None => false,
            });
        }
    }

    fn failed(&self, error: ReadError, ready: &Guard) {
        let mut last = lock(&self.shared.failure);
        if last.as_ref() != Some(&error) {
            warn!(kind = self.shared.resource.kind, %error, "watch failed; it is tried again");
            if !self.synced() {
                ready.not_ready(error.to_string());
            }
            *last = Some(error);
        }
    }

    /// Follows the changes. Every key that is known now comes first, so nothing is missed between a look and the first
    /// change.
    #[must_use]
    pub fn subscribe(&self) -> Changes {
        let pending = Arc::new(Pending::default());
        lock(&self.shared.subscribers).push(Arc::downgrade(&pending));
        pending.add(self.read(|store| store.iter().map(|(key, _)| key.clone()).collect::<Vec<_>>()));
        Changes { pending }
    }

    /// Whether a list was ever complete.
    #[must_use]
    pub fn synced(&self) -> bool {
        *self.shared.synced.borrow()
    }

    /// Waits until a list was complete.
    pub async fn wait_synced(&self) {
        let mut synced = self.shared.synced.subscribe();
        // The only error is that the sender is gone, and `self` holds it.
        synced.wait_for(|synced| *synced).await.map(drop).unwrap_or_default();
    }

    /// Why the watch does not work at the moment, if it does not.
    #[must_use]
    pub fn failure(&self) -> Option<ReadError> {
        lock(&self.shared.failure).clone()
    }

    /// Looks at the copy as a whole; the watch waits meanwhile.
    pub fn read<R>(&self, look: impl FnOnce(&Store<T>) -> R) -> R {
        look(&lock(&self.shared.store))
    }

    /// One object.
    #[must_use]
    pub fn get(&self, key: &ObjectKey) -> Option<Arc<Cached<T>>> {
        self.read(|store| store.get(key).cloned())
    }

    /// Objects, invalid ones included.
    #[must_use]
    pub fn len(&self) -> usize {
        self.read(Store::len)
    }

    /// True when there is no object.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether the copy holds what was written at this version of the object, or something newer.
    #[must_use]
    pub fn has_seen(&self, key: &ObjectKey, version: &Version) -> bool {
        self.read(|store| store.has_seen(key, version))
    }

    /// The kind.
    #[must_use]
    pub fn resource(&self) -> Resource {
        self.shared.resource
    }
}

#[cfg(test)]
mod tests {
    use basal_runtime::{env::SeededEnv, readiness::Readiness};
    use futures::{FutureExt, channel::mpsc, stream::BoxStream};
    use serde_json::json;

    use super::*;
    use crate::{
        object::resources::NODE,
        port::{MergePatch, Page, Preconditions, Refusal, Start},
    };
    use basal_runtime::outcome::Outcome;

    fn node(name: &str, version: u64) -> Object {
        let metadata = json!({"name": name, "uid": name, "resourceVersion": version.to_string()});
        Object(json!({"metadata": metadata}))
    }

    fn name(object: &Object) -> Result<String, String> {
        Ok(object.name().to_owned())
    }

    fn keys(names: &[&str]) -> BTreeSet<ObjectKey> {
        names.iter().map(|name| ObjectKey::cluster(*name)).collect()
    }

    #[tokio::test]
    async fn a_subscriber_first_gets_what_is_there_then_coalesced_changes() {
        let cache = Cache::new(NODE, name);
        cache.apply(ObjectEvent::Applied(node("a", 1)));
        let changes = cache.subscribe();
        assert_eq!(changes.next().await, keys(&["a"]));
        assert_eq!(changes.next().now_or_never(), None);
        cache.apply(ObjectEvent::Applied(node("b", 2)));
        cache.apply(ObjectEvent::Applied(node("b", 3)));
        cache.apply(ObjectEvent::Deleted(node("a", 4)));
        assert_eq!(changes.next().await, keys(&["a", "b"]));
    }

    /// A server that only watches, and says what the test tells it to.
    struct Told(Mutex<Option<mpsc::UnboundedReceiver<Result<ObjectEvent, ReadError>>>>);

    #[async_trait::async_trait]
    impl Objects for Told {
        async fn get(&self, _: Resource, _: &ObjectKey) -> Result<Option<Object>, ReadError> {
            Ok(None)
        }
        async fn list_page(&self, _: Resource, _: &Scope, _: &Start) -> Result<Page, ReadError> {
            Ok(Page { items: vec![], resource_version: String::new(), next: None })
        }
        fn watch(&self, _: Resource, _: &Scope) -> BoxStream<'static, Result<ObjectEvent, ReadError>> {
            lock(&self.0).take().unwrap().boxed()
        }
        async fn create(&self, _: Resource, _: Object) -> Outcome<Object, Refusal> {
            Outcome::Unknown(String::new())
        }
        async fn patch(&self, _: Resource, _: &ObjectKey, _: MergePatch) -> Outcome<Object, Refusal> {
            Outcome::Unknown(String::new())
        }
        async fn delete(&self, _: Resource, _: &ObjectKey, _: Preconditions) -> Outcome<(), Refusal> {
            Outcome::Unknown(String::new())
        }
    }

    #[tokio::test(start_paused = true)]
    async fn readiness_tells_why_the_first_list_is_missing_and_stays_after_it() {
        let (tell, told) = mpsc::unbounded();
        let (server, readiness) = (Told(Mutex::new(Some(told))), Readiness::new());
        let env = SeededEnv::new(1);
        let (cache, task) = Cache::follow(&server, &env, NODE, &Scope::default(), name, readiness.guard("node cache"));
        let forbidden = ReadError::Forbidden("no".into());
        tell.unbounded_send(Err(forbidden.clone())).unwrap();
        while cache.failure().is_none() {
            tokio::task::yield_now().await;
        }
        assert_eq!(readiness.pending()[0].reason, forbidden.to_string());
        for event in [ObjectEvent::Restarted, ObjectEvent::Listed(node("a", 1)), ObjectEvent::InSync] {
            tell.unbounded_send(Ok(event)).unwrap();
        }
        cache.wait_synced().await;
        readiness.ready().await;
        assert_eq!((cache.len(), cache.failure()), (1, None));
        tell.unbounded_send(Err(forbidden.clone())).unwrap();
        while cache.failure().is_none() {
            tokio::task::yield_now().await;
        }
        assert!(readiness.is_ready());
        drop(tell);
        task.join().await;
        assert!(!readiness.is_ready(), "a cache that nobody fills is not ready");
    }
}

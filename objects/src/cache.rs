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
use futures::{FutureExt as _, StreamExt as _, pin_mut, select_biased};
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

/// What a cache is a copy of, and who keeps it.
#[expect(missing_debug_implementations, reason = "holds trait objects")]
pub struct Source<'a, T> {
    /// Where the objects are.
    pub objects: &'a Arc<dyn Objects>,
    /// What runs the task that fills the cache.
    pub env: &'a dyn Env,
    /// Their kind.
    pub resource: Resource,
    /// Which of them.
    pub scope: Scope,
    /// What is kept of each.
    pub parse: Parse<T>,
    /// Holds from the first complete list on; later gaps do not take it back, since the copy stays usable.
    pub ready: Guard,
}

/// A [`Store`] that a watch fills. Clones share it.
pub struct Cache<T> {
    shared: Arc<Shared<T>>,
}

struct Shared<T> {
    resource: Resource,
    parse: Parse<T>,
    store: Mutex<Store<T>>,
    lists: watch::Sender<Lists>,
    failure: Mutex<Option<ReadError>>,
    subscribers: Mutex<Vec<Weak<Pending>>>,
}

/// The lists of a cache, counted from 1.
#[derive(Debug, Clone, Copy, Default)]
struct Lists {
    /// How many were asked for.
    asked: u64,
    /// The newest one that is complete; 0 before the first.
    complete: u64,
    /// The newest one that failed at least once.
    failed: u64,
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
            lists: watch::Sender::default(),
            failure: Mutex::new(None),
            subscribers: Mutex::new(Vec::new()),
        };
        Self { shared: Arc::new(shared) }
    }

    /// A cache that a task fills for as long as the task lives.
    pub fn follow(source: Source<'_, T>) -> (Self, TaskHandle) {
        let (cache, task) = Self::follow_when_asked(source);
        cache.ask();
        (cache, task)
    }

    /// The same for a cache that nothing is listed for before [`Cache::list`] or [`Cache::list_once`].
    pub fn follow_when_asked(source: Source<'_, T>) -> (Self, TaskHandle) {
        let Source { objects, env, resource, scope, parse, ready } = source;
        let cache = Self::new(resource, parse);
        ready.not_ready("nothing was listed yet");
        let fill = cache.clone().fill(Arc::clone(objects), scope, ready);
        let task = env.spawn(resource.plural, Box::pin(fill));
        (cache, task)
    }

    async fn fill(self, objects: Arc<dyn Objects>, scope: Scope, ready: Guard) {
        let mut lists = self.shared.lists.subscribe();
        loop {
            let list = lists.borrow_and_update().asked;
            if list == 0 {
                // The sender lives as long as `self`.
                lists.changed().await.unwrap_or_default();
                continue;
            }
            if !self.synced() {
                ready.not_ready("the first list is not complete");
            }
            let mut events = objects.watch(self.shared.resource, &scope);
            loop {
                let (again, event) = (lists.wait_for(|lists| lists.asked > list).fuse(), events.next().fuse());
                pin_mut!(again, event);
                let event = select_biased! { _newer = again => break, event = event => event };
                match event {
                    Some(Ok(event)) => self.take(event, list),
                    Some(Err(error)) => {
                        self.failed(error, &ready);
                        self.shared.lists.send_modify(|lists| lists.failed = list);
                    }
                    None => return,
                }
                if self.synced() {
                    ready.ready();
                }
            }
        }
    }

    /// Has everything listed anew, at quorum, and waits for it: then the copy is no older than this call.
    ///
    /// # Errors
    /// The list failed. It is tried again, as that of every watch, and so it may be complete later.
    pub async fn list(&self) -> Result<(), ReadError> {
        let list = self.ask();
        let mut lists = self.shared.lists.subscribe();
        let told = lists.wait_for(|lists| lists.complete >= list || lists.failed >= list).await;
        // The only error is that the sender is gone, and `self` holds it.
        let complete = told.is_ok_and(|lists| lists.complete >= list);
        match self.failure() {
            Some(error) if !complete => Err(error),
            _ => Ok(()),
        }
    }

    /// Asks for one more list.
    fn ask(&self) -> u64 {
        let mut list = 0;
        self.shared.lists.send_modify(|lists| {
            lists.asked += 1;
            list = lists.asked;
        });
        list
    }

    /// Has everything listed, unless that was asked for before.
    pub fn list_once(&self) {
        self.shared.lists.send_if_modified(|lists| {
            let first = lists.asked == 0;
            lists.asked += u64::from(first);
            first
        });
    }

    /// Takes one event that the watch did not deliver, or of a cache that nothing fills.
    pub fn apply(&self, event: ObjectEvent) {
        let lists = *self.shared.lists.borrow();
        self.take(event, if lists.asked == 0 { 1 } else { lists.complete });
    }

    /// Takes one event of the watch that began with a list.
    fn take(&self, event: ObjectEvent, list: u64) {
        let in_sync = event == ObjectEvent::InSync;
        let changed = lock(&self.shared.store).apply(event, self.shared.parse);
        if in_sync {
            *lock(&self.shared.failure) = None;
            debug!(kind = self.shared.resource.kind, objects = self.len(), "list complete");
            self.shared.lists.send_modify(|lists| lists.complete = list);
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
        self.shared.lists.borrow().complete > 0
    }

    /// Waits until a list was complete.
    pub async fn wait_synced(&self) {
        let mut lists = self.shared.lists.subscribe();
        // The only error is that the sender is gone, and `self` holds it.
        lists.wait_for(|lists| lists.complete > 0).await.map(drop).unwrap_or_default();
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
    use std::{collections::VecDeque, time::Duration};

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

    type Told = mpsc::UnboundedReceiver<Result<ObjectEvent, ReadError>>;
    type Tell = mpsc::UnboundedSender<Result<ObjectEvent, ReadError>>;

    /// A server that only watches, and says what the test tells it to: each watch what is next in the list.
    struct Server(Mutex<VecDeque<Told>>);

    fn server<const N: usize>() -> ([Tell; N], Arc<dyn Objects>) {
        let mut watches = VecDeque::new();
        let tell = std::array::from_fn(|_| {
            let (tell, told) = mpsc::unbounded();
            watches.push_back(told);
            tell
        });
        (tell, Arc::new(Server(Mutex::new(watches))))
    }

    #[async_trait::async_trait]
    impl Objects for Server {
        async fn get(&self, _: Resource, _: &ObjectKey) -> Result<Option<Object>, ReadError> {
            Ok(None)
        }
        async fn list_page(&self, _: Resource, _: &Scope, _: &Start) -> Result<Page, ReadError> {
            Ok(Page { items: vec![], resource_version: String::new(), next: None })
        }
        fn watch(&self, _: Resource, _: &Scope) -> BoxStream<'static, Result<ObjectEvent, ReadError>> {
            lock(&self.0).pop_front().unwrap().boxed()
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

    /// All nodes of a server.
    fn nodes<'a>(objects: &'a Arc<dyn Objects>, env: &'a SeededEnv, readiness: &Readiness) -> Source<'a, String> {
        let (scope, ready) = (Scope::default(), readiness.guard("node cache"));
        Source { objects, env, resource: NODE, scope, parse: name, ready }
    }

    #[tokio::test(start_paused = true)]
    async fn readiness_tells_why_the_first_list_is_missing_and_stays_after_it() {
        let ([tell], server) = server();
        let readiness = Readiness::new();
        let env = SeededEnv::new(1);
        let (cache, task) = Cache::follow(nodes(&server, &env, &readiness));
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

    #[tokio::test(start_paused = true)]
    async fn a_cache_that_is_asked_lists_anew_and_waits_for_that_list() {
        let ([first, second], server) = server();
        let (env, readiness) = (SeededEnv::new(1), Readiness::new());
        let (cache, _task) = Cache::follow_when_asked(nodes(&server, &env, &readiness));
        let listed = |tell: &Tell, names: &[&str]| {
            tell.unbounded_send(Ok(ObjectEvent::Restarted)).unwrap();
            for name in names {
                tell.unbounded_send(Ok(ObjectEvent::Listed(node(name, 1)))).unwrap();
            }
        };
        listed(&first, &["a", "b"]);
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!((cache.len(), readiness.is_ready()), (0, false), "nobody asked");

        cache.list_once();
        cache.list_once();
        while cache.len() < 2 {
            tokio::task::yield_now().await;
        }
        let mut anew = Box::pin(cache.list());
        assert_eq!(anew.as_mut().now_or_never(), None);
        // What the former watch still says does not count as the new list.
        let _gone = first.unbounded_send(Ok(ObjectEvent::InSync));
        listed(&second, &["b", "c"]);
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(anew.as_mut().now_or_never(), None, "the new list is not complete");
        second.unbounded_send(Ok(ObjectEvent::InSync)).unwrap();
        assert_eq!(anew.await, Ok(()));
        let names = cache.read(|store| store.iter().map(|(key, _)| key.name.clone()).collect::<Vec<_>>());
        assert_eq!(names, ["b", "c"]);
        readiness.ready().await;
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_waits_for_a_list_is_told_that_it_failed() {
        let ([first, second, third], server) = server();
        let (env, readiness) = (SeededEnv::new(1), Readiness::new());
        let (cache, _task) = Cache::follow(nodes(&server, &env, &readiness));
        let in_sync = [ObjectEvent::Restarted, ObjectEvent::InSync];
        in_sync.clone().into_iter().for_each(|event| first.unbounded_send(Ok(event)).unwrap());
        cache.wait_synced().await;
        let away = ReadError::Unavailable("away".into());
        second.unbounded_send(Err(away.clone())).unwrap();
        assert_eq!(cache.list().await, Err(away), "though an older list was complete");
        in_sync.into_iter().for_each(|event| third.unbounded_send(Ok(event)).unwrap());
        assert_eq!(cache.list().await, Ok(()));
    }
}

//! The Kubernetes face of the [store](crate::store): [`ModelObjects`], and what a test does to the server behind it.

mod kinds;
mod merge;
mod selector;
mod watch;
mod writes;

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use async_trait::async_trait;
use basal_kvstore::kv::Revision;
use basal_objects::{
    object::{Object, ObjectKey, Resource, resources},
    port::{MergePatch, ObjectEvent, Objects, Page, Preconditions, ReadError, Refusal, Scope, Start},
};
use basal_runtime::{env::SharedEnv, outcome::Outcome, sync::lock};
use futures::stream::BoxStream;
use serde_json::{Value, json};
use tokio::{sync::Notify, time::Instant};

use self::{kinds::Facts, selector::Selector, writes::Effect};
use crate::store::{NoSuchRevision, Store};

/// The namespaces that an API server makes for itself.
const NAMESPACES: [&str; 4] = ["default", "kube-node-lease", "kube-public", "kube-system"];

/// An API server without a network: every clone talks to the same server.
///
/// Calls answer at once; what goes wrong on the way, and how long the way takes, is [`crate::fault`]'s. It knows the
/// built-in kinds that Basal uses, and custom ones once their definition was created, which is established at once.
/// Not modelled: schemas (defaulting, pruning, validation, CEL), RBAC, server-side apply and managed fields, the graceful
/// end of pods and namespaces, and what controllers do; [`Self::collect_garbage`] stands in for one of them.
#[derive(Clone)]
pub struct ModelObjects {
    server: Arc<Server>,
}

struct Server {
    env: SharedEnv,
    state: Mutex<State>,
    /// Woken in the order of waiting; `tokio::sync::watch` would wake in a random one.
    changed: Notify,
}

#[derive(Debug, Clone, Default)]
struct State {
    store: Store<Arc<Value>>,
    /// Raised when all watches are cut.
    watch_epoch: u64,
    /// The cache that watches are served from, while it is behind.
    old_cache: Option<OldCache>,
}

/// A watch cache that stands still.
#[derive(Debug, Clone, Copy)]
struct OldCache {
    revision: Revision,
    until: Instant,
}

impl std::fmt::Debug for ModelObjects {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ModelObjects").field("revision", &self.revision()).finish_non_exhaustive()
    }
}

/// An object of the store with its resourceVersion.
fn stamped(value: &Value, revision: Revision) -> Object {
    let mut value = value.clone();
    if let Some(Value::Object(metadata)) = value.get_mut("metadata") {
        metadata.insert("resourceVersion".to_owned(), revision.to_string().into());
    }
    Object(value)
}

impl State {
    fn facts(&self, resource: &Resource) -> Result<Facts, ReadError> {
        let unknown = || ReadError::UnknownKind(format!("{} of {}", resource.kind, resource.api_version()));
        kinds::facts(&self.store, resource).ok_or_else(unknown)
    }

    fn writable(&self, resource: &Resource) -> Result<Facts, Refusal> {
        let missing = || Refusal::NotFound(format!("the server does not know {}", resource.plural));
        kinds::facts(&self.store, resource).ok_or_else(missing)
    }

    fn get(&self, key: &str) -> Option<Object> {
        self.store.get(key).map(|stored| stamped(&stored.value, stored.mod_revision))
    }

    fn existing(&self, resource: &Resource, key: &ObjectKey) -> Result<(String, Object), Refusal> {
        let path = kinds::key(resource, key.namespace.as_deref(), &key.name);
        let missing = || Refusal::NotFound(format!("{} {:?} not found", resource.plural, key.name));
        self.get(&path).map(|object| (path, object)).ok_or_else(missing)
    }

    fn list(&self, resource: &Resource, scope: &Scope) -> Result<Vec<Object>, ReadError> {
        self.facts(resource)?;
        let selector = Selector::parse(scope).map_err(|error| ReadError::Unavailable(error.to_string()))?;
        let prefix = kinds::key(resource, selector.namespace.as_deref(), "");
        let all = self.store.scan(&prefix, "").map(|(_, stored)| stamped(&stored.value, stored.mod_revision));
        Ok(all.filter(|object| selector.matches(object)).collect())
    }

    /// Puts an effect into the store; answers the object as it is then.
    fn take_effect(&mut self, path: &str, old: Option<Object>, effect: Effect) -> Object {
        let mut batch = self.store.write();
        let revision = batch.revision();
        match effect {
            Effect::Nothing => old.unwrap_or(Object(Value::Null)),
            Effect::Store(value) => {
                let object = stamped(&value, revision);
                batch.put(path, Arc::new(value), 0);
                object
            }
            Effect::Remove(value) => {
                batch.delete(path);
                stamped(&value, revision)
            }
        }
    }

    /// What the API server's own controllers do at once: a definition is established, or takes its objects with it.
    fn follow_definition(&mut self, object: &Object) {
        let path = kinds::key(&resources::CRD, None, object.name());
        let Some(stored) = self.store.get(&path) else {
            let text = |pointer| object.0.pointer(pointer).and_then(Value::as_str).unwrap_or_default();
            let prefix = format!("{}/{}/", text("/spec/group"), text("/spec/names/plural"));
            let doomed: Vec<String> = self.store.scan(&prefix, "").map(|(key, _)| key.to_owned()).collect();
            let mut batch = self.store.write();
            for key in doomed {
                batch.delete(&key);
            }
            return;
        };
        if stored.value.pointer("/status/conditions").is_some() {
            return;
        }
        let mut value = Value::clone(&stored.value);
        let condition = |kind: &str| json!({"type": kind, "status": "True", "reason": "NoConflicts"});
        value["status"] = json!({
            "conditions": [condition("NamesAccepted"), condition("Established")],
            "acceptedNames": value.pointer("/spec/names"),
        });
        self.store.write().put(&path, Arc::new(value), 0);
    }
}

impl ModelObjects {
    /// A server with the namespaces that it makes for itself. `env` gives it uids and creation times.
    #[must_use]
    pub fn new(env: SharedEnv) -> Self {
        let objects = Self { server: Arc::new(Server { env, state: Mutex::default(), changed: Notify::new() }) };
        for name in NAMESPACES {
            let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}});
            // Nothing stands in the way of these in an empty store.
            objects.create_now(&resources::NAMESPACE, Object(namespace)).map_or_else(drop, drop);
        }
        objects
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.server.state)
    }

    fn uid(&self) -> String {
        let high = self.server.env.random_u64();
        let low = self.server.env.random_u64();
        // RFC 9562 section 5.4: version 4, variant 10.
        let bits = (u128::from(high) << 64) | u128::from(low);
        let bits = (bits & !(0xf << 76) & !(0x3 << 62)) | (0x4 << 76) | (0x2 << 62);
        let hex = format!("{bits:032x}");
        let (a, rest) = hex.split_at(8);
        let (b, rest) = rest.split_at(4);
        let (c, rest) = rest.split_at(4);
        let (d, e) = rest.split_at(4);
        format!("{a}-{b}-{c}-{d}-{e}")
    }

    fn create_now(&self, resource: &Resource, object: Object) -> Result<Object, Refusal> {
        let mut state = self.state();
        let facts = state.writable(resource)?;
        let key = writes::check_new(resource, &object)?;
        if let Some(namespace) = &key.namespace
            && state.get(&kinds::key(&resources::NAMESPACE, None, namespace)).is_none()
        {
            return Err(Refusal::NotFound(format!("namespaces {namespace:?} not found")));
        }
        let path = kinds::key(resource, key.namespace.as_deref(), &key.name);
        if state.store.get(&path).is_some() {
            return Err(Refusal::AlreadyExists);
        }
        let value = writes::created(facts, object, self.uid(), self.server.env.now());
        let object = state.take_effect(&path, None, Effect::Store(value));
        self.changed(state, resource, &object);
        Ok(object)
    }

    pub(crate) fn patch_now(
        &self,
        resource: &Resource,
        key: &ObjectKey,
        patch: &MergePatch,
    ) -> Result<Object, Refusal> {
        let mut state = self.state();
        let facts = state.writable(resource)?;
        let (path, old) = state.existing(resource, key)?;
        let effect = writes::patched(facts, &old, patch)?;
        let object = state.take_effect(&path, Some(old), effect);
        self.changed(state, resource, &object);
        Ok(object)
    }

    fn delete_now(&self, resource: &Resource, key: &ObjectKey, only_if: &Preconditions) -> Result<(), Refusal> {
        let mut state = self.state();
        let facts = state.writable(resource)?;
        let (path, old) = state.existing(resource, key)?;
        let effect = writes::deleted(facts, &old, only_if, self.server.env.now())?;
        let object = state.take_effect(&path, Some(old), effect);
        self.changed(state, resource, &object);
        Ok(())
    }

    fn changed(&self, mut state: MutexGuard<'_, State>, resource: &Resource, object: &Object) {
        if *resource == resources::CRD {
            state.follow_definition(object);
        }
        drop(state);
        self.server.changed.notify_waiters();
    }

    /// The revision of the last change.
    #[must_use]
    pub fn revision(&self) -> Revision {
        self.state().store.revision()
    }

    /// Shows every object of a kind, by its key and the revision that wrote it last, without a copy.
    pub fn visit(&self, resource: &Resource, mut see: impl FnMut(&str, Revision, &Value)) {
        let state = self.state();
        let prefix = kinds::key(resource, None, "");
        state.store.scan(&prefix, "").for_each(|(key, stored)| see(key, stored.mod_revision, &stored.value));
    }

    /// Every object of a kind, as it is now; none when the kind is not known.
    #[must_use]
    pub fn all(&self, resource: &Resource) -> Vec<Object> {
        self.state().list(resource, &Scope::default()).unwrap_or_default()
    }

    /// Makes a custom kind known, without a schema. `status` gives it the status subresource.
    ///
    /// # Errors
    /// When a definition of this name exists.
    pub fn define(&self, resource: &Resource, status: bool) -> Result<Object, Refusal> {
        self.create_now(&resources::CRD, definition(resource, status))
    }

    /// Forgets the history before a revision: watches that are behind it list again.
    ///
    /// # Errors
    /// When it is compacted already, or not reached yet.
    pub fn compact(&self, revision: Revision) -> Result<(), NoSuchRevision> {
        self.state().store.compact(revision)?;
        self.server.changed.notify_waiters();
        Ok(())
    }

    /// Breaks every open watch: each lists again.
    pub fn cut_watches(&self) {
        self.state().watch_epoch += 1;
        self.server.changed.notify_waiters();
    }

    /// Breaks every open watch: each lists again, at an API server whose cache is so many changes behind and stays there
    /// for a while. Reads and lists go to the store, as ever.
    pub fn fail_over(&self, changes: Revision, stays: Duration) {
        let mut state = self.state();
        let revision = (state.store.revision() - changes).max(1);
        // A history that does not reach back so far has no older state to show.
        let known = state.store.changes_since(revision).is_ok();
        state.old_cache = known.then(|| OldCache { revision, until: Instant::now() + stays });
        state.watch_epoch += 1;
        drop(state);
        self.server.changed.notify_waiters();
    }

    /// Deletes what names only owners that are gone, as kube-controller-manager's garbage collector does in the
    /// background; answers how many objects that were.
    pub fn collect_garbage(&self) -> usize {
        let mut state = self.state();
        let mut collected = 0;
        loop {
            let uids: BTreeSet<String> = state
                .store
                .scan("", "")
                .filter_map(|(_, stored)| stored.value.pointer("/metadata/uid")?.as_str().map(str::to_owned))
                .collect();
            let orphan = |value: &Value| {
                let owners = value.pointer("/metadata/ownerReferences").and_then(Value::as_array);
                let lives = |owner: &Value| owner.get("uid").and_then(Value::as_str).is_some_and(|u| uids.contains(u));
                owners.is_some_and(|owners| !owners.is_empty() && !owners.iter().any(lives))
            };
            let doomed: Vec<String> = state
                .store
                .scan("", "")
                .filter(|(_, stored)| orphan(&stored.value) && !stamped(&stored.value, 0).is_deleting())
                .map(|(key, _)| key.to_owned())
                .collect();
            if doomed.is_empty() {
                break;
            }
            for path in &doomed {
                let Some(old) = state.get(path) else { continue };
                // A kind that counts generations begins at 1.
                let facts = Facts { generation: old.generation() > 0, ..kinds::PLAIN };
                let effect = writes::doomed(facts, &old, self.server.env.now());
                state.take_effect(path, Some(old), effect);
            }
            collected += doomed.len();
        }
        drop(state);
        self.server.changed.notify_waiters();
        collected
    }
}

/// A CustomResourceDefinition that takes any `spec` and `status`.
pub(crate) fn definition(resource: &Resource, status: bool) -> Object {
    let open = json!({"type": "object", "x-kubernetes-preserve-unknown-fields": true});
    let subresources = if status { json!({"status": {}}) } else { json!({}) };
    Object(json!({
        "apiVersion": resources::CRD.api_version(),
        "kind": resources::CRD.kind,
        "metadata": {"name": format!("{}.{}", resource.plural, resource.group)},
        "spec": {
            "group": resource.group,
            "names": {"kind": resource.kind, "plural": resource.plural},
            "scope": if resource.namespaced { "Namespaced" } else { "Cluster" },
            "versions": [{
                "name": resource.version,
                "served": true,
                "storage": true,
                "schema": {"openAPIV3Schema": {"type": "object", "properties": {"spec": open, "status": open}}},
                "subresources": subresources,
            }],
        },
    }))
}

fn answer<T>(result: Result<T, Refusal>) -> Outcome<T, Refusal> {
    match result {
        Ok(value) => Outcome::Done(value),
        Err(refusal) => Outcome::Refused(refusal),
    }
}

#[async_trait]
impl Objects for ModelObjects {
    async fn get(&self, resource: Resource, key: &ObjectKey) -> Result<Option<Object>, ReadError> {
        let state = self.state();
        state.facts(&resource)?;
        Ok(state.get(&kinds::key(&resource, key.namespace.as_deref(), &key.name)))
    }

    /// One page holds everything.
    async fn list_page(&self, resource: Resource, scope: &Scope, _: &Start) -> Result<Page, ReadError> {
        let state = self.state();
        let items = state.list(&resource, scope)?;
        Ok(Page { items, resource_version: state.store.revision().to_string(), next: None })
    }

    fn watch(&self, resource: Resource, scope: &Scope) -> BoxStream<'static, Result<ObjectEvent, ReadError>> {
        watch::follow(self.clone(), resource, scope.clone())
    }

    async fn create(&self, resource: Resource, object: Object) -> Outcome<Object, Refusal> {
        answer(self.create_now(&resource, object))
    }

    async fn patch(&self, resource: Resource, key: &ObjectKey, patch: MergePatch) -> Outcome<Object, Refusal> {
        answer(self.patch_now(&resource, key, &patch))
    }

    async fn delete(&self, resource: Resource, key: &ObjectKey, only_if: Preconditions) -> Outcome<(), Refusal> {
        answer(self.delete_now(&resource, key, &only_if))
    }
}

#[cfg(test)]
mod tests {
    use basal_crds::{directory::Directory, names::Cluster};
    use basal_ipam::ledger::Ledger;
    use basal_objects::{
        directory::{DirectoryConfig, ObjectDirectory},
        ledger::ObjectLedger,
    };
    use basal_runtime::env::SeededEnv;

    use super::*;
    use crate::conformance::{
        self,
        directory::{self, DirectoryFixture, NODE_IP, OTHER_NODE_IP, ObjectsAdmin},
        ledger::LedgerFixture,
        objects::{ObjectsFixture, prepare},
    };

    #[tokio::test(start_paused = true)]
    async fn the_model_passes_the_conformance_suite() {
        let model: Arc<dyn Objects> = Arc::new(ModelObjects::new(Arc::new(SeededEnv::new(1))));
        prepare(&model).await.unwrap();
        let broken = conformance::run_all(&conformance::objects::cases(), async |case| {
            ObjectsFixture::new(Arc::clone(&model), case).await
        })
        .await;
        assert!(broken.is_empty(), "{broken:#?}");
    }

    #[tokio::test(start_paused = true)]
    async fn the_object_directory_passes_its_suite_on_the_model() {
        let env: SharedEnv = Arc::new(SeededEnv::new(1));
        let model: Arc<dyn Objects> = Arc::new(ModelObjects::new(Arc::clone(&env)));
        directory::prepare(&model).await.unwrap();
        let mut number = 0;
        let broken = conformance::run_all(&directory::cases(), async |_| {
            number += 1;
            let open = |ip: &str| -> Arc<dyn Directory> {
                let config = DirectoryConfig { cluster: Cluster::default(), node_ips: vec![ip.parse().unwrap()] };
                Arc::new(ObjectDirectory::start(&env, Arc::clone(&model), config))
            };
            let admin = Arc::new(ObjectsAdmin(Arc::clone(&model)));
            DirectoryFixture::new(open(NODE_IP), open(OTHER_NODE_IP), admin, number).await
        })
        .await;
        assert!(broken.is_empty(), "{broken:#?}");
    }

    #[tokio::test(start_paused = true)]
    async fn the_ledger_in_custom_resources_passes_its_suite_on_the_model() {
        let model = ModelObjects::new(Arc::new(SeededEnv::new(1)));
        model.define(&resources::LEDGER, true).unwrap();
        model.define(&resources::POD_CIDR_CELL, false).unwrap();
        let mut number = 0;
        let broken = conformance::run_all(&conformance::ledger::cases(), async |_| {
            number += 1;
            let cluster = format!("c{number}");
            let ledger = || -> Arc<dyn Ledger> { Arc::new(ObjectLedger::new(Arc::new(model.clone()), &cluster)) };
            Ok(LedgerFixture::new(ledger(), ledger()))
        })
        .await;
        assert!(broken.is_empty(), "{broken:#?}");
    }

    #[tokio::test(start_paused = true)]
    async fn garbage_is_what_names_only_owners_that_are_gone() {
        let model = ModelObjects::new(Arc::new(SeededEnv::new(1)));
        let node = |name: &str| Object(json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}}));
        let owner = model.create_now(&resources::NODE, node("owner")).unwrap();
        let stays = model.create_now(&resources::NODE, node("stays")).unwrap();
        for (name, owners) in [("both", vec![owner.uid(), stays.uid()]), ("one", vec![owner.uid()])] {
            let mut object = node(name);
            object.0["metadata"]["ownerReferences"] = owners.iter().map(|uid| json!({ "uid": uid })).collect();
            model.create_now(&resources::NODE, object).unwrap();
        }
        assert_eq!(model.collect_garbage(), 0);
        let only_if =
            Preconditions { uid: owner.uid().to_owned(), resource_version: owner.resource_version().to_owned() };
        model.delete_now(&resources::NODE, &owner.key(), &only_if).unwrap();
        assert_eq!(model.collect_garbage(), 1);
        let left: Vec<String> = model.all(&resources::NODE).iter().map(|o| o.name().to_owned()).collect();
        assert_eq!(left, ["both", "stays"]);
    }
}

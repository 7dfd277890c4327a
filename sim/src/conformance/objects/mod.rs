//! What [`Objects`] promises.

mod deletes;
mod lists;
mod watches;
mod writes;

use std::sync::Arc;

use basal_objects::{
    object::{Object, ObjectKey, Resource, resources},
    port::{Freshness, MergePatch, ObjectEvent, Objects, Preconditions, Refusal, Scope},
};
use basal_runtime::outcome::Outcome;
use serde_json::{Value, json};

use super::{Case, Departure, Verdict, done, next, read};
use crate::objects::definition;

/// A custom kind in namespaces, with the status subresource.
const WIDGET: Resource =
    Resource { group: "conformance.basal.io", version: "v1", kind: "Widget", plural: "widgets", namespaced: true };

/// A custom kind without namespaces and without the status subresource.
const GADGET: Resource =
    Resource { group: "conformance.basal.io", version: "v1", kind: "Gadget", plural: "gadgets", namespaced: false };

/// A custom kind that nobody defines.
const PHANTOM: Resource =
    Resource { group: "conformance.basal.io", version: "v1", kind: "Phantom", plural: "phantoms", namespaced: false };

/// One case's view of an API server: a namespace of its own, and a name of its own for what has none.
#[expect(missing_debug_implementations, reason = "holds a trait object")]
pub struct ObjectsFixture {
    objects: Arc<dyn Objects>,
    namespace: String,
}

/// The suite. The API server must hold no objects of the conformance kinds; [`prepare`] defines these.
#[must_use]
pub fn cases() -> Vec<Case<ObjectsFixture>> {
    let mut all = writes::cases();
    all.extend(deletes::cases());
    all.extend(lists::cases());
    all.extend(watches::cases());
    all
}

/// Defines the kinds that the cases use, and waits until they can be used.
///
/// # Errors
/// When they cannot be defined.
pub async fn prepare(objects: &Arc<dyn Objects>) -> Verdict {
    define(objects, &WIDGET, true).await?;
    define(objects, &GADGET, false).await
}

async fn define(objects: &Arc<dyn Objects>, resource: &Resource, status: bool) -> Verdict {
    done("define a kind", objects.create(resources::CRD, definition(resource, status)).await)?;
    // A watch goes on after errors, so it gets there when the kind does.
    let mut watch = objects.watch(*resource, &Scope::default());
    while !matches!(next("the new kind", &mut watch).await?, Ok(ObjectEvent::InSync)) {}
    Ok(())
}

impl ObjectsFixture {
    /// A view for one case.
    ///
    /// # Errors
    /// When its namespace cannot be created.
    pub async fn new(objects: Arc<dyn Objects>, case: &str) -> Verdict<Self> {
        // RFC 1123 labels have at most 63 characters.
        let name: String = case.replace('_', "-").chars().take(60).collect();
        let namespace = name.trim_end_matches('-').to_owned();
        let object = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}});
        done("create a namespace", objects.create(resources::NAMESPACE, Object(object)).await)?;
        Ok(Self { objects, namespace })
    }

    fn key(&self, name: &str) -> ObjectKey {
        ObjectKey::namespaced(&self.namespace, name)
    }

    /// For kinds without namespaces: a name that only this case uses.
    fn own(&self) -> ObjectKey {
        ObjectKey::cluster(&self.namespace)
    }

    fn scope(&self) -> Scope {
        Scope { namespace: Some(self.namespace.clone()), ..Scope::default() }
    }

    async fn create(&self, resource: Resource, key: &ObjectKey, rest: Value) -> Verdict<Object> {
        done("create", self.objects.create(resource, object(&resource, key, rest)).await)
    }

    async fn widget(&self, name: &str) -> Verdict<Object> {
        self.create(WIDGET, &self.key(name), json!({"spec": {"size": 1}})).await
    }

    async fn patch(&self, resource: Resource, seen: &Object, body: Value) -> Outcome<Object, Refusal> {
        self.objects.patch(resource, &seen.key(), patch(seen, None, body)).await
    }

    async fn patch_status(&self, resource: Resource, seen: &Object, body: Value) -> Outcome<Object, Refusal> {
        self.objects.patch(resource, &seen.key(), patch(seen, Some("status"), body)).await
    }

    async fn delete(&self, resource: Resource, seen: &Object) -> Outcome<(), Refusal> {
        self.objects.delete(resource, &seen.key(), preconditions(seen)).await
    }

    async fn get(&self, resource: Resource, key: &ObjectKey) -> Verdict<Option<Object>> {
        read("get", self.objects.get(resource, key).await)
    }

    async fn existing(&self, resource: Resource, key: &ObjectKey) -> Verdict<Object> {
        self.get(resource, key).await?.ok_or_else(|| Departure(format!("{key} is gone")))
    }

    async fn names(&self, resource: Resource, scope: &Scope) -> Verdict<Vec<String>> {
        let list = read("list", self.objects.list(resource, scope, Freshness::Quorum).await)?;
        Ok(list.items.iter().map(|object| object.name().to_owned()).collect())
    }
}

/// An object of a kind under a key, with what `rest` says beside.
fn object(resource: &Resource, key: &ObjectKey, rest: Value) -> Object {
    let mut value = rest;
    value["apiVersion"] = resource.api_version().into();
    value["kind"] = resource.kind.into();
    value["metadata"]["name"] = key.name.clone().into();
    if let Some(namespace) = &key.namespace {
        value["metadata"]["namespace"] = namespace.clone().into();
    }
    Object(value)
}

fn patch(seen: &Object, subresource: Option<&'static str>, body: Value) -> MergePatch {
    MergePatch { resource_version: seen.resource_version().to_owned(), uid: seen.uid().to_owned(), subresource, body }
}

fn preconditions(seen: &Object) -> Preconditions {
    Preconditions { uid: seen.uid().to_owned(), resource_version: seen.resource_version().to_owned() }
}

fn field<'a>(object: &'a Object, pointer: &str) -> Option<&'a Value> {
    object.0.pointer(pointer)
}

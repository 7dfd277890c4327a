//! The wire to the API server.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use basal_objects::{
    object::{Object, ObjectKey, Resource, resources},
    port::{MergePatch, ObjectEvent, Objects, Page, Preconditions, ReadError, Refusal, Scope, Start},
};
use basal_runtime::outcome::Outcome;
use futures::{
    FutureExt as _,
    future::{self, BoxFuture},
    stream::BoxStream,
};
use serde_json::{Value, json};

use super::{
    Faulty, Request,
    answer::{NotDone, Told},
    watch::Kind,
};
use crate::trace::{Call, Port, digest};

/// The annotation that the one who overtakes changes.
const OVERTAKEN: &str = "sim.basal.io/overtaken";

/// How long a server that asks for a pause asks for.
const PAUSE: Duration = Duration::from_secs(1);

fn call(write: bool, request: String) -> Call {
    Call { number: None, port: Port::Objects, write, request }
}

#[async_trait]
impl<P: Objects> Objects for Faulty<P> {
    async fn get(&self, resource: Resource, key: &ObjectKey) -> Result<Option<Object>, ReadError> {
        let call = call(false, format!("get {} {key}", resource.plural));
        let (server, key) = (self.server(), key.clone());
        let effect = async move { server.get(resource, &key).await }.boxed();
        self.wire.call(Request { call, effect, overtaking: future::ready(()).boxed() }).await
    }

    async fn list_page(&self, resource: Resource, scope: &Scope, start: &Start) -> Result<Page, ReadError> {
        let call = call(false, format!("list {} {}", resource.plural, scope_text(scope)));
        let (server, scope, start) = (self.server(), scope.clone(), start.clone());
        let effect = async move { server.list_page(resource, &scope, &start).await }.boxed();
        self.wire.call(Request { call, effect, overtaking: future::ready(()).boxed() }).await
    }

    fn watch(&self, resource: Resource, scope: &Scope) -> BoxStream<'static, Result<ObjectEvent, ReadError>> {
        let kind = Kind {
            port: Port::Objects,
            text: event_text,
            error: || ReadError::Unavailable("lost on the way".to_owned()),
            can_be_lost: |event| matches!(event, ObjectEvent::Applied(_) | ObjectEvent::Deleted(_)),
            goes_on: true,
        };
        let request = format!("watch {} {}", resource.plural, scope_text(scope));
        let (server, scope) = (self.server(), scope.clone());
        self.wire.watch(kind, request, Box::new(move || server.watch(resource, &scope)))
    }

    async fn create(&self, resource: Resource, object: Object) -> Outcome<Object, Refusal> {
        let body = self.wire.world.text(|| digest(object.0.to_string().as_bytes()));
        let call = call(true, format!("create {} {} {body}", resource.plural, object.key()));
        let overtaking = create_first(self.server(), resource, &object);
        let server = self.server();
        let effect = async move { server.create(resource, object).await }.boxed();
        self.wire.call(Request { call, effect, overtaking }).await
    }

    async fn patch(&self, resource: Resource, key: &ObjectKey, patch: MergePatch) -> Outcome<Object, Refusal> {
        let MergePatch { resource_version, subresource, body, .. } = &patch;
        let part = subresource.map(|part| format!("/{part}")).unwrap_or_default();
        let body = self.wire.world.text(|| body.to_string());
        let call = call(true, format!("patch {} {key}{part} at {resource_version} {body}", resource.plural));
        let overtaking = overtake(self.server(), resource, key);
        let (server, key) = (self.server(), key.clone());
        let effect = async move { server.patch(resource, &key, patch).await }.boxed();
        self.wire.call(Request { call, effect, overtaking }).await
    }

    async fn delete(&self, resource: Resource, key: &ObjectKey, only_if: Preconditions) -> Outcome<(), Refusal> {
        let call = call(true, format!("delete {} {key} at {}", resource.plural, only_if.resource_version));
        let overtaking = overtake(self.server(), resource, key);
        let (server, key) = (self.server(), key.clone());
        let effect = async move { server.delete(resource, &key, only_if).await }.boxed();
        self.wire.call(Request { call, effect, overtaking }).await
    }
}

/// Changes an annotation, so that what was read before is old.
fn overtake<P: Objects>(server: Arc<P>, resource: Resource, key: &ObjectKey) -> BoxFuture<'static, ()> {
    let key = key.clone();
    async move {
        let Ok(Some(seen)) = server.get(resource, &key).await else { return };
        let patch = MergePatch {
            resource_version: seen.resource_version().to_owned(),
            uid: seen.uid().to_owned(),
            subresource: None,
            body: json!({"metadata": {"annotations": {OVERTAKEN: seen.resource_version()}}}),
        };
        // Nothing lies between this and the read.
        drop(server.patch(resource, &key, patch).await);
    }
    .boxed()
}

/// Makes an object of the same name: an agent, for example, makes its own CiliumNode, with its addresses and without
/// blocks.
fn create_first<P: Objects>(server: Arc<P>, resource: Resource, object: &Object) -> BoxFuture<'static, ()> {
    let mut first = object.clone();
    if resource == resources::CILIUM_NODE
        && let Some(Value::Object(spec)) = first.0.get_mut("spec")
    {
        spec.shift_remove("ipam");
    } else if resource == resources::LEASE {
        first.0["spec"] = json!({});
    }
    async move { drop(server.create(resource, first).await) }.boxed()
}

// Texts for the trace.

fn scope_text(scope: &Scope) -> String {
    let mut text = scope.namespace.clone().unwrap_or_else(|| "*".to_owned());
    for selector in [&scope.labels, &scope.fields].into_iter().flatten() {
        text += &format!(" [{selector}]");
    }
    text
}

fn object_text(object: &Object) -> String {
    format!("{}@{}", object.key(), object.resource_version())
}

fn event_text(event: &ObjectEvent) -> String {
    match event {
        ObjectEvent::Restarted => "restarted".to_owned(),
        ObjectEvent::Listed(object) => format!("listed {}", object_text(object)),
        ObjectEvent::InSync => "in sync".to_owned(),
        ObjectEvent::Applied(object) => format!("applied {}", object_text(object)),
        ObjectEvent::Deleted(object) => format!("deleted {}", object_text(object)),
    }
}

impl Told for Object {
    fn told(&self) -> String {
        object_text(self)
    }
}

impl Told for Option<Object> {
    fn told(&self) -> String {
        self.as_ref().map_or_else(|| "nothing".to_owned(), object_text)
    }
}

impl Told for Page {
    fn told(&self) -> String {
        format!("{} objects at {}", self.items.len(), self.resource_version)
    }
}

impl NotDone for ReadError {
    fn unavailable(why: &str) -> Self {
        Self::Unavailable(why.to_owned())
    }

    fn throttled() -> Self {
        Self::TooManyRequests { retry_after: Some(PAUSE) }
    }
}

impl NotDone for Refusal {
    fn unavailable(why: &str) -> Self {
        Self::Unavailable(why.to_owned())
    }

    fn throttled() -> Self {
        Self::TooManyRequests { retry_after: Some(PAUSE) }
    }

    fn conflict() -> Option<Self> {
        Some(Self::Conflict("by the word of the server".to_owned()))
    }
}

//! The port to the API server, in the six calls that Basal makes.
//!
//! Objects are untyped here. A patch carries the resourceVersion that was read and a delete uid and resourceVersion,
//! so no write can overwrite what its writer has not seen. Nothing here retries or caches: that lives above the port,
//! once. Source of the semantics: Kubernetes API conventions, "Concurrency Control and Consistency" and "HTTP Status codes".

use std::time::Duration;

use async_trait::async_trait;
use basal_runtime::outcome::Outcome;
use futures::stream::BoxStream;
use serde_json::Value;

use crate::object::{Object, ObjectKey, Resource};

/// Which objects a list or a watch means.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Scope {
    /// One namespace; `None` means all.
    pub namespace: Option<String>,
    /// A label selector in its text form.
    pub labels: Option<String>,
    /// A field selector in its text form.
    pub fields: Option<String>,
}

/// How fresh a list must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Freshness {
    /// At least as new as any write that was answered before the call (resourceVersion unset).
    Quorum,
    /// Whatever the API server has at hand (resourceVersion "0").
    Any,
}

/// Where a page of a list begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Start {
    /// At the first object.
    First(Freshness),
    /// Behind another page of the same list, by its [`Page::next`].
    Behind(String),
}

/// A part of a list.
#[derive(Debug, Clone, PartialEq)]
pub struct Page {
    /// The objects, in the server's order.
    pub items: Vec<Object>,
    /// The resourceVersion of the list as a whole.
    pub resource_version: String,
    /// Where the next page begins; `None` behind the last one.
    pub next: Option<String>,
}

/// The answer to a list.
#[derive(Debug, Clone, PartialEq)]
pub struct ObjectList {
    /// The objects, in the server's order.
    pub items: Vec<Object>,
    /// The resourceVersion of the list as a whole.
    pub resource_version: String,
}

/// What a watch delivers. It begins with `Restarted`, all objects as `Listed` at [`Freshness::Quorum`], then `InSync`; then
/// changes. After a gap the same begins anew, with what the server that is asked then has at hand: an object that is not
/// listed again is gone.
#[derive(Debug, Clone, PartialEq)]
pub enum ObjectEvent {
    /// A list begins.
    Restarted,
    /// One object of the list.
    Listed(Object),
    /// The list is complete.
    InSync,
    /// An object was created or changed.
    Applied(Object),
    /// An object was deleted; this was its last state.
    Deleted(Object),
}

/// Why a read has no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    /// RBAC does not allow it.
    #[error("the API server denied the request: {0}; check the roles of this service account")]
    Forbidden(String),
    /// The kind is not known (its CustomResourceDefinition is missing).
    #[error("the API server does not know {0}; its CustomResourceDefinition is missing")]
    UnknownKind(String),
    /// The server asks for a pause.
    #[error("the API server asks to slow down")]
    TooManyRequests {
        /// How long to wait, where the server said so.
        retry_after: Option<Duration>,
    },
    /// No answer.
    #[error("the API server did not answer: {0}")]
    Unavailable(String),
}

/// Why the API server did not carry out a write.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The object changed since it was read (409 Conflict), or a precondition on uid or resourceVersion does not hold.
    #[error("the object changed since it was read: {0}")]
    Conflict(String),
    /// An object of this name exists (409 AlreadyExists).
    #[error("the object exists already")]
    AlreadyExists,
    /// There is no such object, or no such kind (404).
    #[error("the object does not exist: {0}")]
    NotFound(String),
    /// The server does not accept the object (400, 422). The text names the fields.
    #[error("the API server refused the object: {0}")]
    Invalid(String),
    /// RBAC or admission does not allow it (401, 403).
    #[error("the API server denied the request: {0}; check the roles of this service account")]
    Forbidden(String),
    /// The server asks for a pause (429).
    #[error("the API server asks to slow down")]
    TooManyRequests {
        /// How long to wait, where the server said so.
        retry_after: Option<Duration>,
    },
    /// The request was not sent or not taken.
    #[error("the API server did not take the request: {0}")]
    Unavailable(String),
}

/// A JSON merge patch (RFC 7386).
#[derive(Debug, Clone, PartialEq)]
pub struct MergePatch {
    /// The resourceVersion that the patch was made from; the write is refused with `Conflict` when it is not current.
    pub resource_version: String,
    /// The uid that was seen, so that a new object of the same name is left alone.
    pub uid: String,
    /// The subresource, `status` for example.
    pub subresource: Option<&'static str>,
    /// What to change. `metadata.resourceVersion` and `metadata.uid` are added by the adapter.
    pub body: Value,
}

/// What must hold for a delete.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Preconditions {
    /// The uid that was seen.
    pub uid: String,
    /// The resourceVersion that was seen.
    pub resource_version: String,
}

/// The API server as Basal sees it.
#[async_trait]
pub trait Objects: Send + Sync + 'static {
    /// Reads one object, at quorum; `None` when there is none.
    ///
    /// # Errors
    /// See [`ReadError`].
    async fn get(&self, resource: Resource, key: &ObjectKey) -> Result<Option<Object>, ReadError>;

    /// Reads the objects of a scope, as many as the server puts into one page.
    ///
    /// # Errors
    /// See [`ReadError`]; `Unavailable` also when the list expired since its first page. It has to begin anew then.
    async fn list_page(&self, resource: Resource, scope: &Scope, start: &Start) -> Result<Page, ReadError>;

    /// Reads all objects of a scope. Of kinds with thousands of them [`gather`] holds but one page at a time.
    ///
    /// # Errors
    /// As [`Objects::list_page`].
    async fn list(&self, resource: Resource, scope: &Scope, freshness: Freshness) -> Result<ObjectList, ReadError> {
        let Page { mut items, mut resource_version, mut next } =
            self.list_page(resource, scope, &Start::First(freshness)).await?;
        while let Some(place) = next {
            let page = self.list_page(resource, scope, &Start::Behind(place)).await?;
            items.extend(page.items);
            (resource_version, next) = (page.resource_version, page.next);
        }
        Ok(ObjectList { items, resource_version })
    }

    /// Follows the objects of a scope. The stream goes on after an error (it lists again, with a growing pause), and
    /// ends only when it is dropped.
    fn watch(&self, resource: Resource, scope: &Scope) -> BoxStream<'static, Result<ObjectEvent, ReadError>>;

    /// Creates an object; answers it as stored. `metadata.name` (and namespace) stand in the object.
    async fn create(&self, resource: Resource, object: Object) -> Outcome<Object, Refusal>;

    /// Changes an object; answers it as stored.
    async fn patch(&self, resource: Resource, key: &ObjectKey, patch: MergePatch) -> Outcome<Object, Refusal>;

    /// Deletes an object, dependents in the background.
    async fn delete(&self, resource: Resource, key: &ObjectKey, only_if: Preconditions) -> Outcome<(), Refusal>;
}

/// Reads all objects of a scope and holds what `keep` answers of each, and of the objects one page at a time.
///
/// # Errors
/// As [`Objects::list_page`].
pub async fn gather<T: Send>(
    objects: &dyn Objects,
    resource: Resource,
    scope: &Scope,
    freshness: Freshness,
    mut keep: impl FnMut(&Object) -> Option<T> + Send,
) -> Result<Vec<T>, ReadError> {
    let mut kept = Vec::new();
    let mut start = Some(Start::First(freshness));
    while let Some(from) = start {
        let page = objects.list_page(resource, scope, &from).await?;
        kept.extend(page.items.iter().filter_map(&mut keep));
        start = page.next.map(Start::Behind);
    }
    Ok(kept)
}

//! Rights that the operator lacks at the API server, by what that denied: for `/readyz` and the log.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex},
    time::Duration,
};

use async_trait::async_trait;
use basal_objects::{
    object::{Object, ObjectKey, Resource},
    port::{MergePatch, ObjectEvent, Objects, Page, Preconditions, ReadError, Refusal, Scope, Start},
};
use basal_runtime::{outcome::Outcome, sync::lock};
use futures::{StreamExt as _, stream::BoxStream};
use tokio::time::Instant;
use tracing::{info, warn};

/// A denial that nobody repeats counts for so long. What is needed is tried again sooner; what is not needed any more,
/// for example because another replica leads, is not.
const FORGET: Duration = Duration::from_secs(60);

/// What was to be done with which kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Right {
    verb: &'static str,
    resource: &'static str,
    subresource: Option<&'static str>,
}

impl fmt::Display for Right {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.verb, self.resource)?;
        self.subresource.map_or(Ok(()), |subresource| write!(f, "/{subresource}"))
    }
}

/// What was denied and not allowed since. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct Denials(Arc<Mutex<BTreeMap<Right, Denied>>>);

#[derive(Debug)]
struct Denied {
    why: String,
    at: Instant,
}

impl Denials {
    /// Whether nothing is denied.
    ///
    /// # Errors
    /// Every right that is missing, with the words of the API server.
    pub fn check(&self) -> Result<(), String> {
        let mut denied = lock(&self.0);
        denied.retain(|_, denied| denied.at.elapsed() < FORGET);
        let missing: Vec<String> = denied.iter().map(|(right, denied)| format!("{right}: {}", denied.why)).collect();
        if missing.is_empty() { Ok(()) } else { Err(missing.join("; ")) }
    }

    fn read<T>(&self, right: Right, answer: &Result<T, ReadError>) {
        match answer {
            Err(error @ ReadError::Forbidden(_)) => self.denied(right, error.to_string()),
            // Without an answer nothing is known.
            Err(ReadError::Unavailable(_) | ReadError::TooManyRequests { .. }) => {}
            Ok(_) | Err(ReadError::UnknownKind(_)) => self.allowed(right),
        }
    }

    fn written<T>(&self, right: Right, outcome: &Outcome<T, Refusal>) {
        match outcome {
            Outcome::Refused(refusal @ Refusal::Forbidden(_)) => self.denied(right, refusal.to_string()),
            Outcome::Unknown(_) | Outcome::Refused(Refusal::Unavailable(_) | Refusal::TooManyRequests { .. }) => {}
            Outcome::Done(_) | Outcome::Refused(_) => self.allowed(right),
        }
    }

    fn denied(&self, right: Right, why: String) {
        let mut denied = lock(&self.0);
        if !denied.contains_key(&right) {
            warn!(%right, why, "a right is missing");
        }
        denied.insert(right, Denied { why, at: Instant::now() });
    }

    fn allowed(&self, right: Right) {
        if lock(&self.0).remove(&right).is_some() {
            info!(%right, "the right is there again");
        }
    }
}

/// Notes what the API server denies of the requests that pass through.
pub struct Noted {
    inner: Arc<dyn Objects>,
    denials: Denials,
}

impl Noted {
    /// Notes what is denied to `inner`.
    #[must_use]
    pub fn new(inner: Arc<dyn Objects>, denials: &Denials) -> Self {
        Self { inner, denials: denials.clone() }
    }

    fn read<T>(&self, verb: &'static str, resource: Resource, answer: Result<T, ReadError>) -> Result<T, ReadError> {
        self.denials.read(Right { verb, resource: resource.plural, subresource: None }, &answer);
        answer
    }

    fn write<T>(&self, right: Right, outcome: Outcome<T, Refusal>) -> Outcome<T, Refusal> {
        self.denials.written(right, &outcome);
        outcome
    }
}

#[async_trait]
impl Objects for Noted {
    async fn get(&self, resource: Resource, key: &ObjectKey) -> Result<Option<Object>, ReadError> {
        self.read("get", resource, self.inner.get(resource, key).await)
    }

    async fn list_page(&self, resource: Resource, scope: &Scope, start: &Start) -> Result<Page, ReadError> {
        self.read("list", resource, self.inner.list_page(resource, scope, start).await)
    }

    fn watch(&self, resource: Resource, scope: &Scope) -> BoxStream<'static, Result<ObjectEvent, ReadError>> {
        let denials = self.denials.clone();
        let right = Right { verb: "watch", resource: resource.plural, subresource: None };
        let events = self.inner.watch(resource, scope);
        // That a list begins is no answer of the server yet.
        let is_answer = |event: &Result<ObjectEvent, ReadError>| !matches!(event, Ok(ObjectEvent::Restarted));
        events
            .inspect(move |event| {
                if is_answer(event) {
                    denials.read(right, event)
                }
            })
            .boxed()
    }

    async fn create(&self, resource: Resource, object: Object) -> Outcome<Object, Refusal> {
        let right = Right { verb: "create", resource: resource.plural, subresource: None };
        self.write(right, self.inner.create(resource, object).await)
    }

    async fn patch(&self, resource: Resource, key: &ObjectKey, patch: MergePatch) -> Outcome<Object, Refusal> {
        let right = Right { verb: "patch", resource: resource.plural, subresource: patch.subresource };
        self.write(right, self.inner.patch(resource, key, patch).await)
    }

    async fn delete(&self, resource: Resource, key: &ObjectKey, only_if: Preconditions) -> Outcome<(), Refusal> {
        let right = Right { verb: "delete", resource: resource.plural, subresource: None };
        self.write(right, self.inner.delete(resource, key, only_if).await)
    }
}

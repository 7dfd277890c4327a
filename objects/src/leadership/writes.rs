//! An [`Objects`] whose writes begin only while a term lasts.

use std::sync::Arc;

use async_trait::async_trait;
use basal_runtime::outcome::Outcome;
use futures::stream::BoxStream;
use tokio::{sync::watch, time::Instant};

use super::{Leadership, TermId};
use crate::{
    object::{Object, ObjectKey, Resource},
    port::{MergePatch, ObjectEvent, Objects, Page, Preconditions, ReadError, Refusal, Scope, Start},
};

/// Passes reads on, and writes while the term that it was made for lasts. Controllers of a leader get this one, so that
/// none can forget to ask.
#[derive(Clone)]
pub struct LeaderWrites {
    objects: Arc<dyn Objects>,
    leadership: watch::Receiver<Leadership>,
    term: TermId,
}

impl LeaderWrites {
    /// Guards `objects` for one term.
    #[must_use]
    pub fn new(objects: Arc<dyn Objects>, leadership: watch::Receiver<Leadership>, term: TermId) -> Self {
        Self { objects, leadership, term }
    }

    /// Whether the term lasts.
    #[must_use]
    pub fn may_write(&self) -> bool {
        self.leadership.borrow().term(Instant::now()).is_some_and(|term| term.id == self.term)
    }

    fn refusal(&self) -> Refusal {
        Refusal::Unavailable(format!("it was not sent, because leadership term {} is over", self.term))
    }
}

#[async_trait]
impl Objects for LeaderWrites {
    async fn get(&self, resource: Resource, key: &ObjectKey) -> Result<Option<Object>, ReadError> {
        self.objects.get(resource, key).await
    }

    async fn list_page(&self, resource: Resource, scope: &Scope, start: &Start) -> Result<Page, ReadError> {
        self.objects.list_page(resource, scope, start).await
    }

    fn watch(&self, resource: Resource, scope: &Scope) -> BoxStream<'static, Result<ObjectEvent, ReadError>> {
        self.objects.watch(resource, scope)
    }

    async fn create(&self, resource: Resource, object: Object) -> Outcome<Object, Refusal> {
        if self.may_write() { self.objects.create(resource, object).await } else { Outcome::Refused(self.refusal()) }
    }

    async fn patch(&self, resource: Resource, key: &ObjectKey, patch: MergePatch) -> Outcome<Object, Refusal> {
        if self.may_write() { self.objects.patch(resource, key, patch).await } else { Outcome::Refused(self.refusal()) }
    }

    async fn delete(&self, resource: Resource, key: &ObjectKey, only_if: Preconditions) -> Outcome<(), Refusal> {
        if self.may_write() {
            self.objects.delete(resource, key, only_if).await
        } else {
            Outcome::Refused(self.refusal())
        }
    }
}

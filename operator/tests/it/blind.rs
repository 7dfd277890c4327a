//! Servers that do not tell everything: watches that lose events, and lists out of a memory that lags behind.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use basal_kvstore::kv::{
    Kv, KvError, KvRefusal, Lease, LeaseId, Range, RangeAnswer, Revision, Txn, TxnAnswer, WatchBatch,
};
use basal_objects::{
    object::{Object, ObjectKey, Resource},
    port::{Freshness, MergePatch, ObjectEvent, ObjectList, Objects, Preconditions, ReadError, Refusal, Scope},
};
use basal_runtime::outcome::Outcome;
use futures::{StreamExt as _, future, stream::BoxStream};

/// Whether servers keep back what happens.
#[derive(Clone, Default)]
pub(crate) struct Blind(Arc<AtomicBool>);

impl Blind {
    pub(crate) fn set(&self, blind: bool) {
        self.0.store(blind, Ordering::SeqCst);
    }

    fn is_on(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}

/// A server that is sometimes blind.
pub(crate) struct Sometimes<P: ?Sized> {
    pub(crate) server: Arc<P>,
    pub(crate) blind: Blind,
}

#[async_trait]
impl Objects for Sometimes<dyn Objects> {
    async fn get(&self, resource: Resource, key: &ObjectKey) -> Result<Option<Object>, ReadError> {
        self.server.get(resource, key).await
    }

    /// A list that may be old shows nothing.
    async fn list(&self, resource: Resource, scope: &Scope, freshness: Freshness) -> Result<ObjectList, ReadError> {
        let list = self.server.list(resource, scope, freshness).await?;
        let hidden = freshness == Freshness::Any && self.blind.is_on();
        Ok(if hidden { ObjectList { items: Vec::new(), ..list } } else { list })
    }

    fn watch(&self, resource: Resource, scope: &Scope) -> BoxStream<'static, Result<ObjectEvent, ReadError>> {
        let blind = self.blind.clone();
        let told = move |event: &Result<ObjectEvent, ReadError>| {
            let change = matches!(event, Ok(ObjectEvent::Applied(_) | ObjectEvent::Deleted(_)));
            future::ready(!(change && blind.is_on()))
        };
        self.server.watch(resource, scope).filter(told).boxed()
    }

    async fn create(&self, resource: Resource, object: Object) -> Outcome<Object, Refusal> {
        self.server.create(resource, object).await
    }

    async fn patch(&self, resource: Resource, key: &ObjectKey, patch: MergePatch) -> Outcome<Object, Refusal> {
        self.server.patch(resource, key, patch).await
    }

    async fn delete(&self, resource: Resource, key: &ObjectKey, only_if: Preconditions) -> Outcome<(), Refusal> {
        self.server.delete(resource, key, only_if).await
    }
}

#[async_trait]
impl Kv for Sometimes<dyn Kv> {
    async fn range(&self, range: Range) -> Result<RangeAnswer, KvError> {
        self.server.range(range).await
    }

    async fn txn(&self, txn: Txn) -> Outcome<TxnAnswer, KvRefusal> {
        self.server.txn(txn).await
    }

    fn watch(&self, prefix: &str, from: Revision) -> BoxStream<'static, Result<WatchBatch, KvError>> {
        let blind = self.blind.clone();
        self.server.watch(prefix, from).filter(move |batch| future::ready(batch.is_err() || !blind.is_on())).boxed()
    }

    async fn lease_grant(&self, ttl: Duration) -> Outcome<Lease, KvRefusal> {
        self.server.lease_grant(ttl).await
    }

    async fn lease_keep_alive(&self, id: LeaseId) -> Result<Duration, KvError> {
        self.server.lease_keep_alive(id).await
    }

    async fn lease_revoke(&self, id: LeaseId) -> Outcome<(), KvRefusal> {
        self.server.lease_revoke(id).await
    }
}

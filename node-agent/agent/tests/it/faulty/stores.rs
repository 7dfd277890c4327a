//! The same faults on the way to etcd and to the API server. Watches pass as they are.

use std::time::Duration;

use async_trait::async_trait;
use basal_kvstore::kv::{
    Kv, KvError, KvRefusal, Lease, LeaseId, Range, RangeAnswer, Revision, Txn, TxnAnswer, WatchBatch,
};
use basal_objects::{
    object::{Object, ObjectKey, Resource},
    port::{MergePatch, ObjectEvent, Objects, Page, Preconditions, ReadError, Refusal, Scope, Start},
};
use basal_runtime::outcome::Outcome;
use futures::stream::BoxStream;

use super::{Call, Faulty, Refused, Side::Servers};

fn not_there() -> String {
    "connection refused".to_owned()
}

impl Refused for KvError {
    fn refused() -> Self {
        Self::Unavailable(not_there())
    }
}

impl Refused for KvRefusal {
    fn refused() -> Self {
        Self::Unavailable(not_there())
    }
}

impl Refused for ReadError {
    fn refused() -> Self {
        Self::Unavailable(not_there())
    }
}

impl Refused for Refusal {
    fn refused() -> Self {
        Self::Unavailable(not_there())
    }
}

#[async_trait]
impl<P: Kv> Kv for Faulty<P> {
    async fn range(&self, range: Range) -> Result<RangeAnswer, KvError> {
        let call = Call::read(Servers, format!("etcd: range {:?}", range.keys));
        let port = self.port();
        self.wire.call(call, async move { port.range(range).await }).await
    }

    async fn txn(&self, txn: Txn) -> Outcome<TxnAnswer, KvRefusal> {
        let call = Call::write(Servers, format!("etcd: txn when {:?}", txn.when));
        let port = self.port();
        self.wire.call(call, async move { port.txn(txn).await }).await
    }

    fn watch(&self, prefix: &str, from: Revision) -> BoxStream<'static, Result<WatchBatch, KvError>> {
        self.port.watch(prefix, from)
    }

    async fn lease_grant(&self, ttl: Duration) -> Outcome<Lease, KvRefusal> {
        let port = self.port();
        self.wire.call(Call::write(Servers, "etcd: grant"), async move { port.lease_grant(ttl).await }).await
    }

    async fn lease_keep_alive(&self, id: LeaseId) -> Result<Duration, KvError> {
        let port = self.port();
        self.wire.call(Call::read(Servers, "etcd: keep alive"), async move { port.lease_keep_alive(id).await }).await
    }

    async fn lease_revoke(&self, id: LeaseId) -> Outcome<(), KvRefusal> {
        let port = self.port();
        self.wire.call(Call::write(Servers, "etcd: revoke"), async move { port.lease_revoke(id).await }).await
    }
}

#[async_trait]
impl<P: Objects> Objects for Faulty<P> {
    async fn get(&self, resource: Resource, key: &ObjectKey) -> Result<Option<Object>, ReadError> {
        let call = Call::read(Servers, format!("objects: get {} {key}", resource.plural));
        let (port, key) = (self.port(), key.clone());
        self.wire.call(call, async move { port.get(resource, &key).await }).await
    }

    async fn list_page(&self, resource: Resource, scope: &Scope, start: &Start) -> Result<Page, ReadError> {
        let call = Call::read(Servers, format!("objects: list {}", resource.plural));
        let (port, scope, start) = (self.port(), scope.clone(), start.clone());
        self.wire.call(call, async move { port.list_page(resource, &scope, &start).await }).await
    }

    fn watch(&self, resource: Resource, scope: &Scope) -> BoxStream<'static, Result<ObjectEvent, ReadError>> {
        self.port.watch(resource, scope)
    }

    async fn create(&self, resource: Resource, object: Object) -> Outcome<Object, Refusal> {
        let call = Call::write(Servers, format!("objects: create {} {}", resource.plural, object.key()));
        let port = self.port();
        self.wire.call(call, async move { port.create(resource, object).await }).await
    }

    async fn patch(&self, resource: Resource, key: &ObjectKey, patch: MergePatch) -> Outcome<Object, Refusal> {
        let call = Call::write(Servers, format!("objects: patch {} {key}", resource.plural));
        let (port, key) = (self.port(), key.clone());
        self.wire.call(call, async move { port.patch(resource, &key, patch).await }).await
    }

    async fn delete(&self, resource: Resource, key: &ObjectKey, only_if: Preconditions) -> Outcome<(), Refusal> {
        let call = Call::write(Servers, format!("objects: delete {} {key}", resource.plural));
        let (port, key) = (self.port(), key.clone());
        self.wire.call(call, async move { port.delete(resource, &key, only_if).await }).await
    }
}

//! How long API server and etcd take to answer: `basal_operator_request_duration_seconds`.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use basal_kvstore::kv::{
    Kv, KvError, KvRefusal, Lease, LeaseId, Range, RangeAnswer, Revision, Txn, TxnAnswer, WatchBatch,
};
use basal_objects::{
    object::{Object, ObjectKey, Resource},
    port::{MergePatch, ObjectEvent, Objects, Page, Preconditions, ReadError, Refusal, Scope, Start},
};
use basal_runtime::{
    metrics::{Metrics, Timer, latency_histogram},
    outcome::Outcome,
};
use futures::stream::BoxStream;
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{family::Family, histogram::Histogram},
};

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Request {
    server: &'static str,
    verb: &'static str,
}

/// The histograms. Clones share them.
#[derive(Debug, Clone)]
pub struct RequestDurations(Family<Request, Histogram, fn() -> Histogram>);

impl RequestDurations {
    /// Histograms that `registry` shows.
    #[must_use]
    pub fn register(registry: &Metrics) -> Self {
        let durations = Family::new_with_constructor(latency_histogram as fn() -> Histogram);
        registry.register(|r| {
            let help = "Time until an answer of the API server or etcd, watches left out";
            r.register("request_duration_seconds", help, durations.clone());
        });
        Self(durations)
    }

    fn of(&self, server: &'static str, verb: &'static str) -> Timer {
        Timer::start(self.0.get_or_create_owned(&Request { server, verb }))
    }
}

/// Measures the requests that pass through to `P`.
pub struct Measured<P: ?Sized> {
    durations: RequestDurations,
    inner: Arc<P>,
}

impl<P: ?Sized> Measured<P> {
    /// Measures `inner`.
    #[must_use]
    pub fn new(inner: Arc<P>, durations: &RequestDurations) -> Self {
        Self { durations: durations.clone(), inner }
    }

    fn timer(&self, server: &'static str, verb: &'static str) -> Timer {
        self.durations.of(server, verb)
    }
}

const API: &str = "apiserver";
const ETCD: &str = "etcd";

#[async_trait]
impl Objects for Measured<dyn Objects> {
    async fn get(&self, resource: Resource, key: &ObjectKey) -> Result<Option<Object>, ReadError> {
        let _timer = self.timer(API, "get");
        self.inner.get(resource, key).await
    }

    async fn list_page(&self, resource: Resource, scope: &Scope, start: &Start) -> Result<Page, ReadError> {
        let _timer = self.timer(API, "list");
        self.inner.list_page(resource, scope, start).await
    }

    fn watch(&self, resource: Resource, scope: &Scope) -> BoxStream<'static, Result<ObjectEvent, ReadError>> {
        self.inner.watch(resource, scope)
    }

    async fn create(&self, resource: Resource, object: Object) -> Outcome<Object, Refusal> {
        let _timer = self.timer(API, "create");
        self.inner.create(resource, object).await
    }

    async fn patch(&self, resource: Resource, key: &ObjectKey, patch: MergePatch) -> Outcome<Object, Refusal> {
        let _timer = self.timer(API, "patch");
        self.inner.patch(resource, key, patch).await
    }

    async fn delete(&self, resource: Resource, key: &ObjectKey, only_if: Preconditions) -> Outcome<(), Refusal> {
        let _timer = self.timer(API, "delete");
        self.inner.delete(resource, key, only_if).await
    }
}

#[async_trait]
impl Kv for Measured<dyn Kv> {
    async fn range(&self, range: Range) -> Result<RangeAnswer, KvError> {
        let _timer = self.timer(ETCD, "range");
        self.inner.range(range).await
    }

    async fn txn(&self, txn: Txn) -> Outcome<TxnAnswer, KvRefusal> {
        let _timer = self.timer(ETCD, "txn");
        self.inner.txn(txn).await
    }

    fn watch(&self, prefix: &str, from: Revision) -> BoxStream<'static, Result<WatchBatch, KvError>> {
        self.inner.watch(prefix, from)
    }

    async fn lease_grant(&self, ttl: Duration) -> Outcome<Lease, KvRefusal> {
        let _timer = self.timer(ETCD, "lease_grant");
        self.inner.lease_grant(ttl).await
    }

    async fn lease_keep_alive(&self, id: LeaseId) -> Result<Duration, KvError> {
        let _timer = self.timer(ETCD, "lease_keep_alive");
        self.inner.lease_keep_alive(id).await
    }

    async fn lease_revoke(&self, id: LeaseId) -> Outcome<(), KvRefusal> {
        let _timer = self.timer(ETCD, "lease_revoke");
        self.inner.lease_revoke(id).await
    }
}

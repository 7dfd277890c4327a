//! etcd for a leader: reads always, writes while its term lasts.

use std::time::Duration;

use std::sync::Arc;

use async_trait::async_trait;
use basal_kvstore::kv::{
    Kv, KvError, KvRefusal, Lease, LeaseId, Range, RangeAnswer, Revision, Txn, TxnAnswer, WatchBatch,
};
use basal_objects::leadership::{Leadership, TermId};
use basal_runtime::outcome::Outcome;
use futures::stream::BoxStream;
use tokio::{sync::watch, time::Instant};

/// Passes reads on, and writes while the term that it was made for lasts. A write that is under way when the term ends
/// is refused by the fence.
pub struct TermKv {
    kv: Arc<dyn Kv>,
    leadership: watch::Receiver<Leadership>,
    term: TermId,
}

impl TermKv {
    /// Guards `kv` for one term.
    #[must_use]
    pub fn new(kv: Arc<dyn Kv>, leadership: watch::Receiver<Leadership>, term: TermId) -> Self {
        Self { kv, leadership, term }
    }

    fn may_write(&self) -> Result<(), KvRefusal> {
        match self.leadership.borrow().term(Instant::now()) {
            Some(term) if term.id == self.term => Ok(()),
            _ => Err(KvRefusal::Unavailable("the term of this leader ended; nothing was sent".to_owned())),
        }
    }
}

#[async_trait]
impl Kv for TermKv {
    async fn range(&self, range: Range) -> Result<RangeAnswer, KvError> {
        self.kv.range(range).await
    }

    async fn txn(&self, txn: Txn) -> Outcome<TxnAnswer, KvRefusal> {
        match self.may_write() {
            Ok(()) => self.kv.txn(txn).await,
            Err(refusal) => Outcome::Refused(refusal),
        }
    }

    fn watch(&self, prefix: &str, from: Revision) -> BoxStream<'static, Result<WatchBatch, KvError>> {
        self.kv.watch(prefix, from)
    }

    async fn lease_grant(&self, ttl: Duration) -> Outcome<Lease, KvRefusal> {
        match self.may_write() {
            Ok(()) => self.kv.lease_grant(ttl).await,
            Err(refusal) => Outcome::Refused(refusal),
        }
    }

    async fn lease_keep_alive(&self, id: LeaseId) -> Result<Duration, KvError> {
        self.kv.lease_keep_alive(id).await
    }

    async fn lease_revoke(&self, id: LeaseId) -> Outcome<(), KvRefusal> {
        self.kv.lease_revoke(id).await
    }
}

//! The etcd face of the [store](crate::store): [`ModelKv`], and what a test does to the server behind it.

mod txn;
mod watch;

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use async_trait::async_trait;
use basal_kvstore::kv::{
    Header, Kv, KvError, KvRefusal, Lease, LeaseId, Range, RangeAnswer, Revision, Txn, TxnAnswer, WatchBatch,
};
use basal_runtime::{outcome::Outcome, sync::lock};
use futures::stream::BoxStream;
use tokio::{sync::Notify, time::Instant};

use self::txn::Bytes;
use crate::store::{NoSuchRevision, Store};

/// The shortest lease that etcd grants with its default election time-out: 1.5 election time-outs in whole seconds.
const MIN_LEASE: Duration = Duration::from_secs(2);

/// An etcd without a network: every clone talks to the same server.
///
/// Calls answer at once; what goes wrong on the way, and how long the way takes, is [`crate::fault`]'s. Leases end on
/// `tokio::time`. Not modelled: users and roles, quota, members.
#[derive(Debug, Clone)]
pub struct ModelKv {
    server: Arc<Server>,
}

#[derive(Debug)]
struct Server {
    state: Mutex<State>,
    /// Woken in the order of waiting; `tokio::sync::watch` would wake in a random one.
    changed: Notify,
}

#[derive(Debug, Clone)]
struct State {
    cluster_id: u64,
    store: Store<Bytes>,
    leases: BTreeMap<LeaseId, LeaseState>,
    last_lease: LeaseId,
    /// Raised when all watches are cut.
    watch_epoch: u64,
}

#[derive(Debug, Clone, Copy)]
struct LeaseState {
    ttl: Duration,
    ends: Instant,
}

impl State {
    fn header(&self) -> Header {
        Header { cluster_id: self.cluster_id, revision: self.store.revision() }
    }

    fn end_lease(&mut self, id: LeaseId) -> bool {
        if self.leases.remove(&id).is_none() {
            return false;
        }
        let keys: Vec<String> =
            self.store.scan("", "").filter(|(_, stored)| stored.lease == id).map(|(key, _)| key.to_owned()).collect();
        let mut batch = self.store.write();
        for key in keys {
            batch.delete(&key);
        }
        true
    }

    /// Ends what has run out, the oldest first. True when anything did.
    fn expire(&mut self, now: Instant) -> bool {
        let mut due: Vec<(Instant, LeaseId)> =
            self.leases.iter().filter(|(_, lease)| lease.ends <= now).map(|(id, lease)| (lease.ends, *id)).collect();
        due.sort_unstable();
        for (_, id) in &due {
            self.end_lease(*id);
        }
        !due.is_empty()
    }

    fn next_expiry(&self) -> Option<Instant> {
        self.leases.values().map(|lease| lease.ends).min()
    }
}

/// A server's content at one moment, with its leases.
#[derive(Debug, Clone)]
pub struct Snapshot(State);

impl ModelKv {
    /// An empty server at revision 1.
    #[must_use]
    pub fn new(cluster_id: u64) -> Self {
        let state =
            State { cluster_id, store: Store::default(), leases: BTreeMap::new(), last_lease: 0, watch_epoch: 0 };
        Self { server: Arc::new(Server { state: Mutex::new(state), changed: Notify::new() }) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        let mut state = lock(&self.server.state);
        if state.expire(Instant::now()) {
            self.server.changed.notify_waiters();
        }
        state
    }

    /// The store's state.
    #[must_use]
    pub fn header(&self) -> Header {
        self.state().header()
    }

    /// Shows every key with a prefix, the revision that wrote it last, and its value, without a copy.
    pub fn visit(&self, prefix: &str, mut see: impl FnMut(&str, Revision, &[u8])) {
        let state = self.state();
        state.store.scan(prefix, "").for_each(|(key, stored)| see(key, stored.mod_revision, &stored.value));
    }

    /// The value of a key.
    #[must_use]
    pub fn value(&self, key: &str) -> Option<Vec<u8>> {
        self.state().store.get(key).map(|stored| stored.value.to_vec())
    }

    /// Every key with its value.
    #[must_use]
    pub fn contents(&self) -> BTreeMap<String, Vec<u8>> {
        let state = self.state();
        state.store.scan("", "").map(|(key, stored)| (key.to_owned(), stored.value.to_vec())).collect()
    }

    /// Forgets the history before a revision, as `etcdctl compact` does.
    ///
    /// # Errors
    /// When it is compacted already, or not reached yet.
    pub fn compact(&self, revision: Revision) -> Result<(), NoSuchRevision> {
        self.state().store.compact(revision)?;
        self.server.changed.notify_waiters();
        Ok(())
    }

    /// Ends a lease as if its time had run out; false when there is none.
    pub fn expire_lease(&self, id: LeaseId) -> bool {
        let ended = self.state().end_lease(id);
        self.server.changed.notify_waiters();
        ended
    }

    /// Ends every lease.
    pub fn expire_leases(&self) {
        let mut state = self.state();
        for id in state.leases.keys().copied().collect::<Vec<_>>() {
            state.end_lease(id);
        }
        drop(state);
        self.server.changed.notify_waiters();
    }

    /// Puts the content back to what it was so many revisions ago, as far as the history goes back; with `restored` as
    /// `etcdutl snapshot restore` does it, that is with another cluster id. Leases that keys hang on live again, for the
    /// longest time that etcd was asked for. Open watches break.
    pub fn roll_back(&self, revisions: Revision, restored: bool) {
        let mut state = self.state();
        let wanted = (state.store.revision() - revisions).max(1);
        let now = state.store.revision();
        let Ok(store) = state.store.snapshot_at(wanted).or_else(|_| state.store.snapshot_at(now)) else { return };
        let ttl = state.leases.values().map(|lease| lease.ttl).max().unwrap_or(MIN_LEASE);
        let ends = Instant::now() + ttl;
        for (_, stored) in store.scan("", "").filter(|(_, stored)| stored.lease != 0) {
            state.leases.entry(stored.lease).or_insert(LeaseState { ttl, ends });
        }
        state.store = store;
        state.cluster_id += u64::from(restored);
        state.watch_epoch += 1;
        drop(state);
        self.server.changed.notify_waiters();
    }

    /// Breaks every open watch with `Unavailable`.
    pub fn cut_watches(&self) {
        self.state().watch_epoch += 1;
        self.server.changed.notify_waiters();
    }

    /// The server's content, to be restored later.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        Snapshot(self.state().clone())
    }

    /// Puts an earlier content back, as an administrator does with `etcdutl snapshot restore`: the revision falls, and
    /// the cluster gets another id (etcd makes one from the new member list). Open watches break.
    pub fn restore(&self, snapshot: &Snapshot, cluster_id: u64) {
        let mut state = self.state();
        let watch_epoch = state.watch_epoch + 1;
        *state = State { cluster_id, watch_epoch, ..snapshot.0.clone() };
        drop(state);
        self.server.changed.notify_waiters();
    }
}

#[async_trait]
impl Kv for ModelKv {
    async fn range(&self, range: Range) -> Result<RangeAnswer, KvError> {
        let state = self.state();
        txn::range(&state.store, &range, state.header()).map_err(txn::read_error)
    }

    async fn txn(&self, txn: Txn) -> Outcome<TxnAnswer, KvRefusal> {
        if let Err(refusal) = txn::check_request(&txn) {
            return Outcome::Refused(refusal);
        }
        let mut state = self.state();
        let State { cluster_id, store, leases, .. } = &mut *state;
        let succeeded = txn.when.iter().all(|compare| txn::holds(store, compare));
        let ops = if succeeded { &txn.then } else { &txn.or_else };
        let before = store.revision();
        match txn::apply(store, ops, |lease| leases.contains_key(&lease), *cluster_id) {
            Ok(answers) => {
                let header = state.header();
                drop(state);
                if header.revision != before {
                    self.server.changed.notify_waiters();
                }
                Outcome::Done(TxnAnswer { header, succeeded, answers })
            }
            Err(refusal) => Outcome::Refused(refusal),
        }
    }

    fn watch(&self, prefix: &str, from: Revision) -> BoxStream<'static, Result<WatchBatch, KvError>> {
        watch::follow(self.clone(), prefix.to_owned(), from)
    }

    async fn lease_grant(&self, ttl: Duration) -> Outcome<Lease, KvRefusal> {
        let mut state = self.state();
        // etcd counts leases in whole seconds; the port never takes a part of one away.
        let ttl = Duration::from_secs(ttl.as_secs() + u64::from(ttl.subsec_nanos() > 0)).max(MIN_LEASE);
        state.last_lease += 1;
        let id = state.last_lease;
        state.leases.insert(id, LeaseState { ttl, ends: Instant::now() + ttl });
        drop(state);
        // Watches wait for the first lease to end.
        self.server.changed.notify_waiters();
        Outcome::Done(Lease { id, ttl })
    }

    async fn lease_keep_alive(&self, id: LeaseId) -> Result<Duration, KvError> {
        let mut state = self.state();
        let lease = state.leases.get_mut(&id).ok_or(KvError::LeaseNotFound(id))?;
        lease.ends = Instant::now() + lease.ttl;
        Ok(lease.ttl)
    }

    async fn lease_revoke(&self, id: LeaseId) -> Outcome<(), KvRefusal> {
        self.expire_lease(id);
        Outcome::Done(())
    }
}

#[cfg(test)]
mod tests {
    use basal_crds::{directory::Directory, names::Cluster};
    use basal_ipam::ledger::Ledger;
    use basal_kvstore::{
        directory::{DirectoryConfig, EtcdDirectory},
        leases::LeaseRules,
        ledger::EtcdLedger,
        session::Session,
    };
    use basal_runtime::env::SeededEnv;

    use super::*;
    use crate::conformance::{
        self,
        directory::{DirectoryFixture, EtcdAdmin, NODE_IP, OTHER_NODE_IP},
        kv::KvFixture,
        ledger::LedgerFixture,
    };

    #[tokio::test(start_paused = true)]
    async fn the_model_passes_the_conformance_suite() {
        let model = ModelKv::new(1);
        let broken = conformance::run_all(&conformance::kv::cases(), async |case| {
            Ok(KvFixture::new(Arc::new(model.clone()), Arc::new(model.clone()), "model", case))
        })
        .await;
        assert!(broken.is_empty(), "{broken:#?}");
    }

    #[tokio::test(start_paused = true)]
    async fn the_etcd_directory_passes_its_suite_on_the_model() {
        let model = ModelKv::new(1);
        let mut number = 0;
        let broken = conformance::run_all(&conformance::directory::cases(), async |_| {
            number += 1;
            let directory = |ip: &str| -> Arc<dyn Directory> {
                let session = Session::start(
                    Arc::new(SeededEnv::new(number.into())),
                    Arc::new(model.clone()),
                    LeaseRules::default(),
                );
                let node_ips = vec![ip.parse().unwrap()];
                let config = DirectoryConfig { cluster: Cluster::default(), node_ips, page_size: 2 };
                Arc::new(EtcdDirectory::start(session, config).unwrap())
            };
            let admin = Arc::new(EtcdAdmin(Arc::new(model.clone())));
            DirectoryFixture::new(directory(NODE_IP), directory(OTHER_NODE_IP), admin, number).await
        })
        .await;
        assert!(broken.is_empty(), "{broken:#?}");
    }

    #[tokio::test(start_paused = true)]
    async fn the_etcd_ledger_passes_its_suite_on_the_model() {
        let model = ModelKv::new(1);
        let broken = conformance::run_all(&conformance::ledger::cases(), async |case| {
            let ledger = || -> Arc<dyn Ledger> { Arc::new(EtcdLedger::new(Arc::new(model.clone()), case)) };
            Ok(LedgerFixture::new(ledger(), ledger()))
        })
        .await;
        assert!(broken.is_empty(), "{broken:#?}");
    }
}

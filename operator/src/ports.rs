//! What the operator reaches the world through.

use std::sync::Arc;

use basal_crds::{names::Cluster, resources::LedgerStore};
use basal_ipam::ledger::Ledger;
use basal_kvstore::{kv::Kv, ledger::EtcdLedger};
use basal_objects::{
    leadership::{LeaderWrites, Leadership, TermId},
    ledger::ObjectLedger,
    port::Objects,
};
use basal_runtime::env::SharedEnv;
use tokio::sync::watch;

use crate::{
    denials::{Denials, Noted},
    store::{CustomResources, Etcd, Store},
};

/// The ports of one operator process, and whose cluster it works for.
#[derive(Clone)]
pub struct Ports {
    /// Clock, randomness, tasks.
    pub env: SharedEnv,
    /// The API server.
    pub objects: Arc<dyn Objects>,
    /// The store of claims, with what is published beside CiliumNodes.
    pub store: Arc<dyn Store>,
    /// The ledger in that store.
    pub ledger: Arc<dyn Ledger>,
    /// The etcd that is reached, whichever store this is.
    pub kv: Option<Arc<dyn Kv>>,
    /// The cluster.
    pub cluster: Cluster,
}

impl Ports {
    /// Ports with claims and records in etcd.
    #[must_use]
    pub fn new(env: SharedEnv, objects: Arc<dyn Objects>, kv: Arc<dyn Kv>, cluster: Cluster) -> Self {
        let store = Etcd::new(kv, cluster.name().clone());
        Self::over(env, objects, Arc::new(store), cluster)
    }

    /// Ports with claims in custom resources.
    #[must_use]
    pub fn without_etcd(env: SharedEnv, objects: Arc<dyn Objects>, cluster: Cluster) -> Self {
        let store = CustomResources::new(cluster.name().clone());
        Self::over(env, objects, Arc::new(store), cluster)
    }

    fn over(env: SharedEnv, objects: Arc<dyn Objects>, store: Arc<dyn Store>, cluster: Cluster) -> Self {
        let (ledger, kv) = (store.ledger(&objects), store.kv());
        Self { env, objects, store, ledger, kv, cluster }
    }

    /// The same ports, with a note of what the API server denies.
    #[must_use]
    pub fn noting(self, denials: &Denials) -> Self {
        Self::over(self.env, Arc::new(Noted::new(self.objects, denials)), self.store, self.cluster)
    }

    /// The ports of a leader: they write only while the term lasts.
    #[must_use]
    pub fn during(&self, leadership: &watch::Receiver<Leadership>, term: TermId) -> Self {
        let objects = Arc::new(LeaderWrites::new(Arc::clone(&self.objects), leadership.clone(), term));
        let store = self.store.during(leadership, term);
        Self::over(Arc::clone(&self.env), objects, store, self.cluster.clone())
    }

    /// The same ports with one of the stores that they reach as the store of claims.
    #[must_use]
    pub fn serving(&self, store: LedgerStore) -> Self {
        if self.store.kind() == store {
            return self.clone();
        }
        let other: Arc<dyn Store> = match &self.kv {
            Some(kv) if store == LedgerStore::Etcd => Arc::new(Etcd::new(Arc::clone(kv), self.cluster.name().clone())),
            _ => Arc::new(CustomResources::new(self.cluster.name().clone())),
        };
        let ledger = other.ledger(&self.objects);
        Self { store: other, ledger, ..self.clone() }
    }

    /// A ledger of these ports to be filled while the claims are moved into it.
    pub(crate) fn filled(&self, store: LedgerStore, kv: &Arc<dyn Kv>) -> Arc<dyn Ledger> {
        let cluster = self.cluster.name().as_str();
        match store {
            LedgerStore::Etcd => Arc::new(EtcdLedger::new(Arc::clone(kv), cluster)),
            LedgerStore::CustomResources => Arc::new(ObjectLedger::filled(Arc::clone(&self.objects), cluster)),
        }
    }
}

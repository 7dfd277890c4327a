//! What the operator reaches the world through.

use std::sync::Arc;

use basal_crds::names::Cluster;
use basal_ipam::ledger::Ledger;
use basal_kvstore::{
    kv::Kv,
    ledger::{EtcdLedger, LedgerKeys},
    records::NodeRecords,
};
use basal_objects::port::Objects;
use basal_runtime::env::SharedEnv;

/// The ports of one operator process, and whose cluster it works for.
#[derive(Clone)]
pub struct Ports {
    /// Clock, randomness, tasks.
    pub env: SharedEnv,
    /// The API server.
    pub objects: Arc<dyn Objects>,
    /// etcd.
    pub kv: Arc<dyn Kv>,
    /// The ledger in that etcd.
    pub ledger: Arc<dyn Ledger>,
    /// Where the ledger lies, for conditions of other writes.
    pub ledger_keys: LedgerKeys,
    /// The cluster.
    pub cluster: Cluster,
}

impl Ports {
    /// Ports with the ledger in etcd.
    #[must_use]
    pub fn new(env: SharedEnv, objects: Arc<dyn Objects>, kv: Arc<dyn Kv>, cluster: Cluster) -> Self {
        let ledger = EtcdLedger::new(Arc::clone(&kv), cluster.name().as_str());
        let ledger_keys = ledger.keys().clone();
        Self { env, objects, kv, ledger: Arc::new(ledger), ledger_keys, cluster }
    }

    /// The node records in that etcd.
    #[must_use]
    pub fn records(&self) -> NodeRecords {
        NodeRecords::new(Arc::clone(&self.kv), self.ledger_keys.clone(), self.cluster.name().clone())
    }
}

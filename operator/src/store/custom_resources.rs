//! Without etcd.

use std::{collections::BTreeMap, sync::Arc};

use async_trait::async_trait;
use basal_crds::{identity::IdentityRange, names::ClusterName, resources::LedgerStore};
use basal_ipam::{
    ledger::{Guard, Ledger},
    names::{NodeName, TermId},
};
use basal_kvstore::kv::{KeyValue, Revision};
use basal_objects::{
    leadership::{self, Leadership},
    ledger::ObjectLedger,
    port::Objects,
};
use basal_runtime::{
    env::{SharedEnv, TaskHandle},
    readiness::Readiness,
};
use futures::future::BoxFuture;
use tokio::sync::watch;

use super::{Publication, RecordChange, Store, StoreError, identities};
use crate::{
    duties::DutySettings,
    metrics::OperatorMetrics,
    node::{NodeError, Records},
    ports::Ports,
};

/// Claims in PodCIDRCells; nothing is published beside CiliumNodes.
pub struct CustomResources {
    cluster: ClusterName,
}

impl CustomResources {
    /// The store of a cluster.
    #[must_use]
    pub fn new(cluster: ClusterName) -> Self {
        Self { cluster }
    }
}

#[async_trait]
impl Store for CustomResources {
    fn kind(&self) -> LedgerStore {
        LedgerStore::CustomResources
    }

    fn publication(&self) -> Publication {
        Publication::Status
    }

    fn ledger(&self, objects: &Arc<dyn Objects>) -> Arc<dyn Ledger> {
        Arc::new(ObjectLedger::new(Arc::clone(objects), self.cluster.as_str()))
    }

    /// The port to the API server is guarded already.
    fn during(&self, _: &watch::Receiver<Leadership>, _: leadership::TermId) -> Arc<dyn Store> {
        Arc::new(Self::new(self.cluster.clone()))
    }

    fn follow(&self, _: &SharedEnv, _: &Readiness) -> (Records, Option<TaskHandle>) {
        (Records::none(), None)
    }

    /// The API server is one cluster's.
    async fn own(&self, _: &Arc<dyn Objects>) -> Result<(), StoreError> {
        Ok(())
    }

    fn probe(&self, _: &Arc<dyn Objects>) -> Option<(&'static str, BoxFuture<'static, Result<(), StoreError>>)> {
        None
    }

    /// CiliumEndpoints say which addresses live, and those are looked at in both stores.
    async fn addresses(&self) -> Result<Vec<String>, NodeError> {
        Ok(Vec::new())
    }

    async fn records(&self) -> Result<BTreeMap<String, KeyValue>, NodeError> {
        Ok(BTreeMap::new())
    }

    /// No plan asks for it where [`Publication::Status`] is the way.
    async fn write(&self, _: &NodeName, _: &Guard, _: RecordChange) -> Result<Revision, NodeError> {
        Err(NodeError::GuardLost)
    }

    fn duties(&self, ports: &Ports, _: &TermId, settings: DutySettings, metrics: &OperatorMetrics) -> Vec<TaskHandle> {
        let range = IdentityRange::of(ports.cluster.id());
        let start = |interval| {
            let pace = (interval, settings.identity_heartbeat);
            identities::start(&ports.env, &ports.objects, range, pace, metrics)
        };
        settings.identity_gc.map(start).into_iter().collect()
    }
}

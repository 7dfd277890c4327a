//! With etcd.

use std::{collections::BTreeMap, sync::Arc};

use async_trait::async_trait;
use basal_crds::{kvstore::keys, names::ClusterName, resources::LedgerStore};
use basal_ipam::{
    ledger::{Guard, Ledger},
    names::{NodeName, TermId},
};
use basal_kvstore::{
    kv::{KeyValue, Kv, Range, Revision},
    ledger::{EtcdLedger, LedgerKeys, look, own},
    list_watch::{ListWatch, list_watch},
    pages::{PAGE_SIZE, list},
    records::{Guarded, NodeRecords},
};
use basal_objects::{
    leadership::{self, Leadership},
    object::{ObjectKey, resources},
    port::Objects,
};
use basal_runtime::{
    env::{SharedEnv, TaskHandle},
    readiness::Readiness,
};
use futures::{StreamExt as _, future::BoxFuture};
use tokio::sync::{OnceCell, watch};

use super::{Publication, RecordChange, Store, StoreError};
use crate::{
    duties::{self, DutySettings},
    metrics::OperatorMetrics,
    node::{NodeError, Records},
    ports::Ports,
    term::kv::TermKv,
};

/// Claims and node records in etcd.
pub struct Etcd {
    kv: Arc<dyn Kv>,
    cluster: ClusterName,
    records: NodeRecords,
    /// What the API server says that this cluster is, once it was asked.
    cluster_uid: Arc<OnceCell<String>>,
}

impl Etcd {
    /// The store of a cluster.
    #[must_use]
    pub fn new(kv: Arc<dyn Kv>, cluster: ClusterName) -> Self {
        let keys = LedgerKeys::new(cluster.as_str());
        let records = NodeRecords::new(Arc::clone(&kv), keys, cluster.clone());
        Self { kv, cluster, records, cluster_uid: Arc::default() }
    }
}

/// What tells one Kubernetes cluster from all others: the uid of its namespace kube-system, which cannot be deleted.
async fn cluster_uid(objects: &dyn Objects) -> Result<String, StoreError> {
    let namespace = objects.get(resources::NAMESPACE, &ObjectKey::cluster("kube-system")).await?;
    namespace.map(|namespace| namespace.uid().to_owned()).ok_or(StoreError::NoCluster)
}

#[async_trait]
impl Store for Etcd {
    fn kind(&self) -> LedgerStore {
        LedgerStore::Etcd
    }

    fn publication(&self) -> Publication {
        Publication::Record
    }

    fn kv(&self) -> Option<Arc<dyn Kv>> {
        Some(Arc::clone(&self.kv))
    }

    fn ledger(&self, _: &Arc<dyn Objects>) -> Arc<dyn Ledger> {
        Arc::new(EtcdLedger::new(Arc::clone(&self.kv), self.cluster.as_str()))
    }

    fn during(&self, leadership: &watch::Receiver<Leadership>, term: leadership::TermId) -> Arc<dyn Store> {
        let kv = Arc::new(TermKv::new(Arc::clone(&self.kv), leadership.clone(), term));
        Arc::new(Self { cluster_uid: Arc::clone(&self.cluster_uid), ..Self::new(kv, self.cluster.clone()) })
    }

    fn follow(&self, env: &SharedEnv, readiness: &Readiness) -> (Records, Option<TaskHandle>) {
        let (records, prefix) = (Records::default(), keys::nodes_of(&self.cluster));
        let (follower, ready) = (records.clone(), readiness.guard("node records in etcd"));
        let mut updates = list_watch(Arc::clone(env), Arc::clone(&self.kv), ListWatch::new(prefix.clone()));
        let task = env.spawn(
            "node-records",
            Box::pin(async move {
                ready.not_ready("not listed yet");
                while let Some(update) = updates.next().await {
                    follower.apply(&prefix, update);
                    if follower.synced() {
                        ready.ready();
                    }
                }
            }),
        );
        (records, Some(task))
    }

    async fn own(&self, objects: &Arc<dyn Objects>) -> Result<(), StoreError> {
        let uid = self.cluster_uid.get_or_try_init(|| cluster_uid(objects.as_ref())).await?;
        Ok(own(self.kv.as_ref(), &LedgerKeys::new(self.cluster.as_str()), uid).await?)
    }

    fn probe(&self, objects: &Arc<dyn Objects>) -> Option<(&'static str, BoxFuture<'static, Result<(), StoreError>>)> {
        let (kv, objects, uid) = (Arc::clone(&self.kv), Arc::clone(objects), Arc::clone(&self.cluster_uid));
        let keys = LedgerKeys::new(self.cluster.as_str());
        let look = async move {
            let uid = uid.get_or_try_init(|| cluster_uid(objects.as_ref())).await?;
            Ok(look(kv.as_ref(), &keys, uid).await?)
        };
        Some(("etcd", Box::pin(look)))
    }

    async fn addresses(&self) -> Result<Vec<String>, NodeError> {
        let records = self.kv.range(Range { keys_only: true, ..Range::prefix(keys::IPS_PREFIX) }).await?;
        Ok(records.kvs.into_iter().map(|kv| kv.key).collect())
    }

    async fn records(&self) -> Result<BTreeMap<String, KeyValue>, NodeError> {
        let prefix = keys::nodes_of(&self.cluster);
        let listed = list(self.kv.as_ref(), &prefix, PAGE_SIZE, false).await?;
        let named = |kv: KeyValue| (kv.key.strip_prefix(&prefix).unwrap_or(&kv.key).to_owned(), kv);
        Ok(listed.kvs.into_iter().map(named).collect())
    }

    async fn write(&self, name: &NodeName, guard: &Guard, change: RecordChange) -> Result<Revision, NodeError> {
        let written = match change {
            RecordChange::Publish(text) => self.records.publish(guard, name, text).await,
            RecordChange::Withdraw => self.records.withdraw(guard, name).await,
            RecordChange::WithdrawAddresses(keys) => self.records.withdraw_addresses(guard, &keys).await,
        };
        match written {
            Guarded::Done(revision) => Ok(revision),
            Guarded::GuardLost => Err(NodeError::GuardLost),
            Guarded::Refused(refusal) => Err(refusal.into()),
            Guarded::Unknown(why) => Err(NodeError::KvUnknown(why)),
        }
    }

    fn duties(
        &self,
        ports: &Ports,
        term: &TermId,
        settings: DutySettings,
        metrics: &OperatorMetrics,
    ) -> Vec<TaskHandle> {
        duties::start(ports, Arc::clone(&self.kv), term, settings, metrics)
    }
}

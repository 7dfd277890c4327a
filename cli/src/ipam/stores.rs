//! Where a check reads, and one consistent look.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use anyhow::Context as _;
use basal_crds::{kvstore::keys, names::ClusterName};
use basal_ipam::{
    cell::{Block, CellId, Version},
    check::{Facts, Read},
    config::PoolConfig,
    ledger::{FenceSeen, Ledger, Loaded},
    owners::Source,
    prefix::PodCidr,
};
use basal_kvstore::{
    etcd::{EtcdKv, Limits},
    kv::{Kv, Revision},
    ledger::{EtcdLedger, LedgerKeys},
    pages::{PAGE_SIZE, list_at},
};
use basal_objects::{
    kube::KubeObjects,
    ledger::ObjectLedger,
    object::{Object, Resource, resources},
    port::{Freshness, Objects, Scope},
};
use basal_runtime::env::{SharedEnv, SystemEnv};

use super::{config::CheckConfig, overdue::overdue, read};

/// The servers, and whose cluster it is.
#[derive(Clone)]
pub(super) struct Stores {
    pub(super) env: SharedEnv,
    pub(super) objects: Arc<dyn Objects>,
    /// The cells, whichever store they are in.
    pub(super) ledger: Arc<dyn Ledger>,
    /// Where records are kept, unless it is in custom resources.
    pub(super) etcd: Option<Etcd>,
    pub(super) cluster: ClusterName,
    pub(super) pool: PoolConfig,
    pub(super) quarantine: Duration,
}

/// Basal's etcd.
#[derive(Clone)]
pub(super) struct Etcd {
    pub(super) kv: Arc<dyn Kv>,
    /// Where the ledger lies in it.
    pub(super) keys: LedgerKeys,
}

/// What one look saw.
#[derive(Debug, Clone)]
pub(super) struct Look {
    /// What is judged.
    pub(super) facts: Facts,
    /// The fence of the ledger.
    pub(super) fence: FenceSeen,
    /// The version of each cell.
    pub(super) cells: BTreeMap<CellId, Version>,
    /// The revision of etcd that wrote each node record.
    pub(super) records: BTreeMap<String, Revision>,
}

impl Stores {
    /// Makes the clients; nothing is read yet.
    pub(super) async fn connect(config: &CheckConfig) -> anyhow::Result<Self> {
        let env: SharedEnv = Arc::new(SystemEnv);
        let (cluster, pool) = (config.cluster()?, config.pool()?);
        let kvstore = config.kvstore()?;
        let objects: Arc<dyn Objects> = Arc::new(KubeObjects::connect(&config.reach, "basal", Arc::clone(&env)).await?);
        let (etcd, ledger): (_, Arc<dyn Ledger>) = match kvstore {
            Some(options) => {
                let kv: Arc<dyn Kv> = Arc::new(EtcdKv::new(&env, &options.load()?, Limits::from(&options)).await?);
                let ledger = EtcdLedger::new(Arc::clone(&kv), cluster.as_str());
                (Some(Etcd { kv, keys: ledger.keys().clone() }), Arc::new(ledger))
            }
            None => (None, Arc::new(ObjectLedger::new(Arc::clone(&objects), cluster.as_str()))),
        };
        let quarantine = config.pool.cluster_pool_quarantine.0;
        Ok(Self { env, objects, ledger, etcd, cluster, pool, quarantine })
    }

    /// By what agents know that a block is a node's.
    pub(super) fn published(&self) -> Source {
        if self.etcd.is_some() { Source::Record } else { Source::Confirmation }
    }

    /// Reads everything: etcd as of one revision, each kind of object as of one resourceVersion.
    pub(super) async fn look(&self) -> anyhow::Result<Look> {
        let loaded = self.load().await?;
        let mut look = Look {
            facts: Facts::new(self.pool.clone(), self.published()),
            fence: loaded.fence.clone(),
            cells: loaded.cells.iter().map(|(id, stored)| (*id, stored.version)).collect(),
            records: BTreeMap::new(),
        };
        look.facts.cells = loaded.cells.iter().map(|(id, stored)| (*id, read::cell(stored))).collect();
        look.facts.strays.clone_from(&loaded.strays);
        if let Some(etcd) = &self.etcd {
            self.look_at_etcd(etcd, &loaded, &mut look).await?;
        }
        let list = |resource| self.list(resource);
        let (nodes, cilium_nodes, endpoints) =
            futures::try_join!(list(resources::NODE), list(resources::CILIUM_NODE), list(resources::CILIUM_ENDPOINT))?;
        look.facts.nodes = by_name(&nodes, read::node);
        look.facts.cilium_nodes = by_name(&cilium_nodes, read::cilium_node);
        look.facts.endpoints = by_name(&endpoints, read::endpoint);
        Ok(look)
    }

    /// The cells as they are now, whatever the store was before.
    pub(super) async fn load(&self) -> anyhow::Result<Loaded> {
        self.ledger.begin().await.context("the ledger")?;
        self.ledger.load().await.context("the ledger")
    }

    async fn look_at_etcd(&self, etcd: &Etcd, loaded: &Loaded, look: &mut Look) -> anyhow::Result<()> {
        let (kv, revision) = (etcd.kv.as_ref(), loaded.mark.revision);
        let prefix = keys::nodes_of(&self.cluster);
        let records = list_at(kv, &prefix, revision, PAGE_SIZE).await.context("the node records")?;
        let ips = list_at(kv, keys::IPS_PREFIX, revision, PAGE_SIZE).await.context("the ip→identity records")?;
        let facts = &mut look.facts;
        facts.overdue = overdue(kv, &etcd.keys, loaded, self.quarantine).await.context("the ledger's history")?;
        let name = |key: &str, prefix: &str| key.strip_prefix(prefix).unwrap_or(key).to_owned();
        facts.records = records.kvs.iter().map(|kv| (name(&kv.key, &prefix), read::record(kv))).collect();
        facts.ips = ips.kvs.iter().map(|kv| (name(&kv.key, keys::IPS_PREFIX), read::ip(kv))).collect();
        look.records = records.kvs.iter().map(|kv| (name(&kv.key, &prefix), kv.mod_revision)).collect();
        Ok(())
    }

    async fn list(&self, resource: Resource) -> anyhow::Result<Vec<Object>> {
        let listed = self.objects.list(resource, &Scope::default(), Freshness::Quorum).await;
        Ok(listed.with_context(|| format!("the list of {}s", resource.kind))?.items)
    }
}

fn by_name<T>(objects: &[Object], read: fn(&Object) -> Read<T>) -> BTreeMap<String, Read<T>> {
    objects.iter().map(|object| (object.key().to_string(), read(object))).collect()
}

/// The blocks of all readable cells.
pub(super) fn blocks(loaded: &Loaded) -> impl Iterator<Item = (PodCidr, &Block)> {
    let cells = loaded.cells.values().filter_map(|stored| stored.cell.as_ref().ok());
    cells.flat_map(|cell| cell.blocks().iter().map(|(at, block)| (*at, block)))
}

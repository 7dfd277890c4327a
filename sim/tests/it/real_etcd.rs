//! A real etcd keeps the promises that the model keeps.

use std::sync::Arc;

use async_trait::async_trait;
use basal_crds::{directory::Directory, names::Cluster};
use basal_e2e::servers::{Etcd, EtcdOptions};
use basal_ipam::ledger::Ledger;
use basal_kvstore::{
    config::{EtcdConfig, KvstoreOptions, Source},
    directory::{DirectoryConfig, EtcdDirectory},
    etcd::{EtcdKv, Limits},
    kv::{Kv, Revision},
    leases::LeaseRules,
    ledger::EtcdLedger,
    session::Session,
};
use basal_runtime::env::{SharedEnv, SystemEnv};
use basal_sim::conformance::{
    self,
    directory::{DirectoryFixture, EtcdAdmin, NODE_IP, OTHER_NODE_IP},
    kv::{KvAdmin, KvFixture},
    ledger::LedgerFixture,
};

struct Admin(Etcd);

#[async_trait]
impl KvAdmin for Admin {
    async fn compact(&self, revision: Revision) -> Result<(), String> {
        let args = ["compact", &revision.to_string()];
        tokio::task::block_in_place(|| self.0.etcdctl(&args)).map(drop).map_err(|error| format!("{error:#}"))
    }
}

async fn connect(etcd: &Etcd) -> Arc<dyn Kv> {
    let config = EtcdConfig::from_address(&etcd.endpoint()).unwrap();
    let limits = Limits::from(&KvstoreOptions::new(Source::Address(etcd.endpoint())));
    let env: SharedEnv = Arc::new(SystemEnv);
    Arc::new(EtcdKv::new(&env, &config, limits).await.unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn etcd_passes_the_conformance_suite() {
    let etcd = tokio::task::block_in_place(|| Etcd::start(EtcdOptions::default()).unwrap());
    let kv = connect(&etcd).await;
    let admin: Arc<dyn KvAdmin> = Arc::new(Admin(etcd));
    let broken = conformance::run_all(&conformance::kv::cases(), async |case| {
        Ok(KvFixture::new(Arc::clone(&kv), Arc::clone(&admin), "etcd", case))
    })
    .await;
    assert!(broken.is_empty(), "{broken:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_directory_in_etcd_passes_the_conformance_suite() {
    let etcd = tokio::task::block_in_place(|| Etcd::start(EtcdOptions::default()).unwrap());
    let kv = connect(&etcd).await;
    let mut number = 0;
    let broken = conformance::run_all(&conformance::directory::cases(), async |_| {
        number += 1;
        let directory = |ip: &str| -> Arc<dyn Directory> {
            let session = Session::start(Arc::new(SystemEnv), Arc::clone(&kv), LeaseRules::default());
            let node_ips = vec![ip.parse().unwrap()];
            let config = DirectoryConfig { cluster: Cluster::default(), node_ips, page_size: 2 };
            Arc::new(EtcdDirectory::start(session, config).unwrap())
        };
        let admin = Arc::new(EtcdAdmin(Arc::clone(&kv)));
        DirectoryFixture::new(directory(NODE_IP), directory(OTHER_NODE_IP), admin, number).await
    })
    .await;
    assert!(broken.is_empty(), "{broken:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_ledger_in_etcd_passes_the_conformance_suite() {
    let etcd = tokio::task::block_in_place(|| Etcd::start(EtcdOptions::default()).unwrap());
    let (one, other) = (connect(&etcd).await, connect(&etcd).await);
    let broken = conformance::run_all(&conformance::ledger::cases(), async |case| {
        let ledger = |kv: &Arc<dyn Kv>| -> Arc<dyn Ledger> { Arc::new(EtcdLedger::new(Arc::clone(kv), case)) };
        Ok(LedgerFixture::new(ledger(&one), ledger(&other)))
    })
    .await;
    assert!(broken.is_empty(), "{broken:#?}");
}

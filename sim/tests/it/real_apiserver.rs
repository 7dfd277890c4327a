//! A real kube-apiserver keeps the promises that the model keeps.

use std::{sync::Arc, time::Duration};

use basal_crds::{directory::Directory, names::Cluster};
use basal_e2e::servers::{ApiServer, ApiServerOptions};
use basal_ipam::ledger::Ledger;
use basal_objects::{
    crd_install,
    directory::{DirectoryConfig, ObjectDirectory},
    kube::{KubeFlags, KubeObjects},
    ledger::ObjectLedger,
    object::Object,
    port::Objects,
};
use basal_runtime::env::{SharedEnv, SystemEnv};
use basal_sim::conformance::{
    self,
    directory::{self, DirectoryFixture, NODE_IP, OTHER_NODE_IP, ObjectsAdmin},
    ledger::LedgerFixture,
    objects::{ObjectsFixture, prepare},
};

fn env() -> SharedEnv {
    Arc::new(SystemEnv)
}

async fn connect(server: &ApiServer) -> Arc<dyn Objects> {
    let flags = KubeFlags { k8s_kubeconfig_path: Some(server.kubeconfig("admin").unwrap()), ..KubeFlags::default() };
    Arc::new(KubeObjects::connect(&flags, "basal-test", env()).await.unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_ledger_in_custom_resources_passes_the_conformance_suite() {
    let server = tokio::task::block_in_place(|| ApiServer::start(ApiServerOptions::default()).unwrap());
    let objects = connect(&server).await;
    let kinds: Vec<Object> = basal_crds::crds().into_iter().map(|definition| Object(definition.object)).collect();
    crd_install::install(objects.as_ref(), env().as_ref(), &kinds, Duration::from_secs(60)).await.unwrap();
    let mut number = 0;
    let broken = conformance::run_all(&conformance::ledger::cases(), async |_| {
        number += 1;
        let cluster = format!("c{number}");
        let ledger = || -> Arc<dyn Ledger> { Arc::new(ObjectLedger::new(Arc::clone(&objects), &cluster)) };
        Ok(LedgerFixture::new(ledger(), ledger()))
    })
    .await;
    assert!(broken.is_empty(), "{broken:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn kube_apiserver_passes_the_conformance_suite() {
    let server = tokio::task::block_in_place(|| ApiServer::start(ApiServerOptions::default()).unwrap());
    let objects = connect(&server).await;
    prepare(&objects).await.unwrap();
    let broken = conformance::run_all(&conformance::objects::cases(), async |case| {
        ObjectsFixture::new(Arc::clone(&objects), case).await
    })
    .await;
    assert!(broken.is_empty(), "{broken:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_directory_in_custom_resources_passes_the_conformance_suite() {
    let server = tokio::task::block_in_place(|| ApiServer::start(ApiServerOptions::default()).unwrap());
    let objects = connect(&server).await;
    directory::prepare(&objects).await.unwrap();
    let mut number = 0;
    let broken = conformance::run_all(&directory::cases(), async |_| {
        number += 1;
        let open = |ip: &str| -> Arc<dyn Directory> {
            let config = DirectoryConfig { cluster: Cluster::default(), node_ips: vec![ip.parse().unwrap()] };
            Arc::new(ObjectDirectory::start(&env(), Arc::clone(&objects), config))
        };
        let admin = Arc::new(ObjectsAdmin(Arc::clone(&objects)));
        DirectoryFixture::new(open(NODE_IP), open(OTHER_NODE_IP), admin, number).await
    })
    .await;
    assert!(broken.is_empty(), "{broken:#?}");
}

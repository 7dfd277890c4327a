//! A real kube-apiserver keeps the promises that the model keeps.

use std::sync::Arc;

use basal_crds::{directory::Directory, names::Cluster};
use basal_e2e::servers::{ApiServer, ApiServerOptions};
use basal_objects::{
    directory::{DirectoryConfig, ObjectDirectory},
    kube::{KubeFlags, KubeObjects},
    port::Objects,
};
use basal_runtime::env::{SharedEnv, SystemEnv};
use basal_sim::conformance::{
    self,
    directory::{self, DirectoryFixture, NODE_IP, OTHER_NODE_IP, ObjectsAdmin},
    objects::{ObjectsFixture, prepare},
};

fn env() -> SharedEnv {
    Arc::new(SystemEnv)
}

async fn connect(server: &ApiServer) -> Arc<dyn Objects> {
    let flags = KubeFlags { k8s_kubeconfig_path: Some(server.kubeconfig("admin").unwrap()), ..KubeFlags::default() };
    Arc::new(KubeObjects::connect(&flags, env()).await.unwrap())
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

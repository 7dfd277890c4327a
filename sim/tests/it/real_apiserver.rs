//! A real kube-apiserver keeps the promises that the model keeps.

use std::sync::Arc;

use basal_e2e::servers::{ApiServer, ApiServerOptions};
use basal_objects::{
    kube::{KubeFlags, KubeObjects},
    port::Objects,
};
use basal_runtime::env::{SharedEnv, SystemEnv};
use basal_sim::conformance::{
    self,
    objects::{ObjectsFixture, prepare},
};

#[tokio::test(flavor = "multi_thread")]
async fn kube_apiserver_passes_the_conformance_suite() {
    let server = tokio::task::block_in_place(|| ApiServer::start(ApiServerOptions::default()).unwrap());
    let flags = KubeFlags { k8s_kubeconfig_path: Some(server.kubeconfig("admin").unwrap()), ..KubeFlags::default() };
    let env: SharedEnv = Arc::new(SystemEnv);
    let objects: Arc<dyn Objects> = Arc::new(KubeObjects::connect(&flags, env).await.unwrap());
    prepare(&objects).await.unwrap();
    let broken = conformance::run_all(&conformance::objects::cases(), async |case| {
        ObjectsFixture::new(Arc::clone(&objects), case).await
    })
    .await;
    assert!(broken.is_empty(), "{broken:#?}");
}

//! The adapter and what stands on it, against a real kube-apiserver with a real etcd; the directory over the model.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

mod above;
mod connections;
mod directory;
mod managers;
mod requests;
mod watches;

use std::{future::Future, path::PathBuf, sync::Arc, time::Duration};

use basal_e2e::servers::{ApiServer, ApiServerOptions, StaticUser};
use basal_objects::{
    kube::{KubeFlags, KubeObjects},
    object::{Object, ObjectKey, resources::NODE},
    port::{MergePatch, Objects},
};
use basal_runtime::env::{SharedEnv, SystemEnv};
use serde_json::{Value, json};
use tokio::time::timeout;

/// How long anything may take before a test says what it waited for.
const LIMIT: Duration = Duration::from_secs(120);

fn env() -> SharedEnv {
    Arc::new(SystemEnv)
}

/// An API server with the users `admin`, who may do all, and `nobody`, who may do nothing.
fn start() -> ApiServer {
    let users = vec![StaticUser { name: "nobody".to_owned(), groups: vec![] }];
    ApiServer::start(ApiServerOptions { users, ..ApiServerOptions::default() }).unwrap()
}

async fn connect(server: &ApiServer, user: &str) -> KubeObjects {
    connect_to(server.kubeconfig(user).unwrap(), vec![]).await
}

async fn connect_to(kubeconfig: PathBuf, urls: Vec<String>) -> KubeObjects {
    let flags = KubeFlags { k8s_kubeconfig_path: Some(kubeconfig), k8s_api_server_urls: urls };
    KubeObjects::connect(&flags, "basal-test", env()).await.unwrap()
}

/// Waits, but not for ever.
async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    match timeout(LIMIT, future).await {
        Ok(value) => value,
        Err(_elapsed) => panic!("waited {} s for {what}", LIMIT.as_secs()),
    }
}

/// Asks again and again until the answer is yes.
async fn until(what: &str, mut yes: impl AsyncFnMut() -> bool) {
    within(what, async {
        while !yes().await {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await;
}

fn node(name: &str) -> Object {
    Object(json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}}))
}

/// Creates a node through the port and answers it as stored.
async fn created(objects: &dyn Objects, name: &str) -> Object {
    match objects.create(NODE, node(name)).await {
        basal_runtime::outcome::Outcome::Done(object) => object,
        other => panic!("node {name} was not created: {other:?}"),
    }
}

fn patch(object: &Object, body: Value) -> MergePatch {
    MergePatch {
        resource_version: object.resource_version().to_owned(),
        uid: object.uid().to_owned(),
        subresource: None,
        body,
    }
}

fn named(name: &str) -> ObjectKey {
    ObjectKey::cluster(name)
}

//! Real servers on loopback and clients for them.

use std::{path::PathBuf, sync::Arc, time::Duration};

use anyhow::{Context as _, bail};
use basal_e2e::servers::{ApiServer, ApiServerOptions, Etcd, EtcdOptions, basal_users};
use basal_kvstore::{
    config::{KvstoreOptions, Source},
    etcd::{EtcdKv, Limits},
    kv::Kv,
};
use basal_objects::{
    kube::{KubeFlags, KubeObjects},
    object::{Object, resources},
    port::{Objects, Refusal},
};
use basal_runtime::{
    env::{SharedEnv, SystemEnv},
    outcome::Outcome,
};
use futures::{Stream, StreamExt as _, stream};
use serde_json::json;
use tokio::runtime::Runtime;

/// Nodes that are made at the same time: twice as many as the operator writes at once, so that it never waits for them.
const CREATES: usize = 64;

/// kube-apiserver and its etcd, and Basal's etcd with TLS and users as in production. Each case has fresh ones.
pub(crate) struct Servers {
    /// The API server.
    pub(crate) api: ApiServer,
    /// Basal's etcd.
    pub(crate) etcd: Etcd,
}

impl Servers {
    /// Starts them.
    pub(crate) fn start() -> anyhow::Result<Self> {
        let etcd = Etcd::start(EtcdOptions { tls: true, users: basal_users(), ..EtcdOptions::default() })?;
        Ok(Self { api: ApiServer::start(ApiServerOptions::default())?, etcd })
    }

    /// The kubeconfig of the user that the operator, its rivals and the bench are. It is in `system:masters`, which no
    /// priority level of the API server holds back.
    pub(crate) fn kubeconfig(&self) -> anyhow::Result<PathBuf> {
        self.api.kubeconfig("admin")
    }

    /// The client file for Basal's etcd.
    pub(crate) fn etcd_config(&self) -> anyhow::Result<PathBuf> {
        self.etcd.client_config("basal-operator")
    }

    /// Clients of the bench.
    pub(crate) async fn clients(&self) -> anyhow::Result<Clients> {
        let env: SharedEnv = Arc::new(SystemEnv);
        let flags = KubeFlags { k8s_kubeconfig_path: Some(self.kubeconfig()?), k8s_api_server_urls: Vec::new() };
        let objects = Arc::new(KubeObjects::connect(&flags, Arc::clone(&env)).await?);
        let options = KvstoreOptions::new(Source::File(self.etcd_config()?));
        let kv: Arc<dyn Kv> = Arc::new(EtcdKv::new(&env, &options.load()?, Limits::from(&options)).await?);
        Ok(Clients { env, objects, kv })
    }
}

/// Clients of the bench.
pub(crate) struct Clients {
    /// The surroundings.
    pub(crate) env: SharedEnv,
    /// The API server, at no pace.
    pub(crate) objects: Arc<dyn Objects>,
    /// Basal's etcd.
    pub(crate) kv: Arc<dyn Kv>,
}

/// The name of a Node.
pub(crate) fn name(number: u32) -> String {
    format!("node-{number}")
}

/// The labels of a Node, as a kubelet sets them.
pub(crate) fn labels(number: u32) -> [(&'static str, String); 5] {
    [
        ("kubernetes.io/hostname", name(number)),
        ("kubernetes.io/os", "linux".to_owned()),
        ("kubernetes.io/arch", "amd64".to_owned()),
        ("topology.kubernetes.io/region", "r1".to_owned()),
        ("topology.kubernetes.io/zone", format!("z{}", number % 3)),
    ]
}

/// The InternalIPs of a Node, IPv4 and IPv6.
pub(crate) fn addresses(number: u32) -> [String; 2] {
    let (high, low) = (number >> 8, number & 0xff);
    [format!("172.{}.{}.{low}", 16 + (high >> 8), high & 0xff), format!("fc00::{number:x}")]
}

/// Makes Nodes that no kubelet runs on, as fast as the API server takes them.
pub(crate) fn create_nodes(
    objects: &dyn Objects,
    numbers: std::ops::Range<u32>,
) -> impl Stream<Item = anyhow::Result<(u32, Object)>> {
    let create = move |number| async move {
        let [v4, v6] = addresses(number);
        let labels: serde_json::Map<String, serde_json::Value> =
            labels(number).into_iter().map(|(key, value)| (key.to_owned(), value.into())).collect();
        let node = json!({
            "apiVersion": "v1", "kind": "Node",
            "metadata": { "name": name(number), "labels": labels },
            "status": { "addresses": [
                { "type": "InternalIP", "address": v4 },
                { "type": "InternalIP", "address": v6 },
                { "type": "Hostname", "address": name(number) },
            ] },
        });
        let created = objects.create(resources::NODE, Object(node)).await;
        Ok((number, done(created).with_context(|| format!("creating {}", name(number)))?))
    };
    stream::iter(numbers).map(create).buffer_unordered(CREATES)
}

/// The object of a write, which must have been carried out.
pub(crate) fn done<T>(outcome: Outcome<T, Refusal>) -> anyhow::Result<T> {
    match outcome {
        Outcome::Done(value) => Ok(value),
        Outcome::Refused(refusal) => bail!("{refusal}"),
        Outcome::Unknown(why) => bail!("no answer: {why}"),
    }
}

/// Runs to the end, but no longer than `limit`.
pub(crate) fn within<T>(
    runtime: &Runtime,
    what: &str,
    limit: Duration,
    future: impl Future<Output = anyhow::Result<T>>,
) -> anyhow::Result<T> {
    runtime
        .block_on(async { tokio::time::timeout(limit, future).await })
        .with_context(|| format!("{what} took more than {} s", limit.as_secs()))?
}

/// How long that many nodes may take.
pub(crate) fn limit(nodes: u32) -> Duration {
    Duration::from_secs(60) + Duration::from_millis(50) * nodes
}

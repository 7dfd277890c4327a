//! Real servers on loopback and clients for them.

use std::{path::PathBuf, sync::Arc, time::Duration};

use anyhow::{Context as _, bail};
use basal_crds::{
    names::{Cluster, ClusterId, ClusterName},
    resources::crds,
};
use basal_e2e::servers::{ApiServer, ApiServerOptions, Etcd, EtcdOptions, basal_users};
use basal_kvstore::{
    config::{KvstoreOptions, Source},
    etcd::{EtcdKv, Limits},
    kv::Kv,
};
use basal_objects::{
    crd_install,
    kube::{KubeFlags, KubeObjects},
    object::Object,
    port::Refusal,
};
use basal_operator::ports::Ports;
use basal_runtime::{
    env::{SharedEnv, SystemEnv},
    outcome::Outcome,
};
use tokio::runtime::Runtime;

/// Where claims are kept, and where nodes are made known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Store {
    /// In an etcd of Basal's own, with TLS and users as in production.
    Etcd,
    /// In custom resources; the CiliumNode's status is what makes a node known.
    CustomResources,
}

impl Store {
    /// For people.
    pub(crate) fn text(self) -> &'static str {
        match self {
            Self::Etcd => "etcd",
            Self::CustomResources => "custom resources",
        }
    }
}

/// kube-apiserver with its etcd, and Basal's etcd where there is one. Each case has fresh ones.
pub(crate) struct Servers {
    /// The API server.
    pub(crate) api: ApiServer,
    /// Basal's etcd.
    pub(crate) etcd: Option<Etcd>,
}

impl Servers {
    /// Starts them. Without a store of Basal's there is the API server alone.
    pub(crate) fn start(store: Option<Store>) -> anyhow::Result<Self> {
        let etcd = (store == Some(Store::Etcd))
            .then(|| Etcd::start(EtcdOptions { tls: true, users: basal_users(), ..EtcdOptions::default() }))
            .transpose()?;
        Ok(Self { api: ApiServer::start(ApiServerOptions::default())?, etcd })
    }

    /// The kubeconfig of the user that the operator, its rivals and the bench are. It is in `system:masters`, which no
    /// priority level of the API server holds back.
    pub(crate) fn kubeconfig(&self) -> anyhow::Result<PathBuf> {
        self.api.kubeconfig("admin")
    }

    /// The client file for Basal's etcd.
    pub(crate) fn etcd_config(&self) -> anyhow::Result<Option<PathBuf>> {
        self.etcd.as_ref().map(|etcd| etcd.client_config("basal-operator")).transpose()
    }

    /// Clients of the bench, which also makes the kinds, since its nodes come before an operator leads.
    pub(crate) async fn clients(&self) -> anyhow::Result<Clients> {
        let env: SharedEnv = Arc::new(SystemEnv);
        let flags = KubeFlags { k8s_kubeconfig_path: Some(self.kubeconfig()?), k8s_api_server_urls: Vec::new() };
        let objects = Arc::new(KubeObjects::connect(&flags, "basal-bench", Arc::clone(&env)).await?);
        let cluster = Cluster::new(ClusterName::new("default")?, ClusterId::new(0))?;
        let definitions: Vec<Object> = crds().into_iter().map(|definition| Object(definition.object)).collect();
        crd_install::install(objects.as_ref(), env.as_ref(), &definitions, Duration::from_secs(60)).await?;
        let Some(config) = self.etcd_config()? else {
            return Ok(Clients { ports: Ports::without_etcd(env, objects, cluster), kv: None });
        };
        let options = KvstoreOptions::new(Source::File(config));
        let kv: Arc<dyn Kv> = Arc::new(EtcdKv::new(&env, &options.load()?, Limits::from(&options)).await?);
        Ok(Clients { ports: Ports::new(env, objects, Arc::clone(&kv), cluster), kv: Some(kv) })
    }
}

/// Clients of the bench.
pub(crate) struct Clients {
    /// The API server at no pace, and the ledger.
    pub(crate) ports: Ports,
    /// Basal's etcd.
    pub(crate) kv: Option<Arc<dyn Kv>>,
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

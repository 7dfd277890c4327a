//! The servers that the agents talk to, and clients of the bench.

use std::{cell::Cell, fmt, net::Ipv4Addr, path::PathBuf, sync::Arc, time::Duration};

use anyhow::{Context as _, bail};
use basal_crds::resources::crds;
use basal_e2e::servers::{ApiServer, ApiServerOptions, Etcd, EtcdOptions, basal_users};
use basal_kvstore::{
    config::{KvstoreOptions, Source},
    etcd::{EtcdKv, Limits},
    kv::{Kv, Op, Txn},
};
use basal_objects::{
    crd_install,
    kube::{KubeFlags, KubeObjects},
    object::{Object, Resource},
    port::Objects,
};
use basal_runtime::{
    env::{SharedEnv, SystemEnv},
    outcome::Outcome,
};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::Value;
use tempfile::TempDir;
use tokio::runtime::Runtime;

/// Where the servers listen; nodes are neighbours of it.
pub(crate) const HUB: Ipv4Addr = Ipv4Addr::new(172, 30, 0, 1);

/// Operations in a transaction: etcd takes 128.
const OPERATIONS: usize = 120;

/// No step of the bench that waits for servers takes longer.
const PATIENCE: Duration = Duration::from_secs(600);

/// Where an agent reads and writes the records of the cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Store {
    /// In etcd, with TLS and users as in production.
    Etcd,
    /// In custom resources.
    CustomResources,
}

impl Store {
    /// Both.
    pub(crate) const ALL: [Self; 2] = [Self::Etcd, Self::CustomResources];
}

impl fmt::Display for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Etcd => "etcd",
            Self::CustomResources => "custom resources",
        })
    }
}

/// kube-apiserver with its etcd, and Basal's etcd. Agents of either store are in one cluster: neither reads what the other
/// does.
pub(crate) struct Cluster {
    /// The API server.
    pub(crate) api: ApiServer,
    /// Basal's etcd.
    pub(crate) etcd: Etcd,
    /// A client of the API server, at no pace.
    pub(crate) objects: Arc<dyn Objects>,
    /// A client of Basal's etcd.
    pub(crate) kv: Arc<dyn Kv>,
    /// The CNI plugin that agents install.
    pub(crate) plugin: PathBuf,
    /// Folders of the nodes, in memory as `/run` is on a node.
    pub(crate) folder: TempDir,
    /// Whether the load is in both stores.
    pub(crate) is_loaded: Cell<bool>,
    runtime: Runtime,
}

impl Cluster {
    /// Starts the servers and makes the kinds.
    pub(crate) fn start(plugin: PathBuf) -> anyhow::Result<Self> {
        let etcd =
            Etcd::start(EtcdOptions { tls: true, users: basal_users(), address: Some(HUB), ..EtcdOptions::default() })?;
        let api = ApiServer::start(ApiServerOptions { address: Some(HUB), ..ApiServerOptions::default() })?;
        let folder = tempfile::Builder::new().prefix("bag-").tempdir().context("a folder for the nodes")?;
        mount(Some("tmpfs"), folder.path(), Some("tmpfs"), MsFlags::empty(), None::<&str>).context("a tmpfs")?;
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        let (objects, kv) = runtime.block_on(clients(&api, &etcd))?;
        Ok(Self { api, etcd, objects, kv, plugin, folder, is_loaded: Cell::new(false), runtime })
    }

    /// Runs to the end, in bounded time.
    pub(crate) fn wait<T>(&self, what: &str, future: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
        self.runtime
            .block_on(async { tokio::time::timeout(PATIENCE, future).await })
            .with_context(|| format!("{what} took more than {} s", PATIENCE.as_secs()))?
    }

    /// Creates an object.
    pub(crate) async fn create(&self, resource: Resource, object: Value) -> anyhow::Result<Object> {
        done(self.objects.create(resource, Object(object)).await)
            .with_context(|| format!("creating a {}", resource.kind))
    }

    /// Puts values under keys of Basal's etcd.
    pub(crate) async fn put(&self, values: Vec<(String, Vec<u8>)>) -> anyhow::Result<()> {
        let puts: Vec<Op> = values.into_iter().map(|(key, value)| Op::Put { key, value, lease: 0 }).collect();
        for then in puts.chunks(OPERATIONS) {
            done(self.kv.txn(Txn { then: then.to_vec(), ..Txn::default() }).await)?;
        }
        Ok(())
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // It goes with the bench's namespaces at the latest; the folder below can only be removed without it.
        umount2(self.folder.path(), MntFlags::MNT_DETACH).unwrap_or_default();
    }
}

async fn clients(api: &ApiServer, etcd: &Etcd) -> anyhow::Result<(Arc<dyn Objects>, Arc<dyn Kv>)> {
    let env: SharedEnv = Arc::new(SystemEnv);
    let flags = KubeFlags { k8s_kubeconfig_path: Some(api.kubeconfig("admin")?), k8s_api_server_urls: Vec::new() };
    let objects = KubeObjects::connect(&flags, "basal-bench", Arc::clone(&env)).await?;
    let definitions: Vec<Object> = crds().into_iter().map(|definition| Object(definition.object)).collect();
    crd_install::install(&objects, env.as_ref(), &definitions, Duration::from_secs(60)).await?;
    let options = KvstoreOptions::new(Source::File(etcd.client_config("basal-operator")?));
    let kv = EtcdKv::new(&env, &options.load()?, Limits::from(&options)).await?;
    Ok((Arc::new(objects), Arc::new(kv)))
}

/// The answer to a write, which must have been carried out.
pub(crate) fn done<T, R: fmt::Display>(outcome: Outcome<T, R>) -> anyhow::Result<T> {
    match outcome {
        Outcome::Done(value) => Ok(value),
        Outcome::Refused(refusal) => bail!("{refusal}"),
        Outcome::Unknown(why) => bail!("no answer: {why}"),
    }
}

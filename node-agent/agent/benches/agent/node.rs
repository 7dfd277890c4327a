//! One node: a network namespace with the real agent in it.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    path::PathBuf,
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, ensure};
use basal_datapath::linux::{Paths, maps::PinnedMaps};
use basal_e2e::{
    process::{self, Process, Usage},
    wait::{self, Check, Stopwatch},
};
use basal_ipam::{
    cell::{Block, BlockState, Cell, CellId},
    names::{NodeName, NodeUid},
    prefix::PodCidr,
};
use basal_kvstore::ledger::LedgerKeys;
use basal_objects::{
    object::{Object, ObjectKey, resources},
    port::MergePatch,
};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::{Value, json};

use super::{
    cluster::{Cluster, Store, done},
    netns::Netns,
};

/// Where the agent says whether it is ready (`agent-health-port`).
const HEALTH: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 9879);

/// How long a start or an end of the agent may take.
const PATIENCE: Duration = Duration::from_secs(120);

/// A node of the cluster. Its agent, pins and devices go with it.
pub(crate) struct Node<'a> {
    /// The network namespace that is its host's.
    pub(crate) netns: Netns,
    /// The name of its Node object.
    pub(crate) name: String,
    /// Where its agent has the cluster's records.
    pub(crate) store: Store,
    cluster: &'a Cluster,
    folder: PathBuf,
    agent: Option<Process>,
}

impl<'a> Node<'a> {
    /// Adds node `number`, 1 to 8, with blocks of 4,096 IPv4 and 65,536 IPv6 addresses, so that pods which come and go
    /// quickly find one that rests no more. Nothing runs on it yet. What the operator writes for a node is there already.
    pub(crate) fn join(cluster: &'a Cluster, number: u8, store: Store) -> anyhow::Result<Self> {
        let name = format!("bag-n{number}");
        let addresses = [format!("172.30.1.{number}"), format!("fc00::{number}")];
        let netns = Netns::new()?;
        netns.plug(number, &[format!("{}/16", addresses[0]), format!("{}/64", addresses[1])])?;
        let folder = cluster.folder.path().join(&name);
        fs::create_dir_all(folder.join("bpf")).with_context(|| format!("creating {}", folder.display()))?;
        mount(Some("bpf"), &folder.join("bpf"), Some("bpf"), MsFlags::empty(), None::<&str>).context("a bpffs")?;
        let node = Self { netns, name, store, cluster, folder, agent: None };
        let blocks = [format!("10.{}.0.0/20", 16 * number), format!("fd00:{number}::/112")];
        cluster.wait("adding a node", node.make_objects(&addresses, &blocks))?;
        Ok(node)
    }

    async fn make_objects(&self, addresses: &[String; 2], blocks: &[String; 2]) -> anyhow::Result<()> {
        let (cluster, name) = (self.cluster, self.name.as_str());
        let status: Vec<Value> = addresses.iter().map(|ip| json!({"type": "InternalIP", "address": ip})).collect();
        let node =
            json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}, "status": {"addresses": status}});
        let node = cluster.create(resources::NODE, node).await?;
        let cilium_node = json!({"apiVersion": "cilium.io/v2", "kind": "CiliumNode",
            "metadata": {"name": name, "ownerReferences": [
                {"apiVersion": "v1", "kind": "Node", "name": name, "uid": node.uid()}]},
            "spec": {"ipam": {"podCIDRs": blocks}}});
        let cilium_node = cluster.create(resources::CILIUM_NODE, cilium_node).await?;
        match self.store {
            Store::Etcd => {
                let mut cells = Vec::new();
                for block in blocks {
                    cells.push(claim(block, name, node.uid())?);
                }
                cluster.put(cells).await
            }
            Store::CustomResources => confirm(cluster, &cilium_node, blocks).await,
        }
    }

    /// Starts the agent and waits until its `/readyz` says yes; answers how long that took since the exec.
    pub(crate) fn start(&mut self) -> anyhow::Result<Duration> {
        let flag = |name: &str, path: &str| format!("--{name}={}", self.folder.join(path).display());
        // It becomes the agent, with the same process id.
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--net={}", self.netns.path().display()))
            .arg(env!("CARGO_BIN_EXE_basal-agent"))
            .arg(format!("--node-name={}", self.name))
            .arg(format!("--k8s-kubeconfig-path={}", self.cluster.api.kubeconfig("admin")?.display()))
            .arg(format!("--cni-plugin={}", self.cluster.plugin.display()))
            .args([flag("bpf-root", "bpf"), flag("state-dir", "run"), flag("cni-bin-dir", "bin")])
            .arg(flag("write-cni-conf-when-ready", "net.d/05-cilium.conflist"));
        if self.store == Store::Etcd {
            let config = self.cluster.etcd.client_config("basal-agent")?;
            command.arg("--kvstore=etcd").arg(format!("--kvstore-opt=etcd.config={}", config.display()));
        }
        let watch = Stopwatch::start();
        let mut agent = Process::start("basal-agent", command, &self.folder.join("agent.log"))?;
        self.netns.enter(|| {
            wait::until("the agent to be ready", PATIENCE, Duration::from_millis(1), || {
                agent.check_running()?;
                Ok(is_ready().map_or_else(|error| Check::NotYet(format!("{error:#}")), Check::Done))
            })
            .with_context(|| process::tail(agent.log()))
        })?;
        let took = watch.elapsed();
        self.agent = Some(agent);
        Ok(took)
    }

    /// Ends the agent in order.
    pub(crate) fn stop(&mut self) -> anyhow::Result<()> {
        self.agent.take().map_or(Ok(()), |agent| agent.stop(PATIENCE).map(drop))
    }

    /// What the agent has used since its start.
    pub(crate) fn usage(&self) -> anyhow::Result<Usage> {
        process::usage(self.agent.as_ref().context("the agent does not run")?.pid())
    }

    /// The maps that the agent fills.
    pub(crate) fn maps(&self) -> PathBuf {
        Paths { bpffs: self.folder.join("bpf"), ..Paths::default() }.maps()
    }

    /// The same, to read whole ones.
    pub(crate) fn pinned(&self) -> PinnedMaps {
        PinnedMaps::new(self.maps())
    }

    /// What a runtime gives the plugin: the first entry of the list that the agent installed, with the list's name.
    pub(crate) fn cni_conf(&self) -> anyhow::Result<Value> {
        let list = fs::read(self.folder.join("net.d/05-cilium.conflist")).context("the CNI configuration")?;
        let list: Value = serde_json::from_slice(&list)?;
        let mut conf = list["plugins"][0].clone();
        conf["cniVersion"] = list["cniVersion"].clone();
        conf["name"] = list["name"].clone();
        Ok(conf)
    }

    /// The plugin's executable, where the agent installed it.
    pub(crate) fn cni_executable(&self) -> PathBuf {
        self.folder.join("bin").join(basal_agent::install::PLUGIN)
    }

    /// Creates the pod of a workload on this node, as scheduler and kubelet see it before the sandbox is made.
    pub(crate) async fn make_pod(&self, name: &str, workload: &str) -> anyhow::Result<Object> {
        let pod = json!({"apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": name, "namespace": "default", "labels": {"app": workload}},
            "spec": {"nodeName": self.name, "containers": [{"name": "c", "image": "i"}]}});
        self.cluster.create(resources::POD, pod).await
    }
}

impl Drop for Node<'_> {
    fn drop(&mut self) {
        // Both go with the bench's namespaces at the latest; the folder can only be removed without the mount.
        drop(self.stop());
        umount2(&self.folder.join("bpf"), MntFlags::MNT_DETACH).unwrap_or_default();
    }
}

/// The cell with the claim of a node to one block. Blocks of different nodes are far enough apart to be in different cells.
fn claim(block: &str, node: &str, uid: &str) -> anyhow::Result<(String, Vec<u8>)> {
    let block: PodCidr = block.parse()?;
    let id = CellId::new(block.supernet(block.prefix_len() - 8));
    let mut cell = Cell::new(id, id.prefix(), block.prefix_len())?;
    let (node, uid) = (NodeName::new(node)?, Some(NodeUid::new(uid)?));
    cell.set(block, Block { state: BlockState::Granted, node, uid })?;
    Ok((LedgerKeys::new("default").cell(id), cell.to_json()?))
}

/// Confirms blocks in the status of a CiliumNode.
pub(crate) async fn confirm(cluster: &Cluster, cilium_node: &Object, blocks: &[String]) -> anyhow::Result<()> {
    let used = blocks.iter().map(|block| (block.clone(), json!({"status": "in-use"})));
    let body = json!({"status": {"ipam": {"pod-cidrs": used.collect::<serde_json::Map<_, _>>()}}});
    let (uid, resource_version) = (cilium_node.uid().to_owned(), cilium_node.resource_version().to_owned());
    let patch = MergePatch { resource_version, uid, subresource: Some("status"), body };
    let key = ObjectKey::cluster(cilium_node.name());
    done(cluster.objects.patch(resources::CILIUM_NODE, &key, patch).await).map(drop)
}

fn is_ready() -> anyhow::Result<()> {
    let limit = Duration::from_secs(5);
    let mut stream = TcpStream::connect_timeout(&HEALTH, limit)?;
    stream.set_read_timeout(Some(limit))?;
    stream.write_all(b"GET /readyz HTTP/1.0\r\nHost: basal\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    ensure!(answer.split(' ').nth(1) == Some("200"), "{answer}");
    Ok(())
}

//! Scenario 6: forwarding needs no agent, no API server and no etcd. `make soak` runs it for longer.

use std::collections::{BTreeMap, BTreeSet};
use std::env;
use std::thread;
use std::time::Duration;

use anyhow::{Context, ensure};
use basal_e2e::cluster::{Cluster, Daemon, NAMESPACE, SavedEtcd, Server};
use basal_e2e::say::say;
use basal_e2e::wait::Stopwatch;
use serde_json::{Value, json};

use crate::daemons::{AGENT, pid, signal};
use crate::flow::Flow;
use crate::kills::SECONDS;
use crate::suite::values;
use crate::tampering::{self, What};
use crate::upgrade::{self, Version};
use crate::view::{agent_pod, basal, eventually, knows_the_others, node_key, text};
use crate::workload::{delete, waiting_pod};

const AGENTS: &str = "daemonset/basal-agent";
const ROLLOUT: Duration = Duration::from_secs(120);
/// A pod that comes and goes.
const PASSER_BY: &str = "passer-by";
/// Everything that agents and operators keep in etcd.
const STATE: &str = "cilium/state/";
/// Where nodes say which identities they use.
const REFERENCES: &str = "cilium/state/identities/v1/value/";

/// What goes away, or is taken away, while pods talk.
#[derive(Debug, Clone, Copy)]
enum Outage {
    /// SIGKILL of an agent.
    AgentKilled,
    /// The agents' pods are replaced one after another.
    DaemonSetRolled,
    /// A later version is installed, with other programs and another layout of a map.
    Upgraded,
    /// This version is installed over it.
    Downgraded,
    /// Somebody changes what agents made on their nodes.
    NodesTampered,
    /// Somebody changes rows of the ipcache.
    IpcacheTampered,
    /// Somebody deletes every key of a node.
    NodeDeletedByHand,
    /// Somebody deletes a node's CiliumNode, its CiliumEndpoints and their CiliumIdentities.
    ObjectsDeletedByHand,
    /// Somebody revokes every lease: the keys under them go.
    LeasesRevoked,
    /// No agent runs for two minutes.
    AgentsAway,
    /// SIGKILL, twenty times.
    AgentKilledOften,
    /// The API server is away, and an agent starts meanwhile.
    ApiAway,
    /// etcd is away and forgets its history, and an agent starts meanwhile.
    EtcdAway,
    /// etcd loses every key.
    EtcdEmptied,
    /// etcd comes back with what it held at the start.
    EtcdRestored,
    /// SIGKILL of a container runtime, and a pod is deleted meanwhile.
    RuntimeKilled,
    /// SIGKILL of a kubelet, and a pod is made meanwhile.
    KubeletKilled,
}

/// What goes away where a cluster keeps its records.
struct Outages {
    /// Those that are over soon.
    short: &'static [Outage],
    all: &'static [Outage],
}

const WITH_ETCD: Outages = Outages {
    short: &[
        Outage::AgentKilled,
        Outage::NodesTampered,
        Outage::Upgraded,
        Outage::Downgraded,
        Outage::NodeDeletedByHand,
        Outage::EtcdEmptied,
    ],
    all: &[
        Outage::AgentKilled,
        Outage::NodesTampered,
        Outage::IpcacheTampered,
        Outage::Upgraded,
        Outage::Downgraded,
        Outage::DaemonSetRolled,
        Outage::NodeDeletedByHand,
        Outage::LeasesRevoked,
        Outage::AgentsAway,
        Outage::ApiAway,
        Outage::EtcdAway,
        Outage::EtcdEmptied,
        Outage::EtcdRestored,
        Outage::RuntimeKilled,
        Outage::KubeletKilled,
        Outage::AgentKilledOften,
    ],
};

const WITHOUT_ETCD: Outages = Outages {
    short: &[Outage::NodesTampered, Outage::ObjectsDeletedByHand],
    all: &[
        Outage::NodesTampered,
        Outage::IpcacheTampered,
        Outage::Upgraded,
        Outage::Downgraded,
        Outage::DaemonSetRolled,
        Outage::ObjectsDeletedByHand,
        Outage::AgentsAway,
        Outage::ApiAway,
    ],
};

/// No packet is lost, whatever is away, and afterwards etcd, objects and maps are as they were.
pub(crate) fn forwarding_goes_on(cluster: &mut Cluster) -> anyhow::Result<()> {
    WITH_ETCD.happen(cluster, &values())
}

/// The same in a cluster whose records are custom resources, installed with these values.
pub(crate) fn forwarding_goes_on_without_etcd(cluster: &Cluster, values: &Value) -> anyhow::Result<()> {
    WITHOUT_ETCD.happen(cluster, values)
}

impl Outages {
    fn happen(&self, cluster: &Cluster, values: &Value) -> anyhow::Result<()> {
        let mut flow = Flow::start(cluster)?;
        let result = self.under(&mut flow, cluster, values);
        result.and(flow.stop(cluster))
    }

    fn under(&self, flow: &mut Flow, cluster: &Cluster, values: &Value) -> anyhow::Result<()> {
        let saved = cluster.save_etcd()?;
        let state = State::read(cluster)?;
        let outages = if env::var_os(SECONDS).is_some() { self.all } else { self.short };
        for outage in outages {
            let watch = Stopwatch::start();
            outage.happen(cluster, values, &saved).with_context(|| format!("{outage:?}"))?;
            eventually(&format!("all to be as before ({outage:?})"), || state.is_there(cluster))?;
            flow.check(cluster).with_context(|| format!("{outage:?}"))?;
            say(format!("  {outage:?}: {} s", watch.elapsed().as_secs()));
        }
        Ok(())
    }
}

impl Outage {
    /// Lets it happen; answers when it is over.
    fn happen(self, cluster: &Cluster, values: &Value, saved: &SavedEtcd) -> anyhow::Result<()> {
        match self {
            Self::AgentKilled => kill_agent(cluster, "n1").and_then(|()| kill_agent(cluster, "n2")),
            Self::AgentKilledOften => (0..20).try_for_each(|turn| kill_agent(cluster, ["n1", "n2"][turn % 2])),
            Self::AgentsAway => {
                run_agents(cluster, false)?;
                thread::sleep(Duration::from_secs(120));
                run_agents(cluster, true)
            }
            Self::DaemonSetRolled => {
                cluster.kubectl()?.args(["rollout", "restart", "-n", NAMESPACE, AGENTS]).done()?;
                cluster.wait_rollout(NAMESPACE, AGENTS, ROLLOUT)
            }
            Self::Upgraded => install(cluster, Version::Next, values),
            Self::Downgraded => install(cluster, Version::This, values),
            Self::NodesTampered => tampering::happens(cluster, What::Node),
            Self::IpcacheTampered => tampering::happens(cluster, What::Ipcache),
            Self::NodeDeletedByHand => delete_keys_of(cluster, "n2"),
            Self::ObjectsDeletedByHand => delete_objects_of(cluster, "n2"),
            Self::LeasesRevoked => revoke_leases(cluster),
            Self::ApiAway => away(cluster, Server::Api),
            Self::EtcdAway => compact(cluster).and_then(|()| away(cluster, Server::Etcd)),
            Self::EtcdEmptied => cluster.etcdctl()?.args(["del", "--prefix", ""]).done(),
            Self::EtcdRestored => cluster.restore_etcd(saved),
            Self::RuntimeKilled => kill_runtime(cluster),
            Self::KubeletKilled => kill_kubelet(cluster),
        }
    }
}

/// Installs a version, whose programs then deliver.
fn install(cluster: &Cluster, version: Version, values: &Value) -> anyhow::Result<()> {
    upgrade::to(cluster, version, values.clone())?;
    upgrade::delivers(cluster, "n1", version)
}

/// Lets agents run on all nodes, or on none.
fn run_agents(cluster: &Cluster, run: bool) -> anyhow::Result<()> {
    let nowhere = if run { Value::Null } else { json!("true") };
    let patch = json!({"spec": {"template": {"spec": {"nodeSelector": {"basal.io/nowhere": nowhere}}}}}).to_string();
    cluster.kubectl()?.args(["patch", "-n", NAMESPACE, AGENTS, "--type=merge", "-p", &patch]).done()?;
    cluster.wait_rollout(NAMESPACE, AGENTS, ROLLOUT)?;
    eventually("agents to run or not", || {
        for node in cluster.nodes()? {
            let runs = pid(&node, AGENT).is_ok();
            ensure!(runs == run, "on {} an agent runs: {runs}", node.name());
        }
        Ok(())
    })
}

/// Kills a server and an agent, which has to start without it.
fn away(cluster: &Cluster, server: Server) -> anyhow::Result<()> {
    cluster.kill_server(server)?;
    signal(&cluster.node("n1")?, AGENT, "-KILL")?;
    thread::sleep(Duration::from_secs(10));
    cluster.start_server(server)
}

/// Kills the container runtime of `n1`. DEL of a pod that is deleted meanwhile comes when it is back.
fn kill_runtime(cluster: &Cluster) -> anyhow::Result<()> {
    start_pod(cluster)?;
    cluster.without_daemon("n1", Daemon::Containerd, || {
        cluster.kubectl()?.args(["delete", "pod", PASSER_BY, "--wait=false"]).done()?;
        thread::sleep(Duration::from_secs(10));
        Ok(())
    })?;
    cluster.kubectl()?.args(["wait", "--for=delete", "--timeout=120s", "pod", PASSER_BY]).done()?;
    cluster.wait_ready(ROLLOUT)
}

/// Kills the kubelet of `n1`. A pod that is made meanwhile begins when it is back.
fn kill_kubelet(cluster: &Cluster) -> anyhow::Result<()> {
    cluster.without_daemon("n1", Daemon::Kubelet, || {
        cluster.apply(&waiting_pod(PASSER_BY, PASSER_BY, "n1").to_string())?;
        thread::sleep(Duration::from_secs(10));
        Ok(())
    })?;
    start_pod(cluster)?;
    delete(cluster, &["pod", PASSER_BY])?;
    cluster.wait_ready(ROLLOUT)
}

/// Makes the pod that is there for a moment only, and waits until it is ready.
fn start_pod(cluster: &Cluster) -> anyhow::Result<()> {
    cluster.apply(&waiting_pod(PASSER_BY, PASSER_BY, "n1").to_string())?;
    cluster.kubectl()?.args(["wait", "--for=condition=Ready", "--timeout=60s", "pod", PASSER_BY]).done()
}

/// What a cluster at rest holds, a text for each: etcd's keys with their values; CiliumNodes, CiliumEndpoints and
/// CiliumIdentities by what they say; the rows of ipcache, endpoints and tunnels with the node that has them.
struct State(BTreeSet<String>);

impl State {
    fn read(cluster: &Cluster) -> anyhow::Result<Self> {
        let mut held = BTreeSet::new();
        for node in cluster.nodes()? {
            knows_the_others(cluster, &node)?;
            let status = basal(cluster, node.name(), &["status"])?;
            ensure!(status.contains("as desired"), "{status}");
            for map in ["ipcache", "endpoint", "tunnel"] {
                let table = basal(cluster, node.name(), &["bpf", map, "list"])?;
                held.extend(table.lines().map(|row| format!("{} {map} {row}", node.name())));
            }
        }
        for kind in ["ciliumnodes", "ciliumendpoints", "ciliumidentities"] {
            for object in cluster.list(&[kind, "-A"])? {
                let said = [&object["spec"], &object["status"], &object["security-labels"]].map(ToString::to_string);
                held.insert(format!("{kind} {} {}", object["metadata"]["name"], said.join(" ")));
            }
        }
        let records = records(cluster)?;
        held.extend(records.iter().map(|(key, value)| format!("{} {value}", without_user(key))));
        Ok(Self(held))
    }

    /// Fails as long as anything differs.
    fn is_there(&self, cluster: &Cluster) -> anyhow::Result<()> {
        let now = Self::read(cluster)?;
        let missing: Vec<&String> = self.0.difference(&now.0).collect();
        let new: Vec<&String> = now.0.difference(&self.0).collect();
        ensure!(missing.is_empty() && new.is_empty(), "missing {missing:#?}, new {new:#?}");
        Ok(())
    }
}

/// Keys with their values.
fn records(cluster: &Cluster) -> anyhow::Result<BTreeMap<String, String>> {
    let found = cluster.etcdctl()?.args(["get", "--prefix", STATE]).text()?;
    let lines: Vec<&str> = found.lines().collect();
    Ok(lines.chunks(2).map(|pair| (pair[0].to_owned(), pair.get(1).copied().unwrap_or_default().to_owned())).collect())
}

/// Of the references to an identity, by whom it is used does not count: as long as other nodes use it too, a node looks
/// after its own every five minutes only.
fn without_user(key: &str) -> &str {
    match key.rsplit_once('/') {
        Some((labels, _node)) if key.starts_with(REFERENCES) => labels,
        _ => key,
    }
}

/// Kills the agent's process and waits until its successor is ready.
fn kill_agent(cluster: &Cluster, node: &str) -> anyhow::Result<()> {
    let handle = cluster.node(node)?;
    let killed = pid(&handle, AGENT)?;
    signal(&handle, AGENT, "-KILL")?;
    eventually(&format!("another agent process on {node}"), || {
        ensure!(pid(&handle, AGENT)? != killed, "process {killed} is still there");
        Ok(())
    })?;
    eventually(&format!("the agent of {node} to be ready"), || agent_pod(cluster, node)).map(drop)
}

/// Deletes a node's record, and what its agent keeps for its addresses and identities.
fn delete_keys_of(cluster: &Cluster, node: &str) -> anyhow::Result<()> {
    let address = cluster.node(node)?.addresses()[0];
    let (host, suffix) = (format!("\"{address}\""), format!("/{address}"));
    let of_node = |key: &str, value: &str| key == node_key(node) || value.contains(&host) || key.ends_with(&suffix);
    let mut deleted = 0;
    for (key, value) in records(cluster)? {
        if of_node(&key, &value) {
            cluster.etcdctl()?.args(["del", &key]).done()?;
            deleted += 1;
        }
    }
    ensure!(deleted >= 3, "{node} had {deleted} keys");
    Ok(())
}

/// Deletes what tells others of a node, its pods and their identities.
fn delete_objects_of(cluster: &Cluster, node: &str) -> anyhow::Result<()> {
    let address = cluster.node(node)?.addresses()[0].to_string();
    let endpoints = cluster.list(&["ciliumendpoints", "-A"])?;
    let (mut pods, mut identities) = (0, BTreeSet::new());
    for endpoint in endpoints.iter().filter(|endpoint| endpoint["status"]["networking"]["node"] == address) {
        let (namespace, name) = (text(endpoint, "/metadata/namespace")?, text(endpoint, "/metadata/name")?);
        cluster.kubectl()?.args(["delete", "ciliumendpoint", "-n", namespace, name]).done()?;
        identities.insert(endpoint["status"]["identity"]["id"].to_string());
        pods += 1;
    }
    ensure!(pods >= 1, "{node} had no CiliumEndpoint");
    cluster.kubectl()?.args(["delete", "ciliumidentity"]).args(&identities).done()?;
    cluster.kubectl()?.args(["delete", "ciliumnode", node]).done()
}

fn revoke_leases(cluster: &Cluster) -> anyhow::Result<()> {
    let listed = cluster.etcdctl()?.args(["lease", "list"]).text()?;
    let leases: Vec<&str> = listed.lines().filter(|line| !line.contains(' ')).collect();
    ensure!(leases.len() >= cluster.nodes()?.len(), "there are the leases {leases:?}");
    for lease in leases {
        cluster.etcdctl()?.args(["lease", "revoke", lease]).done()?;
    }
    Ok(())
}

/// Lets etcd forget everything up to now.
fn compact(cluster: &Cluster) -> anyhow::Result<()> {
    let status = cluster.etcdctl()?.args(["endpoint", "status", "-w", "json"]).json()?;
    let revision = status.pointer("/0/Status/header/revision").context("etcd told no revision")?.to_string();
    cluster.etcdctl()?.args(["compaction", &revision]).done()
}

//! What an agent takes of its node: memory, CPU, and the time of a start.

use std::{process::Command, thread, time::Duration};

use basal_e2e::{
    bench::Row,
    parts,
    process::{self, Process, Usage},
    say::say,
};

use super::{
    cluster::{Cluster, Store},
    container::{Container, Plugin, Verb},
    figures::Samples,
    load,
    netns::Netns,
    node::Node,
};

/// How long an agent is left alone before it is looked at.
const SETTLE: Duration = Duration::from_secs(15);
/// How long it is looked at.
const QUIET: Duration = Duration::from_secs(60);
/// Starts of each agent with all of the state.
const STARTS: usize = 7;
/// Pods on a node: kubelet's default limit.
const PODS: usize = 110;
/// Workloads that they are of.
const WORKLOADS: usize = 11;

const MEMORY: &str = "VmRSS of /proc/PID/status, after 15 s without a change and 60 s of watching; kube-proxy with \
                      --proxy-mode=nftables, no Services but the default one, in the same cluster at the same time";
const PEAK: &str = "VmHWM of /proc/PID/status";
const CPU: &str = "user and system time of /proc/PID/stat over 60 s without a change; kube-proxy over the same 60 s";

/// What is compared: two agents, and kube-proxy.
struct Watched<'a> {
    agents: [Node<'a>; 2],
    proxy: Process,
}

impl Watched<'_> {
    fn usages(&self) -> anyhow::Result<[Usage; 3]> {
        let [etcd, objects] = &self.agents;
        Ok([etcd.usage()?, objects.usage()?, process::usage(self.proxy.pid())?])
    }

    /// Leaves them alone, and tells of it.
    fn look(&self, state: &str) -> anyhow::Result<Vec<Row>> {
        say(format!("  {state}"));
        thread::sleep(SETTLE);
        let before = self.usages()?;
        thread::sleep(QUIET);
        let after = self.usages()?;
        let cpu = |i: usize| 100.0 * (after[i].cpu_seconds - before[i].cpu_seconds) / QUIET.as_secs_f64();
        let mut rows = Vec::new();
        for (i, store) in Store::ALL.into_iter().enumerate() {
            let metric = |what: &str| format!("{what}, {state}, {store}");
            rows.push(
                Row::new(metric("RSS"), after[i].megabytes(), "MB", MEMORY).against("kube-proxy", after[2].megabytes()),
            );
            rows.push(
                Row::new(metric("peak RSS"), after[i].peak_megabytes(), "MB", PEAK)
                    .against("kube-proxy", after[2].peak_megabytes()),
            );
            rows.push(Row::new(metric("CPU"), cpu(i), "% of a core", CPU).against("kube-proxy", cpu(2)));
        }
        Ok(rows)
    }
}

/// Measures both stores.
pub(crate) fn run(cluster: &Cluster) -> anyhow::Result<Vec<Row>> {
    let mut agents = [Node::join(cluster, 3, Store::Etcd)?, Node::join(cluster, 4, Store::CustomResources)?];
    let mut empty = [Samples::default(), Samples::default()];
    for (node, times) in agents.iter_mut().zip(&mut empty) {
        times.extend(starts(node)?);
    }
    let host = Netns::new()?;
    host.plug(9, &["172.30.1.9/16".to_owned()])?;
    let proxy = start_proxy(cluster, &host, &agents[0].name)?;
    let mut watched = Watched { agents, proxy };
    let mut rows = watched.look("idle")?;

    load::ensure(cluster)?;
    for node in &watched.agents {
        load::wait_seen(node)?;
    }
    rows.extend(watched.look("1,000 nodes")?);

    say("  starts");
    for (node, empty) in watched.agents.iter_mut().zip(&empty) {
        let mut times = Samples::default();
        times.extend(starts(node)?);
        let method = format!(
            "from the exec until /readyz says yes, {STARTS} starts over the maps and devices of the run before; loaded: \
             1,000 nodes, 30,000 addresses, 6,000 identities; empty: the same before there were any"
        );
        for (name, percent) in [("median", 50.0), ("longest", 100.0)] {
            let metric = format!("start to ready, 1,000 nodes, {}, {name}", node.store);
            let row = Row::new(metric, times.percentile(percent), "ms", method.clone());
            rows.push(row.against("a cluster without load", empty.percentile(percent)));
        }
    }
    rows.extend(watched.look("1,000 nodes, restarted")?);

    for node in &watched.agents {
        add_pods(cluster, node)?;
    }
    rows.extend(watched.look("1,000 nodes, 110 pods")?);
    Ok(rows)
}

/// Starts an agent again and again.
fn starts(node: &mut Node<'_>) -> anyhow::Result<Vec<Duration>> {
    let mut times = Vec::new();
    for _ in 0..STARTS {
        node.stop()?;
        times.push(node.start()?);
    }
    Ok(times)
}

fn start_proxy(cluster: &Cluster, host: &Netns, node: &str) -> anyhow::Result<Process> {
    let mut command = Command::new("nsenter");
    command
        .arg(format!("--net={}", host.path().display()))
        .arg(parts::binary("kube-proxy")?)
        .arg(format!("--kubeconfig={}", cluster.api.kubeconfig("admin")?.display()))
        .arg(format!("--hostname-override={node}"))
        // The table of connections is the machine's, not this namespace's.
        .args(["--proxy-mode=nftables", "--conntrack-max-per-core=0"]);
    Process::start("kube-proxy", command, &cluster.folder.path().join("kube-proxy.log"))
}

fn add_pods(cluster: &Cluster, node: &Node<'_>) -> anyhow::Result<()> {
    let plugin = Plugin { executable: node.cni_executable(), conf: node.cni_conf()?, host: &node.netns };
    for pod in 0..PODS {
        let name = format!("{}-{pod}", node.name);
        let workload = format!("workload-{}", pod % WORKLOADS);
        let object = cluster.wait("making a pod", node.make_pod(&name, &workload))?;
        plugin.call(Verb::Add, &[Container::new(&name, object.uid())?])?;
    }
    Ok(())
}

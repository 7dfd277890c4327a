//! The cluster itself, without Basal: it boots, its nodes come and go, and taking it down leaves nothing, also when its
//! start was cut short.

use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, ensure};
use basal_e2e::cluster::{self, BasalOptions, Cluster, ClusterName, Cni, Options, leftovers};
use basal_e2e::wait::{self, Check};
use serde_json::json;

/// Boots two nodes, sends a packet between two pods, replaces a node, takes everything down.
pub(crate) fn boots_and_leaves_nothing() -> anyhow::Result<()> {
    let name: ClusterName = "boot".parse()?;
    cluster::down(&name)?;
    let options = Options { name: name.clone(), nodes: 2, cni: Cni::Bridge, basal: BasalOptions::default() };
    let result = cluster::up(&options).and_then(|mut cluster| exercise(&mut cluster));
    let traces = leftovers(&name);
    let result = result.and_then(|()| everything_shows(&traces?));
    cluster::down(&name)?;
    let left = leftovers(&name)?;
    result?;
    ensure!(left.is_empty(), "left: {left:?}");
    Ok(())
}

fn exercise(cluster: &mut Cluster) -> anyhow::Result<()> {
    for node in cluster.list(&["nodes"])? {
        let addresses = node["status"]["addresses"].as_array().context("a node without addresses")?;
        let internal = addresses.iter().filter(|address| address["type"] == "InternalIP").count();
        ensure!(internal == 2, "a node reports {internal} internal addresses, not one of each family: {addresses:?}");
    }
    let health = cluster.etcdctl()?.args(["endpoint", "health"]).output()?;
    ensure!(health.status.success(), "Basal's etcd: {}", String::from_utf8_lossy(&health.stderr));
    ping_between_nodes(cluster, "n1", "n2")?;
    cluster.remove_node("n2", true)?;
    cluster.add_nodes(&["n3".into()])?;
    cluster.wait_ready(Duration::from_secs(60))?;
    ping_between_nodes(cluster, "n1", "n3")
}

fn ping_between_nodes(cluster: &Cluster, from: &str, to: &str) -> anyhow::Result<()> {
    let pods = [format!("{from}-to-{to}-a"), format!("{from}-to-{to}-b")];
    for (pod, node) in pods.iter().zip([from, to]) {
        let container = json!({"name": "c", "image": "localhost/basal-e2e/tools:1", "imagePullPolicy": "Never"});
        let manifest = json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": {"name": pod, "namespace": "default"},
            "spec": {"nodeName": node, "containers": [container], "terminationGracePeriodSeconds": 0},
        });
        // The controller manager makes the account in its own time.
        wait::until_ok("the default service account", Duration::from_secs(30), || {
            cluster.apply(&manifest.to_string())
        })?;
    }
    let wait = ["wait", "--for=condition=Ready", "--timeout=60s", "pod"];
    cluster.kubectl()?.args(wait).args(&pods).done()?;
    let target = cluster.get(&["pod", &pods[1]])?;
    let address = target["status"]["podIP"].as_str().context("a ready pod without an address")?;
    cluster.exec("default", &pods[0], &["ping", "-c", "3", "-i", "0.2", "-W", "2", address]).map(drop)
}

/// The search for leftovers must be able to find each kind, or its silence would prove nothing.
fn everything_shows(traces: &[String]) -> anyhow::Result<()> {
    for kind in ["process ", "network namespace boot-n1", "link boot-up", "mount seen", "control group ", "folder "] {
        ensure!(traces.iter().any(|trace| trace.starts_with(kind)), "a running cluster shows no {kind:?}: {traces:#?}");
    }
    Ok(())
}

/// Kills the command when the first node's namespace exists, which is in the middle of everything.
pub(crate) fn cut_short() -> anyhow::Result<()> {
    let name: ClusterName = "cut".parse()?;
    cluster::down(&name)?;
    let mut up = Command::new(env!("CARGO_BIN_EXE_basal-e2e"))
        .args(["up", "--name", "cut", "--nodes", "2", "--cni", "none"])
        .stderr(Stdio::null())
        .spawn()
        .context("starting basal-e2e")?;
    let reached = wait::until("the first node", Duration::from_secs(120), Duration::from_millis(20), || {
        ensure!(up.try_wait()?.is_none(), "the start ended before it could be cut short");
        let traces = leftovers(&name)?;
        let found = traces.iter().any(|trace| trace.starts_with("network namespace cut-n1"));
        Ok(if found { Check::Done(()) } else { Check::NotYet(format!("{} traces so far", traces.len())) })
    });
    up.kill()?;
    up.wait()?;
    let traces = leftovers(&name)?.len();
    cluster::down(&name)?;
    reached?;
    ensure!(traces > 5, "only {traces} traces of a start that was cut short: it was cut too early to prove anything");
    Ok(())
}

//! Scenario 8: the plug-in by its own contract, without a kubelet.

use anyhow::{Context, ensure};
use basal_e2e::cluster::{Cluster, Node};
use basal_e2e::command::Run;
use basal_e2e::parts;
use serde_json::Value;

use crate::view::{agent_pod, basal, eventually};

const NODE: &str = "n3";
/// Where the 1.1.0 list lies, apart from the one that the container runtime reads.
const CONFIG: &str = "/run/basal-e2e-cni";
const NETNS: &str = "cnitool";

/// cnitool with a list of version 1.1.0 drives the plug-in through ADD, CHECK, STATUS, GC and DEL. GC by cnitool names no
/// valid attachment, so the node is emptied first.
pub(crate) fn cnitool_drives_the_plugin(cluster: &mut Cluster) -> anyhow::Result<()> {
    let node = cluster.node(NODE)?;
    cluster
        .kubectl()?
        .args(["drain", NODE, "--ignore-daemonsets", "--force", "--delete-emptydir-data", "--timeout=60s"])
        .done()?;
    let result = drive(cluster, &node);
    cluster.kubectl()?.args(["uncordon", NODE]).done()?;
    result
}

fn drive(cluster: &Cluster, node: &Node) -> anyhow::Result<()> {
    let network = write_list(node)?;
    for netns in [NETNS, "orphan"] {
        node.run("ip").args(["netns", "add", netns]).done()?;
    }
    let added = cnitool(node, "add", &network, NETNS)?.json()?;
    let addresses: Vec<String> = added["ips"]
        .as_array()
        .context("ADD answered no addresses")?
        .iter()
        .filter_map(|ip| Some(ip["address"].as_str()?.split('/').next()?.to_owned()))
        .collect();
    ensure!(addresses.len() == 2, "ADD answered {added}");
    ensure!(added["cniVersion"] == "1.1.0", "ADD answered version {}", added["cniVersion"]);
    for address in &addresses {
        let family = if address.contains(':') { "-6" } else { "-4" };
        let shown = node.run("ip").args(["-n", NETNS, family, "-o", "address", "show", "dev", "eth0"]).text()?;
        ensure!(shown.contains(&format!(" {address}/")), "{address} is not on eth0:\n{shown}");
    }
    cnitool(node, "check", &network, NETNS)?.done()?;
    cnitool(node, "status", &network, NETNS)?.done()?;
    with_the_agent_down(cluster, node, || {
        let refused = cnitool(node, "status", &network, NETNS)?.output()?;
        ensure!(!refused.status.success(), "STATUS succeeds with the agent down");
        Ok(())
    })?;
    cnitool(node, "status", &network, NETNS)?.done()?;
    cnitool(node, "check", &network, NETNS)?.done()?;
    cnitool(node, "del", &network, NETNS)?.done()?;
    gone(cluster, &addresses)?;

    let planted = cnitool(node, "add", &network, "orphan")?.json()?;
    let address = planted.pointer("/ips/0/address").and_then(Value::as_str).context("ADD answered no address")?;
    let address = address.split('/').next().unwrap_or_default().to_owned();
    node.run("ip").args(["netns", "delete", "orphan"]).done()?;
    ensure!(endpoints(cluster)?.contains(&address), "the planted orphan {address} is no endpoint");
    cnitool(node, "gc", &network, NETNS)?.done()?;
    gone(cluster, &[address])?;
    node.run("ip").args(["netns", "delete", NETNS]).done()
}

/// Copies the installed list with its version changed; answers the network's name.
fn write_list(node: &Node) -> anyhow::Result<String> {
    let installed = node.run("sh").args(["-c", "cat /etc/cni/net.d/*.conflist"]).text()?;
    let mut list: Value = serde_json::from_str(&installed).context("the installed list is not JSON")?;
    list["cniVersion"] = "1.1.0".into();
    let name = list["name"].as_str().context("the installed list has no name")?.to_owned();
    node.run("mkdir").args(["-p", CONFIG]).done()?;
    node.run("tee").arg(format!("{CONFIG}/10-basal.conflist")).stdin(list.to_string()).done()?;
    Ok(name)
}

fn cnitool(node: &Node, command: &str, network: &str, netns: &str) -> anyhow::Result<Run> {
    let variables = [format!("NETCONFPATH={CONFIG}"), "CNI_PATH=/opt/cni/bin".to_owned()];
    Ok(node.run("env").args(variables).arg(parts::binary("cnitool")?).args([
        command,
        network,
        &format!("/run/netns/{netns}"),
    ]))
}

/// Keeps the agent of the node away while `during` runs: its kubelet stands still and cannot start it again.
fn with_the_agent_down(
    cluster: &Cluster,
    node: &Node,
    during: impl FnOnce() -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let pid = |command: &str| Ok::<_, anyhow::Error>(node.run("pidof").args(["-s", command]).text()?.trim().to_owned());
    let (kubelet, agent) = (pid("kubelet")?, pid("basal-agent")?);
    node.run("kill").args(["-STOP", &kubelet]).done()?;
    let result = node.run("kill").args(["-KILL", &agent]).done().and_then(|()| during());
    node.run("kill").args(["-CONT", &kubelet]).done()?;
    result?;
    eventually("another agent process", || pid("basal-agent").map(drop))?;
    eventually("the agent to be ready", || agent_pod(cluster, node.name())).map(drop)
}

fn endpoints(cluster: &Cluster) -> anyhow::Result<String> {
    basal(cluster, NODE, &["bpf", "endpoint", "list"])
}

fn gone(cluster: &Cluster, addresses: &[String]) -> anyhow::Result<()> {
    eventually("the endpoint to go", || {
        let table = endpoints(cluster)?;
        let left: Vec<&String> = addresses.iter().filter(|address| table.contains(&format!("{address}:0"))).collect();
        ensure!(left.is_empty(), "{left:?} are in:\n{table}");
        Ok(())
    })
}

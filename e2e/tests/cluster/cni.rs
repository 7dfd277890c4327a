//! Scenario 8: the plug-in by its own contract, without a kubelet.

use anyhow::{Context, ensure};
use basal_e2e::cluster::{Cluster, Node};
use basal_e2e::command::Run;
use basal_e2e::parts;
use serde_json::{Value, json};

use crate::daemons::{AGENT, pid, signal};
use crate::view::{agent_pod, basal, eventually};

const NODE: &str = "n3";
const KUBELET: &str = "kubelet";
/// Where the 1.1.0 list lies, apart from the one that the container runtime reads.
const CONFIG: &str = "/run/basal-e2e-cni";
/// Where the list for GC lies.
const GC_CONFIG: &str = "/run/basal-e2e-cni-gc";
const NETNS: &str = "cnitool";
/// A namespace that is deleted without DEL.
const ORPHAN: &str = "orphan";

/// cnitool with a list of version 1.1.0 drives the plug-in through ADD, CHECK, STATUS, GC and DEL. Its GC has libcni
/// delete whatever libcni remembers, so the node is emptied first.
pub(crate) fn cnitool_drives_the_plugin(cluster: &mut Cluster) -> anyhow::Result<()> {
    let node = cluster.node(NODE)?;
    cluster
        .kubectl()?
        .args(["drain", NODE, "--ignore-daemonsets", "--force", "--delete-emptydir-data", "--timeout=60s"])
        .done()?;
    let result = drive(cluster, &node);
    for netns in [NETNS, ORPHAN] {
        // The orphan's is gone by then, unless something went wrong before.
        node.run("ip").args(["netns", "delete", netns]).output()?;
    }
    cluster.kubectl()?.args(["uncordon", NODE]).done()?;
    result
}

fn drive(cluster: &Cluster, node: &Node) -> anyhow::Result<()> {
    let network = write_lists(node)?;
    for netns in [NETNS, ORPHAN] {
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

    let planted = cnitool(node, "add", &network, ORPHAN)?.json()?;
    let address = planted.pointer("/ips/0/address").and_then(Value::as_str).context("ADD answered no address")?;
    let address = address.split('/').next().unwrap_or_default().to_owned();
    node.run("ip").args(["netns", "delete", ORPHAN]).done()?;
    // What libcni remembers it deletes by DEL; an orphan is what nobody remembers.
    node.run("find").args(["/var/lib/cni/results", "-type", "f", "-delete"]).done()?;
    ensure!(endpoints(cluster)?.contains(&address), "the planted orphan {address} is no endpoint");
    cnitool_with(node, GC_CONFIG, "gc", &network, NETNS)?.done()?;
    gone(cluster, &[address])
}

/// Copies the installed list with its version changed and with our plug-in alone, because Debian's portmap does not
/// speak 1.1.0; answers the network's name. cnitool passes no list of valid attachments to GC, so the list for GC holds
/// an empty one.
fn write_lists(node: &Node) -> anyhow::Result<String> {
    let installed = node.run("sh").args(["-c", "cat /etc/cni/net.d/*.conflist"]).text()?;
    let mut list: Value = serde_json::from_str(&installed).context("the installed list is not JSON")?;
    let name = list["name"].as_str().context("the installed list has no name")?.to_owned();
    list["cniVersion"] = "1.1.0".into();
    let plugins = list["plugins"].as_array_mut().context("the installed list has no plug-ins")?;
    plugins.retain(|plugin| plugin["type"] != "portmap");
    let mut gc = list.clone();
    gc["plugins"][0]["cni.dev/valid-attachments"] = json!([]);
    for (folder, list) in [(CONFIG, list), (GC_CONFIG, gc)] {
        node.run("mkdir").args(["-p", folder]).done()?;
        node.run("tee").arg(format!("{folder}/10-basal.conflist")).stdin(list.to_string()).done()?;
    }
    Ok(name)
}

fn cnitool(node: &Node, command: &str, network: &str, netns: &str) -> anyhow::Result<Run> {
    cnitool_with(node, CONFIG, command, network, netns)
}

fn cnitool_with(node: &Node, config: &str, command: &str, network: &str, netns: &str) -> anyhow::Result<Run> {
    let variables = [format!("NETCONFPATH={config}"), "CNI_PATH=/opt/cni/bin".to_owned()];
    let netns = format!("/run/netns/{netns}");
    Ok(node.run("env").args(variables).arg(parts::binary("cnitool")?).args([command, network, &netns]))
}

/// Keeps the agent of the node away while `during` runs: its kubelet stands still and cannot start it again.
fn with_the_agent_down(
    cluster: &Cluster,
    node: &Node,
    during: impl FnOnce() -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    signal(node, KUBELET, "-STOP")?;
    let result = signal(node, AGENT, "-KILL").and_then(|()| during());
    signal(node, KUBELET, "-CONT")?;
    result?;
    eventually("another agent process", || pid(node, AGENT).map(drop))?;
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

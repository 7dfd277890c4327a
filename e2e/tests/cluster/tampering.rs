//! What somebody changes on nodes behind the agents' backs. No packet of [`crate::flow`] needs what is taken away.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use anyhow::{Context, ensure};
use basal_e2e::cluster::{Cluster, Node};
use serde_json::Value;

use crate::view::{agent_metrics, eventually, metric, pod_cidrs, text};

/// What an agent counts, by kind of the change that mends.
const DRIFT: &str = "cilium_datapath_drift_total";
const MAPS: &str = "/sys/fs/bpf/tc/globals";
/// An address that nobody has (RFC 5737).
const NOBODY: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 9);

/// What is tampered with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum What {
    /// Everything but the ipcache. Routes and devices are among it: the kernel tells the agent of those, which then looks
    /// at the rest as well.
    Node,
    /// The ipcache, which only the timer has the agent look at.
    Ipcache,
}

/// A node before somebody tampers with it.
pub(crate) struct Untouched {
    node: Node,
    held: BTreeMap<String, Vec<String>>,
    /// The agent's metrics.
    page: String,
}

/// Tampers with two nodes; answers when their agents have mended and counted all of it.
pub(crate) fn happens(cluster: &Cluster, what: What) -> anyhow::Result<()> {
    for name in ["n1", "n2"] {
        let node = cluster.node(name)?;
        let before = Untouched { held: held(&node)?, page: agent_metrics(&node)?, node };
        let mended_by = match what {
            What::Node => tamper(cluster, &before.node)?,
            What::Ipcache => tamper_with_ipcache(cluster, &before.node)?,
        };
        eventually(&format!("the agent of {name} to mend its node"), || before.is_back(&mended_by))?;
    }
    Ok(())
}

impl Untouched {
    /// Fails until all is as it was, and was counted.
    fn is_back(&self, mended_by: &[&str]) -> anyhow::Result<()> {
        for (what, lines) in held(&self.node)? {
            let before = &self.held[&what];
            ensure!(lines == *before, "{what} says {lines:#?} instead of {before:#?}");
        }
        let page = agent_metrics(&self.node)?;
        for kind in mended_by {
            let count = |page: &str| metric(page, DRIFT, &[&format!("\"{kind}\"")]).unwrap_or_default();
            ensure!(count(&page) > count(&self.page), "no {kind} was counted");
        }
        Ok(())
    }
}

/// What a node's kernel holds of the agent's, by the command that shows it.
fn held(node: &Node) -> anyhow::Result<BTreeMap<String, Vec<String>>> {
    let maps = ["cilium_lxc", "cilium_ipcache_v2", "cilium_tunnel_map"]
        .map(|map| format!("bpftool map dump pinned {MAPS}/{map}"));
    let commands = [
        "ip -o link",
        "ip -o address",
        "ip route",
        "ip -6 route",
        "nft list table inet basal",
        "iptables-nft -S CILIUM_FORWARD",
        "iptables-nft -S FORWARD",
        "cat /proc/sys/net/ipv4/conf/cilium_host/send_redirects",
        "find /sys/fs/bpf/cilium /sys/fs/bpf/basal",
    ];
    let mut held = BTreeMap::new();
    for command in commands.into_iter().chain(maps.iter().map(String::as_str)) {
        let said = run(node, command)?;
        let mut lines: Vec<String> = said.lines().map(str::to_owned).collect();
        lines.sort();
        held.insert(command.to_owned(), lines);
    }
    Ok(held)
}

fn run(node: &Node, command: &str) -> anyhow::Result<String> {
    let mut words = command.split_whitespace();
    node.run(words.next().context("no command")?).args(words).text()
}

/// Answers the kinds of the changes that mend it.
fn tamper(cluster: &Cluster, node: &Node) -> anyhow::Result<Vec<&'static str>> {
    let health = health_address(cluster, node.name())?;

    // The ipcache leads to other nodes as well.
    let mut tunnels = rows(node, "cilium_tunnel_map")?.into_iter();
    let (deleted, mut changed) = tunnels.next().zip(tunnels.next()).context("fewer than two tunnels")?;
    delete(node, "cilium_tunnel_map", &deleted)?;
    changed.value.fill(0x5a);
    put(node, "cilium_tunnel_map", &changed)?;
    let mut added = rows(node, "cilium_lxc")?.into_iter().next().context("no endpoint")?;
    added.key[..4].copy_from_slice(&NOBODY.octets());
    put(node, "cilium_lxc", &added)?;

    for command in [
        "sysctl -qw net.ipv4.conf.cilium_host.send_redirects=1",
        "nft add rule inet basal raw_prerouting counter",
        "iptables-nft -F CILIUM_FORWARD",
        "rm /sys/fs/bpf/cilium/devices/cilium_net/links/cil_to_host",
        "ip link set cilium_net mtu 1400",
        "ip link add lxc0000000000ff type veth peer name stray",
        &format!("ip address del {health}/32 dev cilium_host"),
        &format!("ip address add {NOBODY}/32 dev cilium_host"),
        &format!("ip route add {NOBODY}/32 dev cilium_host proto kernel"),
    ] {
        run(node, command)?;
    }
    let mut mended_by = vec![
        "put-row",
        "delete-row",
        "set-sysctl",
        "set-nft",
        "set-forward",
        "attach",
        "set-link",
        "delete-links",
        "add-address",
        "delete-address",
        "delete-route",
    ];
    // No pod of the second node talks to one of the third.
    if node.name() == "n2" {
        let [v4, v6] = pod_cidrs(cluster, "n3")?.try_into().ok().context("n3 has no block of each family")?;
        run(node, &format!("ip route del {v4} dev cilium_host"))?;
        run(node, &format!("ip -6 route change {v6} dev cilium_host proto kernel mtu 1300"))?;
        mended_by.push("set-route");
    }
    Ok(mended_by)
}

/// The same for the ipcache: without the row of one of its addresses a block's leads to a node, and nobody asks yet which
/// identity sends.
fn tamper_with_ipcache(cluster: &Cluster, node: &Node) -> anyhow::Result<Vec<&'static str>> {
    const MAP: &str = "cilium_ipcache_v2";
    /// Where the address is in a key, behind prefix length, cluster and family.
    const ADDRESS: usize = 8;
    let health: Ipv4Addr = health_address(cluster, "n3")?.parse()?;
    let rows = rows(node, MAP)?;
    let deleted = rows.iter().find(|row| row.key[ADDRESS..].starts_with(&health.octets()) && row.key[0] == 64);
    let deleted = deleted.context("n3's health address has no row")?;
    delete(node, MAP, deleted)?;
    let mut added = deleted.clone();
    added.key[ADDRESS..ADDRESS + 4].copy_from_slice(&NOBODY.octets());
    put(node, MAP, &added)?;
    let of_pod = |row: &&Row| row.value[1] > 0;
    let mut changed = rows.iter().find(of_pod).context("no pod has a row")?.clone();
    changed.value[0] ^= 1;
    put(node, MAP, &changed)?;
    Ok(vec!["put-row", "delete-row"])
}

/// The IPv4 address of a node's that answers pings from afar.
fn health_address(cluster: &Cluster, node: &str) -> anyhow::Result<String> {
    Ok(text(&cluster.get(&["ciliumnode", node])?, "/spec/health/ipv4")?.to_owned())
}

#[derive(Clone)]
struct Row {
    key: Vec<u8>,
    value: Vec<u8>,
}

fn rows(node: &Node, map: &str) -> anyhow::Result<Vec<Row>> {
    let dump = node.run("bpftool").args(["-j", "map", "dump", "pinned", &format!("{MAPS}/{map}")]).json()?;
    let bytes = |list: &Value| -> Option<Vec<u8>> {
        let byte = |text: &Value| u8::from_str_radix(text.as_str()?.strip_prefix("0x")?, 16).ok();
        list.as_array()?.iter().map(byte).collect()
    };
    let row = |row: &Value| Some(Row { key: bytes(&row["key"])?, value: bytes(&row["value"])? });
    let rows: Option<Vec<Row>> = dump.as_array().and_then(|rows| rows.iter().map(row).collect());
    rows.with_context(|| format!("{map} is {dump}"))
}

fn put(node: &Node, map: &str, row: &Row) -> anyhow::Result<()> {
    let update = node.run("bpftool").args(["map", "update", "pinned", &format!("{MAPS}/{map}"), "key", "hex"]);
    update.args(hex(&row.key)).args(["value", "hex"]).args(hex(&row.value)).done()
}

fn delete(node: &Node, map: &str, row: &Row) -> anyhow::Result<()> {
    let delete = node.run("bpftool").args(["map", "delete", "pinned", &format!("{MAPS}/{map}"), "key", "hex"]);
    delete.args(hex(&row.key)).done()
}

fn hex(bytes: &[u8]) -> impl Iterator<Item = String> {
    bytes.iter().map(|byte| format!("{byte:02x}"))
}

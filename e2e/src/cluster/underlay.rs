//! The network between the nodes: a bridge in a namespace of its own, which is also their router. The machine's own
//! netfilter never sees what passes there (bridge-nf-call-iptables would show it a bridge of its own).

use std::fmt::Write as _;
use std::net::IpAddr;

use super::names::ClusterName;
use super::state::{NodeState, OUTSIDE, State};
use crate::command::Run;

/// Makes the bridge, the machine's link to it, and the host that stands for the outside world.
pub(super) fn create(name: &ClusterName, state: &State) -> anyhow::Result<()> {
    let (underlay, uplink) = (name.underlay(), name.uplink());
    netns_add(&underlay)?;
    ip_batch(None, &format!("link add {uplink} type veth peer name uplink netns {underlay}\nlink set {uplink} up\n"))?;
    ip_batch(None, &addresses(&uplink, state.control_plane()))?;
    let mut batch = String::from(
        "link set lo up\nlink add br0 type bridge mcast_snooping 0\nlink set br0 up\nlink set uplink master br0\nlink set uplink up\n",
    );
    batch += &addresses("br0", state.router());
    for address in OUTSIDE {
        writeln!(batch, "address add {address} dev lo")?;
    }
    ip_batch(Some(&underlay), &batch)?;
    let forward = ["net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1"];
    inside(&underlay).args(["sysctl", "--quiet", "--write"]).args(forward).done()
}

/// Makes a node's namespace with `eth0` on the bridge.
pub(super) fn add_node(name: &ClusterName, state: &State, node: &NodeState) -> anyhow::Result<()> {
    let netns = name.node_netns(&node.name);
    netns_add(&netns)?;
    let port = &node.name;
    let batch = format!(
        "link add {port} type veth peer name eth0 netns {netns}\nlink set {port} master br0\nlink set {port} up\n"
    );
    ip_batch(Some(&name.underlay()), &batch)?;
    let mut batch = String::from("link set lo up\nlink set eth0 up\n");
    batch += &addresses("eth0", state.node_addresses(node));
    for router in state.router() {
        writeln!(batch, "route add default via {router}")?;
    }
    ip_batch(Some(&netns), &batch)?;
    // What Kubernetes asks of a node's administrator.
    let forward = ["net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1"];
    inside(&netns).args(["sysctl", "--quiet", "--write"]).args(forward).done()
}

/// Takes a node off the bridge; its namespace goes when its last process has ended.
pub(super) fn remove_node(name: &ClusterName, node: &str) -> anyhow::Result<()> {
    ip_batch(Some(&name.underlay()), &format!("link delete {node}\n"))?;
    Run::new("ip").args(["netns", "delete", &name.node_netns(node)]).done()
}

/// A command in a network namespace.
pub(super) fn inside(netns: &str) -> Run {
    Run::new("nsenter").arg(format!("--net=/run/netns/{netns}"))
}

/// Runs `ip` commands, one a line, in a network namespace or the machine's.
pub(super) fn ip_batch(netns: Option<&str>, batch: &str) -> anyhow::Result<()> {
    let run = Run::new("ip");
    let run = if let Some(netns) = netns { run.args(["-n", netns]) } else { run };
    run.args(["-batch", "-"]).stdin(batch).done()
}

fn netns_add(name: &str) -> anyhow::Result<()> {
    Run::new("ip").args(["netns", "add", name]).done()
}

fn addresses(link: &str, [v4, v6]: [IpAddr; 2]) -> String {
    // Nobody else has them, so duplicate address detection would only delay the start.
    format!("address add {v4}/24 dev {link}\naddress add {v6}/64 dev {link} nodad\n")
}

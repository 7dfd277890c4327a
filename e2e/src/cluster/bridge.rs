//! A pod network of Debian's plug-ins, to show that a cluster works without Basal: a bridge on each node, static routes
//! between the nodes. IPv4 only.

use std::net::Ipv4Addr;

use serde_json::json;

use super::Cluster;
use super::state::NodeState;

/// The pod network of a node.
fn pod_cidr(node: &NodeState) -> String {
    let [_, low] = node.number.to_be_bytes();
    format!("{}/24", Ipv4Addr::new(10, 100, low, 0))
}

/// Installs the plug-ins on every node and routes between all of them. May be called again when nodes joined.
pub(super) fn connect(cluster: &Cluster) -> anyhow::Result<()> {
    for node in &cluster.state.nodes {
        let handle = cluster.node(&node.name)?;
        handle.run("cp").args(["-r", "/usr/lib/cni/.", "/opt/cni/bin/"]).done()?;
        for other in cluster.state.nodes.iter().filter(|other| other.number != node.number) {
            let via = cluster.state.node_addresses(other)[0].to_string();
            handle.run("ip").args(["route", "replace", &pod_cidr(other), "via", &via]).done()?;
        }
        let list = json!({
            "cniVersion": "1.0.0",
            "name": "bridge",
            "plugins": [
                {
                    "type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": true, "hairpinMode": true,
                    "ipam": {"type": "host-local", "subnet": pod_cidr(node), "routes": [{"dst": "0.0.0.0/0"}]},
                },
                {"type": "portmap", "capabilities": {"portMappings": true}},
            ],
        });
        let target = "/etc/cni/net.d/10-bridge.conflist";
        handle.run("tee").arg(target).stdin(list.to_string()).done()?;
    }
    Ok(())
}

//! Scenario 11: a cluster without a tunnel, whose nodes make routes to each other's pods.

use anyhow::ensure;
use basal_e2e::cluster::{BasalOptions, Cluster, Node};
use serde_json::{Value, json};

use crate::suite::{on_its_own, values};
use crate::traffic::{Capture, World, get};
use crate::view::{all_know_the_others, basal, eventually, pod_cidrs};
use crate::workload::{Checks, PORT, Pod, delete, deploy, expose, in_url};

/// Boots a cluster of its own: pods, hosts, Services and the outside talk as with a tunnel, pods see each other's own
/// addresses, and no packet is in VXLAN. Then its agents get a tunnel, and lose it again, under pods that stay.
pub(crate) fn everybody_talks() -> anyhow::Result<()> {
    on_its_own("native", without_tunnel(), exercise)
}

fn without_tunnel() -> Value {
    let mut values = values();
    values["routingMode"] = json!("native");
    values["autoDirectNodeRoutes"] = json!(true);
    values
}

fn exercise(cluster: &mut Cluster) -> anyhow::Result<()> {
    let nodes = cluster.nodes()?;
    have_no_tunnel(cluster, &nodes)?;
    let pods = deploy(cluster, "blue", nodes.len())?;
    let (services, node_port) = expose(cluster, "blue")?;
    let capture = Capture::start(cluster)?;
    let world = World { nodes: &nodes, pods: pods.clone(), services: &services, node_port };
    let result = world.ask(cluster).and_then(|()| pods.iter().try_for_each(|pod| sources(cluster, &pods, pod)));
    let packets = capture.stop()?;
    result?;
    ensure!(packets.is_empty(), "packets in VXLAN:\n{packets}");

    cluster.install_basal(&BasalOptions { values: values() })?;
    all_know_the_others(cluster)?;
    for node in &nodes {
        let left = direct_routes(node)?;
        ensure!(left.is_empty(), "{} has a tunnel, and the routes\n{left}", node.name());
    }
    world.ask(cluster)?;
    cluster.install_basal(&BasalOptions { values: without_tunnel() })?;
    have_no_tunnel(cluster, &nodes)?;
    world.ask(cluster)?;
    delete(cluster, &["deployment,service", "blue"])
}

fn have_no_tunnel(cluster: &Cluster, nodes: &[Node]) -> anyhow::Result<()> {
    for node in nodes {
        eventually(&format!("routes on {}", node.name()), || routes(cluster, nodes, node))?;
        let status = basal(cluster, node.name(), &["status"])?;
        ensure!(status.contains("Network: Native"), "{status}");
        let tunnel = node.run("ip").args(["link", "show", "cilium_vxlan"]).output()?;
        ensure!(!tunnel.status.success(), "{} has a tunnel", node.name());
    }
    Ok(())
}

/// The routes that a node made over its own devices.
fn direct_routes(node: &Node) -> anyhow::Result<String> {
    let list = |family| node.run("ip").args([family, "route", "show", "metric", "25185"]).text();
    Ok(list("-4")? + &list("-6")?)
}

/// A node has a route to each block of the others, by way of these nodes' addresses.
fn routes(cluster: &Cluster, nodes: &[Node], node: &Node) -> anyhow::Result<()> {
    let found = direct_routes(node)?;
    for other in nodes.iter().filter(|other| other.name() != node.name()) {
        for block in pod_cidrs(cluster, other.name())? {
            let hops = other.addresses().into_iter().filter(|ip| ip.is_ipv6() == block.contains(':'));
            let wanted: Vec<_> = hops.map(|ip| format!("{block} via {ip} dev eth0")).collect();
            ensure!(wanted.iter().any(|route| found.contains(route)), "none of {wanted:?} in:\n{found}");
        }
    }
    Ok(())
}

/// A pod's packets reach the others with its own address.
fn sources(cluster: &Cluster, pods: &[Pod], pod: &Pod) -> anyhow::Result<()> {
    let mut checks = Checks::default();
    for target in pods.iter().filter(|target| target.node != pod.node) {
        for address in &target.addresses {
            let own = pod.addresses.iter().find(|own| own.contains(':') == address.contains(':'));
            let Some(own) = own.map(|own| in_url(own)) else { continue };
            let asked = get(&format!("{}:{PORT}/clientip", in_url(address)));
            checks.add(format!("{address} sees {own}"), format!("test \"$({asked} | sed 's/:[0-9]*$//')\" = '{own}'"));
        }
    }
    let shell = cluster.kubectl()?.args(["exec", "-i", "-n", "default", &pod.name, "-c", "server", "--", "sh"]);
    checks.run(&format!("from pod {} on {}", pod.name, pod.node), shell)
}

//! A Service with one pod behind it: the pod reaches itself, and the outside reaches it by its own node only.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, ensure};
use basal_e2e::cluster::{Cluster, Node, OUTSIDE};
use basal_e2e::command::Run;
use serde_json::json;

use crate::traffic::{get, udp};
use crate::view::eventually;
use crate::workload::{Checks, Pod, in_url, serve};

/// The Service, and the label of its pod.
pub(crate) const ALONE: &str = "alone";

/// Puts a Service with `externalTrafficPolicy: Local` before one pod. `open_port` is a NodePort of another Service that
/// every node answers, which shows that a node that does not answer this one can be reached.
pub(crate) fn one_backend(cluster: &Cluster, nodes: &[Node], pod: &Pod, open_port: u64) -> anyhow::Result<()> {
    cluster.kubectl()?.args(["label", "pod", "-n", "default", &pod.name, &format!("{ALONE}=yes")]).done()?;
    let (addresses, port) = serve(cluster, ALONE, &json!({ALONE: "yes"}), "Local")?;
    hairpin(cluster, pod, &addresses)?;
    let with = nodes.iter().find(|node| node.name() == pod.node).context("the pod's node is none of the cluster's")?;
    let without = nodes.iter().find(|node| node.name() != pod.node).context("there is only one node")?;
    for source in OUTSIDE {
        let host = |node: &Node| {
            let of_family = node.addresses().into_iter().find(|address| address.is_ipv4() == source.is_ipv4());
            of_family.map(|address| in_url(&address.to_string())).context("the node has no address of that family")
        };
        let (with, without) = (host(with)?, host(without)?);
        let client = eventually(&format!("the NodePort at {with} to answer {source}"), || {
            ask(cluster, source, &format!("{with}:{port}/clientip")).text()
        })?;
        let wanted = format!("{}:", in_url(&source.to_string()));
        ensure!(client.starts_with(&wanted), "the pod saw {client:?} instead of {source}");
        ask(cluster, source, &format!("{without}:{open_port}/hostname")).done()?;
        let refused = ask(cluster, source, &format!("{without}:{port}/hostname")).output()?;
        ensure!(!refused.status.success(), "{without} answers {source}, and has no pod of the Service");
    }
    Ok(())
}

/// The pod reaches itself through each of the Service's addresses.
fn hairpin(cluster: &Cluster, pod: &Pod, addresses: &[String]) -> anyhow::Result<()> {
    let mut checks = Checks::default();
    for address in addresses {
        let url = in_url(address);
        let own = format!("test \"$({})\" = {}", get(&format!("{url}/hostname")), pod.name);
        checks.add(format!("itself by ClusterIP {address}"), own);
        checks.add(format!("itself by UDP ClusterIP {address}"), udp(&url, 81));
    }
    eventually("a pod to reach itself", || {
        let shell = cluster.kubectl()?.args(["exec", "-i", "-n", "default", &pod.name, "-c", "server", "--", "sh"]);
        checks.run(&format!("from pod {} to itself", pod.name), shell)
    })
}

/// A request from an address outside of the cluster. What is dropped is never answered, so nobody waits long.
fn ask(cluster: &Cluster, source: IpAddr, url: &str) -> Run {
    let curl = cluster.outside("curl").args(["-gsSf", "--connect-timeout", "2", "--max-time", "5", "--interface"]);
    curl.arg(source.to_string()).arg(format!("http://{url}")).limit(Duration::from_secs(20))
}

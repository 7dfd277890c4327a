//! The processes of the operator's replicas.

use basal_e2e::cluster::{Cluster, Node};

const COMMAND: &str = "basal-operator";

/// The process of the operator on a node; fails when none runs there.
pub(crate) fn pid(node: &Node) -> anyhow::Result<String> {
    Ok(node.run("pidof").args(["-s", COMMAND]).text()?.trim().to_owned())
}

/// The nodes on which one runs.
pub(crate) fn running(cluster: &Cluster) -> anyhow::Result<Vec<Node>> {
    Ok(cluster.nodes()?.into_iter().filter(|node| pid(node).is_ok()).collect())
}

/// Sends a signal to the operator on a node.
pub(crate) fn signal(node: &Node, signal: &str) -> anyhow::Result<()> {
    node.run("kill").args([signal, &pid(node)?]).done()
}

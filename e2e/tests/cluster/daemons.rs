//! The processes of Basal's daemons.

use basal_e2e::cluster::{Cluster, Node};

/// The command of the operator's replicas.
pub(crate) const OPERATOR: &str = "basal-operator";
/// The command of the agents.
pub(crate) const AGENT: &str = "basal-agent";

/// The process of a command on a node; fails when none runs there.
pub(crate) fn pid(node: &Node, command: &str) -> anyhow::Result<String> {
    Ok(node.run("pidof").args(["-s", command]).text()?.trim().to_owned())
}

/// The nodes on which an operator runs.
pub(crate) fn operators(cluster: &Cluster) -> anyhow::Result<Vec<Node>> {
    Ok(cluster.nodes()?.into_iter().filter(|node| pid(node, OPERATOR).is_ok()).collect())
}

/// Sends a signal to the process of a command on a node.
pub(crate) fn signal(node: &Node, command: &str, signal: &str) -> anyhow::Result<()> {
    node.run("kill").args([signal, &pid(node, command)?]).done()
}

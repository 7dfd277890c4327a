//! Nodes that exist at the API server only, for as many as no machine could run.

use std::sync::atomic::{AtomicU16, Ordering};

use basal_e2e::cluster::Cluster;
use serde_json::{Value, json};

/// What tells them from nodes with a kubelet: a label, which holds the name, and the key of a taint.
const LABEL: &str = "basal.io/api-only";

/// Creates some. Without the label of their operating system no DaemonSet wants them.
pub(crate) fn join(cluster: &Cluster, names: &[String]) -> anyhow::Result<()> {
    // Their addresses are for benchmarks and documentation (RFC 2544, RFC 3849). Each has its own: nodes that share one are
    // told so, in an event for each.
    static JOINED: AtomicU16 = AtomicU16::new(1);
    let node = |name: &String| {
        let number = JOINED.fetch_add(1, Ordering::Relaxed);
        let [high, low] = number.to_be_bytes();
        json!({
            "apiVersion": "v1", "kind": "Node",
            "metadata": {"name": name, "labels": {LABEL: name}},
            "spec": {"taints": [{"key": LABEL, "effect": "NoSchedule"}]},
            "status": {"addresses": [
                {"type": "InternalIP", "address": format!("198.18.{high}.{low}")},
                {"type": "InternalIP", "address": format!("2001:db8::{number:x}")},
            ]},
        })
    };
    let nodes: Vec<Value> = names.iter().map(node).collect();
    let list = json!({"apiVersion": "v1", "kind": "List", "items": nodes});
    cluster.kubectl()?.args(["create", "-f", "-"]).stdin(list.to_string()).done()
}

/// Deletes these, in one request.
pub(crate) fn leave(cluster: &Cluster, names: &[String]) -> anyhow::Result<()> {
    delete(cluster, &format!("{LABEL} in ({})", names.join(",")))
}

/// Deletes all, in one request.
pub(crate) fn all_leave(cluster: &Cluster) -> anyhow::Result<()> {
    delete(cluster, LABEL)
}

fn delete(cluster: &Cluster, selector: &str) -> anyhow::Result<()> {
    let selector = selector.replace('/', "%2F").replace(' ', "%20").replace(',', "%2C");
    cluster.kubectl()?.args(["delete", "--raw", &format!("/api/v1/nodes?labelSelector={selector}")]).done()
}

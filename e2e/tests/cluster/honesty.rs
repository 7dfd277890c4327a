//! Scenario 9: Basal says what it does not do.

use anyhow::ensure;
use basal_e2e::cluster::{Cluster, NAMESPACE};
use serde_json::{Value, json};

use crate::view::{agent_metrics, agent_pod, basal, events, eventually, metric};
use crate::workload::delete;

const WORDS: &str = "NOT ENFORCED";

/// A NetworkPolicy brings an event, a metric and a status line that say NOT ENFORCED.
pub(crate) fn policies_are_said_not_to_be_enforced(cluster: &mut Cluster) -> anyhow::Result<()> {
    let policy = json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"name": "nobody", "namespace": "default"}, "spec": {"podSelector": {}, "policyTypes": ["Ingress"]},
    });
    let before = basal(cluster, "n1", &["status"])?;
    ensure!(!before.contains(WORDS), "without any policy the status says:\n{before}");
    cluster.apply(&policy.to_string())?;
    let said = said_not_enforced(cluster);
    delete(cluster, &["networkpolicy", "nobody"])?;
    said
}

fn said_not_enforced(cluster: &Cluster) -> anyhow::Result<()> {
    eventually("a warning event", || {
        ensure!(events(cluster, "nobody", WORDS)? > 0, "none about the policy");
        Ok(())
    })?;
    eventually("the metric", || {
        let count = metric(&agent_metrics(&cluster.node("n1")?)?, "cilium_policies_not_enforced", &[])?;
        ensure!(count >= 1.0, "it is {count}");
        Ok(())
    })?;
    eventually("the status line", || {
        let status = basal(cluster, "n1", &["status"])?;
        ensure!(status.contains(WORDS), "it says:\n{status}");
        Ok(())
    })
}

/// A Cilium key that asks for encryption stops the start with its name; without it the agent starts again.
pub(crate) fn a_refused_key_stops_the_start(cluster: &mut Cluster) -> anyhow::Result<()> {
    const KEY: &str = "enable-wireguard";
    let config = cluster.get(&["configmap", "-n", NAMESPACE, "cilium-config"])?;
    let patch = |value: Value| json!({"data": {KEY: value}}).to_string();
    ensure!(config["data"][KEY].is_null(), "{KEY} is set already");
    set(cluster, &patch(json!("true")))?;
    let refused = eventually("the agent of n1 to name the key", || {
        let field = "--field-selector=spec.nodeName=n1";
        let logs = ["logs", "-n", NAMESPACE, "-l", "k8s-app=cilium", "--tail=50", "--prefix"];
        let pods = cluster.list(&["pods", "-n", NAMESPACE, "-l", "k8s-app=cilium", field])?;
        let running = pods.iter().any(|pod| pod.pointer("/status/containerStatuses/0/ready") == Some(&json!(true)));
        ensure!(!running, "the agent of n1 is ready");
        let said = cluster.kubectl()?.args(logs).text()?;
        ensure!(said.contains(KEY), "the agents say:\n{said}");
        Ok(())
    });
    set(cluster, &patch(Value::Null))?;
    refused?;
    eventually("the agent of n1 to be ready again", || agent_pod(cluster, "n1")).map(drop)
}

/// Changes the ConfigMap and starts the agent of n1 anew.
fn set(cluster: &Cluster, patch: &str) -> anyhow::Result<()> {
    cluster
        .kubectl()?
        .args(["patch", "configmap", "-n", NAMESPACE, "cilium-config", "--type=merge", "-p", patch])
        .done()?;
    let field = "--field-selector=spec.nodeName=n1";
    cluster.kubectl()?.args(["delete", "pod", "-n", NAMESPACE, "-l", "k8s-app=cilium", field, "--timeout=60s"]).done()
}

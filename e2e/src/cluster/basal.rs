//! Basal in a cluster: its image on the nodes, its secrets, its chart.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use serde_json::{Value, json};

use super::{Cluster, Node, POD_CIDRS};
use crate::command::Run;
use crate::parts;

/// The namespace that the chart is installed into.
pub const NAMESPACE: &str = "kube-system";

/// The image that `cargo xtask setup --only basal` builds, without its tag.
pub const IMAGE: &str = "localhost/basal/basal";

const RELEASE: &str = "basal";
/// The etcd certificate of agents, as Cilium's chart names it.
const AGENT_SECRET: &str = "cilium-etcd-secrets";
/// The etcd certificate of the operator, which may do more.
const OPERATOR_SECRET: &str = "basal-operator-etcd-secrets";

/// How Basal is installed.
#[derive(Debug, Clone, Default)]
pub struct BasalOptions {
    /// Values of the chart, merged over the harness's own.
    pub values: Value,
}

/// Loads the image into a node.
pub(super) fn import_image(node: &Node) -> anyhow::Result<()> {
    node.import_image(&parts::cache_dir()?.join("images/basal.tar"))
}

/// Makes the secrets and installs the chart, or upgrades it; waits until its workloads have rolled out.
pub(super) fn install(cluster: &Cluster, options: &BasalOptions) -> anyhow::Result<()> {
    for (secret, user) in [(AGENT_SECRET, "basal-agent"), (OPERATOR_SECRET, "basal-operator")] {
        make_secret(cluster, secret, user)?;
    }
    let mut values = values(cluster)?;
    merge(&mut values, &options.values);
    let path = cluster.dir().join("values.json");
    std::fs::write(&path, format!("{values:#}\n")).with_context(|| format!("writing {}", path.display()))?;
    Run::new(parts::binary("helm")?)
        .env("KUBECONFIG", cluster.kubeconfig())
        .args(["upgrade", "--install", RELEASE, "--namespace", NAMESPACE, "--values"])
        .arg(&path)
        .arg(chart())
        .done()?;
    let limit = Duration::from_secs(180);
    cluster.wait_rollout(NAMESPACE, "deployment/basal-operator", limit)?;
    cluster.wait_rollout(NAMESPACE, "daemonset/basal-agent", limit)
}

fn make_secret(cluster: &Cluster, name: &str, user: &str) -> anyhow::Result<()> {
    let files = cluster.etcd_user(user)?;
    let file = |key: &str, path: &Path| format!("--from-file={key}={}", path.display());
    let manifest = cluster
        .kubectl()?
        .args(["create", "secret", "generic", name, "-n", NAMESPACE, "--dry-run=client", "-o", "json"])
        .args([
            file("etcd-client-ca.crt", &files.ca),
            file("etcd-client.crt", &files.cert),
            file("etcd-client.key", &files.key),
        ])
        .text()?;
    cluster.apply(&manifest)
}

fn values(cluster: &Cluster) -> anyhow::Result<Value> {
    let url = cluster.api_url();
    let address = url.trim_start_matches("https://");
    let (host, port) = address.rsplit_once(':').context("the API server's URL has no port")?;
    let [v4, v6] = POD_CIDRS;
    Ok(json!({
        "image": {"repository": IMAGE, "tag": "dev", "pullPolicy": "Never"},
        "k8sServiceHost": host,
        "k8sServicePort": port,
        "etcd": {"enabled": true, "ssl": true, "endpoints": [cluster.etcd_url()], "operatorSecretName": OPERATOR_SECRET},
        "ipv4": {"enabled": true},
        "ipv6": {"enabled": true},
        "ipam": {"operator": {
            "clusterPoolIPv4PodCIDRList": [v4],
            "clusterPoolIPv4MaskSize": 24,
            "clusterPoolIPv6PodCIDRList": [v6],
            "clusterPoolIPv6MaskSize": 120,
        }},
        // Whoever waits for an agent waits for the kubelet's next look as well.
        "startupProbe": {"periodSeconds": 1},
        "readinessProbe": {"periodSeconds": 1},
    }))
}

/// The chart of this checkout.
fn chart() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../charts/basal")
}

/// Lays `over` on `values`: objects are merged, everything else is replaced.
fn merge(values: &mut Value, over: &Value) {
    match (values, over) {
        (_any, Value::Null) => {}
        (Value::Object(values), Value::Object(over)) => {
            for (key, value) in over {
                merge(values.entry(key).or_insert(Value::Null), value);
            }
        }
        (values, over) => *values = over.clone(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::merge;

    #[test]
    fn given_values_replace_leaves_and_keep_their_neighbours() {
        let mut values = json!({"ipam": {"mask": 24, "list": ["a"]}, "x": 1});
        merge(&mut values, &json!({"ipam": {"list": ["b", "c"]}, "y": {"z": 2}}));
        assert_eq!(values, json!({"ipam": {"mask": 24, "list": ["b", "c"]}, "x": 1, "y": {"z": 2}}));
        merge(&mut values, &serde_json::Value::Null);
        assert_eq!(values["x"], 1);
    }
}

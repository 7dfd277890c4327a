//! Pods for tests and benches.

use serde_json::{Value, json};

/// The image of these pods: agnhost, iperf3 and a shell.
pub const IMAGE: &str = "localhost/basal-e2e/tools:1";

/// A Deployment of pods that do nothing, spread over the nodes.
#[must_use]
pub fn idle_deployment(name: &str, replicas: usize) -> Value {
    spread(name, replicas, &json!([{"name": "idle", "image": IMAGE, "imagePullPolicy": "Never"}]))
}

/// A Deployment in `default` of pods with these containers, as many on each node, that end at once.
#[must_use]
pub fn spread(name: &str, replicas: usize, containers: &Value) -> Value {
    json!({
        "apiVersion": "apps/v1", "kind": "Deployment",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": {"app": name}},
            "template": {
                "metadata": {"labels": {"app": name}},
                "spec": {
                    "terminationGracePeriodSeconds": 0,
                    "topologySpreadConstraints": [{
                        "maxSkew": 1, "topologyKey": "kubernetes.io/hostname", "whenUnsatisfiable": "DoNotSchedule",
                        "labelSelector": {"matchLabels": {"app": name}},
                    }],
                    "containers": containers,
                },
            },
        },
    })
}

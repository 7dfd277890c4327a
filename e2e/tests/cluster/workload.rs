//! Pods to talk to.

use std::time::Duration;

use anyhow::{Context, ensure};
use basal_e2e::cluster::Cluster;
use basal_e2e::command::Run;
use basal_e2e::workload::{IMAGE, spread};
use serde_json::{Value, json};

use crate::view::{eventually, text, texts};

/// The HTTP port of [`deployment`]; UDP is the next one.
pub(crate) const PORT: u16 = 8080;

/// A pod that runs.
#[derive(Debug, Clone)]
pub(crate) struct Pod {
    pub(crate) name: String,
    pub(crate) node: String,
    /// IPv4 first.
    pub(crate) addresses: Vec<String>,
}

/// A Deployment of agnhost servers (HTTP 8080, UDP 8081) and iperf3 (5201), spread over the nodes.
pub(crate) fn deployment(name: &str, replicas: usize) -> Value {
    let probe = |seconds: u64| json!({"httpGet": {"path": "/healthz", "port": PORT}, "periodSeconds": seconds});
    let server = ["agnhost", "netexec", "--http-port=8080", "--udp-port=8081"];
    let containers = json!([
        {"name": "server", "image": IMAGE, "imagePullPolicy": "Never", "command": server,
         "readinessProbe": probe(1), "livenessProbe": probe(5)},
        {"name": "iperf", "image": IMAGE, "imagePullPolicy": "Never", "command": ["iperf3", "-s"]},
    ]);
    spread(name, replicas, &containers)
}

/// A bare pod on a node that waits.
pub(crate) fn waiting_pod(name: &str, app: &str, node: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "namespace": "default", "labels": {"app": app}},
        "spec": {
            "nodeName": node, "terminationGracePeriodSeconds": 0,
            "containers": [{"name": "c", "image": IMAGE, "imagePullPolicy": "Never"}],
        },
    })
}

/// Creates a Deployment and waits until all of it is ready.
pub(crate) fn deploy(cluster: &Cluster, name: &str, replicas: usize) -> anyhow::Result<Vec<Pod>> {
    cluster.apply(&deployment(name, replicas).to_string())?;
    cluster.wait_rollout("default", &format!("deployment/{name}"), Duration::from_secs(120))?;
    let pods = running(cluster, name)?;
    ensure!(pods.len() == replicas, "{} of {replicas} pods of {name} run", pods.len());
    Ok(pods)
}

/// The pods with a label `app`, which must all have their addresses.
pub(crate) fn running(cluster: &Cluster, app: &str) -> anyhow::Result<Vec<Pod>> {
    let pods = cluster.list(&["pods", "-n", "default", "-l", &format!("app={app}")])?;
    pods.iter()
        .filter(|pod| !pod["metadata"]["deletionTimestamp"].is_string())
        .map(|pod| {
            let list = pod.pointer("/status/podIPs").and_then(Value::as_array).context("a pod without addresses")?;
            Ok(Pod {
                name: text(pod, "/metadata/name")?.to_owned(),
                node: text(pod, "/spec/nodeName")?.to_owned(),
                addresses: list.iter().map(|one| Ok(text(one, "/ip")?.to_owned())).collect::<anyhow::Result<_>>()?,
            })
        })
        .collect()
}

/// Makes a dual-stack Service in front of a Deployment; answers its ClusterIPs and its HTTP NodePort.
pub(crate) fn expose(cluster: &Cluster, name: &str) -> anyhow::Result<(Vec<String>, u64)> {
    serve(cluster, name, &json!({"app": name}), "Cluster")
}

/// The same in front of any pods, with a policy for what comes from outside.
pub(crate) fn serve(
    cluster: &Cluster,
    name: &str,
    selector: &Value,
    external_traffic_policy: &str,
) -> anyhow::Result<(Vec<String>, u64)> {
    let service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": "default"},
        "spec": {
            "type": "NodePort", "ipFamilyPolicy": "RequireDualStack", "selector": selector,
            "externalTrafficPolicy": external_traffic_policy,
            "ports": [
                {"name": "http", "port": 80, "targetPort": PORT, "protocol": "TCP"},
                {"name": "udp", "port": 81, "targetPort": PORT + 1, "protocol": "UDP"},
            ],
        },
    });
    cluster.apply(&service.to_string())?;
    eventually("the Service's addresses", || {
        let service = cluster.get(&["service", "-n", "default", name])?;
        let port = service.pointer("/spec/ports/0/nodePort").and_then(Value::as_u64).context("no NodePort")?;
        let addresses = texts(&service, "/spec/clusterIPs");
        ensure!(addresses.len() == 2, "ClusterIPs {addresses:?}");
        Ok((addresses, port))
    })
}

/// Deletes objects and waits until they are gone.
pub(crate) fn delete(cluster: &Cluster, words: &[&str]) -> anyhow::Result<()> {
    cluster.kubectl()?.args(["delete", "-n", "default", "--ignore-not-found", "--timeout=90s"]).args(words).done()
}

/// An address as a URL wants it.
pub(crate) fn in_url(address: &str) -> String {
    if address.contains(':') { format!("[{address}]") } else { address.to_owned() }
}

/// Shell commands that must all succeed, run by one `sh`: each with a label that says what it shows.
#[derive(Debug, Default)]
pub(crate) struct Checks(Vec<(String, String)>);

impl Checks {
    pub(crate) fn add(&mut self, label: impl Into<String>, command: impl Into<String>) {
        self.0.push((label.into(), command.into()));
    }

    /// Has `shell`, a command that ends in a shell which reads its standard input, run the checks.
    pub(crate) fn run(&self, place: &str, shell: Run) -> anyhow::Result<()> {
        let said = shell.stdin(self.script()).text()?;
        ensure!(said.lines().any(|line| line == "failed=0"), "of {} checks {place}:\n{said}", self.0.len());
        Ok(())
    }

    /// The script; it prints a line for each command that fails and then a line with their number.
    fn script(&self) -> String {
        let mut script = String::from("failed=0\n");
        for (label, command) in &self.0 {
            script.push_str(&format!(
                "said=$( {command} 2>&1) || {{ failed=$((failed+1)); echo \"FAILED {label}: $said\"; }}\n"
            ));
        }
        script.push_str("echo \"failed=$failed\"\n");
        script
    }
}

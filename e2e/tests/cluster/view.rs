//! What Basal says: its command, its objects, its records in etcd.

use std::time::Duration;

use anyhow::{Context, bail, ensure};
use basal_e2e::cluster::{Cluster, NAMESPACE, Node};
use basal_e2e::command::Run;
use basal_e2e::wait::{self, Check};
use serde_json::Value;

use crate::workload::in_url;

/// Nobody needs longer for one change to reach every node.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);
const PAUSE: Duration = Duration::from_millis(300);

/// Waits until `check` succeeds; `what` says what for.
pub(crate) fn eventually<T>(what: &str, mut check: impl FnMut() -> anyhow::Result<T>) -> anyhow::Result<T> {
    wait::until(
        what,
        LIMIT,
        PAUSE,
        || Ok(check().map_or_else(|error| Check::NotYet(format!("{error:#}")), Check::Done)),
    )
}

/// The text at a JSON pointer.
pub(crate) fn text<'a>(value: &'a Value, pointer: &str) -> anyhow::Result<&'a str> {
    value.pointer(pointer).and_then(Value::as_str).with_context(|| format!("no text at {pointer} of {value}"))
}

/// The texts of the list at a JSON pointer; none when there is no list.
pub(crate) fn texts(value: &Value, pointer: &str) -> Vec<String> {
    let list = value.pointer(pointer).and_then(Value::as_array);
    list.into_iter().flatten().filter_map(|item| Some(item.as_str()?.to_owned())).collect()
}

/// The PodCIDRs that the CiliumNode of a node holds.
pub(crate) fn pod_cidrs(cluster: &Cluster, node: &str) -> anyhow::Result<Vec<String>> {
    Ok(texts(&cluster.get(&["ciliumnode", node])?, "/spec/ipam/podCIDRs"))
}

/// The agent's pod on a node, once it is ready.
pub(crate) fn agent_pod(cluster: &Cluster, node: &str) -> anyhow::Result<String> {
    let field = format!("--field-selector=spec.nodeName={node}");
    let pods = cluster.list(&["pods", "-n", NAMESPACE, "-l", "k8s-app=cilium", &field])?;
    let ready = |pod: &&Value| {
        let conditions = pod["status"]["conditions"].as_array();
        let gone = pod["metadata"]["deletionTimestamp"].is_string();
        !gone && conditions.is_some_and(|all| all.iter().any(|one| one["type"] == "Ready" && one["status"] == "True"))
    };
    let pod = pods.iter().find(ready).with_context(|| format!("no ready agent on {node}"))?;
    Ok(text(pod, "/metadata/name")?.to_owned())
}

/// Runs `basal ARGS` beside the agent of a node.
pub(crate) fn basal(cluster: &Cluster, node: &str, args: &[&str]) -> anyhow::Result<String> {
    let pod = agent_pod(cluster, node)?;
    cluster.exec(NAMESPACE, &pod, &[&["basal"], args].concat())
}

/// The record in etcd that a prefix and a name make, parsed.
pub(crate) fn record(cluster: &Cluster, key: &str) -> anyhow::Result<Option<Value>> {
    let found = cluster.etcdctl()?.args(["get", key, "--print-value-only"]).text()?;
    if found.trim().is_empty() {
        return Ok(None);
    }
    Ok(Some(serde_json::from_str(&found).with_context(|| format!("the value of {key} is {found}"))?))
}

/// The keys below a prefix.
pub(crate) fn keys(cluster: &Cluster, prefix: &str) -> anyhow::Result<Vec<String>> {
    let found = cluster.etcdctl()?.args(["get", "--prefix", prefix, "--keys-only"]).text()?;
    Ok(found.lines().filter(|line| !line.is_empty()).map(str::to_owned).collect())
}

/// Where node records lie.
pub(crate) const RECORDS: &str = "cilium/state/nodes/v1/default/";

/// The key of a node's record.
pub(crate) fn node_key(node: &str) -> String {
    format!("{RECORDS}{node}")
}

/// Where ip→identity records lie.
pub(crate) const IP_RECORDS: &str = "cilium/state/ip/v1/default/";

/// Waits until every node knows the others.
pub(crate) fn all_know_the_others(cluster: &Cluster) -> anyhow::Result<()> {
    for node in cluster.nodes()? {
        eventually(&format!("{} to know the others", node.name()), || knows_the_others(cluster, &node))?;
    }
    Ok(())
}

/// Fails unless the tunnel map and the ipcache of a node hold the other nodes' PodCIDRs with their addresses, and no
/// more nodes than that.
pub(crate) fn knows_the_others(cluster: &Cluster, node: &Node) -> anyhow::Result<()> {
    let tunnels = basal(cluster, node.name(), &["bpf", "tunnel", "list"])?;
    let ipcache = basal(cluster, node.name(), &["bpf", "ipcache", "list"])?;
    let nodes = cluster.nodes()?;
    let mut expected = 0;
    for other in nodes.iter().filter(|other| other.name() != node.name()) {
        let endpoint = other.addresses()[0].to_string();
        for cidr in pod_cidrs(cluster, other.name())? {
            expected += 1;
            // As Cilium prints them: the block's address, and port 0 behind both.
            let block = cidr.split('/').next().unwrap_or_default();
            let row = [format!("{}:0", in_url(block)), format!("{endpoint}:0")];
            ensure!(has(&tunnels, &[&row[0], &row[1]]), "no tunnel to {cidr} by {endpoint} in:\n{tunnels}");
            let flag = format!("tunnelendpoint={endpoint}");
            ensure!(has(&ipcache, &[&cidr, "identity=2", &flag]), "no row for {cidr} by {endpoint} in:\n{ipcache}");
        }
    }
    let rows = tunnels.lines().filter(|line| line.contains(":0")).count();
    ensure!(rows == expected, "{rows} tunnels instead of {expected}:\n{tunnels}");
    Ok(())
}

/// Whether a line holds all words, whitespace around each.
pub(crate) fn has(table: &str, words: &[&str]) -> bool {
    table.lines().any(|line| {
        let columns: Vec<&str> = line.split_whitespace().collect();
        words.iter().all(|word| columns.contains(word))
    })
}

/// The value of one metric on a page: the sum of the samples whose line holds all `labels`.
pub(crate) fn metric(page: &str, name: &str, labels: &[&str]) -> anyhow::Result<f64> {
    let mut sum = None;
    for line in page.lines().filter(|line| !line.starts_with('#')) {
        let Some((series, value)) = line.rsplit_once(' ') else { continue };
        let of_name = series.split('{').next() == Some(name);
        if of_name && labels.iter().all(|label| series.contains(label)) {
            *sum.get_or_insert(0.0) += value.parse::<f64>().with_context(|| format!("the sample {line}"))?;
        }
    }
    match sum {
        Some(sum) => Ok(sum),
        None => bail!("no sample of {name} with {labels:?} in:\n{page}"),
    }
}

/// The metrics page of a node's agent.
pub(crate) fn agent_metrics(node: &Node) -> anyhow::Result<String> {
    const PORT: u16 = 9962;
    Run::new("curl").args(["-sSf", "--max-time", "5", &format!("http://{}:{PORT}/metrics", node.addresses()[0])]).text()
}

/// The operator's replicas: the node of each and its metrics page.
pub(crate) fn operators(cluster: &Cluster) -> anyhow::Result<Vec<(Node, String)>> {
    const PORT: u16 = 9963;
    let mut found = Vec::new();
    for pod in cluster.list(&["pods", "-n", NAMESPACE, "-l", "io.cilium/app=operator"])? {
        let Some(node) = pod.pointer("/spec/nodeName").and_then(Value::as_str) else { continue };
        let node = cluster.node(node)?;
        let url = format!("http://{}:{PORT}/metrics", node.addresses()[0]);
        // A replica that is starting has none yet.
        if let Ok(page) = Run::new("curl").args(["-sSf", "--max-time", "5", &url]).text() {
            found.push((node, page));
        }
    }
    Ok(found)
}

/// The node that the leading operator runs on.
pub(crate) fn leader(cluster: &Cluster) -> anyhow::Result<Node> {
    let operators = operators(cluster)?;
    let leads = |page: &str| metric(page, "basal_operator_leader", &[]).is_ok_and(|value| value > 0.5);
    let leader = operators.into_iter().find(|(_node, page)| leads(page));
    Ok(leader.context("no operator says that it leads")?.0)
}

/// A metric summed over the operator's replicas.
pub(crate) fn operator_metric(cluster: &Cluster, name: &str, labels: &[&str]) -> anyhow::Result<f64> {
    Ok(operators(cluster)?.iter().filter_map(|(_node, page)| metric(page, name, labels).ok()).sum())
}

/// Events about an object whose message holds `words`.
pub(crate) fn events(cluster: &Cluster, object: &str, words: &str) -> anyhow::Result<usize> {
    let events = cluster.list(&["events", "-A"])?;
    let about = |event: &&Value| {
        event["involvedObject"]["name"] == object
            && event["message"].as_str().is_some_and(|message| message.contains(words))
    };
    Ok(events.iter().filter(about).count())
}

//! Scenario 5: leaders die in the middle of their work, and no block is handed out twice.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU16, Ordering};

use anyhow::{Context, bail, ensure};
use basal_e2e::cluster::{BasalOptions, Cluster, Node};
use basal_e2e::say::say;
use serde_json::{Value, json};

use crate::suite::wider;
use crate::view::{eventually, keys, leader, node_key, operator_metric, text, texts};

const NODES: usize = 200;
/// Decides the order in which leaders die at the steps of [`DEATHS`].
const SEED: u64 = 0x5eed;

const OPERATOR_ROLE: &str = "basal-operator";
const CLAIMS: &str = "basal/ipam/v1/default/";
const RECORDS: &str = "cilium/state/nodes/v1/default/";
/// Writes to the ledger, by outcome.
const SWAPS: &str = "basal_operator_ledger_swaps_total";
const LABEL: &str = "basal.io/api-only";

/// Where a leader is stopped: the step that may not succeed any more when it is killed.
#[derive(Debug, Clone, Copy)]
enum Before {
    /// No claim can be written.
    Claim,
    /// Claims are written, and no CiliumNode.
    CiliumNode,
    /// Claims and CiliumNodes are written, and no node record.
    Record,
    /// Nothing is in its way.
    Nothing,
}

/// Where the ten leaders die.
const DEATHS: [Before; 10] = [
    Before::Claim,
    Before::Claim,
    Before::CiliumNode,
    Before::CiliumNode,
    Before::CiliumNode,
    Before::Record,
    Before::Record,
    Before::Record,
    Before::Nothing,
    Before::Nothing,
];

/// Two hundred nodes that exist at the API server only join in ten batches; the leader of each batch is killed at a
/// seeded step. In the end each node has one block of each family, no block two nodes, and a record in etcd.
pub(crate) fn no_block_twice(cluster: &mut Cluster) -> anyhow::Result<()> {
    // Changes nothing where the pool was widened before.
    cluster.install_basal(&BasalOptions { values: wider() })?;
    for (batch, before) in shuffled(DEATHS, SEED).into_iter().enumerate() {
        let names: Vec<String> = (0..NODES / DEATHS.len()).map(|number| format!("api-{batch}-{number}")).collect();
        let node = eventually("a leader", || leader(cluster))?;
        let killed = block(cluster, before).and_then(|undo| {
            let result = join(cluster, &names)
                .and_then(|()| eventually(&format!("a batch to reach {before:?}"), || reached(cluster, before, &names)))
                .and_then(|()| kill(&node));
            undo(cluster).and(result)
        });
        killed.with_context(|| format!("batch {batch}, leader on {} stopped before {before:?}", node.name()))?;
        say(format!("  leader {batch} on {} killed before {before:?}", node.name()));
    }
    eventually("every node to be served", || {
        let records = keys(cluster, RECORDS)?.iter().filter(|key| key.contains("/api-")).count();
        ensure!(records == NODES, "{records} of {NODES} have a record");
        Ok(())
    })?;
    judge(cluster)?;
    cluster.kubectl()?.args(["delete", "nodes", "-l", LABEL, "--timeout=120s"]).done()?;
    eventually("their records to go", || {
        let left = keys(cluster, RECORDS)?.iter().filter(|key| key.contains("/api-")).count();
        ensure!(left == 0, "{left} are left");
        Ok(())
    })
}

/// The steps in an order that a seed decides: Knuth's shuffle with his MMIX generator.
fn shuffled<const N: usize>(mut steps: [Before; N], seed: u64) -> [Before; N] {
    let mut random = seed;
    for last in (1..N).rev() {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        // The high bits are the random ones.
        steps.swap(last, (random >> 33) as usize % (last + 1));
    }
    steps
}

/// Creates nodes that no kubelet stands behind. Without the label of their operating system no DaemonSet wants them.
pub(crate) fn join(cluster: &Cluster, names: &[String]) -> anyhow::Result<()> {
    // Their addresses are for benchmarks and documentation (RFC 2544, RFC 3849). Each has its own: nodes that share one are
    // told so, in an event for each.
    static JOINED: AtomicU16 = AtomicU16::new(1);
    let node = |name: &String| {
        let number = JOINED.fetch_add(1, Ordering::Relaxed);
        let [high, low] = number.to_be_bytes();
        json!({
            "apiVersion": "v1", "kind": "Node",
            "metadata": {"name": name, "labels": {LABEL: ""}},
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

type Undo = Box<dyn FnOnce(&Cluster) -> anyhow::Result<()>>;

/// Takes a right away from the operator, so that it cannot get past a step; answers what gives it back.
fn block(cluster: &Cluster, before: Before) -> anyhow::Result<Undo> {
    match before {
        Before::Claim => read_only(cluster, "basal/"),
        Before::Record => read_only(cluster, "cilium/"),
        Before::CiliumNode => without_cilium_nodes(cluster),
        Before::Nothing => Ok(Box::new(|_cluster| Ok(()))),
    }
}

fn read_only(cluster: &Cluster, prefix: &'static str) -> anyhow::Result<Undo> {
    grant(cluster, "read", prefix)?;
    Ok(Box::new(move |cluster| grant(cluster, "readwrite", prefix)))
}

fn grant(cluster: &Cluster, access: &str, prefix: &str) -> anyhow::Result<()> {
    // The same range granted again replaces the permission.
    cluster.etcdctl()?.args(["role", "grant-permission", OPERATOR_ROLE, "--prefix=true", access, prefix]).done()
}

/// Takes the verbs that write CiliumNodes out of the operator's ClusterRole.
fn without_cilium_nodes(cluster: &Cluster) -> anyhow::Result<Undo> {
    let mut role = cluster.get(&["clusterrole", OPERATOR_ROLE])?;
    let whole = role["rules"].clone();
    let rules = role["rules"].as_array_mut().context("the operator's ClusterRole has no rules")?;
    for rule in rules {
        if let Some(resources) = rule["resources"].as_array_mut() {
            resources.retain(|resource| !matches!(resource.as_str(), Some("ciliumnodes" | "ciliumnodes/status")));
            resources.push(json!("basal-e2e-nothing"));
        }
    }
    let reading = json!({"apiGroups": ["cilium.io"], "resources": ["ciliumnodes"], "verbs": ["get", "list", "watch"]});
    if let Some(rules) = role["rules"].as_array_mut() {
        rules.push(reading);
    }
    set_rules(cluster, &role["rules"])?;
    Ok(Box::new(move |cluster| set_rules(cluster, &whole)))
}

fn set_rules(cluster: &Cluster, rules: &Value) -> anyhow::Result<()> {
    let patch = json!({"rules": rules}).to_string();
    cluster.kubectl()?.args(["patch", "clusterrole", OPERATOR_ROLE, "--type=merge", "-p", &patch]).done()
}

/// Fails unless some node of the batch is past the steps that come first.
fn reached(cluster: &Cluster, before: Before, names: &[String]) -> anyhow::Result<()> {
    let found = match before {
        Before::Claim => {
            let (all, done) = (operator_metric(cluster, SWAPS, &[])?, operator_metric(cluster, SWAPS, &[r#""Done""#])?);
            all > done
        }
        Before::CiliumNode => {
            let claims = cluster.etcdctl()?.args(["get", "--prefix", CLAIMS, "--print-value-only"]).text()?;
            names.iter().any(|name| claims.contains(&format!("\"{name}\"")))
        }
        Before::Record => {
            let served = served(cluster)?;
            names.iter().any(|name| served.contains_key(name.as_str()))
        }
        Before::Nothing => {
            let records = keys(cluster, RECORDS)?;
            names.iter().any(|name| records.contains(&node_key(name)))
        }
    };
    ensure!(found, "no node of the batch is there yet");
    Ok(())
}

/// The PodCIDRs of the CiliumNodes that have any.
fn served(cluster: &Cluster) -> anyhow::Result<BTreeMap<String, Vec<String>>> {
    let mut served = BTreeMap::new();
    for node in cluster.list(&["ciliumnodes"])? {
        let cidrs = texts(&node, "/spec/ipam/podCIDRs");
        if !cidrs.is_empty() {
            served.insert(text(&node, "/metadata/name")?.to_owned(), cidrs);
        }
    }
    Ok(served)
}

fn kill(node: &Node) -> anyhow::Result<()> {
    let pid = node.run("pidof").args(["-s", "basal-operator"]).text()?;
    node.run("kill").args(["-KILL", pid.trim()]).done()
}

/// One block of each family for each node, and no block for two; the ledger says the same as the CiliumNodes.
fn judge(cluster: &Cluster) -> anyhow::Result<()> {
    let served = served(cluster)?;
    let mut seen = BTreeSet::new();
    for (name, cidrs) in &served {
        let v6 = cidrs.iter().filter(|cidr| cidr.contains(':')).count();
        ensure!(cidrs.len() == 2 && v6 == 1, "{name} has {cidrs:?}");
        for cidr in cidrs {
            ensure!(seen.insert(cidr.as_str()), "{cidr} belongs to {name} and to another node");
        }
    }
    let joined = served.keys().filter(|name| name.starts_with("api-")).count();
    ensure!(joined == NODES, "{joined} of {NODES} nodes have blocks");
    let granted = granted(cluster)?;
    for (name, cidrs) in &served {
        let claims = granted.get(name).cloned().unwrap_or_default();
        let cidrs: BTreeSet<String> = cidrs.iter().cloned().collect();
        ensure!(claims == cidrs, "the ledger grants {name} {claims:?}, its CiliumNode has {cidrs:?}");
    }
    Ok(())
}

/// The blocks that the ledger's cells say are granted, by node.
fn granted(cluster: &Cluster) -> anyhow::Result<BTreeMap<String, BTreeSet<String>>> {
    let mut granted: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for key in keys(cluster, CLAIMS)? {
        // The fence and other marks beside the cells are no JSON objects with blocks.
        let value = cluster.etcdctl()?.args(["get", &key, "--print-value-only"]).text()?;
        let Ok(cell) = serde_json::from_str::<Value>(&value) else { continue };
        for block in cell["blocks"].as_array().into_iter().flatten() {
            if block["state"] == "granted" {
                granted.entry(text(block, "/node")?.to_owned()).or_default().insert(text(block, "/block")?.to_owned());
            }
        }
    }
    if granted.is_empty() {
        bail!("no cell of the ledger grants anything: the search is blind");
    }
    Ok(granted)
}

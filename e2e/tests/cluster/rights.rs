//! What the operator may do, and what it says when it may not.

use anyhow::{bail, ensure};
use basal_e2e::cluster::{Cluster, NAMESPACE, Node};
use serde_json::{Value, json};

use crate::api_nodes::{all_leave, join};
use crate::daemons::{OPERATOR, operators, pid};
use crate::view::{RECORDS, events, eventually, keys, leader, node_key, pod_cidrs, record, texts};

/// A node that comes while a right is missing.
const LATE: &str = "api-without-rights";

/// Rights to make CiliumNodes and the Lease, and to write the ledger in etcd are missing, one after another: what is missing is
/// named, nothing is served without it, and all goes on without a restart when it is there again.
pub(crate) fn a_missing_right_is_named(cluster: &mut Cluster) -> anyhow::Result<()> {
    let nodes = operators(cluster)?;
    let pids = || nodes.iter().map(|node| pid(node, OPERATOR)).collect::<anyhow::Result<Vec<String>>>();
    let before = pids()?;
    ensure!(!before.is_empty(), "no operator runs");

    let whole = rules(cluster, CLUSTER_ROLE)?;
    set_rules(cluster, CLUSTER_ROLE, &without(&whole, "ciliumnodes", &["create"])?)?;
    let named = unserved(cluster);
    set_rules(cluster, CLUSTER_ROLE, &whole)?;
    named?;
    eventually("the node to be served", || {
        ensure!(record(cluster, &node_key(LATE))?.is_some(), "it has no record");
        Ok(())
    })?;

    let whole = rules(cluster, NAMESPACE_ROLE)?;
    set_rules(cluster, NAMESPACE_ROLE, &without(&whole, "leases", &["create"])?)?;
    let lease = ["delete", "lease", "-n", NAMESPACE, "cilium-operator-resource-lock"];
    let named = cluster.kubectl()?.args(lease).done().and_then(|()| {
        let says = |node| says_on(node, "rights at the API server", "create leases");
        nodes.iter().try_for_each(says)
    });
    set_rules(cluster, NAMESPACE_ROLE, &whole)?;
    named?;
    eventually("a leader", || leader(cluster))?;

    grant(cluster, "read", "basal/")?;
    let named = nodes.iter().try_for_each(|node| says_on(node, "etcd", "check the role"));
    grant(cluster, "readwrite", "basal/")?;
    named?;

    // The other replica may still tell that it could not make the Lease, which it does not need to any more.
    eventually("the leader to be ready", || {
        let page = readyz(&leader(cluster)?)?;
        ensure!(!page.contains("[-]"), "it says:\n{page}");
        Ok(())
    })?;
    let after = pids()?;
    ensure!(before == after, "operators were started anew: {before:?} became {after:?}");
    all_leave(cluster)?;
    eventually("its record to go", || {
        ensure!(!keys(cluster, RECORDS)?.contains(&node_key(LATE)), "it is there");
        Ok(())
    })
}

/// A node comes, and the leader says what it may not do for it.
fn unserved(cluster: &Cluster) -> anyhow::Result<()> {
    let node = leader(cluster)?;
    join(cluster, &[LATE.into()])?;
    says_on(&node, "rights at the API server", "create ciliumnodes")?;
    eventually("an event that says so", || {
        ensure!(events(cluster, LATE, "cannot create resource")? > 0, "none about {LATE}");
        Ok(())
    })?;
    ensure!(pod_cidrs(cluster, LATE).is_err(), "{LATE} has a CiliumNode");
    ensure!(record(cluster, &node_key(LATE))?.is_none(), "{LATE} has a record");
    Ok(())
}

/// Waits until the operator on a node is not ready because of a condition that says these words.
fn says_on(node: &Node, condition: &str, words: &str) -> anyhow::Result<()> {
    eventually(&format!("the operator on {} to say {words:?}", node.name()), || {
        let page = readyz(node)?;
        let said = page.lines().find(|line| line.starts_with(&format!("[-] {condition}: ")));
        ensure!(said.is_some_and(|said| said.contains(words)), "it says:\n{page}");
        Ok(())
    })
}

/// What `/readyz` of the operator on a node says, ready or not.
fn readyz(node: &Node) -> anyhow::Result<String> {
    node.run("curl").args(["-sS", "--max-time", "5", "http://127.0.0.1:9234/readyz"]).text()
}

/// The name of the operator's role in etcd.
const ROLE: &str = "basal-operator";

/// Its ClusterRole, as words for kubectl.
pub(crate) const CLUSTER_ROLE: &[&str] = &["clusterrole", "basal-operator"];

/// Its Role in its own namespace.
const NAMESPACE_ROLE: &[&str] = &["role", "basal-operator", "-n", NAMESPACE];

/// Gives the operator `read` or `readwrite` on a prefix of etcd. The same range granted again replaces the permission.
pub(crate) fn grant(cluster: &Cluster, access: &str, prefix: &str) -> anyhow::Result<()> {
    cluster.etcdctl()?.args(["role", "grant-permission", ROLE, "--prefix=true", access, prefix]).done()
}

/// The rules of a role.
pub(crate) fn rules(cluster: &Cluster, role: &[&str]) -> anyhow::Result<Vec<Value>> {
    match cluster.get(role)?["rules"].take() {
        Value::Array(rules) => Ok(rules),
        _other => bail!("{role:?} has no rules"),
    }
}

/// Replaces them.
pub(crate) fn set_rules(cluster: &Cluster, role: &[&str], rules: &[Value]) -> anyhow::Result<()> {
    let patch = json!({"rules": rules}).to_string();
    cluster.kubectl()?.arg("patch").args(role).args(["--type=merge", "-p", &patch]).done()
}

/// The rules that are left when nobody may do `verbs` with a resource.
pub(crate) fn without(rules: &[Value], resource: &str, verbs: &[&str]) -> anyhow::Result<Vec<Value>> {
    let mut left = Vec::new();
    let mut taken = false;
    for rule in rules {
        let (own, others): (Vec<String>, Vec<String>) =
            texts(rule, "/resources").into_iter().partition(|name| name == resource);
        let (less, kept): (Vec<String>, Vec<String>) =
            texts(rule, "/verbs").into_iter().partition(|verb| verbs.contains(&verb.as_str()));
        taken |= !own.is_empty() && !less.is_empty();
        let mut keep = |resources: Vec<String>, verbs: &[String]| {
            if !resources.is_empty() && !verbs.is_empty() {
                let mut rule = rule.clone();
                rule["resources"] = json!(resources);
                rule["verbs"] = json!(verbs);
                left.push(rule);
            }
        };
        keep(own, &kept);
        keep(others, &texts(rule, "/verbs"));
    }
    ensure!(taken, "the role allows none of {verbs:?} on {resource}");
    Ok(left)
}

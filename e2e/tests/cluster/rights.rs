//! What the operator may do.

use anyhow::{bail, ensure};
use basal_e2e::cluster::Cluster;
use serde_json::{Value, json};

use crate::view::texts;

/// The name of the operator's role in etcd and of its ClusterRole.
const ROLE: &str = "basal-operator";

/// Gives the operator `read` or `readwrite` on a prefix of etcd. The same range granted again replaces the permission.
pub(crate) fn grant(cluster: &Cluster, access: &str, prefix: &str) -> anyhow::Result<()> {
    cluster.etcdctl()?.args(["role", "grant-permission", ROLE, "--prefix=true", access, prefix]).done()
}

/// The rules of the operator's ClusterRole.
pub(crate) fn rules(cluster: &Cluster) -> anyhow::Result<Vec<Value>> {
    match cluster.get(&["clusterrole", ROLE])?["rules"].take() {
        Value::Array(rules) => Ok(rules),
        _other => bail!("the ClusterRole {ROLE} has no rules"),
    }
}

/// Replaces them.
pub(crate) fn set_rules(cluster: &Cluster, rules: &[Value]) -> anyhow::Result<()> {
    let patch = json!({"rules": rules}).to_string();
    cluster.kubectl()?.args(["patch", "clusterrole", ROLE, "--type=merge", "-p", &patch]).done()
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
    ensure!(taken, "the ClusterRole {ROLE} allows none of {verbs:?} on {resource}");
    Ok(left)
}

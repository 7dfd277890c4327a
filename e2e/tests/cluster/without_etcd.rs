//! Scenario 10: a cluster without an etcd of Basal's, where all records are custom resources, and programs masquerade.

use std::collections::BTreeSet;

use anyhow::{Context, ensure};
use basal_e2e::cluster::Cluster;
use serde_json::{Value, json};

use crate::churn::{pods_are_gone, pods_come, traces};
use crate::masquerade;
use crate::observer::check;
use crate::suite::{on_its_own, values};
use crate::traffic::{Capture, identities, identities_on_the_wire, reach, rows};
use crate::unattended;
use crate::view::{all_know_the_others, basal, eventually, keys, knows_the_others, pod_cidrs};
use crate::workload::{Checks, Pod, delete, deploy, in_url};

/// Boots a cluster of its own: every node is served and known to the others, pods talk across nodes, past the stack, with
/// their identity on the wire and reach the outside, sixty pods come and go, somebody tampers under traffic (in a soak, versions change
/// too), a node goes for good. Nobody ever wrote to etcd.
pub(crate) fn records_are_objects() -> anyhow::Result<()> {
    on_its_own("none", without_etcd(), exercise)
}

fn without_etcd() -> Value {
    let mut values = values();
    values["etcd"] = json!({"enabled": false});
    values["bpf"] = json!({"masquerade": true, "hostLegacyRouting": false});
    values
}

fn exercise(cluster: &mut Cluster) -> anyhow::Result<()> {
    every_node_is_served(cluster)?;
    let status = basal(cluster, "n1", &["status"])?;
    ensure!(status.lines().any(|line| line.starts_with("KVStore:") && line.ends_with("Disabled")), "{status}");
    let before = traces(cluster)?;
    pods_come(cluster, "churn")?;
    let endpoints = cluster.list(&["ciliumendpoints", "-n", "default"])?;
    ensure!(endpoints.len() == 60, "{} CiliumEndpoints for 60 pods", endpoints.len());
    delete(cluster, &["deployment", "churn"])?;
    pods_are_gone(cluster, "churn")?;
    eventually("every trace of the pods to go", || before.are_all_that_is_left(cluster))?;
    unattended::forwarding_goes_on_without_etcd(cluster, &without_etcd())?;
    // Others forget the node after half a minute; what happens meanwhile takes about as long.
    cluster.remove_node("n3", true)?;
    let pods = deploy(cluster, "green", 2)?;
    everybody_talks(cluster, &pods)?;
    went_past_the_stack(cluster, &pods)?;
    masquerade::by_programs(cluster, &pods)?;
    delete(cluster, &["deployment", "green"])?;
    for node in cluster.nodes()? {
        eventually(&format!("{} to forget n3", node.name()), || knows_the_others(cluster, &node))?;
    }
    eventually("nothing to be wrong with the blocks", || check(cluster, &without_etcd()))?;
    let written = keys(cluster, "")?;
    ensure!(written.is_empty(), "etcd holds {written:?}");
    Ok(())
}

fn every_node_is_served(cluster: &Cluster) -> anyhow::Result<()> {
    let mut seen = BTreeSet::new();
    for node in cluster.nodes()? {
        let cidrs = pod_cidrs(cluster, node.name())?;
        let families = (cidrs.iter().filter(|cidr| !cidr.contains(':')).count(), cidrs.len());
        ensure!(families == (1, 2), "{} has the PodCIDRs {cidrs:?}", node.name());
        let object = cluster.get(&["ciliumnode", node.name()])?;
        for cidr in &cidrs {
            ensure!(seen.insert(cidr.clone()), "{cidr} belongs to two nodes");
            let uses = object.pointer("/status/ipam/pod-cidrs").context("no PodCIDR is confirmed")?;
            ensure!(uses[cidr]["status"] == "in-use", "the status of {} says {uses}", node.name());
        }
    }
    all_know_the_others(cluster)
}

/// What each pod just opened to the other in each family was noted on its node.
fn went_past_the_stack(cluster: &Cluster, pods: &[Pod]) -> anyhow::Result<()> {
    for pod in pods {
        let direct = basal(cluster, &pod.node, &["bpf", "direct", "list"])?;
        for address in &pod.addresses {
            let from = format!("TCP OUT {}:", in_url(address));
            ensure!(direct.lines().any(|line| line.starts_with(&from)), "nothing of {address} in\n{direct}");
        }
    }
    Ok(())
}

/// Both pods reach each other, over both families, with the identity of their labels as VNI. Two agents that see labels for
/// the first time at the same moment make an identity each, as Cilium's do: so every pod has its own here.
fn everybody_talks(cluster: &Cluster, pods: &[Pod]) -> anyhow::Result<()> {
    let (first, second) = pods.split_at(1);
    let apps = [("first", first), ("second", second)];
    let found = eventually("the identities of the Deployment", || identities(cluster, &apps))?;
    for identity in found.values() {
        let object = cluster.get(&["ciliumidentity", &identity.to_string()])?;
        ensure!(object["security-labels"]["k8s:app"] == "green", "CiliumIdentity {identity} is {object}");
    }
    for node in cluster.nodes()? {
        eventually(&format!("ipcache rows on {}", node.name()), || rows(cluster, &node, &apps, &found))?;
    }
    let capture = Capture::start(cluster)?;
    let mut result = Ok(());
    for pod in pods {
        let mut checks = Checks::default();
        for target in pods.iter().filter(|target| target.node != pod.node) {
            for address in &target.addresses {
                reach(&mut checks, &format!("pod on {} {address}", target.node), address);
            }
        }
        let shell = cluster.kubectl()?.args(["exec", "-i", "-n", "default", &pod.name, "-c", "server", "--", "sh"]);
        result = result.and_then(|()| checks.run(&format!("from pod {} on {}", pod.name, pod.node), shell));
    }
    let seen = identities_on_the_wire(&capture.stop()?);
    result?;
    for identity in found.values() {
        ensure!(seen.contains(identity), "no packet carried the identity {identity}; VNIs seen: {seen:?}");
    }
    Ok(())
}

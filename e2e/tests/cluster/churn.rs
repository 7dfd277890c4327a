//! Scenario 3: pods come and go, and nothing of them stays, not even what no agent knows of.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::ensure;
use basal_e2e::cluster::Cluster;
use basal_e2e::workload::idle_deployment;
use serde_json::json;

use crate::view::{IP_RECORDS, agent_pod, basal, eventually, keys, operator_metric};
use crate::workload::running;

const PODS: usize = 60;
const ROUNDS: usize = 3;
const IDENTITIES: &str = "cilium/state/identities/v1/id/";

/// What exists because of pods, over the whole cluster.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Traces {
    links: BTreeSet<String>,
    endpoint_rows: BTreeSet<String>,
    ip_records: BTreeSet<String>,
    endpoints: BTreeSet<String>,
}

/// A CiliumEndpoint that no pod stands behind.
const PLANTED: &str = "planted";

/// Sixty pods at once, three times over, each lot while the one before goes. A CiliumEndpoint that lost its pod goes meanwhile.
pub(crate) fn pods_leave_nothing(cluster: &mut Cluster) -> anyhow::Result<()> {
    let before = traces(cluster)?;
    plant_endpoint(cluster)?;
    let ids_before: BTreeSet<String> = keys(cluster, IDENTITIES)?.into_iter().collect();
    let mut ids_used = BTreeSet::new();
    for round in 1..=ROUNDS {
        pods_come(cluster, &name_of(round))?;
        ids_used.extend(keys(cluster, IDENTITIES)?.into_iter().filter(|key| !ids_before.contains(key)));
        // They go while the next ones come, as in a rolling update.
        cluster.kubectl()?.args(["delete", "deployment", "-n", "default", &name_of(round), "--wait=false"]).done()?;
    }
    for round in 1..=ROUNDS {
        pods_are_gone(cluster, &name_of(round))?;
    }
    eventually("every trace of the pods to go", || before.are_all_that_is_left(cluster))?;
    // The traces held the planted one too.
    let collected = operator_metric(cluster, "basal_operator_endpoint_gc_objects_total", &[r#""success""#])?;
    ensure!(collected >= 1.0, "no operator says that it collected a CiliumEndpoint");
    ensure!(!ids_used.is_empty(), "pods with new labels brought no new identity key");
    eventually("identities that nobody uses to go", || {
        let left: Vec<String> = keys(cluster, IDENTITIES)?.into_iter().filter(|key| ids_used.contains(key)).collect();
        ensure!(left.is_empty(), "left are {left:?}");
        Ok(())
    })
}

fn name_of(round: usize) -> String {
    format!("churn{round}")
}

/// Makes a CiliumEndpoint as an agent leaves one whose node was lost: its pod is not there.
fn plant_endpoint(cluster: &Cluster) -> anyhow::Result<()> {
    let status = json!({"networking": {"addressing": [{"ipv4": "192.0.2.77"}], "node": "192.0.2.1"}, "state": "ready"});
    let object = json!({
        "apiVersion": "cilium.io/v2", "kind": "CiliumEndpoint",
        "metadata": {"name": PLANTED, "namespace": "default"}, "status": status,
    });
    cluster.apply(&object.to_string())
}

/// Sixty pods come, all with addresses of their own.
pub(crate) fn pods_come(cluster: &Cluster, name: &str) -> anyhow::Result<()> {
    cluster.apply(&idle_deployment(name, PODS).to_string())?;
    cluster.wait_rollout("default", &format!("deployment/{name}"), Duration::from_secs(180))?;
    let pods = running(cluster, name)?;
    ensure!(pods.len() == PODS, "{} of {PODS} pods run", pods.len());
    let addresses: Vec<&String> = pods.iter().flat_map(|pod| &pod.addresses).collect();
    let different: BTreeSet<&String> = addresses.iter().copied().collect();
    ensure!(
        different.len() == 2 * PODS,
        "{} addresses for {PODS} pods, {} different",
        addresses.len(),
        different.len()
    );
    Ok(())
}

/// Waits until they have gone.
pub(crate) fn pods_are_gone(cluster: &Cluster, name: &str) -> anyhow::Result<()> {
    eventually(&format!("the pods of {name} to go"), || {
        let left = running(cluster, name)?.len();
        ensure!(left == 0, "{left} pods are left");
        Ok(())
    })
}

impl Traces {
    /// Fails as long as there is more than this.
    pub(crate) fn are_all_that_is_left(&self, cluster: &Cluster) -> anyhow::Result<()> {
        let grown = traces(cluster)?.minus(self);
        ensure!(grown.is_empty(), "left are {grown:?}");
        Ok(())
    }

    fn minus(&self, before: &Self) -> Vec<String> {
        let sets = [
            (&self.links, &before.links),
            (&self.endpoint_rows, &before.endpoint_rows),
            (&self.ip_records, &before.ip_records),
            (&self.endpoints, &before.endpoints),
        ];
        sets.into_iter().flat_map(|(after, before)| after.difference(before).cloned()).collect()
    }
}

pub(crate) fn traces(cluster: &Cluster) -> anyhow::Result<Traces> {
    let (mut links, mut endpoint_rows) = (BTreeSet::new(), BTreeSet::new());
    for node in cluster.nodes()? {
        // Without the agent there would be no rows to count.
        agent_pod(cluster, node.name())?;
        let listed = node.run("ip").args(["-o", "link", "show", "type", "veth"]).text()?;
        let names = listed.lines().filter_map(|line| line.split_whitespace().nth(1));
        links.extend(names.map(|name| format!("{} link {name}", node.name())));
        let rows = basal(cluster, node.name(), &["bpf", "endpoint", "list"])?;
        let addresses = rows.lines().skip(1).filter_map(|line| line.split_whitespace().next());
        endpoint_rows.extend(addresses.map(|address| format!("{} row {address}", node.name())));
    }
    let ip_records = keys(cluster, IP_RECORDS)?.into_iter().collect();
    let endpoints = cluster.list(&["ciliumendpoints", "-A"])?;
    let endpoints = endpoints.iter().map(|one| format!("CiliumEndpoint {}", one["metadata"]["name"])).collect();
    ensure!(!links.is_empty(), "no node has a veth, not even for CoreDNS: the search is blind");
    Ok(Traces { links, endpoint_rows, ip_records, endpoints })
}

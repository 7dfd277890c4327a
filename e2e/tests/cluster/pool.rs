//! Scenarios 4 and 7: nodes come and go, and the pool runs out.

use std::net::IpAddr;

use anyhow::ensure;
use basal_e2e::cluster::{BasalOptions, Cluster};
use ipnet::IpNet;

use crate::api_nodes::join;
use crate::suite::wider;
use crate::view::{
    IP_RECORDS, basal, events, eventually, has, keys, knows_the_others, node_key, operator_metric, pod_cidrs, record,
    text,
};
use crate::workload::waiting_pod;

/// A node that exists at the API server only, for the fourth one's block.
const LATE: &str = "api-late";

/// A fourth node takes the last block and serves pods. It dies and its Node is deleted: it disappears from etcd and from
/// every map, and the next node is refused because the only free block is in quarantine, then gets that very block.
pub(crate) fn nodes_come_and_go(cluster: &mut Cluster) -> anyhow::Result<()> {
    cluster.add_nodes(&["n4".into()])?;
    eventually("n4 to be ready", || ready(cluster, "n4"))?;
    cluster.apply(&waiting_pod("on-n4", "late", "n4").to_string())?;
    cluster.kubectl()?.args(["wait", "--for=condition=Ready", "--timeout=60s", "pod", "on-n4"]).done()?;
    for node in cluster.nodes()? {
        eventually(&format!("{} to know n4", node.name()), || knows_the_others(cluster, &node))?;
    }
    let blocks = pod_cidrs(cluster, "n4")?;
    ensure!(blocks.len() == 2, "n4 has the PodCIDRs {blocks:?}");
    let own = |key: &String| in_blocks(key, &blocks);
    ensure!(keys(cluster, IP_RECORDS)?.iter().any(own), "no ip record of n4's pod: the search is blind");

    let endpoint = format!("tunnelendpoint={}", cluster.node("n4")?.addresses()[0]);
    cluster.remove_node("n4", true)?;
    // Kubernetes takes a minute until it deletes the pods of a lost node, and their CiliumEndpoints hold the block.
    cluster.kubectl()?.args(["delete", "pod", "on-n4", "--force", "--grace-period=0"]).done()?;
    join(cluster, &[LATE.into()])?;
    eventually("a node to be refused because of the quarantine", || {
        let error = status_error(cluster, LATE)?;
        ensure!(error.contains("quarantine"), "the status says {error:?}");
        Ok(())
    })?;
    eventually("n4 to disappear", || {
        let (node, addresses) = (record(cluster, &node_key("n4"))?, keys(cluster, IP_RECORDS)?);
        ensure!(node.is_none(), "its record is there");
        let left: Vec<&String> = addresses.iter().filter(|key| own(key)).collect();
        ensure!(left.is_empty(), "records of its pods are there: {left:?}");
        Ok(())
    })?;
    eventually("the node to be served with n4's blocks", || {
        let now = pod_cidrs(cluster, LATE)?;
        ensure!(now == blocks, "it has {now:?}, the free blocks are {blocks:?}");
        Ok(())
    })?;
    for node in cluster.nodes()? {
        eventually(&format!("{} to have forgotten n4", node.name()), || {
            let table = basal(cluster, node.name(), &["bpf", "ipcache", "list"])?;
            ensure!(!has(&table, &[&endpoint]), "n4 is in the ipcache:\n{table}");
            ensure!(has(&table, &[&blocks[0]]), "n4's block is not its successor's:\n{table}");
            Ok(())
        })?;
    }
    Ok(())
}

/// Whether a key of an ip record is of an address in one of the blocks.
fn in_blocks(key: &str, blocks: &[String]) -> bool {
    let address = key.strip_prefix(IP_RECORDS).and_then(|rest| rest.parse::<IpAddr>().ok());
    let blocks = blocks.iter().filter_map(|block| block.parse::<IpNet>().ok());
    address.is_some_and(|address| blocks.into_iter().any(|block| block.contains(&address)))
}

/// All four blocks are taken: another node hears why, in words that name the pool and the way out; a CIDR appended to
/// the pool serves it.
pub(crate) fn an_exhausted_pool_says_so(cluster: &mut Cluster) -> anyhow::Result<()> {
    cluster.add_nodes(&["n5".into()])?;
    let error = eventually("n5 to be refused", || {
        let error = status_error(cluster, "n5")?;
        ensure!(!error.is_empty(), "no error in its status");
        Ok(error)
    })?;
    ensure!(error.contains("10.100.0.0/22"), "the status does not name the pool: {error:?}");
    ensure!(error.contains("cluster-pool-ipv4-cidr"), "the status does not name the way out: {error:?}");
    eventually("an event", || {
        let count = events(cluster, "n5", "10.100.0.0/22")?;
        ensure!(count > 0, "none of n5 names the pool");
        Ok(())
    })?;
    eventually("the metric of refusals", || {
        let refused = operator_metric(cluster, "basal_operator_ipam_refusals_total", &[])?;
        ensure!(refused >= 1.0, "{refused} refusals");
        Ok(())
    })?;
    cluster.install_basal(&BasalOptions { values: wider() })?;
    eventually("n5 to be served from the appended CIDR", || {
        let cidrs = pod_cidrs(cluster, "n5")?;
        ensure!(cidrs.first().is_some_and(|cidr| cidr.starts_with("10.101.")), "it has {cidrs:?}");
        ready(cluster, "n5")
    })?;
    let error = status_error(cluster, "n5")?;
    ensure!(error.is_empty(), "the status still says {error:?}");
    cluster.kubectl()?.args(["delete", "node", LATE]).done()
}

fn status_error(cluster: &Cluster, node: &str) -> anyhow::Result<String> {
    let object = cluster.get(&["ciliumnode", node])?;
    Ok(object
        .pointer("/status/ipam/operator-status/error")
        .and_then(|error| error.as_str())
        .unwrap_or_default()
        .to_owned())
}

/// Fails unless a node is ready.
fn ready(cluster: &Cluster, node: &str) -> anyhow::Result<()> {
    let object = cluster.get(&["node", node])?;
    let conditions = object["status"]["conditions"].as_array();
    let condition = conditions.into_iter().flatten().find(|condition| condition["type"] == "Ready");
    let status = condition.map_or(Ok("missing"), |condition| text(condition, "/status"))?;
    ensure!(status == "True", "its condition Ready is {status}");
    Ok(())
}

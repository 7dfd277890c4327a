//! Scenario 1: what the chart's installation makes of a cluster.

use std::collections::BTreeSet;

use anyhow::{Context, bail, ensure};
use basal_e2e::cluster::Cluster;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;

use crate::view::{all_know_the_others, eventually, node_key, pod_cidrs, record, text};

/// Every node is ready with PodCIDRs of both families and router addresses in them, etcd holds its record, and every
/// other node's maps know it.
pub(crate) fn every_node_is_served(cluster: &mut Cluster) -> anyhow::Result<()> {
    let mut seen = BTreeSet::new();
    for node in cluster.nodes()? {
        let cidrs = pod_cidrs(cluster, node.name())?;
        let families = (cidrs.iter().filter(|cidr| !cidr.contains(':')).count(), cidrs.len());
        ensure!(families == (1, 2), "{} has the PodCIDRs {cidrs:?}", node.name());
        for cidr in &cidrs {
            ensure!(seen.insert(cidr.clone()), "{cidr} belongs to two nodes");
        }
        eventually(&format!("router addresses of {}", node.name()), || {
            let object = cluster.get(&["ciliumnode", node.name()])?;
            let addresses = object.pointer("/spec/addresses").and_then(Value::as_array);
            let routers: Vec<_> =
                addresses.into_iter().flatten().filter(|address| address["type"] == "CiliumInternalIP").collect();
            ensure!(routers.len() == 2, "router addresses {routers:?}");
            Ok(())
        })?;
        eventually(&format!("the record of {} in etcd", node.name()), || {
            let Some(record) = record(cluster, &node_key(node.name()))? else { bail!("there is none") };
            let said = [network(&record, "/IPv4AllocCIDR")?, network(&record, "/IPv6AllocCIDR")?];
            ensure!(cidrs == said, "it says {said:?}, the CiliumNode {cidrs:?}");
            Ok(())
        })?;
    }
    all_know_the_others(cluster)
}

/// A network as Go's encoder writes one: the address as text, the mask as bytes in base64.
fn network(record: &Value, pointer: &str) -> anyhow::Result<String> {
    let address = text(record, &format!("{pointer}/IP"))?;
    let mask = STANDARD.decode(text(record, &format!("{pointer}/Mask"))?).context("the mask is not base64")?;
    let length: u32 = mask.iter().map(|byte| byte.count_ones()).sum();
    Ok(format!("{address}/{length}"))
}

//! Blocks that nothing but running pods tells of: no claim, and no CiliumNode lists them.
//!
//! It takes two mishaps at once, such as an etcd that was put back, or lost, and a CiliumNode that somebody edited or
//! deleted. To find them all CiliumEndpoints are read, which is dear in a large cluster, so only a term that finds a sign
//! of the first mishap does it.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use basal_ipam::{
    allocator::{Allocator, Carried, CarriedBlock},
    names::NodeName,
    prefix::PodCidr,
};
use basal_objects::{
    object::{ObjectKey, resources},
    port::{Freshness, Objects, ReadError, Scope, gather},
};
use futures::{StreamExt as _, TryStreamExt as _, stream};
use tracing::warn;

use crate::{
    node::{
        Views,
        endpoints::{addresses, has_ended, node_of, owning_pod},
    },
    ports::Ports,
};

/// Pods that are read at once.
const CONCURRENCY: usize = 16;

/// Whether the ledger seems to have lost claims, before what nodes carry is adopted: there are none at all, a block that a
/// CiliumNode lists has none, since a claim is written before its block is listed, or a node has none. A node that just
/// joined has none either; then what is read is read for nothing.
pub(super) fn is_likely(allocator: &Allocator, views: &Views, carried: &[Carried]) -> bool {
    let claimed: BTreeSet<&str> = allocator.nodes().map(NodeName::as_str).collect();
    let mut listed = carried.iter().flat_map(|node| &node.blocks);
    let is_new = |key: &ObjectKey| !claimed.contains(key.name.as_str());
    claimed.is_empty()
        || listed.any(|block| allocator.block(block.at).is_none())
        || views.nodes.read(|store| store.iter().any(|(key, _)| is_new(key)))
        || views.cilium_nodes.read(|store| store.iter().any(|(key, _)| is_new(key)))
}

/// The unclaimed blocks that pods have addresses in, each for the node that its pods run on.
pub(super) async fn carried(ports: &Ports, views: &Views, allocator: &Allocator) -> Result<Vec<Carried>, ReadError> {
    let objects = ports.objects.as_ref();
    let homes = stream::iter(endpoints(objects, allocator).await?)
        .map(|endpoint| async move { home(objects, &endpoint).await.map(|node| (endpoint.blocks, node)) })
        .buffer_unordered(CONCURRENCY);
    let mut homes_in: BTreeMap<PodCidr, BTreeMap<IpAddr, NodeName>> = BTreeMap::new();
    for (blocks, node) in homes.try_collect::<Vec<_>>().await? {
        let Some(node) = node else { continue };
        for (block, address) in blocks {
            homes_in.entry(block).or_default().insert(address, node.clone());
        }
    }
    let mut nodes: BTreeMap<NodeName, Vec<CarriedBlock>> = BTreeMap::new();
    for (at, node) in homes_in.iter().flat_map(|(block, homes)| divide(*block, homes)) {
        warn!(block = %at, %node, "a block that the ledger lost, and that only the node's pods tell of");
        nodes.entry(node).or_default().push(CarriedBlock { at, live: true });
    }
    let carried = nodes.into_iter().map(|(node, blocks)| Carried { uid: views.node_uid(&node), node, blocks });
    Ok(carried.collect())
}

/// A CiliumEndpoint with addresses that nobody claims.
struct Endpoint {
    key: ObjectKey,
    /// The uid of the pod that owns it.
    owner: Option<String>,
    /// Its addresses, and the block around each.
    blocks: Vec<(PodCidr, IpAddr)>,
}

async fn endpoints(objects: &dyn Objects, allocator: &Allocator) -> Result<Vec<Endpoint>, ReadError> {
    let everywhere = Scope::default();
    let read = gather(objects, resources::CILIUM_ENDPOINT, &everywhere, Freshness::Quorum, |object| {
        let (addresses, _) = addresses(object);
        let unclaimed = |address| Some((allocator.unclaimed(address)?, address));
        let blocks: Vec<(PodCidr, IpAddr)> = addresses.into_iter().filter_map(unclaimed).collect();
        let owner = owning_pod(object).map(str::to_owned);
        (!blocks.is_empty()).then(|| Endpoint { key: object.key(), owner, blocks })
    });
    match read.await {
        // Where nobody defined them, there are none.
        Err(ReadError::UnknownKind(_)) => Ok(Vec::new()),
        read => read,
    }
}

/// The node that an endpoint's pod runs on; `None` when nobody runs it any more, and the endpoint is collected soon.
async fn home(objects: &dyn Objects, endpoint: &Endpoint) -> Result<Option<NodeName>, ReadError> {
    let pod = objects.get(resources::POD, &endpoint.key).await?;
    let node = pod.filter(|pod| !has_ended(pod)).and_then(|pod| node_of(endpoint.owner.as_deref(), &pod));
    if node.is_none() {
        warn!(endpoint = %endpoint.key, "a CiliumEndpoint without a running pod has an address that nobody claims");
    }
    Ok(node)
}

/// The parts of a block that pods of one node have to themselves. A pool with another mask than it had has several nodes'
/// blocks in one.
fn divide(block: PodCidr, homes: &BTreeMap<IpAddr, NodeName>) -> Vec<(PodCidr, NodeName)> {
    let mut inside = homes.iter().filter(|(address, _)| block.contains_address(**address)).map(|(_, node)| node);
    let Some(first) = inside.next() else { return Vec::new() };
    if inside.all(|node| node == first) {
        return vec![(block, first.clone())];
    }
    let len = block.prefix_len() + 1;
    [0, 1].into_iter().flat_map(|half| divide(block.nth(len, half), homes)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_divided_until_each_part_is_one_nodes() {
        let homes = |texts: &[(&str, &str)]| {
            texts.iter().map(|(ip, node)| (ip.parse().unwrap(), NodeName::new(node).unwrap())).collect()
        };
        let parts = |texts: &[(&str, &str)]| {
            let parts = divide("10.0.0.0/24".parse().unwrap(), &homes(texts));
            parts.iter().map(|(at, node)| format!("{at} {node}")).collect::<Vec<_>>()
        };
        assert_eq!(parts(&[("10.0.0.7", "a"), ("10.0.0.200", "a")]), ["10.0.0.0/24 a"]);
        let three = [("10.0.0.7", "a"), ("10.0.0.70", "b"), ("10.0.0.80", "b"), ("10.0.0.130", "a")];
        assert_eq!(parts(&three), ["10.0.0.0/26 a", "10.0.0.64/26 b", "10.0.0.128/25 a"]);
        assert_eq!(parts(&[("10.0.0.6", "a"), ("10.0.0.7", "b")]), ["10.0.0.6/32 a", "10.0.0.7/32 b"]);
        assert_eq!(parts(&[]), [""; 0]);
    }
}

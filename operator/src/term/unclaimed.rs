//! Blocks that nothing but running pods tells of: no claim, and no CiliumNode lists them.
//!
//! It takes two mishaps at once, such as an etcd that was put back, or lost, and a CiliumNode that somebody edited or
//! deleted. To find them all CiliumEndpoints are read, which is dear in a large cluster, so only a term that finds a sign
//! of the first mishap does it.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
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
        endpoints::{addresses, node_of, owning_pod},
    },
    ports::Ports,
};

/// Pods that are read at once.
const CONCURRENCY: usize = 16;

/// Whether the ledger seems to have lost claims, before what nodes carry is adopted: a block that a CiliumNode lists has
/// none, since a claim is written before its block is listed, or there are no claims at all.
pub(super) fn is_likely(allocator: &Allocator, carried: &[Carried]) -> bool {
    let mut listed = carried.iter().flat_map(|node| &node.blocks);
    allocator.nodes().next().is_none() || listed.any(|block| allocator.block(block.at).is_none())
}

/// The unclaimed blocks that pods have addresses in, each for the node that its pods run on.
pub(super) async fn carried(ports: &Ports, views: &Views, allocator: &Allocator) -> Result<Vec<Carried>, ReadError> {
    let objects = ports.objects.as_ref();
    let homes = stream::iter(endpoints(objects, allocator).await?)
        .map(|(block, endpoints)| async move { home(objects, block, &endpoints).await.map(|home| (block, home)) })
        .buffer_unordered(CONCURRENCY);
    let mut nodes: BTreeMap<NodeName, Vec<CarriedBlock>> = BTreeMap::new();
    for (at, home) in homes.try_collect::<Vec<_>>().await? {
        if let Some(node) = home {
            warn!(block = %at, %node, "a block that the ledger lost, and that only the node's pods tell of");
            nodes.entry(node).or_default().push(CarriedBlock { at, live: true });
        }
    }
    let carried = nodes.into_iter().map(|(node, blocks)| Carried { uid: views.node_uid(&node), node, blocks });
    Ok(carried.collect())
}

/// A CiliumEndpoint, and the uid of the pod that owns it.
struct Endpoint {
    key: ObjectKey,
    owner: Option<String>,
}

/// The endpoints that have an address in each unclaimed block.
async fn endpoints(
    objects: &dyn Objects,
    allocator: &Allocator,
) -> Result<BTreeMap<PodCidr, Vec<Arc<Endpoint>>>, ReadError> {
    let everywhere = Scope::default();
    let read = gather(objects, resources::CILIUM_ENDPOINT, &everywhere, Freshness::Quorum, |object| {
        let (addresses, _) = addresses(object);
        let blocks: BTreeSet<PodCidr> =
            addresses.into_iter().filter_map(|address| allocator.unclaimed(address)).collect();
        let endpoint = || Endpoint { key: object.key(), owner: owning_pod(object).map(str::to_owned) };
        (!blocks.is_empty()).then(|| (blocks, Arc::new(endpoint())))
    });
    let mut endpoints: BTreeMap<PodCidr, Vec<Arc<Endpoint>>> = BTreeMap::new();
    for (blocks, endpoint) in read.await? {
        for block in blocks {
            endpoints.entry(block).or_default().push(Arc::clone(&endpoint));
        }
    }
    Ok(endpoints)
}

/// The node of the first endpoint whose pod is there.
async fn home(
    objects: &dyn Objects,
    block: PodCidr,
    endpoints: &[Arc<Endpoint>],
) -> Result<Option<NodeName>, ReadError> {
    for endpoint in endpoints {
        let pod = objects.get(resources::POD, &endpoint.key).await?;
        if let Some(node) = pod.and_then(|pod| node_of(endpoint.owner.as_deref(), &pod)) {
            return Ok(Some(node));
        }
    }
    // The endpoints are collected soon: nobody runs what they stand for.
    warn!(%block, "CiliumEndpoints without pods have addresses in a block that is nobody's");
    Ok(None)
}

//! What the operator sees of the servers.

use basal_ipam::names::{NodeName, NodeUid};
use basal_objects::{cache::Cache, object::ObjectKey};

use super::{CiliumNodeFacts, NodeFacts, Packed, Records};

/// The caches that the controller reads. They outlive a term: a standby keeps them warm.
#[derive(Debug, Clone)]
pub struct Views {
    /// Nodes.
    pub nodes: Cache<Packed<NodeFacts>>,
    /// CiliumNodes.
    pub cilium_nodes: Cache<Packed<CiliumNodeFacts>>,
    /// Node records in etcd.
    pub records: Records,
}

impl Views {
    /// Has the objects listed that were not yet.
    pub(crate) fn keep_warm(&self) {
        self.nodes.list_once();
        self.cilium_nodes.list_once();
    }

    /// Lists the objects at quorum, whatever was seen of them before, and waits until all are there.
    pub(crate) async fn list(&self) {
        self.nodes.list();
        self.cilium_nodes.list();
        self.nodes.wait_synced().await;
        self.cilium_nodes.wait_synced().await;
    }

    /// The uid of a Node that is there.
    pub(crate) fn node_uid(&self, name: &NodeName) -> Option<NodeUid> {
        let cached = self.nodes.get(&ObjectKey::cluster(name.as_str()))?;
        cached.valid()?;
        NodeUid::new(&cached.uid).ok()
    }
}

//! What the operator sees of the servers.

use basal_ipam::names::{NodeName, NodeUid};
use basal_objects::{cache::Cache, object::ObjectKey, port::ReadError};

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

    /// Lists the objects at quorum, whatever was seen of them before.
    ///
    /// # Errors
    /// The API server did not answer one of the lists, or denied it.
    pub(crate) async fn list(&self) -> Result<(), ReadError> {
        futures::try_join!(self.nodes.list(), self.cilium_nodes.list())?;
        Ok(())
    }

    /// The uid of a Node that is there.
    pub(crate) fn node_uid(&self, name: &NodeName) -> Option<NodeUid> {
        let cached = self.nodes.get(&ObjectKey::cluster(name.as_str()))?;
        cached.valid()?;
        NodeUid::new(&cached.uid).ok()
    }
}

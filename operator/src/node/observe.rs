//! What one look at a node found.

use std::collections::BTreeSet;

use basal_ipam::{names::NodeUid, prefix::PodCidr};

use super::{
    endpoints::UnreadableEndpoint,
    facts::{CiliumNodeFacts, NodeFacts},
};

/// One look at everything that is called by a node's name.
#[derive(Debug, Clone, PartialEq)]
pub struct Observed {
    /// The Kubernetes Node.
    pub node: SeenNode,
    /// The CiliumNode, from the same kind of read as the Node.
    pub cilium_node: Option<Result<CiliumNodeFacts, String>>,
    /// The text of the node record in etcd.
    pub record: Option<Vec<u8>>,
    /// What still uses the node's blocks; looked for only while the node is gone.
    pub leftovers: Leftovers,
}

/// The Kubernetes Node as it was seen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SeenNode {
    /// It is there, by the cache.
    Present(NodeFacts),
    /// It is there and cannot be used, and why; its blocks stay as they are.
    Invalid(String),
    /// A read at quorum found no Node of this name. Only this frees anything: never a cache.
    Gone,
}

/// What is left of a node that is gone. Each was read at quorum, after the ledger.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Leftovers {
    /// Its blocks that rested long enough when it was looked for what uses them. No other block is freed by this look, however
    /// long it took.
    pub due: BTreeSet<PodCidr>,
    /// Keys of ip→identity records with an address in one of its blocks.
    pub ip_records: Vec<String>,
    /// Blocks in which a CiliumEndpoint has an address.
    pub with_endpoints: BTreeSet<PodCidr>,
    /// CiliumEndpoints that may have an address in any of its blocks.
    pub unreadable: Vec<UnreadableEndpoint>,
}

/// An observation without impossible parts.
#[derive(Debug, Clone, PartialEq)]
pub struct Valid {
    /// Whether the Node is there.
    pub presence: Presence,
    /// The CiliumNode.
    pub cilium_node: Option<CiliumNodeFacts>,
    /// The text of the node record in etcd.
    pub record: Option<Vec<u8>>,
}

/// Whether the Node is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Presence {
    /// It is.
    Present {
        /// The Node.
        node: NodeFacts,
        /// What its CiliumNode lists and can be read as a block.
        carried: Vec<PodCidr>,
        /// What its CiliumNode lists and cannot.
        unreadable: Vec<Unreadable>,
    },
    /// It is not.
    Gone(Leftovers),
}

/// An entry of `spec.ipam.podCIDRs` that is no block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unreadable {
    /// Its index.
    pub index: usize,
    /// What is wrong with it.
    pub error: basal_ipam::prefix::PrefixError,
}

impl Presence {
    /// The uid of the Node that is there.
    #[must_use]
    pub fn uid(&self) -> Option<&NodeUid> {
        match self {
            Self::Present { node, .. } => Some(&node.uid),
            Self::Gone(_) => None,
        }
    }
}

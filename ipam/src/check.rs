//! What is wrong with the blocks of a cluster: what its stores say goes in, findings come out.
//!
//! Nothing is concluded from what cannot be read: a block in an unreadable cell is neither free nor claimed.

mod finding;
mod rules;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

pub use self::finding::{Finding, Kind, Remedy, standing};
use self::rules::View;
use crate::{
    cell::{Cell, CellError, CellId},
    config::PoolConfig,
    owners::Source,
    prefix::PodCidr,
};

/// Something that was read, or why it cannot be used.
pub type Read<T> = Result<T, String>;

/// A Node.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct NodeFact {
    /// `metadata.uid`.
    pub uid: String,
    /// Whether it is being deleted.
    pub deleting: bool,
}

/// A CiliumNode.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CiliumNodeFact {
    /// `spec.ipam.podCIDRs`, as written: it may hold anything.
    pub pod_cidrs: Vec<String>,
    /// The blocks among them that `status.ipam.pod-cidrs` confirms.
    pub confirmed: Vec<PodCidr>,
    /// `status.ipam.operator-status.error`.
    pub error: String,
}

/// A node record.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RecordFact {
    /// Its blocks.
    pub blocks: Vec<PodCidr>,
    /// The node's addresses.
    pub addresses: Vec<IpAddr>,
}

/// An ip→identity record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IpFact {
    /// The address, or the network, that it is about.
    pub target: PodCidr,
    /// The address of the node that it lies behind.
    pub host: Option<IpAddr>,
}

/// Everything that a check looks at. Keys of the maps are names.
#[derive(Debug, Clone)]
pub struct Facts {
    /// The pool that is configured.
    pub pool: PoolConfig,
    /// By what agents know that a block is a node's: [`Source::Record`], or [`Source::Confirmation`] where records are not
    /// kept in etcd.
    pub published: Source,
    /// The cells of the ledger.
    pub cells: BTreeMap<CellId, Result<Cell, CellError>>,
    /// Keys or objects among the cells that are none.
    pub strays: Vec<String>,
    /// Blocks that rest longer in quarantine than they need, under one and the same leader.
    pub overdue: BTreeSet<PodCidr>,
    /// Nodes.
    pub nodes: BTreeMap<String, Read<NodeFact>>,
    /// CiliumNodes.
    pub cilium_nodes: BTreeMap<String, Read<CiliumNodeFact>>,
    /// Node records.
    pub records: BTreeMap<String, Read<RecordFact>>,
    /// ip→identity records.
    pub ips: BTreeMap<String, Read<IpFact>>,
    /// The addresses of CiliumEndpoints, by namespace and name.
    pub endpoints: BTreeMap<String, Read<Vec<IpAddr>>>,
}

impl Facts {
    /// An empty cluster with this pool, in which agents know by `published` what is whose.
    #[must_use]
    pub fn new(pool: PoolConfig, published: Source) -> Self {
        Self {
            pool,
            published,
            cells: BTreeMap::new(),
            strays: Vec::new(),
            overdue: BTreeSet::new(),
            nodes: BTreeMap::new(),
            cilium_nodes: BTreeMap::new(),
            records: BTreeMap::new(),
            ips: BTreeMap::new(),
            endpoints: BTreeMap::new(),
        }
    }
}

/// Looks for everything that is wrong; in the order of [`Kind`], the worst first.
#[must_use]
pub fn check(facts: &Facts) -> Vec<Finding> {
    let view = View::of(facts);
    let mut found = view.duplicates();
    found.extend(view.orphaned_claims());
    found.extend(view.orphaned_records());
    found.extend(view.orphaned_specs());
    found.extend(view.overdue());
    found.extend(view.addresses());
    found.extend(view.unserved());
    found.extend(view.unreadable());
    found.sort();
    found.dedup();
    found
}

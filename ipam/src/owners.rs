//! Who says that a block is whose, and whether any address has two owners.

use std::fmt;

use crate::{
    cell::{BlockState, Cell},
    prefix::PodCidr,
};

/// Where something says that a block is a node's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Source {
    /// A claim in the ledger.
    Claim(BlockState),
    /// `spec.ipam.podCIDRs` of a CiliumNode.
    Spec,
    /// A node record.
    Record,
    /// `status.ipam.pod-cidrs` of a CiliumNode, by which agents without etcd know that they may use a block.
    Confirmation,
    /// Pods that run with addresses of it.
    Pods,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Claim(state) => write!(f, "the ledger ({})", state.as_str()),
            Self::Spec => f.write_str("its CiliumNode"),
            Self::Record => f.write_str("its node record"),
            Self::Confirmation => f.write_str("the confirmation in its CiliumNode"),
            Self::Pods => f.write_str("its pods"),
        }
    }
}

/// Something says that a block is a node's.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Holding {
    /// The block.
    pub block: PodCidr,
    /// The node's name.
    pub node: String,
    /// What says so.
    pub source: Source,
}

/// What a cell says, whatever the state of its blocks: one in quarantine is still its node's.
pub fn claim_holdings(cell: &Cell) -> impl Iterator<Item = Holding> {
    cell.blocks().iter().map(|(at, block)| Holding {
        block: *at,
        node: block.node.as_str().to_owned(),
        source: Source::Claim(block.state),
    })
}

/// Every pair of holdings that gives an address to two nodes, the wider block first. None when each address has at
/// most one owner.
#[must_use]
pub fn conflicts<'a>(holdings: impl IntoIterator<Item = &'a Holding>) -> Vec<(&'a Holding, &'a Holding)> {
    let mut sorted: Vec<&Holding> = holdings.into_iter().collect();
    sorted.sort_by_key(|holding| holding.block);
    // Prefixes that overlap are nested, so whatever shares addresses with the next block is still open here.
    let mut open: Vec<&Holding> = Vec::new();
    let mut found = Vec::new();
    for holding in sorted {
        open.retain(|around| around.block.contains(&holding.block));
        found.extend(open.iter().filter(|around| around.node != holding.node).map(|around| (*around, holding)));
        open.push(holding);
    }
    found
}

//! Why a node does not get a block, in words for the node's status, an event and a metric label.
//!
//! Where Cilium has a text for the case (`operator-and-ipam.md` 2.2), the message begins with that text.

use std::{fmt, time::Duration};

use crate::{
    cell::{BlockState, CellError, CellId, MAX_BLOCKS},
    config::{key, mask_key},
    names::NodeName,
    prefix::{Family, PodCidr, PrefixError},
};

use super::counts::PoolCounts;

/// Why a node does not get a block, or does not get the one that it asks for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// What is asked for is no aligned CIDR.
    #[error("{0}; correct spec.ipam.podCIDRs")]
    Unparsable(#[from] PrefixError),
    /// The block's family is not enabled.
    #[error(
        "unable to allocate CIDR [{block}] since allocator for {} addresses does not exist; remove it from spec.ipam.podCIDRs, or set {}",
        block.family(), key(block.family())
    )]
    FamilyDisabled {
        /// The block.
        block: PodCidr,
    },
    /// The block lies in no pool CIDR.
    #[error(
        "allocator not configured for the requested CIDR {block}: the pool CIDRs are {}; remove it from spec.ipam.podCIDRs, or append a CIDR around it to {}",
        list(pools), key(block.family())
    )]
    Foreign {
        /// The block.
        block: PodCidr,
        /// The pool CIDRs of its family.
        pools: Vec<PodCidr>,
    },
    /// The block is somebody else's.
    #[error("requested CIDR ({block}) is already allocated: {} node {owner}; remove it from spec.ipam.podCIDRs", held(*state))]
    AlreadyAllocated {
        /// The block.
        block: PodCidr,
        /// Whose it is, or was.
        owner: NodeName,
        /// Its state.
        state: BlockState,
    },
    /// The block shares addresses with a claim of another size.
    #[error(
        "requested CIDR ({block}) is already allocated in part: it overlaps {other}, which is {} node {owner}; remove it from spec.ipam.podCIDRs",
        held(*state)
    )]
    Overlaps {
        /// The block.
        block: PodCidr,
        /// The claim.
        other: PodCidr,
        /// Whose that is, or was.
        owner: NodeName,
        /// Its state.
        state: BlockState,
    },
    /// The node has other blocks of that family.
    #[error(
        "node has CIDRs allocated ([{}]) that conflict with requested CIDRs [{block}]; remove {block} from spec.ipam.podCIDRs",
        list(held)
    )]
    NodeHasOther {
        /// The block.
        block: PodCidr,
        /// The node's blocks of its family.
        held: Vec<PodCidr>,
    },
    /// The block is wider than the ledger's cells there.
    #[error(
        "requested CIDR {block} is wider than {cell}, the record that the ledger keeps of that range; ask for blocks of at most that size"
    )]
    WiderThanCell {
        /// The block.
        block: PodCidr,
        /// A cell in it.
        cell: PodCidr,
    },
    /// The cell has no room for another record.
    #[error(
        "cell {cell} of the ledger holds {MAX_BLOCKS} blocks, the most that one record takes; ask for wider blocks"
    )]
    CellFull {
        /// The cell.
        cell: CellId,
    },
    /// The cell cannot be read or trusted, so nothing in it is given away.
    #[error("cell {cell} of the ledger cannot be used: {error}")]
    CellUnusable {
        /// The cell.
        cell: CellId,
        /// What is wrong with it.
        error: CellError,
    },
    /// No block is free.
    #[error("allocator full: no free {family} block for the node in {}; append a CIDR to {}, or remove nodes that are gone", totals(pools), key(*family))]
    PoolExhausted {
        /// The family.
        family: Family,
        /// Every pool CIDR of it.
        pools: Vec<PoolCounts>,
    },
    /// No block is free, and some are in quarantine.
    // Without the time that is left, which is another one at each look, and would be written for each node that waits.
    #[error(
        "allocator full: the only free {family} blocks are quarantined ({}); each is freed {} s after its node let go of it, once no pod uses it; wait, or append a CIDR to {}",
        totals(pools), rest.as_secs(), key(*family)
    )]
    OnlyQuarantined {
        /// The family.
        family: Family,
        /// Every pool CIDR of it.
        pools: Vec<PoolCounts>,
        /// How long a block rests.
        rest: Duration,
        /// When the next one's time is over. It is freed then, unless something still uses it.
        next_in: Duration,
    },
    /// No pool CIDR of the family can be used under the mask.
    #[error("allocator full: no pool CIDR of {family} can give a block: {}", problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    PoolUnusable {
        /// The family.
        family: Family,
        /// What is wrong, one for each pool CIDR that has a problem.
        problems: Vec<PoolProblem>,
    },
    /// A change of the node's blocks is being written.
    #[error("a change of the blocks of node {node} is being written; ask again when that is done")]
    Busy {
        /// The node.
        node: NodeName,
    },
    /// The claims are those of another Node of the same name.
    #[error("the blocks of node {node} are claimed by another Node of that name")]
    OtherUid {
        /// The node.
        node: NodeName,
    },
}

impl Refusal {
    /// One CamelCase word, fit for a condition, an event and a metric label.
    #[must_use]
    pub const fn reason(&self) -> &'static str {
        match self {
            Self::Unparsable(PrefixError::HostBits { .. }) => "PodCIDRUnaligned",
            Self::Unparsable(_) => "PodCIDRInvalid",
            Self::FamilyDisabled { .. } => "PodCIDRFamilyDisabled",
            Self::Foreign { .. } => "PodCIDRForeign",
            Self::AlreadyAllocated { .. } => "PodCIDRAlreadyAllocated",
            Self::Overlaps { .. } => "PodCIDROverlaps",
            Self::NodeHasOther { .. } => "PodCIDRConflict",
            Self::WiderThanCell { .. } => "PodCIDRTooWide",
            Self::CellFull { .. } => "LedgerCellFull",
            Self::CellUnusable { .. } => "LedgerCellUnusable",
            Self::PoolExhausted { .. } => "PoolExhausted",
            Self::OnlyQuarantined { .. } => "PoolOnlyQuarantined",
            Self::PoolUnusable { .. } => "PoolUnusable",
            Self::Busy { .. } => "WriteInProgress",
            Self::OtherUid { .. } => "NodeReplaced",
        }
    }
}

/// Why a pool CIDR, or a part of it, gives no blocks under the mask in force.
#[derive(Debug, Clone, PartialEq, Eq, Hash, thiserror::Error)]
pub enum PoolProblem {
    /// More than [`MAX_BLOCKS`] would go into one cell.
    #[error(
        "{}: {mask} would put {} blocks of {pool} into one record of the ledger ({cell}), and at most {MAX_BLOCKS} fit; use {} or less, or append another CIDR for blocks of that size",
        mask_key(pool.family()), cell.count(*mask), cell.prefix_len() + MAX_BLOCKS.ilog2() as u8
    )]
    TooManyBlocks {
        /// The pool CIDR.
        pool: PodCidr,
        /// The mask in force.
        mask: u8,
        /// A cell of it.
        cell: PodCidr,
    },
    /// A block would be wider than a cell.
    #[error(
        "{}: {mask} makes blocks of {pool} wider than the records that the ledger keeps of them ({cell}); use {} or more, or append another CIDR for blocks of that size",
        mask_key(pool.family()), cell.prefix_len()
    )]
    WiderThanCells {
        /// The pool CIDR.
        pool: PodCidr,
        /// The mask in force.
        mask: u8,
        /// A cell of it.
        cell: PodCidr,
    },
    /// A cell in it cannot be read or trusted.
    #[error("{pool}: cell {cell} of the ledger cannot be used, and no block in it is given away: {error}")]
    Cell {
        /// The pool CIDR.
        pool: PodCidr,
        /// The cell.
        cell: CellId,
        /// What is wrong with it.
        error: CellError,
    },
}

impl PoolProblem {
    /// The pool CIDR that it is about.
    #[must_use]
    pub const fn pool(&self) -> PodCidr {
        match self {
            Self::TooManyBlocks { pool, .. } | Self::WiderThanCells { pool, .. } | Self::Cell { pool, .. } => *pool,
        }
    }

    /// One CamelCase word, fit for a condition, an event and a metric label.
    #[must_use]
    pub const fn reason(&self) -> &'static str {
        match self {
            Self::TooManyBlocks { .. } | Self::WiderThanCells { .. } => "PoolMaskSizeRefused",
            Self::Cell { .. } => "LedgerCellUnusable",
        }
    }
}

fn list(cidrs: &[PodCidr]) -> String {
    cidrs.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

fn totals(pools: &[PoolCounts]) -> String {
    pools.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

fn held(state: BlockState) -> &'static str {
    match state {
        BlockState::Granted | BlockState::Pending => "granted to",
        BlockState::Orphaned => "still held by",
        BlockState::Quarantined => "in quarantine after",
    }
}

impl fmt::Display for PoolCounts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (/{} blocks: {} free", self.pool, self.mask, self.free)?;
        for state in BlockState::ALL {
            write!(f, ", {} {}", self.states.get(state), state.as_str())?;
        }
        f.write_str(")")
    }
}

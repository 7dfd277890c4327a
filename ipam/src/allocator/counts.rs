//! How many blocks are in which state.

use serde::Serialize;

use crate::{
    cell::BlockState,
    prefix::{Family, PodCidr},
};

/// Blocks by state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize)]
pub struct StateCounts {
    /// See [`BlockState::Granted`].
    pub granted: u64,
    /// See [`BlockState::Pending`].
    pub pending: u64,
    /// See [`BlockState::Quarantined`].
    pub quarantined: u64,
    /// See [`BlockState::Orphaned`].
    pub orphaned: u64,
}

impl StateCounts {
    /// The number for one state.
    #[must_use]
    pub const fn get(&self, state: BlockState) -> u64 {
        match state {
            BlockState::Granted => self.granted,
            BlockState::Pending => self.pending,
            BlockState::Quarantined => self.quarantined,
            BlockState::Orphaned => self.orphaned,
        }
    }

    pub(super) fn get_mut(&mut self, state: BlockState) -> &mut u64 {
        match state {
            BlockState::Granted => &mut self.granted,
            BlockState::Pending => &mut self.pending,
            BlockState::Quarantined => &mut self.quarantined,
            BlockState::Orphaned => &mut self.orphaned,
        }
    }

    /// Moves one block from a state (`None`: free) to another.
    pub(super) fn shift(&mut self, from: Option<BlockState>, to: Option<BlockState>) {
        if let Some(from) = from {
            let count = self.get_mut(from);
            *count = count.saturating_sub(1);
        }
        if let Some(to) = to {
            *self.get_mut(to) += 1;
        }
    }
}

/// The blocks of one pool CIDR.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize)]
pub struct PoolCounts {
    /// The pool CIDR.
    pub pool: PodCidr,
    /// The mask in force.
    pub mask: u8,
    /// Blocks of that mask that can be granted now.
    pub free: u128,
    /// Blocks in it, of any size, by state.
    pub states: StateCounts,
}

/// The blocks of every pool CIDR, and those outside.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize)]
pub struct Counts {
    /// Every pool CIDR, IPv4 first, in the order of the settings.
    pub pools: Vec<PoolCounts>,
    /// By family, the blocks that lie in no pool CIDR any more.
    pub outside: Vec<(Family, StateCounts)>,
}

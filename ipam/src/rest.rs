//! Whether quarantine is kept, seen from outside: by the claims of one look after another.

use std::{collections::BTreeMap, time::Duration};

use crate::{
    cell::{Block, BlockState, Cell},
    prefix::PodCidr,
};

/// A claim that left its node too soon.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RestBreach {
    /// A claim went, or passed to another node, without quarantine.
    #[error("{block} left {node} without quarantine")]
    NoQuarantine {
        /// The block.
        block: PodCidr,
        /// Whose it was.
        node: String,
    },
    /// A claim left quarantine too soon.
    #[error("{block} left {node} after {rested:?} in quarantine")]
    ShortQuarantine {
        /// The block.
        block: PodCidr,
        /// Whose it was.
        node: String,
        /// How long it was there.
        rested: Duration,
    },
}

impl RestBreach {
    /// The block.
    #[must_use]
    pub fn block(&self) -> PodCidr {
        match self {
            Self::NoQuarantine { block, .. } | Self::ShortQuarantine { block, .. } => *block,
        }
    }

    /// Whose it was.
    #[must_use]
    pub fn node(&self) -> &str {
        match self {
            Self::NoQuarantine { node, .. } | Self::ShortQuarantine { node, .. } => node,
        }
    }
}

#[derive(Debug, Clone)]
struct Claim {
    block: Block,
    /// When it was seen in quarantine first.
    since: Option<Duration>,
}

/// The claims of the last look. It must see every change, or it takes two of them for one.
#[derive(Debug, Clone, Default)]
pub struct RestWatch {
    quarantine: Duration,
    claims: BTreeMap<PodCidr, Claim>,
}

impl RestWatch {
    /// For blocks that rest at least so long before they are granted again.
    #[must_use]
    pub fn new(quarantine: Duration) -> Self {
        Self { quarantine, claims: BTreeMap::new() }
    }

    /// The claims of the last look.
    pub fn claims(&self) -> impl Iterator<Item = (&PodCidr, &Block)> {
        self.claims.iter().map(|(at, claim)| (at, &claim.block))
    }

    /// The claim of exactly this block at the last look.
    #[must_use]
    pub fn claim(&self, at: &PodCidr) -> Option<&Block> {
        self.claims.get(at).map(|claim| &claim.block)
    }

    /// Takes the claims of the next look. What is new in quarantine counts from `earliest`, what left it until
    /// `latest`, both since a start of the caller's choice: a caller that cannot tell when something happened gives
    /// the time before and after.
    pub fn look<'a>(
        &mut self,
        cells: impl IntoIterator<Item = &'a Cell>,
        earliest: Duration,
        latest: Duration,
    ) -> Vec<RestBreach> {
        let mut now = BTreeMap::new();
        for (at, block) in cells.into_iter().flat_map(Cell::blocks) {
            let known = self.claims.get(at).filter(|claim| claim.block.node == block.node);
            let since = (block.state == BlockState::Quarantined)
                .then(|| known.and_then(|claim| claim.since).unwrap_or(earliest));
            now.insert(*at, Claim { block: block.clone(), since });
        }
        let before = std::mem::replace(&mut self.claims, now);
        before.iter().filter_map(|(at, claim)| self.breach(*at, claim, latest)).collect()
    }

    /// What is wrong with what became of a claim.
    fn breach(&self, block: PodCidr, before: &Claim, latest: Duration) -> Option<RestBreach> {
        if self.claim(&block).is_some_and(|now| now.node == before.block.node) {
            return None;
        }
        let node = before.block.node.as_str().to_owned();
        let Some(since) = before.since else { return Some(RestBreach::NoQuarantine { block, node }) };
        let rested = latest.saturating_sub(since);
        (rested < self.quarantine).then_some(RestBreach::ShortQuarantine { block, node, rested })
    }
}

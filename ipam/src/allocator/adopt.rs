//! Taking over the blocks that nodes carry already.

use std::{collections::BTreeMap, net::IpAddr};

use crate::{
    cell::{Block, BlockState},
    names::{NodeName, NodeUid},
    prefix::{Family, PodCidr},
};

use super::{
    Allocator,
    changes::{Edit, Purpose},
    refusal::Refusal,
};

/// What a node's CiliumNode lists.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Carried {
    /// The node.
    pub node: NodeName,
    /// Its Node's uid; `None` when there is no Node.
    pub uid: Option<NodeUid>,
    /// The blocks.
    pub blocks: Vec<CarriedBlock>,
}

/// One block that a node carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CarriedBlock {
    /// The block.
    pub at: PodCidr,
    /// Whether the node has endpoints in it.
    pub live: bool,
}

/// A block that a node carries and does not keep.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Loss {
    /// The node.
    pub node: NodeName,
    /// The block.
    pub at: PodCidr,
    /// Whether the node has endpoints in it: they keep running, and new ones get addresses of a fresh block.
    pub live: bool,
    /// Why; it names the owner when there is one.
    pub refusal: Refusal,
}

/// What became of the blocks that nodes carry.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Adoption {
    /// Blocks that are their carrier's, by claim or from now on (once confirmed).
    pub kept: Vec<(NodeName, PodCidr)>,
    /// Blocks that are not.
    pub lost: Vec<Loss>,
}

impl Allocator {
    /// Takes over what nodes carry, at the start of a term and before its first grant. An existing claim wins; among
    /// carriers of an unclaimed block the one with live endpoints in it, else the one whose name comes first.
    pub fn adopt(&mut self, carried: &[Carried]) -> Adoption {
        let mut all: Vec<(&Carried, CarriedBlock)> =
            carried.iter().flat_map(|node| node.blocks.iter().map(move |block| (node, *block))).collect();
        all.sort_by_key(|(node, block)| (!block.live, &node.node, block.at));
        let mut adoption = Adoption::default();
        let mut edits: BTreeMap<&NodeName, Vec<Edit>> = BTreeMap::new();
        for (node, block) in all {
            match self.adopt_block(node, block.at) {
                Ok(edit) => {
                    edits.entry(&node.node).or_default().extend(edit);
                    adoption.kept.push((node.node.clone(), block.at));
                }
                Err(refusal) => {
                    let (at, live) = (block.at, block.live);
                    adoption.lost.push(Loss { node: node.node.clone(), at, live, refusal });
                }
            }
        }
        for (node, edits) in edits {
            self.queue(Purpose::Grant, node, edits);
        }
        adoption
    }

    /// The block around an address that lies in no claim: of the mask in force, or as much of it as overlaps none. `None`
    /// outside every pool CIDR, and where a claim or an unusable cell has the address.
    #[must_use]
    pub fn unclaimed(&self, address: IpAddr) -> Option<PodCidr> {
        let family = Family::of(address);
        let pool = self.config.family(family)?;
        let is_inside = pool.cidrs().iter().any(|cidr| cidr.contains_address(address));
        let mut around = (pool.mask()..=family.bits()).map(|len| PodCidr::containing(address, len));
        around.find(|block| is_inside && self.space.obstacle(*block).is_none())
    }

    /// Takes over one block that a node asks for later in the term, for example because it was written into its
    /// CiliumNode by hand. A node that has a block of that family gets no other one this way.
    ///
    /// # Errors
    /// Why the node does not get it.
    pub fn request(&mut self, node: &NodeName, uid: &NodeUid, at: PodCidr) -> Result<(), Refusal> {
        let held = self.blocks_of(node, at.family());
        let in_use: Vec<PodCidr> =
            held.iter().filter(|(_, block)| block.state != BlockState::Quarantined).map(|(at, _)| *at).collect();
        if !in_use.is_empty() && !in_use.contains(&at) {
            return Err(Refusal::NodeHasOther { block: at, held: in_use });
        }
        let carried = Carried { node: node.clone(), uid: Some(uid.clone()), blocks: Vec::new() };
        let edits = self.adopt_block(&carried, at)?.into_iter().collect();
        self.queue(Purpose::Grant, node, edits);
        Ok(())
    }

    fn adopt_block(&mut self, carried: &Carried, at: PodCidr) -> Result<Option<Edit>, Refusal> {
        let granted = Block { state: BlockState::Granted, node: carried.node.clone(), uid: carried.uid.clone() };
        match self.space.get(at) {
            Some(block) if block.node == carried.node => match block.state {
                BlockState::Quarantined if self.space.in_pool(at) => self.reserve_known(at, Some(granted)).map(Some),
                BlockState::Quarantined => {
                    self.reserve_known(at, Some(Block { state: BlockState::Orphaned, ..granted })).map(Some)
                }
                // The uid is brought up to date when the node asks for its blocks.
                BlockState::Granted | BlockState::Pending | BlockState::Orphaned => Ok(None),
            },
            _ => self.reserve_new(at, granted).map(Some),
        }
    }
}

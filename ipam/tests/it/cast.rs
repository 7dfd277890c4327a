//! Who plays in the models: three nodes, two operators, and what may go wrong.

use std::{collections::BTreeMap, fmt::Debug, hash::Hash};

use basal_ipam::{
    cell::{Block, BlockState, Cell},
    names::{NodeName, NodeUid},
    prefix::PodCidr,
};
use stateright::{Checker, HasDiscoveries, Model};

use crate::support::node;

pub(crate) const NODES: [&str; 3] = ["a", "b", "c"];
pub(crate) const OPERATORS: usize = 2;

/// The node that leaves and comes back, and whose agent takes its time. The others are there from the start, or come
/// once, and use their block as soon as their CiliumNode shows it: which node is which makes no difference.
pub(crate) const WANDERER: usize = 0;

/// The node that comes late.
pub(crate) const LATECOMER: usize = 2;

/// How much may still go wrong.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Budget {
    pub(crate) elections: u8,
    pub(crate) crashes: u8,
    pub(crate) losses: u8,
    pub(crate) departures: u8,
    /// Leaders that end in order.
    pub(crate) ends: u8,
}

/// The Nodes of one name are counted; odd while there is one. The uid is made from it.
pub(crate) fn uid(machine: usize, generation: u8) -> NodeUid {
    NodeUid::new(&format!("{}-{generation}", NODES[machine])).unwrap()
}

pub(crate) fn name(machine: usize) -> NodeName {
    node(NODES[machine])
}

pub(crate) fn exists(generation: u8) -> bool {
    generation % 2 == 1
}

/// What the ledger says of each block, quarantine included.
pub(crate) type Claims = BTreeMap<PodCidr, Block>;

pub(crate) fn claims<'a>(cells: impl Iterator<Item = &'a Cell>) -> Claims {
    cells.flat_map(Cell::blocks).map(|(at, block)| (*at, block.clone())).collect()
}

/// Whether a block went from one owner to another, or to nobody, without quarantine.
pub(crate) fn skipped_quarantine(before: &Claims, after: &Claims) -> bool {
    before.iter().any(|(at, block)| match after.get(at) {
        None => block.state != BlockState::Quarantined,
        Some(later) => later.node != block.node,
    })
}

pub(crate) fn are_disjoint(claims: &Claims) -> bool {
    let blocks: Vec<&PodCidr> = claims.keys().collect();
    blocks.windows(2).all(|pair| !pair[0].overlaps(pair[1]))
}

/// Goes through every state; answers how many there are.
pub(crate) fn check<M>(model: M) -> usize
where
    M: Model + Send + Sync + 'static,
    M::State: Clone + Debug + Hash + PartialEq + Send + Sync,
    M::Action: Clone + Debug + Hash + PartialEq + Send + Sync,
{
    let checker = model.checker().threads(2).finish_when(HasDiscoveries::AnyFailures).spawn_bfs().join();
    checker.assert_properties();
    checker.unique_state_count()
}

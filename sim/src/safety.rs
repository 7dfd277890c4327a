//! The promise that nothing may break: no block has two owners, no block in use is free, quarantine is kept.
//!
//! [`BlockSafety`] looks at the stores themselves: the cells of the ledger that is the active one, the CiliumNodes, the node
//! records; and at the blocks in which pods run, which a scenario tells it. What it finds must hold after every single
//! change, whoever made it. What a user writes into a CiliumNode by hand is a wish, and what was lost when etcd was put back
//! is nobody's fault: both it must be told of.

mod read;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use basal_crds::kvstore::keys::NODES_PREFIX;
use basal_ipam::{
    cell::{Block, Cell, CellError},
    owners::{Holding, Source, claim_holdings, conflicts},
    prefix::PodCidr,
    rest::{RestBreach, RestWatch},
};
use basal_kvstore::ledger::{LedgerKey, LedgerKeys};
use basal_objects::{
    ledger::read_cell,
    object::{Object, resources},
};
use serde_json::Value;
use tokio::time::Instant;

use self::read::{Counts, Parsed, Spec};
use crate::{kv::ModelKv, objects::ModelObjects};

/// A broken promise.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Breach {
    /// Two nodes hold addresses in common.
    #[error(
        "{} is {}'s by {}, and {} is {}'s by {}",
        .0.block, .0.node, .0.source, .1.block, .1.node, .1.source
    )]
    TwoOwners(Box<Holding>, Box<Holding>),
    /// A claim went while the block was still in use.
    #[error("{} is free in the ledger, and {}'s by {}", .0.block, .0.node, .0.source)]
    FreeInUse(Holding),
    /// A block is confirmed to a node that has no claim to use it.
    #[error("{} is confirmed to {}, which has no claim to use it", .0.block, .0.node)]
    ConfirmedWithoutClaim(Holding),
    /// Quarantine was not kept.
    #[error(transparent)]
    Rest(#[from] RestBreach),
    /// A cell cannot be read.
    #[error("{key} cannot be read: {why}")]
    BadCell {
        /// Its key.
        key: String,
        /// What is wrong with it.
        why: String,
    },
}

/// What a user wrote into `spec.ipam.podCIDRs`.
#[derive(Debug)]
struct Wish {
    list: Vec<String>,
    /// Whether it was seen in the CiliumNode.
    seen: bool,
}

/// Whether lists that a user wrote count as use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wishes {
    Counted,
    Ignored,
}

/// Records that came back when etcd was put back.
#[derive(Debug)]
struct Returned {
    /// What the fence held then.
    fence: Option<Vec<u8>>,
    blocks: BTreeSet<(PodCidr, String)>,
}

/// Two blocks with their nodes, of which at most one should be.
type Conflict = ((PodCidr, String), (PodCidr, String));

/// The watcher over the blocks of one cluster. It remembers the claims of the last look, so it must see every change.
#[derive(Debug)]
pub struct BlockSafety {
    keys: LedgerKeys,
    cluster: String,
    begun: Instant,
    rest: RestWatch,
    /// What was in use under a claim of its own when last looked at.
    covered: BTreeSet<(PodCidr, String)>,
    cells: Parsed<Result<Cell, CellError>>,
    specs: Parsed<Spec>,
    records: Parsed<Vec<Holding>>,
    /// What counts since the last look.
    counts: Counts,
    wishes: BTreeMap<String, Wish>,
    /// The blocks in which pods of a node run, and whether the ledger has held the block for the node since etcd was put
    /// back.
    pods: BTreeMap<(PodCidr, String), bool>,
    /// What the store holds is not what came of what it held before.
    put_back: bool,
    /// What two nodes held when etcd was put back, as long as it lasts.
    tolerated: BTreeSet<Conflict>,
    /// Since etcd was put back: what CiliumNodes listed then, and what the ledger has held since. A list that names something
    /// else was on its way meanwhile, made from a claim that is gone. No write of ours can be told so in time, and no agent
    /// uses such a block, because an agent goes by the claim.
    known: Option<BTreeSet<(PodCidr, String)>>,
    /// Who leads was told before that these are gone, and what it had under way then may free their blocks. It learns from the
    /// answer that etcd was put back; whoever leads next reads them.
    returned: Option<Returned>,
}

impl BlockSafety {
    /// For the cluster of this name, whose blocks rest at least `quarantine` before they are granted again.
    #[must_use]
    pub fn new(cluster: &str, quarantine: Duration) -> Self {
        Self {
            keys: LedgerKeys::new(cluster),
            cluster: cluster.to_owned(),
            begun: Instant::now(),
            rest: RestWatch::new(quarantine),
            covered: BTreeSet::new(),
            cells: Parsed::default(),
            specs: Parsed::default(),
            records: Parsed::default(),
            counts: Counts::ALL,
            wishes: BTreeMap::new(),
            pods: BTreeMap::new(),
            put_back: false,
            tolerated: BTreeSet::new(),
            known: None,
            returned: None,
        }
    }

    /// A user is about to write this list into the CiliumNode of a node. As long as exactly it stands there it says
    /// nothing of who owns a block, except where the ledger says the same.
    pub fn wish(&mut self, node: &str, list: Vec<String>) {
        self.wishes.insert(node.to_owned(), Wish { list, seen: false });
    }

    /// Pods of a node run in a block from now on.
    pub fn pods_run(&mut self, node: &str, block: PodCidr) {
        self.pods.insert((block, node.to_owned()), true);
    }

    /// No pod of a node runs any more.
    pub fn pods_end(&mut self, node: &str) {
        self.pods.retain(|(_, owner), _| owner != node);
    }

    /// Whether pods of a node run.
    #[must_use]
    pub fn has_pods(&self, node: &str) -> bool {
        self.pods.keys().any(|(_, owner)| owner == node)
    }

    /// The ledger was put back to an earlier state: claims may be gone, or be those of before. The next look takes what is
    /// there as it is; what two nodes hold then may stay so until one of them lets go, and no longer.
    pub fn put_back(&mut self) {
        self.put_back = true;
    }

    /// The blocks that an agent may use: those that the ledger held for this very Node at the last look.
    #[must_use]
    pub fn usable(&self, node: &str, uid: &str) -> Vec<PodCidr> {
        let mine = |block: &Block| {
            let same = block.uid.as_ref().is_some_and(|seen| seen.as_str() == uid);
            block.node.as_str() == node && same && block.state.is_usable()
        };
        self.claims().filter(|(_, block)| mine(block)).map(|(at, _)| *at).collect()
    }

    /// The claims of the last look.
    pub fn claims(&self) -> impl Iterator<Item = (&PodCidr, &Block)> {
        self.rest.claims()
    }

    /// Looks.
    ///
    /// # Errors
    /// The first broken promise.
    pub fn look(&mut self, kv: &ModelKv, objects: &ModelObjects) -> Result<(), Breach> {
        let put_back = std::mem::take(&mut self.put_back);
        let before = if put_back { self.recorded() } else { BTreeSet::new() };
        if put_back {
            // The same revision may have written something else by now.
            (self.cells, self.records) = (Parsed::default(), Parsed::default());
            self.covered = BTreeSet::new();
        }
        self.read(kv, objects);
        let rested = self.read_claims()?;
        self.follow_wishes();
        let uses = self.uses(Wishes::Ignored);
        if put_back {
            self.take_as_it_is(&uses);
            let blocks = self.recorded().difference(&before).cloned().collect();
            self.returned = Some(Returned { fence: kv.value(&self.keys.fence()), blocks });
        } else if self.returned.as_ref().is_some_and(|returned| returned.fence != kv.value(&self.keys.fence())) {
            self.returned = None;
        }
        self.check_owners(&uses)?;
        self.check_frees(&uses)?;
        if self.counts.confirmations {
            self.check_confirmations(&uses)?;
        }
        // A claim that went because the ledger was put back did not leave: its time of rest goes on if it is there still.
        if let Some(breach) = rested.into_iter().next().filter(|_| !put_back) {
            return Err(breach.into());
        }
        let counts = |holding: &Holding| self.owns(holding.block, &holding.node) && !self.has_returned(holding);
        let covered = uses.into_iter().filter(counts);
        self.covered = covered.map(|holding| (holding.block, holding.node)).collect();
        Ok(())
    }

    /// What the records of the last look say.
    fn recorded(&self) -> BTreeSet<(PodCidr, String)> {
        let holdings = self.records.values().flat_map(|(_, holdings)| holdings);
        holdings.map(|holding| (holding.block, holding.node.clone())).collect()
    }

    fn has_returned(&self, holding: &Holding) -> bool {
        let key = || (holding.block, holding.node.clone());
        holding.source == Source::Record && self.returned.as_ref().is_some_and(|back| back.blocks.contains(&key()))
    }

    fn read(&mut self, kv: &ModelKv, objects: &ModelObjects) {
        let (mut cells, mut specs, mut records) = (Parsed::default(), Parsed::default(), Parsed::default());
        self.counts = Counts::of(&self.cluster, objects);
        if self.counts.cells_in_etcd {
            kv.visit(self.keys.prefix(), |key, revision, value| {
                if let Some(LedgerKey::Cell(id)) = self.keys.parse(key) {
                    cells.keep(&mut self.cells, key, revision, || Cell::from_json(id, value));
                }
            });
        }
        if self.counts.cells_in_objects {
            objects.visit(&resources::POD_CIDR_CELL, |key, revision, value| {
                if value.pointer("/spec/cluster").and_then(Value::as_str) == Some(self.cluster.as_str()) {
                    cells.keep(&mut self.cells, key, revision, || {
                        let missing = || Err(CellError::Unreadable("no cell".to_owned()));
                        read_cell(&self.cluster, &Object(value.clone())).unwrap_or_else(missing)
                    });
                }
            });
        }
        if self.counts.records {
            kv.visit(NODES_PREFIX, |key, revision, value| {
                records.keep(&mut self.records, key, revision, || read::record(value));
            });
        }
        objects.visit(&resources::CILIUM_NODE, |key, revision, value| {
            specs.keep(&mut self.specs, key, revision, || Spec::read(value));
        });
        (self.cells, self.specs, self.records) = (cells, specs, records);
    }

    fn readable_cells(&self) -> Result<Vec<&Cell>, Breach> {
        let bad = |key: &String, error: &CellError| Breach::BadCell { key: key.clone(), why: error.to_string() };
        self.cells.values().map(|(key, cell)| cell.as_ref().map_err(|error| bad(key, error))).collect()
    }

    /// Takes the claims; answers what did not rest.
    fn read_claims(&mut self) -> Result<Vec<RestBreach>, Breach> {
        let now = self.begun.elapsed();
        let mut rest = std::mem::take(&mut self.rest);
        let rested = self.readable_cells().map(|cells| rest.look(cells, now, now));
        self.rest = rest;
        rested
    }

    /// Begins anew with what is there.
    fn take_as_it_is(&mut self, uses: &[Holding]) {
        let rest = &self.rest;
        for ((block, node), sure) in &mut self.pods {
            *sure = owns(rest, *block, node);
        }
        // What told a wish from what an operator wrote is gone.
        let holdings = self.holdings(&self.uses(Wishes::Counted));
        self.tolerated = conflicts(&holdings).into_iter().map(|(one, other)| conflict(one, other)).collect();
        let listed = uses.iter().filter(|holding| holding.source == Source::Spec);
        self.known = Some(listed.map(|holding| (holding.block, holding.node.clone())).collect());
    }

    /// Forgets wishes that do not stand in their CiliumNode any more.
    fn follow_wishes(&mut self) {
        let specs = &self.specs;
        self.wishes.retain(|node, wish| {
            let stands = specs.values().any(|(_, spec)| spec.node == *node && spec.list == wish.list);
            wish.seen |= stands;
            stands || !wish.seen
        });
    }

    /// Everything outside the ledger that says that a block is a node's.
    fn uses(&self, wishes: Wishes) -> Vec<Holding> {
        let mut uses: Vec<Holding> = Vec::new();
        for (_, spec) in self.specs.values() {
            let wished = self.wishes.get(&spec.node).is_some_and(|wish| wish.list == spec.list);
            let wished = wished && wishes == Wishes::Ignored;
            let counts = |holding: &&Holding| !wished || holding.source != Source::Spec || self.is_granted(holding);
            uses.extend(spec.holdings.iter().filter(counts).cloned());
        }
        uses.extend(self.records.values().flat_map(|(_, holdings)| holdings).cloned());
        let pods = self.pods.keys();
        uses.extend(pods.map(|(block, node)| Holding { block: *block, node: node.clone(), source: Source::Pods }));
        uses
    }

    /// Claims and uses.
    fn holdings(&self, uses: &[Holding]) -> Vec<Holding> {
        // A cell that cannot be read ended the look before.
        let cells = self.cells.values().filter_map(|(_, cell)| cell.as_ref().ok());
        cells.flat_map(claim_holdings).chain(uses.iter().cloned()).collect()
    }

    fn owns(&self, block: PodCidr, node: &str) -> bool {
        owns(&self.rest, block, node)
    }

    /// Whether the node may use the block by the word of the ledger.
    fn is_granted(&self, holding: &Holding) -> bool {
        let claim = self.rest.claim(&holding.block);
        claim.is_some_and(|block| block.node.as_str() == holding.node && block.state.is_usable())
    }

    fn check_owners(&mut self, uses: &[Holding]) -> Result<(), Breach> {
        let rest = &self.rest;
        for ((block, node), sure) in &mut self.pods {
            *sure |= owns(rest, *block, node);
        }
        if let Some(known) = &mut self.known {
            known.extend(rest.claims().map(|(block, claim)| (*block, claim.node.as_str().to_owned())));
        }
        let tolerated = std::mem::take(&mut self.tolerated);
        if !tolerated.is_empty() {
            let holdings = self.holdings(&self.uses(Wishes::Counted));
            let found = conflicts(&holdings).into_iter().map(|(one, other)| conflict(one, other));
            self.tolerated = found.filter(|found| tolerated.contains(found)).collect();
        }
        let unsure = |holding: &Holding| {
            let key = || (holding.block, holding.node.clone());
            match holding.source {
                Source::Pods => self.pods.get(&key()) == Some(&false),
                Source::Spec => self.known.as_ref().is_some_and(|known| !known.contains(&key())),
                Source::Claim(_) | Source::Record | Source::Confirmation => false,
            }
        };
        let holdings = self.holdings(uses);
        let broken = conflicts(&holdings)
            .into_iter()
            .find(|(one, other)| !self.tolerated.contains(&conflict(one, other)) && !unsure(one) && !unsure(other));
        let broken = broken.map(|(one, other)| Breach::TwoOwners(Box::new(one.clone()), Box::new(other.clone())));
        broken.map_or(Ok(()), Err)
    }

    fn check_frees(&self, uses: &[Holding]) -> Result<(), Breach> {
        let freed = uses.iter().find(|holding| {
            self.rest.claim(&holding.block).is_none() && self.covered.contains(&(holding.block, holding.node.clone()))
        });
        freed.map_or(Ok(()), |holding| Err(Breach::FreeInUse(holding.clone())))
    }

    /// Whether the ledger holds what agents are told that it holds.
    fn check_confirmations(&self, uses: &[Holding]) -> Result<(), Breach> {
        let confirmed = uses.iter().filter(|holding| holding.source == Source::Confirmation);
        let wrong = confirmed.into_iter().find(|holding| !self.is_granted(holding));
        wrong.map_or(Ok(()), |holding| Err(Breach::ConfirmedWithoutClaim(holding.clone())))
    }
}

fn owns(rest: &RestWatch, block: PodCidr, node: &str) -> bool {
    rest.claim(&block).is_some_and(|claim| claim.node.as_str() == node)
}

/// The same whichever comes first.
fn conflict(one: &Holding, other: &Holding) -> Conflict {
    let (one, other) = ((one.block, one.node.clone()), (other.block, other.node.clone()));
    if one <= other { (one, other) } else { (other, one) }
}

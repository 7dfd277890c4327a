//! The allocator: which node gets which block, over the cells of the ledger as one term knows them.
//!
//! A grant is reserved here, written by [`Allocator::next_batch`] and a swap, and holds once [`Allocator::settle`]
//! saw the answer. A refused write undoes the reservation; a lost answer keeps it until [`Allocator::reload`] saw
//! what the ledger has. One batch is under way at a time, so that everything asked for meanwhile goes into the next.
//! Where the store takes fewer cells at once than a change touches, the change goes out in halves: see `changes`.

mod adopt;
mod changes;
mod compare;
mod counts;
mod refusal;
mod space;

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use crate::{
    cell::{Block, BlockState, CellId},
    config::PoolConfig,
    ledger::{Guard, Loaded},
    names::{NodeName, NodeUid, TermId},
    prefix::{Family, PodCidr},
};

use self::{
    changes::{Change, Edit, InFlight, Purpose},
    space::Space,
};

pub use self::{
    adopt::{Adoption, Carried, CarriedBlock, Loss},
    changes::{Batch, BatchId, Next, Settled},
    counts::{Counts, PoolCounts, StateCounts},
    refusal::{PoolProblem, Refusal},
};

/// The claims of a cluster during one leader's term. Times are durations since the start of the term.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Allocator {
    term: TermId,
    config: PoolConfig,
    /// How long a released block rests.
    quarantine: Duration,
    space: Space,
    /// Every block that is not free, under the node named in it.
    nodes: BTreeMap<NodeName, BTreeSet<PodCidr>>,
    /// What is to be written or being written, oldest first.
    changes: BTreeMap<u64, Change>,
    last_change: u64,
    /// The changes of each node.
    busy: BTreeMap<NodeName, BTreeSet<u64>>,
    in_flight: Option<InFlight>,
    last_batch: u64,
    /// Nothing is written until the ledger was read again.
    stale: bool,
    /// A refused write left a block with the wrong mark.
    unmarked: bool,
    /// Since when quarantined blocks rest, as far as this term can tell.
    resting: BTreeMap<PodCidr, Duration>,
}

/// What a node gets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grant {
    /// Its blocks, IPv4 first.
    pub blocks: Vec<PodCidr>,
    /// Whether the ledger holds them; until then nobody may use or publish them.
    pub confirmed: bool,
}

/// One block of a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claim {
    /// The block.
    pub at: PodCidr,
    /// The cell that records it.
    pub cell: CellId,
    /// What is recorded, or going to be.
    pub block: Block,
    /// Whether the ledger holds exactly that.
    pub confirmed: bool,
}

/// Why a block cannot leave quarantine.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FreeError {
    /// It is not in quarantine.
    #[error("block {0} is not in quarantine")]
    NotQuarantined(PodCidr),
    /// Its time is not over.
    #[error("block {block} stays in quarantine for {} s more", left.as_secs())]
    TooEarly {
        /// The block.
        block: PodCidr,
        /// What is left.
        left: Duration,
    },
    /// Its record cannot be changed now.
    #[error(transparent)]
    Refused(#[from] Refusal),
}

impl Allocator {
    /// Begins a term with what the ledger holds. The time of blocks in quarantine begins anew.
    ///
    /// Blocks that lie outside every pool CIDR are marked orphaned by the first batch, and orphaned ones whose pool
    /// CIDR is back are marked granted. Before the first grant, [`Allocator::adopt`] what nodes carry.
    #[must_use]
    pub fn start(term: TermId, config: PoolConfig, quarantine: Duration, loaded: &Loaded, now: Duration) -> Self {
        let space = Space::new(&config, &loaded.cells);
        let mut allocator = Self {
            term,
            config,
            quarantine,
            space,
            nodes: BTreeMap::new(),
            changes: BTreeMap::new(),
            last_change: 0,
            busy: BTreeMap::new(),
            in_flight: None,
            last_batch: 0,
            stale: false,
            unmarked: false,
            resting: BTreeMap::new(),
        };
        allocator.index(now);
        allocator.mark_orphans();
        allocator
    }

    /// The term.
    #[must_use]
    pub fn term(&self) -> &TermId {
        &self.term
    }

    /// The pool.
    #[must_use]
    pub fn config(&self) -> &PoolConfig {
        &self.config
    }

    /// Gives a node one block of each enabled family, or none: those that it has, those that still rest in quarantine
    /// under its name, else the next free ones.
    ///
    /// # Errors
    /// Why it gets none. What it had before stays.
    pub fn grant(&mut self, node: &NodeName, uid: &NodeUid, now: Duration) -> Result<Grant, Refusal> {
        if let Some(answer) = self.under_way(node, uid) {
            return answer;
        }
        let families: Vec<Family> = self.config.families().map(|(family, _)| family).collect();
        let mut edits = Vec::new();
        for family in families {
            if let Err(refusal) = self.grant_family(node, uid, family, now, &mut edits) {
                self.undo_edits(node, &edits);
                return Err(refusal);
            }
        }
        let confirmed = edits.is_empty();
        self.queue(Purpose::Grant, node, edits);
        Ok(Grant { blocks: self.usable_blocks(node), confirmed })
    }

    /// What a node that is being changed gets.
    fn under_way(&self, node: &NodeName, uid: &NodeUid) -> Option<Result<Grant, Refusal>> {
        let mut changes = self.busy.get(node)?.iter().filter_map(|id| self.changes.get(id)).peekable();
        changes.peek()?;
        let same = |edit: &Edit| edit.after.as_ref().is_some_and(|block| block.uid.as_ref() == Some(uid));
        let granted = changes.all(|change| change.purpose == Purpose::Grant && change.edits.iter().all(same));
        Some(if granted {
            Ok(Grant { blocks: self.usable_blocks(node), confirmed: false })
        } else {
            Err(Refusal::Busy { node: node.clone() })
        })
    }

    fn grant_family(
        &mut self,
        node: &NodeName,
        uid: &NodeUid,
        family: Family,
        now: Duration,
        edits: &mut Vec<Edit>,
    ) -> Result<(), Refusal> {
        let granted = |state| Block { state, node: node.clone(), uid: Some(uid.clone()) };
        let held = self.blocks_of(node, family);
        let in_use: Vec<_> = held.iter().filter(|(_, block)| block.state != BlockState::Quarantined).cloned().collect();
        // A node that returns gets back what rests under its name; another one keeps what it has.
        let kept = if in_use.is_empty() { held } else { in_use };
        if kept.is_empty() {
            let at = self.space.next_free(family).ok_or_else(|| self.exhausted(family, now))?;
            edits.push(self.reserve_new(at, granted(BlockState::Granted))?);
            return Ok(());
        }
        for (at, block) in kept {
            let state = match block.state {
                BlockState::Orphaned => BlockState::Orphaned,
                BlockState::Quarantined | BlockState::Pending if !self.space.in_pool(at) => BlockState::Orphaned,
                BlockState::Granted | BlockState::Pending | BlockState::Quarantined => BlockState::Granted,
            };
            let after = granted(state);
            if after != block {
                edits.push(self.reserve_known(at, Some(after))?);
            }
        }
        Ok(())
    }

    /// Why no block of a family is free.
    fn exhausted(&self, family: Family, now: Duration) -> Refusal {
        let counts = self.space.counts();
        let pools: Vec<PoolCounts> = counts.pools.into_iter().filter(|counts| counts.pool.family() == family).collect();
        if !self.space.is_any_pool_in_use(family) {
            let problems = self.problems().into_iter().filter(|problem| problem.pool().family() == family);
            return Refusal::PoolUnusable { family, problems: problems.collect() };
        }
        let waits = self.resting.iter().filter(|(at, _)| at.family() == family && self.space.in_pool(**at));
        match waits.map(|(_, since)| (*since + self.quarantine).saturating_sub(now)).min() {
            Some(next_in) => Refusal::OnlyQuarantined { family, pools, rest: self.quarantine, next_in },
            None => Refusal::PoolExhausted { family, pools },
        }
    }

    /// Sends the blocks of a node that is gone into quarantine. `uid` is the Node that was seen to be gone; claims of
    /// another Node of that name stay. A store that writes one cell at a time may hold claims of both: a leader that ended
    /// between the two cells of a node that returned left them.
    ///
    /// # Errors
    /// [`Refusal::OtherUid`], [`Refusal::Busy`] or [`Refusal::CellUnusable`]; nothing is released then.
    pub fn release(&mut self, node: &NodeName, uid: Option<&NodeUid>) -> Result<Vec<PodCidr>, Refusal> {
        if self.is_changing(node) {
            return Err(Refusal::Busy { node: node.clone() });
        }
        let held: Vec<(PodCidr, Block)> = Family::ALL
            .into_iter()
            .flat_map(|family| self.blocks_of(node, family))
            .filter(|(_, block)| block.state != BlockState::Quarantined)
            .collect();
        let (held, others): (Vec<_>, Vec<_>) =
            held.into_iter().partition(|(_, block)| block.uid.is_none() || block.uid.as_ref() == uid);
        if held.is_empty() && !others.is_empty() {
            return Err(Refusal::OtherUid { node: node.clone() });
        }
        let mut edits = Vec::new();
        for (at, block) in held {
            match self.reserve_known(at, Some(Block { state: BlockState::Quarantined, ..block })) {
                Ok(edit) => edits.push(edit),
                Err(refusal) => {
                    self.undo_edits(node, &edits);
                    return Err(refusal);
                }
            }
        }
        let blocks = edits.iter().map(|edit| edit.at).collect();
        self.queue(Purpose::Release, node, edits);
        Ok(blocks)
    }

    /// Every block in quarantine, with the node that had it: nothing of that node may stay published.
    pub fn quarantined(&self) -> impl Iterator<Item = (PodCidr, &NodeName)> {
        self.resting.keys().filter_map(|at| Some((*at, &self.space.get(*at)?.node)))
    }

    /// The blocks whose time in quarantine is over. The caller looks for records and endpoints in each, and then
    /// calls [`Allocator::free`] or [`Allocator::rest_again`].
    #[must_use]
    pub fn due(&self, now: Duration) -> Vec<PodCidr> {
        let over = |since: &Duration| *since + self.quarantine <= now;
        self.resting
            .iter()
            .filter(|(at, since)| over(since) && !self.space.is_changing(**at))
            .map(|(at, _)| *at)
            .collect()
    }

    /// When the next block is [`due`](Allocator::due).
    #[must_use]
    pub fn next_due(&self) -> Option<Duration> {
        let resting = self.resting.iter().filter(|(at, _)| !self.space.is_changing(**at));
        resting.map(|(_, since)| *since + self.quarantine).min()
    }

    /// Frees a block whose time in quarantine is over and that nothing uses any more.
    ///
    /// # Errors
    /// See [`FreeError`].
    pub fn free(&mut self, at: PodCidr, now: Duration) -> Result<(), FreeError> {
        let since = *self.resting.get(&at).ok_or(FreeError::NotQuarantined(at))?;
        let left = (since + self.quarantine).saturating_sub(now);
        if !left.is_zero() {
            return Err(FreeError::TooEarly { block: at, left });
        }
        let node = self.space.get(at).map(|block| block.node.clone()).ok_or(FreeError::NotQuarantined(at))?;
        let edit = self.reserve_known(at, None)?;
        self.queue(Purpose::Free, &node, vec![edit]);
        Ok(())
    }

    /// Lets a block in quarantine begin its time anew, because something still uses it.
    pub fn rest_again(&mut self, at: PodCidr, now: Duration) {
        if let Some(since) = self.resting.get_mut(&at) {
            *since = now;
        }
    }

    /// The blocks under a node's name, IPv4 first, those in quarantine included.
    #[must_use]
    pub fn claims(&self, node: &NodeName) -> Vec<Claim> {
        let blocks = self.nodes.get(node).into_iter().flatten();
        blocks
            .filter_map(|at| {
                let (cell, view) = self.space.cell_around(*at)?;
                let block = self.space.get(*at)?.clone();
                let confirmed = view.frozen.is_none() && !self.space.is_changing(*at);
                Some(Claim { at: *at, cell, block, confirmed })
            })
            .collect()
    }

    /// Whether a change of the node is not in the ledger yet.
    #[must_use]
    pub fn is_changing(&self, node: &NodeName) -> bool {
        self.busy.contains_key(node)
    }

    /// The blocks that the ledger holds for a node to use, IPv4 first.
    #[must_use]
    pub fn confirmed(&self, node: &NodeName) -> Vec<PodCidr> {
        let usable = |claim: &Claim| claim.confirmed && claim.block.state.is_usable();
        self.claims(node).iter().filter(|claim| usable(claim)).map(|claim| claim.at).collect()
    }

    /// What a record of the node must be guarded with when it is published; `None` while it has no confirmed block.
    #[must_use]
    pub fn guard(&self, node: &NodeName) -> Option<Guard> {
        let blocks = self.confirmed(node);
        let cells: BTreeMap<_, _> = blocks
            .into_iter()
            .filter_map(|at| self.space.cell_around(at))
            .map(|(id, cell)| (id, cell.version))
            .collect();
        (!cells.is_empty()).then(|| Guard { term: self.term.clone(), cells })
    }

    /// What the removal of records in the node's resting blocks must be guarded with; `None` while it has none whose
    /// state the ledger holds.
    #[must_use]
    pub fn quarantine_guard(&self, node: &NodeName) -> Option<Guard> {
        let claims = self.claims(node).into_iter();
        let resting = claims.filter(|claim| claim.confirmed && claim.block.state == BlockState::Quarantined);
        let cells: BTreeMap<_, _> =
            resting.filter_map(|claim| Some((claim.cell, self.space.cell(claim.cell)?.version))).collect();
        (!cells.is_empty()).then(|| Guard { term: self.term.clone(), cells })
    }

    /// Every node that has a block, those whose blocks are all in quarantine included.
    pub fn nodes(&self) -> impl Iterator<Item = &NodeName> {
        self.nodes.keys()
    }

    /// What is known of exactly this block; `None` when it is free, or no block of the ledger.
    #[must_use]
    pub fn block(&self, at: PodCidr) -> Option<&Block> {
        self.space.get(at)
    }

    /// How many blocks are in which state. What is not confirmed counts as what it is going to be.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.space.counts()
    }

    /// What keeps pool CIDRs, or parts of them, from being given away.
    #[must_use]
    pub fn problems(&self) -> Vec<PoolProblem> {
        self.space.problems()
    }

    fn blocks_of(&self, node: &NodeName, family: Family) -> Vec<(PodCidr, Block)> {
        let blocks = self.nodes.get(node).into_iter().flatten().filter(|at| at.family() == family);
        blocks.filter_map(|at| Some((*at, self.space.get(*at)?.clone()))).collect()
    }

    fn usable_blocks(&self, node: &NodeName) -> Vec<PodCidr> {
        let all = Family::ALL.into_iter().flat_map(|family| self.blocks_of(node, family));
        all.filter(|(_, block)| block.state.is_usable()).map(|(at, _)| at).collect()
    }

    /// Reserves a block that is free.
    fn reserve_new(&mut self, at: PodCidr, block: Block) -> Result<Edit, Refusal> {
        let cell = self.space.room_for(at)?;
        self.space.reserve(cell, at, Some(block.clone()));
        self.nodes.entry(block.node.clone()).or_default().insert(at);
        Ok(Edit { cell, at, before: None, after: Some(block) })
    }

    /// Reserves a change of a block that is not free; `None` frees it.
    fn reserve_known(&mut self, at: PodCidr, after: Option<Block>) -> Result<Edit, Refusal> {
        let Some((cell, view)) = self.space.cell_around(at) else { return Err(self.space.foreign(at)) };
        if let Some(error) = &view.frozen {
            return Err(Refusal::CellUnusable { cell, error: error.clone() });
        }
        let Some(before) = self.space.get(at).cloned() else { return Err(self.space.foreign(at)) };
        if self.space.is_changing(at) {
            return Err(Refusal::Busy { node: before.node });
        }
        self.space.reserve(cell, at, after.clone());
        Ok(Edit { cell, at, before: Some(before), after })
    }

    /// Takes reservations back, the last one first.
    fn undo_edits(&mut self, node: &NodeName, edits: &[Edit]) {
        for edit in edits.iter().rev() {
            self.space.undo(edit.cell, edit.at);
            if edit.before.is_none() {
                self.forget(node, edit.at);
            }
        }
    }

    fn forget(&mut self, node: &NodeName, at: PodCidr) {
        if let Some(blocks) = self.nodes.get_mut(node) {
            blocks.remove(&at);
            if blocks.is_empty() {
                self.nodes.remove(node);
            }
        }
    }

    /// Builds the index of nodes and of resting blocks from the space; keeps the times that are known.
    fn index(&mut self, now: Duration) {
        let known = std::mem::take(&mut self.resting);
        self.nodes.clear();
        for (_, at, block) in self.space.blocks() {
            self.nodes.entry(block.node.clone()).or_default().insert(at);
            if block.state == BlockState::Quarantined {
                self.resting.insert(at, known.get(&at).copied().unwrap_or(now));
            }
        }
    }

    /// Writes down which blocks the pool CIDRs left behind, and which ones they took back.
    fn mark_orphans(&mut self) {
        self.unmarked = false;
        let mut moved: BTreeMap<NodeName, Vec<(PodCidr, Block)>> = BTreeMap::new();
        for (_, at, block) in self.space.blocks() {
            let state = match (block.state, self.space.in_pool(at)) {
                (BlockState::Granted, false) => BlockState::Orphaned,
                (BlockState::Orphaned, true) => BlockState::Granted,
                _ => continue,
            };
            moved.entry(block.node.clone()).or_default().push((at, Block { state, ..block.clone() }));
        }
        for (node, blocks) in moved {
            // One that is being changed already, or whose cell cannot be used, keeps its mark until the next reload.
            let edits: Vec<Edit> =
                blocks.into_iter().filter_map(|(at, block)| self.reserve_known(at, Some(block)).ok()).collect();
            self.queue(Purpose::Mark, &node, edits);
        }
    }
}

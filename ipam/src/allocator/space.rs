//! The cells as they are known, the changes that are not yet confirmed over them, and what that leaves free.
//!
//! A *candidate* is a block of the mask in force in a pool CIDR. Free are the candidates that overlap no block,
//! whatever its size, and no cell that cannot be used. Cells are made when they are first written to, so a pool of
//! 2^60 candidates costs nothing until it is used.

use std::collections::BTreeMap;

use crate::{
    cell::{Block, BlockState, CELL_BITS, Cell, CellError, CellId, MAX_BLOCKS, Version},
    config::PoolConfig,
    ledger::StoredCell,
    prefix::{Family, PodCidr, overlapping},
};

use super::{
    counts::{Counts, PoolCounts, StateCounts},
    refusal::{PoolProblem, Refusal},
};

/// One cell as it is known.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct CellView {
    pub(super) version: Version,
    /// Whether the ledger knows the cell, even when it lost the record: its size is fixed then.
    known: bool,
    /// As the ledger has it. Empty when it cannot be read: then `frozen` says why.
    pub(super) stored: Cell,
    /// What is not confirmed: a new or changed block, or `None` for one that is being freed. A key is either in
    /// `stored` or overlaps nothing there, so the keys are disjoint.
    pub(super) overlay: BTreeMap<PodCidr, Option<Block>>,
    /// Why nothing in it may be changed.
    pub(super) frozen: Option<CellError>,
    /// Candidates of the pool CIDR around it that its blocks cover.
    covered: u128,
}

impl CellView {
    /// A cell that the ledger knows.
    fn new(version: Version, stored: Cell, frozen: Option<CellError>) -> Self {
        Self { version, known: true, stored, overlay: BTreeMap::new(), frozen, covered: 0 }
    }

    fn get(&self, at: &PodCidr) -> Option<&Block> {
        match self.overlay.get(at) {
            Some(Some(block)) => Some(block),
            // What is being freed is taken until that is confirmed.
            Some(None) | None => self.stored.blocks().get(at),
        }
    }

    /// Everything that is not free and shares addresses with `range`, in no particular order.
    fn taken(&self, range: &PodCidr) -> impl Iterator<Item = (PodCidr, &Block)> {
        let unchanged = self.stored.overlapping(range).map(|(at, block)| (*at, block));
        let unchanged = unchanged.filter(|(at, _)| !matches!(self.overlay.get(at), Some(Some(_))));
        let changed = overlapping(&self.overlay, range).filter_map(|(at, block)| Some((*at, block.as_ref()?)));
        unchanged.chain(changed)
    }

    /// Whether it has no room for one more block, counting a changed one twice.
    fn is_full(&self) -> bool {
        self.stored.blocks().len() + self.overlay.len() >= MAX_BLOCKS
    }
}

/// One pool CIDR.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Pool {
    cidr: PodCidr,
    mask: u8,
    /// Where new cells of it come from: see [`Cell::pool`] and [`Cell::mask`].
    first_mask: u8,
    /// The candidate that is looked at first.
    cursor: u128,
    /// Candidates that blocks cover, outside unusable cells.
    covered: u128,
    /// Candidates that unusable cells cover.
    blocked: u128,
    states: StateCounts,
    /// Why none of it is given away.
    refused: Option<PoolProblem>,
}

impl Pool {
    fn total(&self) -> u128 {
        self.cidr.count(self.mask)
    }

    fn free(&self) -> u128 {
        if self.refused.is_some() {
            return 0;
        }
        self.total().saturating_sub(self.covered).saturating_sub(self.blocked)
    }

    /// The length of its new cells.
    fn cell_len(&self) -> u8 {
        self.first_mask.saturating_sub(CELL_BITS).max(self.cidr.prefix_len())
    }

    /// Why candidates cannot live in a cell of this size.
    fn misfit(&self, cell: PodCidr) -> Option<PoolProblem> {
        let (pool, mask) = (self.cidr, self.mask);
        if mask < cell.prefix_len() {
            Some(PoolProblem::WiderThanCells { pool, mask, cell })
        } else if cell.count(mask) > MAX_BLOCKS as u128 {
            Some(PoolProblem::TooManyBlocks { pool, mask, cell })
        } else {
            None
        }
    }

    fn usable(&self, id: PodCidr, cell: &CellView) -> bool {
        cell.frozen.is_none() && self.misfit(id).is_none()
    }
}

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Space {
    cells: BTreeMap<PodCidr, CellView>,
    pools: BTreeMap<PodCidr, Pool>,
    /// The pool CIDRs in the order of the settings.
    order: Vec<PodCidr>,
    outside: BTreeMap<Family, StateCounts>,
}

impl Space {
    /// Takes the cells as they were loaded.
    pub(super) fn new(config: &PoolConfig, loaded: &BTreeMap<CellId, StoredCell>) -> Self {
        let mut cells: BTreeMap<PodCidr, CellView> = BTreeMap::new();
        for (id, stored) in loaded {
            let view = match &stored.cell {
                Ok(cell) => CellView::new(stored.version, cell.clone(), None),
                Err(error) => {
                    // A cell is always in a pool CIDR of its own size, so this one can be made.
                    let Ok(empty) = Cell::new(*id, id.prefix(), id.prefix().prefix_len()) else { continue };
                    CellView::new(stored.version, empty, Some(error.clone()))
                }
            };
            cells.insert(id.prefix(), view);
        }
        let cells = freeze_overlapping(cells);

        let order: Vec<PodCidr> = config.families().flat_map(|(_, pool)| pool.cidrs().to_vec()).collect();
        let pools = config
            .families()
            .flat_map(|(_, family)| family.cidrs().iter().map(|cidr| (*cidr, new_pool(*cidr, family.mask(), &cells))))
            .collect();
        let outside = config.families().map(|(family, _)| (family, StateCounts::default())).collect();
        let mut space = Self { cells, pools, order, outside };
        space.count_everything();
        space
    }

    /// Every block that is not free, with its cell.
    pub(super) fn blocks(&self) -> impl Iterator<Item = (CellId, PodCidr, &Block)> {
        self.cells.iter().flat_map(|(id, cell)| cell.taken(id).map(|(at, block)| (CellId::new(*id), at, block)))
    }

    /// The cell around a block, if there is one.
    pub(super) fn cell_around(&self, at: PodCidr) -> Option<(CellId, &CellView)> {
        let (id, cell) = overlapping(&self.cells, &at).find(|(id, _)| id.contains(&at))?;
        Some((CellId::new(*id), cell))
    }

    /// A cell by its id.
    pub(super) fn cell(&self, id: CellId) -> Option<&CellView> {
        self.cells.get(&id.prefix())
    }

    /// The version of every cell that is known, as the ledger has it.
    pub(super) fn versions(&self) -> impl Iterator<Item = (CellId, Version)> {
        self.cells.iter().map(|(id, cell)| (CellId::new(*id), cell.version))
    }

    /// Whether a cell is known, by itself or as part of one that cannot be used because they overlap.
    pub(super) fn knows(&self, id: CellId) -> bool {
        let whole = self.cells.contains_key(&id.prefix());
        whole || self.cell_around(id.prefix()).is_some_and(|(_, around)| around.frozen.is_some())
    }

    /// What is known of exactly this block.
    pub(super) fn get(&self, at: PodCidr) -> Option<&Block> {
        self.cell_around(at)?.1.get(&at)
    }

    /// Whether a change of exactly this block is under way.
    pub(super) fn is_changing(&self, at: PodCidr) -> bool {
        self.cell_around(at).is_some_and(|(_, cell)| cell.overlay.contains_key(&at))
    }

    /// Whether the block lies in a pool CIDR.
    pub(super) fn in_pool(&self, at: PodCidr) -> bool {
        self.pool_of(at).is_some()
    }

    fn pool_of(&self, at: PodCidr) -> Option<&Pool> {
        overlapping(&self.pools, &at).map(|(_, pool)| pool).find(|pool| pool.cidr.contains(&at))
    }

    /// The first claim, or else unusable cell, in the way of a new block.
    pub(super) fn obstacle(&self, at: PodCidr) -> Option<Refusal> {
        let claim = overlapping(&self.cells, &at).flat_map(|(_, cell)| cell.taken(&at)).min_by_key(|(other, _)| *other);
        if let Some((other, block)) = claim {
            let (owner, state) = (block.node.clone(), block.state);
            return Some(if other == at {
                Refusal::AlreadyAllocated { block: at, owner, state }
            } else {
                Refusal::Overlaps { block: at, other, owner, state }
            });
        }
        overlapping(&self.cells, &at).find_map(|(id, cell)| {
            let error = cell.frozen.clone()?;
            Some(Refusal::CellUnusable { cell: CellId::new(*id), error })
        })
    }

    /// Where a new block is to be recorded: its cell, made (in memory) when there is none.
    ///
    /// A new cell is as large as its pool CIDR's cells are, but never overlaps a cell that exists for another one.
    pub(super) fn room_for(&mut self, at: PodCidr) -> Result<CellId, Refusal> {
        if let Some(refusal) = self.obstacle(at) {
            return Err(refusal);
        }
        let Some(pool) = self.pool_of(at) else { return Err(self.foreign(at)) };
        if let Some((id, cell)) = self.cell_around(at) {
            return if cell.is_full() { Err(Refusal::CellFull { cell: id }) } else { Ok(id) };
        }
        let narrower = |at: PodCidr| Refusal::WiderThanCell { block: at, cell: at.nth(pool.cell_len(), 0) };
        if let Some((id, _)) = overlapping(&self.cells, &at).next() {
            return Err(Refusal::WiderThanCell { block: at, cell: *id });
        }
        if at.prefix_len() < pool.cell_len() {
            return Err(narrower(at));
        }
        let prefix = (pool.cell_len()..=at.prefix_len())
            .map(|len| at.supernet(len))
            .find(|cell| overlapping(&self.cells, cell).next().is_none())
            .unwrap_or(at);
        let id = CellId::new(prefix);
        let cell =
            Cell::new(id, pool.cidr, pool.first_mask).map_err(|error| Refusal::CellUnusable { cell: id, error })?;
        self.cells.insert(prefix, CellView { known: false, ..CellView::new(Version::ABSENT, cell, None) });
        Ok(id)
    }

    /// The refusal of a block outside every pool CIDR.
    pub(super) fn foreign(&self, at: PodCidr) -> Refusal {
        let pools: Vec<PodCidr> = self.order.iter().filter(|cidr| cidr.family() == at.family()).copied().collect();
        if pools.is_empty() { Refusal::FamilyDisabled { block: at } } else { Refusal::Foreign { block: at, pools } }
    }

    /// Notes a change that is to be written; `None` frees the block once that is confirmed.
    pub(super) fn reserve(&mut self, cell: CellId, at: PodCidr, new: Option<Block>) {
        let old = self.cells.get(&cell.prefix()).and_then(|cell| cell.get(&at)).map(|block| block.state);
        let state = new.as_ref().map_or(old, |block| Some(block.state));
        if let Some(view) = self.cells.get_mut(&cell.prefix()) {
            view.overlay.insert(at, new);
        }
        self.account(cell, at, old, state);
    }

    /// Takes a noted change back.
    pub(super) fn undo(&mut self, cell: CellId, at: PodCidr) {
        let Some(view) = self.cells.get_mut(&cell.prefix()) else { return };
        let old = view.get(&at).map(|block| block.state);
        view.overlay.remove(&at);
        let new = view.get(&at).map(|block| block.state);
        self.account(cell, at, old, new);
        self.drop_unwritten(cell);
    }

    /// A block was written, `None` when it was freed. The noted change of it is done when it said just that, and goes on
    /// when it was written in part. A block that does not fit (it cannot happen to a batch that was made from this space)
    /// is answered.
    pub(super) fn confirm(&mut self, cell: CellId, at: PodCidr, written: Option<&Block>) -> Result<(), CellError> {
        let Some(view) = self.cells.get_mut(&cell.prefix()) else { return Ok(()) };
        let Some(noted) = view.overlay.get(&at) else { return Ok(()) };
        if noted.as_ref() == written {
            view.overlay.remove(&at);
        }
        match written {
            Some(block) => view.stored.set(at, block.clone()),
            None => {
                let old = view.stored.remove(&at).map(|block| block.state);
                self.account(cell, at, old, None);
                Ok(())
            }
        }
    }

    /// Notes the version that a write gave to a cell.
    pub(super) fn set_version(&mut self, cell: CellId, version: Version) {
        if let Some(view) = self.cells.get_mut(&cell.prefix()) {
            (view.version, view.known) = (version, true);
        }
    }

    /// Forgets a cell that was made for a change which did not happen.
    fn drop_unwritten(&mut self, cell: CellId) {
        if self.cells.get(&cell.prefix()).is_some_and(|view| !view.known && view.overlay.is_empty()) {
            self.cells.remove(&cell.prefix());
        }
    }

    /// The next free candidate of a family, from the first pool CIDR that has one, and moves that one's cursor
    /// behind it.
    pub(super) fn next_free(&mut self, family: Family) -> Option<PodCidr> {
        let order: Vec<PodCidr> = self.order.iter().filter(|cidr| cidr.family() == family).copied().collect();
        order.into_iter().find_map(|cidr| {
            let pool = self.pools.get(&cidr).filter(|pool| pool.free() > 0)?;
            let index = self.scan(pool, pool.cursor, pool.total()).or_else(|| self.scan(pool, 0, pool.cursor))?;
            let pool = self.pools.get_mut(&cidr)?;
            pool.cursor = if index + 1 < pool.total() { index + 1 } else { 0 };
            Some(cidr.nth(pool.mask, index))
        })
    }

    /// The first free candidate with an index in `from..to`. Moves on cell by cell where these are full.
    fn scan(&self, pool: &Pool, from: u128, to: u128) -> Option<u128> {
        let mut index = from;
        while index < to {
            let candidate = pool.cidr.nth(pool.mask, index);
            match self.end_of_obstacle(pool, candidate) {
                None => return Some(index),
                Some(last) => index = pool.cidr.index_of(pool.mask, last.min(pool.cidr.last())) + 1,
            }
        }
        None
    }

    /// The last address of what makes a candidate not free.
    fn end_of_obstacle(&self, pool: &Pool, candidate: PodCidr) -> Option<u128> {
        overlapping(&self.cells, &candidate).find_map(|(id, cell)| {
            let full = || cell.is_full() || (pool.cidr.contains(id) && cell.covered == id.count(pool.mask));
            if !pool.usable(*id, cell) || full() {
                return Some(id.last().max(candidate.last()));
            }
            cell.taken(&candidate).map(|(at, _)| at.last().max(candidate.last())).max()
        })
    }

    /// Every pool CIDR, and what lies outside.
    pub(super) fn counts(&self) -> Counts {
        Counts {
            pools: self.order.iter().filter_map(|cidr| self.pools.get(cidr)).map(pool_counts).collect(),
            outside: self.outside.iter().map(|(family, states)| (*family, *states)).collect(),
        }
    }

    /// Whether some pool CIDR of a family gives blocks under the mask in force.
    pub(super) fn is_any_pool_in_use(&self, family: Family) -> bool {
        self.pools.values().any(|pool| pool.cidr.family() == family && pool.refused.is_none())
    }

    /// What keeps pool CIDRs, or parts of them, from being given away.
    pub(super) fn problems(&self) -> Vec<PoolProblem> {
        let mut problems = Vec::new();
        for pool in self.order.iter().filter_map(|cidr| self.pools.get(cidr)) {
            problems.extend(pool.refused.clone());
            for (id, cell) in overlapping(&self.cells, &pool.cidr) {
                if let Some(error) = &cell.frozen {
                    problems.push(PoolProblem::Cell { pool: pool.cidr, cell: CellId::new(*id), error: error.clone() });
                } else if pool.refused.is_none() {
                    problems.extend(pool.misfit(*id));
                }
            }
        }
        problems
    }

    /// Takes the cursors over, so that a reload does not start again at the first block.
    pub(super) fn keep_cursors(&mut self, before: &Self) {
        for (cidr, pool) in &mut self.pools {
            if let Some(old) = before.pools.get(cidr).filter(|old| old.mask == pool.mask) {
                pool.cursor = old.cursor;
            }
        }
    }

    /// Counts from nothing: at the start only.
    fn count_everything(&mut self) {
        let blocks: Vec<(CellId, PodCidr, BlockState)> =
            self.blocks().map(|(cell, at, block)| (cell, at, block.state)).collect();
        for pool in self.pools.values_mut() {
            let mut end = None;
            for (id, cell) in overlapping(&self.cells, &pool.cidr).collect::<Vec<_>>().into_iter().rev() {
                if pool.usable(*id, cell) {
                    continue;
                }
                // Candidates wider than the cell may have been counted with the cell before.
                let first = pool.cidr.index_of(pool.mask, id.first().max(pool.cidr.first()));
                let last = pool.cidr.index_of(pool.mask, id.last().min(pool.cidr.last()));
                let from = end.map_or(first, |end: u128| first.max(end + 1));
                if from <= last {
                    pool.blocked += last - from + 1;
                    end = Some(last);
                }
            }
        }
        // One by one, as if they were granted now: the overlap of narrow blocks in a candidate is seen that way.
        for (cell, at, state) in blocks {
            self.account_state(at, None, Some(state));
            self.cover_first(cell, at);
        }
    }

    /// A block went from a state to another.
    fn account(&mut self, cell: CellId, at: PodCidr, old: Option<BlockState>, new: Option<BlockState>) {
        self.account_state(at, old, new);
        match (old, new) {
            (None, Some(_)) => self.cover(cell, at, true),
            (Some(_), None) => self.cover(cell, at, false),
            _ => {}
        }
    }

    fn account_state(&mut self, at: PodCidr, old: Option<BlockState>, new: Option<BlockState>) {
        let around = overlapping(&self.pools, &at).map(|(cidr, _)| *cidr).find(|cidr| cidr.contains(&at));
        match around.and_then(|cidr| self.pools.get_mut(&cidr)) {
            Some(pool) => pool.states.shift(old, new),
            None => self.outside.entry(at.family()).or_default().shift(old, new),
        }
    }

    /// Counts the candidates that a block covers and no other block does.
    fn cover(&mut self, cell: CellId, at: PodCidr, add: bool) {
        self.cover_unless(cell, at, add, |_| true);
    }

    /// The same while counting everything: of several narrow blocks in a candidate the first one counts.
    fn cover_first(&mut self, cell: CellId, at: PodCidr) {
        self.cover_unless(cell, at, true, |other| other < at);
    }

    fn cover_unless(&mut self, id: CellId, at: PodCidr, add: bool, counts: impl Fn(PodCidr) -> bool) {
        let Some(cell) = self.cells.get(&id.prefix()) else { return };
        let mut cell_covered = cell.covered;
        let touched: Vec<PodCidr> = overlapping(&self.pools, &at).map(|(cidr, _)| *cidr).collect();
        for cidr in touched {
            let Some(pool) = self.pools.get_mut(&cidr) else { continue };
            if !pool.usable(id.prefix(), cell) {
                continue;
            }
            let covers = if at.contains(&cidr) {
                pool.total()
            } else if at.prefix_len() <= pool.mask {
                at.count(pool.mask)
            } else {
                let candidate = at.supernet(pool.mask);
                u128::from(!cell.taken(&candidate).any(|(other, _)| other != at && counts(other)))
            };
            let apply = |count: u128| if add { count + covers } else { count.saturating_sub(covers) };
            pool.covered = apply(pool.covered);
            if cidr.contains(&id.prefix()) {
                cell_covered = apply(cell_covered);
            }
        }
        if let Some(cell) = self.cells.get_mut(&id.prefix()) {
            cell.covered = cell_covered;
        }
    }
}

fn pool_counts(pool: &Pool) -> PoolCounts {
    PoolCounts { pool: pool.cidr, mask: pool.mask, free: pool.free(), states: pool.states }
}

/// A pool CIDR under the mask in force. Its cells are as large as they were made at its first use, if it was used.
fn new_pool(cidr: PodCidr, mask: u8, cells: &BTreeMap<PodCidr, CellView>) -> Pool {
    let mut first_mask = mask;
    let mut around = None;
    for (id, cell) in overlapping(cells, &cidr) {
        if cell.frozen.is_none() && cell.stored.pool() == cidr {
            first_mask = cell.stored.mask();
        }
        if id.contains(&cidr) {
            around = Some(*id);
        }
    }
    let mut pool = Pool {
        cidr,
        mask,
        first_mask,
        cursor: 0,
        covered: 0,
        blocked: 0,
        states: StateCounts::default(),
        refused: None,
    };
    let cell = around.unwrap_or_else(|| cidr.nth(pool.cell_len(), 0));
    pool.refused = pool.misfit(cell);
    pool
}

/// Two cells that overlap cannot both be the record of what lies in both, so neither may be changed. The wider one
/// stands for both from here on; where both claim the same addresses its claim counts.
fn freeze_overlapping(cells: BTreeMap<PodCidr, CellView>) -> BTreeMap<PodCidr, CellView> {
    let mut disjoint: BTreeMap<PodCidr, CellView> = BTreeMap::new();
    // A wider cell comes before those in it.
    for (id, cell) in cells {
        match disjoint.last_entry().filter(|outer| outer.key().contains(&id)) {
            None => {
                disjoint.insert(id, cell);
            }
            Some(mut outer) => {
                let outer = outer.get_mut();
                outer.frozen.get_or_insert(CellError::OverlapsCell(CellId::new(id)));
                for (at, block) in cell.stored.blocks() {
                    if outer.stored.set(*at, block.clone()).is_err() {
                        // Taken by the wider cell's claim, or beyond its room: it cannot be granted either way.
                    }
                }
            }
        }
    }
    disjoint
}

//! What is to be written: changes, the batches that they go out in, and what becomes of them.
//!
//! A change that touches more cells than one swap of the store takes goes out in halves, cell by cell, and each state
//! between two of them is sound by itself:
//!
//! - A grant writes its blocks as pending, cell after cell; in the last cell they are granted at once, and then the pending
//!   ones become granted. Pending blocks are nobody's to use, so no node runs with half of its families. Whoever leads next
//!   completes it forward, since a pending block counts as the node's: [`Allocator::grant`] asks for the rest.
//! - A release, and any other change, is as good in parts as it is whole: what is left is found and done again.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use crate::{
    cell::{Block, BlockState, Cell, CellId},
    ledger::{CellSwap, Limits, Loaded, SwapAnswer},
    names::NodeName,
    prefix::PodCidr,
};

use super::{Allocator, space::Space};

/// What a change is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Purpose {
    /// The node gets blocks, or keeps those that it carries.
    Grant,
    /// The node is gone.
    Release,
    /// The time in quarantine is over.
    Free,
    /// A block became orphaned, or is none any more.
    Mark,
}

/// A block going from one state to another; `None` is free.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Edit {
    pub(super) cell: CellId,
    pub(super) at: PodCidr,
    pub(super) before: Option<Block>,
    pub(super) after: Option<Block>,
}

/// Edits that are written together, or one cell after the other where the store takes no more at once.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Change {
    pub(super) purpose: Purpose,
    pub(super) node: NodeName,
    pub(super) edits: Vec<Edit>,
}

impl Change {
    /// Whether an edit gives a block to the node that was nobody's before: only these wait for each other.
    fn enters(&self, edit: &Edit) -> bool {
        let held = |block: &Block| block.state != BlockState::Quarantined;
        self.purpose == Purpose::Grant
            && edit.after.as_ref().is_some_and(|block| block.state.is_usable())
            && !edit.before.as_ref().is_some_and(held)
    }

    /// What is written of it next: all of it where a swap takes that many cells, else its part in one cell.
    fn step(&self, limits: Limits) -> Vec<Edit> {
        let cells: BTreeSet<CellId> = self.edits.iter().map(|edit| edit.cell).collect();
        if cells.len() <= limits.cells {
            return self.edits.clone();
        }
        let entered: BTreeSet<CellId> =
            self.edits.iter().filter(|edit| self.enters(edit)).map(|edit| edit.cell).collect();
        let Some(cell) = entered.first().or(cells.first()).copied() else { return Vec::new() };
        let more_to_come = entered.len() > 1;
        // The blocks that enter in one cell are written together, so none of them is pending there already.
        let part = self.edits.iter().filter(|edit| edit.cell == cell);
        part.map(|edit| match &edit.after {
            Some(block) if more_to_come && self.enters(edit) => {
                let pending = Block { state: BlockState::Pending, ..block.clone() };
                Edit { after: Some(pending), ..edit.clone() }
            }
            _ => edit.clone(),
        })
        .collect()
    }

    /// Takes what was written of it.
    fn advance(&mut self, step: &[Edit]) {
        self.edits.retain_mut(|edit| match step.iter().find(|written| written.at == edit.at) {
            Some(written) if written.after == edit.after => false,
            Some(written) => {
                edit.before.clone_from(&written.after);
                true
            }
            None => true,
        });
    }
}

/// The batch that is under way.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct InFlight {
    id: BatchId,
    /// What is written of each change.
    steps: BTreeMap<u64, Vec<Edit>>,
}

/// Which batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BatchId(u64);

/// Cells to be swapped at once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// Which batch.
    pub id: BatchId,
    /// What to hand to [`crate::ledger::Ledger::swap`].
    pub swaps: Vec<CellSwap>,
}

/// What the caller does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// Go on.
    Continue,
    /// Read the ledger and call [`Allocator::reload`]; no batch goes out before.
    Reload,
    /// The term is over: this allocator must not be used any more.
    EndTerm,
}

/// What became of changes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settled {
    /// Nodes with a change that the ledger holds now.
    pub confirmed: BTreeSet<NodeName>,
    /// Nodes with a change that was taken back.
    pub undone: BTreeSet<NodeName>,
    /// What to do next.
    pub next: Next,
}

impl Settled {
    fn only(next: Next) -> Self {
        Self { confirmed: BTreeSet::new(), undone: BTreeSet::new(), next }
    }
}

impl Allocator {
    /// Notes a change whose edits are reserved. One without edits is none.
    pub(super) fn queue(&mut self, purpose: Purpose, node: &NodeName, edits: Vec<Edit>) {
        if edits.is_empty() {
            return;
        }
        self.last_change += 1;
        self.busy.entry(node.clone()).or_default().insert(self.last_change);
        self.changes.insert(self.last_change, Change { purpose, node: node.clone(), edits });
    }

    /// What is to be written next: everything that waits, oldest first, as far as it fits into one swap. `None` while
    /// a batch is under way, a reload is due, or nothing waits.
    pub fn next_batch(&mut self, limits: Limits) -> Option<Batch> {
        if self.stale || self.in_flight.is_some() {
            return None;
        }
        let mut cells: BTreeMap<CellId, CellSwap> = BTreeMap::new();
        let mut bytes = 0;
        let mut steps: BTreeMap<u64, Vec<Edit>> = BTreeMap::new();
        for (id, change) in &self.changes {
            let step = change.step(limits);
            let new: BTreeSet<CellId> =
                step.iter().map(|edit| edit.cell).filter(|cell| !cells.contains_key(cell)).collect();
            // One behind it may lie in the cells that are in the batch already.
            if cells.len() + new.len() > limits.cells && !steps.is_empty() {
                continue;
            }
            let drafts: Vec<CellSwap> = new.iter().filter_map(|cell| self.draft(*cell)).collect();
            let more = drafts.iter().map(|draft| draft.new.text_bound()).sum::<usize>()
                + step.iter().filter_map(|edit| Some(edit.after.as_ref()?.text_bound())).sum::<usize>();
            // One that fits no batch at all goes out alone, so that the store refuses it and it is taken back.
            if bytes + more > limits.bytes && !steps.is_empty() {
                break;
            }
            bytes += more;
            cells.extend(drafts.into_iter().map(|draft| (draft.new.id(), draft)));
            for edit in &step {
                let Some(draft) = cells.get_mut(&edit.cell) else { continue };
                apply(&mut draft.new, edit);
            }
            steps.insert(*id, step);
        }
        if steps.is_empty() {
            return None;
        }
        self.last_batch += 1;
        let id = BatchId(self.last_batch);
        self.in_flight = Some(InFlight { id, steps });
        Some(Batch { id, swaps: cells.into_values().collect() })
    }

    fn draft(&self, cell: CellId) -> Option<CellSwap> {
        let view = self.space.cell(cell)?;
        Some(CellSwap { expected: view.version, new: view.stored.clone() })
    }

    /// Takes the ledger's answer to a batch. An answer to another batch than the one under way changes nothing.
    pub fn settle(&mut self, batch: BatchId, answer: &SwapAnswer, now: Duration) -> Settled {
        let Some(in_flight) = self.in_flight.take_if(|in_flight| in_flight.id == batch) else {
            return Settled::only(if self.stale { Next::Reload } else { Next::Continue });
        };
        let mut settled = Settled::only(Next::Continue);
        match answer {
            SwapAnswer::Done(versions) => {
                for (cell, version) in versions {
                    self.space.set_version(*cell, *version);
                }
                for (id, step) in in_flight.steps {
                    let Some(change) = self.changes.get_mut(&id) else { continue };
                    change.advance(&step);
                    let (node, whole) = (change.node.clone(), change.edits.is_empty());
                    for edit in &step {
                        self.confirm(&node, edit, now);
                    }
                    if whole {
                        self.take_change(id);
                        settled.confirmed.insert(node);
                    }
                }
                // Not at the refusal itself: the caller would write the same again at once.
                if self.unmarked {
                    self.mark_orphans();
                }
            }
            SwapAnswer::Refused(_) => {
                for id in in_flight.steps.into_keys() {
                    let Some(change) = self.take_change(id) else { continue };
                    // What was written of it already stays, and is completed by the next grant.
                    self.undo_edits(&change.node, &change.edits);
                    self.unmarked |= change.purpose == Purpose::Mark;
                    settled.undone.insert(change.node);
                }
            }
            // The changes stay reserved: the reload finds out which of them the ledger holds.
            SwapAnswer::Conflict(_) | SwapAnswer::Unknown(_) => {
                self.stale = true;
                settled.next = Next::Reload;
            }
            SwapAnswer::FenceLost | SwapAnswer::StoreReplaced(_) => {
                self.stale = true;
                settled.next = Next::EndTerm;
            }
        }
        settled
    }

    fn confirm(&mut self, node: &NodeName, edit: &Edit, now: Duration) {
        if self.space.confirm(edit.cell, edit.at, edit.after.as_ref()).is_err() {
            // The batch was made from this very space, so this cannot be; were it so, only the ledger could tell.
            self.stale = true;
        }
        match &edit.after {
            Some(block) if block.state == BlockState::Quarantined => {
                self.resting.insert(edit.at, now);
            }
            Some(_) => {
                self.resting.remove(&edit.at);
            }
            None => {
                self.resting.remove(&edit.at);
                self.forget(node, edit.at);
            }
        }
    }

    fn take_change(&mut self, id: u64) -> Option<Change> {
        let change = self.changes.remove(&id)?;
        if let Some(ids) = self.busy.get_mut(&change.node) {
            ids.remove(&id);
            if ids.is_empty() {
                self.busy.remove(&change.node);
            }
        }
        Some(change)
    }

    /// Takes what the ledger holds, read at quorum after the last answer.
    ///
    /// A change that the ledger holds is confirmed. One that can still be made, or of which a part was written, waits
    /// again, so that a lost write which takes effect later does what the next batch would have done. Any other is taken
    /// back.
    pub fn reload(&mut self, loaded: &Loaded, now: Duration) -> Settled {
        if !loaded.fence.holds(&self.term) {
            self.stale = true;
            return Settled::only(Next::EndTerm);
        }
        let mut space = Space::new(&self.config, &loaded.cells);
        space.keep_cursors(&self.space);
        self.space = space;
        self.index(now);
        self.in_flight = None;
        self.stale = false;
        self.busy.clear();
        let mut settled = Settled::only(Next::Continue);
        for (id, change) in std::mem::take(&mut self.changes) {
            let Change { purpose, node, edits } = change;
            match self.reserve_again(purpose, &node, edits) {
                None => {
                    settled.undone.insert(node);
                }
                Some(edits) if edits.is_empty() => {
                    settled.confirmed.insert(node);
                }
                Some(edits) => {
                    self.busy.entry(node.clone()).or_default().insert(id);
                    self.changes.insert(id, Change { purpose, node, edits });
                }
            }
        }
        self.mark_orphans();
        settled
    }

    /// Reserves what is left of a change; `None` when somebody else wrote one of its blocks.
    fn reserve_again(&mut self, purpose: Purpose, node: &NodeName, edits: Vec<Edit>) -> Option<Vec<Edit>> {
        let mut again: Vec<Edit> = Vec::with_capacity(edits.len());
        for Edit { at, before, after, .. } in edits {
            let now = self.space.get(at);
            if now == after.as_ref() {
                continue;
            }
            let half = after.as_ref().map(|block| Block { state: BlockState::Pending, ..block.clone() });
            let expected = now == before.as_ref() || (purpose == Purpose::Grant && now == half.as_ref());
            let reserved = match (now.is_none(), after) {
                _ if !expected => None,
                (true, Some(block)) => self.reserve_new(at, block).ok(),
                (_, after) => self.reserve_known(at, after).ok(),
            };
            match reserved {
                Some(edit) => again.push(edit),
                None => {
                    self.undo_edits(node, &again);
                    return None;
                }
            }
        }
        Some(again)
    }
}

/// Makes one edit in a cell. The space that the edit was reserved in lets only those through that fit.
fn apply(cell: &mut Cell, edit: &Edit) {
    match &edit.after {
        None => {
            cell.remove(&edit.at);
        }
        Some(block) => {
            let fits = cell.set(edit.at, block.clone());
            debug_assert!(fits.is_ok(), "an edit that was reserved fits its cell: {fits:?}");
        }
    }
}

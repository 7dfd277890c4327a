//! The objects of the ledger, as the API server holds them.

use std::collections::{BTreeMap, BTreeSet};

use basal_ipam::{
    cell::{Cell, CellId, Version},
    ledger::{FenceSeen, Loaded, Mark, StoredCell, SwapAnswer},
    names::TermId,
};

use crate::cast::{self, Claims};

/// The objects of the ledger.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub(super) struct Store {
    pub(super) revision: i64,
    pub(super) fence: Option<TermId>,
    /// The last term that noted its end.
    pub(super) ended: Option<TermId>,
    pub(super) list: BTreeSet<CellId>,
    pub(super) cells: BTreeMap<CellId, (Version, Cell)>,
}

impl Store {
    /// The owners that the ledger knows, those in quarantine included.
    pub(super) fn claims(&self) -> Claims {
        cast::claims(self.cells.values().map(|(_, cell)| cell))
    }

    pub(super) fn load(&self) -> Loaded {
        let cells = self.cells.iter();
        let mut cells: BTreeMap<CellId, StoredCell> = cells
            .map(|(id, (version, cell))| (*id, StoredCell { version: *version, cell: Ok(cell.clone()) }))
            .collect();
        for id in &self.list {
            let lost = || Cell::new(*id, id.prefix(), id.prefix().prefix_len() + 1);
            cells.entry(*id).or_insert_with(|| StoredCell { version: Version::ABSENT, cell: lost() });
        }
        let fence = FenceSeen { value: self.fence.as_ref().map(|term| term.as_str().to_owned()), version: Version(1) };
        Loaded { mark: Mark { store: 1, revision: self.revision }, fence, cells, ..Loaded::default() }
    }

    /// Whether the term in the fence has noted its end.
    pub(super) fn has_ended(&self) -> bool {
        self.fence.is_some() && self.fence == self.ended
    }

    pub(super) fn holds(&self, term: &TermId) -> bool {
        self.fence.as_ref() == Some(term)
    }

    /// A create, or a patch at a resourceVersion.
    pub(super) fn write(&mut self, write: &Write) -> SwapAnswer {
        let id = write.new.id();
        let version = self.cells.get(&id).map_or(Version::ABSENT, |(version, _)| *version);
        if version != write.expected {
            return SwapAnswer::Conflict([id].into());
        }
        self.revision += 1;
        self.cells.insert(id, (Version(self.revision), write.new.clone()));
        SwapAnswer::Done([(id, Version(self.revision))].into())
    }
}

/// The write of a swap.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Write {
    pub(super) term: TermId,
    pub(super) expected: Version,
    pub(super) new: Cell,
}

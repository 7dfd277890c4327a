//! Whether the ledger still holds what a term knows of it.

use std::collections::BTreeSet;

use crate::{
    cell::{CellId, Version},
    ledger::Loaded,
};

use super::Allocator;

impl Allocator {
    /// The cells that somebody else wrote or deleted, by a reading of the ledger. After them [`Allocator::reload`] takes
    /// that reading over.
    ///
    /// None while nobody can tell: an answer is outstanding, or this term wrote after the reading.
    #[must_use]
    pub fn differing(&self, loaded: &Loaded) -> BTreeSet<CellId> {
        let newer = |version: Version| version.0 > loaded.mark.revision;
        let outstanding = self.stale || self.in_flight.is_some() || !loaded.fence.holds(&self.term);
        if outstanding || self.space.versions().any(|(_, version)| newer(version)) {
            return BTreeSet::new();
        }
        let stored = |cell: &CellId| loaded.cells.get(cell).map_or(Version::ABSENT, |stored| stored.version);
        let changed = self.space.versions().filter(|(cell, version)| stored(cell) != *version).map(|(cell, _)| cell);
        let new = loaded.cells.keys().filter(|cell| !self.space.knows(**cell)).copied();
        changed.chain(new).collect()
    }
}

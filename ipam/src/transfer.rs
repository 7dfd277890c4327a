//! Copying claims from one ledger into another: what is to be written, and whether it is done. Pure.
//!
//! The copy is made while the ledger that is left is sealed, and before the other one is the active store. So it can be made
//! again from the beginning, at any time and by anybody, until it is complete.

use std::collections::BTreeMap;

use crate::{
    cell::{Cell, CellError, CellId, Version},
    ledger::{CellSwap, Limits, Loaded},
};

/// Why claims cannot be copied. None of it passes by itself.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TransferError {
    /// A cell cannot be read: nobody knows which claims it holds.
    #[error("cell {cell} in {place} cannot be read: {error}")]
    Unreadable {
        /// Which one.
        cell: CellId,
        /// The ledger.
        place: Place,
        /// What is wrong with it.
        error: Box<CellError>,
    },
    /// The other ledger has a cell, from an earlier time, that lies across one that is to be copied.
    #[error(
        "cell {there}, which the new store has from an earlier time, lies across cell {cell}; remove its ledger first"
    )]
    Across {
        /// What is to be copied.
        cell: CellId,
        /// What is there.
        there: CellId,
    },
}

/// One of the two ledgers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// The one that is left.
    Old,
    /// The one that is filled.
    New,
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Old => "the old store",
            Self::New => "the new store",
        })
    }
}

/// What makes the new ledger hold the claims of the old one, and no others. Nothing is left to write when the answer is
/// empty: then the copy is complete.
///
/// A cell that the new ledger has already keeps the pool CIDR and the mask that it was made for; a cell that the old one
/// does not have is emptied.
///
/// # Errors
/// See [`TransferError`].
pub fn transfer(old: &Loaded, new: &Loaded) -> Result<Vec<CellSwap>, TransferError> {
    let (from, to) = (readable(old, Place::Old)?, readable(new, Place::New)?);
    let mut swaps = Vec::new();
    for (id, (_, cell)) in &from {
        let across = |there: &&CellId| **there != *id && there.prefix().overlaps(&id.prefix());
        if let Some(there) = to.keys().find(across) {
            return Err(TransferError::Across { cell: *id, there: *there });
        }
        match to.get(id) {
            None => swaps.push(CellSwap { expected: Version::ABSENT, new: (*cell).clone() }),
            Some((version, there)) if *version == Version::ABSENT || there.blocks() != cell.blocks() => {
                swaps.push(CellSwap { expected: *version, new: there.with_blocks_of(cell) });
            }
            Some(_) => {}
        }
    }
    for (id, (version, there)) in to {
        if !from.contains_key(&id) && !there.blocks().is_empty() {
            swaps.push(CellSwap { expected: version, new: there.emptied() });
        }
    }
    Ok(swaps)
}

/// As many of the swaps, from the first on, as go into one batch; at least one.
#[must_use]
pub fn batch(swaps: &[CellSwap], limits: Limits) -> &[CellSwap] {
    let mut bytes = 0;
    let fits = swaps.iter().take(limits.cells).take_while(|swap| {
        bytes += swap.new.text_bound();
        bytes <= limits.bytes
    });
    let count = fits.count().max(1).min(swaps.len());
    &swaps[..count]
}

fn readable(loaded: &Loaded, place: Place) -> Result<BTreeMap<CellId, (Version, &Cell)>, TransferError> {
    let cells = loaded.cells.iter().map(|(id, stored)| match &stored.cell {
        Ok(cell) => Ok((*id, (stored.version, cell))),
        Err(error) => Err(TransferError::Unreadable { cell: *id, place, error: Box::new(error.clone()) }),
    });
    cells.collect()
}

//! What was seen of cells during a term, against what the store shows later.

use basal_ipam::{
    cell::{Cell, CellId, Version},
    ledger::{Loaded, Mark, SeenCells, StoredCell},
};

use crate::support::cidr;

fn id() -> CellId {
    CellId::new(cidr("10.0.0.0/16"))
}

/// A reading at a revision, with the cell at a version.
fn at(revision: i64, version: Option<i64>) -> Loaded {
    let cell = |version| StoredCell { version: Version(version), cell: Cell::new(id(), cidr("10.0.0.0/8"), 24) };
    let cells = version.map(|version| (id(), cell(version))).into_iter().collect();
    Loaded { mark: Mark { store: 1, revision }, cells, ..Loaded::default() }
}

#[test]
fn a_cell_that_is_older_than_it_was_or_gone_is_told() {
    for (revision, version, told) in [
        (9, Some(5), Ok(())),
        (9, Some(9), Ok(())),
        (9, Some(4), Err("cell 10.0.0.0/16 was at version 5 and is at 4")),
        (9, None, Err("the record of cell 10.0.0.0/16 was deleted")),
        (9, Some(0), Err("the record of cell 10.0.0.0/16 was deleted")),
        (5, None, Err("the record of cell 10.0.0.0/16 was deleted")),
        // Read before the cell was written.
        (4, Some(4), Ok(())),
        (4, None, Ok(())),
    ] {
        let mut loaded = SeenCells::default();
        assert_eq!(loaded.follow(&at(5, Some(5))), Ok(()));
        let mut written = SeenCells::default();
        written.note(id(), Version(5));
        // An answer that was overtaken takes nothing back.
        written.note(id(), Version(3));
        for mut seen in [loaded, written] {
            assert_eq!(seen.follow(&at(revision, version)), told.map_err(str::to_owned), "{version:?} at {revision}");
        }
    }
}

#[test]
fn a_cell_that_lost_its_record_before_the_term_is_not_missed() {
    let mut seen = SeenCells::default();
    assert_eq!(seen.follow(&at(5, Some(0))), Ok(()));
    assert_eq!(seen.follow(&at(6, None)), Ok(()));
    assert_eq!(seen.follow(&at(7, Some(7))), Ok(()));
    assert!(seen.follow(&at(8, Some(6))).is_err());
}

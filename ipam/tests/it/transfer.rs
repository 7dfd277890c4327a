//! Claims are copied from one ledger into another, whatever that one held before and wherever the copy was broken off.

use std::collections::BTreeMap;

use basal_ipam::{
    cell::{Block, BlockState, Cell, CellError, CellId, Version},
    ledger::{CellSwap, FenceAnswer, FenceSeen, LedgerState, Limits, Loaded, StoredCell, SwapAnswer},
    names::TermId,
    prefix::PodCidr,
    transfer::{Place, TransferError, batch, transfer},
};
use proptest::prelude::*;

use crate::support::{LIMITS, ONE_CELL, cidr, node};

/// Cells of 16 blocks of /28 in 10.0.0.0/16, with some of their blocks taken.
fn cells() -> impl Strategy<Value = BTreeMap<u8, BTreeMap<u8, (u8, usize)>>> {
    let blocks = prop::collection::btree_map(0_u8..16, (0_u8..9, 0..BlockState::ALL.len()), 0..6);
    prop::collection::btree_map(0_u8..7, blocks, 0..6)
}

fn cell(number: u8, pool: &str, blocks: &BTreeMap<u8, (u8, usize)>) -> Cell {
    let mut cell = Cell::new(CellId::new(cidr(&format!("10.0.{number}.0/24"))), cidr(pool), 28).unwrap();
    for (block, (owner, state)) in blocks {
        let at: PodCidr = cidr(&format!("10.0.{number}.{}/28", u16::from(*block) * 16));
        cell.set(at, Block { state: BlockState::ALL[*state], node: node(&format!("n{owner}")), uid: None }).unwrap();
    }
    cell
}

fn ledger(term: &TermId, pool: &str, cells: &BTreeMap<u8, BTreeMap<u8, (u8, usize)>>) -> LedgerState {
    let mut ledger = LedgerState::default();
    assert_eq!(ledger.take_fence(&FenceSeen::default(), term), FenceAnswer::Taken);
    for (number, blocks) in cells {
        let swap = CellSwap { expected: Version::ABSENT, new: cell(*number, pool, blocks) };
        assert!(matches!(ledger.commit(term, &[swap], LIMITS), SwapAnswer::Done(_)));
    }
    ledger
}

fn claims(ledger: &LedgerState) -> Vec<(PodCidr, Block)> {
    ledger.cells.values().flat_map(|(_, cell)| cell.blocks().clone()).collect()
}

/// Writes at most so many batches.
fn copy(old: &LedgerState, new: &mut LedgerState, term: &TermId, limits: Limits, batches: usize) {
    let swaps = transfer(&old.load(), &new.load()).unwrap();
    let mut rest = swaps.as_slice();
    for _ in 0..batches {
        if rest.is_empty() {
            return;
        }
        let now = batch(rest, limits);
        assert!(matches!(new.commit(term, now, limits), SwapAnswer::Done(_)));
        rest = &rest[now.len()..];
    }
}

proptest! {
    #[test]
    fn the_new_ledger_ends_with_the_claims_of_the_old_one(
        old in cells(),
        earlier in cells(),
        one_by_one in any::<bool>(),
        broken_off in 0_usize..8,
    ) {
        let (limits, term) = (if one_by_one { ONE_CELL } else { LIMITS }, TermId::from_random(1, 1));
        let old = ledger(&term, "10.0.0.0/16", &old);
        let mut new = ledger(&term, "10.0.0.0/17", &earlier);
        copy(&old, &mut new, &term, limits, broken_off);
        copy(&old, &mut new, &term, limits, usize::MAX);
        prop_assert_eq!(transfer(&old.load(), &new.load()), Ok(vec![]));
        prop_assert_eq!(claims(&new), claims(&old));
        for (number, _) in earlier {
            let id = CellId::new(cidr(&format!("10.0.{number}.0/24")));
            prop_assert_eq!(new.cells[&id].1.pool(), cidr("10.0.0.0/17"), "a cell is what it was made for");
        }
    }
}

#[test]
fn a_cell_that_lost_its_record_is_written() {
    let old = ledger(&TermId::from_random(1, 1), "10.0.0.0/16", &[(1, BTreeMap::new())].into());
    let lost = StoredCell { version: Version::ABSENT, cell: Ok(cell(1, "10.0.0.0/16", &BTreeMap::new())) };
    let new = Loaded { cells: [(CellId::new(cidr("10.0.1.0/24")), lost)].into(), ..Loaded::default() };
    let swaps = transfer(&old.load(), &new).unwrap();
    assert_eq!(swaps.iter().map(|swap| swap.expected).collect::<Vec<_>>(), [Version::ABSENT]);
}

#[test]
fn as_many_cells_go_out_together_as_the_limits_take() {
    let swaps: Vec<CellSwap> = [1, 2, 3]
        .map(|number| CellSwap { expected: Version::ABSENT, new: cell(number, "10.0.0.0/16", &BTreeMap::new()) })
        .into();
    let two = swaps[..2].iter().map(|swap| swap.new.text_bound()).sum();
    for (cells, bytes, together) in [(127, 1 << 20, 3), (2, 1 << 20, 2), (127, two, 2), (127, two - 1, 1), (127, 1, 1)]
    {
        assert_eq!(batch(&swaps, Limits { cells, bytes }), &swaps[..together], "{cells} cells of {bytes} bytes");
    }
}

#[test]
fn what_cannot_be_read_or_lies_across_is_not_copied() {
    let term = TermId::from_random(1, 1);
    let good = ledger(&term, "10.0.0.0/16", &[(1, BTreeMap::new())].into()).load();
    let id = CellId::new(cidr("10.0.1.0/24"));
    let mut bad = good.clone();
    let error = CellError::Unreadable("torn".to_owned());
    bad.cells.insert(id, StoredCell { version: Version(1), cell: Err(error.clone()) });
    let unreadable = |place| Err(TransferError::Unreadable { cell: id, place, error: Box::new(error.clone()) });
    assert_eq!(transfer(&bad, &good), unreadable(Place::Old));
    assert_eq!(transfer(&good, &bad), unreadable(Place::New));
    let told = [transfer(&bad, &good), transfer(&good, &bad)].map(|error| error.unwrap_err().to_string());
    assert!(told[0].contains(" in the old store ") && told[1].contains(" in the new store "), "{told:?}");

    let wide = CellId::new(cidr("10.0.0.0/20"));
    let stored = StoredCell { version: Version(1), cell: Cell::new(wide, cidr("10.0.0.0/16"), 28) };
    let across = Loaded { cells: [(wide, stored)].into(), ..Loaded::default() };
    assert_eq!(transfer(&good, &across), Err(TransferError::Across { cell: id, there: wide }));
}

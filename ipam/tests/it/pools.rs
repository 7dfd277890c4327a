//! Pools that change, and cells that cannot be used.

use basal_ipam::{
    allocator::{PoolProblem, Refusal},
    cell::{Block, BlockState, Cell, CellError, CellId, Version},
    ledger::{Loaded, StoredCell},
    prefix::Family,
};

use crate::support::{Rig, cidr, dual, ipv4, node, secs, uid};

#[test]
fn a_pool_of_2_to_the_60_blocks_costs_nothing() {
    let mut rig = Rig::new(dual(&["10.0.0.0/8"], 30, &["fd00::/16"], 76));
    for index in 0..600 {
        rig.serve(&format!("n{index}"));
    }
    assert_eq!(rig.allocator.counts().pools[1].free, (1 << 60) - 600);
    // 256 blocks a cell, in each family.
    assert_eq!(rig.ledger.cells.len(), 6);
    assert_eq!(rig.held("n599"), ["10.0.9.92/30", "fd00::2570:0:0:0/76"]);
}

#[test]
fn a_cell_is_256_blocks_or_the_pool_cidr_and_keeps_its_size() {
    let mut rig = Rig::new(ipv4(&["10.0.0.0/8", "192.168.0.0/20"], 24));
    rig.serve("a");
    let ids = |rig: &Rig| rig.ledger.cells.keys().map(ToString::to_string).collect::<Vec<_>>();
    assert_eq!(ids(&rig), ["10.0.0.0/16"]);
    // Narrower blocks go into cells of the same size.
    rig.next_term(ipv4(&["10.0.0.0/8", "192.168.0.0/20"], 26));
    assert_eq!(rig.serve("b"), ["10.0.1.0/26"]);
    for index in 0..1024 {
        rig.serve(&format!("n{index}"));
    }
    assert_eq!(ids(&rig), ["10.0.0.0/16", "10.1.0.0/16"]);
    // 28 bits are 4,096 blocks in a /16; one more is refused, and the other pool CIDR serves.
    rig.next_term(ipv4(&["10.0.0.0/8", "192.168.0.0/20"], 28));
    assert!(rig.allocator.problems().is_empty());
    rig.next_term(ipv4(&["10.0.0.0/8", "192.168.0.0/20"], 29));
    assert_eq!(
        rig.allocator.problems().iter().map(ToString::to_string).collect::<Vec<_>>(),
        ["cluster-pool-ipv4-mask-size: 29 would put 8192 blocks of 10.0.0.0/8 into one record of the ledger \
             (10.0.0.0/16), and at most 4096 fit; use 28 or less, or append another CIDR for blocks of that size"]
    );
    assert_eq!(rig.allocator.problems()[0].reason(), "PoolMaskSizeRefused");
    assert_eq!(rig.serve("c"), ["192.168.0.0/29"]);
    assert_eq!(rig.held("b"), ["10.0.1.0/26"]);
    // So is a block wider than a cell; when no pool CIDR is left the refusal says so.
    rig.next_term(ipv4(&["10.0.0.0/8"], 15));
    let refusal = rig.grant("d").unwrap_err();
    assert_eq!(refusal.reason(), "PoolUnusable");
    assert_eq!(
        refusal.to_string(),
        "allocator full: no pool CIDR of IPv4 can give a block: cluster-pool-ipv4-mask-size: 15 makes blocks of \
         10.0.0.0/8 wider than the records that the ledger keeps of them (10.0.0.0/16); use 16 or more, or append \
         another CIDR for blocks of that size"
    );
}

#[test]
fn a_narrower_pool_lives_in_the_cells_of_a_wider_one_and_the_other_way_round() {
    let mut rig = Rig::new(ipv4(&["10.0.0.0/20"], 24));
    assert_eq!(rig.serve("a"), ["10.0.0.0/24"]);
    rig.next_term(ipv4(&["10.0.0.0/8"], 24));
    // The cell 10.0.0.0/20 stays, and others fill the /16 around it.
    for index in 0..300 {
        rig.serve(&format!("n{index}"));
    }
    let ids: Vec<_> = rig.ledger.cells.keys().map(ToString::to_string).collect();
    assert_eq!(ids, ["10.0.0.0/20", "10.0.16.0/20", "10.0.32.0/19", "10.0.64.0/18", "10.0.128.0/17", "10.1.0.0/16"]);
    rig.next_term(ipv4(&["10.1.32.0/20"], 24));
    // Granted are 10.0.0.0 to 10.1.44.0: thirteen of them in the pool, and the others orphaned.
    assert_eq!(rig.serve("z"), ["10.1.45.0/24"]);
    assert!(rig.ledger.cells.keys().all(|id| id.prefix() != cidr("10.1.32.0/20")));
    assert_eq!(rig.allocator.counts().pools[0].states.granted, 14);
    assert_eq!(rig.allocator.counts().outside[0].1.orphaned, 288);
}

#[test]
fn cells_are_of_the_size_of_their_own_pool_cidr() {
    let mut rig = Rig::new(ipv4(&["10.0.0.0/20"], 28));
    rig.serve("a");
    rig.next_term(ipv4(&["10.0.0.0/8"], 24));
    rig.allocator.request(&node("b"), &uid("b"), cidr("10.5.0.0/24")).unwrap();
    rig.write(secs(0));
    assert_eq!(rig.ledger.cells.keys().map(ToString::to_string).collect::<Vec<_>>(), ["10.0.0.0/20", "10.5.0.0/16"]);
}

#[test]
fn blocks_outside_the_pools_are_orphaned_and_come_back() {
    let both = || ipv4(&["10.0.0.0/24", "10.1.0.0/24"], 24);
    let mut rig = Rig::new(both());
    rig.serve("a");
    rig.serve("b");
    rig.next_term(ipv4(&["10.1.0.0/24"], 24));
    rig.write(secs(0));
    // The node keeps using it; nobody else gets it.
    assert_eq!(rig.held("a"), ["10.0.0.0/24"]);
    assert_eq!(rig.allocator.block(cidr("10.0.0.0/24")).unwrap().state, BlockState::Orphaned);
    assert_eq!(
        rig.allocator.counts().outside,
        [(Family::V4, basal_ipam::allocator::StateCounts { orphaned: 1, ..Default::default() })]
    );
    assert!(rig.grant("a").unwrap().confirmed);
    assert_eq!(rig.grant("c").unwrap_err().reason(), "PoolExhausted");
    rig.next_term(both());
    rig.write(secs(0));
    assert_eq!(rig.allocator.block(cidr("10.0.0.0/24")).unwrap().state, BlockState::Granted);
    // Released while it was orphaned, it rests and is free.
    rig.next_term(ipv4(&["10.1.0.0/24"], 24));
    rig.write(secs(0));
    rig.drop("a", secs(0));
    assert_eq!(rig.allocator.quarantined().count(), 1);
    // What rests outside comes to nobody, so there is nothing to wait for.
    assert_eq!(rig.grant("c").unwrap_err().reason(), "PoolExhausted");
    // Coming back it is orphaned again: the pool does not hold it.
    rig.grant("a").unwrap();
    rig.write(secs(1));
    assert_eq!(rig.allocator.block(cidr("10.0.0.0/24")).unwrap().state, BlockState::Orphaned);
}

fn with_cell(rig: &Rig, id: &str, cell: Result<Cell, CellError>) -> Loaded {
    let mut loaded = rig.ledger.load();
    loaded.cells.insert(CellId::new(cidr(id)), StoredCell { version: Version(7), cell });
    loaded
}

#[test]
fn a_cell_that_cannot_be_read_is_never_empty() {
    let mut rig = Rig::new(ipv4(&["10.0.0.0/15"], 24));
    rig.serve("a");
    let broken = CellError::UnknownFormat(2);
    let loaded = with_cell(&rig, "10.0.0.0/16", Err(broken.clone()));
    rig.allocator.reload(&loaded, secs(0));
    assert_eq!(rig.allocator.counts().pools[0].free, 256);
    assert_eq!(rig.allocator.problems().iter().map(PoolProblem::reason).collect::<Vec<_>>(), ["LedgerCellUnusable"]);
    let refusal = rig.allocator.request(&node("b"), &uid("b"), cidr("10.0.9.0/24")).unwrap_err();
    let cell = CellId::new(cidr("10.0.0.0/16"));
    assert_eq!(refusal, Refusal::CellUnusable { cell, error: broken });
    assert_eq!(rig.grant("c").unwrap().blocks, [cidr("10.1.0.0/24")]);
}

#[test]
fn what_cannot_be_read_takes_each_candidate_once() {
    let mut rig = Rig::new(ipv4(&["10.0.0.0/14"], 15));
    let mut loaded = with_cell(&rig, "10.2.0.0/16", Err(CellError::UnknownFormat(2)));
    loaded.cells.extend(with_cell(&rig, "10.3.0.0/16", Err(CellError::UnknownFormat(2))).cells);
    rig.allocator.reload(&loaded, secs(0));
    assert_eq!(rig.allocator.counts().pools[0].free, 1);
    assert_eq!(rig.grant("a").unwrap().blocks, [cidr("10.0.0.0/15")]);
}

#[test]
fn a_cell_that_is_full_takes_no_block_though_addresses_are_left() {
    let mut rig = Rig::new(ipv4(&["10.0.0.0/15"], 24));
    rig.next_term(ipv4(&["10.0.0.0/15"], 28));
    let (id, block) =
        (CellId::new(cidr("10.0.0.0/16")), Block { state: BlockState::Granted, node: node("a"), uid: None });
    let mut cell = Cell::new(id, cidr("10.0.0.0/15"), 24).unwrap();
    for index in 0..4095 {
        cell.set(id.prefix().nth(29, index), block.clone()).unwrap();
    }
    rig.allocator.reload(&with_cell(&rig, "10.0.0.0/16", Ok(cell)), secs(0));
    assert_eq!(rig.grant("b").unwrap().blocks, [cidr("10.0.128.0/28")]);
    let refusal = rig.allocator.request(&node("c"), &uid("c"), cidr("10.0.200.0/28")).unwrap_err();
    assert_eq!(refusal, Refusal::CellFull { cell: id });
    assert_eq!(rig.grant("c").unwrap().blocks, [cidr("10.1.0.0/28")]);
}

#[test]
fn cells_that_overlap_are_not_touched_and_their_claims_stand() {
    let mut rig = Rig::new(ipv4(&["10.0.0.0/15"], 24));
    rig.serve("a");
    let inner = CellId::new(cidr("10.0.64.0/18"));
    let mut cell = Cell::new(inner, cidr("10.0.0.0/15"), 26).unwrap();
    let block = rig.allocator.block(cidr("10.0.0.0/24")).unwrap().clone();
    cell.set(cidr("10.0.64.0/26"), Block { node: node("b"), ..block }).unwrap();
    let loaded = with_cell(&rig, "10.0.64.0/18", Ok(cell));
    rig.allocator.reload(&loaded, secs(0));
    assert_eq!(rig.allocator.block(cidr("10.0.64.0/26")).unwrap().node, node("b"));
    assert_eq!(rig.allocator.block(cidr("10.0.0.0/24")).unwrap().node, node("a"));
    // Nothing is published on claims that two records tell of.
    assert_eq!(rig.allocator.guard(&node("b")), None);
    assert_eq!(rig.allocator.release(&node("b"), Some(&uid("a"))).unwrap_err().reason(), "LedgerCellUnusable");
    assert_eq!(rig.grant("c").unwrap().blocks, [cidr("10.1.0.0/24")]);
}

//! A store that writes one cell at a time: changes of several cells go out in halves, and whoever leads next completes
//! them.

use std::collections::BTreeSet;

use basal_ipam::{
    allocator::{Carried, CarriedBlock, Next},
    cell::{Cell, CellId, Version},
    config::PoolConfig,
    ledger::{Loaded, StoredCell, SwapAnswer, SwapRefusal},
    names::NodeUid,
};

use crate::support::{ONE_CELL, REST, Rig, cidr, dual, ipv4, node, secs, uid};

fn pool() -> PoolConfig {
    dual(&["10.0.0.0/16"], 24, &["fd00::/104"], 120)
}

const DONE: [&str; 2] = ["10.0.0.0/24 a granted", "fd00::/120 a granted"];

#[test]
fn a_grant_is_pending_in_the_first_cell_until_the_second_holds_it() {
    let mut rig = Rig::one_cell(pool());
    rig.grant("a").unwrap();
    assert!(rig.write_once(secs(0)));
    assert_eq!(rig.written(), ["10.0.0.0/24 a pending"]);
    assert!(!rig.grant("a").unwrap().confirmed);
    assert_eq!(rig.held("a"), [] as [&str; 0]);
    assert!(rig.write_once(secs(0)));
    assert_eq!(rig.written(), ["10.0.0.0/24 a pending", "fd00::/120 a granted"]);
    assert!(!rig.grant("a").unwrap().confirmed);
    assert!(rig.write_once(secs(0)));
    assert_eq!(rig.written(), DONE);
    assert!(rig.grant("a").unwrap().confirmed);
    assert!(!rig.write_once(secs(0)));
}

#[test]
fn many_grants_go_through_the_same_cells_together() {
    let mut rig = Rig::one_cell(pool());
    for number in 0..200 {
        rig.grant(&format!("n{number}")).unwrap();
    }
    let mut swaps = 0;
    while rig.write_once(secs(0)) {
        swaps += 1;
    }
    assert_eq!(swaps, 3);
    assert_eq!(rig.written().iter().filter(|text| text.ends_with("granted")).count(), 400);
}

#[test]
fn the_next_leader_completes_a_grant_forward_from_any_half() {
    for swaps in 0..=3 {
        let mut rig = Rig::one_cell(pool());
        rig.grant("a").unwrap();
        for _ in 0..swaps {
            assert!(rig.write_once(secs(0)));
        }
        rig.next_term(pool());
        // Another node that comes first takes nothing of it.
        rig.grant("b").unwrap();
        rig.grant("a").unwrap();
        rig.write(secs(0));
        let blocks = |name: &str| rig.held(name).into_iter().collect::<BTreeSet<_>>();
        assert_eq!((blocks("a").len(), blocks("b").len()), (2, 2), "after {swaps} swaps");
        assert!(blocks("a").is_disjoint(&blocks("b")));
        assert_eq!(rig.written().len(), 4, "nothing is left over after {swaps} swaps: {:?}", rig.written());
    }
}

#[test]
fn a_lost_answer_at_any_half_loses_nothing() {
    for lost in 0..3 {
        for took_effect in [true, false] {
            let mut rig = Rig::one_cell(pool());
            rig.grant("a").unwrap();
            for _ in 0..lost {
                assert!(rig.write_once(secs(0)));
            }
            let batch = rig.allocator.next_batch(ONE_CELL).unwrap();
            if took_effect {
                assert!(matches!(rig.commit(&batch), SwapAnswer::Done(_)));
            }
            let answer = SwapAnswer::Unknown("time-out".into());
            assert_eq!(rig.allocator.settle(batch.id, &answer, secs(0)).next, Next::Reload);
            let settled = rig.reload(secs(0));
            assert!(settled.undone.is_empty(), "at swap {lost}, took effect: {took_effect}");
            rig.write(secs(0));
            assert_eq!(rig.written(), DONE, "at swap {lost}, took effect: {took_effect}");
        }
    }
}

#[test]
fn a_refused_half_leaves_what_was_written_for_the_next_try() {
    let mut rig = Rig::one_cell(pool());
    rig.grant("a").unwrap();
    assert!(rig.write_once(secs(0)));
    let batch = rig.allocator.next_batch(ONE_CELL).unwrap();
    let refused = SwapAnswer::Refused(SwapRefusal::Store("no space".into()));
    let settled = rig.allocator.settle(batch.id, &refused, secs(0));
    assert_eq!(settled.undone, [node("a")].into());
    assert_eq!(rig.allocator.claims(&node("a")).len(), 1);
    assert_eq!(rig.allocator.counts().pools[0].states.pending, 1);
    assert_eq!(rig.serve("a").len(), 2);
    assert_eq!(rig.written()[0], DONE[0]);
}

#[test]
fn a_release_is_safe_in_halves() {
    for returns in [false, true] {
        let mut rig = Rig::one_cell(pool());
        rig.serve("a");
        rig.allocator.release(&node("a"), Some(&uid("a"))).unwrap();
        assert!(rig.write_once(secs(0)));
        assert_eq!(rig.written(), ["10.0.0.0/24 a quarantined", "fd00::/120 a granted"]);
        rig.next_term(pool());
        if returns {
            assert_eq!(rig.serve("a"), ["10.0.0.0/24", "fd00::/120"]);
            assert_eq!(rig.written(), DONE);
        } else {
            rig.drop("a", secs(0));
            assert_eq!(rig.written(), ["10.0.0.0/24 a quarantined", "fd00::/120 a quarantined"]);
            assert_eq!(rig.allocator.due(REST).len(), 2);
        }
    }
}

#[test]
fn a_node_that_returns_in_halves_rests_no_block_of_it() {
    let mut rig = Rig::one_cell(pool());
    rig.serve("a");
    rig.drop("a", secs(0));
    rig.grant("a").unwrap();
    assert!(rig.write_once(secs(0)));
    assert_eq!(rig.written(), ["10.0.0.0/24 a pending", "fd00::/120 a quarantined"]);
    assert_eq!(rig.allocator.due(REST), [], "a block that comes back is not freed");
    rig.write(secs(0));
    assert_eq!(rig.written(), DONE);
    assert_eq!(rig.allocator.next_due(), None);
}

#[test]
fn claims_of_two_nodes_of_one_name_are_released_one_node_after_the_other() {
    let mut rig = Rig::one_cell(pool());
    rig.serve("a");
    let later = NodeUid::new("later").unwrap();
    rig.allocator.grant(&node("a"), &later, secs(0)).unwrap();
    // A running node keeps its blocks while its uid is written in halves.
    assert!(rig.write_once(secs(0)));
    assert_eq!(rig.written(), DONE);
    rig.next_term(pool());
    assert_eq!(rig.allocator.release(&node("a"), Some(&later)), Ok(vec![cidr("10.0.0.0/24")]));
    rig.write(secs(0));
    assert_eq!(rig.allocator.release(&node("a"), Some(&uid("a"))), Ok(vec![cidr("fd00::/120")]));
    rig.write(secs(0));
    assert_eq!(rig.allocator.quarantined().count(), 2);
}

#[test]
fn a_pending_block_whose_pool_is_gone_becomes_orphaned() {
    let mut rig = Rig::one_cell(pool());
    rig.grant("a").unwrap();
    assert!(rig.write_once(secs(0)));
    rig.next_term(dual(&["10.7.0.0/16"], 24, &["fd00::/104"], 120));
    rig.grant("a").unwrap();
    rig.write(secs(0));
    assert_eq!(rig.written(), ["10.0.0.0/24 a orphaned", "fd00::/120 a granted"]);
}

#[test]
fn a_cell_that_lost_its_record_holds_what_nodes_carry_before_anything_is_granted() {
    let lost = |prefix: &str| {
        let id = CellId::new(cidr(prefix));
        (id, StoredCell { version: Version::ABSENT, cell: Cell::new(id, cidr(prefix), 24) })
    };
    let mut rig = Rig::one_cell(ipv4(&["10.0.0.0/8"], 26));
    let loaded = Loaded { cells: [lost("10.0.0.0/16")].into(), ..rig.ledger.load() };
    rig.allocator = basal_ipam::allocator::Allocator::start(
        rig.allocator.term().clone(),
        rig.allocator.config().clone(),
        REST,
        &loaded,
        secs(0),
    );
    let blocks = vec![CarriedBlock { at: cidr("10.0.0.0/26"), live: false }];
    rig.allocator.adopt(&[Carried { node: node("a"), uid: Some(uid("a")), blocks }]);
    rig.write(secs(0));
    assert_eq!(rig.serve("b"), ["10.0.0.64/26"]);
    // Its size stays what it was, though the mask in force would make cells of /18, also after a grant that failed.
    let refused = SwapAnswer::Refused(SwapRefusal::Store("no space".into()));
    rig.grant("c").unwrap();
    let batch = rig.allocator.next_batch(ONE_CELL).unwrap();
    rig.allocator.settle(batch.id, &refused, secs(0));
    let cells: Vec<String> = rig.ledger.cells.keys().map(ToString::to_string).collect();
    assert_eq!(cells, ["10.0.0.0/16"]);
}

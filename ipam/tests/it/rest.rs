//! Quarantine, seen from outside.

use std::time::Duration;

use basal_ipam::{
    cell::{Block, BlockState, Cell, CellId},
    rest::{RestBreach, RestWatch},
};

use crate::support::{REST, cidr, node, secs};

fn cell(blocks: &[(&str, &str, BlockState)]) -> Cell {
    let mut cell = Cell::new(CellId::new(cidr("10.0.0.0/16")), cidr("10.0.0.0/8"), 24).unwrap();
    for (at, name, state) in blocks {
        cell.set(cidr(at), Block { state: *state, node: node(name), uid: None }).unwrap();
    }
    cell
}

fn look(watch: &mut RestWatch, blocks: &[(&str, &str, BlockState)], at: Duration) -> Vec<RestBreach> {
    watch.look([&cell(blocks)], at, at)
}

const AT: &str = "10.0.0.0/24";
use BlockState::{Granted, Quarantined};

#[test]
fn a_block_that_rests_long_enough_may_go_to_anybody() {
    let mut watch = RestWatch::new(REST);
    assert_eq!(look(&mut watch, &[(AT, "a", Granted)], secs(0)), []);
    assert_eq!(look(&mut watch, &[(AT, "a", Quarantined)], secs(10)), []);
    assert_eq!(look(&mut watch, &[(AT, "a", Quarantined)], secs(200)), []);
    let claims: Vec<_> = watch.claims().map(|(at, block)| (*at, block.node.as_str(), block.state)).collect();
    assert_eq!(claims, [(cidr(AT), "a", Quarantined)]);
    assert_eq!(look(&mut watch, &[(AT, "b", Granted)], secs(10) + REST), []);
}

#[test]
fn its_own_node_may_have_it_back_at_once_and_the_rest_begins_anew() {
    let mut watch = RestWatch::new(REST);
    look(&mut watch, &[(AT, "a", Quarantined)], secs(0));
    assert_eq!(look(&mut watch, &[(AT, "a", Granted)], secs(200)), []);
    look(&mut watch, &[(AT, "a", Quarantined)], secs(250));
    let breach = RestBreach::ShortQuarantine { block: cidr(AT), node: "a".into(), rested: secs(100) };
    assert_eq!((breach.block(), breach.node()), (cidr(AT), "a"));
    assert_eq!(look(&mut watch, &[], secs(350)), [breach]);
}

#[test]
fn no_quarantine_at_all_is_told_whatever_time_has_passed() {
    let breach = || RestBreach::NoQuarantine { block: cidr(AT), node: "a".into() };
    for next in [&[][..], &[(AT, "b", Granted)][..], &[("10.0.0.0/25", "a", Granted)][..]] {
        let mut watch = RestWatch::new(REST);
        look(&mut watch, &[(AT, "a", Granted)], secs(0));
        assert_eq!(look(&mut watch, next, secs(1000)), [breach()]);
    }
}

#[test]
fn a_look_that_comes_late_is_read_in_favour_of_the_leader() {
    let mut watch = RestWatch::new(REST);
    look(&mut watch, &[(AT, "a", Granted)], secs(0));
    // Between 10 s, when nothing new was there, and 50 s, when it was.
    watch.look([&cell(&[(AT, "a", Quarantined)])], secs(10), secs(50));
    assert_eq!(look(&mut watch, &[], secs(10) + REST), []);
}

//! Grants, adoption, release, quarantine.

use basal_ipam::{
    allocator::{Carried, CarriedBlock, FreeError, Refusal},
    cell::BlockState,
    names::NodeUid,
};

use crate::support::{REST, Rig, cidr, dual, ipv4, node, secs, uid};

fn carried(name: &str, blocks: &[(&str, bool)]) -> Carried {
    let blocks = blocks.iter().map(|(at, live)| CarriedBlock { at: cidr(at), live: *live }).collect();
    Carried { node: node(name), uid: Some(uid(name)), blocks }
}

#[test]
fn the_cursor_moves_and_both_families_come_at_once() {
    let mut rig = Rig::new(dual(&["10.0.0.0/22"], 24, &["fd00::/64"], 120));
    assert_eq!(rig.serve("a"), ["10.0.0.0/24", "fd00::/120"]);
    assert_eq!(rig.serve("b"), ["10.0.1.0/24", "fd00::100/120"]);
    rig.drop("a", secs(0));
    rig.allocator.free(cidr("10.0.0.0/24"), REST).unwrap();
    rig.allocator.free(cidr("fd00::/120"), REST).unwrap();
    rig.write(REST);
    // What was freed comes last.
    assert_eq!(rig.serve("c"), ["10.0.2.0/24", "fd00::200/120"]);
    assert_eq!(rig.serve("d"), ["10.0.3.0/24", "fd00::300/120"]);
    assert_eq!(rig.serve("e"), ["10.0.0.0/24", "fd00::400/120"]);
}

#[test]
fn what_was_granted_and_freed_last_comes_last_also_after_a_reload() {
    let mut rig = Rig::new(ipv4(&["10.0.0.0/22"], 24));
    for (name, block, next) in [("a", "10.0.0.0/24", "10.0.1.0/24"), ("b", "10.0.1.0/24", "10.0.2.0/24")] {
        rig.drop(name, secs(0));
        assert_eq!(rig.serve(name), [block]);
        rig.drop(name, secs(0));
        rig.allocator.free(cidr(block), REST).unwrap();
        rig.write(REST);
        rig.reload(REST);
        assert_eq!(rig.allocator.clone().grant(&node("c"), &uid("c"), REST).unwrap().blocks, [cidr(next)]);
    }
}

#[test]
fn both_families_or_none() {
    let mut rig = Rig::new(dual(&["10.0.0.0/24"], 24, &["fd00::/119"], 120));
    rig.serve("a");
    let before = rig.allocator.clone();
    let refusal = rig.grant("b").unwrap_err();
    assert_eq!(refusal.reason(), "PoolExhausted");
    assert_eq!(
        refusal.to_string(),
        "allocator full: no free IPv4 block for the node in 10.0.0.0/24 (/24 blocks: 0 free, 1 granted, 0 pending, \
         0 quarantined, 0 orphaned); append a CIDR to cluster-pool-ipv4-cidr, or remove nodes that are gone"
    );
    assert_eq!(rig.allocator.counts(), before.counts());

    let mut rig = Rig::new(dual(&["10.0.0.0/23"], 24, &["fd00::/120"], 120));
    rig.serve("a");
    assert_eq!(rig.grant("b").unwrap_err().reason(), "PoolExhausted");
    assert_eq!(rig.allocator.counts().pools[0].free, 1);
    assert!(rig.allocator.next_batch(crate::support::LIMITS).is_none());
    assert!(rig.allocator.claims(&node("b")).is_empty());
}

#[test]
fn a_grant_is_not_confirmed_before_it_is_written() {
    let mut rig = Rig::new(ipv4(&["10.0.0.0/16"], 24));
    let grant = rig.grant("a").unwrap();
    assert!(!grant.confirmed);
    assert_eq!(grant.blocks, [cidr("10.0.0.0/24")]);
    assert_eq!(rig.allocator.guard(&node("a")), None);
    assert_eq!(rig.grant("a").unwrap(), grant);
    assert!(rig.allocator.is_changing(&node("a")));
    rig.write(secs(0));
    assert!(!rig.allocator.is_changing(&node("a")));
    assert!(rig.grant("a").unwrap().confirmed);
    let guard = rig.allocator.guard(&node("a")).unwrap();
    assert!(rig.ledger.allows(&guard));
    // Another grant in the cell moves its version on.
    rig.serve("b");
    assert!(!rig.ledger.allows(&guard));
    assert!(rig.ledger.allows(&rig.allocator.guard(&node("a")).unwrap()));
}

#[test]
fn the_second_cidr_serves_when_the_first_is_full_and_a_family_enabled_later_is_added() {
    let mut rig = Rig::new(ipv4(&["10.0.0.0/24", "10.9.0.0/23"], 24));
    assert_eq!(rig.serve("a"), ["10.0.0.0/24"]);
    assert_eq!(rig.serve("b"), ["10.9.0.0/24"]);
    rig.next_term(dual(&["10.0.0.0/24", "10.9.0.0/23"], 24, &["fd00::/112"], 120));
    assert_eq!(rig.serve("b"), ["10.9.0.0/24", "fd00::/120"]);
}

#[test]
fn quarantine_is_kept_and_named() {
    let mut rig = Rig::new(ipv4(&["10.0.0.0/23"], 24));
    rig.serve("a");
    rig.serve("b");
    rig.drop("a", secs(100));
    let refusal = rig.allocator.grant(&node("c"), &uid("c"), secs(150)).unwrap_err();
    assert_eq!(refusal.reason(), "PoolOnlyQuarantined");
    assert_eq!(
        refusal.to_string(),
        "allocator full: the only free IPv4 blocks are quarantined (10.0.0.0/23 (/24 blocks: 0 free, 1 granted, \
         0 pending, 1 quarantined, 0 orphaned)); each is freed 300 s after its node let go of it, once no pod uses it; \
         wait, or append a CIDR to cluster-pool-ipv4-cidr"
    );
    let later = rig.allocator.grant(&node("c"), &uid("c"), secs(151)).unwrap_err();
    assert_eq!(later.to_string(), refusal.to_string(), "it is written for each node that waits");
    let block = cidr("10.0.0.0/24");
    assert_eq!(rig.allocator.quarantined().collect::<Vec<_>>(), [(block, &node("a"))]);
    assert_eq!(rig.allocator.due(secs(399)), []);
    assert_eq!(rig.allocator.next_due(), Some(secs(400)));
    assert_eq!(rig.allocator.free(block, secs(399)), Err(FreeError::TooEarly { block, left: secs(1) }));
    assert_eq!(rig.allocator.due(secs(400)), [block]);
    // Something still uses it: the time begins anew.
    rig.allocator.rest_again(block, secs(400));
    assert_eq!(rig.allocator.next_due(), Some(secs(700)));
    // And with each leader.
    rig.next_term(ipv4(&["10.0.0.0/23"], 24));
    assert_eq!(rig.allocator.next_due(), Some(REST));
    rig.allocator.free(block, REST).unwrap();
    // Taken until the ledger holds it.
    assert!(rig.allocator.grant(&node("c"), &uid("c"), REST).is_err());
    rig.write(REST);
    assert_eq!(rig.serve("c"), ["10.0.0.0/24"]);
    assert_eq!(rig.allocator.free(block, REST), Err(FreeError::NotQuarantined(block)));
}

#[test]
fn the_same_name_gets_its_block_back() {
    let mut rig = Rig::new(ipv4(&["10.0.0.0/16"], 24));
    rig.serve("a");
    rig.drop("a", secs(0));
    assert_eq!(rig.held("a"), [] as [&str; 0]);
    let later = NodeUid::new("another").unwrap();
    rig.allocator.grant(&node("a"), &later, secs(1)).unwrap();
    rig.write(secs(1));
    assert_eq!(rig.held("a"), ["10.0.0.0/24"]);
    assert_eq!(rig.allocator.block(cidr("10.0.0.0/24")).unwrap().uid, Some(later.clone()));
    assert_eq!(rig.allocator.next_due(), None);
    // The first Node's end, noticed late, releases nothing.
    assert_eq!(rig.allocator.release(&node("a"), Some(&uid("a"))), Err(Refusal::OtherUid { node: node("a") }));
    assert_eq!(rig.allocator.release(&node("a"), Some(&later)), Ok(vec![cidr("10.0.0.0/24")]));
    // Asked again while that is being written.
    assert_eq!(rig.allocator.grant(&node("a"), &later, secs(1)), Err(Refusal::Busy { node: node("a") }));
    assert_eq!(rig.allocator.release(&node("nobody"), None), Ok(vec![]));
}

#[test]
fn a_node_that_took_another_block_leaves_its_old_one_to_rest() {
    let mut rig = Rig::new(ipv4(&["10.0.0.0/16"], 24));
    rig.serve("a");
    rig.drop("a", secs(0));
    rig.allocator.request(&node("a"), &uid("a"), cidr("10.0.9.0/24")).unwrap();
    rig.write(secs(0));
    assert_eq!(rig.serve("a"), ["10.0.9.0/24"]);
    assert_eq!(rig.written(), ["10.0.0.0/24 a quarantined", "10.0.9.0/24 a granted"]);
}

#[test]
fn records_in_resting_blocks_are_guarded_by_the_cells_that_say_so() {
    let mut rig = Rig::new(ipv4(&["10.0.0.0/16"], 24));
    rig.serve("a");
    assert_eq!(rig.allocator.quarantine_guard(&node("a")), None);
    rig.allocator.release(&node("a"), Some(&uid("a"))).unwrap();
    assert_eq!(rig.allocator.quarantine_guard(&node("a")), None, "the ledger does not hold it yet");
    rig.write(secs(0));
    let guard = rig.allocator.quarantine_guard(&node("a")).unwrap();
    assert!(rig.ledger.allows(&guard));
    // The node is back: what it publishes now is not removed by the word of before.
    rig.serve("a");
    assert!(!rig.ledger.allows(&guard));
    assert_eq!(rig.allocator.quarantine_guard(&node("a")), None);
}

#[test]
fn a_block_that_rests_is_its_carriers_again_and_orphaned_outside_the_pool() {
    for (pool, state) in [("10.0.0.0/16", "granted"), ("10.1.0.0/16", "orphaned")] {
        let mut rig = Rig::new(ipv4(&["10.0.0.0/16"], 24));
        rig.serve("a");
        rig.drop("a", secs(0));
        rig.next_term(ipv4(&[pool], 24));
        assert_eq!(rig.allocator.adopt(&[carried("a", &[("10.0.0.0/24", false)])]).lost, []);
        rig.write(secs(0));
        assert_eq!(rig.written(), [format!("10.0.0.0/24 a {state}")]);
    }
}

#[test]
fn adoption_keeps_claims_and_prefers_live_endpoints() {
    let mut rig = Rig::new(ipv4(&["10.0.0.0/16"], 24));
    rig.serve("owner");
    rig.next_term(ipv4(&["10.0.0.0/16"], 24));
    let adoption = rig.allocator.adopt(&[
        carried("a", &[("10.0.5.0/24", false), ("10.0.7.0/24", false)]),
        carried("b", &[("10.0.5.0/24", true)]),
        carried("c", &[("10.0.7.0/24", false), ("10.0.8.0/25", false)]),
        carried("owner", &[("10.0.0.0/24", false)]),
        carried("thief", &[("10.0.0.0/24", true)]),
        carried("wide", &[("10.0.8.0/23", false)]),
    ]);
    let kept: Vec<_> = adoption.kept.iter().map(|(node, at)| format!("{node} {at}")).collect();
    assert_eq!(kept, ["b 10.0.5.0/24", "a 10.0.7.0/24", "c 10.0.8.0/25", "owner 10.0.0.0/24"]);
    let lost: Vec<_> =
        adoption.lost.iter().map(|loss| format!("{} {} {}", loss.node, loss.live, loss.refusal)).collect();
    assert_eq!(
        lost,
        [
            "thief true requested CIDR (10.0.0.0/24) is already allocated: granted to node owner; remove it from \
             spec.ipam.podCIDRs",
            "a false requested CIDR (10.0.5.0/24) is already allocated: granted to node b; remove it from \
             spec.ipam.podCIDRs",
            "c false requested CIDR (10.0.7.0/24) is already allocated: granted to node a; remove it from \
             spec.ipam.podCIDRs",
            "wide false requested CIDR (10.0.8.0/23) is already allocated in part: it overlaps 10.0.8.0/25, which is \
             granted to node c; remove it from spec.ipam.podCIDRs",
        ]
    );
    rig.write(secs(0));
    // The loser gets a fresh block that nobody carries.
    assert_eq!(rig.serve("thief"), ["10.0.1.0/24"]);
    assert_eq!(rig.held("a"), ["10.0.7.0/24"]);
}

#[test]
fn an_address_that_nobody_claims_has_a_block_to_itself() {
    let mut rig = Rig::new(ipv4(&["10.0.0.0/16"], 26));
    rig.serve("a");
    rig.next_term(ipv4(&["10.0.0.0/16"], 24));
    let unclaimed = |address: &str| rig.allocator.unclaimed(address.parse().unwrap()).map(|block| block.to_string());
    assert_eq!(unclaimed("10.0.1.7").unwrap(), "10.0.1.0/24");
    assert_eq!(unclaimed("10.0.0.63"), None, "it is in 10.0.0.0/26, which is a's");
    assert_eq!(unclaimed("10.0.0.64").unwrap(), "10.0.0.64/26");
    assert_eq!(unclaimed("10.0.0.130").unwrap(), "10.0.0.128/25");
    assert_eq!(unclaimed("10.1.0.1"), None, "no pool CIDR");
    assert_eq!(unclaimed("fd00::1"), None, "no pool of that family");
}

#[test]
fn what_a_node_asks_for_is_refused_with_the_reason() {
    let mut rig = Rig::new(ipv4(&["10.0.0.0/16", "10.2.0.0/24"], 24));
    rig.serve("a");
    let mut ask = |name: &str, at: &str| {
        let refusal = rig.allocator.request(&node(name), &uid(name), cidr(at)).unwrap_err();
        (refusal.reason(), refusal.to_string())
    };
    assert_eq!(
        ask("b", "10.1.0.0/24"),
        (
            "PodCIDRForeign",
            "allocator not configured for the requested CIDR 10.1.0.0/24: the pool CIDRs are 10.0.0.0/16, \
             10.2.0.0/24; remove it from spec.ipam.podCIDRs, or append a CIDR around it to cluster-pool-ipv4-cidr"
                .into()
        )
    );
    assert_eq!(ask("b", "10.2.0.0/23").0, "PodCIDRForeign");
    assert_eq!(ask("b", "10.0.0.0/8").0, "PodCIDROverlaps");
    assert_eq!(
        ask("b", "fd00::/120"),
        (
            "PodCIDRFamilyDisabled",
            "unable to allocate CIDR [fd00::/120] since allocator for IPv6 addresses does not exist; remove it from \
             spec.ipam.podCIDRs, or set cluster-pool-ipv6-cidr"
                .into()
        )
    );
    assert_eq!(
        ask("a", "10.0.9.0/24"),
        (
            "PodCIDRConflict",
            "node has CIDRs allocated ([10.0.0.0/24]) that conflict with requested CIDRs [10.0.9.0/24]; remove \
             10.0.9.0/24 from spec.ipam.podCIDRs"
                .into()
        )
    );
    assert_eq!(ask("b", "10.0.0.0/24").0, "PodCIDRAlreadyAllocated");
    assert_eq!(ask("b", "10.0.0.128/26").0, "PodCIDROverlaps");
    let unaligned = Refusal::from("10.0.0.1/24".parse::<basal_ipam::prefix::PodCidr>().unwrap_err());
    assert_eq!(unaligned.reason(), "PodCIDRUnaligned");

    rig.allocator.request(&node("b"), &uid("b"), cidr("10.0.9.0/24")).unwrap();
    rig.allocator.request(&node("b"), &uid("b"), cidr("10.0.9.0/24")).unwrap();
    rig.write(secs(0));
    assert_eq!(rig.held("b"), ["10.0.9.0/24"]);
    rig.allocator.request(&node("b"), &uid("b"), cidr("10.0.9.0/24")).unwrap();
    rig.drop("b", secs(0));
    let refusal = rig.allocator.request(&node("c"), &uid("c"), cidr("10.0.9.0/24")).unwrap_err();
    assert!(refusal.to_string().contains("in quarantine after node b"), "{refusal}");
}

#[test]
fn a_pending_block_is_completed() {
    let mut rig = Rig::new(ipv4(&["10.0.0.0/16"], 24));
    rig.serve("a");
    for (_, cell) in rig.ledger.cells.values_mut() {
        let (at, block) = cell.blocks().iter().next().map(|(at, block)| (*at, block.clone())).unwrap();
        cell.set(at, basal_ipam::cell::Block { state: BlockState::Pending, ..block }).unwrap();
    }
    rig.next_term(ipv4(&["10.0.0.0/16"], 24));
    assert_eq!(rig.held("a"), [] as [&str; 0]);
    assert_eq!(rig.allocator.counts().pools[0].states.pending, 1);
    assert_eq!(rig.serve("a"), ["10.0.0.0/24"]);
}

//! Refused writes, lost answers, conflicts and lost fences.

use basal_ipam::{
    allocator::Next,
    ledger::{LedgerError, LedgerState, Limits, SwapAnswer, SwapRefusal},
    names::TermId,
};

use crate::support::{LIMITS, Rig, cidr, dual, ipv4, node, secs, uid};

fn lost() -> SwapAnswer {
    SwapAnswer::Unknown("time-out".into())
}

#[test]
fn a_refused_write_is_undone() {
    let mut rig = Rig::new(ipv4(&["10.0.0.0/16"], 24));
    rig.grant("a").unwrap();
    let batch = rig.allocator.next_batch(LIMITS).unwrap();
    // What is asked for meanwhile waits for the next batch.
    rig.grant("b").unwrap();
    assert_eq!(rig.allocator.next_batch(LIMITS), None);
    let answer = SwapAnswer::Refused(SwapRefusal::Store("no space".into()));
    let settled = rig.allocator.settle(batch.id, &answer, secs(0));
    assert_eq!((settled.undone, settled.next), ([node("a")].into(), Next::Continue));
    assert!(rig.allocator.claims(&node("a")).is_empty());
    rig.write(secs(0));
    assert_eq!(rig.written(), ["10.0.1.0/24 b granted"]);
}

#[test]
fn a_lost_answer_keeps_the_reservation_until_the_ledger_was_read() {
    for took_effect in [true, false] {
        let mut rig = Rig::new(dual(&["10.0.0.0/16"], 24, &["fd00::/104"], 120));
        rig.grant("a").unwrap();
        let batch = rig.allocator.next_batch(LIMITS).unwrap();
        if took_effect {
            let _answer = rig.commit(&batch);
        }
        assert_eq!(rig.allocator.settle(batch.id, &lost(), secs(0)).next, Next::Reload);
        assert_eq!(rig.held("a"), [] as [&str; 0]);
        assert_eq!(rig.grant("b").unwrap().blocks[0], cidr("10.0.1.0/24"));
        assert_eq!(rig.allocator.next_batch(LIMITS), None);
        let settled = rig.reload(secs(0));
        assert_eq!(settled.confirmed.contains(&node("a")), took_effect);
        rig.write(secs(0));
        assert_eq!(
            rig.written(),
            ["10.0.0.0/24 a granted", "10.0.1.0/24 b granted", "fd00::/120 a granted", "fd00::100/120 b granted"]
        );
    }
}

#[test]
fn a_write_that_takes_effect_after_the_reload_does_what_the_next_one_would() {
    let mut rig = Rig::new(ipv4(&["10.0.0.0/16"], 24));
    rig.grant("a").unwrap();
    let late = rig.allocator.next_batch(LIMITS).unwrap();
    rig.allocator.settle(late.id, &lost(), secs(0));
    rig.reload(secs(0));
    rig.grant("b").unwrap();
    let batch = rig.allocator.next_batch(LIMITS).unwrap();
    assert!(matches!(rig.commit(&late), SwapAnswer::Done(_)));
    let answer = rig.commit(&batch);
    assert!(matches!(answer, SwapAnswer::Conflict(_)));
    assert_eq!(rig.allocator.settle(batch.id, &answer, secs(0)).next, Next::Reload);
    assert_eq!(rig.reload(secs(0)).confirmed, [node("a")].into());
    rig.write(secs(0));
    assert_eq!(rig.written(), ["10.0.0.0/24 a granted", "10.0.1.0/24 b granted"]);
}

/// A grant to `a` that was on its way when somebody wrote a block to another node behind the allocator's back.
fn overtaken_by(block: &str) -> Rig {
    let mut rig = Rig::new(ipv4(&["10.0.0.0/16"], 24));
    rig.serve("other");
    rig.grant("a").unwrap();
    let batch = rig.allocator.next_batch(LIMITS).unwrap();
    for (version, cell) in rig.ledger.cells.values_mut() {
        let others = cell.blocks()[&cidr("10.0.0.0/24")].clone();
        cell.set(cidr(block), others).unwrap();
        version.0 += 1;
    }
    let answer = rig.commit(&batch);
    assert_eq!(rig.allocator.settle(batch.id, &answer, secs(0)).next, Next::Reload);
    rig
}

#[test]
fn a_change_that_no_longer_fits_is_taken_back() {
    let mut rig = overtaken_by("10.0.1.0/25");
    let settled = rig.reload(secs(0));
    assert_eq!(settled.undone, [node("a")].into());
    assert_eq!(rig.serve("a"), ["10.0.2.0/24"]);
}

#[test]
fn a_block_that_somebody_else_wrote_is_theirs() {
    // The very block that was to be a's.
    let mut rig = overtaken_by("10.0.1.0/24");
    assert_eq!(rig.reload(secs(0)).undone, [node("a")].into());
    rig.write(secs(0));
    assert_eq!(rig.written(), ["10.0.0.0/24 other granted", "10.0.1.0/24 other granted"]);
    assert_eq!(rig.serve("a"), ["10.0.2.0/24"]);
}

#[test]
fn a_mark_that_was_refused_is_written_again_after_the_next_write() {
    let mut rig = Rig::new(ipv4(&["10.0.0.0/24", "10.1.0.0/23"], 24));
    rig.serve("a");
    rig.next_term(ipv4(&["10.1.0.0/23"], 24));
    let batch = rig.allocator.next_batch(LIMITS).unwrap();
    let answer = SwapAnswer::Refused(SwapRefusal::Store("no space".into()));
    assert_eq!(rig.allocator.settle(batch.id, &answer, secs(0)).undone, [node("a")].into());
    assert_eq!(rig.allocator.next_batch(LIMITS), None, "at once it would be refused again");
    rig.serve("b");
    assert_eq!(rig.written(), ["10.0.0.0/24 a orphaned", "10.1.0.0/24 b granted"]);
}

#[test]
fn a_lost_fence_ends_the_term() {
    let mut rig = Rig::new(ipv4(&["10.0.0.0/16"], 24));
    rig.grant("a").unwrap();
    let batch = rig.allocator.next_batch(LIMITS).unwrap();
    let _taken = rig.ledger.take_fence(&rig.ledger.fence.clone(), &TermId::from_random(9, 9));
    let answer = rig.commit(&batch);
    assert_eq!(answer, SwapAnswer::FenceLost);
    assert_eq!(rig.allocator.settle(batch.id, &answer, secs(0)).next, Next::EndTerm);
    rig.grant("b").unwrap();
    assert_eq!(rig.allocator.next_batch(LIMITS), None);
    assert_eq!(rig.reload(secs(0)).next, Next::EndTerm);
    assert_eq!(rig.allocator.next_batch(LIMITS), None);
    assert_eq!(rig.ledger.cells.len(), 0);
}

#[test]
fn the_fence_goes_only_to_whom_read_it_last() {
    let mut ledger = LedgerState::default();
    let (early, late) = (ledger.fence.clone(), ledger.fence.clone());
    let (a, b) = (TermId::from_random(1, 1), TermId::from_random(2, 2));
    assert_eq!(ledger.take_fence(&late, &b), basal_ipam::ledger::FenceAnswer::Taken);
    assert_eq!(ledger.take_fence(&early, &a), basal_ipam::ledger::FenceAnswer::Lost);
    assert!(ledger.fence.holds(&b) && !ledger.fence.holds(&a));
    assert!(!ledger.fence.is_sealed());
    let seal = TermId::seal(3, 3);
    assert_eq!(ledger.take_fence(&ledger.fence.clone(), &seal), basal_ipam::ledger::FenceAnswer::Taken);
    assert!(ledger.fence.is_sealed() && ledger.fence.holds(&seal));
}

#[test]
fn batches_keep_to_the_limits_and_changes_stay_whole() {
    let mut rig = Rig::new(dual(&["10.0.0.0/24", "10.1.0.0/24", "10.2.0.0/24"], 25, &["fd00::/104"], 120));
    for name in ["a", "b", "c", "d", "e"] {
        rig.grant(name).unwrap();
    }
    let sizes = |rig: &mut Rig, limits: Limits| {
        let mut sizes = Vec::new();
        while let Some(batch) = rig.allocator.next_batch(limits) {
            sizes.push(batch.swaps.len());
            let answer = rig.ledger.commit(&rig.allocator.term().clone(), &batch.swaps, limits);
            assert!(matches!(answer, SwapAnswer::Done(_)), "{answer:?}");
            rig.allocator.settle(batch.id, &answer, secs(0));
        }
        sizes
    };
    let mut narrow = rig.clone();
    // As many bytes as there are is enough, and one less is not.
    let batch = rig.clone().allocator.next_batch(LIMITS).unwrap();
    let bytes = batch.swaps.iter().map(|swap| swap.new.text_bound()).sum();
    assert_eq!(sizes(&mut rig.clone(), Limits { cells: 127, bytes }), [4]);
    assert_eq!(sizes(&mut rig.clone(), Limits { cells: 127, bytes: bytes - 1 }).len(), 2);
    // a and b in one /24, c and d in the next, e in the last; the IPv6 cell with each.
    assert_eq!(sizes(&mut narrow, Limits { cells: 2, bytes: 1 << 20 }), [2, 2, 2]);
    assert_eq!(sizes(&mut narrow.clone(), LIMITS), [] as [usize; 0]);
    assert_eq!(sizes(&mut rig.clone(), Limits { cells: 127, bytes: 1000 }), [2, 2, 2]);
    assert_eq!(sizes(&mut rig, LIMITS), [4]);

    // One that is too large for any batch goes out alone, and comes back refused.
    rig.grant("f").unwrap();
    let tiny = Limits { cells: 1, bytes: 1 };
    let batch = rig.allocator.next_batch(tiny).unwrap();
    let answer = rig.ledger.commit(&rig.allocator.term().clone(), &batch.swaps, tiny);
    assert!(matches!(answer, SwapAnswer::Refused(SwapRefusal::Batch(_))));
    assert_eq!(rig.allocator.settle(batch.id, &answer, secs(0)).undone, [node("f")].into());
}

#[test]
fn an_answer_to_another_batch_changes_nothing() {
    let mut rig = Rig::new(ipv4(&["10.0.0.0/16"], 24));
    rig.grant("a").unwrap();
    let first = rig.allocator.next_batch(LIMITS).unwrap();
    let answer = rig.commit(&first);
    rig.allocator.settle(first.id, &answer, secs(0));
    let before = rig.allocator.clone();
    rig.allocator.settle(first.id, &lost(), secs(0));
    assert_eq!(rig.allocator, before);
    assert!(rig.allocator.grant(&node("a"), &uid("a"), secs(0)).unwrap().confirmed);
    // Nor does it once the next one is under way.
    rig.grant("b").unwrap();
    let second = rig.allocator.next_batch(LIMITS).unwrap();
    rig.allocator.settle(first.id, &answer, secs(0));
    assert_eq!(rig.held("b"), [] as [&str; 0]);
    let answer = rig.commit(&second);
    assert_eq!(rig.allocator.settle(second.id, &answer, secs(0)).confirmed, [node("b")].into());
}

#[test]
fn a_batch_that_breaks_the_rules_is_refused() {
    let mut rig = Rig::new(ipv4(&["10.0.0.0/16"], 24));
    rig.grant("a").unwrap();
    let batch = rig.allocator.next_batch(LIMITS).unwrap();
    let term = rig.allocator.term().clone();
    let twice = [batch.swaps.clone(), batch.swaps.clone()].concat();
    for (swaps, limits, why) in [
        (vec![], LIMITS, "the batch does not fit the store of the ledger: it holds no cell"),
        (twice.clone(), LIMITS, "the batch does not fit the store of the ledger: it names cell 10.0.0.0/16 twice"),
        (
            twice,
            Limits { cells: 1, ..LIMITS },
            "the batch does not fit the store of the ledger: it holds 2 cells, and at most 1 go into one transaction",
        ),
    ] {
        match rig.ledger.commit(&term, &swaps, limits) {
            SwapAnswer::Refused(refusal) => assert_eq!(refusal.to_string(), why),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_guard_follows_what_its_own_term_writes() {
    let mut rig = Rig::new(dual(&["10.0.0.0/16"], 24, &["fd00::/104"], 120));
    rig.serve("a");
    let mut guard = rig.allocator.guard(&node("a")).unwrap();
    rig.grant("b").unwrap();
    let batch = rig.allocator.next_batch(LIMITS).unwrap();
    let SwapAnswer::Done(versions) = rig.commit(&batch) else { panic!("not written") };
    assert!(!rig.ledger.allows(&guard));
    guard.follow(&versions);
    assert!(rig.ledger.allows(&guard));
}

#[test]
fn an_operator_with_another_store_than_the_active_one_says_what_to_set() {
    for (active, configured, set) in [
        ("etcd", "custom-resources", "set kvstore to \"etcd\" in"),
        ("custom-resources", "etcd", "set kvstore to \"\" (none) in"),
    ] {
        let told = LedgerError::NotActive { active, configured }.to_string();
        assert!(told.contains(set), "{told}");
    }
}

#[test]
fn what_somebody_else_wrote_differs_and_what_is_under_way_does_not() {
    let mut rig = Rig::new(dual(&["10.0.0.0/16"], 24, &["fd00::/104"], 120));
    rig.serve("a");
    let before = rig.ledger.load();
    assert!(rig.allocator.differing(&before).is_empty());
    // A reading from before a write of one's own tells nothing.
    rig.serve("b");
    assert!(rig.allocator.differing(&before).is_empty());
    // Nor does one from between a write and its answer.
    rig.grant("c").unwrap();
    let batch = rig.allocator.next_batch(LIMITS).unwrap();
    let answer = rig.commit(&batch);
    assert!(rig.allocator.differing(&rig.ledger.load()).is_empty());
    let _settled = rig.allocator.settle(batch.id, &answer, secs(0));
    assert!(rig.allocator.differing(&rig.ledger.load()).is_empty());

    let (cell, _) = rig.ledger.cells.pop_first().unwrap();
    rig.ledger.revision += 1;
    assert_eq!(rig.allocator.differing(&rig.ledger.load()), [cell].into());
    rig.reload(secs(0));
    assert!(rig.allocator.differing(&rig.ledger.load()).is_empty());
    let stranger = rig.ledger.cells.values().next().unwrap().1.clone();
    let mut other = Rig::new(ipv4(&["10.9.0.0/16"], 24));
    other.serve("x");
    let (id, (_, strange)) = other.ledger.cells.pop_first().unwrap();
    rig.ledger.revision += 1;
    let version = basal_ipam::cell::Version(rig.ledger.revision);
    rig.ledger.cells.insert(id, (version, strange));
    rig.ledger.cells.insert(stranger.id(), (version, stranger.clone()));
    assert_eq!(rig.allocator.differing(&rig.ledger.load()), [id, stranger.id()].into());
}

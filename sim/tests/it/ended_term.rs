//! What a term leaves behind in custom resources: a mark, if nothing of it can come late, so that its successor has nothing
//! to stamp.

use basal_crds::resources::LEDGER_FINALIZER;
use basal_ipam::{
    cell::Version,
    ledger::{CellSwap, FenceAnswer, Ledger as _, SwapAnswer},
    names::TermId,
};
use basal_objects::{
    ledger::ObjectLedger,
    object::resources::{LEDGER, POD_CIDR_CELL},
    port::Refusal,
};
use basal_runtime::outcome::Outcome;
use basal_sim::objects::ModelObjects;
use futures::FutureExt as _;
use serde_json::{Value, json};

use crate::object_ledger::{CELL, Hooked, begin, cell, first, get, id, ledger, patch, server, swap, write};

/// The mark, and the resourceVersion of the cell.
async fn state(server: &ModelObjects) -> (Value, String) {
    let mark = get(server, LEDGER, "default").await.0["spec"]["ended"]["term"].clone();
    (mark, get(server, POD_CIDR_CELL, CELL).await.resource_version().to_owned())
}

/// A leader with one cell.
async fn led(ledger: &ObjectLedger, number: u64) -> (TermId, Version) {
    let term = begin(ledger, number).await;
    let version = write(ledger, &term, Version::ABSENT, first()).await;
    (term, version)
}

fn other() -> basal_ipam::cell::Cell {
    cell("10.0.0.0/16", "10.0.9.0/24", "b")
}

#[tokio::test(start_paused = true)]
async fn after_a_term_that_ended_nothing_is_stamped_but_after_the_next_which_did_not() {
    let server = server();
    let hooked = Hooked::new(&server);
    let (former, later) = (ledger(&server), hooked.ledger());
    let (term, _) = led(&former, 1).await;
    former.end(&term).await;
    let (mark, version) = state(&server).await;
    assert_eq!(mark, term.as_str());

    let second = begin(&later, 2).await;
    assert_eq!(state(&server).await, (mark.clone(), version.clone()), "nothing was stamped");
    assert!(later.load().await.unwrap().fence.holds(&second));
    let written = write(&later, &second, Version(version.parse().unwrap()), other()).await;
    let again = write(&later, &second, written, first()).await;
    assert_eq!(hooked.patches_of_cells(), 3, "a cell is stamped before it is written for the first time");

    // The mark of the first term does not speak for the second, whose process was killed.
    let third = begin(&ledger(&server), 3).await;
    let (still, version) = state(&server).await;
    assert_eq!(still, mark);
    assert!(version.parse::<i64>().unwrap() > again.0, "stamped");
    assert_eq!(get(&server, POD_CIDR_CELL, CELL).await.0["spec"]["term"], third.as_str());
}

#[tokio::test(start_paused = true)]
async fn a_term_that_ended_speaks_for_those_before_it() {
    let server = server();
    let (first_leader, second_leader) = (ledger(&server), ledger(&server));
    led(&first_leader, 1).await;
    let prepared = get(&server, POD_CIDR_CELL, CELL).await;
    let second = begin(&second_leader, 2).await;
    second_leader.end(&second).await;
    let third = ledger(&server);
    begin(&third, 3).await;
    let loaded = third.load().await.unwrap();
    // What the first one had under way all the time.
    let late = patch(&server, POD_CIDR_CELL, &prepared, json!({ "spec": { "blocks": [] } })).await;
    assert!(matches!(late, Outcome::Refused(Refusal::Conflict(_))), "{late:?}");
    assert_eq!(third.load().await.unwrap().cells, loaded.cells);
}

#[tokio::test(start_paused = true)]
async fn what_a_spared_term_sent_is_worth_nothing_in_a_store_that_was_put_back() {
    let server = server();
    let former = ledger(&server);
    let (term, version) = led(&former, 1).await;
    former.end(&term).await;
    let before = get(&server, POD_CIDR_CELL, CELL).await;

    let hooked = Hooked::new(&server);
    let later = hooked.ledger();
    let second = begin(&later, 2).await;
    hooked.stall_after(1);
    let batch = [CellSwap { expected: version, new: other() }];
    assert_eq!(later.swap(&second, &batch).now_or_never(), None);
    // The write that is under way expects the version of the stamp, which no state before this term had.
    let sent = hooked.stalled().unwrap();
    assert_ne!(sent.resource_version, before.resource_version());
    assert_eq!(sent.resource_version, get(&server, POD_CIDR_CELL, CELL).await.resource_version());
}

#[tokio::test(start_paused = true)]
async fn a_note_that_somebody_puts_back_counts_for_nothing() {
    let server = server();
    let (former, later) = (ledger(&server), ledger(&server));
    let (term, _) = led(&former, 1).await;
    former.end(&term).await;
    let spec = get(&server, LEDGER, "default").await.0["spec"].clone();
    begin(&later, 2).await;
    let now = get(&server, LEDGER, "default").await;
    assert!(patch(&server, LEDGER, &now, json!({ "spec": spec })).await.is_done());
    let (mark, version) = state(&server).await;
    assert_eq!(mark, term.as_str());
    begin(&ledger(&server), 3).await;
    assert_ne!(state(&server).await.1, version, "stamped all the same");
}

#[tokio::test(start_paused = true)]
async fn a_term_with_a_write_that_nobody_answered_leaves_no_mark_until_it_cannot_get_in_any_more() {
    let server = server();
    let hooked = Hooked::new(&server);
    let former = hooked.ledger();
    let term = begin(&former, 1).await;
    hooked.mute_cells(true);
    assert!(matches!(swap(&former, &term, Version::ABSENT, first()).await, SwapAnswer::Unknown(_)));
    hooked.mute_cells(false);
    former.end(&term).await;
    assert_eq!(state(&server).await.0, Value::Null, "an unanswered create");
    let version = former.load().await.unwrap().cells[&id("10.0.0.0/16")].version;
    former.end(&term).await;
    assert_eq!(state(&server).await.0, term.as_str(), "it is there");

    let term = begin(&former, 2).await;
    let version = write(&former, &term, version, other()).await;
    hooked.mute_cells(true);
    assert!(matches!(swap(&former, &term, version, first()).await, SwapAnswer::Unknown(_)));
    hooked.mute_cells(false);
    // One that is refused says nothing of the one before.
    assert!(matches!(swap(&former, &term, version, first()).await, SwapAnswer::Conflict(_)));
    former.end(&term).await;
    assert_ne!(state(&server).await.0, term.as_str());
    let version = former.load().await.unwrap().cells[&id("10.0.0.0/16")].version;
    assert!(matches!(swap(&former, &term, Version(version.0 - 1), first()).await, SwapAnswer::Conflict(_)));
    former.end(&term).await;
    assert_eq!(state(&server).await.0, term.as_str(), "the cell is at a newer version, and a conflict is an answer");
}

#[tokio::test(start_paused = true)]
async fn nor_does_one_whose_write_nobody_waits_for() {
    let server = server();
    let hooked = Hooked::new(&server);
    let former = hooked.ledger();
    let (term, expected) = led(&former, 1).await;
    hooked.stall_after(0);
    let batch = [CellSwap { expected, new: other() }];
    // The first look stops within the patch, and drops the future.
    assert_eq!(former.swap(&term, &batch).now_or_never(), None);
    former.end(&term).await;
    assert_eq!(state(&server).await.0, Value::Null);
}

#[tokio::test(start_paused = true)]
async fn nor_does_one_that_lost_the_fence_or_never_had_all_of_it() {
    let server = server();
    let (former, later) = (ledger(&server), ledger(&server));
    let (term, _) = led(&former, 1).await;
    begin(&later, 2).await;
    former.end(&term).await;
    assert_eq!(state(&server).await.0, Value::Null, "the fence is another one's");

    let hooked = Hooked::new(&server);
    let third = hooked.ledger();
    let (seen, term) = (third.begin().await.unwrap(), TermId::from_random(3, 0));
    hooked.mute_cells(true);
    // The fence holds the term, and of the stamp no answer came.
    assert_ne!(third.take_fence(&seen, &term).await, FenceAnswer::Taken);
    hooked.mute_cells(false);
    assert_eq!(get(&server, LEDGER, "default").await.0["spec"]["term"], term.as_str());
    third.end(&term).await;
    assert_eq!(state(&server).await.0, Value::Null);
}

#[tokio::test(start_paused = true)]
async fn a_finalizer_that_somebody_took_away_comes_back_all_the_same() {
    let server = server();
    let ledger = ledger(&server);
    let (term, _) = led(&ledger, 1).await;
    ledger.end(&term).await;
    let seen = get(&server, POD_CIDR_CELL, CELL).await;
    assert!(patch(&server, POD_CIDR_CELL, &seen, json!({ "metadata": { "finalizers": null } })).await.is_done());
    begin(&ledger, 2).await;
    let cell = get(&server, POD_CIDR_CELL, CELL).await;
    assert_eq!(cell.0["metadata"]["finalizers"], json!([LEDGER_FINALIZER]));
    assert_eq!(ledger.load().await.unwrap().cells[&id("10.0.0.0/16")].cell, Ok(first()));
}

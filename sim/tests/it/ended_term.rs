//! What a term leaves behind in custom resources: a mark, if nothing of it can come late, so that its successor has nothing
//! to stamp.

use basal_crds::resources::LEDGER_FINALIZER;
use basal_ipam::{
    cell::Version,
    ledger::{CellSwap, Ledger as _, SwapAnswer},
    names::TermId,
};
use basal_objects::{
    ledger::ObjectLedger,
    object::resources::{LEDGER, POD_CIDR_CELL},
};
use basal_sim::objects::ModelObjects;
use futures::FutureExt as _;
use serde_json::{Value, json};

use crate::object_ledger::{CELL, Hooked, begin, cell, first, get, id, ledger, patch, server, swap, write};

/// The mark, and the resourceVersion of the cell.
async fn state(server: &ModelObjects) -> (Value, String) {
    let mark = get(server, LEDGER, "default").await.0["spec"]["endedTerm"].clone();
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
    let (former, later) = (ledger(&server), ledger(&server));
    let (term, _) = led(&former, 1).await;
    former.end(&term).await;
    let (mark, version) = state(&server).await;
    assert_eq!(mark, term.as_str());

    let second = begin(&later, 2).await;
    assert_eq!(state(&server).await, (mark.clone(), version.clone()), "nothing was stamped");
    assert!(later.load().await.unwrap().fence.holds(&second));
    let stamped = Version(version.parse().unwrap());
    let written = write(&later, &second, stamped, other()).await;

    // The mark of the first term does not speak for the second, whose process was killed.
    let third = begin(&ledger(&server), 3).await;
    let (still, version) = state(&server).await;
    assert_eq!(still, mark);
    assert!(version.parse::<i64>().unwrap() > written.0, "stamped");
    assert_eq!(get(&server, POD_CIDR_CELL, CELL).await.0["spec"]["term"], third.as_str());
}

#[tokio::test(start_paused = true)]
async fn a_term_with_a_write_that_nobody_answered_leaves_no_mark() {
    let server = server();
    let hooked = Hooked::new(&server);
    let former = hooked.ledger();
    let (term, version) = led(&former, 1).await;
    hooked.mute(true);
    assert!(matches!(swap(&former, &term, version, other()).await, SwapAnswer::Unknown(_)));
    hooked.mute(false);
    former.end(&term).await;
    assert_eq!(state(&server).await.0, Value::Null);
    // The next term of the process begins with a clean slate.
    let term = begin(&former, 2).await;
    former.end(&term).await;
    assert_eq!(state(&server).await.0, term.as_str());
}

#[tokio::test(start_paused = true)]
async fn nor_does_one_whose_write_nobody_waits_for() {
    let server = server();
    let hooked = Hooked::new(&server);
    let former = hooked.ledger();
    let (term, expected) = led(&former, 1).await;
    hooked.stall();
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
    hooked.mute(true);
    // The fence may hold the term, and no cell was stamped.
    assert_ne!(third.take_fence(&seen, &term).await, basal_ipam::ledger::FenceAnswer::Taken);
    hooked.mute(false);
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

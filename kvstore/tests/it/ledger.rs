//! The ledger in etcd beyond what the conformance suite of the port asks: pages, foreign keys, a replaced store, and
//! the look-up of a single claim.

use std::sync::Arc;

use basal_ipam::{
    cell::{Block, BlockState, Cell, CellError, CellId, Version},
    ledger::{CellSwap, FenceAnswer, Ledger, LedgerError, Mark, SwapAnswer, SwapRefusal},
    names::{NodeName, TermId},
    prefix::PodCidr,
};
use basal_kvstore::{
    kv::Kv,
    ledger::{ClaimError, EtcdLedger, LedgerKeys, OwnerError, look, own, read_claim, watch_claim},
};
use basal_sim::kv::ModelKv;
use futures::{FutureExt as _, StreamExt as _};

use crate::{
    real::{connect, plain},
    support::{delete, put, shared},
};

fn cidr(text: &str) -> PodCidr {
    text.parse().unwrap()
}

fn id(text: &str) -> CellId {
    CellId::new(cidr(text))
}

fn granted(node: &str) -> Block {
    Block { state: BlockState::Granted, node: NodeName::new(node).unwrap(), uid: None }
}

/// A cell of `pool` with one granted block.
fn cell(pool: &str, mask: u8, cell: &str, block: &str) -> Cell {
    let mut cell = Cell::new(id(cell), cidr(pool), mask).unwrap();
    cell.set(cidr(block), granted("a")).unwrap();
    cell
}

fn swap(new: Cell) -> CellSwap {
    CellSwap { expected: Version::ABSENT, new }
}

async fn begin(ledger: &EtcdLedger, number: u64) -> TermId {
    let (seen, term) = (ledger.begin().await.unwrap(), TermId::from_random(number, 0));
    assert_eq!(ledger.take_fence(&seen, &term).await, FenceAnswer::Taken);
    term
}

async fn write(ledger: &EtcdLedger, term: &TermId, cells: Vec<Cell>) {
    let answer = ledger.swap(term, &cells.into_iter().map(swap).collect::<Vec<_>>()).await;
    assert!(matches!(answer, SwapAnswer::Done(_)), "{answer:?}");
}

#[tokio::test(start_paused = true)]
async fn many_pages_are_read_as_one() {
    let model = ModelKv::new(1);
    let ledger = EtcdLedger::new(shared(&model), "default");
    let term = begin(&ledger, 1).await;
    for half in [0..100, 100..200] {
        let cells = half.map(|i| cell("10.0.0.0/8", 24, &format!("10.{i}.0.0/16"), &format!("10.{i}.0.0/24")));
        write(&ledger, &term, cells.collect()).await;
    }
    let loaded = ledger.load().await.unwrap();
    assert_eq!(loaded.cells.len(), 200);
    assert!(loaded.cells.values().all(|stored| stored.cell.as_ref().is_ok_and(|cell| cell.blocks().len() == 1)));
    assert!(loaded.fence.holds(&term));
    assert_eq!(loaded.strays, [] as [&str; 0]);
}

#[tokio::test(start_paused = true)]
async fn what_is_no_cell_is_named() {
    let model = ModelKv::new(1);
    let ledger = EtcdLedger::new(shared(&model), "default");
    let keys = ledger.keys().clone();
    put(&model, &keys.cell(id("10.0.0.0/16")), "{}").await;
    put(&model, &keys.cell(id("10.1.0.0/16")), r#"{"version":2}"#).await;
    put(&model, &format!("{}cells/ipv4/nonsense", keys.prefix()), "x").await;
    let mut watch = ledger.watch(Mark { store: 1, revision: 1 });
    let loaded = ledger.load().await.unwrap();
    assert!(matches!(loaded.cells[&id("10.0.0.0/16")].cell, Err(CellError::Unreadable(_))));
    assert_eq!(loaded.cells[&id("10.1.0.0/16")].cell, Err(CellError::UnknownFormat(2)));
    assert_eq!(loaded.strays, ["basal/ipam/v1/default/cells/ipv4/nonsense"]);
    for _ in 0..2 {
        let change = watch.next().await.unwrap().unwrap();
        assert!(matches!(change, basal_ipam::ledger::LedgerChange::Cell(_, stored) if stored.cell.is_err()));
    }
}

#[tokio::test(start_paused = true)]
async fn a_restored_snapshot_ends_the_term() {
    // Another cluster id, as `etcdutl snapshot restore` makes one; and the same one with a lower revision.
    for cluster_id in [2, 1] {
        let model = ModelKv::new(1);
        let ledger = EtcdLedger::new(shared(&model), "default");
        let term = begin(&ledger, 1).await;
        let snapshot = model.snapshot();
        write(&ledger, &term, vec![cell("10.0.0.0/8", 24, "10.0.0.0/16", "10.0.0.0/24")]).await;
        put(&model, "elsewhere", "x").await;
        ledger.load().await.unwrap();
        model.restore(&snapshot, cluster_id);
        // The fence in the snapshot is the term's own, so only the history tells.
        let late = swap(cell("10.0.0.0/8", 24, "10.1.0.0/16", "10.1.0.0/24"));
        let answer = ledger.swap(&term, &[late]).await;
        assert!(matches!(answer, SwapAnswer::StoreReplaced(_)), "{answer:?}");
        // It stays so for the whole term, even when the revision has caught up.
        for _ in 0..5 {
            put(&model, "elsewhere", "x").await;
        }
        assert!(matches!(ledger.read_fence().await, Err(LedgerError::StoreReplaced(_))));
        assert!(matches!(ledger.load().await, Err(LedgerError::StoreReplaced(_))));
        // The next term takes the store as it is.
        let term = begin(&ledger, 2).await;
        assert!(ledger.load().await.unwrap().fence.holds(&term));
    }
}

#[tokio::test(start_paused = true)]
async fn a_batch_larger_than_a_request_is_not_sent() {
    let model = ModelKv::new(1);
    let ledger = EtcdLedger::new(shared(&model), "default");
    let term = begin(&ledger, 1).await;
    let full = |index: u32| {
        let prefix = cidr("10.0.0.0/8").nth(16, u128::from(index));
        let mut cell = Cell::new(CellId::new(prefix), cidr("10.0.0.0/8"), 24).unwrap();
        for block in 0..4096 {
            cell.set(prefix.nth(28, block), granted(&"n".repeat(60))).unwrap();
        }
        cell
    };
    let before = model.header();
    let answer = ledger.swap(&term, &[swap(full(0)), swap(full(1))]).await;
    assert!(matches!(&answer, SwapAnswer::Refused(SwapRefusal::Batch(why)) if why.contains("bytes")), "{answer:?}");
    assert_eq!(model.header(), before);
    write(&ledger, &term, vec![full(0)]).await;
}

#[tokio::test(start_paused = true)]
async fn a_claim_is_found_without_knowing_its_cell() {
    let model = ModelKv::new(1);
    let kv = shared(&model);
    let ledger = EtcdLedger::new(shared(&model), "default");
    let term = begin(&ledger, 1).await;
    write(&ledger, &term, vec![cell("10.0.0.0/8", 24, "10.0.0.0/16", "10.0.3.0/24")]).await;
    let keys = LedgerKeys::new("default");
    let claim = read_claim(&kv, &keys, cidr("10.0.3.0/24")).await.unwrap();
    assert_eq!(claim.block, Some(granted("a")));
    assert_eq!(claim.cell.unwrap().0, id("10.0.0.0/16"));
    assert_eq!(claim.header, model.header());
    // A part of it, its neighbour, and a block of no cell at all.
    for (block, in_cell) in [("10.0.3.0/25", true), ("10.0.4.0/24", true), ("10.7.0.0/24", false)] {
        let claim = read_claim(&kv, &keys, cidr(block)).await.unwrap();
        assert_eq!((claim.block, claim.cell.is_some()), (None, in_cell), "{block}");
    }
    // Two cells around one block: nothing is known.
    put(&model, &keys.cell(id("10.0.0.0/12")), &text(&Cell::new(id("10.0.0.0/12"), cidr("10.0.0.0/8"), 20).unwrap()))
        .await;
    let error = read_claim(&kv, &keys, cidr("10.0.3.0/24")).await.unwrap_err();
    assert!(matches!(error, ClaimError::Cell { error: CellError::OverlapsCell(_), .. }), "{error}");
    put(&model, &keys.cell(id("10.0.0.0/16")), "x").await;
    let error = read_claim(&kv, &keys, cidr("10.0.3.0/24")).await.unwrap_err();
    assert!(matches!(error, ClaimError::Cell { error: CellError::Unreadable(_), .. }), "{error}");
}

#[tokio::test(start_paused = true)]
async fn a_claim_is_followed_and_its_neighbours_are_not() {
    let model = ModelKv::new(1);
    let kv = shared(&model);
    let keys = LedgerKeys::new("default");
    let mut contents = cell("10.0.0.0/8", 24, "10.0.0.0/16", "10.0.3.0/24");
    let key = keys.cell(id("10.0.0.0/16"));
    let block = cidr("10.0.3.0/24");
    // What it was before it was read is no news.
    put(&model, &key, &text(&contents.emptied())).await;
    put(&model, &key, &text(&contents)).await;
    let seen = read_claim(&kv, &keys, block).await.unwrap();
    let mut claims = watch_claim(&kv, &keys, block, &seen);
    contents.set(cidr("10.0.4.0/24"), granted("b")).unwrap();
    put(&model, &key, &text(&contents)).await;
    // Another cell whose key begins alike.
    put(&model, &format!("{key}0"), "x").await;
    assert!(claims.next().now_or_never().is_none(), "a neighbour's claim is none of ours");
    let resting = Block { state: BlockState::Quarantined, ..granted("a") };
    contents.set(block, resting.clone()).unwrap();
    put(&model, &key, &text(&contents)).await;
    assert_eq!(claims.next().await.unwrap().unwrap(), Some(resting));
    put(&model, &key, "x").await;
    let error = claims.next().await.unwrap().unwrap_err();
    assert!(matches!(error, ClaimError::Cell { error: CellError::Unreadable(_), .. }), "{error}");
    delete(&model, &key).await;
    assert_eq!(claims.next().await.unwrap().unwrap(), None);
    model.cut_watches();
    let error = claims.next().await.unwrap().unwrap_err();
    assert!(matches!(error, ClaimError::Ledger(LedgerError::Unavailable(_))), "{error}");
    assert!(claims.next().await.is_none(), "the caller looks again");
    let nowhere = read_claim(&kv, &keys, cidr("10.9.0.0/24")).await.unwrap();
    assert!(watch_claim(&kv, &keys, cidr("10.9.0.0/24"), &nowhere).next().now_or_never().is_none());
}

fn text(cell: &Cell) -> String {
    String::from_utf8(cell.to_json().unwrap()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_real_etcd_finds_the_longest_ipv6_claim() {
    let etcd = plain();
    let kv: Arc<dyn Kv> = Arc::new(connect(&etcd, "ledger").await);
    let ledger = EtcdLedger::new(Arc::clone(&kv), "default");
    let term = begin(&ledger, 1).await;
    write(&ledger, &term, vec![cell("fd00::/16", 64, "fd00::/56", "fd00::7/128")]).await;
    // 129 keys are asked for: more than one transaction takes.
    let claim = read_claim(&kv, ledger.keys(), cidr("fd00::7/128")).await.unwrap();
    assert_eq!(claim.block, Some(granted("a")));
}

#[tokio::test(start_paused = true)]
async fn a_ledger_is_that_of_one_kubernetes_cluster() {
    let (kv, keys) = (ModelKv::new(1), LedgerKeys::new("default"));
    look(&kv, &keys, "one").await.unwrap();
    assert!(kv.contents().is_empty(), "a look writes nothing");
    own(&kv, &keys, "one").await.unwrap();
    let revision = kv.header().revision;
    own(&kv, &keys, "one").await.unwrap();
    assert_eq!(kv.header().revision, revision);
    assert!(matches!(look(&kv, &keys, "two").await, Err(OwnerError::Another { .. })));
    let error = own(&kv, &keys, "two").await.unwrap_err();
    let key = keys.owner();
    assert_eq!(error, OwnerError::Another { key: key.clone(), owner: "one".into(), asking: "two".into() });
    assert!(error.to_string().contains("cluster-name"), "{error}");
    own(&kv, &LedgerKeys::new("other"), "two").await.unwrap();
    put(&kv, &key, "two").await;
    own(&kv, &keys, "two").await.unwrap();
}

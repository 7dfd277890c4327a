//! The ledger in etcd beyond what the conformance suite of the port asks: an etcd that was put back, and keys that somebody
//! deletes.

use std::sync::Arc;

use basal_ipam::{
    cell::{Block, BlockState, Cell, CellId, Version},
    ledger::{CellSwap, FenceAnswer, Ledger, LedgerError, SwapAnswer},
    names::{NodeName, TermId},
    prefix::PodCidr,
};
use basal_kvstore::{
    kv::{Keys, Kv as _, Op, Txn},
    ledger::{EtcdLedger, LedgerKeys},
};
use basal_sim::kv::ModelKv;

fn cidr(text: &str) -> PodCidr {
    text.parse().unwrap()
}

fn id() -> CellId {
    CellId::new(cidr("10.0.0.0/16"))
}

/// The cell with so many granted blocks.
fn cell(blocks: u8) -> Cell {
    let mut cell = Cell::new(id(), cidr("10.0.0.0/8"), 24).unwrap();
    for block in 0..blocks {
        let granted = Block { state: BlockState::Granted, node: NodeName::new("a").unwrap(), uid: None };
        cell.set(cidr(&format!("10.0.{block}.0/24")), granted).unwrap();
    }
    cell
}

async fn write(server: &ModelKv, op: Op) {
    assert!(server.txn(Txn { then: vec![op], ..Txn::default() }).await.is_done());
}

/// A term that wrote the cell twice.
async fn begun(server: &ModelKv) -> (EtcdLedger, TermId) {
    let ledger = EtcdLedger::new(Arc::new(server.clone()), "default");
    let seen = ledger.begin().await.unwrap();
    let term = TermId::from_random(1, 1);
    assert_eq!(ledger.take_fence(&seen, &term).await, FenceAnswer::Taken);
    let mut expected = Version::ABSENT;
    for blocks in 1..=2 {
        let answer = ledger.swap(&term, &[CellSwap { expected, new: cell(blocks) }]).await;
        let SwapAnswer::Done(versions) = answer else { panic!("{answer:?}") };
        expected = versions[&id()];
    }
    (ledger, term)
}

async fn replaced(ledger: &EtcdLedger) -> String {
    match ledger.load().await {
        Err(LedgerError::StoreReplaced(why)) => why,
        other => panic!("{other:?}"),
    }
}

/// The cluster id stays, the fence holds the term, and the revision has caught up: only the cell tells.
#[tokio::test]
async fn an_etcd_that_was_put_back_and_has_caught_up_ends_the_term() {
    let server = ModelKv::new(1);
    let (ledger, term) = begun(&server).await;
    server.roll_back(1, false);
    for _ in 0..5 {
        write(&server, Op::Put { key: "other".to_owned(), value: b"1".to_vec(), lease: 0 }).await;
    }
    assert!(ledger.read_fence().await.unwrap().holds(&term));
    assert!(replaced(&ledger).await.contains("cell 10.0.0.0/16 was at version"));
    // And it stays so until another term begins.
    assert!(matches!(ledger.read_fence().await, Err(LedgerError::StoreReplaced(_))));
    ledger.begin().await.unwrap();
    assert_eq!(ledger.load().await.unwrap().cells[&id()].cell, Ok(cell(1)));
}

/// As after `etcdutl snapshot restore`, with all that was written in it.
#[tokio::test]
async fn an_etcd_with_another_cluster_id_ends_the_term() {
    let server = ModelKv::new(1);
    let (ledger, _) = begun(&server).await;
    server.restore(&server.snapshot(), 2);
    assert_eq!(replaced(&ledger).await, "its cluster id was 1 and is 2");
}

#[tokio::test]
async fn an_etcd_that_is_put_back_before_the_fence_is_taken_is_noticed() {
    let server = ModelKv::new(1);
    let (ledger, _) = begun(&server).await;
    ledger.begin().await.unwrap();
    server.roll_back(1, false);
    assert!(matches!(ledger.read_fence().await, Err(LedgerError::StoreReplaced(_))));
}

#[tokio::test]
async fn a_cell_that_somebody_deletes_ends_the_term() {
    let server = ModelKv::new(1);
    let (ledger, _) = begun(&server).await;
    write(&server, Op::Delete(Keys::One(LedgerKeys::new("default").cell(id())))).await;
    assert_eq!(replaced(&ledger).await, "the record of cell 10.0.0.0/16 was deleted");
}

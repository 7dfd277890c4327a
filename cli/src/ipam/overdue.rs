//! Which blocks rest longer than they need, told from etcd's own history.
//!
//! A cell holds no times, and the leader's clock is in no store. But every minute the leader writes the time into the
//! heartbeat, so a revision of etcd has a time: the one in the heartbeat as it was then. A block that was in quarantine
//! so long ago under the same term, and still is, should be free.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use basal_crds::kvstore::keys::HEARTBEAT;
use basal_ipam::{
    cell::{Block, BlockState, Cell},
    ledger::Loaded,
    prefix::PodCidr,
};
use basal_kvstore::{
    kv::{KeyValue, Kv, KvError, Range, Revision},
    ledger::{LedgerKey, LedgerKeys},
    pages::{PAGE_SIZE, list_at},
    records::HEARTBEAT_INTERVAL,
};
use jiff::{SignedDuration, Timestamp};

use super::stores::blocks;

/// How much longer than the quarantine a block may rest: the leader frees it with its next batches.
const GRACE: Duration = Duration::from_secs(60);

/// Heartbeats may come in quick succession after changes of the leader.
const MORE_BEATS: u64 = 16;

/// The blocks that are overdue. None while etcd does not remember so far back.
pub(super) async fn overdue(
    kv: &dyn Kv,
    keys: &LedgerKeys,
    now: &Loaded,
    quarantine: Duration,
) -> Result<BTreeSet<PodCidr>, KvError> {
    let resting = |(_, block): &(PodCidr, &Block)| block.state == BlockState::Quarantined;
    if !blocks(now).any(|each| resting(&each)) {
        return Ok(BTreeSet::new());
    }
    let Some(moment) = moment_before(kv, quarantine + GRACE).await? else { return Ok(BTreeSet::new()) };
    let then = match list_at(kv, keys.prefix(), moment, PAGE_SIZE).await {
        Err(KvError::Compacted { .. }) => return Ok(BTreeSet::new()),
        listed => listed?.kvs,
    };
    let fence = then.iter().find(|kv| keys.parse(&kv.key) == Some(LedgerKey::Fence));
    // Another leader has begun to count anew.
    if fence.is_none_or(|fence| now.fence.value.as_deref().map(str::as_bytes) != Some(&fence.value)) {
        return Ok(BTreeSet::new());
    }
    let mut rested = BTreeMap::new();
    for cell in then.iter().filter_map(|kv| cell(keys, kv)) {
        rested.extend(cell.blocks().iter().map(|(at, block)| (*at, block.clone())));
    }
    let overdue = blocks(now).filter(resting).filter(|(at, block)| rested.get(at) == Some(*block));
    Ok(overdue.map(|(at, _)| at).collect())
}

fn cell(keys: &LedgerKeys, kv: &KeyValue) -> Option<Cell> {
    match keys.parse(&kv.key)? {
        LedgerKey::Cell(id) => Cell::from_json(id, &kv.value).ok(),
        LedgerKey::Fence | LedgerKey::Owner => None,
    }
}

/// The newest revision of a heartbeat that came so long before the last one.
async fn moment_before(kv: &dyn Kv, age: Duration) -> Result<Option<Revision>, KvError> {
    let Some((mut revision, newest)) = heartbeat(kv, 0).await? else { return Ok(None) };
    let beats = age.as_secs() / HEARTBEAT_INTERVAL.as_secs() + MORE_BEATS;
    for _ in 0..beats {
        let Some((earlier, at)) = heartbeat(kv, revision - 1).await? else { return Ok(None) };
        if newest.duration_since(at) >= SignedDuration::try_from(age).unwrap_or(SignedDuration::MAX) {
            return Ok(Some(earlier));
        }
        revision = earlier;
    }
    Ok(None)
}

/// The heartbeat as it was at a revision, 0 for now: when it was written, by etcd's count and by the leader's clock.
async fn heartbeat(kv: &dyn Kv, revision: Revision) -> Result<Option<(Revision, Timestamp)>, KvError> {
    let answer = match kv.range(Range { revision, ..Range::one(HEARTBEAT) }).await {
        Err(KvError::Compacted { .. }) => return Ok(None),
        answer => answer?,
    };
    let beat = answer.kvs.first().and_then(|kv| {
        let at = std::str::from_utf8(&kv.value).ok()?.parse().ok()?;
        Some((kv.mod_revision, at))
    });
    Ok(beat)
}

#[cfg(test)]
mod tests {
    use basal_ipam::{
        cell::CellId,
        ledger::Ledger as _,
        names::{NodeName, TermId},
    };
    use basal_kvstore::{
        kv::{Op, Txn},
        ledger::EtcdLedger,
    };
    use basal_sim::kv::ModelKv;

    use super::*;

    const QUARANTINE: Duration = Duration::from_secs(300);

    async fn put(kv: &ModelKv, key: &str, value: Vec<u8>) {
        let put = Op::Put { key: key.to_owned(), value, lease: 0 };
        assert!(kv.txn(Txn { then: vec![put], ..Txn::default() }).await.is_done());
    }

    async fn beat(kv: &ModelKv, minute: u32) {
        put(kv, HEARTBEAT, format!("2026-03-01T12:{minute:02}:00Z").into_bytes()).await;
    }

    async fn rest(kv: &ModelKv, keys: &LedgerKeys, blocks: &[(&str, BlockState)]) {
        let id = CellId::new("10.0.0.0/16".parse().unwrap());
        let mut cell = Cell::new(id, "10.0.0.0/8".parse().unwrap(), 24).unwrap();
        for (at, state) in blocks {
            let block = Block { state: *state, node: NodeName::new("n1").unwrap(), uid: None };
            cell.set(at.parse().unwrap(), block).unwrap();
        }
        put(kv, &keys.cell(id), cell.to_json().unwrap()).await;
    }

    async fn found(kv: &ModelKv, keys: &LedgerKeys) -> Vec<String> {
        let ledger = EtcdLedger::new(std::sync::Arc::new(kv.clone()), "default");
        let now = ledger.load().await.unwrap();
        overdue(kv, keys, &now, QUARANTINE).await.unwrap().iter().map(ToString::to_string).collect()
    }

    /// One block rests from minute 0 on, another from minute 4 on.
    async fn until(minute: u32) -> (ModelKv, LedgerKeys) {
        use BlockState::{Granted, Quarantined};
        let (kv, keys) = (ModelKv::new(1), LedgerKeys::new("default"));
        put(&kv, &keys.fence(), TermId::from_random(1, 1).as_str().into()).await;
        rest(&kv, &keys, &[("10.0.0.0/24", Quarantined), ("10.0.1.0/24", Granted)]).await;
        for now in 0..=minute {
            beat(&kv, now).await;
            if now == 4 {
                rest(&kv, &keys, &[("10.0.0.0/24", Quarantined), ("10.0.1.0/24", Quarantined)]).await;
            }
        }
        (kv, keys)
    }

    #[tokio::test(start_paused = true)]
    async fn a_block_is_overdue_a_while_after_its_quarantine_under_one_term() {
        let (kv, keys) = until(5).await;
        assert_eq!(found(&kv, &keys).await, [] as [&str; 0]);
        let (kv, keys) = until(6).await;
        assert_eq!(found(&kv, &keys).await, ["10.0.0.0/24"]);
        let (kv, keys) = until(20).await;
        assert_eq!(found(&kv, &keys).await, ["10.0.0.0/24", "10.0.1.0/24"]);
        // Another leader counts anew.
        put(&kv, &keys.fence(), TermId::from_random(2, 2).as_str().into()).await;
        assert_eq!(found(&kv, &keys).await, [] as [&str; 0]);
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_is_said_of_what_etcd_has_forgotten() {
        let (kv, keys) = until(20).await;
        kv.compact(kv.header().revision).unwrap();
        assert_eq!(found(&kv, &keys).await, [] as [&str; 0]);
    }
}

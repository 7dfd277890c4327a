//! Both of etcd's prefixes as streams without a gap: a watch that breaks goes on after the last change that it told.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use basal_ipam::{
    ledger::{Ledger, LedgerChange, LedgerError, Loaded, Mark},
    prefix::PodCidr,
};
use basal_kvstore::{
    kv::{KeyValue, Kv, KvError, Revision, WatchBatch, WatchEvent},
    pages::{PAGE_SIZE, list},
};
use futures::{
    StreamExt as _,
    stream::{self, BoxStream},
};

use super::super::read;

/// Pause before a broken watch is tried again.
const PAUSE: Duration = Duration::from_millis(500);

/// A watch that breaks so often, while etcd answers, asks for what etcd has forgotten.
const ATTEMPTS: u32 = 3;

/// What a feed tells.
#[derive(Debug)]
pub(super) enum Told<C, A> {
    /// One change.
    Change(C),
    /// The watch broke, and why.
    Interrupted(String),
    /// It goes on where it broke.
    Resumed,
    /// It could not go on: this is the state now, and what was in between is lost.
    Lost(A),
}

/// Node records, by node.
pub(super) type Records = BTreeMap<String, (Revision, Vec<PodCidr>)>;

/// A record that was written, or is gone.
pub(super) type RecordChange = (String, Option<(Revision, Vec<PodCidr>)>);

type LedgerStream = BoxStream<'static, Result<LedgerChange, LedgerError>>;

struct Cells {
    ledger: Arc<dyn Ledger>,
    mark: Mark,
    stream: Option<LedgerStream>,
    broke: u32,
}

/// Every change of the ledger after a moment.
pub(super) fn cells(ledger: Arc<dyn Ledger>, after: Mark) -> BoxStream<'static, Told<LedgerChange, Loaded>> {
    let stream = Some(ledger.watch(after));
    let cells = Cells { ledger, mark: after, stream, broke: 0 };
    stream::unfold(cells, |mut cells| async move {
        let told = cells.next().await;
        Some((told, cells))
    })
    .boxed()
}

impl Cells {
    async fn next(&mut self) -> Told<LedgerChange, Loaded> {
        if let Some(stream) = &mut self.stream {
            let why = match stream.next().await {
                Some(Ok(change)) => {
                    self.broke = 0;
                    self.mark.revision = self.mark.revision.max(revision(&change));
                    return Told::Change(change);
                }
                Some(Err(error)) => error.to_string(),
                None => "the watch ended".to_owned(),
            };
            self.stream = None;
            self.broke += 1;
            return Told::Interrupted(why);
        }
        loop {
            tokio::time::sleep(PAUSE).await;
            match self.ledger.read_fence().await {
                Ok(_) if self.broke < ATTEMPTS => {
                    self.stream = Some(self.ledger.watch(self.mark));
                    return Told::Resumed;
                }
                Ok(_) | Err(LedgerError::StoreReplaced(_)) => {
                    if let Some(loaded) = self.reload().await {
                        return Told::Lost(loaded);
                    }
                }
                // The claims are elsewhere, or nobody could be asked.
                Err(_) => {}
            }
        }
    }

    async fn reload(&mut self) -> Option<Loaded> {
        self.ledger.begin().await.ok()?;
        let loaded = self.ledger.load().await.ok()?;
        self.mark = loaded.mark;
        self.stream = Some(self.ledger.watch(self.mark));
        self.broke = 0;
        Some(loaded)
    }
}

/// The revision of a change; a cell that is gone does not say.
fn revision(change: &LedgerChange) -> Revision {
    match change {
        LedgerChange::Fence(fence) => fence.version.0,
        LedgerChange::Cell(_, stored) => stored.version.0,
        LedgerChange::CellGone(_) => 0,
    }
}

type KvStream = BoxStream<'static, Result<WatchBatch, KvError>>;

struct RecordFeed {
    kv: Arc<dyn Kv>,
    prefix: String,
    next: Revision,
    stream: Option<KvStream>,
    /// What came and was not told yet.
    waiting: Vec<RecordChange>,
    lost: bool,
}

/// Every change of the node records from a revision on.
pub(super) fn records(
    kv: Arc<dyn Kv>,
    prefix: String,
    from: Revision,
) -> BoxStream<'static, Told<RecordChange, Records>> {
    let stream = Some(kv.watch(&prefix, from));
    let feed = RecordFeed { kv, prefix, next: from, stream, waiting: Vec::new(), lost: false };
    stream::unfold(feed, |mut feed| async move {
        let told = feed.next().await;
        Some((told, feed))
    })
    .boxed()
}

impl RecordFeed {
    async fn next(&mut self) -> Told<RecordChange, Records> {
        loop {
            if let Some(change) = self.waiting.pop() {
                return Told::Change(change);
            }
            let Some(stream) = &mut self.stream else { return self.resume().await };
            let why = match stream.next().await {
                Some(Ok(batch)) => {
                    self.next = self.next.max(batch.header.revision + 1);
                    self.waiting = batch.events.iter().rev().map(|event| change(&self.prefix, event)).collect();
                    continue;
                }
                Some(Err(error)) => {
                    self.lost |= matches!(error, KvError::Compacted { .. });
                    error.to_string()
                }
                None => "the watch ended".to_owned(),
            };
            self.stream = None;
            return Told::Interrupted(why);
        }
    }

    async fn resume(&mut self) -> Told<RecordChange, Records> {
        loop {
            tokio::time::sleep(PAUSE).await;
            let Ok(listed) = list(self.kv.as_ref(), &self.prefix, PAGE_SIZE, false).await else { continue };
            // An older snapshot of etcd was restored, or its history is gone.
            let lost = std::mem::take(&mut self.lost) || listed.header.revision + 1 < self.next;
            if lost {
                self.next = listed.header.revision + 1;
            }
            self.stream = Some(self.kv.watch(&self.prefix, self.next));
            let all = || listed.kvs.iter().map(|kv| (name(&self.prefix, &kv.key), seen(kv))).collect();
            return if lost { Told::Lost(all()) } else { Told::Resumed };
        }
    }
}

fn name(prefix: &str, key: &str) -> String {
    key.strip_prefix(prefix).unwrap_or(key).to_owned()
}

/// What a record says. One that cannot be read gives nobody anything.
pub(super) fn seen(kv: &KeyValue) -> (Revision, Vec<PodCidr>) {
    (kv.mod_revision, read::record(kv).map(|record| record.blocks).unwrap_or_default())
}

fn change(prefix: &str, event: &WatchEvent) -> RecordChange {
    match event {
        WatchEvent::Put(kv) => (name(prefix, &kv.key), Some(seen(kv))),
        WatchEvent::Delete { key, .. } => (name(prefix, key), None),
    }
}

//! The ledger in etcd.
//!
//! A cell is a key, its version the key's ModRevision, and a swap one transaction that compares each of them and the
//! *value* of the fence. Nothing here has a lease: claims outlive every process.

mod claim;
mod keys;
mod owner;

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use async_trait::async_trait;
use basal_ipam::{
    cell::{Cell, CellId, Version},
    ledger::{
        CellSwap, FenceAnswer, FenceSeen, Ledger, LedgerChange, LedgerError, Limits, Loaded, Mark, SeenCells,
        StoredCell, SwapAnswer, SwapRefusal, check_batch,
    },
    names::TermId,
};
use basal_runtime::outcome::Outcome;
use futures::{
    StreamExt as _,
    stream::{self, BoxStream},
};

pub use self::{
    claim::{ClaimError, ClaimSeen, read_claim, watch_claim},
    keys::{LedgerKey, LedgerKeys},
    owner::{OwnerError, look, own},
};
use crate::kv::{
    Compare, Header, Is, KeyValue, Keys, Kv, KvError, KvRefusal, MAX_TXN_OPS, Op, OpAnswer, Range, Txn, TxnAnswer,
    WatchEvent,
};

/// One of the conditions is the fence's.
const MAX_CELLS: usize = MAX_TXN_OPS - 1;

/// etcd takes 1.5 MiB in a request by default (`--max-request-bytes`); the rest is for keys and conditions.
const MAX_BYTES: usize = 1 << 20;

/// Cells in a page of a list: some 2 MB when each is full of /24s.
const PAGE: i64 = 64;

/// The ledger of one cluster in etcd.
///
/// It remembers the newest header that it saw since the term began, and the newest version of each cell. A header of another
/// etcd cluster, a revision older than one seen before the request was sent, or a cell that is older than it was tells that
/// the store was replaced or restored. So does a cell that is gone: claims in it are read from CiliumNodes again, by the term
/// that comes next, and never taken for none.
pub struct EtcdLedger {
    kv: Arc<dyn Kv>,
    keys: LedgerKeys,
    history: Mutex<History>,
}

/// What was seen of the store during a term.
#[derive(Debug, Clone, Default)]
struct History {
    newest: Option<Header>,
    cells: SeenCells,
    /// Why the store is not what it was.
    replaced: Option<String>,
}

impl EtcdLedger {
    /// The ledger of a cluster, by its name.
    #[must_use]
    pub fn new(kv: Arc<dyn Kv>, cluster: &str) -> Self {
        Self { kv, keys: LedgerKeys::new(cluster), history: Mutex::default() }
    }

    /// Its keys.
    #[must_use]
    pub fn keys(&self) -> &LedgerKeys {
        &self.keys
    }

    fn history(&self) -> MutexGuard<'_, History> {
        self.history.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn newest(&self) -> Option<Header> {
        self.history().newest
    }

    /// Notes the header of an answer. `before` is what was known when the request was sent: answers may overtake
    /// each other, so a lower revision than the newest one proves nothing.
    fn note(&self, before: Option<Header>, header: Header) -> Result<(), String> {
        let mut history = self.history();
        if history.replaced.is_none() {
            history.replaced = compare_headers(before, header).err();
        }
        if let Some(why) = &history.replaced {
            return Err(why.clone());
        }
        if history.newest.is_none_or(|newest| newest.revision < header.revision) {
            history.newest = Some(header);
        }
        Ok(())
    }

    async fn fence(&self) -> Result<(Header, FenceSeen), LedgerError> {
        let answer = self.kv.range(Range::one(self.keys.fence())).await.map_err(|error| read_failed(&error))?;
        Ok((answer.header, answer.kvs.first().map(fence_seen).unwrap_or_default()))
    }

    fn stored(id: CellId, kv: &KeyValue) -> StoredCell {
        StoredCell { version: Version(kv.mod_revision), cell: Cell::from_json(id, &kv.value) }
    }

    /// Why the conditions of a swap did not hold, from the reads in its other branch.
    fn failure(&self, term: &TermId, batch: &[CellSwap], answer: TxnAnswer) -> SwapAnswer {
        let mut reads = answer.answers.into_iter().map(|answer| match answer {
            OpAnswer::Get(range) => range.kvs.into_iter().next(),
            OpAnswer::Put | OpAnswer::Delete(_) => None,
        });
        let fence = reads.next().flatten().map(|kv| kv.value);
        if fence.as_deref() != Some(term.as_str().as_bytes()) {
            return SwapAnswer::FenceLost;
        }
        let stale = batch
            .iter()
            .zip(reads)
            .filter(|(swap, read)| read.as_ref().map_or(0, |kv| kv.mod_revision) != swap.expected.0)
            .map(|(swap, _)| swap.new.id())
            .collect();
        SwapAnswer::Conflict(stale)
    }

    /// The transaction of a swap.
    fn transaction(&self, term: &TermId, batch: &[CellSwap]) -> Result<Txn, SwapRefusal> {
        let mut txn = Txn {
            when: vec![self.keys.fence_holds(term.as_str())],
            then: Vec::with_capacity(batch.len()),
            or_else: vec![Op::Get(Range::one(self.keys.fence()))],
        };
        for swap in batch {
            let key = self.keys.cell(swap.new.id());
            let value = swap.new.to_json().map_err(|error| SwapRefusal::Batch(error.to_string()))?;
            txn.when.push(Compare::new(key.clone(), Is::ModRevision(swap.expected.0)));
            txn.or_else.push(Op::Get(Range { keys_only: true, ..Range::one(key.clone()) }));
            txn.then.push(Op::Put { key, value, lease: 0 });
        }
        Ok(txn)
    }

    /// Reads every page of the ledger as it was at the first page's revision.
    async fn list(&self) -> Result<(Header, Vec<KeyValue>), LedgerError> {
        let before = self.newest();
        let prefix = self.keys.prefix();
        let mut range = Range { limit: PAGE, ..Range::prefix(prefix) };
        let mut kvs: Vec<KeyValue> = Vec::new();
        let mut first: Option<Header> = None;
        loop {
            let page = self.kv.range(range.clone()).await.map_err(|error| read_failed(&error))?;
            self.note(before, page.header).map_err(LedgerError::StoreReplaced)?;
            let header = *first.get_or_insert(page.header);
            compare_headers(Some(header), page.header).map_err(LedgerError::StoreReplaced)?;
            kvs.extend(page.kvs);
            match kvs.last() {
                Some(last) if page.more => {
                    range.keys = Keys::PrefixFrom { prefix: prefix.to_owned(), from: format!("{}\0", last.key) };
                    range.revision = header.revision;
                }
                _ => return Ok((header, kvs)),
            }
        }
    }
}

/// Whether a later answer can come from the same history as an earlier one.
fn compare_headers(earlier: Option<Header>, later: Header) -> Result<(), String> {
    match earlier {
        Some(earlier) if earlier.cluster_id != later.cluster_id => {
            Err(format!("its cluster id was {:x} and is {:x}", earlier.cluster_id, later.cluster_id))
        }
        Some(earlier) if later.revision < earlier.revision => {
            Err(format!("its revision was {} and is {}", earlier.revision, later.revision))
        }
        _ => Ok(()),
    }
}

fn read_failed(error: &KvError) -> LedgerError {
    match error {
        KvError::Denied(_) => LedgerError::Denied(error.to_string()),
        KvError::Compacted { .. } | KvError::LeaseNotFound(_) | KvError::Unavailable(_) => {
            LedgerError::Unavailable(error.to_string())
        }
    }
}

fn read_refused(refusal: &KvRefusal) -> LedgerError {
    match refusal {
        KvRefusal::Denied(_) => LedgerError::Denied(refusal.to_string()),
        KvRefusal::LeaseNotFound(_) | KvRefusal::NoSpace(_) | KvRefusal::Invalid(_) | KvRefusal::Unavailable(_) => {
            LedgerError::Unavailable(refusal.to_string())
        }
    }
}

fn fence_seen(kv: &KeyValue) -> FenceSeen {
    FenceSeen { value: Some(String::from_utf8_lossy(&kv.value).into_owned()), version: Version(kv.mod_revision) }
}

fn mark(header: Header) -> Mark {
    Mark { store: header.cluster_id, revision: header.revision }
}

#[async_trait]
impl Ledger for EtcdLedger {
    async fn begin(&self) -> Result<FenceSeen, LedgerError> {
        let (header, seen) = self.fence().await?;
        *self.history() = History { newest: Some(header), ..History::default() };
        Ok(seen)
    }

    async fn read_fence(&self) -> Result<FenceSeen, LedgerError> {
        let before = self.newest();
        let (header, seen) = self.fence().await?;
        self.note(before, header).map_err(LedgerError::StoreReplaced)?;
        Ok(seen)
    }

    async fn take_fence(&self, seen: &FenceSeen, term: &TermId) -> FenceAnswer {
        let before = self.newest();
        let fence = self.keys.fence();
        let txn = Txn {
            when: vec![Compare::new(fence.clone(), Is::ModRevision(seen.version.0))],
            then: vec![Op::Put { key: fence, value: term.as_str().into(), lease: 0 }],
            or_else: Vec::new(),
        };
        match self.kv.txn(txn).await {
            Outcome::Done(answer) => match self.note(before, answer.header) {
                Err(why) => FenceAnswer::StoreReplaced(why),
                Ok(()) if answer.succeeded => FenceAnswer::Taken,
                Ok(()) => FenceAnswer::Lost,
            },
            Outcome::Refused(refusal) => FenceAnswer::Refused(SwapRefusal::Store(refusal.to_string())),
            Outcome::Unknown(why) => FenceAnswer::Unknown(why),
        }
    }

    async fn load(&self) -> Result<Loaded, LedgerError> {
        let (header, kvs) = self.list().await?;
        let mut loaded = Loaded { mark: mark(header), ..Loaded::default() };
        for kv in kvs {
            match self.keys.parse(&kv.key) {
                Some(LedgerKey::Fence) => loaded.fence = fence_seen(&kv),
                Some(LedgerKey::Owner) => {}
                Some(LedgerKey::Cell(id)) => {
                    loaded.cells.insert(id, Self::stored(id, &kv));
                }
                None => loaded.strays.push(kv.key),
            }
        }
        let mut history = self.history();
        if let Err(why) = history.cells.follow(&loaded) {
            history.replaced = Some(why.clone());
            return Err(LedgerError::StoreReplaced(why));
        }
        Ok(loaded)
    }

    fn watch(&self, after: Mark) -> BoxStream<'static, Result<LedgerChange, LedgerError>> {
        let keys = self.keys.clone();
        let begin = Header { cluster_id: after.store, revision: after.revision };
        self.kv
            .watch(self.keys.prefix(), after.revision + 1)
            .flat_map(move |batch| stream::iter(changes(&keys, begin, batch)))
            .boxed()
    }

    async fn swap(&self, term: &TermId, batch: &[CellSwap]) -> SwapAnswer {
        let txn = match check_batch(batch, self.limits()).and_then(|()| self.transaction(term, batch)) {
            Ok(txn) => txn,
            Err(refusal) => return SwapAnswer::Refused(refusal),
        };
        let before = self.newest();
        match self.kv.txn(txn).await {
            Outcome::Done(answer) => match self.note(before, answer.header) {
                Err(why) => SwapAnswer::StoreReplaced(why),
                Ok(()) if answer.succeeded => {
                    let version = Version(answer.header.revision);
                    let mut history = self.history();
                    batch.iter().for_each(|swap| history.cells.note(swap.new.id(), version));
                    SwapAnswer::Done(batch.iter().map(|swap| (swap.new.id(), version)).collect::<BTreeMap<_, _>>())
                }
                Ok(()) => self.failure(term, batch, answer),
            },
            Outcome::Refused(refusal) => SwapAnswer::Refused(SwapRefusal::Store(refusal.to_string())),
            Outcome::Unknown(why) => SwapAnswer::Unknown(why),
        }
    }

    fn limits(&self) -> Limits {
        Limits { cells: MAX_CELLS, bytes: MAX_BYTES }
    }
}

/// One batch of a watch as changes of the ledger.
fn changes(
    keys: &LedgerKeys,
    begin: Header,
    batch: Result<crate::kv::WatchBatch, KvError>,
) -> Vec<Result<LedgerChange, LedgerError>> {
    let batch = match batch {
        Ok(batch) => batch,
        Err(error) => return vec![Err(read_failed(&error))],
    };
    if batch.header.cluster_id != begin.cluster_id {
        let why = format!("its cluster id was {:x} and is {:x}", begin.cluster_id, batch.header.cluster_id);
        return vec![Err(LedgerError::StoreReplaced(why))];
    }
    let change = |event: WatchEvent| {
        Some(match (keys.parse(event.key())?, event) {
            (LedgerKey::Fence, WatchEvent::Put(kv)) => LedgerChange::Fence(fence_seen(&kv)),
            (LedgerKey::Fence, WatchEvent::Delete { .. }) => LedgerChange::Fence(FenceSeen::default()),
            (LedgerKey::Owner, _) => return None,
            (LedgerKey::Cell(id), WatchEvent::Put(kv)) => LedgerChange::Cell(id, EtcdLedger::stored(id, &kv)),
            (LedgerKey::Cell(id), WatchEvent::Delete { .. }) => LedgerChange::CellGone(id),
        })
    };
    batch.events.into_iter().filter_map(change).map(Ok).collect()
}

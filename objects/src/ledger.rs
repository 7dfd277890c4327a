//! The ledger in custom resources: a PodCIDRCell for each cell, its version the resourceVersion, and one Ledger with the
//! fence and the list of all cells.
//!
//! The API server writes one object at a time, so what etcd does in one transaction is done here in an order in which every
//! state between two writes is sound:
//!
//! - **The fence** is `spec.term` of the Ledger. Who takes it then *stamps* every cell with its term: a patch at the
//!   resourceVersion that was read, which makes every older resourceVersion worthless. Whoever led before looks at the
//!   fence first in each swap, so at most the one write that it had under way may still get in, and only into a cell that is
//!   not stamped yet: the stamp fails on it then, reads the cell again, and the new leader loads the claim with the rest.
//!   After [`Ledger::take_fence`] no swap of an earlier term changes a cell that was there. A term that ends with
//!   an answer to every write of a cell notes it in `spec.ended`: who takes the fence from it stamps a cell only before its
//!   own first write there. The note names the term, and the generation of the object that it made, so it is worth nothing
//!   once another term, of whatever version of Basal, took the fence, or somebody changed the specification.
//! - **A new cell** is first put on the list in the Ledger, at the resourceVersion at which the Ledger held this term, and then
//!   created. So two leaders with different masks never make cells that overlap, a create that comes late meets the cell of
//!   the successor (or is met by it: one name, one object), and a cell that is missing is told from one that never was.
//! - **A cell that is on the list and has no object** lost it. At the start of a term it is loaded as known and empty at
//!   [`Version::ABSENT`], and adoption fills it from what nodes carry before anything is granted. One that goes while the term
//!   lasts ends the term. Finalizers on both kinds keep a `kubectl delete` from getting that far: an object that waits for
//!   its finalizer is a cell like any other.
//!
//! The API server has no id of its own. The uid of the Ledger stands for it, and a resourceVersion that falls tells a
//! restored snapshot; either ends the term.

mod active;
mod fence;
mod format;
mod watch;

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard},
};

use async_trait::async_trait;
use basal_crds::resources::LedgerStore;
use basal_ipam::{
    cell::{CellId, Version},
    ledger::{
        CellSwap, FenceAnswer, FenceSeen, Ledger, LedgerChange, LedgerError, Limits, Loaded, Mark, SeenCells,
        StoredCell, SwapAnswer, SwapRefusal, check_batch,
    },
    names::TermId,
};
use basal_runtime::{outcome::Outcome, sync::lock};
use futures::stream::BoxStream;
use serde_json::{Value, json};

use self::{
    active::not_active,
    fence::Own,
    format::{FormatError, LedgerSeen, Sorted},
    watch::Follower,
};
pub use self::{
    active::{Asked, Standing, activate, asked, forget_left, key, standing, switch},
    format::{new_cell, read_cell, stored_cell},
};
use crate::{
    object::{
        Object, ObjectKey,
        resources::{LEDGER, POD_CIDR_CELL},
    },
    port::{Freshness, MergePatch, Objects, ReadError, Refusal, Scope},
};

/// etcd takes 1.5 MiB in a request by default; the rest is for metadata and managed fields.
const MAX_BYTES: usize = 1 << 20;

/// How often a write is made anew because somebody else changed the object in between. Those who may are few: annotations,
/// a status, the one write of a former leader.
const TRIES: usize = 8;

/// The ledger of one cluster in custom resources.
pub struct ObjectLedger {
    objects: Arc<dyn Objects>,
    cluster: String,
    role: Role,
    seen: Mutex<Seen>,
}

/// What the ledger is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    /// The active store.
    Active,
    /// Being filled while the claims are moved here.
    Filled,
}

/// What was seen of the store during a term.
#[derive(Debug, Clone, Default)]
struct Seen {
    /// The newest Ledger: its uid and version.
    ledger: Option<(String, Version)>,
    /// The fence at the last load.
    fence: FenceSeen,
    /// What the term wrote itself.
    own: Own,
    /// The newest list of cells.
    list: i64,
    /// The uids of cells that were there.
    uids: BTreeMap<CellId, String>,
    /// Their newest versions.
    cells: SeenCells,
    /// Why the store is not what it was.
    replaced: Option<String>,
}

/// What ends a sequence of writes early.
#[derive(Debug)]
enum Halt {
    FenceLost,
    Conflict,
    Refused(String),
    Unknown(String),
    Replaced(String),
}

impl From<LedgerError> for Halt {
    fn from(error: LedgerError) -> Self {
        match error {
            LedgerError::StoreReplaced(why) => Self::Replaced(why),
            // Nothing was written on such an answer.
            other => Self::Refused(other.to_string()),
        }
    }
}

impl From<FormatError> for Halt {
    /// The object was written; what it is like now has to be read.
    fn from(error: FormatError) -> Self {
        Self::Unknown(error.to_string())
    }
}

impl Halt {
    fn of_swap(self, id: CellId) -> SwapAnswer {
        match self {
            Self::FenceLost => SwapAnswer::FenceLost,
            Self::Conflict => SwapAnswer::Conflict([id].into()),
            Self::Refused(why) => SwapAnswer::Refused(SwapRefusal::Store(why)),
            Self::Unknown(why) => SwapAnswer::Unknown(why),
            Self::Replaced(why) => SwapAnswer::StoreReplaced(why),
        }
    }

    fn of_fence(self) -> FenceAnswer {
        match self {
            Self::FenceLost => FenceAnswer::Lost,
            Self::Conflict => FenceAnswer::Unknown("others kept changing the ledger meanwhile".to_owned()),
            Self::Refused(why) => FenceAnswer::Refused(SwapRefusal::Store(why)),
            Self::Unknown(why) => FenceAnswer::Unknown(why),
            Self::Replaced(why) => FenceAnswer::StoreReplaced(why),
        }
    }
}

/// What came of one write.
fn written(outcome: Outcome<Object, Refusal>) -> Result<Object, Halt> {
    match outcome {
        Outcome::Done(object) => Ok(object),
        Outcome::Refused(Refusal::Conflict(_) | Refusal::AlreadyExists | Refusal::NotFound(_)) => Err(Halt::Conflict),
        Outcome::Refused(refusal) => Err(Halt::Refused(refusal.to_string())),
        Outcome::Unknown(why) => Err(Halt::Unknown(why)),
    }
}

fn read_failed(error: &ReadError) -> LedgerError {
    match error {
        ReadError::Forbidden(_) => LedgerError::Denied(error.to_string()),
        ReadError::UnknownKind(_) | ReadError::TooManyRequests { .. } | ReadError::Unavailable(_) => {
            LedgerError::Unavailable(error.to_string())
        }
    }
}

fn unreadable(error: &FormatError) -> LedgerError {
    LedgerError::Unavailable(error.to_string())
}

fn patch(object_uid: &str, version: Version, body: Value) -> MergePatch {
    MergePatch { resource_version: version.0.to_string(), uid: object_uid.to_owned(), subresource: None, body }
}

impl ObjectLedger {
    /// The ledger of a cluster, by its name.
    #[must_use]
    pub fn new(objects: Arc<dyn Objects>, cluster: &str) -> Self {
        Self { objects, cluster: cluster.to_owned(), role: Role::Active, seen: Mutex::default() }
    }

    /// The same for an operator that fills it, as long as the Ledger asks for the claims to be moved here.
    #[must_use]
    pub fn filled(objects: Arc<dyn Objects>, cluster: &str) -> Self {
        Self { role: Role::Filled, ..Self::new(objects, cluster) }
    }

    /// Whether this ledger may be written.
    fn admits(&self, ledger: &LedgerSeen) -> bool {
        match self.role {
            Role::Active => ledger.store == LedgerStore::CustomResources,
            Role::Filled => ledger.move_to == Some(LedgerStore::CustomResources),
        }
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        lock(&self.seen)
    }

    fn key(&self) -> ObjectKey {
        key(&self.cluster)
    }

    fn cell_key(&self, id: CellId) -> ObjectKey {
        ObjectKey::cluster(format::name_of(&self.cluster, id))
    }

    /// Reads the Ledger, at quorum.
    async fn get(&self) -> Result<Option<LedgerSeen>, LedgerError> {
        let object = self.objects.get(LEDGER, &self.key()).await.map_err(|error| read_failed(&error))?;
        object.map(|object| LedgerSeen::parse(&object)).transpose().map_err(|error| unreadable(&error))
    }

    /// Reads the Ledger, at quorum, and compares it with the one that was seen before.
    async fn read(&self) -> Result<Option<LedgerSeen>, LedgerError> {
        let before = self.seen().ledger.clone();
        let ledger = self.get().await?;
        self.note(before, ledger.as_ref())?;
        Ok(ledger)
    }

    /// Notes a Ledger. `before` is what was known when the request was sent: answers may overtake each other.
    fn note(&self, before: Option<(String, Version)>, ledger: Option<&LedgerSeen>) -> Result<(), LedgerError> {
        let mut seen = self.seen();
        if seen.replaced.is_none() {
            seen.replaced = compare(before, ledger).err();
        }
        if let Some(why) = &seen.replaced {
            return Err(LedgerError::StoreReplaced(why.clone()));
        }
        if let Some(ledger) = ledger
            && seen.ledger.as_ref().is_none_or(|(_, newest)| *newest < ledger.version)
        {
            seen.ledger = Some((ledger.uid.clone(), ledger.version));
        }
        Ok(())
    }

    /// The Ledger, if it holds the term and the claims are kept here.
    async fn read_own(&self, term: &TermId) -> Result<LedgerSeen, Halt> {
        let ledger = self.read().await?.ok_or(Halt::FenceLost)?;
        if ledger.term == term.as_str() && self.admits(&ledger) { Ok(ledger) } else { Err(Halt::FenceLost) }
    }

    async fn list(&self) -> Result<(i64, Sorted), LedgerError> {
        let list = self.objects.list(POD_CIDR_CELL, &Scope::default(), Freshness::Quorum).await;
        let list = list.map_err(|error| read_failed(&error))?;
        let revision = format::number(&list.resource_version).map_err(|error| unreadable(&error))?;
        Ok((revision, format::sort(&self.cluster, list.items)))
    }

    /// Changes the specification of the Ledger at the version that was read.
    async fn patch_ledger(&self, ledger: &LedgerSeen, spec: Value) -> Result<(), Halt> {
        let patch = patch(&ledger.uid, ledger.version, json!({ "spec": spec }));
        self.wrote_ledger(self.objects.patch(LEDGER, &self.key(), patch).await)
    }

    /// Notes the Ledger that a write left.
    fn wrote_ledger(&self, outcome: Outcome<Object, Refusal>) -> Result<(), Halt> {
        let ledger = LedgerSeen::parse(&written(outcome)?)?;
        Ok(self.note(None, Some(&ledger))?)
    }

    /// Puts cells on the list in the Ledger while that holds the term.
    async fn put_on_list(&self, term: &TermId, ids: &[CellId]) -> Result<(), Halt> {
        for _ in 0..TRIES {
            let ledger = self.read_own(term).await?;
            let new: Vec<CellId> = ids.iter().filter(|id| !ledger.cells.contains(id)).copied().collect();
            if new.is_empty() {
                return Ok(());
            }
            let mut texts: Vec<String> = ledger.cells.iter().chain(&new).map(ToString::to_string).collect();
            texts.sort_unstable();
            match self.patch_ledger(&ledger, json!({ "cells": texts })).await {
                Err(Halt::Conflict) => {}
                other => return other,
            }
        }
        Err(Halt::Conflict)
    }

    async fn swap_one(&self, term: &TermId, swap: &CellSwap) -> Result<Version, Halt> {
        let id = swap.new.id();
        let ledger = self.read_own(term).await?;
        let (earlier, outcome) = if swap.expected == Version::ABSENT {
            // Another cell around it, or in it, is on the list: it was made under another mask, and is to be loaded.
            if ledger.cells.iter().any(|cell| *cell != id && cell.prefix().overlaps(&id.prefix())) {
                return Err(Halt::Conflict);
            }
            self.put_on_list(term, &[id]).await?;
            let earlier = self.seen().own.sent(id, Version::ABSENT);
            (earlier, self.objects.create(POD_CIDR_CELL, format::new_cell(&self.cluster, term, &swap.new)).await)
        } else {
            let uid = self.uid_of(swap).await?;
            let stamped = self.seen().own.has(id);
            let expected =
                if stamped { swap.expected } else { self.stamp_first(term, id, &uid, swap.expected).await? };
            let patch = patch(&uid, expected, format::changed_cell(term, &swap.new));
            let earlier = self.seen().own.sent(id, expected);
            (earlier, self.objects.patch(POD_CIDR_CELL, &self.cell_key(id), patch).await)
        };
        if matches!(outcome, Outcome::Refused(_)) {
            self.seen().own.refused(id, earlier);
        }
        match written(outcome) {
            Ok(object) => {
                let version = format::version(&object)?;
                let mut seen = self.seen();
                seen.uids.insert(id, object.uid().to_owned());
                seen.cells.note(id, version);
                seen.own.wrote(id, version);
                Ok(version)
            }
            // The stamp of a later leader is such a conflict too.
            Err(Halt::Conflict) => match self.read_own(term).await {
                Err(lost @ (Halt::FenceLost | Halt::Replaced(_))) => Err(lost),
                _ => Err(Halt::Conflict),
            },
            Err(halt) => Err(halt),
        }
    }

    /// The uid of a cell's object, from the last load or from a look at it.
    async fn uid_of(&self, swap: &CellSwap) -> Result<String, Halt> {
        let id = swap.new.id();
        if let Some(uid) = self.seen().uids.get(&id) {
            return Ok(uid.clone());
        }
        let object = self.objects.get(POD_CIDR_CELL, &self.cell_key(id)).await.map_err(|error| read_failed(&error))?;
        object.map(|object| object.uid().to_owned()).ok_or(Halt::Conflict)
    }
}

/// Whether a Ledger can be the one that was seen before, or a later state of it.
fn compare(before: Option<(String, Version)>, now: Option<&LedgerSeen>) -> Result<(), String> {
    match (before, now) {
        (None, _) => Ok(()),
        (Some(_), None) => Err("the Ledger was deleted".to_owned()),
        (Some((uid, _)), Some(now)) if uid != now.uid => {
            Err(format!("the Ledger was deleted and made anew: its uid was {uid} and is {}", now.uid))
        }
        (Some((_, version)), Some(now)) if now.version < version => {
            Err(format!("the resourceVersion of the Ledger was {} and is {}", version.0, now.version.0))
        }
        (Some(_), Some(_)) => Ok(()),
    }
}

#[async_trait]
impl Ledger for ObjectLedger {
    async fn begin(&self) -> Result<FenceSeen, LedgerError> {
        let ledger = self.get().await?;
        *self.seen() =
            Seen { ledger: ledger.as_ref().map(|ledger| (ledger.uid.clone(), ledger.version)), ..Seen::default() };
        match ledger {
            Some(ledger) if !self.admits(&ledger) => Err(not_active(ledger.store, LedgerStore::CustomResources)),
            ledger => Ok(ledger.map(|ledger| ledger.fence()).unwrap_or_default()),
        }
    }

    async fn read_fence(&self) -> Result<FenceSeen, LedgerError> {
        match self.read().await? {
            Some(ledger) if !self.admits(&ledger) => Err(not_active(ledger.store, LedgerStore::CustomResources)),
            ledger => Ok(ledger.map(|ledger| ledger.fence()).unwrap_or_default()),
        }
    }

    async fn take_fence(&self, seen: &FenceSeen, term: &TermId) -> FenceAnswer {
        self.take(seen, term).await
    }

    async fn end(&self, term: &TermId) {
        self.leave(term).await;
    }

    async fn load(&self) -> Result<Loaded, LedgerError> {
        let before = self.seen().list;
        let (revision, Sorted { cells, strays }) = self.list().await?;
        // After the list: if the fence holds a term, nobody after it had written when the cells were read.
        let ledger = self.read().await?;
        let fence = ledger.as_ref().map(LedgerSeen::fence).unwrap_or_default();
        let store = ledger.as_ref().map_or(0, |ledger| format::store_id(&ledger.uid));
        let mut loaded = Loaded { mark: Mark { store, revision }, fence, strays, ..Loaded::default() };
        for (id, object) in &cells {
            let version = format::version(object).map_err(|error| unreadable(&error))?;
            loaded.cells.insert(*id, StoredCell { version, cell: format::cell(*id, object) });
        }
        for id in ledger.iter().flat_map(|ledger| &ledger.cells) {
            let lost = || StoredCell { version: Version::ABSENT, cell: format::lost_cell(*id) };
            loaded.cells.entry(*id).or_insert_with(lost);
        }
        let mut seen = self.seen();
        if seen.replaced.is_none() {
            let went_back = || format!("the resourceVersion of its cells was {before} and is {revision}");
            seen.replaced = if revision < before { Some(went_back()) } else { seen.cells.follow(&loaded).err() };
        }
        if let Some(why) = &seen.replaced {
            return Err(LedgerError::StoreReplaced(why.clone()));
        }
        seen.list = seen.list.max(revision);
        for (id, stored) in &loaded.cells {
            seen.own.saw(*id, stored.version);
        }
        seen.uids = cells.iter().map(|(id, object)| (*id, object.uid().to_owned())).collect();
        seen.fence = loaded.fence.clone();
        Ok(loaded)
    }

    /// What changed since the mark, by kind: the order between the fence and cells is not kept.
    fn watch(&self, after: Mark) -> BoxStream<'static, Result<LedgerChange, LedgerError>> {
        let seen = self.seen();
        let follower = Follower::new(&self.cluster, after, seen.fence.value.clone(), seen.uids.keys().copied());
        drop(seen);
        watch::follow(self.objects.as_ref(), follower)
    }

    async fn swap(&self, term: &TermId, batch: &[CellSwap]) -> SwapAnswer {
        if let Err(refusal) = check_batch(batch, self.limits()) {
            return SwapAnswer::Refused(refusal);
        }
        let mut versions = BTreeMap::new();
        for swap in batch {
            match self.swap_one(term, swap).await {
                Ok(version) => {
                    versions.insert(swap.new.id(), version);
                }
                Err(halt) => return halt.of_swap(swap.new.id()),
            }
        }
        SwapAnswer::Done(versions)
    }

    fn limits(&self) -> Limits {
        Limits { cells: 1, bytes: MAX_BYTES }
    }
}

//! How a term takes the fence, and how it leaves it.

use std::collections::{BTreeMap, BTreeSet};

use basal_crds::resources::LedgerStore;
use basal_ipam::{
    cell::{CellId, Version},
    ledger::{FenceAnswer, FenceSeen},
    names::TermId,
};
use futures::{StreamExt as _, stream};
use serde_json::json;
use tracing::debug;

use super::{Halt, ObjectLedger, Role, TRIES, active::not_active, format, format::Sorted, patch, read_failed, written};
use crate::object::{
    Object,
    resources::{LEDGER, POD_CIDR_CELL},
};

/// Cells that are stamped at the same time.
const STAMPS_AT_ONCE: usize = 16;

/// What a term knows of its own writes of cells.
#[derive(Debug, Clone, Default)]
pub(super) struct Own {
    /// The term that took the fence, with every write of an earlier one behind it.
    taken: Option<TermId>,
    /// Cells that it wrote: no earlier term, and no earlier state of the store, had their versions.
    cells: BTreeSet<CellId>,
    /// Writes without an answer, with the version that each expects. One that nobody waits for any more stays: it may still
    /// get in.
    unanswered: BTreeMap<CellId, Version>,
}

impl Own {
    pub(super) fn has(&self, id: CellId) -> bool {
        self.cells.contains(&id)
    }

    /// A cell was written, and is at a version.
    pub(super) fn wrote(&mut self, id: CellId, version: Version) {
        self.cells.insert(id);
        self.saw(id, version);
    }

    /// A write of a cell is sent; answers the version that an earlier one expects that is not answered.
    pub(super) fn sent(&mut self, id: CellId, expected: Version) -> Option<Version> {
        self.unanswered.insert(id, expected)
    }

    /// It was not carried out, which says nothing of the earlier one.
    pub(super) fn refused(&mut self, id: CellId, earlier: Option<Version>) {
        self.unanswered.remove(&id);
        self.unanswered.extend(earlier.map(|version| (id, version)));
    }

    /// A cell is at a version: a write that expects an older one got in, or never will.
    pub(super) fn saw(&mut self, id: CellId, version: Version) {
        if self.unanswered.get(&id).is_some_and(|expected| *expected < version) {
            self.unanswered.remove(&id);
        }
    }

    /// Whether nothing of a term can change a cell any more, nor of one before it.
    fn is_settled(&self, term: &TermId) -> bool {
        self.taken.as_ref() == Some(term) && self.unanswered.is_empty()
    }
}

/// What may still come of former terms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Former {
    /// A write that is under way.
    Writes,
    /// Nothing.
    Nothing,
}

impl ObjectLedger {
    pub(super) async fn take(&self, seen: &FenceSeen, term: &TermId) -> FenceAnswer {
        let former = match self.put_term(seen, term).await {
            Ok(former) => former,
            Err(halt) => return halt.of_fence(),
        };
        match self.stamp_all(term, former).await {
            Ok(()) => {
                self.seen().own.taken = Some(term.clone());
                FenceAnswer::Taken
            }
            // The fence holds the term, and cells are not stamped: as good as if it were not known.
            Err(Halt::Refused(why)) => FenceAnswer::Unknown(why),
            Err(halt) => halt.of_fence(),
        }
    }

    /// Puts the term into the Ledger, or makes one with it.
    async fn put_term(&self, seen: &FenceSeen, term: &TermId) -> Result<Former, Halt> {
        for _ in 0..TRIES {
            let ledger = self.read().await?;
            let outcome = match &ledger {
                None if seen.value.is_some() || self.role == Role::Filled => {
                    return Err(Halt::Replaced("the Ledger was deleted".to_owned()));
                }
                None => {
                    let ours = format::new_ledger(&self.cluster, LedgerStore::CustomResources, Some(term));
                    self.wrote_ledger(self.objects.create(LEDGER, ours).await).map(|()| Former::Writes)
                }
                Some(ledger) if !self.admits(ledger) => {
                    return Err(not_active(ledger.store, LedgerStore::CustomResources).into());
                }
                // The list of cells changes the object as well. A term that is replaced never comes back, so its id
                // tells whether somebody took the fence since.
                Some(ledger) if ledger.fence().value != seen.value => return Err(Halt::FenceLost),
                Some(ledger) => {
                    let former = if ledger.has_ended() { Former::Nothing } else { Former::Writes };
                    self.patch_ledger(ledger, json!({ "term": term.as_str() })).await.map(|()| former)
                }
            };
            match outcome {
                Err(Halt::Conflict) => {}
                other => return other,
            }
        }
        Err(Halt::Conflict)
    }

    /// Writes the term into every cell that a former one may still write, and puts cells on the list that are not (a Ledger
    /// that was lost comes back so).
    async fn stamp_all(&self, term: &TermId, former: Former) -> Result<(), Halt> {
        let (_, Sorted { cells, .. }) = self.list().await?;
        let known: Vec<CellId> = cells.keys().copied().collect();
        let open = cells.into_iter().filter(|(_, cell)| former == Former::Writes || format::lacks_finalizer(cell));
        let stamps = stream::iter(open).map(|(id, object)| self.stamp(term, id, object));
        let stamped: Vec<Result<(), Halt>> = stamps.buffer_unordered(STAMPS_AT_ONCE).collect().await;
        stamped.into_iter().collect::<Result<(), Halt>>()?;
        self.put_on_list(term, &known).await
    }

    async fn stamp(&self, term: &TermId, id: CellId, object: Object) -> Result<(), Halt> {
        let (key, mut object) = (self.cell_key(id), object);
        for _ in 0..TRIES {
            let body = format::stamp(term, &object);
            let outcome = self.objects.patch(POD_CIDR_CELL, &key, patch(object.uid(), format::version(&object)?, body));
            match written(outcome.await) {
                Err(Halt::Conflict) => {}
                Ok(stamped) => {
                    self.seen().own.wrote(id, format::version(&stamped)?);
                    return Ok(());
                }
                Err(halt) => return Err(halt),
            }
            // A former leader wrote a claim, or a later one its own stamp.
            self.read_own(term).await?;
            let again = self.objects.get(POD_CIDR_CELL, &key).await.map_err(|error| read_failed(&error))?;
            match again {
                Some(again) => object = again,
                None => return Ok(()),
            }
        }
        Err(Halt::Conflict)
    }

    /// Stamps a cell that a term was spared to stamp, before its first write there, which so expects a version that was its
    /// own. Should it come late, after an older state of the store was put back, it fails.
    pub(super) async fn stamp_first(
        &self,
        term: &TermId,
        id: CellId,
        uid: &str,
        seen: Version,
    ) -> Result<Version, Halt> {
        let body = format::stamp_only(term);
        let stamped = written(self.objects.patch(POD_CIDR_CELL, &self.cell_key(id), patch(uid, seen, body)).await)?;
        let version = format::version(&stamped)?;
        let mut seen = self.seen();
        seen.own.wrote(id, version);
        seen.cells.note(id, version);
        Ok(version)
    }

    /// Notes the end of a term, if all its writes are answered.
    pub(super) async fn leave(&self, term: &TermId) {
        if !self.seen().own.is_settled(term) {
            debug!(%term, "the end of the term is not noted: a write of it may still get in");
            return;
        }
        if let Err(halt) = self.put_end(term).await {
            debug!(%term, ?halt, "the end of the term is not noted");
        }
    }

    async fn put_end(&self, term: &TermId) -> Result<(), Halt> {
        for _ in 0..TRIES {
            let ledger = self.read_own(term).await?;
            match self.patch_ledger(&ledger, ledger.end()).await {
                Err(Halt::Conflict) => {}
                other => return other,
            }
        }
        Err(Halt::Conflict)
    }
}

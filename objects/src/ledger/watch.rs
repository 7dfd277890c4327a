//! Watches of the ledger: two kinds of objects, told as one stream of changes.

use std::collections::{BTreeMap, BTreeSet};

use basal_ipam::{
    cell::{CellId, Version},
    ledger::{FenceSeen, LedgerChange, LedgerError, Mark, StoredCell},
};
use futures::{
    StreamExt as _, future,
    stream::{self, BoxStream},
};

use super::{
    format::{self, LedgerSeen},
    read_failed, unreadable,
};
use crate::{
    object::{
        Object,
        resources::{LEDGER, POD_CIDR_CELL},
    },
    port::{ObjectEvent, Objects, ReadError, Scope},
};

type Changes = Vec<Result<LedgerChange, LedgerError>>;

/// What a watch knows already.
pub(super) struct Follower {
    cluster: String,
    after: Mark,
    fence: Option<String>,
    /// The versions of cells that were told, or were there before.
    cells: BTreeMap<CellId, Version>,
    /// Cells in the list that is under way.
    listed: BTreeSet<CellId>,
}

impl Follower {
    /// Follows what comes after a mark, at which the fence held `fence` and these cells were there.
    pub(super) fn new(cluster: &str, after: Mark, fence: Option<String>, cells: impl Iterator<Item = CellId>) -> Self {
        let cells = cells.map(|id| (id, Version(after.revision))).collect();
        Self { cluster: cluster.to_owned(), after, fence, cells, listed: BTreeSet::new() }
    }

    fn ledger(&mut self, event: ObjectEvent) -> Changes {
        let (ObjectEvent::Listed(object) | ObjectEvent::Applied(object) | ObjectEvent::Deleted(object)) = &event else {
            return Vec::new();
        };
        if object.name() != self.cluster {
            return Vec::new();
        }
        let seen = match LedgerSeen::parse(object) {
            Ok(seen) => seen,
            Err(error) => return vec![Err(unreadable(&error))],
        };
        let deleted = matches!(event, ObjectEvent::Deleted(_));
        if self.after.store != 0 && (deleted || format::store_id(&seen.uid) != self.after.store) {
            return vec![Err(LedgerError::StoreReplaced("the Ledger was deleted".to_owned()))];
        }
        let fence = if deleted { FenceSeen::default() } else { seen.fence() };
        if fence.value == self.fence {
            return Vec::new();
        }
        self.fence.clone_from(&fence.value);
        vec![Ok(LedgerChange::Fence(fence))]
    }

    fn cells(&mut self, event: &ObjectEvent) -> Changes {
        match event {
            ObjectEvent::Restarted => {
                self.listed.clear();
                Vec::new()
            }
            ObjectEvent::Listed(object) => {
                self.listed.extend(self.id(object));
                self.applied(object)
            }
            ObjectEvent::Applied(object) => self.applied(object),
            ObjectEvent::InSync => {
                let gone: Vec<CellId> = self.cells.keys().filter(|id| !self.listed.contains(id)).copied().collect();
                gone.into_iter().map(|id| self.gone(id)).collect()
            }
            ObjectEvent::Deleted(object) => self.id(object).map(|id| self.gone(id)).into_iter().collect(),
        }
    }

    fn id(&self, object: &Object) -> Option<CellId> {
        format::cell_id(&self.cluster, object)?.ok()
    }

    fn applied(&mut self, object: &Object) -> Changes {
        let Some(id) = self.id(object) else { return Vec::new() };
        let version = match format::version(object) {
            Ok(version) => version,
            Err(error) => return vec![Err(unreadable(&error))],
        };
        let known = self.cells.get(&id).copied().unwrap_or(Version(self.after.revision));
        self.cells.insert(id, version.max(known));
        if version <= known {
            return Vec::new();
        }
        vec![Ok(LedgerChange::Cell(id, StoredCell { version, cell: format::cell(id, object) }))]
    }

    fn gone(&mut self, id: CellId) -> Result<LedgerChange, LedgerError> {
        self.cells.remove(&id);
        Ok(LedgerChange::CellGone(id))
    }
}

enum Event {
    Ledger(Result<ObjectEvent, ReadError>),
    Cell(Result<ObjectEvent, ReadError>),
}

/// Follows both kinds; ends after the first error.
pub(super) fn follow(
    objects: &dyn Objects,
    mut follower: Follower,
) -> BoxStream<'static, Result<LedgerChange, LedgerError>> {
    let all = Scope::default();
    let ledgers = objects.watch(LEDGER, &all).map(Event::Ledger);
    let cells = objects.watch(POD_CIDR_CELL, &all).map(Event::Cell);
    let changes = stream::select(ledgers, cells).flat_map(move |event| {
        stream::iter(match event {
            Event::Ledger(Ok(event)) => follower.ledger(event),
            Event::Cell(Ok(event)) => follower.cells(&event),
            Event::Ledger(Err(error)) | Event::Cell(Err(error)) => vec![Err(read_failed(&error))],
        })
    });
    changes
        .scan(false, |ended, change| {
            let item = if *ended { None } else { Some(change) };
            *ended = matches!(item, Some(Err(_)));
            future::ready(item)
        })
        .boxed()
}

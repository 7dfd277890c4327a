//! The cells of a ledger in custom resources as a stream. Its watch goes on where it broke as long as the API server
//! remembers; else it lists anew, and what was in between is lost.

use std::collections::BTreeMap;

use basal_crds::names::ClusterName;
use basal_ipam::{
    cell::CellId,
    ledger::{LedgerChange, Loaded, StoredCell},
};
use basal_objects::{
    ledger::stored_cell,
    object::{Object, resources},
    port::{ObjectEvent, Objects, ReadError, Scope},
};
use futures::{
    StreamExt as _,
    stream::{self, BoxStream},
};

use super::feed::Told;

/// Every change of the cells after a first reading, which the watch tells again.
pub(super) fn cells(objects: &dyn Objects, cluster: &ClusterName) -> BoxStream<'static, Told<LedgerChange, Loaded>> {
    let mut cells = Cells { cluster: cluster.clone(), begun: false, broken: false, listing: BTreeMap::new() };
    let events = objects.watch(resources::POD_CIDR_CELL, &Scope::default());
    events.flat_map(move |event| stream::iter(cells.told(event))).boxed()
}

struct Cells {
    cluster: ClusterName,
    /// The first list was told.
    begun: bool,
    broken: bool,
    /// The cells of a list that is being told.
    listing: BTreeMap<CellId, StoredCell>,
}

impl Cells {
    fn told(&mut self, event: Result<ObjectEvent, ReadError>) -> Vec<Told<LedgerChange, Loaded>> {
        match event {
            Ok(ObjectEvent::Restarted) => {
                self.listing.clear();
                Vec::new()
            }
            Ok(ObjectEvent::Listed(object)) => {
                self.listing.extend(self.cell(&object));
                Vec::new()
            }
            Ok(ObjectEvent::InSync) => {
                let cells = std::mem::take(&mut self.listing);
                self.broken = false;
                if std::mem::replace(&mut self.begun, true) {
                    return vec![Told::Lost(Loaded { cells, ..Loaded::default() })];
                }
                cells.into_iter().map(|(id, stored)| Told::Change(LedgerChange::Cell(id, stored))).collect()
            }
            Ok(ObjectEvent::Applied(object)) => {
                let change = self.cell(&object).map(|(id, stored)| LedgerChange::Cell(id, stored));
                self.goes_on(change)
            }
            Ok(ObjectEvent::Deleted(object)) => {
                let change = self.cell(&object).map(|(id, _)| LedgerChange::CellGone(id));
                self.goes_on(change)
            }
            Err(_) if self.broken => Vec::new(),
            Err(error) => {
                self.broken = true;
                vec![Told::Interrupted(error.to_string())]
            }
        }
    }

    fn goes_on(&mut self, change: Option<LedgerChange>) -> Vec<Told<LedgerChange, Loaded>> {
        let resumed = std::mem::take(&mut self.broken).then_some(Told::Resumed);
        resumed.into_iter().chain(change.map(Told::Change)).collect()
    }

    fn cell(&self, object: &Object) -> Option<(CellId, StoredCell)> {
        stored_cell(self.cluster.as_str(), object)
    }
}

//! Between the objects of the ledger and its cells.

use std::{
    collections::BTreeMap,
    hash::{DefaultHasher, Hasher as _},
};

use basal_crds::resources::{
    CellBlock, CellBlockState, CellSpec, EndedTerm, Kind as _, LEDGER_FINALIZER, Ledger, LedgerStore, PodCidrCell,
    cell_name,
};
use basal_ipam::{
    cell::{Block, BlockState, CELL_BITS, Cell, CellError, CellId, Version},
    ledger::{FenceSeen, StoredCell},
    names::{NodeName, NodeUid, TermId},
};
use serde_json::{Value, json};

use crate::object::Object;

/// Why an object cannot be used as what it is called.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum FormatError {
    /// The resourceVersion is no number.
    #[error(
        "metadata.resourceVersion is {0:?} and no number; the ledger compares them, which the API promises since \
         Kubernetes 1.35: use an API server that keeps its objects in etcd"
    )]
    Version(String),
    /// The Ledger does not parse.
    #[error("the Ledger {name} cannot be read: {why}")]
    Ledger {
        /// Its name.
        name: String,
        /// The field.
        why: String,
    },
}

/// The version of an object. resourceVersions are decimal numbers that grow with each write and can be compared among the
/// objects of a kind since Kubernetes 1.35; before, API servers over etcd did the same without a promise.
pub(super) fn version(object: &Object) -> Result<Version, FormatError> {
    number(object.resource_version()).map(Version)
}

/// A resourceVersion as a number.
pub(super) fn number(text: &str) -> Result<i64, FormatError> {
    text.parse().map_err(|_error| FormatError::Version(text.to_owned()))
}

/// A number for the uid of the Ledger: another one after it was made anew.
pub(super) fn store_id(uid: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    hasher.write(uid.as_bytes());
    hasher.finish()
}

/// The Ledger as it was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct LedgerSeen {
    pub(super) uid: String,
    pub(super) version: Version,
    pub(super) store: LedgerStore,
    pub(super) move_to: Option<LedgerStore>,
    pub(super) leaving: Option<LedgerStore>,
    /// Empty while there is no term.
    pub(super) term: String,
    /// `metadata.generation`.
    generation: i64,
    /// The last term that noted its end.
    ended: Option<EndedTerm>,
    /// The index: every cell that there is.
    pub(super) cells: Vec<CellId>,
}

impl LedgerSeen {
    pub(super) fn parse(object: &Object) -> Result<Self, FormatError> {
        let failed = |why: String| FormatError::Ledger { name: object.name().to_owned(), why };
        let ledger: Ledger = object.parse().map_err(|error| failed(error.to_string()))?;
        let cell =
            |text: &String| text.parse().map(CellId::new).map_err(|error| failed(format!("spec.cells: {error}")));
        Ok(Self {
            uid: object.uid().to_owned(),
            version: version(object)?,
            store: ledger.spec.store,
            move_to: ledger.spec.move_to.filter(|to| *to != ledger.spec.store),
            leaving: ledger.spec.leaving.filter(|left| *left != ledger.spec.store),
            cells: ledger.spec.cells.iter().map(cell).collect::<Result<_, _>>()?,
            term: ledger.spec.term,
            ended: ledger.spec.ended,
            generation: object.generation(),
        })
    }

    /// Whether the term in it has ended in order, and nobody changed the specification since.
    pub(super) fn has_ended(&self) -> bool {
        self.ended.as_ref().is_some_and(|ended| ended.term == self.term && ended.generation == self.generation)
    }

    /// What a patch puts into it when its term ends.
    pub(super) fn end(&self) -> Value {
        json!({ "ended": { "term": self.term, "generation": self.generation + 1 } })
    }

    pub(super) fn fence(&self) -> FenceSeen {
        FenceSeen { value: Some(self.term.clone()).filter(|term| !term.is_empty()), version: self.version }
    }
}

/// A new Ledger that a term begins with.
pub(super) fn new_ledger(cluster: &str, store: LedgerStore, term: Option<&TermId>) -> Object {
    let mut spec = json!({ "store": store.as_str() });
    if let Some(term) = term {
        spec["term"] = json!(term.as_str());
    }
    Object(json!({
        "apiVersion": crate::object::resources::LEDGER.api_version(),
        "kind": Ledger::NAMES.kind,
        "metadata": { "name": cluster, "finalizers": [LEDGER_FINALIZER] },
        "spec": spec,
    }))
}

/// The name of a cell's object.
pub(super) fn name_of(cluster: &str, id: CellId) -> String {
    cell_name(cluster, id.prefix().address(), id.prefix().prefix_len())
}

/// Which cell of a cluster an object is; `None` for one of another cluster.
pub(super) fn cell_id(cluster: &str, object: &Object) -> Option<Result<CellId, String>> {
    let text = |pointer| object.0.pointer(pointer).and_then(Value::as_str);
    match text("/spec/cluster") {
        Some(theirs) if theirs != cluster => return None,
        _ => {}
    }
    let stray = || Err(format!("PodCIDRCell {}", object.name()));
    let Some(id) = text("/spec/prefix").and_then(|text| text.parse().ok()).map(CellId::new) else {
        return Some(stray());
    };
    // One cell has one object.
    Some(if object.name() == name_of(cluster, id) { Ok(id) } else { stray() })
}

/// The cell in an object of a cluster; `None` for one of another cluster.
#[must_use]
pub fn read_cell(cluster: &str, object: &Object) -> Option<Result<Cell, CellError>> {
    Some(match cell_id(cluster, object)? {
        Ok(id) => cell(id, object),
        Err(stray) => Err(CellError::Unreadable(format!("{stray} is no cell by its name and prefix"))),
    })
}

/// Which cell of a cluster an object is, and how it stands; `None` for an object that is none of the cluster's cells.
#[must_use]
pub fn stored_cell(cluster: &str, object: &Object) -> Option<(CellId, StoredCell)> {
    let id = cell_id(cluster, object)?.ok()?;
    Some((id, StoredCell { version: version(object).ok()?, cell: cell(id, object) }))
}

/// The claims in an object.
pub(super) fn cell(id: CellId, object: &Object) -> Result<Cell, CellError> {
    let unreadable = |error: &dyn std::fmt::Display| CellError::Unreadable(error.to_string());
    let typed: PodCidrCell = object.parse().map_err(|error| unreadable(&error))?;
    let CellSpec { pool, mask_size, blocks, .. } = typed.spec;
    let mut cell = Cell::new(id, pool.parse().map_err(|error| unreadable(&error))?, mask_size)?;
    for CellBlock { block, state, node, uid } in blocks {
        let at = block.parse().map_err(|error| unreadable(&error))?;
        let block = Block {
            state: state_of(state),
            node: NodeName::new(&node).map_err(|error| unreadable(&error))?,
            uid: uid.map(|uid| NodeUid::new(&uid)).transpose().map_err(|error| unreadable(&error))?,
        };
        if cell.blocks().contains_key(&at) {
            return Err(CellError::Overlap { block: at, other: at });
        }
        cell.set(at, block)?;
    }
    Ok(cell)
}

/// A cell that has lost its object. Which pool CIDR it was made for is not known; its size is, and that is what counts.
pub(super) fn lost_cell(id: CellId) -> Result<Cell, CellError> {
    let prefix = id.prefix();
    Cell::new(id, prefix, prefix.prefix_len().saturating_add(CELL_BITS).min(prefix.family().bits()))
}

/// The object of a cell that has none yet.
#[must_use]
pub fn new_cell(cluster: &str, term: &TermId, cell: &Cell) -> Object {
    Object(json!({
        "apiVersion": crate::object::resources::POD_CIDR_CELL.api_version(),
        "kind": PodCidrCell::NAMES.kind,
        "metadata": { "name": name_of(cluster, cell.id()), "finalizers": [LEDGER_FINALIZER] },
        "spec": {
            "cluster": cluster,
            "prefix": cell.id().to_string(),
            "pool": cell.pool().to_string(),
            "maskSize": cell.mask(),
            "term": term.as_str(),
            "blocks": blocks(cell),
        },
    }))
}

/// What a patch replaces in a cell's object.
pub(super) fn changed_cell(term: &TermId, cell: &Cell) -> Value {
    json!({ "spec": { "term": term.as_str(), "blocks": blocks(cell) } })
}

/// What a patch puts into a cell's object so that older versions of it are worth nothing.
pub(super) fn stamp_only(term: &TermId) -> Value {
    json!({ "spec": { "term": term.as_str() } })
}

/// The same, and its finalizer, where it lacks it.
pub(super) fn stamp(term: &TermId, object: &Object) -> Value {
    let mut body = stamp_only(term);
    if lacks_finalizer(object) {
        let mut finalizers: Vec<Value> = finalizers(object).cloned().collect();
        finalizers.push(json!(LEDGER_FINALIZER));
        body["metadata"] = json!({ "finalizers": finalizers });
    }
    body
}

/// Whether somebody took the finalizer of an object away, and a new one can be set.
pub(super) fn lacks_finalizer(object: &Object) -> bool {
    !object.is_deleting() && finalizers(object).all(|name| name != LEDGER_FINALIZER)
}

fn finalizers(object: &Object) -> impl Iterator<Item = &Value> {
    object.0.pointer("/metadata/finalizers").and_then(Value::as_array).into_iter().flatten()
}

fn blocks(cell: &Cell) -> Vec<Value> {
    let entry = |(at, block): (&basal_ipam::prefix::PodCidr, &Block)| {
        let mut entry = json!({ "block": at.to_string(), "state": block.state.as_str(), "node": block.node.as_str() });
        if let Some(uid) = &block.uid {
            entry["uid"] = json!(uid.as_str());
        }
        entry
    };
    cell.blocks().iter().map(entry).collect()
}

const fn state_of(state: CellBlockState) -> BlockState {
    match state {
        CellBlockState::Granted => BlockState::Granted,
        CellBlockState::Pending => BlockState::Pending,
        CellBlockState::Quarantined => BlockState::Quarantined,
        CellBlockState::Orphaned => BlockState::Orphaned,
    }
}

/// The cells of a cluster among the objects of a list, and what is none.
pub(super) struct Sorted {
    pub(super) cells: BTreeMap<CellId, Object>,
    pub(super) strays: Vec<String>,
}

pub(super) fn sort(cluster: &str, objects: Vec<Object>) -> Sorted {
    let mut sorted = Sorted { cells: BTreeMap::new(), strays: Vec::new() };
    for object in objects {
        match cell_id(cluster, &object) {
            Some(Ok(id)) => {
                sorted.cells.insert(id, object);
            }
            Some(Err(stray)) => sorted.strays.push(stray),
            None => {}
        }
    }
    sorted
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id() -> CellId {
        CellId::new("10.0.0.0/16".parse().unwrap())
    }

    fn full() -> Cell {
        let mut cell = Cell::new(id(), "10.0.0.0/8".parse().unwrap(), 24).unwrap();
        for (index, state) in BlockState::ALL.into_iter().enumerate() {
            let uid = (index != 2).then(|| NodeUid::new("u1").unwrap());
            let block = Block { state, node: NodeName::new("n1").unwrap(), uid };
            cell.set(format!("10.0.{index}.0/24").parse().unwrap(), block).unwrap();
        }
        cell
    }

    #[test]
    fn a_cell_is_read_as_it_was_written() {
        let term = TermId::from_random(1, 2);
        let object = new_cell("default", &term, &full());
        assert_eq!(object.name(), "default-10-0-0-0-16");
        assert_eq!(cell_id("default", &object), Some(Ok(id())));
        assert_eq!(cell_id("other", &object), None);
        assert_eq!(cell(id(), &object), Ok(full()));
        assert_eq!(read_cell("default", &object), Some(Ok(full())));
        let mut stored = object.clone();
        stored.0["metadata"]["resourceVersion"] = json!("7");
        let expected = (id(), StoredCell { version: Version(7), cell: Ok(full()) });
        assert_eq!(stored_cell("default", &stored), Some(expected));
        assert_eq!(object.0["spec"]["blocks"][2].get("uid"), None);
        assert_eq!(changed_cell(&term, &full())["spec"]["blocks"], object.0["spec"]["blocks"]);
        assert_eq!(lost_cell(id()).unwrap().mask(), 24);
    }

    #[test]
    fn what_is_no_cell_is_named_and_never_empty() {
        let object = |change: fn(&mut Value)| {
            let mut object = new_cell("default", &TermId::from_random(1, 2), &full());
            change(&mut object.0);
            object
        };
        let broken = |change| cell(id(), &object(change)).unwrap_err();
        assert!(matches!(broken(|o| o["spec"]["pool"] = json!("x")), CellError::Unreadable(_)));
        assert!(matches!(broken(|o| o["spec"]["blocks"][0]["state"] = json!("given")), CellError::Unreadable(_)));
        assert!(matches!(broken(|o| o["spec"]["blocks"][0]["node"] = json!("N")), CellError::Unreadable(_)));
        assert!(matches!(
            broken(|o| o["spec"]["blocks"][0]["block"] = json!("10.0.1.0/24")),
            CellError::Overlap { .. }
        ));
        assert!(matches!(
            broken(|o| o["spec"]["blocks"][0]["block"] = json!("10.9.1.0/24")),
            CellError::Outside { .. }
        ));
        assert!(matches!(broken(|o| o["spec"]["pool"] = json!("11.0.0.0/8")), CellError::OutsidePool { .. }));
        for stray in [
            object(|o| o["metadata"]["name"] = json!("default-10-1-0-0-16")),
            object(|o| o["spec"]["prefix"] = json!("10.0.0.1/16")),
            object(|o| o["spec"] = json!({})),
        ] {
            assert!(matches!(cell_id("default", &stray), Some(Err(_))), "{stray:?}");
        }
    }

    #[test]
    fn a_stamp_brings_the_finalizer_back_unless_the_object_is_being_deleted() {
        let term = TermId::from_random(1, 2);
        let mut object = new_cell("default", &term, &full());
        assert_eq!(stamp(&term, &object).get("metadata"), None);
        object.0["metadata"]["finalizers"] = json!(["theirs"]);
        assert_eq!(stamp(&term, &object)["metadata"]["finalizers"], json!(["theirs", LEDGER_FINALIZER]));
        object.0["metadata"]["deletionTimestamp"] = json!("2026-01-02T03:04:05Z");
        assert_eq!(stamp(&term, &object).get("metadata"), None);
    }

    #[test]
    fn a_resource_version_that_is_no_number_is_an_error_with_the_way_out() {
        let error = number("abc").unwrap_err().to_string();
        assert!(error.contains("\"abc\"") && error.contains("1.35"), "{error}");
        assert_eq!(number("42"), Ok(42));
    }
}

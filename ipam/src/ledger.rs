//! The ledger: the port to the store of claims, and the one pure function that says what the store must do.

use std::collections::{BTreeMap, BTreeSet};

use async_trait::async_trait;
use futures::stream::BoxStream;

use crate::{
    cell::{Cell, CellError, CellId, Version},
    names::TermId,
};

/// The fence as it was read: an unleased record that holds the id of the term that may write.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct FenceSeen {
    /// What it holds; `None` when there is none yet.
    pub value: Option<String>,
    /// Its version.
    pub version: Version,
}

impl FenceSeen {
    /// Whether the fence holds this term.
    #[must_use]
    pub fn holds(&self, term: &TermId) -> bool {
        self.value.as_deref() == Some(term.as_str())
    }

    /// Whether it holds a seal: nobody's term, so that every swap is refused.
    #[must_use]
    pub fn is_sealed(&self) -> bool {
        self.value.as_deref().is_some_and(TermId::is_seal)
    }
}

/// Which store, and a moment in its history.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Mark {
    /// The store's own id (etcd: the cluster id).
    pub store: u64,
    /// Its revision, which never falls.
    pub revision: i64,
}

/// A cell as it stands in the store. One that cannot be read is a state of its own, never an empty cell. One at
/// [`Version::ABSENT`] is known to the store and has lost its record: it holds what the term adopts, and the write of that
/// makes the record anew.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredCell {
    /// Its version.
    pub version: Version,
    /// Its contents, or why they cannot be read.
    pub cell: Result<Cell, CellError>,
}

/// Everything that the ledger holds, at one moment.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Loaded {
    /// That moment.
    pub mark: Mark,
    /// The fence at that moment.
    pub fence: FenceSeen,
    /// The cells.
    pub cells: BTreeMap<CellId, StoredCell>,
    /// Keys or objects beside the cells that no version of Basal writes, for a warning.
    pub strays: Vec<String>,
}

/// The newest version of each cell that was seen during a term. A store that shows an older one later, or none, was put
/// back, or somebody deleted the cell: nothing that was read before counts then. This notices what the store's own counter
/// does not tell any more once it has caught up.
#[derive(Debug, Clone, Default)]
pub struct SeenCells(BTreeMap<CellId, Version>);

impl SeenCells {
    /// Notes that a cell was there at a version.
    pub fn note(&mut self, id: CellId, version: Version) {
        let newest = self.0.entry(id).or_insert(version);
        *newest = (*newest).max(version);
    }

    /// Compares what was loaded with what was seen before, and notes it.
    ///
    /// # Errors
    /// The cell that is older than it was, or gone.
    pub fn follow(&mut self, loaded: &Loaded) -> Result<(), String> {
        for (id, seen) in &self.0 {
            // Answers may overtake each other: what was read before the cell was written proves nothing.
            if loaded.mark.revision < seen.0 {
                continue;
            }
            let now = loaded.cells.get(id).map(|stored| stored.version).filter(|now| *now != Version::ABSENT);
            match now {
                None => return Err(format!("the record of cell {id} was deleted")),
                Some(now) if now < *seen => {
                    return Err(format!("cell {id} was at version {} and is at {}", seen.0, now.0));
                }
                Some(_) => {}
            }
        }
        let there = loaded.cells.iter().filter(|(_, stored)| stored.version != Version::ABSENT);
        there.for_each(|(id, stored)| self.note(*id, stored.version));
        Ok(())
    }
}

/// One change that a watch saw.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LedgerChange {
    /// The fence changed.
    Fence(FenceSeen),
    /// A cell was written.
    Cell(CellId, StoredCell),
    /// A cell was deleted. Basal never does that: somebody else did.
    CellGone(CellId),
}

/// One cell of a batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CellSwap {
    /// The version that was read; [`Version::ABSENT`] for a cell that does not exist yet.
    pub expected: Version,
    /// The new contents.
    pub new: Cell,
}

/// How much one batch may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Cells.
    pub cells: usize,
    /// Bytes of cell texts.
    pub bytes: usize,
}

/// Why a read has no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LedgerError {
    /// Another store, or an older snapshot of it: nothing that was read before counts. Ends the term.
    #[error("the store of the ledger was replaced or restored ({0}); the term ends, and claims are read anew")]
    StoreReplaced(String),
    /// The claims are kept in another store: this one grants nothing.
    #[error(
        "the active store of claims is {active}, and this operator is configured for {configured}; set kvstore to {} in \
         the configuration of operator and agents, which keeps every claim, or have an operator with etcd move the claims: \
         set spec.moveTo of the Ledger to {configured}",
        kvstore_value(active)
    )]
    NotActive {
        /// `spec.store` of the Ledger.
        active: &'static str,
        /// What this operator works with.
        configured: &'static str,
    },
    /// The claims are being moved out of this store: it grants nothing.
    #[error(
        "the claims are sealed, because they are being moved to {to}, and this operator cannot do that; start one that \
         reaches both stores, or take spec.moveTo of the Ledger away to go on with this one"
    )]
    Sealed {
        /// `spec.moveTo` of the Ledger.
        to: &'static str,
    },
    /// The store does not allow it.
    #[error("the store of the ledger denied the read: {0}")]
    Denied(String),
    /// No answer, or the history asked for is gone. Load again.
    #[error("the store of the ledger did not answer: {0}")]
    Unavailable(String),
}

/// What the key `kvstore` is set to for a store.
fn kvstore_value(store: &str) -> &'static str {
    if store == "etcd" { "\"etcd\"" } else { "\"\" (none)" }
}

/// Why a write was not carried out, beside conflicts.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SwapRefusal {
    /// The batch is empty, names a cell twice, or is larger than the store's [`Limits`].
    #[error("the batch does not fit the store of the ledger: {0}")]
    Batch(String),
    /// The store said no.
    #[error("the store of the ledger refused the write: {0}")]
    Store(String),
}

/// The answer to [`Ledger::swap`].
#[must_use = "a batch that was refused or is unknown must be handled"]
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SwapAnswer {
    /// All cells were written, with these versions.
    Done(BTreeMap<CellId, Version>),
    /// Nothing was written: these cells are no longer at the version that was read. Load again.
    Conflict(BTreeSet<CellId>),
    /// Nothing was written: the fence holds another term. The term ends.
    FenceLost,
    /// Nothing was written.
    Refused(SwapRefusal),
    /// All cells were written, or none. Load again.
    Unknown(String),
    /// The store was replaced or restored; what was written went into another history. The term ends.
    StoreReplaced(String),
}

/// The answer to [`Ledger::take_fence`].
#[must_use = "a fence that was not taken gives no right to write"]
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FenceAnswer {
    /// The fence holds the term.
    Taken,
    /// Somebody wrote the fence after it was read.
    Lost,
    /// The store said no.
    Refused(SwapRefusal),
    /// The fence may hold the term. Read it: the term's id is in it, or never will be once another one is.
    Unknown(String),
    /// The store was replaced or restored.
    StoreReplaced(String),
}

/// What must still hold when a record that rests on claims is written: the term's fence and the claims' cells.
///
/// The stores turn it into conditions of the write itself.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Guard {
    /// What the fence must hold.
    pub term: TermId,
    /// The version of each cell that holds one of the claims.
    pub cells: BTreeMap<CellId, Version>,
}

impl Guard {
    /// Follows cells that a swap of the same term wrote since, with the claims in them as they were.
    pub fn follow(&mut self, written: &BTreeMap<CellId, Version>) {
        for (cell, version) in &mut self.cells {
            if let Some(newer) = written.get(cell) {
                *version = *newer;
            }
        }
    }
}

/// The store of claims.
///
/// A term begins so: win the Lease, [`Ledger::begin`], look at the Lease again, [`Ledger::take_fence`] with a fresh
/// [`TermId`], then [`Ledger::load`]. A leader that lost the Lease before its second look cannot take the fence
/// from its successor, because it would need the version that the successor replaced.
#[async_trait]
pub trait Ledger: Send + Sync + 'static {
    /// Reads the fence, at quorum, in order to take it. A new term trusts the store as it is: what was seen of its
    /// history before is forgotten. Until the next call every other method answers `StoreReplaced` once one did.
    ///
    /// # Errors
    /// See [`LedgerError`].
    async fn begin(&self) -> Result<FenceSeen, LedgerError>;

    /// Reads the fence, at quorum.
    ///
    /// # Errors
    /// See [`LedgerError`].
    async fn read_fence(&self) -> Result<FenceSeen, LedgerError>;

    /// Puts a term into the fence, if nobody wrote it since it was read.
    async fn take_fence(&self, seen: &FenceSeen, term: &TermId) -> FenceAnswer;

    /// Reads everything, at quorum and at one moment.
    ///
    /// # Errors
    /// See [`LedgerError`].
    async fn load(&self) -> Result<Loaded, LedgerError>;

    /// Follows every change after a moment. The stream ends after its first error; the caller loads again.
    fn watch(&self, after: Mark) -> BoxStream<'static, Result<LedgerChange, LedgerError>>;

    /// Replaces cells, all or none, if the fence holds `term` and each cell is at the version that was read.
    async fn swap(&self, term: &TermId, batch: &[CellSwap]) -> SwapAnswer;

    /// Notes the end of a term of which nothing is under way, where that spares the next one work. Nothing else depends on it.
    async fn end(&self, _term: &TermId) {}

    /// How much a batch may hold.
    fn limits(&self) -> Limits;
}

/// The state of a ledger, for the models: what a store holds, without the store.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct LedgerState {
    /// Raised by each write, and the version of what it wrote.
    pub revision: i64,
    /// The fence.
    pub fence: FenceSeen,
    /// The cells.
    pub cells: BTreeMap<CellId, (Version, Cell)>,
}

impl LedgerState {
    /// What [`Ledger::take_fence`] does.
    pub fn take_fence(&mut self, seen: &FenceSeen, term: &TermId) -> FenceAnswer {
        if self.fence.version != seen.version {
            return FenceAnswer::Lost;
        }
        self.revision += 1;
        self.fence = FenceSeen { value: Some(term.as_str().to_owned()), version: Version(self.revision) };
        FenceAnswer::Taken
    }

    /// What [`Ledger::swap`] does.
    pub fn commit(&mut self, term: &TermId, batch: &[CellSwap], limits: Limits) -> SwapAnswer {
        if let Err(refusal) = check_batch(batch, limits) {
            return SwapAnswer::Refused(refusal);
        }
        if !self.fence.holds(term) {
            return SwapAnswer::FenceLost;
        }
        let stale: BTreeSet<CellId> = batch
            .iter()
            .filter(|swap| self.version(swap.new.id()) != swap.expected)
            .map(|swap| swap.new.id())
            .collect();
        if !stale.is_empty() {
            return SwapAnswer::Conflict(stale);
        }
        self.revision += 1;
        let version = Version(self.revision);
        for swap in batch {
            self.cells.insert(swap.new.id(), (version, swap.new.clone()));
        }
        SwapAnswer::Done(batch.iter().map(|swap| (swap.new.id(), version)).collect())
    }

    /// What [`Ledger::load`] does.
    #[must_use]
    pub fn load(&self) -> Loaded {
        Loaded {
            mark: Mark { store: 0, revision: self.revision },
            fence: self.fence.clone(),
            cells: self
                .cells
                .iter()
                .map(|(id, (version, cell))| (*id, StoredCell { version: *version, cell: Ok(cell.clone()) }))
                .collect(),
            ..Loaded::default()
        }
    }

    /// Whether a write under this guard would be carried out.
    #[must_use]
    pub fn allows(&self, guard: &Guard) -> bool {
        self.fence.holds(&guard.term) && guard.cells.iter().all(|(cell, version)| self.version(*cell) == *version)
    }

    /// The version of a cell.
    #[must_use]
    pub fn version(&self, cell: CellId) -> Version {
        self.cells.get(&cell).map_or(Version::ABSENT, |(version, _)| *version)
    }
}

/// Whether a batch may be sent to a store with these limits.
///
/// # Errors
/// [`SwapRefusal::Batch`].
pub fn check_batch(batch: &[CellSwap], limits: Limits) -> Result<(), SwapRefusal> {
    let refused = |why: String| Err(SwapRefusal::Batch(why));
    if batch.is_empty() {
        return refused("it holds no cell".into());
    }
    if batch.len() > limits.cells {
        return refused(format!(
            "it holds {} cells, and at most {} go into one transaction",
            batch.len(),
            limits.cells
        ));
    }
    let bytes: usize = batch.iter().map(|swap| swap.new.text_bound()).sum();
    if bytes > limits.bytes {
        return refused(format!("it may take {bytes} bytes, and at most {} go into one transaction", limits.bytes));
    }
    let mut seen = BTreeSet::new();
    match batch.iter().find(|swap| !seen.insert(swap.new.id())) {
        Some(swap) => refused(format!("it names cell {} twice", swap.new.id())),
        None => Ok(()),
    }
}

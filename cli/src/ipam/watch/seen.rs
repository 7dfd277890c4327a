//! What the stores say at the moment, kept up by their changes, and what of it has to be judged.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use basal_ipam::{
    cell::{BlockState, Cell, CellId},
    check::Finding,
    ledger::{LedgerChange, Loaded, StoredCell},
    owners::{Holding, Source, claim_holdings, conflicts},
    prefix::PodCidr,
    rest::RestWatch,
};
use basal_kvstore::kv::Revision;

/// Two nodes seem to have an address in common. The servers are followed by streams of their own, so it may be that
/// one is only behind the other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Suspicion {
    /// The wider block's owner.
    pub(super) one: Suspect,
    /// The other.
    pub(super) other: Suspect,
}

/// One of the two.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Suspect {
    /// What is said.
    pub(super) holding: Holding,
    /// The revision of etcd that wrote it, or the version of the cell; 0 for a CiliumNode.
    pub(super) revision: Revision,
    /// The cell of a claim.
    pub(super) cell: Option<CellId>,
}

/// What a CiliumNode says.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Listed {
    /// The blocks that it lists.
    pub(super) blocks: Vec<PodCidr>,
    /// Those that its status confirms, where agents go by that.
    pub(super) confirmed: Vec<PodCidr>,
}

/// The state of the stores.
#[derive(Debug)]
pub(super) struct Seen {
    cells: BTreeMap<CellId, StoredCell>,
    records: BTreeMap<String, (Revision, Vec<PodCidr>)>,
    objects: BTreeMap<String, Listed>,
    quarantine: Duration,
    rest: RestWatch,
    /// Pairs that stand and were handed out to be judged.
    handed_out: BTreeSet<(Holding, Holding)>,
    changes: u64,
    grants: u64,
}

/// The times between which something happened, since a start of the caller's choice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Between {
    /// Nothing of it was there yet.
    pub(super) earliest: Duration,
    /// It was there.
    pub(super) latest: Duration,
}

impl Seen {
    /// The state by a first reading. Blocks rest at least so long.
    pub(super) fn new(loaded: &Loaded, quarantine: Duration) -> Self {
        let mut seen = Self {
            cells: BTreeMap::new(),
            records: BTreeMap::new(),
            objects: BTreeMap::new(),
            quarantine,
            rest: RestWatch::new(quarantine),
            handed_out: BTreeSet::new(),
            changes: 0,
            grants: 0,
        };
        seen.reload(loaded, Duration::ZERO);
        seen
    }

    /// Takes the cells as they are, after a gap in which anything may have happened.
    pub(super) fn reload(&mut self, loaded: &Loaded, now: Duration) {
        self.cells.clone_from(&loaded.cells);
        self.rest = RestWatch::new(self.quarantine);
        self.look_at_rest(Between { earliest: now, latest: now });
    }

    /// A time of a change as [`RestWatch`] takes it: all are later by the quarantine than those of a first reading, so that
    /// what rests at that, since nobody knows when, may go at any time.
    fn after_reading(&self, Between { earliest, latest }: Between) -> Between {
        Between { earliest: earliest + self.quarantine, latest: latest + self.quarantine }
    }

    /// How many changes came.
    pub(super) fn changes(&self) -> u64 {
        self.changes
    }

    /// How many blocks became a node's.
    pub(super) fn grants(&self) -> u64 {
        self.grants
    }

    /// Takes a change of the ledger; answers what is wrong with it.
    pub(super) fn ledger(&mut self, change: LedgerChange, between: Between) -> Vec<Finding> {
        let changed = match change {
            LedgerChange::Fence(_) => return Vec::new(),
            LedgerChange::CellGone(id) => {
                self.cells.remove(&id);
                id
            }
            LedgerChange::Cell(id, stored) => {
                // A watch that was broken may say again what it said.
                if self.cells.get(&id).is_some_and(|known| known.version >= stored.version) {
                    return Vec::new();
                }
                let before = self.cells.insert(id, stored);
                self.grants += granted(before.as_ref(), self.cells.get(&id));
                id
            }
        };
        self.changes += 1;
        let broken = self.cells.get(&changed).and_then(|stored| stored.cell.as_ref().err());
        let mut found: Vec<Finding> =
            broken.map(|error| Finding::unreadable_cell(changed, error)).into_iter().collect();
        found.extend(self.look_at_rest(self.after_reading(between)));
        found
    }

    /// While a cell cannot be read, what became of its claims is not known.
    fn look_at_rest(&mut self, Between { earliest, latest }: Between) -> Vec<Finding> {
        let cells: Result<Vec<&Cell>, _> = self.cells.values().map(|stored| stored.cell.as_ref()).collect();
        let Ok(cells) = cells else { return Vec::new() };
        self.rest.look(cells, earliest, latest).iter().map(Finding::quarantine).collect()
    }

    /// Takes a node record, `None` for one that is gone.
    pub(super) fn record(&mut self, node: String, record: Option<(Revision, Vec<PodCidr>)>) {
        self.changes += 1;
        match record {
            Some(record) => self.records.insert(node, record),
            None => self.records.remove(&node),
        };
    }

    /// Takes all node records as they are.
    pub(super) fn all_records(&mut self, records: BTreeMap<String, (Revision, Vec<PodCidr>)>) {
        self.records = records;
    }

    /// Takes a CiliumNode, an empty one when it is gone.
    pub(super) fn object(&mut self, node: String, listed: Listed) {
        self.changes += 1;
        self.objects.insert(node, listed);
    }

    /// Takes all CiliumNodes as they are.
    pub(super) fn all_objects(&mut self, objects: BTreeMap<String, Listed>) {
        self.objects = objects;
    }

    /// Whether these are the CiliumNodes that are known.
    pub(super) fn has_objects(&self, objects: &BTreeMap<String, Listed>) -> bool {
        fn saying(all: &BTreeMap<String, Listed>) -> impl Iterator<Item = (&String, &Listed)> {
            all.iter().filter(|(_, listed)| **listed != Listed::default())
        }
        saying(objects).eq(saying(&self.objects))
    }

    /// Whether these are the cells that are known.
    pub(super) fn has_cells(&self, loaded: &Loaded) -> bool {
        self.cells == loaded.cells
    }

    /// The pairs that came up since the last call.
    pub(super) fn suspicions(&mut self) -> Vec<Suspicion> {
        let mut holdings: Vec<Holding> =
            self.cells.values().filter_map(|stored| stored.cell.as_ref().ok()).flat_map(claim_holdings).collect();
        let listed = |source, node: &String, blocks: &[PodCidr]| {
            let node = node.clone();
            let holding = move |block: &PodCidr| Holding { block: *block, node: node.clone(), source };
            blocks.iter().map(holding).collect::<Vec<_>>()
        };
        holdings.extend(self.records.iter().flat_map(|(node, (_, blocks))| listed(Source::Record, node, blocks)));
        for (node, Listed { blocks, confirmed }) in &self.objects {
            holdings.extend(listed(Source::Spec, node, blocks));
            holdings.extend(listed(Source::Confirmation, node, confirmed));
        }
        let standing: BTreeSet<(Holding, Holding)> =
            conflicts(&holdings).into_iter().map(|(one, other)| (one.clone(), other.clone())).collect();
        let new: Vec<_> = standing.difference(&self.handed_out).cloned().collect();
        self.handed_out = standing;
        let suspicion =
            |(one, other): (Holding, Holding)| Suspicion { one: self.suspect(one), other: self.suspect(other) };
        new.into_iter().map(suspicion).collect()
    }

    fn suspect(&self, holding: Holding) -> Suspect {
        let (mut revision, mut cell) = (0, None);
        match holding.source {
            Source::Spec | Source::Confirmation | Source::Pods => {}
            Source::Record => revision = self.records.get(&holding.node).map_or(0, |(revision, _)| *revision),
            Source::Claim(_) => {
                let holds = |stored: &StoredCell| {
                    let block = stored.cell.as_ref().ok().and_then(|cell| cell.blocks().get(&holding.block));
                    block.is_some_and(|block| block.node.as_str() == holding.node)
                };
                if let Some((id, stored)) = self.cells.iter().find(|(_, stored)| holds(stored)) {
                    (revision, cell) = (stored.version.0, Some(*id));
                }
            }
        }
        Suspect { holding, revision, cell }
    }
}

/// How many blocks of a cell are granted to a node to which they were not before.
fn granted(before: Option<&StoredCell>, now: Option<&StoredCell>) -> u64 {
    fn readable(stored: Option<&StoredCell>) -> Option<&Cell> {
        stored?.cell.as_ref().ok()
    }
    let Some(now) = readable(now) else { return 0 };
    let was = |at: &PodCidr| readable(before).and_then(|cell| cell.blocks().get(at));
    let new = now.blocks().iter().filter(|(at, block)| {
        let had = was(at).is_some_and(|was| was.state == BlockState::Granted && was.node == block.node);
        block.state == BlockState::Granted && !had
    });
    new.count() as u64
}

#[cfg(test)]
mod tests {
    use basal_ipam::{
        cell::{Block, Version},
        names::NodeName,
    };

    use super::*;

    const QUARANTINE: Duration = Duration::from_secs(15);

    fn id() -> CellId {
        CellId::new("10.0.0.0/16".parse().unwrap())
    }

    fn block(text: &str) -> PodCidr {
        text.parse().unwrap()
    }

    fn cell(version: i64, blocks: &[(&str, &str, BlockState)]) -> LedgerChange {
        LedgerChange::Cell(id(), stored(version, blocks))
    }

    fn stored(version: i64, blocks: &[(&str, &str, BlockState)]) -> StoredCell {
        let mut cell = Cell::new(id(), block("10.0.0.0/8"), 24).unwrap();
        for (at, node, state) in blocks {
            let claim = Block { state: *state, node: NodeName::new(node).unwrap(), uid: None };
            cell.set(block(at), claim).unwrap();
        }
        StoredCell { version: Version(version), cell: Ok(cell) }
    }

    fn at(seconds: u64) -> Between {
        Between { earliest: Duration::from_secs(seconds), latest: Duration::from_secs(seconds) }
    }

    const AT: &str = "10.0.0.0/24";
    use BlockState::{Granted, Quarantined};

    #[test]
    fn a_pair_is_handed_out_once_as_long_as_it_stands() {
        let mut seen = Seen::new(&Loaded::default(), QUARANTINE);
        assert_eq!(seen.ledger(cell(5, &[(AT, "a", Granted)]), at(0)), []);
        seen.record("a".into(), Some((6, vec![block(AT)])));
        seen.object("a".into(), Listed { blocks: vec![block(AT)], ..Listed::default() });
        assert_eq!(seen.suspicions(), []);
        seen.record("b".into(), Some((7, vec![block("10.0.0.0/25")])));
        let found = seen.suspicions();
        assert_eq!(found.len(), 3, "by claim, record and CiliumNode of a");
        let claim = found.iter().find(|each| each.one.cell == Some(id())).unwrap();
        assert_eq!((claim.one.revision, claim.other.revision), (5, 7));
        assert_eq!(seen.suspicions(), []);
        seen.record("b".into(), None);
        assert_eq!(seen.suspicions(), []);
        seen.record("b".into(), Some((9, vec![block(AT)])));
        assert_eq!(seen.suspicions().len(), 3, "it came back");
        assert_eq!((seen.changes(), seen.grants()), (6, 1));
    }

    #[test]
    fn what_a_status_confirms_is_a_holding_of_its_own() {
        let mut seen = Seen::new(&Loaded::default(), QUARANTINE);
        seen.ledger(cell(5, &[(AT, "a", Granted)]), at(0));
        let listed = Listed { blocks: Vec::new(), confirmed: vec![block(AT)] };
        seen.object("b".into(), listed.clone());
        assert_eq!(seen.suspicions()[0].other.holding.source, Source::Confirmation);
        assert!(!seen.has_objects(&BTreeMap::new()));
        assert!(seen.has_objects(&BTreeMap::from([("b".into(), listed), ("c".into(), Listed::default())])));
    }

    #[test]
    fn quarantine_is_watched_and_repeated_news_are_old() {
        let mut seen = Seen::new(&Loaded::default(), QUARANTINE);
        assert_eq!(seen.ledger(cell(5, &[(AT, "a", Granted)]), at(0)), []);
        assert_eq!(seen.ledger(cell(6, &[(AT, "a", Quarantined)]), at(10)), []);
        assert_eq!(seen.ledger(cell(5, &[(AT, "a", Granted)]), at(11)), []);
        let found = seen.ledger(cell(7, &[]), at(20));
        assert_eq!(found.len(), 1);
        assert_eq!((found[0].reason, found[0].what.as_str()), ("ShortQuarantine", AT));
        assert_eq!(seen.ledger(cell(8, &[(AT, "b", Granted)]), at(20)), []);
        assert_eq!(seen.ledger(LedgerChange::CellGone(id()), at(21))[0].reason, "NoQuarantine");
    }

    #[test]
    fn what_rests_at_the_first_reading_may_go_at_any_time() {
        let loaded = Loaded { cells: [(id(), stored(5, &[(AT, "a", Quarantined)]))].into(), ..Loaded::default() };
        let mut seen = Seen::new(&loaded, QUARANTINE);
        assert_eq!(seen.ledger(cell(6, &[(AT, "b", Granted)]), at(1)), []);
        assert_eq!(seen.ledger(cell(7, &[(AT, "b", Quarantined)]), at(2)), []);
        seen.reload(&loaded, at(3).latest);
        assert_eq!(seen.ledger(cell(8, &[]), at(4)), []);
        assert_eq!(seen.ledger(cell(9, &[(AT, "c", Quarantined)]), at(5)), []);
        assert_eq!(seen.ledger(cell(10, &[]), at(6))[0].reason, "ShortQuarantine");
    }

    #[test]
    fn a_cell_that_cannot_be_read_is_told_and_ends_no_claim() {
        let mut seen = Seen::new(&Loaded::default(), QUARANTINE);
        seen.ledger(cell(5, &[(AT, "a", Granted)]), at(0));
        let broken = StoredCell { version: Version(6), cell: Cell::from_json(id(), b"{}") };
        let found = seen.ledger(LedgerChange::Cell(id(), broken), at(1));
        assert_eq!(found.iter().map(|each| each.reason).collect::<Vec<_>>(), ["CellUnreadable"]);
        assert_eq!(seen.ledger(cell(7, &[(AT, "a", Granted)]), at(2)), []);
    }
}

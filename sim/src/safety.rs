//! The promise that nothing may break: no block has two owners, no block in use is free, quarantine is kept.
//!
//! [`BlockSafety`] looks at the stores themselves: the ledger's cells, in etcd or in custom resources, the CiliumNodes, the
//! node records. What it finds must hold after every single change, whoever made it.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use basal_crds::kvstore::{NodeRecord, keys::NODES_PREFIX};
use basal_ipam::{
    cell::{Cell, CellError},
    owners::{Holding, Source, claim_holdings, conflicts},
    prefix::PodCidr,
    rest::{RestBreach, RestWatch},
};
use basal_kvstore::{
    kv::Revision,
    ledger::{LedgerKey, LedgerKeys},
};
use basal_objects::{
    ledger::read_cell,
    object::{Object, resources},
};
use serde_json::Value;
use tokio::time::Instant;

use crate::{kv::ModelKv, objects::ModelObjects};

/// A broken promise.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Breach {
    /// Two nodes hold addresses in common.
    #[error(
        "{} is {}'s by {}, and {} is {}'s by {}",
        .0.block, .0.node, .0.source, .1.block, .1.node, .1.source
    )]
    TwoOwners(Box<Holding>, Box<Holding>),
    /// A claim went while the block was still in use.
    #[error("{} is free in the ledger, and {}'s by {}", .0.block, .0.node, .0.source)]
    FreeInUse(Holding),
    /// A block is confirmed to a node that has no claim to use it.
    #[error("{} is confirmed to {}, which has no claim to use it", .0.block, .0.node)]
    ConfirmedWithoutClaim(Holding),
    /// Quarantine was not kept.
    #[error(transparent)]
    Rest(#[from] RestBreach),
    /// A cell cannot be read.
    #[error("{key} cannot be read: {why}")]
    BadCell {
        /// Its key.
        key: String,
        /// What is wrong with it.
        why: String,
    },
}

/// What was read out of some keys, by the revision that wrote each: few of them change between two looks.
#[derive(Debug)]
struct Parsed<T>(BTreeMap<String, (Revision, T)>);

impl<T> Default for Parsed<T> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

impl<T: Clone> Parsed<T> {
    /// Takes what is known of a key out of the last look, or reads it anew.
    fn keep(&mut self, last: &Self, key: &str, revision: Revision, read: impl FnOnce() -> T) {
        let known = last.0.get(key).filter(|(known, _)| *known == revision);
        let value = known.map_or_else(read, |(_, value)| value.clone());
        self.0.insert(key.to_owned(), (revision, value));
    }

    fn values(&self) -> impl Iterator<Item = (&String, &T)> {
        self.0.iter().map(|(key, (_, value))| (key, value))
    }
}

/// The watcher over the blocks of one cluster. It remembers the claims of the last look, so it must see every change.
#[derive(Debug)]
pub struct BlockSafety {
    keys: LedgerKeys,
    quarantine: Duration,
    begun: Instant,
    rest: RestWatch,
    /// What was in use under a claim of its own when last looked at.
    covered: BTreeSet<(PodCidr, String)>,
    cluster: String,
    cells: Parsed<Result<Cell, CellError>>,
    specs: Parsed<Vec<Holding>>,
    records: Parsed<Vec<Holding>>,
}

impl BlockSafety {
    /// For the cluster of this name, whose blocks rest at least `quarantine` before they are granted again.
    #[must_use]
    pub fn new(cluster: &str, quarantine: Duration) -> Self {
        Self {
            keys: LedgerKeys::new(cluster),
            cluster: cluster.to_owned(),
            quarantine,
            begun: Instant::now(),
            rest: RestWatch::new(quarantine),
            covered: BTreeSet::new(),
            cells: Parsed::default(),
            specs: Parsed::default(),
            records: Parsed::default(),
        }
    }

    /// Forgets the last look, for a scenario that puts an older state back on purpose.
    pub fn forget(&mut self) {
        *self = Self::new(&self.cluster, self.quarantine);
    }

    /// Looks.
    ///
    /// # Errors
    /// The first broken promise.
    pub fn look(&mut self, kv: &ModelKv, objects: &ModelObjects) -> Result<(), Breach> {
        self.read(kv, objects);
        let bad = |key: &String, error: &CellError| Breach::BadCell { key: key.clone(), why: error.to_string() };
        let cells = self.cells.values().map(|(key, cell)| cell.as_ref().map_err(|error| bad(key, error)));
        let cells: Vec<&Cell> = cells.collect::<Result<_, _>>()?;
        let uses: Vec<&Holding> =
            self.specs.values().chain(self.records.values()).flat_map(|(_, holdings)| holdings).collect();
        let claimed: Vec<Holding> = cells.iter().flat_map(|cell| claim_holdings(cell)).collect();
        if let Some((one, other)) = conflicts(claimed.iter().chain(uses.iter().copied())).first() {
            return Err(Breach::TwoOwners(Box::new((*one).clone()), Box::new((*other).clone())));
        }
        let now = self.begun.elapsed();
        let breaches = self.rest.look(cells, now, now);
        let freed = uses.iter().find(|holding| {
            self.rest.claim(&holding.block).is_none() && self.covered.contains(&(holding.block, holding.node.clone()))
        });
        if let Some(holding) = freed {
            return Err(Breach::FreeInUse((*holding).clone()));
        }
        check_confirmations(&self.rest, &uses)?;
        if let Some(breach) = breaches.into_iter().next() {
            return Err(breach.into());
        }
        let covers = |holding: &&&Holding| {
            self.rest.claim(&holding.block).is_some_and(|block| block.node.as_str() == holding.node)
        };
        self.covered = uses.iter().filter(covers).map(|holding| (holding.block, holding.node.clone())).collect();
        Ok(())
    }

    fn read(&mut self, kv: &ModelKv, objects: &ModelObjects) {
        let (mut cells, mut specs, mut records) = (Parsed::default(), Parsed::default(), Parsed::default());
        kv.visit(self.keys.prefix(), |key, revision, value| {
            if let Some(LedgerKey::Cell(id)) = self.keys.parse(key) {
                cells.keep(&self.cells, key, revision, || Cell::from_json(id, value));
            }
        });
        objects.visit(&resources::POD_CIDR_CELL, |key, revision, value| {
            if value.pointer("/spec/cluster").and_then(Value::as_str) == Some(self.cluster.as_str()) {
                cells.keep(&self.cells, key, revision, || {
                    let missing = || Err(CellError::Unreadable("no cell".to_owned()));
                    read_cell(&self.cluster, &Object(value.clone())).unwrap_or_else(missing)
                });
            }
        });
        kv.visit(NODES_PREFIX, |key, revision, value| {
            records.keep(&self.records, key, revision, || record_holdings(value));
        });
        objects.visit(&resources::CILIUM_NODE, |key, revision, value| {
            specs.keep(&self.specs, key, revision, || spec_holdings(value));
        });
        (self.cells, self.specs, self.records) = (cells, specs, records);
    }
}

/// Whether the ledger holds what agents are told that it holds.
fn check_confirmations(rest: &RestWatch, uses: &[&Holding]) -> Result<(), Breach> {
    let claimed = |holding: &Holding| {
        let claim = rest.claim(&holding.block);
        claim.is_some_and(|block| block.node.as_str() == holding.node && block.state.is_usable())
    };
    let confirmed = uses.iter().filter(|holding| holding.source == Source::Confirmation);
    let wrong = confirmed.copied().find(|holding| !claimed(holding));
    wrong.map_or(Ok(()), |holding| Err(Breach::ConfirmedWithoutClaim(holding.clone())))
}

/// What a CiliumNode says. What does not parse holds nothing: nobody can use it.
fn spec_holdings(object: &Value) -> Vec<Holding> {
    let node = object.pointer("/metadata/name").and_then(Value::as_str).unwrap_or_default();
    let list = object.pointer("/spec/ipam/podCIDRs").and_then(Value::as_array);
    let texts = list.into_iter().flatten().filter_map(Value::as_str);
    let listed = texts.filter_map(|text| holding(text, node, Source::Spec));
    let confirmed = object.pointer("/status/ipam/pod-cidrs").and_then(Value::as_object).into_iter().flatten();
    let confirmed = confirmed.filter(|(_, entry)| entry.get("status").and_then(Value::as_str) == Some("in-use"));
    listed.chain(confirmed.filter_map(|(text, _)| holding(text, node, Source::Confirmation))).collect()
}

/// What a node record says, likewise.
fn record_holdings(value: &[u8]) -> Vec<Holding> {
    let Ok(record) = NodeRecord::parse(value) else { return Vec::new() };
    record.cidrs().filter_map(|cidr| holding(&cidr.to_string(), record.name.as_str(), Source::Record)).collect()
}

fn holding(block: &str, node: &str, source: Source) -> Option<Holding> {
    Some(Holding { block: block.parse().ok()?, node: node.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use basal_crds::names::{ClusterId, ClusterName};
    use basal_ipam::{
        cell::{Block, BlockState, CellId},
        names::NodeName,
    };
    use basal_kvstore::kv::{Keys, Kv as _, Op, Txn};
    use basal_objects::{object::ObjectKey, port::Objects as _};
    use basal_runtime::{env::SeededEnv, outcome::Outcome};
    use serde_json::json;

    use super::*;

    const REST: Duration = Duration::from_secs(300);

    struct Stage {
        kv: ModelKv,
        objects: ModelObjects,
        safety: BlockSafety,
    }

    impl Stage {
        fn new() -> Self {
            let objects = ModelObjects::new(Arc::new(SeededEnv::new(1)));
            objects.define(&resources::CILIUM_NODE, false).unwrap();
            Self { kv: ModelKv::new(1), objects, safety: BlockSafety::new("default", REST) }
        }

        async fn write(&self, op: Op) {
            assert!(self.kv.txn(Txn { then: vec![op], ..Txn::default() }).await.is_done());
        }

        /// Writes the cell 10.0.0.0/16 with these blocks.
        async fn ledger(&self, blocks: &[(&str, &str, BlockState)]) {
            let id = CellId::new("10.0.0.0/16".parse().unwrap());
            let mut cell = Cell::new(id, "10.0.0.0/8".parse().unwrap(), 24).unwrap();
            for (at, node, state) in blocks {
                let block = Block { state: *state, node: NodeName::new(node).unwrap(), uid: None };
                cell.set(at.parse().unwrap(), block).unwrap();
            }
            let key = LedgerKeys::new("default").cell(id);
            self.write(Op::Put { key, value: cell.to_json().unwrap(), lease: 0 }).await;
        }

        async fn spec(&self, node: &str, cidrs: &[&str]) {
            let key = ObjectKey::cluster(node);
            if let Some(old) = self.objects.get(resources::CILIUM_NODE, &key).await.unwrap() {
                let only_if = basal_objects::port::Preconditions {
                    uid: old.uid().to_owned(),
                    resource_version: old.resource_version().to_owned(),
                };
                assert!(self.objects.delete(resources::CILIUM_NODE, &key, only_if).await.is_done());
            }
            let object = json!({
                "apiVersion": "cilium.io/v2", "kind": "CiliumNode", "metadata": {"name": node},
                "spec": {"ipam": {"podCIDRs": cidrs}},
            });
            assert!(matches!(self.objects.create(resources::CILIUM_NODE, Object(object)).await, Outcome::Done(_)));
        }

        async fn record(&self, node: &str, cidr: &str) {
            let name = NodeName::new(node).unwrap();
            let cluster = ClusterName::new("default").unwrap();
            let mut record = NodeRecord::new(name.clone(), cluster.clone(), ClusterId::default());
            record.ipv4_cidrs = vec![cidr.parse().unwrap()];
            let key = basal_crds::kvstore::keys::node(&cluster, &name);
            self.write(Op::Put { key, value: record.to_json().into_bytes(), lease: 0 }).await;
        }

        fn look(&mut self) -> Result<(), Breach> {
            self.safety.look(&self.kv, &self.objects)
        }
    }

    use BlockState::{Granted, Quarantined};

    #[tokio::test(start_paused = true)]
    async fn the_life_of_a_block_breaks_nothing() {
        let mut stage = Stage::new();
        stage.look().unwrap();
        stage.ledger(&[("10.0.0.0/24", "a", Granted), ("10.0.1.0/24", "b", Granted)]).await;
        stage.look().unwrap();
        stage.spec("a", &["10.0.0.0/24", "no CIDR"]).await;
        stage.record("a", "10.0.0.0/24").await;
        stage.look().unwrap();
        stage.spec("a", &[]).await;
        stage.write(Op::Delete(Keys::Prefix(NODES_PREFIX.to_owned()))).await;
        stage.ledger(&[("10.0.0.0/24", "a", Quarantined), ("10.0.1.0/24", "b", Granted)]).await;
        stage.look().unwrap();
        tokio::time::advance(REST).await;
        stage.ledger(&[("10.0.0.0/24", "c", Granted), ("10.0.1.0/24", "b", Granted)]).await;
        stage.look().unwrap();
    }

    #[tokio::test]
    async fn two_owners_are_found_wherever_they_stand() {
        let two_owners = |stage: &mut Stage| match stage.look() {
            Err(Breach::TwoOwners(one, other)) => (one.source, other.source),
            other => panic!("{other:?}"),
        };
        let mut stage = Stage::new();
        stage.ledger(&[("10.0.0.0/24", "a", Granted)]).await;
        stage.spec("b", &["10.0.0.128/25"]).await;
        assert_eq!(two_owners(&mut stage), (Source::Claim(Granted), Source::Spec));

        let mut stage = Stage::new();
        stage.ledger(&[("10.0.0.0/24", "a", Quarantined)]).await;
        stage.record("b", "10.0.0.0/24").await;
        assert_eq!(two_owners(&mut stage), (Source::Claim(Quarantined), Source::Record));

        let mut stage = Stage::new();
        stage.spec("a", &["10.0.0.0/16"]).await;
        stage.spec("b", &["10.0.1.0/24"]).await;
        stage.spec("c", &["10.1.0.0/24"]).await;
        assert_eq!(two_owners(&mut stage), (Source::Spec, Source::Spec));
    }

    #[tokio::test]
    async fn a_block_that_is_freed_in_use_is_found() {
        let mut stage = Stage::new();
        stage.spec("a", &["10.0.0.0/24"]).await;
        // Nobody has adopted it yet: that is no breach.
        stage.look().unwrap();
        stage.ledger(&[("10.0.0.0/24", "a", Quarantined)]).await;
        stage.look().unwrap();
        stage.ledger(&[]).await;
        assert!(matches!(stage.look(), Err(Breach::FreeInUse(holding)) if holding.source == Source::Spec));
    }

    #[tokio::test(start_paused = true)]
    async fn a_block_that_does_not_rest_is_found() {
        let mut stage = Stage::new();
        stage.ledger(&[("10.0.0.0/24", "a", Granted)]).await;
        stage.look().unwrap();
        stage.ledger(&[("10.0.0.0/24", "b", Granted)]).await;
        assert!(matches!(stage.look(), Err(Breach::Rest(RestBreach::NoQuarantine { node, .. })) if node == "a"));

        let mut stage = Stage::new();
        stage.ledger(&[("10.0.0.0/24", "a", Quarantined)]).await;
        stage.look().unwrap();
        tokio::time::advance(REST / 2).await;
        stage.ledger(&[]).await;
        let (block, node) = ("10.0.0.0/24".parse().unwrap(), "a".to_owned());
        assert_eq!(stage.look(), Err(RestBreach::ShortQuarantine { block, node, rested: REST / 2 }.into()));
    }

    #[tokio::test]
    async fn a_cell_that_cannot_be_read_is_found() {
        let mut stage = Stage::new();
        let key = LedgerKeys::new("default").cell(CellId::new("10.0.0.0/16".parse().unwrap()));
        stage.write(Op::Put { key, value: b"{}".to_vec(), lease: 0 }).await;
        assert!(matches!(stage.look(), Err(Breach::BadCell { .. })));
    }
}

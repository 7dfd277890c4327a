use std::sync::Arc;

use basal_crds::{
    kvstore::NodeRecord,
    names::{ClusterId, ClusterName},
};
use basal_ipam::{
    cell::{BlockState, CellId},
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

/// Who leads read that the record is gone, and etcd was put back before the block was freed.
#[tokio::test(start_paused = true)]
async fn a_record_that_came_back_is_in_use_from_the_next_term_on() {
    for (next_term, found) in [(false, false), (true, true)] {
        let mut stage = Stage::new();
        let fence = |term: &str| {
            let key = LedgerKeys::new("default").fence().to_owned();
            Op::Put { key, value: term.as_bytes().to_vec(), lease: 0 }
        };
        stage.write(fence("1")).await;
        stage.ledger(&[("10.0.0.0/24", "a", Quarantined)]).await;
        stage.look().unwrap();
        tokio::time::advance(REST).await;
        stage.record("a", "10.0.0.0/24").await;
        stage.safety.put_back();
        stage.look().unwrap();
        if next_term {
            stage.write(fence("2")).await;
            stage.look().unwrap();
        }
        stage.ledger(&[]).await;
        assert_eq!(matches!(stage.look(), Err(Breach::FreeInUse(_))), found);
    }
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

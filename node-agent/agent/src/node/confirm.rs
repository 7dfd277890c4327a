//! What confirms that blocks are this node's: the ledger in etcd, or the CiliumNode's status, which the operator writes
//! after its ledger holds the claim.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use basal_ipam::{
    cell::Block,
    names::{NodeName, NodeUid},
    prefix::PodCidr,
};
use basal_kvstore::{
    kv::Kv,
    ledger::{ClaimError, LedgerKeys, read_claim, watch_claim},
};
use basal_objects::{cache::Cache, object::ObjectKey};
use basal_runtime::{
    backoff::{Backoff, Failures},
    env::SharedEnv,
};
use futures::{
    StreamExt as _,
    stream::{BoxStream, SelectAll},
};
use tokio::time::Instant;

use super::{
    claim::{Standing, standing},
    facts::NodeFacts,
    watch::CiliumNodeFacts,
};

/// Pauses before a claim that cannot be followed is looked up again.
const RETRY: Backoff = Backoff::new(Duration::from_millis(500), Duration::from_secs(30));

/// A watch that lived so long was a good one: after the next interruption pauses are short again.
const GOOD_WATCH: Duration = Duration::from_secs(10);

/// Whose the blocks have to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claimant {
    /// The Node's name.
    pub name: NodeName,
    /// The Node's uid.
    pub uid: NodeUid,
}

/// What is said of blocks.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Answer {
    /// Of each block that was asked for.
    pub standings: BTreeMap<PodCidr, Standing>,
    /// Why something is not known.
    pub problem: Option<String>,
}

/// What confirms blocks.
#[async_trait]
pub trait Confirm: Send + 'static {
    /// Its name in messages: the subject of "does not confirm".
    fn name(&self) -> &'static str;

    /// What is said of blocks.
    async fn ask(&mut self, claimant: &Claimant, blocks: &BTreeSet<PodCidr>) -> Answer;

    /// Waits until something else may be said of the blocks that were asked for last. Dropping the future loses nothing.
    async fn changed(&mut self);
}

/// The ledger in etcd, read at quorum and then watched.
pub struct EtcdConfirm {
    env: SharedEnv,
    kv: Arc<dyn Kv>,
    keys: LedgerKeys,
    /// Of the blocks that were asked for last.
    changes: SelectAll<BoxStream<'static, Result<Option<Block>, ClaimError>>>,
    asked: Instant,
    failures: Failures,
}

impl EtcdConfirm {
    /// The ledger at these keys.
    #[must_use]
    pub fn new(env: SharedEnv, kv: Arc<dyn Kv>, keys: LedgerKeys) -> Self {
        Self { env, kv, keys, changes: SelectAll::new(), asked: Instant::now(), failures: Failures::none(RETRY) }
    }
}

#[async_trait]
impl Confirm for EtcdConfirm {
    fn name(&self) -> &'static str {
        "etcd"
    }

    async fn ask(&mut self, claimant: &Claimant, blocks: &BTreeSet<PodCidr>) -> Answer {
        self.changes.clear();
        self.asked = Instant::now();
        let mut answer = Answer::default();
        for block in blocks {
            let found = match read_claim(&self.kv, &self.keys, *block).await {
                Ok(seen) => {
                    self.changes.push(watch_claim(&self.kv, &self.keys, *block, &seen));
                    standing(seen.block.as_ref(), &claimant.name, &claimant.uid)
                }
                Err(error) => {
                    answer.problem = Some(error.to_string());
                    Standing::Unknown
                }
            };
            answer.standings.insert(*block, found);
        }
        answer
    }

    async fn changed(&mut self) {
        match self.changes.next().await {
            Some(Ok(_)) => {}
            Some(Err(error)) => {
                if self.asked.elapsed() >= GOOD_WATCH {
                    self.failures.reset();
                }
                let pause = self.failures.next(&*self.env);
                tracing::debug!(%error, ?pause, "looking the claims up again");
                tokio::time::sleep(pause).await;
            }
            None => std::future::pending().await,
        }
    }
}

/// The CiliumNode's status. Its claimant wakes at each change of both objects, so there is nothing to wait for.
pub struct StatusConfirm {
    /// The Node.
    pub node: Cache<NodeFacts>,
    /// The CiliumNode.
    pub cilium_node: Cache<CiliumNodeFacts>,
}

/// What a CiliumNode says of a block. One that names another Node as its owner says nothing yet: its agent puts that
/// right, or the operator takes the blocks out of it.
fn by_status(facts: &CiliumNodeFacts, uid: &NodeUid, block: &PodCidr) -> Standing {
    if facts.confirmed.contains(block) {
        let is_ours = facts.owners.iter().any(|owner| owner == uid.as_str());
        return if is_ours { Standing::Confirmed } else { Standing::Unknown };
    }
    Standing::Denied
}

#[async_trait]
impl Confirm for StatusConfirm {
    fn name(&self) -> &'static str {
        "the CiliumNode's status"
    }

    async fn ask(&mut self, claimant: &Claimant, blocks: &BTreeSet<PodCidr>) -> Answer {
        let key = ObjectKey::cluster(claimant.name.as_str());
        let cilium_node = self.cilium_node.get(&key);
        // Deleting a CiliumNode frees nothing while its Node lives; when that is gone too, the blocks are taken back.
        let is_gone = self.node.synced() && self.cilium_node.synced() && self.node.get(&key).is_none();
        let say = |block: &PodCidr| match &cilium_node {
            Some(cached) => cached.valid().map_or(Standing::Unknown, |facts| by_status(facts, &claimant.uid, block)),
            None if is_gone => Standing::Denied,
            None => Standing::Unknown,
        };
        Answer { standings: blocks.iter().map(|block| (*block, say(block))).collect(), problem: None }
    }

    async fn changed(&mut self) {
        std::future::pending().await
    }
}

#[cfg(test)]
mod tests {
    use basal_objects::{
        object::{
            Object,
            resources::{CILIUM_NODE, NODE},
        },
        port::ObjectEvent,
    };
    use serde_json::json;

    use super::*;

    struct World {
        confirm: StatusConfirm,
        version: u32,
    }

    impl World {
        fn new() -> Self {
            let node = Cache::new(NODE, NodeFacts::parse);
            let cilium_node = Cache::new(CILIUM_NODE, CiliumNodeFacts::parse);
            Self { confirm: StatusConfirm { node, cilium_node }, version: 0 }
        }

        fn listed(&self) {
            self.confirm.node.apply(ObjectEvent::InSync);
            self.confirm.cilium_node.apply(ObjectEvent::InSync);
        }

        fn node(&mut self) {
            let object = json!({"metadata": {"name": "n1", "uid": "u1", "resourceVersion": "1"}});
            self.confirm.node.apply(ObjectEvent::Applied(Object(object)));
        }

        fn cilium_node(&mut self, owner: &str, listed: &[&str], used: &serde_json::Value) {
            self.version += 1;
            self.confirm.cilium_node.apply(ObjectEvent::Applied(Object(json!({
                "metadata": {"name": "n1", "uid": "cu", "resourceVersion": self.version.to_string(),
                    "ownerReferences": [{"apiVersion": "v1", "kind": "Node", "name": "n1", "uid": owner}]},
                "spec": {"ipam": {"podCIDRs": listed}}, "status": {"ipam": {"pod-cidrs": used}},
            }))));
        }

        async fn standing(&mut self) -> Standing {
            let (name, uid) = (NodeName::new("n1").unwrap(), NodeUid::new("u1").unwrap());
            let block = "10.0.1.0/24".parse().unwrap();
            self.confirm.ask(&Claimant { name, uid }, &BTreeSet::from([block])).await.standings[&block]
        }
    }

    #[tokio::test]
    async fn a_block_is_confirmed_that_is_listed_and_in_use_and_of_this_very_node() {
        let mut world = World::new();
        world.listed();
        world.node();
        let used = |state: &str| json!({"10.0.1.0/24": {"status": state}});
        for (owner, listed, status, expected) in [
            ("u1", &["10.0.1.0/24"][..], used("in-use"), Standing::Confirmed),
            ("u1", &[], used("in-use"), Standing::Denied),
            ("u1", &["10.0.1.0/24"], json!({}), Standing::Denied),
            ("u1", &["10.0.1.0/24"], used("released"), Standing::Denied),
            ("u0", &["10.0.1.0/24"], used("in-use"), Standing::Unknown),
        ] {
            world.cilium_node(owner, listed, &status);
            assert_eq!(world.standing().await, expected, "{owner} {listed:?} {status}");
        }
    }

    #[tokio::test]
    async fn a_missing_cilium_node_takes_nothing_away_while_its_node_lives() {
        let mut world = World::new();
        assert_eq!(world.standing().await, Standing::Unknown, "nothing was listed yet");
        world.listed();
        assert_eq!(world.standing().await, Standing::Denied, "both are gone");
        world.node();
        assert_eq!(world.standing().await, Standing::Unknown);
    }
}

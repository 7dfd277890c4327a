//! The tasks that keep this node registered and its claim looked up.

use std::{collections::BTreeSet, net::IpAddr, sync::Arc, time::Duration};

use basal_ipam::{
    names::{NodeName, NodeUid},
    prefix::{Family, PodCidr},
};
use basal_objects::{
    cache::Cache,
    object::{Object, ObjectKey, resources::CILIUM_NODE},
    port::{MergePatch, Objects},
};
use basal_runtime::{
    backoff::{Backoff, Failures},
    env::SharedEnv,
    outcome::Outcome,
};
use futures::{FutureExt, select_biased};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{
    claim::{Claim, listed},
    confirm::{Claimant, Confirm},
    facts::NodeFacts,
    registration::{OwnAddresses, Step, ThisRun, plan},
};

/// How often a claim is looked up without an occasion: what confirms it tells of changes, this is the safety net.
const SETTLED_INTERVAL: Duration = Duration::from_secs(60);
/// The same while something is not as it should be.
const UNSETTLED_INTERVAL: Duration = Duration::from_secs(10);
/// How often the CiliumNode is compared without an occasion.
const REGISTRATION_INTERVAL: Duration = Duration::from_secs(60);
const RETRY: Backoff = Backoff::new(Duration::from_millis(500), Duration::from_secs(30));

/// What of a CiliumNode the agent reads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CiliumNodeFacts {
    /// `spec.ipam.podCIDRs`.
    pub pod_cidrs: Vec<String>,
    /// The blocks among them that the operator confirms in `status.ipam.pod-cidrs`.
    pub confirmed: BTreeSet<PodCidr>,
    /// The uids of the Nodes that own it.
    pub owners: Vec<String>,
    /// `status.ipam.operator-status.error`.
    pub operator_error: String,
    /// `spec.health`: the health addresses of an earlier run.
    pub health: Vec<IpAddr>,
}

impl CiliumNodeFacts {
    /// Reads a CiliumNode; for a cache.
    ///
    /// # Errors
    /// The field that does not parse.
    pub fn parse(object: &Object) -> Result<Self, String> {
        let node: basal_crds::resources::CiliumNode = object.parse().map_err(|error| error.to_string())?;
        let health = [&node.spec.health.ipv4, &node.spec.health.ipv6];
        let owners = node.metadata.owner_references.iter().flatten().filter(|owner| owner.kind == "Node");
        Ok(Self {
            // One that is no block is told of where the list as a whole is read.
            confirmed: node.confirmed_pod_cidrs().filter_map(|(_, text)| text.parse().ok()).collect(),
            owners: owners.map(|owner| owner.uid.clone()).collect(),
            health: health.into_iter().filter_map(|text| text.parse().ok()).collect(),
            operator_error: node.status.ipam.operator_status.error,
            pod_cidrs: node.spec.ipam.pod_cidrs,
        })
    }
}

/// Keeps the CiliumNode as it should be.
pub struct Registration {
    /// Clock and randomness.
    pub env: SharedEnv,
    /// The API server.
    pub objects: Arc<dyn Objects>,
    /// The Node.
    pub node: Cache<NodeFacts>,
    /// The CiliumNode.
    pub cilium_node: Cache<CiliumNodeFacts>,
    /// The agent's own addresses, once it has them.
    pub own: watch::Receiver<OwnAddresses>,
    /// Boot and store.
    pub this_run: ThisRun,
    /// Both objects' name.
    pub name: String,
}

impl Registration {
    /// Runs until it is stopped.
    pub async fn run(mut self, stop: CancellationToken) {
        let (node, cilium_node) = (self.node.subscribe(), self.cilium_node.subscribe());
        let mut failures = Failures::none(RETRY);
        loop {
            let pause = match self.register().await {
                Ok(()) => {
                    failures.reset();
                    REGISTRATION_INTERVAL
                }
                Err(problem) => {
                    tracing::warn!(problem, "CiliumNode");
                    failures.next(&*self.env)
                }
            };
            select_biased! {
                () = stop.cancelled().fuse() => return,
                _ = node.next().fuse() => {}
                _ = cilium_node.next().fuse() => {}
                changed = self.own.changed().fuse() => if changed.is_err() { return },
                () = tokio::time::sleep(pause).fuse() => {}
            }
        }
    }

    async fn register(&mut self) -> Result<(), String> {
        let key = ObjectKey::cluster(self.name.clone());
        let Some(node) = self.node.get(&key) else { return Err(format!("there is no Node {key}")) };
        let Some(facts) = node.valid() else { return Err(format!("Node {key} does not parse")) };
        let existing = self.objects.get(CILIUM_NODE, &key).await.map_err(|error| error.to_string())?;
        let own = *self.own.borrow_and_update();
        let outcome = match plan(existing.as_ref(), facts, own, &self.this_run) {
            Step::Nothing => return Ok(()),
            Step::Create(object) => self.objects.create(CILIUM_NODE, object).await,
            Step::Patch(body) => {
                let version = existing.map(|object| (object.uid().to_owned(), object.resource_version().to_owned()));
                let (uid, resource_version) = version.unwrap_or_default();
                self.objects
                    .patch(CILIUM_NODE, &key, MergePatch { resource_version, uid, subresource: None, body })
                    .await
            }
        };
        match outcome {
            Outcome::Done(_) => Ok(()),
            Outcome::Refused(refusal) => Err(refusal.to_string()),
            Outcome::Unknown(why) => Err(why),
        }
    }
}

/// What is known of the claim.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ClaimReport {
    /// Blocks that addresses may come from.
    pub confirmed: BTreeSet<PodCidr>,
    /// Blocks that were this node's and are no more.
    pub lost: BTreeSet<PodCidr>,
    /// Why no new pods are served; `None` when they are.
    pub problem: Option<String>,
}

/// Keeps the claim known.
pub struct ClaimWatch {
    /// What confirms it.
    pub confirm: Box<dyn Confirm>,
    /// The Node.
    pub node: Cache<NodeFacts>,
    /// The CiliumNode.
    pub cilium_node: Cache<CiliumNodeFacts>,
    /// Both objects' name.
    pub name: String,
    /// The families that need a block.
    pub families: Vec<Family>,
    /// Where the result goes.
    pub report: watch::Sender<ClaimReport>,
}

impl ClaimWatch {
    /// Runs until it is stopped.
    pub async fn run(mut self, stop: CancellationToken) {
        let (node, cilium_node) = (self.node.subscribe(), self.cilium_node.subscribe());
        let (mut claim, mut claimant) = (Claim::default(), None);
        loop {
            let problem = self.look(&mut claim, &mut claimant).await.err();
            let interval = if problem.is_none() { SETTLED_INTERVAL } else { UNSETTLED_INTERVAL };
            self.tell(&claim, problem);
            select_biased! {
                () = stop.cancelled().fuse() => return,
                _ = node.next().fuse() => {}
                _ = cilium_node.next().fuse() => {}
                () = self.confirm.changed().fuse() => {}
                () = tokio::time::sleep(interval).fuse() => {}
            }
        }
    }

    fn tell(&self, claim: &Claim, problem: Option<String>) {
        let problem = claim.problem(&self.families, self.confirm.name()).map(|waiting| match problem {
            Some(problem) => format!("{waiting} ({problem})"),
            None => waiting,
        });
        let report = ClaimReport { confirmed: claim.confirmed().clone(), lost: claim.lost().clone(), problem };
        self.report.send_if_modified(|last| {
            let changed = *last != report;
            if changed {
                tracing::info!(confirmed = ?report.confirmed, lost = ?report.lost, problem = report.problem, "claim");
                *last = report;
            }
            changed
        });
    }

    /// `claimant` is the Node as it was last seen: one that is gone has its claim looked up all the same, for that is how
    /// the agent learns that its blocks are taken back.
    async fn look(&mut self, claim: &mut Claim, claimant: &mut Option<Claimant>) -> Result<(), String> {
        let key = ObjectKey::cluster(self.name.clone());
        if let Some(facts) = self.node.get(&key).as_ref().and_then(|node| node.valid()) {
            *claimant = Some(Claimant {
                name: NodeName::new(&facts.name).map_err(|error| error.to_string())?,
                uid: NodeUid::new(&facts.uid).map_err(|error| error.to_string())?,
            });
        }
        let claimant = claimant.as_ref().ok_or_else(|| format!("there is no Node {key}"))?;
        let (mut blocks, mut problem) = (BTreeSet::new(), None);
        if let Some(cilium_node) = self.cilium_node.get(&key).as_ref().and_then(|cached| cached.valid()) {
            match listed(&cilium_node.pod_cidrs) {
                Ok(listed) => blocks = listed,
                Err((field, error)) => problem = Some(format!("CiliumNode {key}: {field}: {error}")),
            }
            if !cilium_node.operator_error.is_empty() {
                problem = Some(format!("the operator says: {}", cilium_node.operator_error));
            }
        }
        let answer = self.confirm.ask(claimant, &claim.to_ask(&blocks)).await;
        claim.update(&answer.standings);
        answer.problem.or(problem).map_or(Ok(()), Err)
    }
}

//! The CiliumNode controller: every Node gets its blocks, its CiliumNode and its record, and loses them when it goes.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex},
    time::Duration,
};

use async_trait::async_trait;
use basal_ipam::{
    allocator::{Allocator, Batch, BatchId, Next},
    cell::{CellId, Version},
    ledger::{Limits, Loaded, SwapAnswer},
    names::{NodeName, NodeUid},
    prefix::PodCidr,
};
use basal_kvstore::kv::Revision;
use basal_objects::{
    cache::{OwnWrites, Value},
    object::{ObjectKey, resources},
};
use basal_runtime::{
    controller::{Controller, PerKey, Revisit},
    sync::lock,
};
use futures::{StreamExt as _, stream};
use tokio::time::Instant;

use super::{
    dangling::Dangling,
    endpoints::InUse,
    error::NodeError,
    facts::{CiliumNodeFacts, NodeFacts},
    observe::{Leftovers, Observed, SeenNode, Valid},
    packed::{Facts, Packed},
    plan::{Action, Complaint, NodePlan, Plan, Site, Wait, holds, plan},
    report::Reporter,
    validate::validate,
    views::Views,
    write::{Written, act},
};
use crate::ports::Ports;

/// Nodes that are written at the same time. The API server's own limits hold it back where needed (429 pauses a node).
const WRITES_AT_ONCE: usize = 32;

/// How long a record's write is waited for in the view of the records.
const RECORD_PATIENCE: Duration = Duration::from_secs(30);

/// Pause between two looks at a Node that the cache does not have yet.
const BEHIND: Duration = Duration::from_secs(30);

/// What plans are made from.
#[derive(Debug)]
pub struct NodeCore {
    /// The claims.
    pub allocator: Allocator,
    /// The start of the term, from which the allocator counts.
    pub begun: Instant,
    /// The cluster, and how its nodes are made known.
    pub site: Site,
    /// How much goes into one batch of the ledger.
    pub limits: Limits,
    /// CiliumNodes without Node.
    pub dangling: Dangling,
    /// The ledger must be read before it is written again.
    reload: bool,
}

impl NodeCore {
    /// The state at the begin of a term, when everything that nodes carry was adopted.
    #[must_use]
    pub fn new(allocator: Allocator, begun: Instant, site: Site, limits: Limits) -> Self {
        Self { allocator, begun, site, limits, dangling: Dangling::default(), reload: false }
    }

    /// Takes over a reading of the ledger, if somebody else wrote it; answers what they wrote.
    pub(super) fn compare(&mut self, loaded: &Loaded, now: Instant) -> BTreeSet<CellId> {
        let differing = self.allocator.differing(loaded);
        if !differing.is_empty() {
            self.allocator.reload(loaded, now.saturating_duration_since(self.begun));
        }
        differing
    }
}

/// The controller, for one term.
pub struct NodeController {
    ports: Ports,
    views: Views,
    core: Arc<Mutex<NodeCore>>,
    reporter: Reporter,
    own: Mutex<OwnWrites>,
    own_records: Mutex<BTreeMap<NodeName, (Revision, Instant)>>,
}

/// What became of the batch for the ledger.
#[derive(Debug)]
pub(super) struct LedgerEnd {
    swapped: Option<(BatchId, SwapAnswer)>,
    loaded: Option<Loaded>,
}

/// What became of one node.
#[derive(Debug)]
pub struct Applied {
    ledger: Arc<LedgerEnd>,
    /// What was written for it.
    pub written: Written,
    /// What is to be said of it.
    pub complaints: Vec<Complaint>,
    /// What it waits for.
    pub wait: Wait,
    /// The Node that is there.
    pub node: Option<NodeUid>,
    /// The CiliumNode as it was seen.
    pub seen: Option<CiliumNodeFacts>,
    /// The action that failed, and why.
    pub failed: Option<NodeError>,
}

impl LedgerEnd {
    /// Why what waits for the ledger has to wait longer.
    fn trouble(&self) -> Option<NodeError> {
        match self.swapped.as_ref().map(|(_, answer)| answer) {
            Some(SwapAnswer::Refused(refusal)) => Some(refusal.clone().into()),
            Some(SwapAnswer::Conflict(cells)) => {
                let cells: Vec<String> = cells.iter().map(ToString::to_string).collect();
                Some(NodeError::Again(format!("somebody else wrote {} meanwhile", cells.join(", "))))
            }
            Some(SwapAnswer::Unknown(why)) => Some(NodeError::Again(format!("the answer was lost: {why}"))),
            _ => None,
        }
    }

    /// The cells that the batch wrote.
    fn written(&self) -> Option<&BTreeMap<CellId, Version>> {
        match &self.swapped {
            Some((_, SwapAnswer::Done(cells))) => Some(cells),
            _ => None,
        }
    }
}

impl Applied {
    /// Why the node is not in its desired state, beside waiting.
    #[must_use]
    pub fn outcome(&self) -> Option<NodeError> {
        let waiting = (self.wait == Wait::Ledger).then(|| self.ledger.trouble()).flatten();
        let complaint = || self.complaints.first().map(|complaint| complaint.clone().into());
        self.failed.clone().or(waiting).or_else(complaint)
    }
}

/// What a cache's object says, or why it says nothing.
fn facts<T: Facts>(cached: &Value<Packed<T>>) -> Result<T, String> {
    match cached {
        Value::Valid(packed) => packed.facts(),
        Value::Invalid(why) => Err(why.clone()),
    }
}

impl NodeController {
    /// A controller for the term that `core` was begun for.
    #[must_use]
    pub fn new(ports: Ports, views: Views, core: Arc<Mutex<NodeCore>>, reporter: Reporter) -> Self {
        let own_records = Mutex::new(BTreeMap::new());
        Self { ports, views, core, reporter, own: Mutex::new(OwnWrites::default()), own_records }
    }

    fn seen_node(&self, key: &ObjectKey) -> Option<SeenNode> {
        let cached = self.views.nodes.get(key).filter(|cached| !cached.deleting)?;
        Some(facts(&cached.value).map_or_else(SeenNode::Invalid, SeenNode::Present))
    }

    fn knows(&self, name: &NodeName) -> bool {
        self.views.nodes.get(&ObjectKey::cluster(name.as_str())).is_some()
    }

    async fn look(&self, name: &NodeName) -> Result<Observed, NodeError> {
        let key = ObjectKey::cluster(name.as_str());
        let record = self.views.records.get(name.as_str()).map(|seen| seen.value);
        if let Some(node) = self.seen_node(&key) {
            let cilium_node = self.views.cilium_nodes.get(&key).map(|cached| facts(&cached.value));
            return Ok(Observed { node, cilium_node, record, leftovers: Leftovers::default() });
        }
        // The cache says that the Node is gone. Nothing is taken back on a cache's word.
        let node = match self.ports.objects.get(resources::NODE, &key).await? {
            Some(object) => NodeFacts::parse(&object).map_or_else(SeenNode::Invalid, SeenNode::Present),
            None => SeenNode::Gone,
        };
        let cilium_node = self.ports.objects.get(resources::CILIUM_NODE, &key).await?;
        let cilium_node = cilium_node.map(|object| CiliumNodeFacts::parse(&object));
        Ok(Observed { node, cilium_node, record, leftovers: Leftovers::default() })
    }

    /// What still uses the blocks of nodes that are gone: one read of each kind for the whole batch, and none when
    /// there is no such node.
    async fn find_leftovers(
        &self,
        observed: &mut BTreeMap<NodeName, Result<Observed, NodeError>>,
    ) -> Result<(), NodeError> {
        let (blocks, due) = {
            let core = lock(&self.core);
            let due: BTreeSet<PodCidr> = core.allocator.due(core.begun.elapsed()).into_iter().collect();
            let gone = observed.iter().filter(|(_, seen)| matches!(seen, Ok(o) if o.node == SeenNode::Gone));
            let blocks: Vec<(NodeName, PodCidr)> = gone
                .flat_map(|(name, _)| core.allocator.claims(name).into_iter().map(|claim| (name.clone(), claim.at)))
                .collect();
            (blocks, due)
        };
        if blocks.is_empty() {
            return Ok(());
        }
        let addresses = self.ports.store.addresses().await?;
        let mut in_use = InUse::default();
        let mut records = None;
        if blocks.iter().any(|(_, block)| due.contains(block)) {
            in_use = InUse::read(self.ports.objects.as_ref()).await?;
            records = Some(self.ports.store.records().await?);
        }
        for (name, block) in blocks {
            let Some(Ok(seen)) = observed.get_mut(&name) else { continue };
            // The view of the records does not know of one that came back when etcd was put back behind its watch.
            if let Some(records) = &records {
                seen.record = records.get(name.as_str()).map(|kv| kv.value.clone());
            }
            let inside = addresses.iter().filter(|key| holds(block, key)).cloned();
            seen.leftovers.ip_records.extend(inside);
            if due.contains(&block) {
                seen.leftovers.due.insert(block);
            }
            if in_use.has_address_in(&block) {
                seen.leftovers.with_endpoints.insert(block);
            }
            let unreadable = in_use.unreadable().iter().filter(|endpoint| endpoint.may_be_of(&name));
            seen.leftovers.unreadable = unreadable.cloned().collect();
        }
        Ok(())
    }

    async fn write_node(&self, name: NodeName, plan: NodePlan, ledger: Arc<LedgerEnd>) -> (NodeName, Applied) {
        let NodePlan { actions, complaints, wait, node, cilium_node } = plan;
        let mut written = Written::default();
        let mut failed = None;
        for mut action in actions {
            // The plan was made before the batch was written, and that changed nothing of what the node holds: where it
            // does, a plan writes no record.
            if let (Action::Record { guard, .. }, Some(cells)) = (&mut action, ledger.written()) {
                guard.follow(cells);
            }
            if let Err(error) = act(&self.ports, &name, action, &mut written).await {
                failed = Some(error);
                break;
            }
        }
        let now = Instant::now();
        if let Some(object) = &written.cilium_node {
            lock(&self.own).record(object, now);
        }
        if let Some(revision) = written.record_revision {
            lock(&self.own_records).insert(name.clone(), (revision, now));
        }
        (name, Applied { ledger, written, complaints, wait, node, seen: cilium_node, failed })
    }

    async fn write_ledger(&self, reload: bool, batch: Option<Batch>) -> LedgerEnd {
        let mut end = LedgerEnd { swapped: None, loaded: None };
        let mut reload = reload;
        if let Some(batch) = batch {
            let term = lock(&self.core).allocator.term().clone();
            let answer = self.ports.ledger.swap(&term, &batch.swaps).await;
            reload |= matches!(answer, SwapAnswer::Conflict(_) | SwapAnswer::Unknown(_));
            self.reporter.swapped(&answer);
            end.swapped = Some((batch.id, answer));
        }
        if reload {
            match self.ports.ledger.load().await {
                Ok(loaded) => end.loaded = Some(loaded),
                Err(error) => tracing::warn!(%error, "the ledger was not read again; it is tried with the next batch"),
            }
        }
        end
    }
}

#[async_trait]
impl Controller for NodeController {
    type Key = NodeName;
    type Core = NodeCore;
    type Observed = Observed;
    type Valid = Valid;
    type Plan = Plan;
    type Applied = Applied;
    type Error = NodeError;

    fn name(&self) -> &'static str {
        "ciliumnode"
    }

    fn keys(&self) -> Vec<NodeName> {
        let cached = |read: Vec<ObjectKey>| read.into_iter().map(|key| key.name);
        let nodes = self.views.nodes.read(|store| store.iter().map(|(key, _)| key.clone()).collect());
        let cilium_nodes = self.views.cilium_nodes.read(|store| store.iter().map(|(key, _)| key.clone()).collect());
        let names = cached(nodes).chain(cached(cilium_nodes)).chain(self.views.records.names());
        let mut all: BTreeSet<NodeName> = names.filter_map(|name| NodeName::new(&name).ok()).collect();
        all.extend(lock(&self.core).allocator.nodes().cloned());
        all.into_iter().collect()
    }

    fn caught_up(&self, key: &NodeName, now: Instant) -> bool {
        let object = ObjectKey::cluster(key.as_str());
        let mut own_records = lock(&self.own_records);
        let behind = own_records
            .get(key)
            .is_some_and(|(revision, at)| now < *at + RECORD_PATIENCE && !self.views.records.has_seen(*revision));
        if !behind {
            own_records.remove(key);
        }
        !behind && lock(&self.own).caught_up(&object, &self.views.cilium_nodes, now)
    }

    /// Reads the caches first and then the fence at quorum: while it holds our term, nobody else changed a claim since
    /// the CiliumNode was read, so a patch at that resourceVersion hands out no block that is not the node's.
    async fn observe(&self, keys: &BTreeSet<NodeName>) -> PerKey<Self, Observed> {
        let looks = stream::iter(keys.clone()).map(|name| async move {
            let seen = self.look(&name).await;
            (name, seen)
        });
        let mut observed: BTreeMap<_, _> = looks.buffer_unordered(WRITES_AT_ONCE).collect().await;
        let fence = self.ports.ledger.read_fence().await;
        let trouble = match fence {
            Ok(fence) if fence.holds(lock(&self.core).allocator.term()) => {
                self.find_leftovers(&mut observed).await.err()
            }
            Ok(_) => Some(NodeError::FenceLost),
            Err(error) => Some(error.into()),
        };
        match trouble {
            Some(error) => keys.iter().map(|name| (name.clone(), Err(error.clone()))).collect(),
            None => observed,
        }
    }

    fn validate(_: &NodeCore, _: &NodeName, observed: Observed) -> Result<Valid, NodeError> {
        validate(observed)
    }

    fn plan(core: &mut NodeCore, batch: BTreeMap<NodeName, Valid>, now: Instant) -> Plan {
        let since = now.saturating_duration_since(core.begun);
        let NodeCore { allocator, site, limits, dangling, reload, .. } = core;
        plan(site, allocator, dangling, *reload, batch, *limits, since)
    }

    async fn apply(&self, plan: Plan) -> PerKey<Self, Applied> {
        let Plan { reload, batch, nodes } = plan;
        let ledger = Arc::new(self.write_ledger(reload, batch).await);
        if let Some((_, SwapAnswer::FenceLost | SwapAnswer::StoreReplaced(_))) = ledger.swapped {
            return nodes.into_keys().map(|name| (name, Err(NodeError::FenceLost))).collect();
        }
        let writes = stream::iter(nodes).map(|(name, plan)| self.write_node(name, plan, Arc::clone(&ledger)));
        let applied: BTreeMap<_, _> = writes.buffer_unordered(WRITES_AT_ONCE).collect().await;
        applied.into_iter().map(|(name, applied)| (name, Ok(applied))).collect()
    }

    fn settle(core: &mut NodeCore, applied: &PerKey<Self, Applied>, now: Instant) {
        let since = now.saturating_duration_since(core.begun);
        let Some(ledger) = applied.values().find_map(|result| Some(&result.as_ref().ok()?.ledger)) else { return };
        if let Some((batch, answer)) = &ledger.swapped {
            core.reload |= core.allocator.settle(*batch, answer, since).next == Next::Reload;
        }
        if let Some(loaded) = &ledger.loaded {
            // A reload that finds another term's fence ends this one; the next look at the fence says so.
            core.allocator.reload(loaded, since);
            core.reload = false;
        }
    }

    async fn report(&self, key: &NodeName, result: &Result<Applied, NodeError>) -> Result<Revisit, NodeError> {
        let object = self.reporter.report(&self.ports, &self.views, key, result).await?;
        if let Some(object) = &object {
            lock(&self.own).record(object, Instant::now());
        }
        let Ok(applied) = result else { return Ok(Revisit::OnChange) };
        if let Some(error) = applied.outcome() {
            return Err(error);
        }
        Ok(match applied.wait {
            // The API server has the Node and the cache does not: it may be gone before the cache ever had it, and then no
            // event tells.
            Wait::Nothing if applied.node.is_some() && !self.knows(key) => Revisit::After(BEHIND),
            Wait::Nothing => Revisit::OnChange,
            Wait::Ledger => Revisit::After(Duration::ZERO),
            Wait::Until(left) => Revisit::After(left),
        })
    }
}

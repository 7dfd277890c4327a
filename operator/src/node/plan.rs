//! What to write for a batch of nodes, as data.
//!
//! A node is served in passes. The first reserves blocks and puts them into the batch for the ledger. Once the ledger holds
//! them, and there is a CiliumNode, the next one writes what rests on them: first the CiliumNode, then the node record, or
//! without etcd the confirmation in the CiliumNode's status. Whoever takes over between two writes does the same pass, since
//! the claim names the node. A node that is gone goes the other way:
//! first the CiliumNode lets go of the blocks, then they rest in quarantine, then the records go, then they are free.

use std::{collections::BTreeMap, net::IpAddr, time::Duration};

use basal_crds::{
    address::NodeAddress,
    kvstore::{NodeRecord, keys},
    names::Cluster,
    resources::{NodeFieldError, PodCidrStatus, PodCidrUse},
};
use basal_ipam::{
    allocator::{Allocator, Batch, Claim, FreeError, Refusal},
    cell::BlockState,
    ledger::{Guard, Limits},
    names::{NodeName, NodeUid},
    prefix::PodCidr,
};
use ipnet::{Ipv4Net, Ipv6Net};

use super::{
    dangling::{Dangling, Verdict, dangles},
    endpoints::UnreadableEndpoints,
    error::NodeError,
    facts::{CiliumNodeFacts, NodeFacts},
    observe::{Leftovers, Presence, Unreadable, Valid},
};
use crate::store::{Publication, RecordChange};

/// What is written for one node, after the ledger took the batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Makes the CiliumNode that is missing. It lists no block: a create has no precondition, so one that leaves late, when
    /// its leader has slept, would list what is somebody else's by then. The next pass lists them, at the version that this
    /// one leaves.
    CreateCiliumNode {
        /// The Node that owns it.
        uid: NodeUid,
        /// Its addresses.
        addresses: Vec<NodeAddress>,
        /// The Node's labels, which Cilium's agents copy too.
        labels: BTreeMap<String, String>,
    },
    /// Replaces `spec.ipam.podCIDRs`.
    WritePodCidrs {
        /// The uid that was seen.
        uid: String,
        /// The resourceVersion that was seen.
        resource_version: String,
        /// The new value; empty takes the field away.
        pod_cidrs: Vec<PodCidr>,
    },
    /// Deletes the CiliumNode of a Node that is gone.
    DeleteCiliumNode {
        /// The uid that was seen.
        uid: String,
        /// The resourceVersion that was seen.
        resource_version: String,
    },
    /// Writes into `status.ipam.pod-cidrs` which blocks the ledger holds for the node: only these its agent uses. It follows
    /// a write of the specification in the same pass, and is made from what that left.
    ConfirmBlocks {
        /// The uid that was seen.
        uid: String,
        /// The resourceVersion that was seen.
        resource_version: String,
        /// The entries that change; `None` takes one away.
        confirmed: BTreeMap<String, Option<PodCidrStatus>>,
    },
    /// Changes what is published beside the CiliumNode, if the claims still stand.
    Record {
        /// What must hold.
        guard: Guard,
        /// The change.
        change: RecordChange,
    },
}

/// What is to be said of a node, beside what is written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Complaint {
    /// A block is refused: the node's own wish, or any block at all.
    Refused(Refusal),
    /// An entry of `spec.ipam.podCIDRs` is no block.
    Unreadable(Unreadable),
    /// A block cannot leave quarantine.
    Free(FreeError),
    /// A field of the CiliumNode keeps the record from being made.
    Field(NodeFieldError),
    /// CiliumEndpoints that cannot be read keep the blocks of a node that is gone in quarantine.
    Endpoints(UnreadableEndpoints),
}

impl From<Complaint> for NodeError {
    fn from(complaint: Complaint) -> Self {
        match complaint {
            Complaint::Refused(refusal) => Self::Refused(refusal),
            Complaint::Unreadable(Unreadable { error, .. }) => Self::Refused(Refusal::Unparsable(error)),
            Complaint::Free(error) => Self::Free(error),
            Complaint::Field(error) => Self::Field(error),
            Complaint::Endpoints(unreadable) => Self::Endpoints(unreadable),
        }
    }
}

/// What one node waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wait {
    /// Nothing: it is in its desired state once the actions are done.
    Nothing,
    /// The ledger, or the CiliumNode that is made: the next pass follows at once.
    Ledger,
    /// The end of a time.
    Until(Duration),
}

/// The plan of one node.
#[derive(Debug, Clone, PartialEq)]
pub struct NodePlan {
    /// What to write, in this order; the first one that fails ends it.
    pub actions: Vec<Action>,
    /// What to say.
    pub complaints: Vec<Complaint>,
    /// What it waits for afterwards.
    pub wait: Wait,
    /// The Node that is there, for events.
    pub node: Option<NodeUid>,
    /// The CiliumNode as it was seen, for the status.
    pub cilium_node: Option<CiliumNodeFacts>,
}

/// The plan of a batch.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// Read the ledger again instead of writing it: what became of the last batch is not known.
    pub reload: bool,
    /// What goes into the ledger.
    pub batch: Option<Batch>,
    /// What is written for each node.
    pub nodes: BTreeMap<NodeName, NodePlan>,
}

/// What plans for nodes of one cluster are made for.
#[derive(Debug, Clone)]
pub struct Site {
    /// The cluster.
    pub cluster: Cluster,
    /// How its nodes are made known.
    pub publication: Publication,
}

/// Plans for a batch of nodes. `now` counts from the start of the term.
pub(super) fn plan(
    site: &Site,
    allocator: &mut Allocator,
    dangling: &mut Dangling,
    reload: bool,
    batch: BTreeMap<NodeName, Valid>,
    limits: Limits,
    now: Duration,
) -> Plan {
    let nodes = batch.into_iter().map(|(name, valid)| {
        let plan = match valid.presence {
            Presence::Present { node, carried, unreadable } => {
                dangling.forget(&name);
                let view = ServedView { cilium_node: valid.cilium_node, record: valid.record, carried, unreadable };
                serve(site, allocator, &name, node, view, now)
            }
            Presence::Gone(leftovers) => {
                let view = GoneView { cilium_node: valid.cilium_node, record: valid.record, leftovers };
                withdraw(site.publication, allocator, dangling, &name, view, now)
            }
        };
        (name, plan)
    });
    let nodes = nodes.collect();
    let batch = if reload { None } else { allocator.next_batch(limits) };
    Plan { reload, batch, nodes }
}

struct ServedView {
    cilium_node: Option<CiliumNodeFacts>,
    record: Option<Vec<u8>>,
    carried: Vec<PodCidr>,
    unreadable: Vec<Unreadable>,
}

fn serve(
    site: &Site,
    allocator: &mut Allocator,
    name: &NodeName,
    node: NodeFacts,
    view: ServedView,
    now: Duration,
) -> NodePlan {
    let NodeFacts { uid, addresses, labels, .. } = node;
    let node = Some(uid.clone());
    let ServedView { cilium_node, record, carried, unreadable } = view;
    let mut complaints: Vec<Complaint> = unreadable.into_iter().map(Complaint::Unreadable).collect();
    let refusals = carried.iter().filter_map(|block| allocator.request(name, &uid, *block).err());
    // While a change of the node is under way nothing is known yet; the next pass asks again.
    complaints.extend(refusals.filter(|refusal| !matches!(refusal, Refusal::Busy { .. })).map(Complaint::Refused));
    let (blocks, mut wait) = match allocator.grant(name, &uid, now) {
        Ok(grant) if grant.confirmed => (grant.blocks, Wait::Nothing),
        Ok(_) | Err(Refusal::Busy { .. }) => {
            return NodePlan { actions: Vec::new(), complaints, wait: Wait::Ledger, node, cilium_node };
        }
        Err(refusal) => {
            complaints.push(Complaint::Refused(refusal));
            (allocator.confirmed(name), Wait::Nothing)
        }
    };
    let mut actions = Vec::new();
    match &cilium_node {
        None => {
            actions.push(Action::CreateCiliumNode { uid, addresses, labels });
            wait = Wait::Ledger;
        }
        Some(facts) => {
            let listed: Vec<&str> = facts.pod_cidrs.iter().map(String::as_str).collect();
            let texts: Vec<String> = blocks.iter().map(ToString::to_string).collect();
            if listed != texts {
                actions.push(Action::WritePodCidrs {
                    uid: facts.uid.clone(),
                    resource_version: facts.resource_version.clone(),
                    pod_cidrs: blocks.clone(),
                });
            }
        }
    }
    // What makes the blocks known rests on the CiliumNode, so it follows once that is there.
    if let Some(facts) = &cilium_node {
        if site.publication.has_status() {
            actions.extend(confirm(facts, &blocks));
        }
        if site.publication.has_records() {
            match record_of(&site.cluster, facts, &blocks) {
                Ok(made) => {
                    let text = made.to_json();
                    if record.as_deref() != Some(text.as_bytes())
                        && let Some(guard) = allocator.guard(name)
                    {
                        actions.push(Action::Record { guard, change: RecordChange::Publish(text) });
                    }
                }
                Err(error) => complaints.push(Complaint::Field(error)),
            }
        }
    }
    NodePlan { actions, complaints, wait, node, cilium_node }
}

/// What makes the status of a CiliumNode confirm exactly these blocks; nothing when it does.
pub(super) fn confirm(seen: &CiliumNodeFacts, blocks: &[PodCidr]) -> Option<Action> {
    let in_use = PodCidrStatus { status: Some(PodCidrUse::InUse) };
    let wanted: BTreeMap<String, PodCidrStatus> =
        blocks.iter().map(|block| (block.to_string(), in_use.clone())).collect();
    let found = &seen.confirmed;
    let gone = found.keys().filter(|block| !wanted.contains_key(*block)).map(|block| (block.clone(), None));
    let new = wanted.iter().filter(|(block, status)| found.get(*block) != Some(*status));
    let new = new.map(|(block, status)| (block.clone(), Some(status.clone())));
    let confirmed: BTreeMap<_, _> = gone.chain(new).collect();
    let (uid, resource_version) = (seen.uid.clone(), seen.resource_version.clone());
    (!confirmed.is_empty()).then_some(Action::ConfirmBlocks { uid, resource_version, confirmed })
}

struct GoneView {
    cilium_node: Option<CiliumNodeFacts>,
    record: Option<Vec<u8>>,
    leftovers: Leftovers,
}

/// Takes back what a node had that is gone.
fn withdraw(
    publication: Publication,
    allocator: &mut Allocator,
    dangling: &mut Dangling,
    name: &NodeName,
    view: GoneView,
    now: Duration,
) -> NodePlan {
    let GoneView { cilium_node, record, leftovers } = view;
    let claims = allocator.claims(name);
    let mut plan =
        NodePlan { actions: Vec::new(), complaints: Vec::new(), wait: Wait::Nothing, node: None, cilium_node };
    let withdrawal = |allocator: &Allocator| Action::Record {
        guard: Guard { term: allocator.term().clone(), cells: BTreeMap::new() },
        change: RecordChange::Withdraw,
    };
    let actions = plan.cilium_node.as_ref().map(|facts| let_go(publication, facts)).unwrap_or_default();
    if let Some(facts) = plan.cilium_node.as_ref().filter(|_| !actions.is_empty()) {
        if dangles(facts, &claims) {
            let wait = match dangling.look(name, &facts.uid, now) {
                Verdict::Stays => Some(Wait::Nothing),
                Verdict::Waits(left) => Some(Wait::Until(left)),
                Verdict::Goes => None,
            };
            if let Some(wait) = wait {
                // Nobody is behind it whom others should send packets to.
                plan.actions.extend(record.map(|_| withdrawal(allocator)));
                plan.wait = wait;
                return plan;
            }
        }
        plan.actions = actions;
        // Whatever becomes of the write, the next look sees it; only then are blocks released.
        plan.wait = Wait::Ledger;
        return plan;
    }
    dangling.forget(name);
    let recorded = record.is_some();
    plan.actions.extend(record.map(|_| withdrawal(allocator)));
    let held = || claims.iter().filter(|claim| claim.block.state != BlockState::Quarantined);
    if held().next().is_some() {
        // Claims of several Nodes of this name, all of them gone, are released one Node after the other.
        let uid = held().find_map(|claim| claim.block.uid.clone());
        plan.wait = Wait::Ledger;
        if let Err(refusal) = allocator.release(name, uid.as_ref())
            && !matches!(refusal, Refusal::Busy { .. })
        {
            plan.complaints.push(Complaint::Refused(refusal));
        }
        return plan;
    }
    if !leftovers.ip_records.is_empty()
        && let Some(guard) = allocator.quarantine_guard(name)
    {
        let change = RecordChange::WithdrawAddresses(leftovers.ip_records.clone());
        plan.actions.push(Action::Record { guard, change });
    }
    let wait = free_what_is_due(allocator, &claims, recorded, &leftovers, now, &mut plan.complaints);
    // Part of what takes the blocks back may still be on its way; the time of rest is not known before.
    plan.wait = if allocator.is_changing(name) { Wait::Ledger } else { wait };
    plan
}

/// Makes the CiliumNode of a Node that is gone stop listing blocks: deletes it, or empties the fields where an
/// annotation keeps it. Nothing when there is nothing to do.
fn let_go(publication: Publication, facts: &CiliumNodeFacts) -> Vec<Action> {
    let (uid, resource_version) = (facts.uid.clone(), facts.resource_version.clone());
    if !facts.keep {
        return vec![Action::DeleteCiliumNode { uid, resource_version }];
    }
    let mut actions = Vec::new();
    if !facts.pod_cidrs.is_empty() {
        actions.push(Action::WritePodCidrs { uid, resource_version, pod_cidrs: Vec::new() });
    }
    if publication.has_status() {
        actions.extend(confirm(facts, &[]));
    }
    actions
}

fn free_what_is_due(
    allocator: &mut Allocator,
    claims: &[Claim],
    recorded: bool,
    leftovers: &Leftovers,
    now: Duration,
    complaints: &mut Vec<Complaint>,
) -> Wait {
    let mut due = allocator.due(now);
    due.retain(|block| leftovers.due.contains(block));
    let unreadable = &leftovers.unreadable;
    if !unreadable.is_empty() && claims.iter().any(|claim| due.contains(&claim.at)) {
        complaints.push(Complaint::Endpoints(UnreadableEndpoints(unreadable.clone())));
    }
    for claim in claims.iter().filter(|claim| due.contains(&claim.at)) {
        // A record goes before its block is free, never after.
        let in_use = recorded
            || !unreadable.is_empty()
            || leftovers.with_endpoints.contains(&claim.at)
            || leftovers.ip_records.iter().any(|key| holds(claim.at, key));
        if in_use {
            allocator.rest_again(claim.at, now);
            continue;
        }
        if let Err(error) = allocator.free(claim.at, now) {
            complaints.push(Complaint::Free(error));
        }
    }
    let left = allocator.next_due().filter(|_| !claims.is_empty()).map(|at| at.saturating_sub(now));
    left.map_or(Wait::Nothing, |left| Wait::Until(left.max(Duration::from_secs(1))))
}

/// Whether an ip→identity record's key lies in a block.
#[must_use]
pub(super) fn holds(block: PodCidr, key: &str) -> bool {
    keys::parse_ip_target(key).is_ok_and(|target| block.contains_address(target.ip()))
}

/// The record of a node with its blocks.
fn record_of(cluster: &Cluster, facts: &CiliumNodeFacts, blocks: &[PodCidr]) -> Result<NodeRecord, NodeFieldError> {
    let (mut ipv4, mut ipv6) = (Vec::new(), Vec::new());
    for block in blocks {
        match block.address() {
            IpAddr::V4(ip) => ipv4.push(Ipv4Net::new_assert(ip, block.prefix_len())),
            IpAddr::V6(ip) => ipv6.push(Ipv6Net::new_assert(ip, block.prefix_len())),
        }
    }
    facts.object.record(cluster, ipv4, ipv6)
}

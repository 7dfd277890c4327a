//! What users are told about a node: the error in its CiliumNode's status, events on Node and CiliumNode, metrics.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
};

use basal_ipam::{allocator::Loss, ledger::SwapAnswer, names::NodeName};
use basal_objects::{
    events::{EventRecorder, EventType, Happening, Regarding},
    object::{Object, ObjectKey, Resource, resources},
    port::{MergePatch, Refusal as ObjectRefusal},
};
use basal_runtime::{
    failure::{Failure as _, chain},
    outcome::Outcome,
    reason::Reason,
    sync::lock,
};
use serde_json::{Value, json};
use tracing::warn;

use super::{
    controller::Applied, endpoints::UnreadableEndpoints, error::NodeError, facts::CiliumNodeFacts, plan::Wait,
    views::Views,
};
use crate::{metrics::OperatorMetrics, ports::Ports};

/// What the operator was about to do, for events.
const ALLOCATE: Reason = Reason::new("Allocate");
const ADOPT: Reason = Reason::new("Adopt");
const NOT_KEPT: Reason = Reason::new("PodCIDRNotKept");
const PUBLISH: Reason = Reason::new("Publish");
const SHARED: Reason = Reason::new("NodeAddressShared");
const FREE: Reason = Reason::new("Free");
const COLLECT: Reason = Reason::new("Collect");
const COLLECTED: Reason = Reason::new("CiliumNodeCollected");

/// Tells. Clones share what was told.
#[derive(Debug, Clone)]
pub struct Reporter {
    events: EventRecorder,
    metrics: OperatorMetrics,
    /// The reason that each node was last told, so that an event is a change and no heartbeat.
    told: Arc<Mutex<BTreeMap<NodeName, Reason>>>,
}

/// A CiliumNode's status as it was last seen.
struct StatusSeen {
    uid: String,
    resource_version: String,
    /// `None` when the object does not parse.
    error: Option<String>,
}

impl Reporter {
    /// Tells through these.
    #[must_use]
    pub fn new(events: EventRecorder, metrics: OperatorMetrics) -> Self {
        Self { events, metrics, told: Arc::default() }
    }

    /// A batch went to the ledger.
    pub(super) fn swapped(&self, answer: &SwapAnswer) {
        self.metrics.swapped(match answer {
            SwapAnswer::Done(_) => "Done",
            SwapAnswer::Conflict(_) => "Conflict",
            SwapAnswer::FenceLost => "FenceLost",
            SwapAnswer::Refused(_) => "Refused",
            SwapAnswer::Unknown(_) => "Unknown",
            SwapAnswer::StoreReplaced(_) => "StoreReplaced",
        });
    }

    /// A block that a node carries is not its own: told at the start of a term, on the node that loses it.
    pub fn lost(&self, views: &Views, loss: &Loss) {
        let pods = if loss.live { "; pods that run in it keep their addresses, new ones get others" } else { "" };
        let note = format!("{} stays with another owner: {}{pods}", loss.at, loss.refusal);
        self.tell(views, &loss.node, None, EventType::Warning, NOT_KEPT, ADOPT, &note);
        self.metrics.refused(loss.refusal.reason());
    }

    /// Tells what became of a node; answers the CiliumNode when its status was written.
    ///
    /// # Errors
    /// The status was not written.
    pub(super) async fn report(
        &self,
        ports: &Ports,
        views: &Views,
        name: &NodeName,
        result: &Result<Applied, NodeError>,
    ) -> Result<Option<Object>, NodeError> {
        let outcome = match result {
            Ok(applied) => applied.outcome(),
            Err(error) => Some(error.clone()),
        };
        let node = result.as_ref().ok().and_then(|applied| applied.node.as_ref()).map(|uid| uid.as_str().to_owned());
        if let Ok(applied) = result {
            if applied.written.published {
                self.metrics.record_written();
            }
            if let Some(facts) = applied.seen.as_ref().filter(|_| applied.written.deleted) {
                self.collected(name, facts);
            }
            // No event: the CiliumNode shows its blocks, and thousands of nodes would make twice as many events of it.
            if applied.written.handed_out.as_ref().is_some_and(|blocks| !blocks.is_empty()) {
                self.metrics.granted();
            }
        }
        match &outcome {
            Some(error) if is_for_users(error) => {
                self.metrics.refused(error.reason().as_str());
                if let NodeError::Endpoints(unreadable) = error {
                    self.unreadable(name, error.reason(), unreadable);
                }
                if lock(&self.told).insert(name.clone(), error.reason()) != Some(error.reason()) {
                    self.tell(views, name, node, EventType::Warning, error.reason(), ALLOCATE, &chain(error));
                }
            }
            Some(_) => {}
            None => {
                lock(&self.told).remove(name);
            }
        }
        let text = match (&outcome, result) {
            (Some(error), _) if is_for_users(error) => chain(error),
            (None, Ok(applied)) if applied.wait == Wait::Nothing => String::new(),
            // Not known yet, or of no concern for the node's owner: what stands there stays.
            _ => return Ok(None),
        };
        let Some(seen) = status_seen(views, name, result) else { return Ok(None) };
        if seen.error.as_ref() == Some(&text) {
            return Ok(None);
        }
        let body = json!({ "status": { "ipam": { "operator-status": { "error": text } } } });
        let patch =
            MergePatch { resource_version: seen.resource_version, uid: seen.uid, subresource: Some("status"), body };
        let key = ObjectKey::cluster(name.as_str());
        match ports.objects.patch(resources::CILIUM_NODE, &key, patch).await {
            Outcome::Refused(ObjectRefusal::NotFound(_)) => Ok(None),
            other => super::write::done("the status of the CiliumNode was not written", other).map(Some),
        }
    }

    /// CiliumEndpoints that hold a node's blocks because nobody can read them. They are told themselves: of the node that
    /// is gone nothing is left to tell.
    fn unreadable(&self, node: &NodeName, reason: Reason, endpoints: &UnreadableEndpoints) {
        for endpoint in &endpoints.0 {
            let why = &endpoint.why;
            let note = format!(
                "{why}: it keeps the blocks of node {node}, which is gone, in quarantine; correct or delete it"
            );
            let (resource, key, uid) = (resources::CILIUM_ENDPOINT, endpoint.key.clone(), endpoint.uid.clone());
            self.events.record(Happening {
                regarding: Regarding { resource, key, uid },
                event_type: EventType::Warning,
                reason,
                action: FREE,
                note,
                shared: None,
            });
        }
    }

    /// A node has an address that another one has too.
    pub(super) fn shares_address(&self, views: &Views, name: &NodeName, note: &str) {
        warn!(node = %name, note, "two nodes have one address");
        self.tell(views, name, None, EventType::Warning, SHARED, PUBLISH, note);
    }

    /// A CiliumNode that no Node stands behind was deleted.
    fn collected(&self, name: &NodeName, facts: &CiliumNodeFacts) {
        self.metrics.upkeep.cilium_node_collected();
        let blocks = if facts.pod_cidrs.is_empty() { "none".to_owned() } else { facts.pod_cidrs.join(", ") };
        let note = format!("there is no Node of this name, so the CiliumNode was deleted; its PodCIDRs: {blocks}");
        // The caches may have forgotten it already.
        let (resource, key) = (resources::CILIUM_NODE, ObjectKey::cluster(name.as_str()));
        let regarding = Regarding { resource, key, uid: facts.uid.clone() };
        self.events.record(Happening {
            regarding,
            event_type: EventType::Normal,
            reason: COLLECTED,
            action: COLLECT,
            note,
            shared: None,
        });
    }

    /// An event on the Node and on the CiliumNode.
    #[expect(clippy::too_many_arguments, reason = "each is one field of the event")]
    fn tell(
        &self,
        views: &Views,
        name: &NodeName,
        node: Option<String>,
        event_type: EventType,
        reason: Reason,
        action: Reason,
        note: &str,
    ) {
        let key = ObjectKey::cluster(name.as_str());
        let node = node.or_else(|| views.nodes.get(&key).map(|cached| cached.uid.clone()));
        let cilium_node = views.cilium_nodes.get(&key).map(|cached| cached.uid.clone());
        let both: [(Resource, Option<String>); 2] = [(resources::NODE, node), (resources::CILIUM_NODE, cilium_node)];
        for (resource, uid) in both {
            let Some(uid) = uid else { continue };
            let regarding = Regarding { resource, key: key.clone(), uid };
            let note = note.to_owned();
            self.events.record(Happening { regarding, event_type, reason, action, note, shared: None });
        }
    }
}

/// Whether an error is for people to mend, and no passing trouble of the operator.
fn is_for_users(error: &NodeError) -> bool {
    matches!(
        error,
        NodeError::NodeInvalid(_)
            | NodeError::CiliumNodeInvalid(_)
            | NodeError::Field(_)
            | NodeError::Refused(_)
            | NodeError::Free(_)
            | NodeError::Endpoints(_)
            | NodeError::Swap(_)
            | NodeError::Write { refusal: ObjectRefusal::Forbidden(_), .. }
    )
}

fn status_seen(views: &Views, name: &NodeName, result: &Result<Applied, NodeError>) -> Option<StatusSeen> {
    if let Ok(applied) = result {
        if applied.written.deleted {
            return None;
        }
        if let Some(object) = &applied.written.cilium_node {
            let error = object.0.pointer("/status/ipam/operator-status/error").and_then(Value::as_str);
            return Some(StatusSeen {
                uid: object.uid().to_owned(),
                resource_version: object.resource_version().to_owned(),
                error: Some(error.unwrap_or_default().to_owned()),
            });
        }
        return applied.seen.as_ref().map(|facts| StatusSeen {
            uid: facts.uid.clone(),
            resource_version: facts.resource_version.clone(),
            error: Some(facts.error.clone()),
        });
    }
    let cached = views.cilium_nodes.get(&ObjectKey::cluster(name.as_str()))?;
    Some(StatusSeen {
        uid: cached.uid.clone(),
        resource_version: cached.version.as_str().to_owned(),
        error: cached.valid().and_then(|packed| packed.facts().ok()).map(|facts| facts.error),
    })
}

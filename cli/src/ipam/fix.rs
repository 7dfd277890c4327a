//! What `--fix` does: it says each step, and then does it under conditions on what was read.

use std::{collections::BTreeSet, fmt, sync::Arc};

use basal_crds::kvstore::{keys, timestamp_value};
use basal_ipam::{
    cell::CellId,
    check::{Finding, Kind, Remedy},
};
use basal_kvstore::kv::{Compare, Is, Keys, Kv, Op, Txn};
use basal_objects::{
    object::{ObjectKey, resources},
    port::MergePatch,
};
use basal_runtime::outcome::Outcome;
use serde_json::json;

use super::stores::{Look, Stores};

/// The annotation that makes the operator look at a node: the time of the last nudge.
const NUDGED: &str = "basal.io/nudged-at";

/// One step.
pub(super) enum Step {
    /// Deletes a node record, if record, fence and the cells around its blocks are as they were read.
    DeleteRecord {
        /// Where it lies.
        kv: Arc<dyn Kv>,
        /// The node.
        node: String,
        /// Its key.
        key: String,
        /// What must hold.
        when: Vec<Compare>,
    },
    /// Touches a node's object.
    Nudge {
        /// The node.
        node: String,
    },
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::DeleteRecord { node, key, .. } => {
                write!(f, "delete {key} from etcd, if nothing of node {node} has come back")
            }
            Self::Nudge { node } => write!(f, "annotate node {node} with {NUDGED}, so that the operator looks at it"),
        }
    }
}

/// What is to be done about findings, and what is left alone.
pub(super) struct Plan {
    pub(super) steps: Vec<Step>,
    /// Findings about claims: only the leader writes the ledger.
    pub(super) claims_left: usize,
}

/// Plans.
pub(super) fn plan(stores: &Stores, look: &Look, findings: &[Finding]) -> Plan {
    let remedies = findings.iter().filter_map(|finding| finding.remedy.as_ref());
    let steps = remedies.filter_map(|remedy| match remedy {
        Remedy::Nudge { node } => Some(Step::Nudge { node: node.clone() }),
        Remedy::DeleteRecord { node } => delete_record(stores, look, node),
    });
    let about_claims = |finding: &&Finding| {
        matches!(finding.kind, Kind::Duplicate) || finding.places.iter().any(|place| place.contains("of the ledger"))
    };
    Plan { steps: steps.collect(), claims_left: findings.iter().filter(about_claims).count() }
}

fn delete_record(stores: &Stores, look: &Look, node: &str) -> Option<Step> {
    let etcd = stores.etcd.as_ref()?;
    let key = format!("{}{node}", keys::nodes_of(&stores.cluster));
    let mut when = vec![Compare::new(key.clone(), Is::ModRevision(*look.records.get(node)?))];
    when.push(Compare::new(etcd.keys.fence(), Is::ModRevision(look.fence.version.0)));
    let record = look.facts.records.get(node)?.as_ref().ok()?;
    let around: BTreeSet<CellId> = record.blocks.iter().flat_map(|block| CellId::candidates(*block)).collect();
    let cells = look.cells.iter().filter(|(cell, _)| around.contains(cell));
    when.extend(cells.map(|(cell, version)| Compare::new(etcd.keys.cell(*cell), Is::ModRevision(version.0))));
    Some(Step::DeleteRecord { kv: Arc::clone(&etcd.kv), node: node.to_owned(), key, when })
}

/// Does a step; answers what came of it, `Err` when nothing was done.
pub(super) async fn carry_out(stores: &Stores, step: Step) -> Result<(), String> {
    match step {
        Step::DeleteRecord { kv, node, key, when } => {
            for resource in [resources::NODE, resources::CILIUM_NODE] {
                let found = stores.objects.get(resource, &ObjectKey::cluster(&node)).await;
                if found.map_err(|error| error.to_string())?.is_some() {
                    return Err(format!("{} {node} has come back meanwhile", resource.kind));
                }
            }
            let txn = Txn { when, then: vec![Op::Delete(Keys::One(key))], or_else: Vec::new() };
            match kv.txn(txn).await {
                Outcome::Done(answer) if answer.succeeded => Ok(()),
                Outcome::Done(_) => Err("record, claims or leader changed meanwhile; look again".to_owned()),
                Outcome::Refused(refusal) => Err(refusal.to_string()),
                Outcome::Unknown(why) => Err(format!("no answer of etcd, so it may be done: {why}")),
            }
        }
        Step::Nudge { node } => nudge(stores, &node).await,
    }
}

/// Touches the CiliumNode, or the Node where there is none yet.
async fn nudge(stores: &Stores, node: &str) -> Result<(), String> {
    let key = ObjectKey::cluster(node);
    for resource in [resources::CILIUM_NODE, resources::NODE] {
        let found = stores.objects.get(resource, &key).await.map_err(|error| error.to_string())?;
        let Some(object) = found else { continue };
        let body = json!({ "metadata": { "annotations": { NUDGED: timestamp_value(stores.env.now()) } } });
        let (resource_version, uid) = (object.resource_version().to_owned(), object.uid().to_owned());
        let patch = MergePatch { resource_version, uid, subresource: None, body };
        return match stores.objects.patch(resource, &key, patch).await {
            Outcome::Done(_) => Ok(()),
            Outcome::Refused(refusal) => Err(format!("{} {node}: {refusal}", resource.kind)),
            Outcome::Unknown(why) => Err(format!("no answer of the API server, so it may be done: {why}")),
        };
    }
    Err(format!("Node {node} is gone"))
}

//! The writes of one node's plan, in order.

use std::collections::BTreeMap;

use basal_ipam::{names::NodeName, prefix::PodCidr};
use basal_kvstore::kv::Revision;
use basal_objects::{
    object::{Object, ObjectKey, resources},
    port::{MergePatch, Preconditions, Refusal},
};
use basal_runtime::outcome::Outcome;
use serde_json::{Value, json};

use super::{
    error::NodeError,
    facts::CiliumNodeFacts,
    plan::{Action, confirm},
};
use crate::{ports::Ports, store::RecordChange};

/// What was written.
#[derive(Debug, Clone, Default)]
pub struct Written {
    /// The CiliumNode as stored by the last write to it.
    pub cilium_node: Option<Object>,
    /// The CiliumNode is gone.
    pub deleted: bool,
    /// The revision of the last write of the node record.
    pub record_revision: Option<Revision>,
    /// Blocks that the CiliumNode lists from now on.
    pub handed_out: Option<Vec<PodCidr>>,
    /// A node record was written, or blocks were confirmed.
    pub published: bool,
}

/// Carries out one action.
pub(super) async fn act(
    ports: &Ports,
    name: &NodeName,
    action: Action,
    written: &mut Written,
) -> Result<(), NodeError> {
    let key = ObjectKey::cluster(name.as_str());
    match action {
        Action::CreateCiliumNode { uid, addresses, labels } => {
            let addresses: Vec<Value> =
                addresses.iter().map(|a| json!({ "type": a.kind.as_str(), "ip": a.ip.to_string() })).collect();
            let object = json!({
                "apiVersion": resources::CILIUM_NODE.api_version(),
                "kind": resources::CILIUM_NODE.kind,
                "metadata": {
                    "name": name.as_str(),
                    "labels": labels,
                    "ownerReferences": [
                        { "apiVersion": "v1", "kind": "Node", "name": name.as_str(), "uid": uid.as_str() },
                    ],
                },
                "spec": { "addresses": addresses },
            });
            let created = ports.objects.create(resources::CILIUM_NODE, Object(object)).await;
            written.cilium_node = Some(done("CiliumNode was not created", created)?);
        }
        Action::WritePodCidrs { uid, resource_version, pod_cidrs } => {
            // A merge patch takes a field away by null.
            let texts: Vec<String> = pod_cidrs.iter().map(ToString::to_string).collect();
            let value = if texts.is_empty() { Value::Null } else { json!(texts) };
            let body = json!({ "spec": { "ipam": { "podCIDRs": value } } });
            let patch = MergePatch { resource_version, uid, subresource: None, body };
            let patched = ports.objects.patch(resources::CILIUM_NODE, &key, patch).await;
            written.cilium_node = Some(done("spec.ipam.podCIDRs of the CiliumNode was not written", patched)?);
            written.handed_out = Some(pod_cidrs);
        }
        Action::DeleteCiliumNode { uid, resource_version } => {
            let only_if = Preconditions { uid, resource_version };
            match ports.objects.delete(resources::CILIUM_NODE, &key, only_if).await {
                Outcome::Done(()) | Outcome::Refused(Refusal::NotFound(_)) => written.deleted = true,
                other => done("the CiliumNode of a Node that is gone was not deleted", other)?,
            }
        }
        Action::ConfirmBlocks { uid, resource_version, confirmed } => {
            // Written right before this, at the version that was seen, or else not at all.
            let now = written.cilium_node.as_ref().map(|object| object.resource_version().to_owned());
            let resource_version = now.unwrap_or(resource_version);
            let entries: BTreeMap<String, Value> = confirmed
                .into_iter()
                .map(|(block, status)| (block, status.map_or(Value::Null, |status| json!(status))))
                .collect();
            let body = json!({ "status": { "ipam": { "pod-cidrs": entries } } });
            let patch = MergePatch { resource_version, uid, subresource: Some("status"), body };
            let patched = ports.objects.patch(resources::CILIUM_NODE, &key, patch).await;
            written.cilium_node = Some(done("status.ipam.pod-cidrs of the CiliumNode was not written", patched)?);
            written.published = true;
        }
        Action::Record { guard, change } => {
            let published = matches!(change, RecordChange::Publish(_));
            let record = !matches!(change, RecordChange::WithdrawAddresses(_));
            let revision = ports.store.write(name, &guard, change).await?;
            if record {
                written.record_revision = Some(revision);
            }
            written.published |= published;
        }
    }
    Ok(())
}

/// Makes a CiliumNode as it was seen confirm exactly these blocks.
pub(crate) async fn confirm_blocks(
    ports: &Ports,
    name: &NodeName,
    seen: &CiliumNodeFacts,
    blocks: &[PodCidr],
) -> Result<(), NodeError> {
    match confirm(seen, blocks) {
        Some(action) => act(ports, name, action, &mut Written::default()).await,
        None => Ok(()),
    }
}

pub(super) fn done<T>(what: &'static str, outcome: Outcome<T, Refusal>) -> Result<T, NodeError> {
    match outcome {
        Outcome::Done(value) => Ok(value),
        Outcome::Refused(refusal) => Err(NodeError::Write { what, refusal }),
        Outcome::Unknown(why) => Err(NodeError::WriteUnknown { what, why }),
    }
}

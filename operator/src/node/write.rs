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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use basal_crds::names::{Cluster, ClusterId, ClusterName};
    use basal_sim::world::{Options, World, simulate};

    use super::*;

    /// Applies what was planned for a CiliumNode that somebody has changed since.
    async fn apply_late(world: &World, action: impl Fn(&Object) -> Action) -> Result<(), NodeError> {
        let user = world.user();
        let cluster = Cluster::new(ClusterName::new("default").unwrap(), ClusterId::new(0)).unwrap();
        let ports = Ports::without_etcd(user.env, Arc::clone(&user.objects), cluster);
        let name = NodeName::new("n1").unwrap();
        let node = Object(json!({
            "apiVersion": resources::CILIUM_NODE.api_version(),
            "kind": resources::CILIUM_NODE.kind,
            "metadata": {"name": name.as_str()},
            "spec": {},
        }));
        let Outcome::Done(seen) = user.objects.create(resources::CILIUM_NODE, node).await else { panic!("no node") };
        let (uid, resource_version) = (seen.uid().to_owned(), seen.resource_version().to_owned());
        let body = json!({"metadata": {"labels": {"changed": "since"}}});
        let change = MergePatch { resource_version, uid, subresource: None, body };
        let changed = user.objects.patch(resources::CILIUM_NODE, &ObjectKey::cluster(name.as_str()), change).await;
        assert!(matches!(changed, Outcome::Done(_)), "{changed:?}");
        act(&ports, &name, action(&seen), &mut Written::default()).await
    }

    #[test]
    fn a_cilium_node_is_written_as_it_was_seen_or_not_at_all() {
        let write: fn(&Object) -> Action = |seen| Action::WritePodCidrs {
            uid: seen.uid().to_owned(),
            resource_version: seen.resource_version().to_owned(),
            pod_cidrs: vec!["10.0.0.0/24".parse().unwrap()],
        };
        let confirm: fn(&Object) -> Action = |seen| Action::ConfirmBlocks {
            uid: seen.uid().to_owned(),
            resource_version: seen.resource_version().to_owned(),
            confirmed: BTreeMap::from([("10.0.0.0/24".to_owned(), None)]),
        };
        let delete: fn(&Object) -> Action = |seen| Action::DeleteCiliumNode {
            uid: seen.uid().to_owned(),
            resource_version: seen.resource_version().to_owned(),
        };
        for action in [write, confirm, delete] {
            let late = simulate(Options::seeded(1), async |world| {
                world.objects().define(&resources::CILIUM_NODE, true).unwrap();
                apply_late(&world, action).await
            });
            let refused = late.unwrap();
            assert!(
                matches!(refused, Err(NodeError::Write { refusal: Refusal::Conflict(_), .. })),
                "what another has written since is lost: {refused:?}"
            );
        }
    }
}

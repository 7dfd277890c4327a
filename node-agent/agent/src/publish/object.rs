//! What has to be written into a pod's CiliumEndpoint, as a pure function.

use std::net::IpAddr;

use basal_cni::api::Attachment;
use basal_crds::labels::Labels;
use basal_objects::object::{Object, resources::CILIUM_ENDPOINT};
use serde_json::{Value, json};

use crate::endpoint::{manager::PodDetails, record::EndpointRecord};

/// A pod's endpoint, as it is to be shown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shown {
    /// What the agent holds of it.
    pub record: EndpointRecord,
    /// `status.state`.
    pub state: &'static str,
    /// `metadata.uid` of the pod.
    pub pod_uid: String,
    /// Ports and service account.
    pub details: PodDetails,
    /// The node's address; `None` when nobody may send to the endpoint through this node. The object stays, and its
    /// addresses with it: they are what tells the operator that they are in use.
    pub node_ip: Option<IpAddr>,
}

/// What to do.
#[derive(Debug, Clone, PartialEq)]
pub enum Step {
    /// All is as it should be.
    Nothing,
    /// Create this object.
    Create(Object),
    /// Apply this merge patch.
    Patch(Value),
    /// Delete it.
    Delete,
}

/// `status.external-identifiers.cni-attachment-id`.
#[must_use]
pub fn attachment_id(attachment: &Attachment) -> String {
    attachment.to_string()
}

/// Compares. Without `shown` the pod has no endpoint here; `gone` are the attachments that it had, and `pod_uid` is the
/// pod of that name on this node: only an object that shows one of these is deleted, for a pod of the same name may have
/// come up elsewhere.
#[must_use]
pub fn plan(existing: Option<&Object>, shown: Option<&Shown>, gone: &[String], pod_uid: Option<&str>) -> Step {
    match (existing, shown) {
        (None, None) => Step::Nothing,
        (Some(existing), None) => {
            let of = existing.0.pointer("/status/external-identifiers/cni-attachment-id").and_then(Value::as_str);
            let is_gone = of.is_some_and(|of| gone.iter().any(|id| id == of));
            if is_gone || pod_uid.is_some_and(|uid| is_of(existing, uid)) { Step::Delete } else { Step::Nothing }
        }
        (None, Some(shown)) => Step::Create(object(shown)),
        (Some(existing), Some(shown)) => {
            let wanted = object(shown).0;
            let mut patch = json!({});
            for (pointer, parent, field) in
                [("/metadata/ownerReferences", Some("metadata"), "ownerReferences"), ("/status", None, "status")]
            {
                let (Some(value), current) = (wanted.pointer(pointer), existing.0.pointer(pointer)) else { continue };
                if !covers(current, value) {
                    match parent {
                        Some(parent) => patch[parent][field] = value.clone(),
                        None => patch[field] = value.clone(),
                    }
                }
            }
            if patch == json!({}) { Step::Nothing } else { Step::Patch(patch) }
        }
    }
}

/// Whether it is the object of the pod with this uid.
fn is_of(existing: &Object, pod_uid: &str) -> bool {
    let owners = existing.0.pointer("/metadata/ownerReferences").and_then(Value::as_array);
    owners.into_iter().flatten().any(|owner| owner["kind"] == "Pod" && owner["uid"] == pod_uid)
}

/// Whether a merge patch with `wanted` would change nothing.
fn covers(current: Option<&Value>, wanted: &Value) -> bool {
    match (current, wanted) {
        (None, Value::Null) => true,
        (Some(Value::Object(current)), Value::Object(wanted)) => {
            wanted.iter().all(|(field, value)| covers(current.get(field), value))
        }
        (current, wanted) => current == Some(wanted),
    }
}

fn object(shown: &Shown) -> Object {
    let Shown { record, state, pod_uid, details, node_ip } = shown;
    let (namespace, name) =
        record.pod.as_ref().map(|pod| (pod.namespace.as_str(), pod.name.as_str())).unwrap_or_default();
    let labels: Vec<String> = Labels::parse_canonical(&record.labels)
        .map(|labels| labels.iter().map(ToString::to_string).collect())
        .unwrap_or_default();
    let mut addressing = json!({});
    for ip in record.addresses.iter() {
        addressing[if ip.is_ipv4() { "ipv4" } else { "ipv6" }] = ip.to_string().into();
    }
    let ports: Vec<_> = details
        .named_ports
        .iter()
        .map(|port| json!({"name": port.name, "port": port.port, "protocol": port.protocol}))
        .collect();
    Object(json!({
        "apiVersion": CILIUM_ENDPOINT.api_version(),
        "kind": CILIUM_ENDPOINT.kind,
        "metadata": {
            "namespace": namespace,
            "name": name,
            "ownerReferences": [{"apiVersion": "v1", "kind": "Pod", "name": name, "uid": pod_uid}],
        },
        "status": {
            "id": record.id.get(),
            "identity": {"id": record.identity.get(), "labels": labels},
            "networking": {"addressing": [addressing], "node": node_ip.map(|ip| ip.to_string()).unwrap_or_default()},
            "encryption": {},
            "external-identifiers": {
                "cni-attachment-id": attachment_id(&record.attachment),
                "container-id": record.attachment.container_id,
                "k8s-namespace": namespace,
                "k8s-pod-name": name,
                "pod-name": format!("{namespace}/{name}"),
            },
            "named-ports": ports,
            "service-account": details.service_account,
            "state": state,
        },
    }))
}

#[cfg(test)]
mod tests {
    use basal_cni::api::PodRef;
    use basal_crds::{identity::IdentityId, resources::CiliumEndpoint};

    use super::*;
    use crate::{
        endpoint::record::{Addresses, EndpointId, Phase},
        mac::MacAddr,
    };

    fn shown() -> Shown {
        let record = EndpointRecord {
            id: EndpointId::new(7).unwrap(),
            attachment: Attachment { container_id: "c1".into(), ifname: "eth0".into() },
            pod: Some(PodRef { namespace: "ns".into(), name: "p".into(), uid: Some("u".into()) }),
            netns: "/run/netns/c1".into(),
            addresses: Addresses { v4: "10.0.1.5".parse().ok(), v6: "fd00::5".parse().ok() },
            mac: MacAddr([2, 0, 0, 0, 0, 1]),
            host_mac: MacAddr([2, 0, 0, 0, 0, 2]),
            identity: IdentityId::new(300),
            labels: "k8s:app=web;k8s:io.kubernetes.pod.namespace=ns;".into(),
            phase: Phase::Committed,
            boot_id: "b".into(),
        };
        Shown {
            record,
            state: "ready",
            pod_uid: "u".into(),
            details: PodDetails::default(),
            node_ip: "172.18.0.2".parse().ok(),
        }
    }

    fn created(shown: &Shown) -> Object {
        let Step::Create(object) = plan(None, Some(shown), &[], None) else { panic!("nothing is created") };
        object
    }

    #[test]
    fn the_object_is_one_of_ciliums() {
        let parsed: CiliumEndpoint = created(&shown()).parse().unwrap();
        let identity = parsed.status.identity.unwrap();
        assert_eq!((identity.id, identity.labels.len()), (300, 2));
        assert_eq!(identity.labels[0], "k8s:app=web");
        assert_eq!(parsed.status.networking.unwrap().addressing.len(), 1);
        assert_eq!(parsed.metadata.owner_references.unwrap()[0].uid, "u");
    }

    #[test]
    fn what_is_as_it_should_be_is_left_alone() {
        let mut object = created(&shown());
        object.0["status"]["future"] = "stays".into();
        object.0["metadata"]["labels"] = json!({"a": "b"});
        assert_eq!(plan(Some(&object), Some(&shown()), &[], None), Step::Nothing);
    }

    #[test]
    fn a_new_identity_is_written() {
        let object = created(&shown());
        let mut changed = shown();
        changed.record.identity = IdentityId::new(301);
        let Step::Patch(patch) = plan(Some(&object), Some(&changed), &[], None) else { panic!("nothing is patched") };
        assert_eq!(patch["status"]["identity"]["id"], 301);
        assert_eq!(patch.get("metadata"), None);
    }

    #[test]
    fn an_endpoint_in_a_lost_block_keeps_its_addresses_and_is_no_record() {
        let object = created(&shown());
        let lost = Shown { node_ip: None, ..shown() };
        let Step::Patch(patch) = plan(Some(&object), Some(&lost), &[], None) else { panic!("nothing is patched") };
        assert_eq!(
            patch["status"]["networking"],
            json!({"addressing": [{"ipv4": "10.0.1.5", "ipv6": "fd00::5"}], "node": ""})
        );
        let parsed: CiliumEndpoint = created(&lost).parse().unwrap();
        assert_eq!((parsed.addresses().len(), parsed.ip_records()), (2, Ok(vec![])));
    }

    #[test]
    fn only_our_own_object_is_deleted() {
        let object = created(&shown());
        assert_eq!(plan(Some(&object), None, &["c1:eth0".into()], None), Step::Delete);
        assert_eq!(plan(Some(&object), None, &["c0:eth0".into()], None), Step::Nothing);
        assert_eq!(plan(None, None, &["c1:eth0".into()], None), Step::Nothing);
        assert_eq!(plan(Some(&object), None, &[], Some("u")), Step::Delete);
        assert_eq!(plan(Some(&object), None, &[], Some("v")), Step::Nothing);
    }
}

//! What the operator reads of a Node and of a CiliumNode: enough to plan from, and no more.

use std::collections::BTreeMap;

use basal_crds::{
    address::{AddressType, NodeAddress, parse_ip},
    resources::{CiliumNode, DO_NOT_GC_ANNOTATION, NodeStatus, PodCidrStatus},
};
use basal_ipam::names::{NodeName, NodeUid};
use basal_objects::object::Object;
use k8s_openapi::api::core::v1::Node;

use super::packed::Facts;

/// A Kubernetes Node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeFacts {
    /// `metadata.name`.
    pub name: NodeName,
    /// `metadata.uid`.
    pub uid: NodeUid,
    /// `metadata.resourceVersion`.
    pub resource_version: String,
    /// The addresses of `status.addresses` that are IP addresses, in the kubelet's order.
    pub addresses: Vec<NodeAddress>,
    /// `metadata.labels`.
    pub labels: BTreeMap<String, String>,
}

impl Facts for NodeFacts {
    const FIELDS: &[&str] =
        &["/metadata/name", "/metadata/uid", "/metadata/resourceVersion", "/metadata/labels", "/status/addresses"];

    /// An address that does not parse is left out: kubelets list host names among them.
    fn parse(object: &Object) -> Result<Self, String> {
        let node: Node = object.parse().map_err(|error| error.to_string())?;
        let addresses = node.status.and_then(|status| status.addresses).unwrap_or_default();
        let address = |a: k8s_openapi::api::core::v1::NodeAddress| {
            Some(NodeAddress { kind: AddressType::from(a.type_), ip: parse_ip(&a.address)? })
        };
        Ok(Self {
            name: NodeName::new(object.name()).map_err(|error| format!("metadata.name: {error}"))?,
            uid: NodeUid::new(object.uid()).map_err(|error| format!("metadata.uid: {error}"))?,
            resource_version: object.resource_version().to_owned(),
            addresses: addresses.into_iter().filter_map(address).collect(),
            labels: node.metadata.labels.unwrap_or_default(),
        })
    }
}

/// A CiliumNode.
#[derive(Debug, Clone, PartialEq)]
pub struct CiliumNodeFacts {
    /// `metadata.uid`.
    pub uid: String,
    /// `metadata.resourceVersion`.
    pub resource_version: String,
    /// `metadata.generation`.
    pub generation: i64,
    /// `spec.ipam.podCIDRs`, as written: it may hold anything.
    pub pod_cidrs: Vec<String>,
    /// `status.ipam.operator-status.error`.
    pub error: String,
    /// `status.ipam.pod-cidrs`: what the operator confirmed, or Cilium's agents left.
    pub confirmed: BTreeMap<String, PodCidrStatus>,
    /// The object, without its status and without the bookkeeping of its metadata.
    pub object: CiliumNode,
    /// The uids of the Nodes that own it.
    pub owners: Vec<String>,
    /// Whether the annotation `cilium.io/do-not-gc` keeps it.
    pub keep: bool,
}

impl Facts for CiliumNodeFacts {
    const FIELDS: &[&str] = &[
        "/metadata/name",
        "/metadata/uid",
        "/metadata/resourceVersion",
        "/metadata/generation",
        "/metadata/labels",
        "/metadata/annotations",
        "/metadata/ownerReferences",
        "/spec",
        "/status/ipam/operator-status",
        "/status/ipam/pod-cidrs",
    ];

    fn parse(object: &Object) -> Result<Self, String> {
        let mut node: CiliumNode = object.parse().map_err(|error| error.to_string())?;
        let status: NodeStatus = std::mem::take(&mut node.status);
        let owners = node.metadata.owner_references.iter().flatten();
        Ok(Self {
            uid: object.uid().to_owned(),
            resource_version: object.resource_version().to_owned(),
            generation: object.generation(),
            pod_cidrs: node.spec.ipam.pod_cidrs.clone(),
            error: status.ipam.operator_status.error,
            confirmed: status.ipam.pod_cidrs,
            owners: owners.filter(|owner| owner.kind == "Node").map(|owner| owner.uid.clone()).collect(),
            keep: object.annotations().get(DO_NOT_GC_ANNOTATION) == Some(&"true"),
            object: node,
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{super::packed::Packed, *};

    #[test]
    fn a_node_keeps_its_ip_addresses_in_order() {
        let object = Object(json!({
            "metadata": { "name": "n1", "uid": "u1", "resourceVersion": "7", "labels": { "zone": "a" } },
            "status": { "addresses": [
                { "type": "InternalIP", "address": "10.1.0.1" },
                { "type": "Hostname", "address": "n1" },
                { "type": "InternalIP", "address": "fd00::1" },
            ] },
        }));
        let facts = NodeFacts::parse(&object).unwrap();
        assert_eq!(Packed::<NodeFacts>::new(&object).unwrap().facts().unwrap(), facts);
        let ips: Vec<String> = facts.addresses.iter().map(|a| a.ip.to_string()).collect();
        assert_eq!(ips, ["10.1.0.1", "fd00::1"]);
        assert_eq!(facts.labels["zone"], "a");
    }

    #[test]
    fn a_cilium_node_keeps_foreign_texts() {
        let mut object = Object(json!({
            "metadata": {
                "name": "n1", "uid": "u2", "resourceVersion": "9", "generation": 3,
                "annotations": { "cilium.io/do-not-gc": "true" },
                "ownerReferences": [{ "apiVersion": "v1", "kind": "Node", "name": "n1", "uid": "u1" }],
            },
            "spec": { "addresses": [{ "type": "InternalIP", "ip": "10.1.0.1" }], "ipam": { "podCIDRs": ["garbage"] } },
            "status": { "ipam": {
                "operator-status": { "error": "old" },
                "pod-cidrs": { "10.0.0.0/24": { "status": "in-use" } },
            } },
        }));
        let facts = CiliumNodeFacts::parse(&object).unwrap();
        assert_eq!(Packed::<CiliumNodeFacts>::new(&object).unwrap().facts().unwrap(), facts);
        assert_eq!((facts.pod_cidrs.as_slice(), facts.error.as_str()), (["garbage".to_owned()].as_slice(), "old"));
        assert_eq!((facts.owners.as_slice(), facts.keep), (["u1".to_owned()].as_slice(), true));
        assert_eq!(facts.object.spec.addresses.len(), 1);
        object.0["spec"] = json!("text");
        assert!(CiliumNodeFacts::parse(&object).is_err());
    }
}

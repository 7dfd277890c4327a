//! CiliumNode: what a node has, wants and was given.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use basal_ipam::names::{NameError as NodeNameError, NodeName};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{
    carried::{AlibabaCloudSpec, AlibabaCloudStatus, AzureSpec, AzureStatus, EniSpec, EniStatus},
    definition::{CILIUM, Column, Kind, Names},
    is_default, or_default,
    pool::Cidr,
};
use crate::{
    address::{AddressType, NodeAddress, parse_ip},
    kvstore::NodeRecord,
    names::Cluster,
};

/// The annotation that keeps a CiliumNode without Node from being deleted; its value is `true`.
pub const DO_NOT_GC_ANNOTATION: &str = "cilium.io/do-not-gc";
/// The annotation that says where the node's agent reads and publishes what agents tell each other: the word of a
/// [`LedgerStore`](super::LedgerStore). Written by the agent.
pub const AGENT_STORE_ANNOTATION: &str = "basal.io/agent-store";
/// The annotation that holds a node's WireGuard key.
pub const WIREGUARD_KEY_ANNOTATION: &str = "network.cilium.io/wg-pub-key";

/// A node of the cluster, as its agent and the operator see it. It has the name of the Node.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct CiliumNode {
    /// Standard metadata.
    #[schemars(skip)]
    #[serde(default)]
    pub metadata: ObjectMeta,
    /// What the node has, and what it was given.
    pub spec: NodeSpec,
    /// What became of it.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "or_default")]
    pub status: NodeStatus,
}

impl Kind for CiliumNode {
    const NAMES: Names = Names {
        group: CILIUM,
        kind: "CiliumNode",
        plural: "ciliumnodes",
        singular: "ciliumnode",
        short: &["cn", "ciliumn"],
        version: "v2",
        namespaced: false,
        status_subresource: true,
        metadata_required: true,
        columns: &[
            Column::new("CiliumInternalIP", "string", r#".spec.addresses[?(@.type=="CiliumInternalIP")].ip"#),
            Column::new("InternalIP", "string", r#".spec.addresses[?(@.type=="InternalIP")].ip"#),
            Column::AGE,
        ],
    };
}

/// What a node has, and what it was given.
#[derive(Debug, Default, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct NodeSpec {
    /// The addresses of the node. Written by the agent.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "or_default")]
    pub addresses: Vec<NodeAddressSpec>,
    /// For IPAM at Alibaba Cloud.
    #[serde(default, skip_serializing_if = "is_default")]
    #[schemars(with = "Option<AlibabaCloudSpec>")]
    pub alibaba_cloud: Option<Value>,
    /// For IPAM at Azure.
    #[serde(default, skip_serializing_if = "is_default")]
    #[schemars(with = "Option<AzureSpec>")]
    pub azure: Option<Value>,
    /// The kernel's boot id. It changes when the node is booted. Written by the agent.
    #[serde(default, rename = "bootid", skip_serializing_if = "is_default", deserialize_with = "or_default")]
    #[schemars(rename = "bootid")]
    pub boot_id: String,
    /// Encryption between nodes. Written by the agent.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "or_default")]
    pub encryption: Encryption,
    /// For IPAM at AWS.
    #[serde(default, skip_serializing_if = "is_default")]
    #[schemars(with = "Option<EniSpec>")]
    pub eni: Option<Value>,
    /// The addresses of the node's health endpoint. Written by the agent.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "or_default")]
    pub health: FamilyAddresses,
    /// The addresses of the node's ingress proxy. Written by the agent.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "or_default")]
    pub ingress: FamilyAddresses,
    /// The cloud provider's id of the node.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "or_default")]
    pub instance_id: String,
    /// Addresses for the node's pods.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "or_default")]
    pub ipam: NodeIpamSpec,
}

/// An address of a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct NodeAddressSpec {
    /// The address.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "or_default")]
    pub ip: String,
    /// What it is: InternalIP, ExternalIP, CiliumInternalIP, …
    #[serde(default, rename = "type", skip_serializing_if = "Option::is_none")]
    pub kind: Option<AddressType>,
}

/// Encryption between nodes.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Encryption {
    /// The index of the key; 0 without encryption.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "or_default")]
    pub key: i32,
}

/// An address of each family.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct FamilyAddresses {
    /// The IPv4 address.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "or_default")]
    pub ipv4: String,
    /// The IPv6 address.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "or_default")]
    pub ipv6: String,
}

/// Addresses for a node's pods.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct NodeIpamSpec {
    /// IPv6 addresses that the node may use, in modes that hand out single addresses.
    #[serde(default, rename = "ipv6-pool", skip_serializing_if = "is_default", deserialize_with = "or_default")]
    pub ipv6_pool: BTreeMap<String, AddressOwner>,
    /// How many addresses may be free beyond the low-water mark.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub max_above_watermark: Option<i32>,
    /// How many addresses the node may have at most.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub max_allocate: Option<i32>,
    /// How many addresses the node has at least.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub min_allocate: Option<i32>,
    /// The blocks that the node's pods have their addresses from. Written by the operator in mode cluster-pool.
    #[serde(default, rename = "podCIDRs", skip_serializing_if = "is_default", deserialize_with = "or_default")]
    pub pod_cidrs: Vec<String>,
    /// IPv4 addresses that the node may use, in modes that hand out single addresses.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "or_default")]
    pub pool: BTreeMap<String, AddressOwner>,
    /// Pools and blocks, in mode multi-pool.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "or_default")]
    pub pools: PoolsSpec,
    /// How many addresses are kept free for new pods.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub pre_allocate: Option<i32>,
    /// Tags of the static address that the node is to have.
    #[serde(default, rename = "static-ip-tags", skip_serializing_if = "is_default", deserialize_with = "or_default")]
    pub static_ip_tags: BTreeMap<String, String>,
}

/// Who has an address.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct AddressOwner {
    /// The owner, a pod as namespace/name for example; empty for a free address.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "or_default")]
    pub owner: String,
    /// The thing that the address comes from, an interface for example.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "or_default")]
    pub resource: String,
}

/// What a node asks of pools, and what it got.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PoolsSpec {
    /// What the node got. The operator adds, the agent removes.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "or_default")]
    pub allocated: Vec<AllocatedPool>,
    /// What the node asks for. Written by the agent.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "or_default")]
    pub requested: Vec<RequestedPool>,
}

/// What a node got from a pool.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AllocatedPool {
    /// Whether the first address of each block may be used.
    #[serde(default, rename = "allowFirstIP", skip_serializing_if = "is_default", deserialize_with = "or_default")]
    pub allow_first_ip: bool,
    /// Whether the last address of each block may be used.
    #[serde(default, rename = "allowLastIP", skip_serializing_if = "is_default", deserialize_with = "or_default")]
    pub allow_last_ip: bool,
    /// The blocks.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "or_default")]
    #[schemars(with = "Vec<Cidr>")]
    pub cidrs: Vec<String>,
    /// The pool.
    #[schemars(length(min = 1))]
    pub pool: String,
}

/// What a node asks of a pool.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct RequestedPool {
    /// How many addresses, in use and in advance.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "or_default")]
    pub needed: NeededAddresses,
    /// The pool.
    #[schemars(length(min = 1))]
    pub pool: String,
}

/// How many addresses a node needs.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct NeededAddresses {
    /// IPv4 addresses.
    #[serde(default, rename = "ipv4-addrs", skip_serializing_if = "is_default", deserialize_with = "or_default")]
    pub ipv4: i32,
    /// IPv6 addresses.
    #[serde(default, rename = "ipv6-addrs", skip_serializing_if = "is_default", deserialize_with = "or_default")]
    pub ipv6: i32,
}

/// What became of a node.
#[derive(Debug, Default, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct NodeStatus {
    /// For IPAM at Alibaba Cloud.
    #[serde(default, skip_serializing_if = "is_default")]
    #[schemars(with = "Option<AlibabaCloudStatus>")]
    pub alibaba_cloud: Option<Value>,
    /// For IPAM at Azure.
    #[serde(default, skip_serializing_if = "is_default")]
    #[schemars(with = "Option<AzureStatus>")]
    pub azure: Option<Value>,
    /// For IPAM at AWS.
    #[serde(default, skip_serializing_if = "is_default")]
    #[schemars(with = "Option<EniStatus>")]
    pub eni: Option<Value>,
    /// Addresses of the node's pods.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "or_default")]
    pub ipam: NodeIpamStatus,
}

/// Addresses of a node's pods.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct NodeIpamStatus {
    /// The static address that the node has.
    #[serde(
        default,
        rename = "assigned-static-ip",
        skip_serializing_if = "is_default",
        deserialize_with = "or_default"
    )]
    pub assigned_static_ip: String,
    /// IPv6 addresses in use, in modes that hand out single addresses.
    #[serde(default, rename = "ipv6-used", skip_serializing_if = "is_default", deserialize_with = "or_default")]
    pub ipv6_used: BTreeMap<String, AddressOwner>,
    /// What the operator has to say. Written by the operator.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "or_default")]
    pub operator_status: OperatorStatus,
    /// The blocks of the node and their use.
    #[serde(default, rename = "pod-cidrs", skip_serializing_if = "is_default", deserialize_with = "or_default")]
    pub pod_cidrs: BTreeMap<String, PodCidrStatus>,
    /// IPv4 addresses that are being given back, and how far that is.
    #[serde(default, rename = "release-ips", skip_serializing_if = "is_default", deserialize_with = "or_default")]
    pub release_ips: BTreeMap<String, String>,
    /// IPv6 addresses that are being given back, and how far that is.
    #[serde(default, rename = "release-ipv6s", skip_serializing_if = "is_default", deserialize_with = "or_default")]
    pub release_ipv6s: BTreeMap<String, String>,
    /// IPv4 addresses in use, in modes that hand out single addresses.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "or_default")]
    pub used: BTreeMap<String, AddressOwner>,
}

/// What the operator has to say about a node.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct OperatorStatus {
    /// Why the node does not have what it needs; empty when it has.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "or_default")]
    pub error: String,
}

/// The use of a block.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PodCidrStatus {
    /// The use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<PodCidrUse>,
}

/// How a block is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum PodCidrUse {
    /// The node gave it up.
    Released,
    /// No address is free.
    Depleted,
    /// Some addresses are in use.
    InUse,
}

/// Why a CiliumNode cannot be turned into a record for other nodes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NodeFieldError {
    /// The object has no usable name.
    #[error("metadata.name: {0}")]
    Name(#[from] NodeNameError),
    /// A field holds no address of the right family.
    #[error("{field}: {value:?} is not an {family} address")]
    Address {
        /// The field.
        field: String,
        /// What it holds.
        value: String,
        /// `IP`, `IPv4` or `IPv6`.
        family: &'static str,
    },
    /// A field holds no block.
    #[error("{field}: {value:?} is not a CIDR")]
    Cidr {
        /// The field.
        field: String,
        /// What it holds.
        value: String,
    },
    /// The key's index has more than 8 bits.
    #[error("spec.encryption.key: {0} is not a number from 0 to 255")]
    EncryptionKey(i32),
}

impl CiliumNode {
    /// The name of the node.
    ///
    /// # Errors
    /// [`NodeFieldError::Name`].
    pub fn name(&self) -> Result<NodeName, NodeFieldError> {
        Ok(NodeName::new(self.metadata.name.as_deref().unwrap_or_default())?)
    }

    /// The addresses of the node, in order; entries without an address are left out, those without a type have an
    /// unknown one.
    ///
    /// # Errors
    /// [`NodeFieldError::Address`] names the first entry that holds something else.
    pub fn addresses(&self) -> Result<Vec<NodeAddress>, NodeFieldError> {
        let entries = self.spec.addresses.iter().enumerate().filter(|(_, entry)| !entry.ip.is_empty());
        let address = |(i, entry): (usize, &NodeAddressSpec)| {
            let ip = address(&format!("spec.addresses[{i}].ip"), &entry.ip, "IP", Some)?;
            let kind = entry.kind.clone().unwrap_or_else(|| AddressType::Other(String::new()));
            Ok(ip.map(|ip| NodeAddress { kind, ip }))
        };
        entries.map(address).filter_map(Result::transpose).collect()
    }

    /// The blocks that the operator confirms, with their place in `spec.ipam.podCIDRs`: those whose use in
    /// `status.ipam.pod-cidrs` is `in-use`, which the operator writes only after its ledger holds them.
    pub fn confirmed_pod_cidrs(&self) -> impl Iterator<Item = (usize, &str)> {
        let used = |text: &str| {
            let status = self.status.ipam.pod_cidrs.get(text);
            status.is_some_and(|status| status.status == Some(PodCidrUse::InUse))
        };
        self.spec.ipam.pod_cidrs.iter().map(String::as_str).enumerate().filter(move |(_, text)| used(text))
    }

    /// [`Self::record`] with the blocks that the operator confirms; none while there is no such block.
    ///
    /// # Errors
    /// The first field that does not parse.
    pub fn confirmed_record(&self, cluster: &Cluster) -> Result<Option<NodeRecord>, NodeFieldError> {
        let (mut ipv4, mut ipv6) = (Vec::new(), Vec::new());
        for (i, text) in self.confirmed_pod_cidrs() {
            match text.parse() {
                Ok(IpNet::V4(cidr)) => ipv4.push(cidr),
                Ok(IpNet::V6(cidr)) => ipv6.push(cidr),
                Err(_not_a_cidr) => {
                    let field = format!("spec.ipam.podCIDRs[{i}]");
                    return Err(NodeFieldError::Cidr { field, value: text.to_owned() });
                }
            }
        }
        if ipv4.is_empty() && ipv6.is_empty() {
            return Ok(None);
        }
        self.record(cluster, ipv4, ipv6).map(Some)
    }

    /// The record that tells other nodes about this one. The blocks are given, since a CiliumNode may list some that
    /// it does not own.
    ///
    /// # Errors
    /// The first field that does not parse.
    pub fn record(
        &self,
        cluster: &Cluster,
        ipv4_cidrs: Vec<Ipv4Net>,
        ipv6_cidrs: Vec<Ipv6Net>,
    ) -> Result<NodeRecord, NodeFieldError> {
        let NodeSpec { health, ingress, encryption, boot_id, .. } = &self.spec;
        let annotations = self.metadata.annotations.clone().unwrap_or_default();
        Ok(NodeRecord {
            addresses: self.addresses()?,
            ipv4_cidrs,
            ipv6_cidrs,
            ipv4_health: ipv4("spec.health.ipv4", &health.ipv4)?,
            ipv6_health: ipv6("spec.health.ipv6", &health.ipv6)?,
            ipv4_ingress: ipv4("spec.ingress.ipv4", &ingress.ipv4)?,
            ipv6_ingress: ipv6("spec.ingress.ipv6", &ingress.ipv6)?,
            encryption_key: u8::try_from(encryption.key)
                .map_err(|_error| NodeFieldError::EncryptionKey(encryption.key))?,
            labels: self.metadata.labels.clone().unwrap_or_default(),
            wireguard_public_key: annotations.get(WIREGUARD_KEY_ANNOTATION).cloned().unwrap_or_default(),
            annotations,
            boot_id: boot_id.clone(),
            ..NodeRecord::new(self.name()?, cluster.name().clone(), cluster.id())
        })
    }
}

fn ipv4(field: &str, value: &str) -> Result<Option<Ipv4Addr>, NodeFieldError> {
    address(field, value, "IPv4", |ip| if let IpAddr::V4(ip) = ip { Some(ip) } else { None })
}

fn ipv6(field: &str, value: &str) -> Result<Option<Ipv6Addr>, NodeFieldError> {
    address(field, value, "IPv6", |ip| if let IpAddr::V6(ip) = ip { Some(ip) } else { None })
}

/// The address in a field; none for an empty one.
fn address<A>(
    field: &str,
    value: &str,
    family: &'static str,
    of_family: impl Fn(IpAddr) -> Option<A>,
) -> Result<Option<A>, NodeFieldError> {
    if value.is_empty() {
        return Ok(None);
    }
    let error = || NodeFieldError::Address { field: field.to_owned(), value: value.to_owned(), family };
    parse_ip(value).and_then(of_family).map(Some).ok_or_else(error)
}

#[cfg(test)]
mod tests {
    use basal_ipam::prefix::Family;
    use serde_json::json;

    use super::*;
    use crate::names::{ClusterId, ClusterName};

    /// As Cilium's Go encoder writes it, with its empty objects, and with nulls and a field of another release.
    fn written_by_cilium() -> Value {
        json!({
            "apiVersion": "cilium.io/v2",
            "kind": "CiliumNode",
            "metadata": {
                "name": "node-1",
                "labels": { "kubernetes.io/os": "linux" },
                "annotations": { "network.cilium.io/wg-pub-key": "abc=" },
            },
            "spec": {
                "addresses": [
                    { "ip": "172.18.0.2", "type": "InternalIP" },
                    { "ip": "", "type": "ExternalIP" },
                    { "ip": "10.244.0.1", "type": "CiliumInternalIP" },
                ],
                "alibaba-cloud": {},
                "azure": {},
                "bootid": "b",
                "encryption": {},
                "eni": {},
                "health": { "ipv4": "10.244.0.9" },
                "ingress": null,
                "ipam": { "podCIDRs": ["10.244.0.0/24"], "pool": null, "pools": {}, "resourcePools": {} },
            },
            "status": { "alibaba-cloud": {}, "azure": {}, "eni": {}, "ipam": { "operator-status": {} } },
        })
    }

    #[test]
    fn what_cilium_writes_is_read() {
        let node: CiliumNode = serde_json::from_value(written_by_cilium()).unwrap();
        assert_eq!(node.spec.ipam.pod_cidrs, ["10.244.0.0/24"]);
        assert_eq!(node.status.ipam.operator_status.error, "");
        assert_eq!(node.spec.eni, Some(json!({})));
        assert_eq!(serde_json::from_value::<CiliumNode>(node.to_object().unwrap()).unwrap(), node);
    }

    #[test]
    fn a_record_is_made_from_it() {
        let node: CiliumNode = serde_json::from_value(written_by_cilium()).unwrap();
        let cluster = Cluster::new(ClusterName::new("west").unwrap(), ClusterId::new(3)).unwrap();
        let record = node.record(&cluster, vec!["10.244.0.0/24".parse().unwrap()], Vec::new()).unwrap();
        assert_eq!(record.name.as_str(), "node-1");
        assert_eq!(record.node_ip(Family::V4), Some([172, 18, 0, 2].into()));
        assert_eq!(record.router_ip(Family::V4), Some([10, 244, 0, 1].into()));
        assert_eq!(record.ipv4_health, Some([10, 244, 0, 9].into()));
        assert_eq!(record.labels["kubernetes.io/os"], "linux");
        assert_eq!(record.wireguard_public_key, "abc=");
        assert_eq!(NodeRecord::parse(record.to_json().as_bytes()), Ok(record));
    }

    #[test]
    fn only_blocks_that_the_operator_confirms_are_told() {
        let mut object = written_by_cilium();
        let record = |object: &Value| {
            let node: CiliumNode = serde_json::from_value(object.clone()).unwrap();
            node.confirmed_record(&Cluster::default())
        };
        assert_eq!(record(&object), Ok(None));
        object["spec"]["ipam"]["podCIDRs"] = json!(["10.244.0.0/24", "fd00::/120", "10.9.0.0/24", "garbage"]);
        object["status"]["ipam"]["pod-cidrs"] = json!({
            "10.244.0.0/24": { "status": "in-use" }, "fd00::/120": { "status": "in-use" },
            "10.9.0.0/24": { "status": "released" }, "10.8.0.0/24": { "status": "in-use" }, "x": {},
        });
        let found = record(&object).unwrap().unwrap();
        assert_eq!(found.cidrs().map(|cidr| cidr.to_string()).collect::<Vec<_>>(), ["10.244.0.0/24", "fd00::/120"]);
        object["status"]["ipam"]["pod-cidrs"]["garbage"] = json!({ "status": "in-use" });
        let error = record(&object).unwrap_err().to_string();
        assert_eq!(error, "spec.ipam.podCIDRs[3]: \"garbage\" is not a CIDR");
    }

    #[test]
    fn a_field_that_does_not_parse_is_named() {
        let error = |pointer: &str, value: Value| {
            let mut node = written_by_cilium();
            *node.pointer_mut(pointer).unwrap() = value;
            let node: CiliumNode = serde_json::from_value(node).unwrap();
            node.record(&Cluster::default(), Vec::new(), Vec::new()).unwrap_err().to_string()
        };
        assert_eq!(error("/spec/addresses/2/ip", json!("x")), "spec.addresses[2].ip: \"x\" is not an IP address");
        assert_eq!(
            error("/spec/health/ipv4", json!("fd00::1")),
            "spec.health.ipv4: \"fd00::1\" is not an IPv4 address"
        );
        assert_eq!(
            error("/spec/encryption", json!({ "key": 256 })),
            "spec.encryption.key: 256 is not a number from 0 to 255"
        );
        assert!(error("/metadata/name", json!("A b")).starts_with("metadata.name: \"A b\" is not a node name"));
    }
}

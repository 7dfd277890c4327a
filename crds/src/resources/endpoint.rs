//! CiliumEndpoint: a pod's endpoint, as its agent sees it. It has the name and namespace of the pod.

use std::{collections::BTreeMap, net::IpAddr};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{
    carried::{ControllerStatus, LogEntry},
    definition::{Column, Kind, Names},
    is_default, or_default,
};
use crate::address::parse_ip;

/// The endpoint of a pod. Written by the agent of the pod's node.
#[derive(Debug, Default, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct CiliumEndpoint {
    /// Standard metadata.
    #[schemars(skip)]
    #[serde(default)]
    pub metadata: ObjectMeta,
    /// The endpoint. Not a subresource.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "or_default")]
    pub status: EndpointStatus,
}

/// A field of a CiliumEndpoint holds no address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {value:?} is not an IP address")]
pub struct EndpointAddressError {
    /// The field.
    pub field: String,
    /// What it holds.
    pub value: String,
}

impl CiliumEndpoint {
    /// The pod's addresses, in order; an entry that is no address is an error.
    #[must_use]
    pub fn addresses(&self) -> Vec<Result<IpAddr, EndpointAddressError>> {
        let pairs = self.status.networking.iter().flat_map(|networking| &networking.addressing);
        let texts = pairs.enumerate().flat_map(|(i, pair)| [(i, "ipv4", &pair.ipv4), (i, "ipv6", &pair.ipv6)]);
        let address = |(i, field, text): (usize, &str, &String)| {
            let field = format!("status.networking.addressing[{i}].{field}");
            parse_ip(text).ok_or_else(|| EndpointAddressError { field, value: text.clone() })
        };
        texts.filter(|(_, _, text)| !text.is_empty()).map(address).collect()
    }
}

impl Kind for CiliumEndpoint {
    const NAMES: Names = Names {
        kind: "CiliumEndpoint",
        plural: "ciliumendpoints",
        singular: "ciliumendpoint",
        short: &["cep", "ciliumep"],
        version: "v2",
        namespaced: true,
        status_subresource: false,
        metadata_required: true,
        columns: &[
            Column::new("Security Identity", "integer", ".status.identity.id"),
            Column::new("Ingress Enforcement", "string", ".status.policy.ingress.state").wide(),
            Column::new("Egress Enforcement", "string", ".status.policy.egress.state").wide(),
            Column::new("Endpoint State", "string", ".status.state"),
            Column::new("IPv4", "string", ".status.networking.addressing[0].ipv4"),
            Column::new("IPv6", "string", ".status.networking.addressing[0].ipv6"),
        ],
    };
}

/// The endpoint of a pod.
#[derive(Debug, Default, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct EndpointStatus {
    /// Tasks of the agent for this endpoint.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "or_default")]
    #[schemars(with = "Vec<ControllerStatus>")]
    pub controllers: Vec<Value>,
    /// Encryption of the node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub encryption: Option<EncryptionStatus>,
    /// What others call this endpoint.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub external_identifiers: Option<ExternalIdentifiers>,
    /// Whether the endpoint works.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub health: Option<EndpointHealth>,
    /// The number of the endpoint on its node.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "or_default")]
    pub id: i64,
    /// The security identity.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub identity: Option<EndpointIdentity>,
    /// The last changes of state.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "or_default")]
    #[schemars(with = "Vec<LogEntry>")]
    pub log: Vec<Value>,
    /// The named ports of the pod's containers.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "or_default")]
    pub named_ports: Vec<NamedPortStatus>,
    /// Addresses of pod and node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub networking: Option<EndpointNetworking>,
    /// Which policy is enforced.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<EndpointPolicy>,
    /// The pod's service account.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "or_default")]
    pub service_account: String,
    /// How far the endpoint is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<EndpointState>,
}

/// How far an endpoint is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum EndpointState {
    /// It is being set up.
    Creating,
    /// Its labels are not known, or no identity stands for them yet.
    WaitingForIdentity,
    /// Something failed.
    NotReady,
    /// The datapath has to be written.
    WaitingToRegenerate,
    /// The datapath is being written.
    Regenerating,
    /// It is being taken over after a restart.
    Restoring,
    /// It works.
    Ready,
    /// It is being taken down.
    Disconnecting,
    /// It is gone.
    Disconnected,
    /// It could not be set up.
    Invalid,
}

/// Encryption of a node.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct EncryptionStatus {
    /// The index of the key; 0 without encryption.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "or_default")]
    pub key: i32,
}

/// What others call an endpoint.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct ExternalIdentifiers {
    /// Container id and interface, with a colon between them: the attachment's name for CNI.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "or_default")]
    pub cni_attachment_id: String,
    /// The id of the pod's sandbox container.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "or_default")]
    pub container_id: String,
    /// The name of that container.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "or_default")]
    pub container_name: String,
    /// Docker's id of the endpoint.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "or_default")]
    pub docker_endpoint_id: String,
    /// Docker's id of the network.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "or_default")]
    pub docker_network_id: String,
    /// The pod's namespace.
    #[serde(default, rename = "k8s-namespace", skip_serializing_if = "is_default", deserialize_with = "or_default")]
    pub k8s_namespace: String,
    /// The pod's name.
    #[serde(default, rename = "k8s-pod-name", skip_serializing_if = "is_default", deserialize_with = "or_default")]
    pub k8s_pod_name: String,
    /// Namespace and name of the pod, with a slash between them.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "or_default")]
    pub pod_name: String,
}

/// Whether an endpoint works.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct EndpointHealth {
    /// The state of its programs and maps.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "or_default")]
    pub bpf: String,
    /// Whether it can be reached.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "or_default")]
    pub connected: bool,
    /// All in all.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "or_default")]
    pub overall_health: String,
    /// The state of its policy.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "or_default")]
    pub policy: String,
}

/// The security identity of an endpoint.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct EndpointIdentity {
    /// The number.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "or_default")]
    pub id: i64,
    /// The labels, as source:key=value.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "or_default")]
    pub labels: Vec<String>,
}

/// A named port of a pod.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct NamedPortStatus {
    /// The name.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "or_default")]
    pub name: String,
    /// The number.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "or_default")]
    pub port: i32,
    /// TCP, UDP or SCTP.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "or_default")]
    pub protocol: String,
}

/// Addresses of pod and node.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct EndpointNetworking {
    /// The pod's addresses; each entry holds at most one of each family.
    #[serde(deserialize_with = "or_default")]
    pub addressing: Vec<AddressPair>,
    /// The address of the pod's node that packets are tunnelled to.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "or_default")]
    pub node: String,
}

/// An address of each family.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct AddressPair {
    /// The IPv4 address.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "or_default")]
    pub ipv4: String,
    /// The IPv6 address.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "or_default")]
    pub ipv6: String,
}

/// Which policy is enforced for an endpoint.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct EndpointPolicy {
    /// For what the pod sends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub egress: Option<EndpointPolicyDirection>,
    /// For what the pod receives.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ingress: Option<EndpointPolicyDirection>,
}

/// Which policy is enforced in one direction.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct EndpointPolicyDirection {
    /// No longer written.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "or_default")]
    pub adding: Vec<PolicyEntry>,
    /// Who may.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "or_default")]
    pub allowed: Vec<PolicyEntry>,
    /// Who may not.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "or_default")]
    pub denied: Vec<PolicyEntry>,
    /// Whether anything is enforced.
    pub enforcing: bool,
    /// No longer written.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "or_default")]
    pub removing: Vec<PolicyEntry>,
    /// The same in words.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "or_default")]
    pub state: String,
}

/// An entry of a policy.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct PolicyEntry {
    /// The port; 0 for all.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "or_default")]
    pub dest_port: i32,
    /// The identity of the other side.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "or_default")]
    pub identity: i64,
    /// The labels of the other side.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "or_default")]
    pub identity_labels: BTreeMap<String, String>,
    /// The number of the protocol; 0 for all.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "or_default")]
    pub protocol: i32,
}

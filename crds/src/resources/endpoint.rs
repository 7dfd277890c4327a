//! CiliumEndpoint: a pod's endpoint, as its agent sees it. It has the name and namespace of the pod.

use std::{collections::BTreeMap, fmt, net::IpAddr};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{
    carried::{ControllerStatus, LogEntry},
    definition::{CILIUM, Column, Kind, Names},
    is_default, or_default,
};
use crate::{
    address::parse_ip,
    identity::IdentityId,
    kvstore::{IpRecord, IpTarget, NamedPort},
};

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

    /// The ip→identity records that the endpoint stands for: one for each address. None while it has no identity, or when
    /// it is not shown behind a node: then its agent has taken the records back.
    ///
    /// # Errors
    /// The first field that does not parse.
    pub fn ip_records(&self) -> Result<Vec<IpRecord>, EndpointFieldError> {
        let status = &self.status;
        let error = |field: String, value: &dyn fmt::Display, wanted| EndpointFieldError {
            field,
            value: value.to_string(),
            wanted,
        };
        let (Some(identity), Some(networking)) = (&status.identity, &status.networking) else { return Ok(Vec::new()) };
        if identity.id == 0 || networking.node.is_empty() {
            return Ok(Vec::new());
        }
        let id = u32::try_from(identity.id)
            .map_err(|_out| error("status.identity.id".to_owned(), &identity.id, "a number of 32 bits"))?;
        let node = parse_ip(&networking.node)
            .ok_or_else(|| error("status.networking.node".to_owned(), &networking.node, "an IP address"))?;
        let key = status.encryption.as_ref().map_or(0, |encryption| encryption.key);
        let key = u8::try_from(key)
            .map_err(|_out| error("status.encryption.key".to_owned(), &key, "a number from 0 to 255"))?;
        let mut named_ports = Vec::new();
        for (i, port) in status.named_ports.iter().enumerate() {
            let number = u16::try_from(port.port)
                .map_err(|_out| error(format!("status.named-ports[{i}].port"), &port.port, "a port"))?;
            named_ports.push(NamedPort { name: port.name.clone(), port: number, protocol: port.protocol.clone() });
        }
        let mut records = Vec::new();
        for (i, pair) in networking.addressing.iter().enumerate() {
            let texts = [("ipv4", &pair.ipv4), ("ipv6", &pair.ipv6)];
            for (family, text) in texts.into_iter().filter(|(_, text)| !text.is_empty()) {
                let field = || format!("status.networking.addressing[{i}].{family}");
                let ip = parse_ip(text).filter(|ip| ip.is_ipv4() == (family == "ipv4"));
                let ip = ip.ok_or_else(|| error(field(), text, "an address of this family"))?;
                records.push(IpRecord {
                    encryption_key: key,
                    namespace: self.metadata.namespace.clone().unwrap_or_default(),
                    pod_name: self.metadata.name.clone().unwrap_or_default(),
                    service_account: status.service_account.clone(),
                    named_ports: named_ports.clone(),
                    ..IpRecord::new(IpTarget::Host(ip), node, IdentityId::new(id))
                });
            }
        }
        Ok(records)
    }
}

/// Why a CiliumEndpoint cannot be turned into ip→identity records.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {value:?} is not {wanted}")]
pub struct EndpointFieldError {
    /// The field.
    pub field: String,
    /// What it holds.
    pub value: String,
    /// What is wanted there.
    pub wanted: &'static str,
}

impl Kind for CiliumEndpoint {
    const NAMES: Names = Names {
        group: CILIUM,
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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn shown() -> Value {
        json!({
            "metadata": { "namespace": "bar", "name": "baz-1" },
            "status": {
                "id": 7, "identity": { "id": 300, "labels": ["k8s:a=b"] }, "encryption": {},
                "networking": { "addressing": [{ "ipv4": "10.0.1.5", "ipv6": "fd00::5" }], "node": "172.18.0.2" },
                "named-ports": [{ "name": "http", "port": 8080, "protocol": "TCP" }], "service-account": "default",
            },
        })
    }

    fn records(object: &Value) -> Result<Vec<IpRecord>, EndpointFieldError> {
        serde_json::from_value::<CiliumEndpoint>(object.clone()).unwrap().ip_records()
    }

    #[test]
    fn each_address_is_a_record_as_in_etcd() {
        let expected = |ip: &str| IpRecord {
            namespace: "bar".to_owned(),
            pod_name: "baz-1".to_owned(),
            service_account: "default".to_owned(),
            named_ports: vec![NamedPort { name: "http".to_owned(), port: 8080, protocol: "TCP".to_owned() }],
            ..IpRecord::new(IpTarget::Host(ip.parse().unwrap()), [172, 18, 0, 2].into(), IdentityId::new(300))
        };
        assert_eq!(records(&shown()), Ok(vec![expected("10.0.1.5"), expected("fd00::5")]));
    }

    #[test]
    fn an_endpoint_that_is_not_ready_to_be_told_of_has_none() {
        for (pointer, value) in [
            ("/status/identity", Value::Null),
            ("/status/identity/id", json!(0)),
            ("/status/networking/node", json!("")),
        ] {
            let mut object = shown();
            *object.pointer_mut(pointer).unwrap() = value;
            assert_eq!(records(&object), Ok(Vec::new()), "{pointer}");
        }
    }

    #[test]
    fn a_field_that_does_not_parse_is_named() {
        for (pointer, value, message) in [
            ("/status/networking/node", json!("n1"), "status.networking.node: \"n1\" is not an IP address"),
            ("/status/identity/id", json!(-1), "status.identity.id: \"-1\" is not a number of 32 bits"),
            (
                "/status/networking/addressing/0/ipv4",
                json!("fd00::1"),
                "status.networking.addressing[0].ipv4: \"fd00::1\" is not an address of this family",
            ),
            ("/status/named-ports/0/port", json!(70000), "status.named-ports[0].port: \"70000\" is not a port"),
        ] {
            let mut object = shown();
            *object.pointer_mut(pointer).unwrap() = value;
            assert_eq!(records(&object).unwrap_err().to_string(), message);
        }
    }
}

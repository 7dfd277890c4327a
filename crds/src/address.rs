//! The addresses of a node, as CiliumNode and the node record in etcd list them.

use std::{borrow::Cow, fmt, net::IpAddr, str::FromStr};

use basal_ipam::prefix::Family;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

/// What an address of a node is. The texts are Kubernetes' (`NodeAddressType`) and Cilium's.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub enum AddressType {
    /// Reachable inside the cluster; the usual tunnel endpoint.
    InternalIp,
    /// Reachable from outside.
    ExternalIp,
    /// The router address, on cilium_host.
    CiliumInternalIp,
    /// A host name.
    Hostname,
    /// A DNS name for outside.
    ExternalDns,
    /// A DNS name for inside.
    InternalDns,
    /// One that Basal does not know; kept as it was read.
    Other(String),
}

impl AddressType {
    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        match self {
            Self::InternalIp => "InternalIP",
            Self::ExternalIp => "ExternalIP",
            Self::CiliumInternalIp => "CiliumInternalIP",
            Self::Hostname => "Hostname",
            Self::ExternalDns => "ExternalDNS",
            Self::InternalDns => "InternalDNS",
            Self::Other(text) => text,
        }
    }
}

impl From<String> for AddressType {
    fn from(text: String) -> Self {
        match text.as_str() {
            "InternalIP" => Self::InternalIp,
            "ExternalIP" => Self::ExternalIp,
            "CiliumInternalIP" => Self::CiliumInternalIp,
            "Hostname" => Self::Hostname,
            "ExternalDNS" => Self::ExternalDns,
            "InternalDNS" => Self::InternalDns,
            _ => Self::Other(text),
        }
    }
}

impl From<AddressType> for String {
    fn from(kind: AddressType) -> Self {
        kind.as_str().to_owned()
    }
}

impl fmt::Display for AddressType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The schema does not list the texts: Cilium's has no enum there.
impl JsonSchema for AddressType {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "AddressType".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "string" })
    }
}

/// One address of a node.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeAddress {
    /// What it is.
    pub kind: AddressType,
    /// The address. One that was written as IPv4 in IPv6 notation is IPv4: see [`parse_ip`].
    pub ip: IpAddr,
}

/// The address that other nodes tunnel to: the first InternalIP of the family, else its first ExternalIP. The order is
/// that of the list, which is the kubelet's. This is Cilium's rule.
#[must_use]
pub fn node_ip(addresses: &[NodeAddress], family: Family) -> Option<IpAddr> {
    let first = |kind: &AddressType| {
        addresses.iter().find(|address| address.kind == *kind && Family::of(address.ip) == family).map(|a| a.ip)
    };
    first(&AddressType::InternalIp).or_else(|| first(&AddressType::ExternalIp))
}

/// Reads an address as Go's `net.ParseIP` does, except that an IPv4 address in IPv6 notation becomes IPv4.
#[must_use]
pub fn parse_ip(text: &str) -> Option<IpAddr> {
    IpAddr::from_str(text).ok().map(|ip| ip.to_canonical())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(kind: &str, ip: &str) -> NodeAddress {
        NodeAddress { kind: AddressType::from(kind.to_owned()), ip: ip.parse().unwrap() }
    }

    #[test]
    fn the_tunnel_endpoint_is_an_internal_address_if_there_is_one() {
        let addresses = [
            address("ExternalIP", "192.0.2.1"),
            address("CiliumInternalIP", "10.0.0.1"),
            address("InternalIP", "fc00::1"),
            address("InternalIP", "172.18.0.2"),
            address("InternalIP", "172.18.0.3"),
            address("ExternalIP", "2001:db8::1"),
        ];
        assert_eq!(node_ip(&addresses, Family::V4), Some("172.18.0.2".parse().unwrap()));
        assert_eq!(node_ip(&addresses, Family::V6), Some("fc00::1".parse().unwrap()));
        assert_eq!(node_ip(&addresses[..2], Family::V4), Some("192.0.2.1".parse().unwrap()));
        assert_eq!(node_ip(&addresses[..2], Family::V6), None);
    }

    #[test]
    fn types_keep_their_text() {
        for text in ["InternalIP", "ExternalIP", "CiliumInternalIP", "Hostname", "ExternalDNS", "InternalDNS", "New"] {
            let kind = AddressType::from(text.to_owned());
            assert_eq!(kind.as_str(), text);
            assert_eq!(matches!(kind, AddressType::Other(_)), text == "New");
        }
    }
}

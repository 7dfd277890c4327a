//! What the agent needs to know of its own Node object.

use std::{collections::BTreeMap, net::IpAddr};

use basal_crds::address::{AddressType, NodeAddress, node_ip, parse_ip};
use basal_ipam::prefix::Family;
use basal_objects::object::Object;
use k8s_openapi::api::core::v1::Node;

/// What of a Node matters here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeFacts {
    /// `metadata.name`.
    pub name: String,
    /// `metadata.uid`.
    pub uid: String,
    /// `metadata.labels`.
    pub labels: BTreeMap<String, String>,
    /// `status.addresses`, the internal and external IP addresses of them, in their order.
    pub addresses: Vec<NodeAddress>,
}

/// How other nodes reach this one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Underlay {
    /// The node's addresses.
    pub addresses: Vec<NodeAddress>,
    /// The one that they tunnel to.
    pub tunnel_ip: IpAddr,
}

impl Underlay {
    /// All addresses.
    pub fn ips<T: FromIterator<IpAddr>>(&self) -> T {
        self.addresses.iter().map(|address| address.ip).collect()
    }
}

impl NodeFacts {
    /// Reads a Node; for a cache.
    ///
    /// # Errors
    /// The field that does not parse.
    pub fn parse(object: &Object) -> Result<Self, String> {
        let node: Node = object.parse().map_err(|error| error.to_string())?;
        let status = node.status.unwrap_or_default();
        let mut addresses = Vec::new();
        for (i, address) in status.addresses.unwrap_or_default().into_iter().enumerate() {
            let kind = AddressType::from(address.type_);
            if matches!(kind, AddressType::InternalIp | AddressType::ExternalIp) {
                let ip = parse_ip(&address.address)
                    .ok_or_else(|| format!("status.addresses[{i}].address {:?} is no IP address", address.address))?;
                addresses.push(NodeAddress { kind, ip });
            }
        }
        Ok(Self {
            name: node.metadata.name.unwrap_or_default(),
            uid: node.metadata.uid.unwrap_or_default(),
            labels: node.metadata.labels.unwrap_or_default(),
            addresses,
        })
    }

    /// How other nodes reach this one, which gives pods addresses of these families; `None` when it has no address. They
    /// tunnel over IPv4, unless there is none or pods have only IPv6.
    #[must_use]
    pub fn underlay(&self, families: &[Family]) -> Option<Underlay> {
        let of = |family| node_ip(&self.addresses, family);
        let v4 = of(Family::V4).filter(|_| families.contains(&Family::V4));
        let tunnel_ip = v4.or_else(|| of(Family::V6)).or_else(|| of(Family::V4))?;
        Some(Underlay { addresses: self.addresses.clone(), tunnel_ip })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn addresses_that_are_names_are_left_out() {
        let node = json!({"metadata": {"name": "n1", "uid": "u1", "labels": {"a": "b"}}, "status": {"addresses": [
            {"type": "Hostname", "address": "n1"},
            {"type": "InternalIP", "address": "172.18.0.2"},
            {"type": "InternalIP", "address": "fc00::2"},
            {"type": "ExternalIP", "address": "192.0.2.1"},
        ]}});
        let facts = NodeFacts::parse(&Object(node)).unwrap();
        assert_eq!(facts.addresses.len(), 3);
        let tunnel_ip = |families: &[Family]| facts.underlay(families).unwrap().tunnel_ip.to_string();
        assert_eq!(tunnel_ip(&[Family::V4, Family::V6]), "172.18.0.2");
        assert_eq!(tunnel_ip(&[Family::V6]), "fc00::2");
        assert_eq!(NodeFacts { addresses: Vec::new(), ..facts.clone() }.underlay(&[Family::V4]), None);
        assert_eq!((facts.name.as_str(), facts.uid.as_str(), facts.labels["a"].as_str()), ("n1", "u1", "b"));
    }

    #[test]
    fn an_address_that_is_none_is_named() {
        let node = json!({"metadata": {}, "status": {"addresses": [{"type": "InternalIP", "address": "x"}]}});
        assert!(NodeFacts::parse(&Object(node)).unwrap_err().starts_with("status.addresses[0].address \"x\""));
    }
}

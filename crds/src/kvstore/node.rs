//! The record of a node: `cilium/state/nodes/v1/<cluster>/<node>`.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use basal_ipam::{names::NodeName, prefix::Family};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde_json::{Value, json};

use super::fields::{Fields, RecordError, only_ipv4, only_ipv6, parse_json, write_network};
use crate::{
    address::{AddressType, NodeAddress, node_ip},
    names::{ClusterId, ClusterName},
};

/// [`NodeRecord::source`] of a record made from custom resources.
pub const SOURCE_CUSTOM_RESOURCE: &str = "custom-resource";
/// [`NodeRecord::source`] of a record that a node's own agent made.
pub const SOURCE_LOCAL: &str = "local";

/// What other nodes need to know about a node: its addresses, and the blocks that its pods have addresses from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeRecord {
    /// The node.
    pub name: NodeName,
    /// Its cluster.
    pub cluster: ClusterName,
    /// Its addresses, in the order that Kubernetes has them in, then those of Cilium.
    pub addresses: Vec<NodeAddress>,
    /// Its IPv4 blocks; the first is the primary one.
    pub ipv4_cidrs: Vec<Ipv4Net>,
    /// Its IPv6 blocks; the first is the primary one.
    pub ipv6_cidrs: Vec<Ipv6Net>,
    /// The IPv4 address of its health endpoint.
    pub ipv4_health: Option<Ipv4Addr>,
    /// The IPv6 address of its health endpoint.
    pub ipv6_health: Option<Ipv6Addr>,
    /// The IPv4 address of its ingress proxy.
    pub ipv4_ingress: Option<Ipv4Addr>,
    /// The IPv6 address of its ingress proxy.
    pub ipv6_ingress: Option<Ipv6Addr>,
    /// Its cluster's id.
    pub cluster_id: ClusterId,
    /// Who made the record, [`SOURCE_CUSTOM_RESOURCE`] for example. Readers do not act on it.
    pub source: String,
    /// The index of the IPsec key; 0 without encryption.
    pub encryption_key: u8,
    /// The Node's labels.
    pub labels: BTreeMap<String, String>,
    /// Some of the Node's annotations.
    pub annotations: BTreeMap<String, String>,
    /// Its WireGuard key; empty without encryption.
    pub wireguard_public_key: String,
    /// The kernel's boot id; a change means that the node lost its state.
    pub boot_id: String,
}

impl NodeRecord {
    /// A record with nothing in it but whose it is.
    #[must_use]
    pub fn new(name: NodeName, cluster: ClusterName, cluster_id: ClusterId) -> Self {
        Self {
            name,
            cluster,
            addresses: Vec::new(),
            ipv4_cidrs: Vec::new(),
            ipv6_cidrs: Vec::new(),
            ipv4_health: None,
            ipv6_health: None,
            ipv4_ingress: None,
            ipv6_ingress: None,
            cluster_id,
            source: SOURCE_CUSTOM_RESOURCE.to_owned(),
            encryption_key: 0,
            labels: BTreeMap::new(),
            annotations: BTreeMap::new(),
            wireguard_public_key: String::new(),
            boot_id: String::new(),
        }
    }

    /// The address that other nodes tunnel to: see [`node_ip`].
    #[must_use]
    pub fn node_ip(&self, family: Family) -> Option<IpAddr> {
        node_ip(&self.addresses, family)
    }

    /// The router address of a family (on cilium_host).
    #[must_use]
    pub fn router_ip(&self, family: Family) -> Option<IpAddr> {
        let mut routers = self.addresses.iter().filter(|a| a.kind == AddressType::CiliumInternalIp);
        routers.find(|a| Family::of(a.ip) == family).map(|a| a.ip)
    }

    /// All blocks, IPv4 first.
    pub fn cidrs(&self) -> impl Iterator<Item = IpNet> {
        let v4 = self.ipv4_cidrs.iter().copied().map(IpNet::V4);
        v4.chain(self.ipv6_cidrs.iter().copied().map(IpNet::V6))
    }

    /// The record's text: all fields, in Cilium's order; CIDRs in the object form that all readers take.
    #[must_use]
    pub fn to_json(&self) -> String {
        let (ipv4, ipv4_more) = networks(self.ipv4_cidrs.iter().copied().map(IpNet::V4));
        let (ipv6, ipv6_more) = networks(self.ipv6_cidrs.iter().copied().map(IpNet::V6));
        let addresses = self.addresses.iter().map(|a| json!({ "Type": a.kind.as_str(), "IP": a.ip.to_string() }));
        json!({
            "Name": self.name.as_str(),
            "Cluster": self.cluster.as_str(),
            "IPAddresses": addresses.collect::<Value>(),
            "IPv4AllocCIDR": ipv4,
            "IPv4SecondaryAllocCIDRs": ipv4_more,
            "IPv6AllocCIDR": ipv6,
            "IPv6SecondaryAllocCIDRs": ipv6_more,
            "IPv4HealthIP": text(self.ipv4_health),
            "IPv6HealthIP": text(self.ipv6_health),
            "IPv4IngressIP": text(self.ipv4_ingress),
            "IPv6IngressIP": text(self.ipv6_ingress),
            "ClusterID": self.cluster_id.get(),
            "Source": self.source,
            "EncryptionKey": self.encryption_key,
            "Labels": self.labels,
            "Annotations": if self.annotations.is_empty() { Value::Null } else { json!(self.annotations) },
            "WireguardPubKey": self.wireguard_public_key,
            "BootID": self.boot_id,
        })
        .to_string()
    }

    /// Reads a record, of any release. An address without a text is left out, as are fields that Basal does not know.
    ///
    /// # Errors
    /// [`RecordError`] names the first field that is missing or does not parse.
    pub fn parse(value: &[u8]) -> Result<Self, RecordError> {
        let value = parse_json("node record", value)?;
        let fields = Fields::of("node record", &value)?;
        let name = NodeName::new(fields.string("Name")?).map_err(|error| fields.error("Name", error))?;
        let cluster = ClusterName::new(fields.string("Cluster")?).map_err(|error| fields.error("Cluster", error))?;
        let mut addresses = Vec::new();
        for address in fields.objects("IPAddresses")? {
            let kind = AddressType::from(address.string("Type")?.to_owned());
            addresses.extend(address.ip("IP")?.map(|ip| NodeAddress { kind, ip }));
        }
        Ok(Self {
            name,
            cluster,
            addresses,
            ipv4_cidrs: fields.networks("IPv4AllocCIDR", "IPv4SecondaryAllocCIDRs", only_ipv4)?,
            ipv6_cidrs: fields.networks("IPv6AllocCIDR", "IPv6SecondaryAllocCIDRs", only_ipv6)?,
            ipv4_health: fields.ipv4("IPv4HealthIP")?,
            ipv6_health: fields.ipv6("IPv6HealthIP")?,
            ipv4_ingress: fields.ipv4("IPv4IngressIP")?,
            ipv6_ingress: fields.ipv6("IPv6IngressIP")?,
            cluster_id: ClusterId::new(fields.byte("ClusterID")?),
            source: fields.string("Source")?.to_owned(),
            encryption_key: fields.byte("EncryptionKey")?,
            labels: fields.texts("Labels")?,
            annotations: fields.texts("Annotations")?,
            wireguard_public_key: fields.string("WireguardPubKey")?.to_owned(),
            boot_id: fields.string("BootID")?.to_owned(),
        })
    }

    /// Reads a record and checks that it is the one its key names.
    ///
    /// # Errors
    /// As [`NodeRecord::parse`]; also when name or cluster differ from the key's.
    pub fn parse_for(cluster: &ClusterName, name: &NodeName, value: &[u8]) -> Result<Self, RecordError> {
        let record = Self::parse(value)?;
        if record.name != *name {
            return Err(RecordError::new("Name", format!("the record is of node {}, its key of {name}", record.name)));
        }
        if record.cluster != *cluster {
            let problem = format!("the record is of cluster {}, its key of {cluster}", record.cluster);
            return Err(RecordError::new("Cluster", problem));
        }
        Ok(record)
    }
}

/// The first network, and the list of the others, each `null` when there is none.
fn networks(mut networks: impl Iterator<Item = IpNet>) -> (Value, Value) {
    let first = networks.next().map_or(Value::Null, write_network);
    let others: Vec<Value> = networks.map(write_network).collect();
    (first, if others.is_empty() { Value::Null } else { Value::Array(others) })
}

fn text(ip: Option<impl ToString>) -> String {
    ip.map(|ip| ip.to_string()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The form that Cilium's tests show, with both families.
    const SAMPLE: &str = concat!(
        r#"{"Name":"test-node-1","Cluster":"cluster3","#,
        r#""IPAddresses":[{"Type":"InternalIP","IP":"172.18.0.2"},{"Type":"InternalIP","IP":"fc00:c111::2"},"#,
        r#"{"Type":"CiliumInternalIP","IP":"10.244.0.103"}],"#,
        r#""IPv4AllocCIDR":{"IP":"10.244.0.0","Mask":"////AA=="},"IPv4SecondaryAllocCIDRs":null,"#,
        r#""IPv6AllocCIDR":{"IP":"fd00:10:244::","Mask":"//////////8AAAAAAAAAAA=="},"IPv6SecondaryAllocCIDRs":null,"#,
        r#""IPv4HealthIP":"10.244.0.60","IPv6HealthIP":"","IPv4IngressIP":"","IPv6IngressIP":"","#,
        r#""ClusterID":3,"Source":"custom-resource","EncryptionKey":0,"Labels":{},"Annotations":null,"#,
        r#""WireguardPubKey":"","BootID":""}"#
    );

    fn error(text: &str) -> String {
        NodeRecord::parse(text.as_bytes()).unwrap_err().to_string()
    }

    #[test]
    fn the_sample_is_read_and_written_byte_for_byte() {
        let record = NodeRecord::parse(SAMPLE.as_bytes()).unwrap();
        assert_eq!(record.cidrs().map(|c| c.to_string()).collect::<Vec<_>>(), ["10.244.0.0/24", "fd00:10:244::/64"]);
        assert_eq!(record.node_ip(Family::V6), Some("fc00:c111::2".parse().unwrap()));
        assert_eq!(record.router_ip(Family::V4), Some("10.244.0.103".parse().unwrap()));
        assert_eq!(record.router_ip(Family::V6), None);
        assert_eq!(record.to_json(), SAMPLE);
    }

    #[test]
    fn networks_are_read_in_both_forms_and_written_as_objects() {
        let text = r#"{"Name":"n","Cluster":"c","IPv4AllocCIDR":"10.1.1.7/24",
            "IPv4SecondaryAllocCIDRs":["10.2.0.0/24",null,{"IP":"10.3.0.0","Mask":"//8AAA=="}],"NodeIdentity":1}"#;
        let record = NodeRecord::parse(text.as_bytes()).unwrap();
        assert_eq!(
            record.cidrs().map(|c| c.to_string()).collect::<Vec<_>>(),
            ["10.1.1.0/24", "10.2.0.0/24", "10.3.0.0/16"]
        );
        let written = record.to_json();
        assert!(written.contains(r#""IPv4AllocCIDR":{"IP":"10.1.1.0","Mask":"////AA=="}"#), "{written}");
        assert!(written.contains(r#""IPv4SecondaryAllocCIDRs":[{"IP":"10.2.0.0","#), "{written}");
    }

    #[test]
    fn garbage_is_refused_with_the_field() {
        let with = |field: &str, value: &str| error(&format!(r#"{{"Name":"n","Cluster":"c","{field}":{value}}}"#));
        assert!(error("").starts_with("node record: the value is not JSON: "));
        assert_eq!(error("[]"), "node record: a JSON object is wanted, not []");
        assert!(error(r#"{"Cluster":"c"}"#).starts_with("Name: \"\" is not a node name"));
        assert!(error(r#"{"Name":"n"}"#).starts_with("Cluster: \"\" is not a cluster name"));
        assert_eq!(with("IPAddresses", "{}"), "IPAddresses: a list is wanted, not {}");
        assert_eq!(with("IPAddresses", r#"[{"IP":"1"}]"#), "IPAddresses[0].IP: an IP address is wanted, not \"1\"");
        assert_eq!(with("IPv4AllocCIDR", "7"), "IPv4AllocCIDR: a CIDR or an object with IP and Mask is wanted, not 7");
        assert_eq!(with("IPv4AllocCIDR", "\"x\""), "IPv4AllocCIDR: a CIDR is wanted, not \"x\"");
        assert_eq!(with("IPv4AllocCIDR", "\"fd00::/64\""), "IPv4AllocCIDR: fd00::/64 is not an IPv4 network");
        assert_eq!(
            with("IPv4SecondaryAllocCIDRs", r#"[{"IP":"10.0.0.0","Mask":"/wD/AA=="}]"#),
            "IPv4SecondaryAllocCIDRs[0]: Mask: a mask of ones before zeros is wanted, not \"/wD/AA==\""
        );
        assert_eq!(
            with("IPv6AllocCIDR", r#"{"IP":"fd00::","Mask":"////AA=="}"#),
            "IPv6AllocCIDR: Mask: a mask of 4 bytes for IPv4 or 16 for IPv6, in base64, is wanted, not \"////AA==\""
        );
        assert_eq!(with("IPv6HealthIP", "\"10.0.0.1\""), "IPv6HealthIP: 10.0.0.1 is not an IPv6 address");
        assert_eq!(with("ClusterID", "256"), "ClusterID: a whole number from 0 to 255 is wanted, not 256");
        assert_eq!(with("Labels", r#"{"a":1}"#), "Labels.a: a string is wanted, not 1");
    }

    #[test]
    fn a_record_belongs_to_its_key() {
        let (cluster, name) = (ClusterName::new("cluster3").unwrap(), NodeName::new("test-node-1").unwrap());
        let parse = |cluster: &str, name: &str| {
            let (cluster, name) = (ClusterName::new(cluster).unwrap(), NodeName::new(name).unwrap());
            NodeRecord::parse_for(&cluster, &name, SAMPLE.as_bytes()).map_err(|error| error.field)
        };
        assert_eq!(parse("cluster3", "test-node-1"), Ok(NodeRecord::parse(SAMPLE.as_bytes()).unwrap()));
        assert_eq!(parse(cluster.as_str(), "other"), Err("Name".to_owned()));
        assert_eq!(parse("other", name.as_str()), Err("Cluster".to_owned()));
    }

    prop_compose! {
        fn any_record()(
            v4 in proptest::collection::vec((any::<Ipv4Addr>(), 0u8..=32), 0..3),
            // Not below /96: an IPv4 address in IPv6 notation is read as IPv4.
            v6 in proptest::collection::vec((0x2000_u128..0x4000, any::<u128>(), 16u8..=128), 0..3),
            addresses in proptest::collection::vec(("[A-Za-z]{1,12}", any::<Ipv4Addr>()), 0..3),
            health in any::<Option<Ipv4Addr>>(),
            numbers in any::<(u8, u8)>(),
            labels in proptest::collection::btree_map("[a-z./]{1,8}", "[a-z<>&\"]{0,8}", 0..3),
            boot_id in "[0-9a-f-]{0,36}",
        ) -> NodeRecord {
            let v6 = v6.into_iter().map(|(top, rest, length)| (Ipv6Addr::from(top << 112 | rest >> 16), length));
            let addresses = addresses.into_iter().map(|(kind, ip)| NodeAddress { kind: kind.into(), ip: ip.into() });
            let name = NodeName::new("node-1").unwrap();
            NodeRecord {
                addresses: addresses.collect(),
                ipv4_cidrs: v4.into_iter().map(|(ip, length)| Ipv4Net::new(ip, length).unwrap().trunc()).collect(),
                ipv6_cidrs: v6.map(|(ip, length)| Ipv6Net::new(ip, length).unwrap().trunc()).collect(),
                ipv4_health: health,
                encryption_key: numbers.1,
                annotations: labels.clone(),
                labels,
                boot_id,
                ..NodeRecord::new(name, ClusterName::default(), ClusterId::new(numbers.0))
            }
        }
    }

    proptest! {
        #[test]
        fn records_are_read_back(record in any_record()) {
            prop_assert_eq!(NodeRecord::parse(record.to_json().as_bytes()), Ok(record));
        }

        #[test]
        fn no_bytes_panic(value in proptest::collection::vec(any::<u8>(), 0..64)) {
            prop_assert!(NodeRecord::parse(&value).is_err());
        }
    }
}

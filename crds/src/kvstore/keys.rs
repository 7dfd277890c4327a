//! The keys, built and read back. A key is text; etcd's own byte strings that are no UTF-8 are no keys of ours.

use std::{fmt, net::IpAddr, str::FromStr};

use basal_ipam::names::{NameError as NodeNameError, NodeName};
use ipnet::IpNet;

use crate::{
    address::parse_ip,
    identity::{IdentityError, IdentityId},
    labels::{LabelError, Labels},
    names::{ClusterName, NameError},
};

/// The operator's heartbeat, a time stamp under a lease.
pub const HEARTBEAT: &str = "cilium/.heartbeat";
/// Below it, locks that exist only to prove that etcd has a quorum: `<prefix><hex>`.
pub const INIT_LOCK_PREFIX: &str = "cilium/.initlock/";
/// What agents and operators publish.
pub const STATE_PREFIX: &str = "cilium/state/";
/// Node records: `<prefix><cluster>/<node>`.
pub const NODES_PREFIX: &str = "cilium/state/nodes/v1/";
/// ip→identity records: `<prefix><address or CIDR>`.
pub const IPS_PREFIX: &str = "cilium/state/ip/v1/default/";
/// The whole of the identities: master keys, references, locks.
pub const IDENTITIES_PREFIX: &str = "cilium/state/identities/v1/";
/// Identities' master keys, without lease: `<prefix><decimal>`, value: labels.
pub const IDENTITY_IDS_PREFIX: &str = "cilium/state/identities/v1/id/";
/// Identities' references, under the lease of the agent that uses them: `<prefix><labels>/<node address>`, value: decimal.
pub const IDENTITY_VALUES_PREFIX: &str = "cilium/state/identities/v1/value/";
/// Locks on labels: `<prefix><labels>/<lease in hex>`.
pub const IDENTITY_LOCKS_PREFIX: &str = "cilium/state/identities/v1/locks/";
/// What a cluster tells others about itself: `<prefix><cluster>`.
pub const CLUSTER_CONFIG_PREFIX: &str = "cilium/cluster-config/";
/// Marks that a cluster's records of one kind are complete: `<prefix><cluster>/<prefix of the records>`.
pub const SYNCED_PREFIX: &str = "cilium/synced/";

/// Why a key is not the one that its prefix promises.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// It stands elsewhere.
    #[error("key {key:?} does not begin with {prefix:?}")]
    Prefix {
        /// The key.
        key: String,
        /// What it must begin with.
        prefix: &'static str,
    },
    /// It has too few or too many parts.
    #[error("key {key:?} is not of the form {form}")]
    Form {
        /// The key.
        key: String,
        /// The form.
        form: &'static str,
    },
    /// The cluster's name in it is none.
    #[error("key {key:?}: {error}")]
    Cluster {
        /// The key.
        key: String,
        /// Why.
        error: NameError,
    },
    /// The node's name in it is none.
    #[error("key {key:?}: {error}")]
    Node {
        /// The key.
        key: String,
        /// Why.
        error: NodeNameError,
    },
    /// The address or CIDR in it is none.
    #[error("key {key:?} does not end with an IP address or CIDR in canonical form")]
    Ip {
        /// The key.
        key: String,
    },
    /// The identity in it is none.
    #[error("key {key:?}: {error}")]
    Identity {
        /// The key.
        key: String,
        /// Why.
        error: IdentityError,
    },
    /// The labels in it are none.
    #[error("key {key:?}: {error}")]
    Labels {
        /// The key.
        key: String,
        /// Why.
        error: LabelError,
    },
}

/// What an ip→identity record is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum IpTarget {
    /// One address, of a pod or node.
    Host(IpAddr),
    /// A network. Never a single address: that is [`IpTarget::Host`] in all that Basal writes.
    Network(IpNet),
}

impl IpTarget {
    /// The network that it covers, /32 or /128 for one address.
    #[must_use]
    pub fn network(self) -> IpNet {
        match self {
            Self::Host(ip) => IpNet::from(ip),
            Self::Network(network) => network,
        }
    }

    /// The address, or that of the network.
    #[must_use]
    pub fn ip(self) -> IpAddr {
        match self {
            Self::Host(ip) => ip,
            Self::Network(network) => network.addr(),
        }
    }
}

/// As the key ends: `10.0.0.1` or `10.0.0.0/24`.
impl fmt::Display for IpTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host(ip) => ip.fmt(f),
            Self::Network(network) => network.fmt(f),
        }
    }
}

/// The kinds of records that have a mark of completeness.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Synced {
    /// Node records.
    Nodes,
    /// Services.
    Services,
    /// Identities.
    Identities,
    /// ip→identity records.
    Ips,
    /// EndpointSlices.
    EndpointSlices,
    /// ServiceExports.
    ServiceExports,
}

impl Synced {
    /// The root of the records. For identities and addresses it is shorter than the prefix of their keys.
    #[must_use]
    pub const fn root(self) -> &'static str {
        match self {
            Self::Nodes => "cilium/state/nodes/v1",
            Self::Services => "cilium/state/services/v1",
            Self::Identities => "cilium/state/identities/v1",
            Self::Ips => "cilium/state/ip/v1",
            Self::EndpointSlices => "cilium/state/endpointslices/v1",
            Self::ServiceExports => "cilium/state/serviceexports/v1",
        }
    }
}

/// The key of a node's record.
#[must_use]
pub fn node(cluster: &ClusterName, node: &NodeName) -> String {
    format!("{NODES_PREFIX}{cluster}/{node}")
}

/// The prefix of the node records of one cluster.
#[must_use]
pub fn nodes_of(cluster: &ClusterName) -> String {
    format!("{NODES_PREFIX}{cluster}/")
}

/// Reads the key of a node's record.
///
/// # Errors
/// See [`KeyError`].
pub fn parse_node(key: &str) -> Result<(ClusterName, NodeName), KeyError> {
    let rest = below(key, NODES_PREFIX)?;
    let (cluster, node) = rest
        .split_once('/')
        .ok_or_else(|| KeyError::Form { key: key.to_owned(), form: "cilium/state/nodes/v1/<cluster>/<node>" })?;
    let cluster = ClusterName::new(cluster).map_err(|error| KeyError::Cluster { key: key.to_owned(), error })?;
    let node = NodeName::new(node).map_err(|error| KeyError::Node { key: key.to_owned(), error })?;
    Ok((cluster, node))
}

/// The key of an ip→identity record.
#[must_use]
pub fn ip(target: IpTarget) -> String {
    format!("{IPS_PREFIX}{target}")
}

/// Reads the key of an ip→identity record.
///
/// # Errors
/// See [`KeyError`].
pub fn parse_ip_target(key: &str) -> Result<IpTarget, KeyError> {
    let rest = below(key, IPS_PREFIX)?;
    let target = match rest.contains('/') {
        true => IpNet::from_str(rest).ok().map(IpTarget::Network),
        false => parse_ip(rest).map(IpTarget::Host),
    };
    // Another text for the same address would be a second key for one record.
    target.filter(|target| target.to_string() == rest).ok_or_else(|| KeyError::Ip { key: key.to_owned() })
}

/// The master key of an identity.
#[must_use]
pub fn identity(id: IdentityId) -> String {
    format!("{IDENTITY_IDS_PREFIX}{id}")
}

/// Reads the master key of an identity.
///
/// # Errors
/// See [`KeyError`].
pub fn parse_identity(key: &str) -> Result<IdentityId, KeyError> {
    let rest = below(key, IDENTITY_IDS_PREFIX)?;
    rest.parse().map_err(|error| KeyError::Identity { key: key.to_owned(), error })
}

/// The prefix of all references to the identity of these labels.
#[must_use]
pub fn identity_references_of(labels: &Labels) -> String {
    format!("{IDENTITY_VALUES_PREFIX}{}/", labels.canonical())
}

/// The key of a node's reference to the identity of these labels. The address is the node's IPv4 one, where it has one.
#[must_use]
pub fn identity_reference(labels: &Labels, node_ip: IpAddr) -> String {
    format!("{IDENTITY_VALUES_PREFIX}{}/{node_ip}", labels.canonical())
}

/// Reads the key of a reference.
///
/// # Errors
/// See [`KeyError`].
pub fn parse_identity_reference(key: &str) -> Result<(Labels, IpAddr), KeyError> {
    let rest = below(key, IDENTITY_VALUES_PREFIX)?;
    // Labels hold slashes too; the address holds none.
    let form =
        || KeyError::Form { key: key.to_owned(), form: "cilium/state/identities/v1/value/<labels>/<node address>" };
    let (labels, ip) = rest.rsplit_once('/').ok_or_else(form)?;
    let labels = Labels::parse_canonical(labels).map_err(|error| KeyError::Labels { key: key.to_owned(), error })?;
    let ip = parse_ip(ip).ok_or_else(|| KeyError::Ip { key: key.to_owned() })?;
    Ok((labels, ip))
}

/// The path to lock while the identity of these labels is allocated or collected. The lock's own key is below it.
#[must_use]
pub fn identity_lock(labels: &Labels) -> String {
    format!("{IDENTITY_LOCKS_PREFIX}{}", labels.canonical())
}

/// The key of a cluster's configuration.
#[must_use]
pub fn cluster_config(cluster: &ClusterName) -> String {
    format!("{CLUSTER_CONFIG_PREFIX}{cluster}")
}

/// The key that marks a cluster's records of one kind as complete; its value is a time stamp.
#[must_use]
pub fn synced(cluster: &ClusterName, records: Synced) -> String {
    format!("{SYNCED_PREFIX}{cluster}/{}", records.root())
}

/// What follows the prefix.
fn below<'a>(key: &'a str, prefix: &'static str) -> Result<&'a str, KeyError> {
    key.strip_prefix(prefix).ok_or_else(|| KeyError::Prefix { key: key.to_owned(), prefix })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn cluster() -> ClusterName {
        ClusterName::new("cluster3").unwrap()
    }

    #[test]
    fn keys_are_those_of_cilium() {
        let labels = Labels::parse_canonical("k8s:app.kubernetes.io/name=web;").unwrap();
        let node_ip = "172.18.0.2".parse().unwrap();
        let network = IpTarget::Network("10.1.0.0/16".parse().unwrap());
        for (key, wanted) in [
            (node(&cluster(), &NodeName::new("test-node-1").unwrap()), "cilium/state/nodes/v1/cluster3/test-node-1"),
            (ip(IpTarget::Host("10.244.1.7".parse().unwrap())), "cilium/state/ip/v1/default/10.244.1.7"),
            (ip(IpTarget::Host("fd00::A".parse().unwrap())), "cilium/state/ip/v1/default/fd00::a"),
            (ip(network), "cilium/state/ip/v1/default/10.1.0.0/16"),
            (identity(IdentityId::new(196_915)), "cilium/state/identities/v1/id/196915"),
            (
                identity_reference(&labels, node_ip),
                "cilium/state/identities/v1/value/k8s:app.kubernetes.io/name=web;/172.18.0.2",
            ),
            (identity_lock(&labels), "cilium/state/identities/v1/locks/k8s:app.kubernetes.io/name=web;"),
            (cluster_config(&cluster()), "cilium/cluster-config/cluster3"),
            (synced(&cluster(), Synced::Ips), "cilium/synced/cluster3/cilium/state/ip/v1"),
        ] {
            assert_eq!(key, wanted);
        }
    }

    #[test]
    fn a_node_key_of_another_form_says_what_is_wrong() {
        let parse = |key| parse_node(key).unwrap_err().to_string();
        assert_eq!(
            parse("cilium/state/ip/v1/default/10.0.0.1"),
            "key \"cilium/state/ip/v1/default/10.0.0.1\" does not begin with \"cilium/state/nodes/v1/\""
        );
        assert_eq!(
            parse("cilium/state/nodes/v1/node-1"),
            "key \"cilium/state/nodes/v1/node-1\" is not of the form cilium/state/nodes/v1/<cluster>/<node>"
        );
        assert!(parse("cilium/state/nodes/v1/c/a/b").contains("\"a/b\" is not a node name"));
        assert!(parse("cilium/state/nodes/v1/C/a").contains("\"C\" is not a cluster name"));
    }

    #[test]
    fn one_address_has_one_key() {
        for bad in ["10.0.0.01", "::ffff:10.0.0.1", "FD00::1", "10.0.0.1/", "10.0.0.1/024", "", "x"] {
            let key = format!("{IPS_PREFIX}{bad}");
            assert_eq!(parse_ip_target(&key), Err(KeyError::Ip { key }));
        }
    }

    #[test]
    fn a_reference_needs_labels_and_address() {
        let parse = |rest: &str| parse_identity_reference(&format!("{IDENTITY_VALUES_PREFIX}{rest}"));
        assert!(matches!(parse("k8s:a=b;"), Err(KeyError::Form { .. })));
        assert!(matches!(parse("k8s:a=b/10.0.0.1"), Err(KeyError::Labels { .. })));
        assert!(matches!(parse("k8s:a=b;/node-1"), Err(KeyError::Ip { .. })));
    }

    proptest! {
        #[test]
        fn keys_are_read_back(
            name in "[a-z0-9]{1,8}(\\.[a-z0-9]{1,4}){0,2}",
            v4 in any::<std::net::Ipv4Addr>(),
            v6 in any::<std::net::Ipv6Addr>(),
            length in 0u8..=32,
            id in any::<u32>(),
            key in "[a-z./]{1,8}",
            value in "[a-z0-9]{0,8}",
        ) {
            let name = NodeName::new(&name).unwrap();
            prop_assert_eq!(parse_node(&node(&cluster(), &name)), Ok((cluster(), name)));
            let v6 = IpAddr::from(v6).to_canonical();
            let network = IpTarget::Network(IpNet::new(v4.into(), length).unwrap().trunc());
            for target in [IpTarget::Host(v4.into()), IpTarget::Host(v6), network] {
                prop_assert_eq!(parse_ip_target(&ip(target)), Ok(target));
            }
            let id = IdentityId::new(id);
            prop_assert_eq!(parse_identity(&identity(id)), Ok(id));
            let labels: Labels = [crate::labels::Label::new("k8s", &key, &value).unwrap()].into_iter().collect();
            prop_assert_eq!(parse_identity_reference(&identity_reference(&labels, v6)), Ok((labels, v6)));
        }
    }
}

//! Typed builders of map rows, and the maps that have rows.

use std::{collections::BTreeMap, net::IpAddr};

use basal_maps::{
    addr::family_of,
    endpoint::{EndpointInfo, EndpointKey},
    ipcache::{IpcacheKey, RemoteEndpointInfo},
    nat::{ExemptV4, ExemptV6, MasqueradeAddress, MasqueradeKey},
    node::{NodeKey, NodeValue},
    spec::{self, MapSpec},
    tunnel::{TunnelKey, TunnelValue},
};
use ipnet::IpNet;
use zerocopy::IntoBytes as _;

/// A map that the agent fills.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum MapId {
    /// `cilium_lxc`
    Endpoints,
    /// `cilium_ipcache_v2`
    Ipcache,
    /// `cilium_tunnel_map`
    Tunnel,
    /// `cilium_node_map_v2`
    Nodes,
    /// `basal_masquerade`; this and the following only where programs masquerade.
    Masquerade,
    /// `cilium_ipmasq_v4`
    Exempt4,
    /// `cilium_ipmasq_v6`
    Exempt6,
}

impl MapId {
    /// Every map that the agent fills.
    pub const ALL: [Self; 7] =
        [Self::Endpoints, Self::Ipcache, Self::Tunnel, Self::Nodes, Self::Masquerade, Self::Exempt4, Self::Exempt6];

    /// True for those that there are only where programs masquerade.
    #[must_use]
    pub const fn is_for_masquerading(self) -> bool {
        matches!(self, Self::Masquerade | Self::Exempt4 | Self::Exempt6)
    }

    /// How the map is made.
    #[must_use]
    pub const fn spec(self) -> &'static MapSpec {
        match self {
            Self::Endpoints => &spec::ENDPOINTS,
            Self::Ipcache => &spec::IPCACHE,
            Self::Tunnel => &spec::TUNNEL,
            Self::Nodes => &spec::NODES,
            Self::Masquerade => &spec::MASQUERADE,
            Self::Exempt4 => &spec::EXEMPT4,
            Self::Exempt6 => &spec::EXEMPT6,
        }
    }
}

/// Rows by map.
pub type Rows = BTreeMap<MapId, BTreeMap<Vec<u8>, Vec<u8>>>;

/// One row as bytes.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Row {
    /// The map.
    pub map: MapId,
    /// Key in the map's layout.
    pub key: Vec<u8>,
    /// Value in the map's layout.
    pub value: Vec<u8>,
}

impl Row {
    /// Puts the row among others; it replaces one with its key.
    pub fn insert_into(self, rows: &mut Rows) {
        rows.entry(self.map).or_default().insert(self.key, self.value);
    }
}

/// One of the node's own addresses in `cilium_lxc`.
#[must_use]
pub fn host(ip: IpAddr) -> Row {
    endpoint(ip, &EndpointInfo::HOST)
}

/// A pod's address in `cilium_lxc`.
#[must_use]
pub fn endpoint(ip: IpAddr, info: &EndpointInfo) -> Row {
    Row { map: MapId::Endpoints, key: EndpointKey::from(ip).as_bytes().to_vec(), value: info.as_bytes().to_vec() }
}

/// An address or prefix in `cilium_ipcache_v2`.
#[must_use]
pub fn ipcache(cidr: IpNet, identity: u32, tunnel_endpoint: Option<IpAddr>) -> Row {
    Row {
        map: MapId::Ipcache,
        key: IpcacheKey::new(cidr.network(), cidr.prefix_len()).as_bytes().to_vec(),
        value: RemoteEndpointInfo::new(identity, tunnel_endpoint).as_bytes().to_vec(),
    }
}

/// A pod CIDR in `cilium_tunnel_map`.
#[must_use]
pub fn tunnel(cidr: IpNet, tunnel_endpoint: IpAddr, node_id: u16) -> Row {
    Row {
        map: MapId::Tunnel,
        key: TunnelKey::new(cidr.network(), cidr.prefix_len()).as_bytes().to_vec(),
        value: TunnelValue::new(tunnel_endpoint, node_id).as_bytes().to_vec(),
    }
}

/// A node's address in `cilium_node_map_v2`.
#[must_use]
pub fn node(ip: IpAddr, id: u16) -> Row {
    Row {
        map: MapId::Nodes,
        key: NodeKey::from(ip).as_bytes().to_vec(),
        value: NodeValue { id, spi: 0, pad: 0 }.as_bytes().to_vec(),
    }
}

/// The address that a device masquerades with.
#[must_use]
pub fn masquerade(ifindex: u32, by: IpAddr) -> Row {
    Row {
        map: MapId::Masquerade,
        key: MasqueradeKey::new(ifindex, family_of(by)).as_bytes().to_vec(),
        value: MasqueradeAddress::from(by).as_bytes().to_vec(),
    }
}

/// A network that pods' packets go to as they are.
#[must_use]
pub fn exempt(network: IpNet) -> Row {
    let prefixlen = u32::from(network.prefix_len());
    let (map, key) = match network.network() {
        IpAddr::V4(ip) => (MapId::Exempt4, ExemptV4 { prefixlen, address: ip.octets() }.as_bytes().to_vec()),
        IpAddr::V6(ip) => (MapId::Exempt6, ExemptV6 { prefixlen, address: ip.octets() }.as_bytes().to_vec()),
    };
    Row { map, key, value: vec![1] }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_have_the_sizes_of_their_maps() {
        let ip = IpAddr::from([10, 0, 1, 7]);
        let cidr: IpNet = "10.0.2.77/24".parse().unwrap();
        let v6 = "fd00::/64".parse().unwrap();
        for row in [
            host(ip),
            ipcache(cidr, 2, Some(ip)),
            tunnel(cidr, ip, 3),
            node(ip, 3),
            masquerade(7, ip),
            exempt(cidr),
            exempt(v6),
        ] {
            let spec = row.map.spec();
            assert_eq!((row.key.len(), row.value.len()), (spec.key_size as usize, spec.value_size as usize));
        }
    }

    #[test]
    fn host_bits_of_a_cidr_are_dropped() {
        let row = tunnel("10.0.2.77/24".parse().unwrap(), IpAddr::from([192, 168, 1, 5]), 3);
        assert_eq!(row.key[..12], [56, 0, 0, 0, 0, 0, 0, 1, 10, 0, 2, 0]);
        assert_eq!(row.value[..4], [192, 168, 1, 5]);
        assert_eq!(row.value[16..], [1, 0, 3, 0]);
    }
}

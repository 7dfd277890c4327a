//! What each pinned map is made as. Cilium makes a map anew, and empty, when any of these differ, so flags count too.

use core::mem::size_of;

use crate::{
    config::Config,
    conntrack::CtEntry,
    endpoint::{EndpointInfo, EndpointKey},
    flow::{DirectConnection, TupleV4, TupleV6},
    ipcache::{IpcacheKey, RemoteEndpointInfo},
    metrics::{MetricsKey, MetricsValue},
    nat::{
        ExemptV4, ExemptV6, FragmentPorts, FragmentsV4, FragmentsV6, MasqueradeAddress, MasqueradeKey, NatEntryV4,
        NatEntryV6,
    },
    node::{NodeKey, NodeValue},
    tunnel::{TunnelKey, TunnelValue},
};

/// `BPF_F_NO_PREALLOC` (linux/bpf.h): rows are allocated when they are inserted.
pub const NO_PREALLOC: u32 = 1;
/// `BPF_F_RDONLY_PROG` (linux/bpf.h): programs may read only.
pub const RDONLY_PROG: u32 = 0x80;

/// The map types in use, by their numbers in linux/bpf.h.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
#[repr(u32)]
pub enum MapKind {
    /// `BPF_MAP_TYPE_HASH`
    Hash = 1,
    /// `BPF_MAP_TYPE_PROG_ARRAY`
    ProgArray = 3,
    /// `BPF_MAP_TYPE_PERCPU_HASH`
    PerCpuHash = 5,
    /// `BPF_MAP_TYPE_LRU_HASH`
    LruHash = 9,
    /// `BPF_MAP_TYPE_LPM_TRIE`
    LpmTrie = 11,
}

/// How a map is made.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct MapSpec {
    /// Name of the pin.
    pub name: &'static str,
    /// Type.
    pub kind: MapKind,
    /// Key size in bytes.
    pub key_size: u32,
    /// Value size in bytes.
    pub value_size: u32,
    /// How many rows fit.
    pub max_entries: u32,
    /// `BPF_F_…`.
    pub flags: u32,
}

impl MapSpec {
    const fn new<K, V>(name: &'static str, kind: MapKind, max_entries: u32, flags: u32) -> Self {
        Self { name, kind, key_size: size_of::<K>() as u32, value_size: size_of::<V>() as u32, max_entries, flags }
    }
}

/// Endpoints of this node by address.
pub const ENDPOINTS: MapSpec =
    MapSpec::new::<EndpointKey, EndpointInfo>("cilium_lxc", MapKind::Hash, 65536, NO_PREALLOC | RDONLY_PROG);
/// Identity and node of every address in the cluster.
pub const IPCACHE: MapSpec = MapSpec::new::<IpcacheKey, RemoteEndpointInfo>(
    "cilium_ipcache_v2",
    MapKind::LpmTrie,
    512_000,
    NO_PREALLOC | RDONLY_PROG,
);
/// Pod CIDR → node.
pub const TUNNEL: MapSpec =
    MapSpec::new::<TunnelKey, TunnelValue>("cilium_tunnel_map", MapKind::LpmTrie, 65536, NO_PREALLOC | RDONLY_PROG);
/// Node address → node id.
pub const NODES: MapSpec =
    MapSpec::new::<NodeKey, NodeValue>("cilium_node_map_v2", MapKind::Hash, 16384, NO_PREALLOC | RDONLY_PROG);
/// Packet and byte counters.
pub const METRICS: MapSpec =
    MapSpec::new::<MetricsKey, MetricsValue>("cilium_metrics", MapKind::PerCpuHash, 65536, NO_PREALLOC);
/// Policy program of each endpoint, by endpoint id.
pub const CALL_POLICY: MapSpec = MapSpec::new::<u32, u32>("cilium_call_policy", MapKind::ProgArray, 65536, 0);

/// TCP connections over IPv4 that go past the host stack, as pods of this node send their segments; our own.
pub const DIRECT4: MapSpec = MapSpec::new::<TupleV4, DirectConnection>("basal_direct_v4", MapKind::LruHash, 65536, 0);
/// The same over IPv6.
pub const DIRECT6: MapSpec = MapSpec::new::<TupleV6, DirectConnection>("basal_direct_v6", MapKind::LruHash, 65536, 0);

/// Every map that is there without legacy host routing, too.
pub const OF_DIRECT_ROUTING: [MapSpec; 2] = [DIRECT4, DIRECT6];

/// Every map that is always there.
pub const BASE: [MapSpec; 6] = [ENDPOINTS, IPCACHE, TUNNEL, NODES, METRICS, CALL_POLICY];

/// TCP connections over IPv4. How many rows it and those that follow have is configured ([`of`]); here stand Cilium's
/// largest defaults.
pub const CT4_TCP: MapSpec = MapSpec::new::<TupleV4, CtEntry>("cilium_ct4_global", MapKind::LruHash, 524_288, 0);
/// Other connections over IPv4.
pub const CT4_ANY: MapSpec = MapSpec::new::<TupleV4, CtEntry>("cilium_ct_any4_global", MapKind::LruHash, 262_144, 0);
/// TCP connections over IPv6.
pub const CT6_TCP: MapSpec = MapSpec::new::<TupleV6, CtEntry>("cilium_ct6_global", MapKind::LruHash, 524_288, 0);
/// Other connections over IPv6.
pub const CT6_ANY: MapSpec = MapSpec::new::<TupleV6, CtEntry>("cilium_ct_any6_global", MapKind::LruHash, 262_144, 0);
/// Translations of IPv4 flows.
pub const NAT4: MapSpec = MapSpec::new::<TupleV4, NatEntryV4>("cilium_snat_v4_external", MapKind::LruHash, 524_288, 0);
/// Translations of IPv6 flows.
pub const NAT6: MapSpec = MapSpec::new::<TupleV6, NatEntryV6>("cilium_snat_v6_external", MapKind::LruHash, 524_288, 0);
/// Ports of IPv4 datagrams in fragments.
pub const FRAGMENTS4: MapSpec =
    MapSpec::new::<FragmentsV4, FragmentPorts>("cilium_ipv4_frag_datagrams", MapKind::LruHash, 8192, 0);
/// Ports of IPv6 datagrams in fragments.
pub const FRAGMENTS6: MapSpec =
    MapSpec::new::<FragmentsV6, FragmentPorts>("cilium_ipv6_frag_datagrams", MapKind::LruHash, 8192, 0);
/// IPv4 networks that pods' packets go to as they are.
pub const EXEMPT4: MapSpec =
    MapSpec::new::<ExemptV4, u8>("cilium_ipmasq_v4", MapKind::LpmTrie, 16384, NO_PREALLOC | RDONLY_PROG);
/// IPv6 networks that pods' packets go to as they are.
pub const EXEMPT6: MapSpec =
    MapSpec::new::<ExemptV6, u8>("cilium_ipmasq_v6", MapKind::LpmTrie, 16384, NO_PREALLOC | RDONLY_PROG);
/// By which address each device masquerades; our own.
pub const MASQUERADE: MapSpec = MapSpec::new::<MasqueradeKey, MasqueradeAddress>(
    "basal_masquerade",
    MapKind::Hash,
    1024,
    NO_PREALLOC | RDONLY_PROG,
);

/// Every map that is there when programs masquerade, too.
pub const OF_MASQUERADING: [MapSpec; 11] =
    [CT4_TCP, CT4_ANY, CT6_TCP, CT6_ANY, NAT4, NAT6, FRAGMENTS4, FRAGMENTS6, EXEMPT4, EXEMPT6, MASQUERADE];

impl MapSpec {
    /// How the map is made by a configuration. Those for flows of a family that is off get a single row: the kernel makes
    /// the rows of such maps in advance.
    #[must_use]
    pub fn by(self, config: &Config) -> Self {
        let max_entries = match self.name {
            name if name == CT4_TCP.name || name == CT6_TCP.name => config.ct_tcp_max,
            name if name == CT4_ANY.name || name == CT6_ANY.name => config.ct_any_max,
            name if name == NAT4.name || name == NAT6.name => config.nat_max,
            // Between nodes none goes past the stack without a tunnel. And another size is another map: while the stack
            // routes, nobody takes notes of connections between nodes away.
            name if name == DIRECT4.name || name == DIRECT6.name => {
                if config.native_routing() {
                    self.max_entries / 2
                } else {
                    self.max_entries
                }
            }
            _ => return self,
        };
        let router =
            if self.key_size as usize == size_of::<TupleV6>() { config.router_ipv6 } else { config.router_ipv4 };
        Self { max_entries: if router.is_unspecified() { 1 } else { max_entries }, ..self }
    }
}

/// The maps that are not always there, by what they are for.
pub const OPTIONAL: [&[MapSpec]; 2] = [&OF_MASQUERADING, &OF_DIRECT_ROUTING];

/// The pinned maps of a configuration, as they are made.
pub fn of(config: &Config) -> impl Iterator<Item = MapSpec> {
    let masquerading = OF_MASQUERADING.into_iter().filter(|_| config.bpf_masquerade());
    let direct = OF_DIRECT_ROUTING.into_iter().filter(|_| !config.legacy_routing());
    BASE.into_iter().chain(masquerading).chain(direct).map(|spec| spec.by(config))
}

/// Maps of the object that a configuration has no use for.
pub fn not_of(config: &Config) -> impl Iterator<Item = MapSpec> {
    OPTIONAL.into_iter().flatten().copied().filter(|map| of(config).all(|used| used.name != map.name))
}

#[cfg(test)]
mod tests {
    extern crate std;

    use std::vec::Vec;

    use super::*;
    use crate::{
        addr::NetIp,
        config::{FLAG_BPF_MASQUERADE, FLAG_LEGACY_ROUTING},
    };

    #[test]
    fn specs_are_cilium_1_20() {
        let config = Config {
            router_ipv4: NetIp::v4([10, 0, 1, 1]),
            flags: FLAG_BPF_MASQUERADE,
            ct_tcp_max: 4000,
            ct_any_max: 2000,
            nat_max: 3000,
            ..Config::UNSET
        };
        let rows: Vec<_> =
            of(&config).map(|m| (m.name, m.kind as u32, m.key_size, m.value_size, m.max_entries, m.flags)).collect();
        assert_eq!(
            rows,
            [
                ("cilium_lxc", 1, 20, 48, 65536, 129),
                ("cilium_ipcache_v2", 11, 24, 24, 512_000, 129),
                ("cilium_tunnel_map", 11, 24, 20, 65536, 129),
                ("cilium_node_map_v2", 1, 20, 4, 16384, 129),
                ("cilium_metrics", 5, 8, 16, 65536, 1),
                ("cilium_call_policy", 3, 4, 4, 65536, 0),
                ("cilium_ct4_global", 9, 14, 56, 4000, 0),
                ("cilium_ct_any4_global", 9, 14, 56, 2000, 0),
                ("cilium_ct6_global", 9, 38, 56, 1, 0),
                ("cilium_ct_any6_global", 9, 38, 56, 1, 0),
                ("cilium_snat_v4_external", 9, 14, 40, 3000, 0),
                ("cilium_snat_v6_external", 9, 38, 56, 1, 0),
                ("cilium_ipv4_frag_datagrams", 9, 12, 4, 8192, 0),
                ("cilium_ipv6_frag_datagrams", 9, 40, 4, 8192, 0),
                ("cilium_ipmasq_v4", 11, 8, 1, 16384, 129),
                ("cilium_ipmasq_v6", 11, 20, 1, 16384, 129),
                ("basal_masquerade", 1, 8, 16, 1024, 129),
                ("basal_direct_v4", 9, 14, 12, 65536, 0),
                ("basal_direct_v6", 9, 38, 12, 1, 0),
            ]
        );
        assert_eq!(of(&Config::UNSET).count(), BASE.len());
        let names = |maps: &mut dyn Iterator<Item = MapSpec>| maps.map(|map| map.name).collect::<Vec<_>>();
        let masquerades = Config { flags: FLAG_BPF_MASQUERADE | FLAG_LEGACY_ROUTING, ..config };
        assert_eq!(names(&mut not_of(&masquerades)), ["basal_direct_v4", "basal_direct_v6"]);
        assert_eq!(not_of(&Config { flags: 0, ..config }).count(), OF_MASQUERADING.len());
    }
}

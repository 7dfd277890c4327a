//! What each pinned map is made as. Cilium makes a map anew, and empty, when any of these differ, so flags count too.

use core::mem::size_of;

use crate::{
    endpoint::{EndpointInfo, EndpointKey},
    ipcache::{IpcacheKey, RemoteEndpointInfo},
    metrics::{MetricsKey, MetricsValue},
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

/// Every pinned map.
pub const ALL: [MapSpec; 6] = [ENDPOINTS, IPCACHE, TUNNEL, NODES, METRICS, CALL_POLICY];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn specs_are_cilium_1_20() {
        let rows = ALL.map(|m| (m.name, m.kind as u32, m.key_size, m.value_size, m.max_entries, m.flags));
        assert_eq!(
            rows,
            [
                ("cilium_lxc", 1, 20, 48, 65536, 129),
                ("cilium_ipcache_v2", 11, 24, 24, 512_000, 129),
                ("cilium_tunnel_map", 11, 24, 20, 65536, 129),
                ("cilium_node_map_v2", 1, 20, 4, 16384, 129),
                ("cilium_metrics", 5, 8, 16, 65536, 1),
                ("cilium_call_policy", 3, 4, 4, 65536, 0),
            ]
        );
    }
}

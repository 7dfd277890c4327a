//! The pinned maps, made as [`basal_maps::spec`] says, and counting.

use aya_ebpf::{
    btf_maps::{HashMap, LpmTrie, PerCpuHashMap, ProgramArray, lpm_trie::Key},
    macros::btf_map,
};
use basal_ebpf::decide::Tables;
use basal_maps::{
    endpoint::{EndpointInfo, EndpointKey},
    ipcache::{IpPrefix, RemoteEndpointInfo},
    metrics::{Direction, File, MetricsKey, MetricsValue},
    node::{NodeKey, NodeValue},
    reason::Reason,
    spec,
    tunnel::TunnelValue,
};

#[btf_map(name = "cilium_lxc")]
static ENDPOINTS: HashMap<
    EndpointKey,
    EndpointInfo,
    { spec::ENDPOINTS.max_entries as usize },
    { spec::ENDPOINTS.flags as usize },
> = HashMap::new();

#[btf_map(name = "cilium_ipcache_v2")]
static IPCACHE: LpmTrie<
    IpPrefix,
    RemoteEndpointInfo,
    { spec::IPCACHE.max_entries as usize },
    { spec::IPCACHE.flags as usize },
> = LpmTrie::new();

#[btf_map(name = "cilium_tunnel_map")]
static TUNNEL: LpmTrie<IpPrefix, TunnelValue, { spec::TUNNEL.max_entries as usize }, { spec::TUNNEL.flags as usize }> =
    LpmTrie::new();

/// No program reads it; it is here so that the loader makes every map in one way.
#[btf_map(name = "cilium_node_map_v2")]
static NODES: HashMap<NodeKey, NodeValue, { spec::NODES.max_entries as usize }, { spec::NODES.flags as usize }> =
    HashMap::new();

#[btf_map(name = "cilium_metrics")]
static METRICS: PerCpuHashMap<
    MetricsKey,
    MetricsValue,
    { spec::METRICS.max_entries as usize },
    { spec::METRICS.flags as usize },
> = PerCpuHashMap::new();

/// Policy programs by endpoint id.
#[btf_map(name = "cilium_call_policy")]
pub(super) static CALL_POLICY: ProgramArray<
    { spec::CALL_POLICY.max_entries as usize },
    { spec::CALL_POLICY.flags as usize },
> = ProgramArray::new();

/// The kernel's maps.
pub(super) struct Pinned;

impl Tables for Pinned {
    #[inline(always)]
    fn endpoint(&self, key: &EndpointKey) -> Option<&EndpointInfo> {
        // SAFETY: the map is made without preallocation, so that a row's memory outlives the program's run (RCU); user
        // space replaces rows as a whole.
        unsafe { ENDPOINTS.get(key) }
    }

    #[inline(always)]
    fn ipcache(&self, prefix: &IpPrefix) -> Option<&RemoteEndpointInfo> {
        IPCACHE.get(&Key::new(prefix.full_length(), *prefix))
    }

    #[inline(always)]
    fn tunnel(&self, prefix: &IpPrefix) -> Option<&TunnelValue> {
        TUNNEL.get(&Key::new(prefix.full_length(), *prefix))
    }
}

/// Counts a packet of `bytes` in `cilium_metrics`.
#[inline(always)]
pub(super) fn count(reason: Reason, direction: Direction, file: File, line: u16, bytes: u32) {
    let key = MetricsKey { reason: reason.0, dir: direction as u8, line, file: file as u8, pad1: 0, pad2: 0 };
    if let Some(value) = METRICS.get_ptr_mut(&key) {
        // SAFETY: the pointer is to this CPU's copy, and programs on one CPU do not preempt each other.
        unsafe {
            (*value).count += 1;
            (*value).bytes += u64::from(bytes);
        }
    } else {
        // A full map loses a count, never a packet.
        METRICS.insert(&key, MetricsValue { count: 1, bytes: u64::from(bytes) }, 0).unwrap_or_default();
    }
}

//! The pinned maps, made as [`basal_maps::spec`] says, and counting.

use aya_ebpf::{
    btf_maps::{HashMap, LpmTrie, LruHashMap, PerCpuHashMap, ProgramArray, lpm_trie::Key},
    macros::btf_map,
};
use basal_ebpf::decide::Tables;
use basal_maps::{
    addr::NetIp,
    conntrack::CtEntry,
    endpoint::{EndpointInfo, EndpointKey},
    flow::{DirectConnection, TupleV4, TupleV6},
    ipcache::{IpPrefix, RemoteEndpointInfo},
    metrics::{Direction, File, MetricsKey, MetricsValue},
    nat::{FragmentPorts, FragmentsV4, FragmentsV6, MasqueradeAddress, MasqueradeKey, NatEntryV4, NatEntryV6},
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

/// Declares a map whose size the loader sets ([`spec::of`]).
macro_rules! lru_map {
    ($name:ident, $spec:ident, $pin:literal, $key:ty => $value:ty) => {
        #[btf_map(name = $pin)]
        pub(super) static $name: LruHashMap<
            $key,
            $value,
            { spec::$spec.max_entries as usize },
            { spec::$spec.flags as usize },
        > = LruHashMap::new();
    };
}

lru_map!(CT4_TCP, CT4_TCP, "cilium_ct4_global", TupleV4 => CtEntry);
lru_map!(CT4_ANY, CT4_ANY, "cilium_ct_any4_global", TupleV4 => CtEntry);
lru_map!(CT6_TCP, CT6_TCP, "cilium_ct6_global", TupleV6 => CtEntry);
lru_map!(CT6_ANY, CT6_ANY, "cilium_ct_any6_global", TupleV6 => CtEntry);
lru_map!(NAT4, NAT4, "cilium_snat_v4_external", TupleV4 => NatEntryV4);
lru_map!(NAT6, NAT6, "cilium_snat_v6_external", TupleV6 => NatEntryV6);
lru_map!(FRAGMENTS4, FRAGMENTS4, "cilium_ipv4_frag_datagrams", FragmentsV4 => FragmentPorts);
lru_map!(FRAGMENTS6, FRAGMENTS6, "cilium_ipv6_frag_datagrams", FragmentsV6 => FragmentPorts);

lru_map!(DIRECT4, DIRECT4, "basal_direct_v4", TupleV4 => DirectConnection);
lru_map!(DIRECT6, DIRECT6, "basal_direct_v6", TupleV6 => DirectConnection);

#[btf_map(name = "cilium_ipmasq_v4")]
pub(super) static EXEMPT4: LpmTrie<
    [u8; 4],
    u8,
    { spec::EXEMPT4.max_entries as usize },
    { spec::EXEMPT4.flags as usize },
> = LpmTrie::new();

#[btf_map(name = "cilium_ipmasq_v6")]
pub(super) static EXEMPT6: LpmTrie<
    [u8; 16],
    u8,
    { spec::EXEMPT6.max_entries as usize },
    { spec::EXEMPT6.flags as usize },
> = LpmTrie::new();

#[btf_map(name = "basal_masquerade")]
static MASQUERADE: HashMap<
    MasqueradeKey,
    MasqueradeAddress,
    { spec::MASQUERADE.max_entries as usize },
    { spec::MASQUERADE.flags as usize },
> = HashMap::new();

/// The address that a device masquerades with; `None` where it does not.
#[inline(always)]
pub(super) fn masquerade_address(ifindex: u32, family: u8) -> Option<NetIp> {
    // SAFETY: as for the endpoints.
    unsafe { MASQUERADE.get(MasqueradeKey::new(ifindex, family)) }.copied()
}

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

//! The kernel's maps of flows, for each family.

use aya_ebpf::{
    btf_maps::{LruHashMap, lpm_trie::Key},
    helpers::{bpf_get_prandom_u32, bpf_ktime_get_ns},
};
use basal_ebpf::{
    nat::{Connection, Flows},
    parse::protocol,
};
use basal_maps::{
    addr::NetIp,
    conntrack::{CtEntry, Seen, Way},
    flow::{End, TupleV4, TupleV6},
    nat::{GRACE, NatEntry, NatEntryV4, NatEntryV6},
};

use super::maps::{CT4_ANY, CT4_TCP, CT6_ANY, CT6_TCP, EXEMPT4, EXEMPT6, NAT4, NAT6};

const NANOSECONDS: u64 = 1_000_000_000;
/// Make a row only where there is none (`BPF_NOEXIST`, linux/bpf.h).
const NO_EXIST: u64 = 1;

/// Nanoseconds since the machine started.
#[inline(always)]
fn nanoseconds() -> u64 {
    // SAFETY: plain helper call.
    unsafe { bpf_ktime_get_ns() }
}

/// Seconds since the machine started.
#[inline(always)]
pub(super) fn seconds() -> u32 {
    (nanoseconds() / NANOSECONDS) as u32
}

/// Notes a packet in a map of connection tracking. A full map loses track of a connection, never a packet.
#[inline(always)]
fn track<K, const MAX: usize, const FLAGS: usize>(
    map: &LruHashMap<K, CtEntry, MAX, FLAGS>,
    key: &K,
    way: Way,
    seen: Seen,
) {
    let now = seconds();
    if let Some(entry) = map.get_ptr_mut(key) {
        // SAFETY: the row's memory stays a row's. Another CPU may note a packet at the same time: a count may be lost.
        unsafe { (*entry).note(way, seen, now) };
        return;
    }
    let mut entry = CtEntry { src_sec_id: seen.identity, ..CtEntry::default() };
    entry.note(way, seen, now);
    map.insert(key, &entry, 0).unwrap_or_default();
}

macro_rules! flows {
    ($(#[$doc:meta])* $name:ident, $key:ty, $entry:ident, $nat:ident, $tcp:ident, $any:ident, $exempt:ident,
     $bits:literal, $octets:expr) => {
        $(#[$doc])*
        #[derive(Default)]
        pub(super) struct $name;

        impl Flows for $name {
            type Key = $key;

            #[inline(always)]
            fn translation(&self, key: &$key) -> Option<End> {
                // SAFETY: the row's memory stays a row's; it is copied at once.
                unsafe { $nat.get(key) }.map(NatEntry::to)
            }

            #[inline(always)]
            fn claim(&self, key: &$key, to: End, own: bool) -> bool {
                $nat.insert(key, &$entry::new(to, nanoseconds(), own), NO_EXIST).is_ok()
            }

            #[inline(always)]
            fn put(&self, key: &$key, to: End, own: bool) -> bool {
                $nat.insert(key, &$entry::new(to, nanoseconds(), own), 0).is_ok()
            }

            #[inline(always)]
            fn release(&self, key: &$key) {
                $nat.remove(key).unwrap_or_default();
            }

            #[inline(always)]
            fn is_settled(&self, key: &$key) -> bool {
                // SAFETY: as above.
                let Some(entry) = (unsafe { $nat.get(key) }) else { return true };
                entry.created + GRACE * NANOSECONDS < nanoseconds()
            }

            #[inline(always)]
            fn connection(&self, key: &$key) -> Connection {
                // SAFETY: as above.
                let entry = unsafe { if key.nexthdr == protocol::TCP { $tcp.get(key) } else { $any.get(key) } };
                match entry {
                    None => Connection::Unknown,
                    Some(entry) if entry.is_over(nanoseconds() / NANOSECONDS) => Connection::Over,
                    Some(_) => Connection::Live,
                }
            }

            #[inline(always)]
            fn track(&self, key: &$key, way: Way, seen: Seen) {
                if key.nexthdr == protocol::TCP {
                    track(&$tcp, key, way, seen);
                } else {
                    track(&$any, key, way, seen);
                }
            }

            #[inline(always)]
            fn random(&self) -> u32 {
                // SAFETY: plain helper call.
                unsafe { bpf_get_prandom_u32() }
            }

            #[inline(always)]
            fn is_exempt(&self, ip: NetIp) -> bool {
                $exempt.get(&Key::new($bits, $octets(ip))).is_some()
            }
        }
    };
}

flows!(
    /// IPv4's.
    FlowsV4, TupleV4, NatEntryV4, NAT4, CT4_TCP, CT4_ANY, EXEMPT4, 32, NetIp::v4_octets
);
flows!(
    /// IPv6's.
    FlowsV6, TupleV6, NatEntryV6, NAT6, CT6_TCP, CT6_ANY, EXEMPT6, 128, (|ip: NetIp| ip.0)
);

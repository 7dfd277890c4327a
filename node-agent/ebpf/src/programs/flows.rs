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
    nat::{NatEntryV4, NatEntryV6},
};

use super::maps::{CT4_ANY, CT4_TCP, CT6_ANY, CT6_TCP, EXEMPT4, EXEMPT6, NAT4, NAT6};

const NANOSECONDS: u64 = 1_000_000_000;
/// How long a row of NAT may be without its connection: the one is made before the other. In nanoseconds.
const GRACE: u64 = 10 * NANOSECONDS;
/// Make a row only where there is none (`BPF_NOEXIST`, linux/bpf.h).
const NO_EXIST: u64 = 1;

/// Seconds since the machine started.
#[inline(always)]
fn seconds() -> u32 {
    // SAFETY: plain helper call.
    (unsafe { bpf_ktime_get_ns() } / NANOSECONDS) as u32
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
     $bits:literal, $from:expr, $into:expr) => {
        $(#[$doc])*
        #[derive(Default)]
        pub(super) struct $name;

        impl $name {
            #[inline(always)]
            fn entry(to: End, own: bool) -> $entry {
                $entry {
                    // SAFETY: plain helper call.
                    created: unsafe { bpf_ktime_get_ns() },
                    needs_ct: u64::from(own),
                    to_addr: $into(to.ip),
                    to_port: to.port,
                    ..Default::default()
                }
            }
        }

        impl Flows for $name {
            type Key = $key;

            #[inline(always)]
            fn translation(&self, key: &$key) -> Option<End> {
                // SAFETY: the row's memory stays a row's; it is copied at once.
                let entry = unsafe { $nat.get(key) }?;
                Some(End { ip: $from(entry.to_addr), port: entry.to_port })
            }

            #[inline(always)]
            fn claim(&self, key: &$key, to: End, own: bool) -> bool {
                $nat.insert(key, &Self::entry(to, own), NO_EXIST).is_ok()
            }

            #[inline(always)]
            fn put(&self, key: &$key, to: End, own: bool) -> bool {
                $nat.insert(key, &Self::entry(to, own), 0).is_ok()
            }

            #[inline(always)]
            fn release(&self, key: &$key) {
                $nat.remove(key).unwrap_or_default();
            }

            #[inline(always)]
            fn is_settled(&self, key: &$key) -> bool {
                // SAFETY: as above.
                let Some(entry) = (unsafe { $nat.get(key) }) else { return true };
                // SAFETY: plain helper call.
                entry.created + GRACE < unsafe { bpf_ktime_get_ns() }
            }

            #[inline(always)]
            fn connection(&self, key: &$key) -> Connection {
                // SAFETY: as above.
                let entry = unsafe { if key.nexthdr == protocol::TCP { $tcp.get(key) } else { $any.get(key) } };
                match entry {
                    None => Connection::Unknown,
                    Some(entry) if entry.lifetime < seconds() => Connection::Over,
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
                $exempt.get(&Key::new($bits, $into(ip))).is_some()
            }
        }
    };
}

flows!(
    /// IPv4's.
    FlowsV4, TupleV4, NatEntryV4, NAT4, CT4_TCP, CT4_ANY, EXEMPT4, 32, NetIp::v4, NetIp::v4_octets
);
flows!(
    /// IPv6's.
    FlowsV6, TupleV6, NatEntryV6, NAT6, CT6_TCP, CT6_ANY, EXEMPT6, 128, NetIp::v6, (|ip: NetIp| ip.0)
);

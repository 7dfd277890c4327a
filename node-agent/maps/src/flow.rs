//! Who talks with whom: the key of the maps of connection tracking and of NAT.

use core::net::IpAddr;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned, big_endian::U16};

use crate::addr::{FAMILY_IPV4, FAMILY_IPV6, NetIp};

/// In [`TupleV4::flags`]: packets that leave.
pub const DIR_OUT: u8 = 0;
/// Packets that come in.
pub const DIR_IN: u8 = 1;
/// ICMP errors about a flow; connection tracking only.
pub const DIR_RELATED: u8 = 2;
/// A flow to a Service; connection tracking only.
pub const DIR_SERVICE: u8 = 4;

/// Key of IPv4 flows (Cilium: `ipv4_ct_tuple`).
///
/// In the maps of NAT, `saddr` and `daddr` are those of the packet. In those of connection tracking they are swapped,
/// and the ports are not: both maps are Cilium's, and so is that.
#[derive(
    Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct TupleV4 {
    /// Destination.
    pub daddr: [u8; 4],
    /// Source.
    pub saddr: [u8; 4],
    /// Destination port; 0 for protocols that have none, and of the request of an ICMP echo.
    pub dport: U16,
    /// Source port; the identifier of an ICMP echo.
    pub sport: U16,
    /// IP protocol.
    pub nexthdr: u8,
    /// `DIR_…`
    pub flags: u8,
}

/// Key of IPv6 flows (Cilium: `ipv6_ct_tuple`), like [`TupleV4`].
#[derive(
    Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct TupleV6 {
    /// Destination.
    pub daddr: [u8; 16],
    /// Source.
    pub saddr: [u8; 16],
    /// Destination port; 0 for protocols that have none, and of the request of an ICMP echo.
    pub dport: U16,
    /// Source port; the identifier of an ICMP echo.
    pub sport: U16,
    /// IP protocol.
    pub nexthdr: u8,
    /// `DIR_…`
    pub flags: u8,
}

/// Value of the maps of connections that go past the host stack. Their key is [`TupleV4`] or [`TupleV6`] with the addresses
/// of what a pod of this node sends, as in the maps of NAT, and [`DIR_OUT`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct DirectConnection {
    /// When its first segment came by, in seconds since the machine started.
    pub since: u32,
    /// When a last segment came by.
    pub ended: u32,
    /// `END_…`
    pub ends: u32,
}

/// In [`DirectConnection::ends`]: the pod has sent its last segment.
pub const END_SENT: u32 = 1;
/// The other side has.
pub const END_RECEIVED: u32 = 2;
/// One of them broke it off.
pub const END_RESET: u32 = END_SENT | END_RECEIVED;

/// Seconds for which an end may still send its last segments again.
const LINGER: u64 = 120;

impl DirectConnection {
    /// One whose first segment comes by.
    #[must_use]
    #[inline(always)]
    pub const fn new(since: u32) -> Self {
        Self { since, ended: 0, ends: 0 }
    }

    /// Notes a last segment.
    #[inline(always)]
    pub const fn end(&mut self, ends: u32, now: u32) {
        self.ends |= ends;
        self.ended = now;
    }

    /// True when nothing more of it comes, so many seconds after the machine started.
    #[must_use]
    pub const fn is_over(&self, now: u64) -> bool {
        self.ends == END_RESET && self.ended as u64 + LINGER < now
    }
}

/// One end of a flow.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct End {
    /// Address.
    pub ip: NetIp,
    /// Port, the identifier of an ICMP echo, or 0.
    pub port: U16,
}

/// A key of a family, for code that is the same for both.
pub trait Tuple: Copy + Eq + Ord + FromBytes + IntoBytes + Immutable + KnownLayout {
    /// [`FAMILY_IPV4`] or [`FAMILY_IPV6`].
    const FAMILY: u8;

    /// The key of a packet from `source` to `destination`. The bytes of an address that the family has no room for are
    /// left out.
    fn new(source: End, destination: End, nexthdr: u8, flags: u8) -> Self;
    /// Source as it stands in the key.
    fn source(&self) -> End;
    /// Destination as it stands in the key.
    fn destination(&self) -> End;
    /// IP protocol.
    fn nexthdr(&self) -> u8;
    /// `DIR_…`
    fn flags(&self) -> u8;

    /// The same flow in the other map's way: addresses swapped, ports not.
    #[must_use]
    #[inline(always)]
    fn with_addresses_swapped(&self) -> Self {
        let (source, destination) = (self.source(), self.destination());
        Self::new(
            End { ip: destination.ip, ..source },
            End { ip: source.ip, ..destination },
            self.nexthdr(),
            self.flags(),
        )
    }
}

macro_rules! tuple {
    ($key:ident, $family:expr, $address:ident => $octets:expr) => {
        impl Tuple for $key {
            const FAMILY: u8 = $family;

            #[inline(always)]
            fn new(source: End, destination: End, nexthdr: u8, flags: u8) -> Self {
                let (daddr, saddr) = ($octets(destination.ip), $octets(source.ip));
                Self { daddr, saddr, dport: destination.port, sport: source.port, nexthdr, flags }
            }

            #[inline(always)]
            fn source(&self) -> End {
                End { ip: NetIp::$address(self.saddr), port: self.sport }
            }

            #[inline(always)]
            fn destination(&self) -> End {
                End { ip: NetIp::$address(self.daddr), port: self.dport }
            }

            #[inline(always)]
            fn nexthdr(&self) -> u8 {
                self.nexthdr
            }

            #[inline(always)]
            fn flags(&self) -> u8 {
                self.flags
            }
        }
    };
}

tuple!(TupleV4, FAMILY_IPV4, v4 => NetIp::v4_octets);
tuple!(TupleV6, FAMILY_IPV6, v6 => (|ip: NetIp| ip.0));

impl End {
    /// An end from an address and a port in host order.
    #[must_use]
    pub fn new(ip: IpAddr, port: u16) -> Self {
        Self { ip: ip.into(), port: U16::new(port) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::assert_layout;

    #[test]
    fn layouts_are_cilium_1_20() {
        assert_layout!(TupleV4, size 14, { daddr @ 0, saddr @ 4, dport @ 8, sport @ 10, nexthdr @ 12, flags @ 13 });
        assert_layout!(TupleV6, size 38, { daddr @ 0, saddr @ 16, dport @ 32, sport @ 34, nexthdr @ 36, flags @ 37 });
        assert_layout!(DirectConnection, size 12, { since @ 0, ended @ 4, ends @ 8 });
    }

    #[test]
    fn a_connection_is_over_when_both_ends_are_and_nothing_comes_again() {
        let mut row = DirectConnection::new(100);
        row.end(END_SENT, 200);
        assert!(!row.is_over(9000), "the other side may go on");
        row.end(END_RECEIVED, 300);
        assert!(!row.is_over(420) && row.is_over(421));
        row = DirectConnection::new(100);
        row.end(END_RESET, 200);
        assert!(row.is_over(321));
    }

    #[test]
    fn ports_stay_when_addresses_are_swapped() {
        let (pod, web) = (End::new([10, 0, 1, 7].into(), 40000), End::new([192, 0, 2, 1].into(), 443));
        let key = TupleV4::new(pod, web, 6, DIR_OUT);
        assert_eq!(key.as_bytes(), [192, 0, 2, 1, 10, 0, 1, 7, 1, 187, 0x9c, 0x40, 6, 0]);
        let swapped = key.with_addresses_swapped();
        assert_eq!(swapped.as_bytes(), [10, 0, 1, 7, 192, 0, 2, 1, 1, 187, 0x9c, 0x40, 6, 0]);
        assert_eq!(swapped.with_addresses_swapped(), key);

        let ends = ["fd00::7", "2001:db8::1"].map(|ip| End::new(ip.parse().unwrap(), 9));
        let key = TupleV6::new(ends[0], ends[1], 17, DIR_IN);
        assert_eq!((key.source(), key.destination(), key.nexthdr(), key.flags()), (ends[0], ends[1], 17, 1));
    }
}

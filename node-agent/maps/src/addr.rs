//! Addresses inside map layouts.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Address family byte of an IPv4 key or value in Cilium's maps.
pub const FAMILY_IPV4: u8 = 1;
/// Address family byte of an IPv6 key or value in Cilium's maps.
pub const FAMILY_IPV6: u8 = 2;

/// The family byte of an address.
#[must_use]
pub const fn family_of(ip: IpAddr) -> u8 {
    match ip {
        IpAddr::V4(_) => FAMILY_IPV4,
        IpAddr::V6(_) => FAMILY_IPV6,
    }
}

/// The union of an IPv4 and an IPv6 address, in network byte order. IPv4 sits in the first four bytes, the rest is zero.
#[derive(Clone, Copy, Eq, PartialOrd, Ord, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(transparent)]
pub struct NetIp(pub [u8; 16]);

impl NetIp {
    /// No address.
    pub const UNSPECIFIED: Self = Self([0; 16]);

    /// An IPv4 address from its four bytes in network order.
    #[must_use]
    #[inline(always)]
    pub const fn v4(octets: [u8; 4]) -> Self {
        let [a, b, c, d] = octets;
        Self([a, b, c, d, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])
    }

    /// An IPv6 address from its bytes in network order.
    #[must_use]
    #[inline(always)]
    pub const fn v6(octets: [u8; 16]) -> Self {
        Self(octets)
    }

    /// The first four bytes: the IPv4 address, if it is one.
    #[must_use]
    #[inline(always)]
    pub const fn v4_octets(self) -> [u8; 4] {
        let [a, b, c, d, ..] = self.0;
        [a, b, c, d]
    }

    /// True when every byte is zero.
    #[must_use]
    #[inline(always)]
    pub const fn is_unspecified(self) -> bool {
        u128::from_ne_bytes(self.0) == 0
    }

    /// The address as the family byte beside it says; `None` for a family byte that Cilium does not use.
    #[must_use]
    pub const fn to_ip(self, family: u8) -> Option<IpAddr> {
        match family {
            FAMILY_IPV4 => {
                let [a, b, c, d] = self.v4_octets();
                Some(IpAddr::V4(Ipv4Addr::new(a, b, c, d)))
            }
            FAMILY_IPV6 => Some(IpAddr::V6(Ipv6Addr::from_octets(self.0))),
            _ => None,
        }
    }
}

/// By number: comparing the arrays would call `memcmp`, which BPF programs do not have.
impl PartialEq for NetIp {
    #[inline(always)]
    fn eq(&self, other: &Self) -> bool {
        u128::from_ne_bytes(self.0) == u128::from_ne_bytes(other.0)
    }
}

impl From<IpAddr> for NetIp {
    fn from(ip: IpAddr) -> Self {
        match ip {
            IpAddr::V4(ip) => Self::v4(ip.octets()),
            IpAddr::V6(ip) => Self(ip.octets()),
        }
    }
}

/// A MAC address that fills a u64 of Cilium's: six octets, the first in the lowest byte, then two zero bytes.
#[derive(
    Clone,
    Copy,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Debug,
    Default,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
    Unaligned,
)]
#[repr(C)]
pub struct Mac64 {
    /// The octets in transmission order.
    pub octets: [u8; 6],
    /// Zero.
    pub pad: [u8; 2],
}

impl From<[u8; 6]> for Mac64 {
    fn from(octets: [u8; 6]) -> Self {
        Self { octets, pad: [0; 2] }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_keep_network_order() {
        let v4 = NetIp::from(IpAddr::V4(Ipv4Addr::new(10, 1, 2, 3)));
        assert_eq!(v4.0[..5], [10, 1, 2, 3, 0]);
        assert_eq!(v4.to_ip(FAMILY_IPV4), Some(IpAddr::V4(Ipv4Addr::new(10, 1, 2, 3))));
        assert_eq!(v4.to_ip(0), None);
        let v6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 0x1234);
        let net = NetIp::from(IpAddr::V6(v6));
        assert_eq!((net.0[0], net.0[15]), (0xfd, 0x34));
        assert_eq!(net.to_ip(FAMILY_IPV6), Some(IpAddr::V6(v6)));
        assert!(NetIp::UNSPECIFIED.is_unspecified() && !net.is_unspecified());
    }

    #[test]
    fn a_mac_is_a_little_endian_u64() {
        let mac = Mac64::from([0x36, 0x4d, 0xf7, 0xa2, 0xb9, 0x04]);
        assert_eq!(u64::from_le_bytes(zerocopy::transmute!(mac)), 0x0000_04b9_a2f7_4d36);
    }
}

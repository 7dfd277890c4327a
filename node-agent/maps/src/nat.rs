//! `cilium_snat_v4_external`, `cilium_snat_v6_external`: how addresses and ports are translated; which addresses are not
//! masqueraded; and by which address a device masquerades.
//!
//! A masqueraded flow has two rows, each in the packet's own way: the key of what leaves, with the address and port that
//! its source becomes; and the key of what comes back, with those that its destination becomes.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned, big_endian::U16};

use crate::{addr::NetIp, flow::End};

/// The lowest port that a masqueraded packet leaves with: the first beyond those of NodePorts
/// (`node-port-range`, 30000 to 32767).
pub const MIN_PORT: u16 = 32768;

/// How many seconds a translation may be without its connection: programs make the one before the other.
pub const GRACE: u64 = 10;

/// Value of `cilium_snat_v4_external` (Cilium: `ipv4_nat_entry`).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct NatEntryV4 {
    /// When it was made, in nanoseconds since the machine started.
    pub created: u64,
    /// 1 for a flow of the node's own.
    pub needs_ct: u64,
    /// Zero.
    pub pad1: u64,
    /// Zero.
    pub pad2: u64,
    /// What the address becomes.
    pub to_addr: [u8; 4],
    /// What the port becomes.
    pub to_port: U16,
    /// Zero.
    pub pad3: [u8; 2],
}

/// Value of `cilium_snat_v6_external` (Cilium: `ipv6_nat_entry`).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct NatEntryV6 {
    /// When it was made, in nanoseconds since the machine started.
    pub created: u64,
    /// 1 for a flow of the node's own.
    pub needs_ct: u64,
    /// Zero.
    pub pad1: u64,
    /// Zero.
    pub pad2: u64,
    /// What the address becomes.
    pub to_addr: [u8; 16],
    /// What the port becomes.
    pub to_port: U16,
    /// Zero.
    pub pad3: [u8; 6],
}

/// A row of NAT of a family, for code that is the same for both.
pub trait NatEntry: FromBytes {
    /// A row that was made so many nanoseconds after the machine started; `own` for a flow of the node's own.
    fn new(to: End, created: u64, own: bool) -> Self;
    /// What an end of the flow becomes.
    fn to(&self) -> End;
    /// When it was made, in nanoseconds since the machine started.
    fn created(&self) -> u64;
    /// 1 for a flow of the node's own.
    fn needs_ct(&self) -> u64;
}

macro_rules! nat_entry {
    ($entry:ident, $address:ident => $octets:expr) => {
        impl NatEntry for $entry {
            #[inline(always)]
            fn new(to: End, created: u64, own: bool) -> Self {
                let (to_addr, to_port) = ($octets(to.ip), to.port);
                Self { created, needs_ct: u64::from(own), to_addr, to_port, ..Self::default() }
            }

            #[inline(always)]
            fn to(&self) -> End {
                End { ip: NetIp::$address(self.to_addr), port: self.to_port }
            }

            #[inline(always)]
            fn created(&self) -> u64 {
                self.created
            }

            #[inline(always)]
            fn needs_ct(&self) -> u64 {
                self.needs_ct
            }
        }
    };
}

nat_entry!(NatEntryV4, v4 => NetIp::v4_octets);
nat_entry!(NatEntryV6, v6 => (|ip: NetIp| ip.0));

/// Key of `basal_masquerade`, a map of our own: a device and a family. Cilium keeps the address in the programs of each
/// device instead.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct MasqueradeKey {
    /// Interface index.
    pub ifindex: u32,
    /// [`crate::addr::FAMILY_IPV4`] or [`crate::addr::FAMILY_IPV6`].
    pub family: u8,
    /// Zero.
    pub pad: [u8; 3],
}

impl MasqueradeKey {
    /// The key of a device and a family.
    #[must_use]
    #[inline(always)]
    pub const fn new(ifindex: u32, family: u8) -> Self {
        Self { ifindex, family, pad: [0; 3] }
    }
}

/// Value of `basal_masquerade`: the source that packets of pods leave with.
pub type MasqueradeAddress = NetIp;

/// Key of `cilium_ipmasq_v4`: a network that pods' packets go to with the pod's own address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ExemptV4 {
    /// How many bits of the address count.
    pub prefixlen: u32,
    /// Network.
    pub address: [u8; 4],
}

/// Key of `cilium_ipmasq_v6`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ExemptV6 {
    /// How many bits of the address count.
    pub prefixlen: u32,
    /// Network.
    pub address: [u8; 16],
}

/// Key of `cilium_ipv4_frag_datagrams` (Cilium: `ipv4_frag_id`): the fragments of one datagram.
#[derive(
    Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct FragmentsV4 {
    /// Destination.
    pub daddr: [u8; 4],
    /// Source.
    pub saddr: [u8; 4],
    /// Identification.
    pub id: U16,
    /// IP protocol.
    pub proto: u8,
    /// Zero.
    pub pad: u8,
}

/// Key of `cilium_ipv6_frag_datagrams` (Cilium: `ipv6_frag_id`).
#[derive(
    Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct FragmentsV6 {
    /// Identification, network order.
    pub id: [u8; 4],
    /// IP protocol.
    pub proto: u8,
    /// Zero.
    pub pad: [u8; 3],
    /// Source.
    pub saddr: [u8; 16],
    /// Destination.
    pub daddr: [u8; 16],
}

/// Value of both: the ports that only the first fragment has (Cilium: `ipv4_frag_l4ports`).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct FragmentPorts {
    /// Source port; the identifier of the request of an ICMP echo.
    pub sport: U16,
    /// Destination port; the identifier of the reply of an ICMP echo.
    pub dport: U16,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::assert_layout;

    #[test]
    fn layouts_are_cilium_1_20() {
        assert_layout!(NatEntryV4, size 40, {
            created @ 0, needs_ct @ 8, pad1 @ 16, pad2 @ 24, to_addr @ 32, to_port @ 36, pad3 @ 38,
        });
        assert_layout!(NatEntryV6, size 56, {
            created @ 0, needs_ct @ 8, pad1 @ 16, pad2 @ 24, to_addr @ 32, to_port @ 48, pad3 @ 50,
        });
        assert_layout!(FragmentsV4, size 12, { daddr @ 0, saddr @ 4, id @ 8, proto @ 10, pad @ 11 });
        assert_layout!(FragmentsV6, size 40, { id @ 0, proto @ 4, pad @ 5, saddr @ 8, daddr @ 24 });
        assert_layout!(FragmentPorts, size 4, { sport @ 0, dport @ 2 });
        assert_layout!(ExemptV4, size 8, { prefixlen @ 0, address @ 4 });
        assert_layout!(ExemptV6, size 20, { prefixlen @ 0, address @ 4 });
    }

    #[test]
    fn our_own_layout_is_fixed() {
        assert_layout!(MasqueradeKey, size 8, { ifindex @ 0, family @ 4, pad @ 5 });
    }
}

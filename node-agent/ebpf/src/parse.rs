//! Headers. Every struct is the wire format, so byte order is in the types.

pub use basal_maps::protocol;
use basal_maps::{
    addr::{FAMILY_IPV4, FAMILY_IPV6, NetIp},
    reason::Reason,
};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned, big_endian::U16};

/// Bytes of an Ethernet header.
pub const ETHERNET: usize = 14;
/// Bytes of an IPv4 header without options.
pub const IPV4: usize = 20;
/// Bytes of an IPv6 header.
pub const IPV6: usize = 40;

/// EtherType of IPv4.
pub const ETHERTYPE_IPV4: u16 = 0x0800;
/// EtherType of ARP.
pub const ETHERTYPE_ARP: u16 = 0x0806;
/// EtherType of IPv6.
pub const ETHERTYPE_IPV6: u16 = 0x86dd;
/// EtherType of a VLAN tag (802.1Q).
pub const ETHERTYPE_VLAN: u16 = 0x8100;
/// EtherType of an outer VLAN tag (802.1ad).
pub const ETHERTYPE_SERVICE_VLAN: u16 = 0x88a8;

/// Ethernet header.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Ethernet {
    /// Receiver.
    pub destination: [u8; 6],
    /// Sender.
    pub source: [u8; 6],
    /// EtherType.
    pub ethertype: U16,
}

impl Ethernet {
    /// True for a frame that is for more than one receiver.
    #[must_use]
    #[inline(always)]
    pub const fn is_for_a_group(&self) -> bool {
        self.destination[0] & 1 == 1
    }
}

/// IPv4 header without options (RFC 791).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Ipv4Header {
    /// Version (high four bits), header length in words.
    pub version_ihl: u8,
    /// Type of service.
    pub tos: u8,
    /// Bytes of header and payload.
    pub total_length: U16,
    /// Identification.
    pub id: U16,
    /// Flags (high three bits), fragment offset in units of 8 bytes.
    pub fragment: U16,
    /// Time to live.
    pub ttl: u8,
    /// Protocol of the payload.
    pub protocol: u8,
    /// Header checksum.
    pub checksum: [u8; 2],
    /// Source.
    pub source: [u8; 4],
    /// Destination.
    pub destination: [u8; 4],
}

/// IPv6 header (RFC 8200).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Ipv6Header {
    /// Version (high four bits), traffic class, flow label.
    pub version_class_flow: [u8; 4],
    /// Bytes after this header.
    pub payload_length: U16,
    /// Protocol of what follows.
    pub next_header: u8,
    /// Hop limit.
    pub hop_limit: u8,
    /// Source.
    pub source: [u8; 16],
    /// Destination.
    pub destination: [u8; 16],
}

/// What decisions need of a packet's IP header.
///
/// Headers write it where it stays: handed on by value it would lie on the programs' stack several times.
#[derive(Clone, Copy, Debug, Default)]
pub struct Packet {
    /// [`FAMILY_IPV4`] or [`FAMILY_IPV6`].
    pub family: u8,
    /// Source address.
    pub source: NetIp,
    /// Destination address.
    pub destination: NetIp,
    /// Time to live or hop limit.
    pub hops: u8,
    /// Protocol after the IP header; of IPv6 extension headers the first.
    pub protocol: u8,
    /// Bytes from the start of the IP header, as the header says.
    pub length: u32,
    /// Bytes of the IP header.
    pub header: u32,
    /// Part of a datagram.
    pub fragment: bool,
    /// The transport header is not in this part.
    pub later_fragment: bool,
}

impl Ipv4Header {
    /// Tells of the packet, or why its header is invalid.
    ///
    /// # Errors
    /// [`Reason::INVALID_PACKET`] for another version or a header length below the minimum.
    #[inline(always)]
    pub fn tell(&self, packet: &mut Packet) -> Result<(), Reason> {
        let words = u32::from(self.version_ihl & 0xf);
        if self.version_ihl >> 4 != 4 || words < 5 {
            return Err(Reason::INVALID_PACKET);
        }
        // Bit 13 is "more fragments", the 13 bits below it the offset.
        let fragment = self.fragment.get();
        *packet = Packet {
            family: FAMILY_IPV4,
            source: NetIp::v4(self.source),
            destination: NetIp::v4(self.destination),
            hops: self.ttl,
            protocol: self.protocol,
            length: u32::from(self.total_length.get()),
            header: words * 4,
            fragment: fragment & 0x3fff != 0,
            later_fragment: fragment & 0x1fff != 0,
        };
        Ok(())
    }
}

impl Ipv6Header {
    /// Tells of the packet, or why its header is invalid.
    ///
    /// # Errors
    /// [`Reason::INVALID_PACKET`] for another version.
    #[inline(always)]
    pub fn tell(&self, packet: &mut Packet) -> Result<(), Reason> {
        if self.version_class_flow[0] >> 4 != 6 {
            return Err(Reason::INVALID_PACKET);
        }
        let fragment = self.next_header == protocol::FRAGMENT;
        *packet = Packet {
            family: FAMILY_IPV6,
            source: NetIp::v6(self.source),
            destination: NetIp::v6(self.destination),
            hops: self.hop_limit,
            protocol: self.next_header,
            length: u32::from(self.payload_length.get()) + IPV6 as u32,
            header: IPV6 as u32,
            fragment,
            later_fragment: fragment,
        };
        Ok(())
    }
}

impl Packet {
    /// True for destinations with more than one receiver: multicast, the IPv4 broadcast address.
    #[must_use]
    #[inline(always)]
    pub fn is_for_a_group(&self) -> bool {
        let ip = &self.destination.0;
        if self.family == FAMILY_IPV6 { ip[0] == 0xff } else { ip[0] & 0xf0 == 0xe0 || ip[..4] == [255; 4] }
    }

    /// True for destinations that never leave a link: groups, link-local ones.
    #[must_use]
    #[inline(always)]
    pub fn stays_on_link(&self) -> bool {
        self.is_for_a_group() || is_link_local(&self.destination, self.family)
    }
}

/// True for addresses that mean something on one link only (RFC 3927, RFC 4291).
#[must_use]
#[inline(always)]
pub const fn is_link_local(ip: &NetIp, family: u8) -> bool {
    let [first, second, ..] = ip.0;
    if family == FAMILY_IPV6 { first == 0xfe && second & 0xc0 == 0x80 } else { first == 169 && second == 254 }
}

/// The first four bytes of a transport header: two ports, or an ICMP type and code.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(transparent)]
pub struct Transport(pub [u8; 4]);

impl Transport {
    /// Destination port, for TCP, UDP and SCTP.
    #[must_use]
    #[inline(always)]
    pub const fn destination_port(self) -> u16 {
        u16::from_be_bytes([self.0[2], self.0[3]])
    }

    /// ICMP type.
    #[must_use]
    #[inline(always)]
    pub const fn icmp_type(self) -> u8 {
        self.0[0]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 10.0.1.7 → 10.0.2.9, UDP, 28 bytes.
    const V4: [u8; IPV4] = [0x45, 0, 0, 28, 0, 1, 0, 0, 64, 17, 0, 0, 10, 0, 1, 7, 10, 0, 2, 9];

    fn v4(change: impl FnOnce(&mut [u8; IPV4])) -> Result<Packet, Reason> {
        let (mut bytes, mut packet) = (V4, Packet::default());
        change(&mut bytes);
        Ipv4Header::read_from_bytes(&bytes).unwrap().tell(&mut packet).map(|()| packet)
    }

    fn v6(bytes: &[u8; IPV6]) -> Result<Packet, Reason> {
        let mut packet = Packet::default();
        Ipv6Header::read_from_bytes(bytes).unwrap().tell(&mut packet).map(|()| packet)
    }

    #[test]
    fn an_ipv4_header_is_read() {
        let packet = v4(|_| ()).unwrap();
        assert_eq!(packet.source, NetIp::v4([10, 0, 1, 7]));
        assert_eq!((packet.hops, packet.protocol, packet.length, packet.header), (64, 17, 28, 20));
        assert!(!packet.fragment && !packet.later_fragment && !packet.stays_on_link());
    }

    #[test]
    fn fragments_are_told_apart() {
        let first = v4(|b| b[6] = 0x20).unwrap();
        assert!(first.fragment && !first.later_fragment);
        let last = v4(|b| b[7] = 0xb9).unwrap();
        assert!(last.fragment && last.later_fragment);
        let whole = v4(|b| b[6] = 0x40).unwrap();
        assert!(!whole.fragment, "don't fragment is no fragment");
    }

    #[test]
    fn invalid_headers_are_named() {
        assert_eq!(v4(|b| b[0] = 0x65).unwrap_err(), Reason::INVALID_PACKET);
        assert_eq!(v4(|b| b[0] = 0x44).unwrap_err(), Reason::INVALID_PACKET);
        assert_eq!(v6(&[0x40; IPV6]).unwrap_err(), Reason::INVALID_PACKET);
    }

    #[test]
    fn what_stays_on_the_link() {
        for destination in [[224, 0, 0, 22], [239, 1, 2, 3], [255, 255, 255, 255], [169, 254, 1, 1]] {
            assert!(v4(|b| b[16..].copy_from_slice(&destination)).unwrap().stays_on_link(), "{destination:?}");
        }
        for destination in [[10, 0, 0, 1], [223, 255, 255, 255], [240, 0, 0, 1], [255, 255, 255, 254]] {
            assert!(!v4(|b| b[16..].copy_from_slice(&destination)).unwrap().stays_on_link(), "{destination:?}");
        }
        assert!(!v4(|b| b[16..].copy_from_slice(&[169, 254, 1, 1])).unwrap().is_for_a_group());
        for (first, second, stays) in [(0xff, 2, true), (0xfe, 0x80, true), (0xfe, 0xc0, false), (0xfd, 0, false)] {
            let mut bytes = [0; IPV6];
            (bytes[0], bytes[24], bytes[25]) = (0x60, first, second);
            assert_eq!(v6(&bytes).unwrap().stays_on_link(), stays);
        }
    }
}

//! Answers to pods that ask for their gateway's MAC address: the host side of their own device pair.

use basal_maps::addr::{FAMILY_IPV6, NetIp};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned, big_endian::U16};

use crate::{
    decide::Sender,
    parse::{ETHERNET, Ethernet, IPV6, Ipv6Header, Packet, Transport, protocol},
};

/// Bytes of an ARP packet with its Ethernet header.
pub const ARP_FRAME: usize = ETHERNET + 28;
/// Bytes of a neighbour solicitation with its Ethernet header, without options.
pub const SOLICITATION_FRAME: usize = ETHERNET + IPV6 + 24;
/// Bytes of a neighbour advertisement with its Ethernet header and the target's MAC address.
pub const ADVERTISEMENT_FRAME: usize = ETHERNET + IPV6 + 32;

const SOLICITATION: u8 = 135;
const ADVERTISEMENT: u8 = 136;
/// Flags of an advertisement: from a router, solicited, overriding what was known.
const ROUTER_SOLICITED_OVERRIDE: u8 = 0xe0;
/// Option type of the target's link-layer address, and its length in units of 8 bytes.
const TARGET_ADDRESS_OPTION: [u8; 2] = [2, 1];

/// An ARP packet for IPv4 over Ethernet (RFC 826).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ArpFrame {
    /// Its Ethernet header.
    pub ethernet: Ethernet,
    /// Hardware type, protocol type, their address lengths: 1, 0x0800, 6, 4.
    pub types: [u8; 6],
    /// 1 request, 2 reply.
    pub operation: U16,
    /// Sender's MAC address.
    pub sender_mac: [u8; 6],
    /// Sender's IPv4 address.
    pub sender_ip: [u8; 4],
    /// Target's MAC address.
    pub target_mac: [u8; 6],
    /// Target's IPv4 address.
    pub target_ip: [u8; 4],
}

impl ArpFrame {
    /// True when its addresses are MAC and IPv4 addresses.
    #[must_use]
    #[inline(always)]
    pub fn is_ipv4_over_ethernet(&self) -> bool {
        let [hardware_hi, hardware_lo, protocol_hi, protocol_lo, hardware_len, protocol_len] = self.types;
        u16::from_be_bytes([hardware_hi, hardware_lo]) == 1
            && u16::from_be_bytes([protocol_hi, protocol_lo]) == 0x0800
            && hardware_len == 6
            && protocol_len == 4
    }

    /// Who sent the packet to a device; `None` when the frame and the packet in it tell two MAC addresses.
    #[must_use]
    #[inline(always)]
    pub fn sender(&self, ifindex: u32) -> Option<Sender<'_>> {
        (self.sender_mac == self.ethernet.source).then_some(Sender { ifindex, ethernet: &self.ethernet })
    }

    /// True for a request for `router`.
    #[must_use]
    #[inline(always)]
    pub fn asks_for(&self, router: NetIp) -> bool {
        self.is_ipv4_over_ethernet()
            && self.operation.get() == 1
            && !router.is_unspecified()
            && NetIp::v4(self.target_ip) == router
    }

    /// Makes the request the reply that gives `mac`.
    #[inline(always)]
    pub fn turn_into_reply(&mut self, mac: [u8; 6]) {
        self.ethernet.destination = self.ethernet.source;
        self.ethernet.source = mac;
        self.operation = U16::new(2);
        self.target_mac = self.sender_mac;
        core::mem::swap(&mut self.sender_ip, &mut self.target_ip);
        self.sender_mac = mac;
    }
}

/// A neighbour solicitation or advertisement up to its options (RFC 4861, 4.3 and 4.4).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Neighbour {
    /// Its Ethernet header.
    pub ethernet: Ethernet,
    /// Its IPv6 header.
    pub ipv6: Ipv6Header,
    /// ICMPv6 type.
    pub icmp_type: u8,
    /// ICMPv6 code, 0.
    pub code: u8,
    /// ICMPv6 checksum.
    pub checksum: U16,
    /// Flags of an advertisement, else zero.
    pub flags: u8,
    /// Zero.
    pub reserved: [u8; 3],
    /// Who is looked for, or was found.
    pub target: [u8; 16],
}

/// The option that gives the target's MAC address (RFC 4861, 4.6.1).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct TargetAddress {
    /// Type and length.
    pub head: [u8; 2],
    /// The address.
    pub mac: [u8; 6],
}

/// True for a neighbour solicitation by its ICMPv6 type. In IPv4 the same numbers mean nothing.
#[must_use]
#[inline(always)]
pub const fn is_solicitation(packet: &Packet, transport: Transport) -> bool {
    packet.family == FAMILY_IPV6 && packet.protocol == protocol::ICMPV6 && transport.icmp_type() == SOLICITATION
}

impl Neighbour {
    /// True for a valid solicitation of `router` by somebody who has an address (RFC 4861, 7.1.1). A hop limit of 255
    /// proves that the sender is on the link.
    #[must_use]
    #[inline(always)]
    pub fn asks_for(&self, router: NetIp) -> bool {
        self.ipv6.hop_limit == 255
            && self.icmp_type == SOLICITATION
            && self.code == 0
            && !router.is_unspecified()
            && NetIp::v6(self.target) == router
            && !NetIp::v6(self.ipv6.source).is_unspecified()
    }

    /// Makes the solicitation the advertisement that gives `mac`, with the option that follows it.
    #[inline(always)]
    pub fn turn_into_advertisement(&mut self, mac: [u8; 6]) -> TargetAddress {
        let option = TargetAddress { head: TARGET_ADDRESS_OPTION, mac };
        self.ethernet.destination = self.ethernet.source;
        self.ethernet.source = mac;
        self.ipv6.version_class_flow = [0x60, 0, 0, 0];
        self.ipv6.payload_length = U16::new(32);
        self.ipv6.destination = self.ipv6.source;
        self.ipv6.source = self.target;
        self.icmp_type = ADVERTISEMENT;
        self.flags = ROUTER_SOLICITED_OVERRIDE;
        self.reserved = [0; 3];
        self.checksum = U16::new(self.advertisement_checksum(&option));
        option
    }

    /// The ICMPv6 checksum of the advertisement (RFC 4443, 2.3).
    #[inline(always)]
    fn advertisement_checksum(&self, option: &TargetAddress) -> u16 {
        // Pseudo header: addresses, length, next header. The source is the target, so that it counts twice.
        let sum = 2 * words(&self.target)
            + words(&self.ipv6.destination)
            + u32::from(self.ipv6.payload_length.get())
            + u32::from(protocol::ICMPV6)
            + (u32::from(self.icmp_type) << 8)
            + (u32::from(self.flags) << 8)
            + words(&option.head)
            + words(&option.mac);
        let folded = (sum & 0xffff) + (sum >> 16);
        let folded = (folded & 0xffff) + (folded >> 16);
        !(folded as u16)
    }
}

/// Sum of the 16-bit words.
#[inline(always)]
fn words<const N: usize>(bytes: &[u8; N]) -> u32 {
    let (pairs, _) = bytes.as_chunks::<2>();
    let mut sum = 0;
    for pair in pairs {
        sum += u32::from(u16::from_be_bytes(*pair));
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: [u8; 6] = [0x36, 0x4d, 0xf7, 0xa2, 0xb9, 0x04];
    const POD_MAC: [u8; 6] = [0x4e, 3, 0x9f, 0x4e, 0xc1, 0x30];

    #[test]
    fn arp_for_the_router_is_answered() {
        let mut bytes = [0; ARP_FRAME];
        bytes[..6].fill(0xff);
        bytes[6..12].copy_from_slice(&POD_MAC);
        bytes[12..22].copy_from_slice(&[8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
        bytes[22..28].copy_from_slice(&POD_MAC);
        bytes[28..32].copy_from_slice(&[10, 0, 1, 7]);
        bytes[38..].copy_from_slice(&[10, 0, 1, 1]);
        let request = ArpFrame::read_from_bytes(&bytes).unwrap();
        assert!(request.asks_for(NetIp::v4([10, 0, 1, 1])));
        assert!(!request.asks_for(NetIp::v4([10, 0, 1, 2])));
        assert!(!request.asks_for(NetIp::UNSPECIFIED));
        let mut reply = request;
        reply.turn_into_reply(MAC);
        assert!(!reply.asks_for(NetIp::v4([10, 0, 1, 7])), "a reply is no request");
        assert_eq!((reply.ethernet.destination, reply.ethernet.source), (POD_MAC, MAC));
        assert_eq!((reply.sender_mac, reply.sender_ip), (MAC, [10, 0, 1, 1]));
        assert_eq!((reply.target_mac, reply.target_ip), (POD_MAC, [10, 0, 1, 7]));
    }

    fn solicitation() -> Neighbour {
        let mut bytes = [0; SOLICITATION_FRAME];
        bytes[6..12].copy_from_slice(&POD_MAC);
        bytes[12..22].copy_from_slice(&[0x86, 0xdd, 0x60, 0, 0, 0, 0, 32, 58, 255]);
        bytes[22..24].copy_from_slice(&[0xfd, 0]);
        bytes[37] = 7;
        bytes[54] = SOLICITATION;
        bytes[62..64].copy_from_slice(&[0xfd, 0]);
        bytes[77] = 1;
        Neighbour::read_from_bytes(&bytes).unwrap()
    }

    fn v6(last: u8) -> [u8; 16] {
        let mut ip = [0; 16];
        (ip[0], ip[15]) = (0xfd, last);
        ip
    }

    #[test]
    fn a_solicitation_of_the_router_is_answered() {
        let request = solicitation();
        assert!(request.asks_for(NetIp::v6(v6(1))));
        assert!(!request.asks_for(NetIp::v6(v6(2))));
        let mut reply = request;
        let option = reply.turn_into_advertisement(MAC);
        assert_eq!(core::mem::size_of_val(&reply) + core::mem::size_of_val(&option), ADVERTISEMENT_FRAME);
        assert_eq!((reply.ipv6.source, reply.ipv6.destination), (v6(1), v6(7)));
        assert_eq!((reply.ethernet.destination, option.mac), (POD_MAC, MAC));
        assert!(!reply.asks_for(NetIp::v6(v6(1))), "an advertisement is no question");
    }

    #[test]
    fn a_solicitation_from_afar_or_without_sender_is_not_answered() {
        let mut far = solicitation();
        far.ipv6.hop_limit = 254;
        let mut nobody = solicitation();
        nobody.ipv6.source = [0; 16];
        assert!(!far.asks_for(NetIp::v6(v6(1))) && !nobody.asks_for(NetIp::v6(v6(1))));
    }

    #[test]
    fn the_checksum_adds_up() {
        // The oracle sums the whole message with its pseudo header; a right checksum makes that 0xffff.
        let mut reply = solicitation();
        let option = reply.turn_into_advertisement(MAC);
        let mut sum: u32 = 32 + 58;
        for pair in reply.as_bytes()[ETHERNET + 8..].chunks(2).chain(option.as_bytes().chunks(2)) {
            sum += u32::from(u16::from_be_bytes([pair[0], pair[1]]));
        }
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        assert_eq!(sum, 0xffff);
    }
}

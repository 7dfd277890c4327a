//! Finding a packet's transport header behind extension headers, its flow behind fragments, and the packet that an ICMP
//! error quotes.

use core::mem::MaybeUninit;

use basal_ebpf::{
    nat::{Flow, Kind},
    parse::{ETHERNET, IPV6, Packet, protocol},
};
use basal_maps::{
    addr::{FAMILY_IPV4, FAMILY_IPV6, NetIp},
    conntrack::Seen,
    flow::End,
    identity,
    nat::{FragmentPorts, FragmentsV4, FragmentsV6},
};
use zerocopy::{FromBytes, big_endian::U16};

use super::{
    context::Frame,
    maps::{FRAGMENTS4, FRAGMENTS6},
};

/// Extension headers that are looked behind.
const EXTENSIONS: usize = 4;
/// Offset of the identification in an IPv4 header.
const IPV4_ID: usize = 4;
/// Offset of the flags in a TCP header.
const TCP_FLAGS: usize = 13;
/// Bytes of an ICMP error before what it quotes.
pub(super) const QUOTE: usize = 8;

/// Where a packet's transport header is, and whether it is there.
#[derive(Clone, Copy)]
pub(super) struct Segment {
    /// Protocol behind the IP headers.
    pub(super) protocol: u8,
    /// Offset of the transport header in the frame.
    pub(super) offset: usize,
    /// The packet is a fragment without it.
    pub(super) later: bool,
    /// The packet is a fragment.
    fragment: bool,
    /// Identification of the datagram that it is a fragment of.
    id: [u8; 4],
}

impl Segment {
    /// Behind headers that nobody knows: nothing of it can be read.
    pub(super) const UNKNOWN: Self = Self { protocol: 0, offset: 0, later: true, fragment: false, id: [0; 4] };
}

/// What an ICMP error quotes.
#[derive(Clone, Copy)]
pub(super) struct Quoted {
    /// Offset of the quoted IP header in the frame.
    pub(super) ip: usize,
    /// The quoted transport header.
    pub(super) segment: Segment,
    /// How the quoted packet belongs to its flow.
    pub(super) kind: Kind,
    /// Its flow.
    pub(super) flow: Flow,
}

impl Frame {
    /// A few bytes at an offset; `None` where the frame ends before.
    #[inline(always)]
    pub(super) fn bytes<T: FromBytes + Copy>(&self, offset: usize) -> Option<T> {
        let mut memory = MaybeUninit::<T>::uninit();
        self.read(offset, &mut memory).ok().map(|found| *found)
    }

    /// The packet's transport header; `None` behind extension headers that nobody knows.
    #[inline(always)]
    pub(super) fn segment(&self, packet: &Packet) -> Option<Segment> {
        let mut segment = Segment {
            protocol: packet.protocol,
            offset: ETHERNET + packet.header as usize,
            later: packet.later_fragment,
            fragment: packet.fragment,
            id: [0; 4],
        };
        if packet.family == FAMILY_IPV6 {
            return self.behind_extensions(segment);
        }
        if packet.fragment {
            let [high, low] = self.bytes(ETHERNET + IPV4_ID)?;
            segment.id = [high, low, 0, 0];
        }
        Some(segment)
    }

    #[inline(always)]
    fn behind_extensions(&self, mut segment: Segment) -> Option<Segment> {
        (segment.later, segment.fragment) = (false, false);
        segment.offset = ETHERNET + IPV6;
        for _ in 0..EXTENSIONS {
            let header: [u8; 8] = match segment.protocol {
                protocol::HOP_BY_HOP | protocol::ROUTING | protocol::DESTINATION_OPTIONS | protocol::FRAGMENT => {
                    self.bytes(segment.offset)?
                }
                _ => return Some(segment),
            };
            let [next, length, offset_high, offset_low, id @ ..] = header;
            if segment.protocol == protocol::FRAGMENT {
                segment.fragment = true;
                segment.id = id;
                segment.later = u16::from_be_bytes([offset_high, offset_low]) & 0xfff8 != 0;
                segment.offset += 8;
            } else {
                segment.offset += 8 * (usize::from(length) + 1);
            }
            segment.protocol = next;
            if segment.later {
                return Some(segment);
            }
        }
        None
    }

    /// The packet's flow, and its part in it. A first fragment leaves the ports for those that follow; of one of these
    /// without them the flow is not known.
    #[inline(always)]
    pub(super) fn flow(&self, packet: &Packet, segment: &Segment) -> (Kind, Option<Flow>) {
        let (kind, ports) = if segment.later {
            let Some(ports) = self.fragment_ports(packet, segment) else {
                return (Kind::of(packet.family, segment.protocol, 0), None);
            };
            (kind_of_fragment(packet.family, segment.protocol, &ports), ports)
        } else {
            let head: [u8; 8] = self.bytes(segment.offset).unwrap_or_default();
            let kind = Kind::of(packet.family, segment.protocol, head[0]);
            let (sport, dport) = kind.ports(segment.protocol, &head);
            let ports = FragmentPorts { sport, dport };
            if segment.fragment {
                self.leave_ports(packet, segment, &ports);
            }
            (kind, ports)
        };
        let source = End { ip: packet.source, port: ports.sport };
        let destination = End { ip: packet.destination, port: ports.dport };
        (kind, Some(Flow { source, destination, protocol: segment.protocol }))
    }

    /// The packet for connection tracking.
    #[inline(always)]
    pub(super) fn seen(&self, segment: &Segment) -> Seen {
        let is_tcp = segment.protocol == protocol::TCP;
        let [tcp_flags] =
            if is_tcp && !segment.later { self.bytes(segment.offset + TCP_FLAGS).unwrap_or_default() } else { [0_u8] };
        Seen { is_tcp, tcp_flags, bytes: self.ctx.len(), identity: identity::UNKNOWN }
    }

    #[inline(always)]
    fn leave_ports(&self, packet: &Packet, segment: &Segment, ports: &FragmentPorts) {
        // Without the row the fragments that follow are dropped, and counted then.
        if packet.family == FAMILY_IPV6 {
            FRAGMENTS6.insert(fragments_v6(packet, segment), ports, 0).unwrap_or_default();
        } else {
            FRAGMENTS4.insert(fragments_v4(packet, segment), ports, 0).unwrap_or_default();
        }
    }

    #[inline(always)]
    fn fragment_ports(&self, packet: &Packet, segment: &Segment) -> Option<FragmentPorts> {
        // SAFETY: the row's memory stays a row's; it is copied at once.
        unsafe {
            if packet.family == FAMILY_IPV6 {
                FRAGMENTS6.get(fragments_v6(packet, segment)).copied()
            } else {
                FRAGMENTS4.get(fragments_v4(packet, segment)).copied()
            }
        }
    }

    /// What an ICMP error quotes; `None` when that is no packet whose flow can be told.
    #[inline(always)]
    pub(super) fn quoted(&self, family: u8, error: &Segment) -> Option<Quoted> {
        let ip = error.offset + QUOTE;
        let (source, destination, protocol, offset) = if family == FAMILY_IPV6 {
            let [next, _hops]: [u8; 2] = self.bytes(ip + 6)?;
            (NetIp::v6(self.bytes(ip + 8)?), NetIp::v6(self.bytes(ip + 24)?), next, ip + IPV6)
        } else {
            let [version_length]: [u8; 1] = self.bytes(ip)?;
            let fragment: U16 = self.bytes(ip + 6)?;
            if fragment.get() & 0x1fff != 0 {
                return None;
            }
            let [protocol]: [u8; 1] = self.bytes(ip + 9)?;
            let header = usize::from(version_length & 0xf) * 4;
            (NetIp::v4(self.bytes(ip + 12)?), NetIp::v4(self.bytes(ip + 16)?), protocol, ip + header)
        };
        let head: [u8; 8] = match self.bytes(offset) {
            Some(head) => head,
            // A whole packet may be that short, where a flow needs none of it.
            None if matches!(Kind::of(family, protocol, 0), Kind::Fixed) => [0; 8],
            None => return None,
        };
        let kind = Kind::of(family, protocol, head[0]);
        let (sport, dport) = kind.ports(protocol, &head);
        let flow = Flow {
            source: End { ip: source, port: sport },
            destination: End { ip: destination, port: dport },
            protocol,
        };
        let segment = Segment { protocol, offset, later: false, fragment: false, id: [0; 4] };
        Some(Quoted { ip, segment, kind, flow })
    }
}

/// What a fragment without a transport header is of. An echo's identifier is the source port of the request and the
/// destination port of the reply.
#[inline(always)]
fn kind_of_fragment(family: u8, number: u8, ports: &FragmentPorts) -> Kind {
    let echo = match family {
        FAMILY_IPV4 => number == protocol::ICMP,
        _ => number == protocol::ICMPV6,
    };
    match (echo, ports.dport == U16::ZERO) {
        (true, true) => Kind::Request,
        (true, false) => Kind::Reply,
        (false, _) => Kind::of(family, number, 0),
    }
}

#[inline(always)]
fn fragments_v4(packet: &Packet, segment: &Segment) -> FragmentsV4 {
    let [high, low, ..] = segment.id;
    FragmentsV4 {
        daddr: packet.destination.v4_octets(),
        saddr: packet.source.v4_octets(),
        id: U16::from_bytes([high, low]),
        proto: segment.protocol,
        pad: 0,
    }
}

#[inline(always)]
fn fragments_v6(packet: &Packet, segment: &Segment) -> FragmentsV6 {
    FragmentsV6 {
        id: segment.id,
        proto: segment.protocol,
        pad: [0; 3],
        saddr: packet.source.0,
        daddr: packet.destination.0,
    }
}

//! Writing another address and port into a packet, and into the packet that an ICMP error quotes, with every checksum that
//! covers them.

use aya_ebpf::helpers::bpf_csum_diff;
use basal_ebpf::{
    nat::Kind,
    parse::{ETHERNET, protocol},
};
use basal_maps::{
    addr::{FAMILY_IPV6, NetIp},
    flow::End,
    reason::Reason,
};
use zerocopy::big_endian::U16;

use super::{
    context::Frame,
    segment::{Quoted, Segment},
};

/// The checksum covers the addresses, too (`BPF_F_PSEUDO_HDR`, linux/bpf.h).
const PSEUDO_HEADER: u64 = 0x10;
/// A checksum of zero is none, and stays that (`BPF_F_MARK_MANGLED_0`).
const ZERO_IS_NONE: u64 = 0x20;

/// The kernel's sum over the packet follows what is written (`BPF_F_RECOMPUTE_CSUM`).
const RECOMPUTE_SUM: u64 = 1;

/// Offset of the checksum in an IPv4 header.
const IPV4_CHECKSUM: usize = 10;
/// Offset of the checksum in an ICMP message.
const ICMP_CHECKSUM: usize = 2;
/// Offset of the identifier in an ICMP echo.
const ICMP_ID: usize = 4;

/// Which end of a packet.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Side {
    Source,
    Destination,
}

/// An end that becomes another one.
pub(super) struct Change {
    pub(super) side: Side,
    pub(super) family: u8,
    pub(super) from: End,
    pub(super) to: End,
}

/// The checksum of a transport header.
struct Checksum {
    offset: usize,
    /// Flags of the helper.
    flags: u64,
}

impl Change {
    /// Offset of the address in an IP header.
    #[inline(always)]
    const fn address(&self) -> usize {
        match (self.family, self.side) {
            (FAMILY_IPV6, Side::Source) => 8,
            (FAMILY_IPV6, Side::Destination) => 24,
            (_, Side::Source) => 12,
            (_, Side::Destination) => 16,
        }
    }

    /// Offset of the port in a transport header; `None` where there is none.
    #[inline(always)]
    const fn port(&self, kind: Kind) -> Option<usize> {
        match (kind, self.side) {
            (Kind::Request | Kind::Reply, _) => Some(ICMP_ID),
            (Kind::Ported, Side::Source) => Some(0),
            (Kind::Ported, Side::Destination) => Some(2),
            // An SCTP port stays what it is.
            (Kind::Fixed | Kind::Error | Kind::Other, _) => None,
        }
    }

    /// What the address changes in a checksum that covers it.
    #[inline(always)]
    fn difference(&self) -> u64 {
        let (mut from, mut to) = (self.from.ip.0, self.to.ip.0);
        // An IPv4 address is the first word; the others are zero in both.
        // SAFETY: the kernel reads so many bytes of each.
        unsafe { bpf_csum_diff(from.as_mut_ptr().cast(), 16, to.as_mut_ptr().cast(), 16, 0) as u64 }
    }
}

#[inline(always)]
fn checksum(segment: &Segment) -> Option<Checksum> {
    let (offset, flags) = match segment.protocol {
        protocol::TCP => (16, PSEUDO_HEADER),
        protocol::UDP => (6, PSEUDO_HEADER | ZERO_IS_NONE),
        protocol::ICMP => (ICMP_CHECKSUM, 0),
        protocol::ICMPV6 => (ICMP_CHECKSUM, PSEUDO_HEADER),
        protocol::UDP_LITE | protocol::DCCP => (6, PSEUDO_HEADER),
        _ => return None,
    };
    Some(Checksum { offset: segment.offset + offset, flags })
}

/// A port as it lies in memory.
#[inline(always)]
fn word(port: U16) -> u64 {
    u64::from(u16::from_ne_bytes(port.to_bytes()))
}

impl Frame {
    /// Gives the packet another end.
    #[inline(always)]
    pub(super) fn change(&self, change: &Change, segment: &Segment, kind: Kind) -> Result<(), Reason> {
        // An IPv4 header makes its change good in its own checksum. An IPv6 header has none, so the kernel's sum over the
        // packet, where a device gave it one, has to follow; what the transport's checksum then takes back from it is the
        // other half (`inet_proto_csum_replace_by_diff`, net/core/utils.c).
        self.change_address(ETHERNET, change, RECOMPUTE_SUM)?;
        if segment.later {
            return Ok(());
        }
        if let Some(checksum) = checksum(segment) {
            if checksum.flags & PSEUDO_HEADER != 0 {
                self.adjust(checksum.offset, 0, change.difference(), checksum.flags)?;
            }
            if change.port(kind).is_some() {
                let flags = checksum.flags & ZERO_IS_NONE | 2;
                self.adjust(checksum.offset, word(change.from.port), word(change.to.port), flags)?;
            }
        }
        match change.port(kind) {
            Some(port) => self.write(segment.offset + port, &change.to.port),
            None => Ok(()),
        }
    }

    /// Gives the packet that an ICMP error quotes another end, and the error the matching end on its own side.
    ///
    /// `change` is that of the quoted packet, `outer` the error's own address on the other side. Every byte that changes is
    /// made good in the error's checksum, so that no more than the error's own address is left to tell the kernel of.
    #[inline(always)]
    pub(super) fn change_quoted(
        &self,
        change: &Change,
        quoted: &Quoted,
        error: &Segment,
        outer: NetIp,
    ) -> Result<(), Reason> {
        let covering = error.offset + ICMP_CHECKSUM;
        self.adjust(covering, 0, change.difference(), 0)?;
        if change.family != FAMILY_IPV6 {
            let at = quoted.ip + IPV4_CHECKSUM;
            let before = self.checksum_at(at)?;
            self.change_address(quoted.ip, change, 0)?;
            self.adjust(covering, before, self.checksum_at(at)?, 2)?;
        } else {
            self.change_address(quoted.ip, change, 0)?;
        }
        if let Some(port) = change.port(quoted.kind) {
            self.write(quoted.segment.offset + port, &change.to.port)?;
            self.adjust(covering, word(change.from.port), word(change.to.port), 2)?;
        }
        // A quote may end before the checksum of its transport header.
        if let Some(inner) = checksum(&quoted.segment)
            && let Ok(before) = self.checksum_at(inner.offset)
            && !(before == 0 && inner.flags & ZERO_IS_NONE != 0)
        {
            if inner.flags & PSEUDO_HEADER != 0 {
                self.adjust(inner.offset, 0, change.difference(), 0)?;
            }
            if change.port(quoted.kind).is_some() {
                self.adjust(inner.offset, word(change.from.port), word(change.to.port), 2)?;
            }
            self.adjust(covering, before, self.checksum_at(inner.offset)?, 2)?;
        }

        // What tells of the quoted packet's source goes to that source; what its destination tells comes from there. Others
        // tell by an address of their own.
        if outer != change.from.ip {
            return Ok(());
        }
        let side = match change.side {
            Side::Source => Side::Destination,
            Side::Destination => Side::Source,
        };
        let from = End { ip: outer, ..change.from };
        let own = Change { side, family: change.family, from, to: change.to };
        self.change(&own, error, Kind::Error)
    }

    /// The checksum at an offset, as it lies in memory.
    #[inline(always)]
    fn checksum_at(&self, offset: usize) -> Result<u64, Reason> {
        self.bytes::<u16>(offset).map(u64::from).ok_or(Reason::INVALID_PACKET)
    }

    /// Writes the address into the IP header at an offset; an IPv4 header's checksum covers it. `flags` are the helper's for
    /// an IPv6 address.
    #[inline(always)]
    fn change_address(&self, header: usize, change: &Change, flags: u64) -> Result<(), Reason> {
        let at = header + change.address();
        if change.family == FAMILY_IPV6 {
            return self.ctx.store(at, &change.to.ip.0, flags).map_err(|_| Reason::WRITE_ERROR);
        }
        let octets = |end: &End| u64::from(u32::from_ne_bytes(end.ip.v4_octets()));
        let (from, to) = (octets(&change.from), octets(&change.to));
        self.ctx.l3_csum_replace(header + IPV4_CHECKSUM, from, to, 4).map_err(|_| Reason::WRITE_ERROR)?;
        self.write(at, &change.to.ip.v4_octets())
    }

    #[inline(always)]
    fn adjust(&self, offset: usize, from: u64, to: u64, flags: u64) -> Result<(), Reason> {
        self.ctx.l4_csum_replace(offset, from, to, flags).map_err(|_| Reason::WRITE_ERROR)
    }
}

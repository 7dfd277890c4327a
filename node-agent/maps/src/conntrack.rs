//! `cilium_ct4_global` and its siblings: the connections that the programs follow. NAT rows live as long as the
//! connection that they are for.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// In [`CtEntry::flags`]: the receiving side has ended the connection.
pub const FLAG_RX_CLOSING: u16 = 1 << 0;
/// The sending side has ended the connection.
pub const FLAG_TX_CLOSING: u16 = 1 << 1;
/// There was more than the opening of a TCP connection; set for other protocols at once.
pub const FLAG_SEEN_NON_SYN: u16 = 1 << 4;

/// Seconds that a connection is kept without a packet: TCP that is established (Cilium's defaults, like those below).
pub const LIFETIME_TCP: u32 = 8000;
/// TCP of which only the opening was seen.
pub const LIFETIME_SYN: u32 = 60;
/// TCP that both sides have ended.
pub const LIFETIME_CLOSED: u32 = 10;
/// Any other protocol.
pub const LIFETIME_ANY: u32 = 60;

/// TCP flag: the sender sends no more.
pub const TCP_FIN: u8 = 0x01;
/// TCP flag: a connection begins.
pub const TCP_SYN: u8 = 0x02;
/// TCP flag: the connection is broken off.
pub const TCP_RST: u8 = 0x04;
/// TCP flag: something is acknowledged.
pub const TCP_ACK: u8 = 0x10;

/// Which way a packet of a connection goes, as seen from whoever opened it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Way {
    /// From whoever opened it.
    Forth,
    /// The answer.
    Back,
}

/// A packet of a connection.
#[derive(Clone, Copy, Debug)]
pub struct Seen {
    /// It is TCP.
    pub is_tcp: bool,
    /// Its TCP flags; 0 for other protocols. Not an option: the verifier takes no copy of what was never set.
    pub tcp_flags: u8,
    /// Bytes of the frame.
    pub bytes: u32,
    /// Identity of whoever opened the connection, as far as it is known.
    pub identity: u32,
}

/// Value of the maps of connection tracking (Cilium: `ct_entry`).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct CtEntry {
    /// Zero.
    pub reserved: u64,
    /// Backend of a Service; 0 here.
    pub backend_id: u64,
    /// Packets both ways.
    pub packets: u64,
    /// Bytes both ways, with the link-layer header.
    pub bytes: u64,
    /// When the entry may go, in seconds since the machine started.
    pub lifetime: u32,
    /// `FLAG_…`
    pub flags: u16,
    /// Index of the Service; 0 here. Network order.
    pub rev_nat_index: u16,
    /// Port of a Service's NAT; 0 here. Network order.
    pub nat_port: u16,
    /// TCP flags of whoever opened the connection.
    pub tx_flags_seen: u8,
    /// TCP flags of the other side.
    pub rx_flags_seen: u8,
    /// Identity of whoever opened the connection.
    pub src_sec_id: u32,
    /// When a packet of whoever opened it was last told of, in seconds; here each packet counts.
    pub last_tx_report: u32,
    /// The same of the other side.
    pub last_rx_report: u32,
}

impl CtEntry {
    /// Notes a packet, `now` seconds after the machine started. A connection of the same ports that begins anew forgets how
    /// the one before it ended.
    #[inline(always)]
    pub fn note(&mut self, way: Way, seen: Seen, now: u32) {
        let Seen { is_tcp, tcp_flags: tcp, bytes, .. } = seen;
        self.packets += 1;
        self.bytes += u64::from(bytes);
        let opens = tcp & (TCP_SYN | TCP_ACK) == TCP_SYN;
        if opens && self.flags & (FLAG_RX_CLOSING | FLAG_TX_CLOSING) != 0 {
            self.flags = 0;
            (self.tx_flags_seen, self.rx_flags_seen) = (0, 0);
        }
        if !opens {
            self.flags |= FLAG_SEEN_NON_SYN;
        }
        let closing = match way {
            Way::Forth => {
                self.tx_flags_seen |= tcp;
                self.last_tx_report = now;
                FLAG_TX_CLOSING
            }
            Way::Back => {
                self.rx_flags_seen |= tcp;
                self.last_rx_report = now;
                FLAG_RX_CLOSING
            }
        };
        if tcp & TCP_FIN != 0 {
            self.flags |= closing;
        }
        if tcp & TCP_RST != 0 {
            self.flags |= FLAG_RX_CLOSING | FLAG_TX_CLOSING;
        }
        self.lifetime = now + self.seconds_left(is_tcp);
    }

    /// True when its time is over, so many seconds after the machine started.
    #[must_use]
    #[inline(always)]
    pub const fn is_over(&self, now: u64) -> bool {
        (self.lifetime as u64) < now
    }

    /// How long it is kept without another packet.
    #[inline(always)]
    const fn seconds_left(&self, tcp: bool) -> u32 {
        const BOTH: u16 = FLAG_RX_CLOSING | FLAG_TX_CLOSING;
        if !tcp {
            LIFETIME_ANY
        } else if self.flags & BOTH == BOTH {
            LIFETIME_CLOSED
        } else if self.flags & FLAG_SEEN_NON_SYN == 0 {
            LIFETIME_SYN
        } else {
            LIFETIME_TCP
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::assert_layout;

    #[test]
    fn layout_is_cilium_1_20() {
        assert_layout!(CtEntry, size 56, {
            reserved @ 0, backend_id @ 8, packets @ 16, bytes @ 24, lifetime @ 32, flags @ 36, rev_nat_index @ 38,
            nat_port @ 40, tx_flags_seen @ 42, rx_flags_seen @ 43, src_sec_id @ 44, last_tx_report @ 48,
            last_rx_report @ 52,
        });
    }

    fn tcp(tcp_flags: u8, bytes: u32) -> Seen {
        Seen { is_tcp: true, tcp_flags, bytes, identity: 0 }
    }

    #[test]
    fn a_tcp_connection_lives_as_long_as_its_state_says() {
        let mut entry = CtEntry::default();
        entry.note(Way::Forth, tcp(TCP_SYN, 74), 1000);
        assert_eq!((entry.lifetime, entry.flags), (1060, 0));
        entry.note(Way::Back, tcp(TCP_SYN | TCP_ACK, 74), 1001);
        assert_eq!((entry.lifetime, entry.flags), (9001, FLAG_SEEN_NON_SYN));
        entry.note(Way::Forth, tcp(TCP_FIN | TCP_ACK, 66), 1002);
        assert_eq!(entry.lifetime, 9002, "the other side may go on");
        entry.note(Way::Back, tcp(TCP_FIN | TCP_ACK, 66), 1003);
        assert_eq!((entry.lifetime, entry.flags & 3), (1013, 3));
        assert_eq!((entry.tx_flags_seen, entry.rx_flags_seen), (0x13, 0x13));
        assert_eq!((entry.packets, entry.bytes), (4, 280));
        assert_eq!((entry.last_tx_report, entry.last_rx_report), (1002, 1003));

        entry.note(Way::Forth, tcp(TCP_SYN, 74), 1005);
        assert_eq!((entry.lifetime, entry.flags, entry.tx_flags_seen), (1065, 0, TCP_SYN), "the ports begin anew");
        entry.note(Way::Back, tcp(TCP_RST | TCP_ACK, 54), 1006);
        assert_eq!(entry.lifetime, 1016);
    }

    #[test]
    fn a_connection_is_over_after_its_last_second() {
        let entry = |lifetime| CtEntry { lifetime, ..CtEntry::default() };
        assert!(entry(999).is_over(1000) && !entry(1000).is_over(1000));
    }

    #[test]
    fn other_protocols_live_from_packet_to_packet() {
        let mut entry = CtEntry::default();
        entry.note(Way::Forth, Seen { is_tcp: false, ..tcp(0, 60) }, 5);
        assert_eq!((entry.lifetime, entry.flags, entry.tx_flags_seen), (65, FLAG_SEEN_NON_SYN, 0));
    }
}

//! Connections, translations, and what goes past the stack, as lines.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    path::Path,
    time::Duration,
};

use basal_maps::{
    conntrack::{CtEntry, FLAG_RX_CLOSING, FLAG_SEEN_NON_SYN, FLAG_TX_CLOSING},
    flow::{DIR_IN, DIR_OUT, DIR_RELATED, DIR_SERVICE, DirectConnection, END_RESET, End, Tuple, TupleV4, TupleV6},
    nat::{NatEntry, NatEntryV4, NatEntryV6},
    protocol, spec,
};
use nix::time::{ClockId, clock_gettime};
use serde::Serialize;

use super::pinned;

/// Why there may be no maps of masquerading.
const MASQUERADES: &str = "nothing follows flows unless enable-bpf-masquerade is \"true\"";
/// Why there may be no maps of direct routing.
const GOES_DIRECT: &str = "nothing goes past the stack unless enable-host-legacy-routing is \"false\"";

/// Whom a flow connects.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub(super) struct Flow {
    protocol: String,
    direction: &'static str,
    source: SocketAddr,
    destination: SocketAddr,
}

impl Flow {
    /// From a key with the packet's own addresses.
    fn new<K: Tuple>(key: &K) -> Self {
        let direction = match key.flags() {
            DIR_OUT => "OUT",
            DIR_IN => "IN",
            DIR_RELATED => "RELATED",
            DIR_SERVICE => "SVC",
            _ => "?",
        };
        let name = match key.nexthdr() {
            protocol::ICMP => "ICMP".to_owned(),
            protocol::TCP => "TCP".to_owned(),
            protocol::UDP => "UDP".to_owned(),
            protocol::ICMPV6 => "ICMPv6".to_owned(),
            protocol::SCTP => "SCTP".to_owned(),
            number => number.to_string(),
        };
        let [source, destination] = [key.source(), key.destination()].map(|end| address(end, K::FAMILY));
        Self { protocol: name, direction, source, destination }
    }
}

fn address(end: End, family: u8) -> SocketAddr {
    let ip = end.ip.to_ip(family).unwrap_or(IpAddr::from([0; 4]));
    SocketAddr::new(ip, end.port.get())
}

impl fmt::Display for Flow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {} -> {}", self.protocol, self.direction, self.source, self.destination)
    }
}

/// A connection.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub(super) struct Connection {
    flow: Flow,
    expires: u32,
    packets: u64,
    bytes: u64,
    rx_flags_seen: u8,
    last_rx_report: u32,
    tx_flags_seen: u8,
    last_tx_report: u32,
    flags: u16,
    rev_nat: u16,
    source_security_id: u32,
    backend_id: u64,
    nat_port: u16,
}

impl Connection {
    fn new(key: &impl Tuple, entry: &CtEntry) -> Self {
        Self {
            flow: Flow::new(&key.with_addresses_swapped()),
            expires: entry.lifetime,
            packets: entry.packets,
            bytes: entry.bytes,
            rx_flags_seen: entry.rx_flags_seen,
            last_rx_report: entry.last_rx_report,
            tx_flags_seen: entry.tx_flags_seen,
            last_tx_report: entry.last_tx_report,
            flags: entry.flags,
            rev_nat: u16::from_be(entry.rev_nat_index),
            source_security_id: entry.src_sec_id,
            backend_id: entry.backend_id,
            nat_port: u16::from_be(entry.nat_port),
        }
    }
}

impl fmt::Display for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const NAMES: [(u16, &str); 3] =
            [(FLAG_RX_CLOSING, "RxClosing "), (FLAG_TX_CLOSING, "TxClosing "), (FLAG_SEEN_NON_SYN, "SeenNonSyn ")];
        let names: String = NAMES.iter().filter(|(flag, _)| self.flags & flag != 0).map(|(_, name)| *name).collect();
        write!(
            f,
            "{} expires={} Packets={} Bytes={} RxFlagsSeen={:#04x} LastRxReport={} TxFlagsSeen={:#04x} LastTxReport={} \
             Flags={:#06x} [ {names}] RevNAT={} SourceSecurityID={} BackendID={} NatPort={}",
            self.flow,
            self.expires,
            self.packets,
            self.bytes,
            self.rx_flags_seen,
            self.last_rx_report,
            self.tx_flags_seen,
            self.last_tx_report,
            self.flags,
            self.rev_nat,
            self.source_security_id,
            self.backend_id,
            self.nat_port,
        )
    }
}

/// All connections.
pub(super) fn connections(maps: &Path) -> anyhow::Result<Vec<Connection>> {
    let mut found = Vec::new();
    for map in [&spec::CT4_TCP, &spec::CT4_ANY] {
        let rows = pinned::flows::<TupleV4, CtEntry, 14, 56>(maps, map, MASQUERADES)?;
        found.extend(rows.iter().map(|(key, entry)| Connection::new(key, entry)));
    }
    for map in [&spec::CT6_TCP, &spec::CT6_ANY] {
        let rows = pinned::flows::<TupleV6, CtEntry, 38, 56>(maps, map, MASQUERADES)?;
        found.extend(rows.iter().map(|(key, entry)| Connection::new(key, entry)));
    }
    found.sort();
    Ok(found)
}

/// A translation.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub(super) struct Translation {
    flow: Flow,
    to: SocketAddr,
    /// Seconds since it was made.
    age: u64,
    needs_ct: u64,
}

impl fmt::Display for Translation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let side = if self.flow.direction == "IN" { "DST" } else { "SRC" };
        write!(f, "{} XLATE_{side} {} Created={}sec ago NeedsCT={}", self.flow, self.to, self.age, self.needs_ct)
    }
}

impl Translation {
    fn new<K: Tuple>(key: &K, entry: &impl NatEntry, now: Duration) -> Self {
        Self {
            flow: Flow::new(key),
            to: address(entry.to(), K::FAMILY),
            age: now.saturating_sub(Duration::from_nanos(entry.created())).as_secs(),
            needs_ct: entry.needs_ct(),
        }
    }
}

/// A TCP connection that goes past the host stack, as a pod of this node sends it.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub(super) struct Direct {
    flow: Flow,
    /// Seconds since it began.
    age: u64,
    /// Both sides have ended it: it is taken away soon.
    closed: bool,
}

impl Direct {
    fn new(key: &impl Tuple, row: &DirectConnection, now: Duration) -> Self {
        let age = now.as_secs().saturating_sub(row.since.into());
        Self { flow: Flow::new(key), age, closed: row.ends == END_RESET }
    }
}

impl fmt::Display for Direct {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} Created={}sec ago{}", self.flow, self.age, if self.closed { " Closed" } else { "" })
    }
}

/// All connections that go past the host stack.
pub(super) fn direct(maps: &Path) -> anyhow::Result<Vec<Direct>> {
    let now = now()?;
    let v4 = pinned::flows::<TupleV4, DirectConnection, 14, 12>(maps, &spec::DIRECT4, GOES_DIRECT)?;
    let v6 = pinned::flows::<TupleV6, DirectConnection, 38, 12>(maps, &spec::DIRECT6, GOES_DIRECT)?;
    let v4 = v4.iter().map(|(key, row)| Direct::new(key, row, now));
    let v6 = v6.iter().map(|(key, row)| Direct::new(key, row, now));
    let mut found: Vec<_> = v4.chain(v6).collect();
    found.sort();
    Ok(found)
}

/// The time by the clock that the programs use, which starts with the machine.
fn now() -> anyhow::Result<Duration> {
    Ok(clock_gettime(ClockId::CLOCK_MONOTONIC)?.into())
}

/// All translations.
pub(super) fn translations(maps: &Path) -> anyhow::Result<Vec<Translation>> {
    let now = now()?;
    let v4 = pinned::flows::<TupleV4, NatEntryV4, 14, 40>(maps, &spec::NAT4, MASQUERADES)?;
    let v6 = pinned::flows::<TupleV6, NatEntryV6, 38, 56>(maps, &spec::NAT6, MASQUERADES)?;
    let v4 = v4.iter().map(|(key, entry)| Translation::new(key, entry, now));
    let v6 = v6.iter().map(|(key, entry)| Translation::new(key, entry, now));
    let mut found: Vec<_> = v4.chain(v6).collect();
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn end(text: &str) -> End {
        let address: SocketAddr = text.parse().unwrap();
        End::new(address.ip(), address.port())
    }

    #[test]
    fn a_connection_looks_as_in_cilium() {
        let key = TupleV4::new(end("10.4.166.193:52628"), end("10.4.34.6:4143"), 6, DIR_IN).with_addresses_swapped();
        let entry = CtEntry {
            packets: 5,
            bytes: 452,
            lifetime: 277_365,
            flags: FLAG_SEEN_NON_SYN | FLAG_TX_CLOSING,
            rx_flags_seen: 0x02,
            last_rx_report: 277_355,
            tx_flags_seen: 0x12,
            last_tx_report: 277_355,
            src_sec_id: 2,
            ..CtEntry::default()
        };
        assert_eq!(
            Connection::new(&key, &entry).to_string(),
            "TCP IN 10.4.166.193:52628 -> 10.4.34.6:4143 expires=277365 Packets=5 Bytes=452 RxFlagsSeen=0x02 \
             LastRxReport=277355 TxFlagsSeen=0x12 LastTxReport=277355 Flags=0x0012 [ TxClosing SeenNonSyn ] RevNAT=0 \
             SourceSecurityID=2 BackendID=0 NatPort=0"
        );
    }

    #[test]
    fn what_goes_past_the_stack_says_since_when() {
        let key = TupleV4::new(end("10.1.1.7:40000"), end("10.1.2.7:80"), 6, DIR_OUT);
        let mut row = DirectConnection::new(90);
        let text = |row: &DirectConnection| Direct::new(&key, row, Duration::from_millis(100_500)).to_string();
        assert_eq!(text(&row), "TCP OUT 10.1.1.7:40000 -> 10.1.2.7:80 Created=10sec ago");
        row.end(END_RESET, 100);
        assert_eq!(text(&row), "TCP OUT 10.1.1.7:40000 -> 10.1.2.7:80 Created=10sec ago Closed");
    }

    #[test]
    fn a_translation_looks_as_in_cilium() {
        let key = TupleV4::new(end("10.184.1.251:34490"), end("10.178.16.166:443"), 6, DIR_OUT);
        let (flow, to) = (Flow::new(&key), "10.178.69.14:62218".parse().unwrap());
        let translation = Translation { flow, to, age: 4, needs_ct: 0 };
        assert_eq!(
            translation.to_string(),
            "TCP OUT 10.184.1.251:34490 -> 10.178.16.166:443 XLATE_SRC 10.178.69.14:62218 Created=4sec ago NeedsCT=0"
        );
        let key = TupleV6::new(end("[2001:db8::1]:0"), end("[fd16::1]:7"), 58, DIR_IN);
        let (flow, to) = (Flow::new(&key), "[fd00::7]:7".parse().unwrap());
        let text = Translation { flow, to, age: 0, needs_ct: 1 }.to_string();
        assert_eq!(text, "ICMPv6 IN [2001:db8::1]:0 -> [fd16::1]:7 XLATE_DST [fd00::7]:7 Created=0sec ago NeedsCT=1");
    }
}

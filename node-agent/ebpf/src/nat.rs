//! Masquerading: what pods send to the outside leaves with an address of the node, and what comes back finds the pod.
//!
//! ```text
//! pod P:p → stack → device, cil_to_netdev:   P:p becomes N:n, rows (P:p → W:w) and (W:w → N:n) in the map of NAT
//! W:w → N:n, device, cil_from_netdev:        N:n becomes P:p → stack → pod
//! ```
//!
//! The stack is inside of this translation, so kube-proxy's connection tracking sees the pod's own address both ways.
//! A flow is known by protocol, addresses and ports (the identifier, for ICMP echoes; nothing, for protocols without
//! ports), and keeps its port where that is free towards the same destination. What the node sends itself from a port that
//! pods' packets may get holds that port in the same way.
//!
//! Each flow has a row of connection tracking for as long as packets come by; without it, user space takes the rows of
//! NAT away, and before that, a flow that finds no port free takes them over. Rows may vanish on their own, since the maps
//! drop the oldest when they are full: a packet puts back what its flow lacks. What cannot be put back is a port that was
//! not the flow's own, where the row of what leaves is lost and the pod is the next to send.

use basal_maps::{
    addr::{FAMILY_IPV4, FAMILY_IPV6, NetIp},
    config::Config,
    conntrack::{Seen, Way},
    endpoint::{EndpointKey, FLAG_NO_SNAT_V4, FLAG_NO_SNAT_V6},
    flow::{DIR_IN, DIR_OUT, End, Tuple},
    identity,
    ipcache::{FLAG_SKIP_TUNNEL, IpPrefix},
    nat::MIN_PORT,
    reason::Reason,
};
use zerocopy::big_endian::U16;

use crate::{
    decide,
    parse::{Packet, is_link_local, protocol},
};

/// How many ports are tried for a flow (Cilium's number).
const PORTS_TRIED: u32 = 32;
/// How many ports are looked at for one whose connection is over, when none of those was free.
const PORTS_TAKEN_OVER: u32 = 4;
/// Ports that masqueraded packets may leave with.
const PORTS: u32 = u16::MAX as u32 + 1 - MIN_PORT as u32;
// A port with this bit is in the range, and one behind the last becomes the first.
const _: () = assert!(MIN_PORT == 0x8000);

/// The maps of one family's flows.
pub trait Flows {
    /// Their key.
    type Key: Tuple;

    /// What the row of NAT says.
    fn translation(&self, key: &Self::Key) -> Option<End>;
    /// Makes a row of NAT, unless there is one; false when there is, or when the map takes no more. `own` is for flows of
    /// the node's own.
    fn claim(&self, key: &Self::Key, to: End, own: bool) -> bool;
    /// Makes or replaces a row of NAT; false when the map takes no more.
    fn put(&self, key: &Self::Key, to: End, own: bool) -> bool;
    /// Takes a row of NAT away.
    fn release(&self, key: &Self::Key);
    /// True for a row of NAT that was not just made: by now its connection is tracked, unless it is over.
    fn is_settled(&self, key: &Self::Key) -> bool;
    /// What connection tracking knows of a connection.
    fn connection(&self, key: &Self::Key) -> Connection;
    /// Notes a packet of a connection; one that is not tracked is from now on, as far as the map takes it.
    fn track(&self, key: &Self::Key, way: Way, seen: Seen);
    /// A random number.
    fn random(&self) -> u32;
    /// True for addresses that pods' packets go to as they are.
    fn is_exempt(&self, ip: NetIp) -> bool;
}

/// What connection tracking knows of a connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Connection {
    /// Nothing: it never was, or its row was dropped.
    Unknown,
    /// Its time is not over.
    Live,
    /// Its time is over.
    Over,
}

/// A flow as the packet at hand shows it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Flow {
    /// Where the packet comes from.
    pub source: End,
    /// Where it goes.
    pub destination: End,
    /// IP protocol.
    pub protocol: u8,
}

/// What part a packet has in its flow.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// A packet with ports that can be changed.
    Ported,
    /// The request of an ICMP echo: its identifier is the source port.
    Request,
    /// The reply of an ICMP echo: its identifier is the destination port.
    Reply,
    /// A packet whose port cannot be changed, or that has none: only its address is.
    Fixed,
    /// An ICMP error: the packet that it quotes has the flow.
    Error,
    /// ICMP that has no flow.
    Other,
}

/// A packet, with what is known of its flow.
#[derive(Clone, Copy, Debug)]
pub struct Traced<'a> {
    /// Its IP header.
    pub packet: &'a Packet,
    /// Its flow: `None` for a fragment whose first one did not come by, and, with [`Kind::Other`], behind headers that
    /// nobody knows.
    pub flow: Option<&'a Flow>,
    /// What part it has in the flow.
    pub kind: Kind,
    /// What connection tracking needs of it.
    pub seen: Seen,
}

/// What becomes of a packet that leaves the node by a device.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Leaving {
    /// It goes as it is.
    AsIs,
    /// It goes with this source.
    From(End),
    /// It is dropped.
    Drop(Reason),
}

impl Kind {
    /// Of a packet that starts, behind its IP headers, with these bytes.
    #[must_use]
    #[inline(always)]
    pub const fn of(family: u8, protocol: u8, icmp_type: u8) -> Self {
        match (protocol, family) {
            (protocol::TCP | protocol::UDP, _) => Self::Ported,
            (protocol::ICMP, FAMILY_IPV4) => match icmp_type {
                8 => Self::Request,
                0 => Self::Reply,
                3 | 11 | 12 => Self::Error,
                _ => Self::Other,
            },
            (protocol::ICMPV6, FAMILY_IPV6) => match icmp_type {
                128 => Self::Request,
                129 => Self::Reply,
                1..=4 => Self::Error,
                _ => Self::Other,
            },
            _ => Self::Fixed,
        }
    }

    /// The ports of the packet: those of its transport header's first eight bytes.
    #[must_use]
    #[inline(always)]
    pub const fn ports(self, protocol: u8, head: &[u8; 8]) -> (U16, U16) {
        let [s0, s1, d0, d1, i0, i1, ..] = *head;
        let (first, second, id) = (U16::from_bytes([s0, s1]), U16::from_bytes([d0, d1]), U16::from_bytes([i0, i1]));
        match self {
            Self::Ported => (first, second),
            Self::Fixed if matches!(protocol, protocol::SCTP | protocol::UDP_LITE | protocol::DCCP) => (first, second),
            Self::Request => (id, U16::ZERO),
            Self::Reply => (U16::ZERO, id),
            Self::Fixed | Self::Error | Self::Other => (U16::ZERO, U16::ZERO),
        }
    }
}

impl Flow {
    /// The flow in the opposite way.
    #[must_use]
    #[inline(always)]
    pub const fn turned(&self) -> Self {
        Self { source: self.destination, destination: self.source, protocol: self.protocol }
    }

    #[inline(always)]
    fn key<K: Tuple>(&self, direction: u8) -> K {
        K::new(self.source, self.destination, self.protocol, direction)
    }

    /// The key of connection tracking for a connection that this packet is of whoever opened it.
    #[inline(always)]
    fn tracked<K: Tuple>(&self, direction: u8) -> K {
        self.key::<K>(direction).with_addresses_swapped()
    }
}

/// `cil_to_netdev`: what becomes of a packet that leaves by a device that masquerades as `by`. Errors are
/// [`leaving_error`]'s.
///
/// What the node sends itself holds its port where pods' packets could get it, and gets another where one of them has it.
#[inline(always)]
pub fn leaving<F: Flows>(
    flows: &F,
    tables: &impl decide::Tables,
    config: &Config,
    by: NetIp,
    sent: Traced<'_>,
) -> Leaving {
    let Traced { packet, flow, kind, seen } = sent;
    // IPv4's link-local addresses are those of clouds' own servers, behind the node's device.
    if packet.is_for_a_group() || packet.family == FAMILY_IPV6 && is_link_local(&packet.destination, packet.family) {
        return Leaving::AsIs;
    }
    let own = packet.source == by;
    let identity = if own {
        identity::HOST
    } else {
        match masquerades(flows, tables, config, packet) {
            Some(identity) => identity,
            None => return Leaving::AsIs,
        }
    };
    let Some(flow) = flow else {
        return match kind {
            _ if own => Leaving::AsIs,
            Kind::Other => Leaving::Drop(Reason::UNSUPPORTED_BY_NAT),
            _ => Leaving::Drop(Reason::NO_FIRST_FRAGMENT),
        };
    };
    let seen = Seen { identity, ..seen };
    if own {
        if !is_at_stake(flow, kind) {
            return Leaving::AsIs;
        }
    } else {
        // What answers somebody outside keeps the address that was asked.
        let asked: F::Key = flow.turned().tracked(DIR_IN);
        if flows.connection(&asked) == Connection::Live {
            flows.track(&asked, Way::Back, seen);
            return Leaving::AsIs;
        }
        match kind {
            Kind::Ported | Kind::Request | Kind::Fixed => {}
            Kind::Reply | Kind::Error => return Leaving::AsIs,
            Kind::Other => return Leaving::Drop(Reason::UNSUPPORTED_BY_NAT),
        }
    }
    match source_of(flows, flow, by, kind, own) {
        Some(source) => {
            flows.track(&flow.tracked(DIR_OUT), Way::Forth, seen);
            if source == flow.source { Leaving::AsIs } else { Leaving::From(source) }
        }
        // A full map, or a port that cannot be another: the node's own goes as it would without pods.
        None if own => Leaving::AsIs,
        None => Leaving::Drop(Reason::NO_NAT_MAPPING),
    }
}

/// True for what the node sends itself where pods' packets could get its port.
#[inline(always)]
fn is_at_stake(flow: &Flow, kind: Kind) -> bool {
    match kind {
        Kind::Ported => flow.source.port.get() >= MIN_PORT,
        Kind::Request | Kind::Fixed => true,
        Kind::Reply | Kind::Error | Kind::Other => false,
    }
}

/// The identity of the pod that sent a packet that must not leave with the pod's address; `None` for others.
#[inline(always)]
fn masquerades<F: Flows>(flows: &F, tables: &impl decide::Tables, config: &Config, packet: &Packet) -> Option<u32> {
    let pod = tables.endpoint(&EndpointKey::new(packet.source, packet.family))?;
    let keeps = if packet.family == FAMILY_IPV6 { FLAG_NO_SNAT_V6 } else { FLAG_NO_SNAT_V4 };
    if pod.is_host() || pod.flags & keeps != 0 {
        return None;
    }
    let identity = pod.sec_id;
    if flows.is_exempt(packet.destination) {
        return None;
    }
    // Other nodes know the way to the pod: in native routing, and where their row says that they do without a tunnel.
    if !config.remote_node_masquerade()
        && let Some(row) = tables.ipcache(&IpPrefix::new(packet.destination, packet.family))
        && identity::is_remote_node(row.sec_identity)
        && (config.native_routing() || row.flags & FLAG_SKIP_TUNNEL != 0)
    {
        return None;
    }
    Some(identity)
}

/// The source that a flow leaves with: the one that it has had, or a free one. `None` when there is none.
#[inline(always)]
fn source_of<F: Flows>(flows: &F, flow: &Flow, by: NetIp, kind: Kind, own: bool) -> Option<End> {
    let forth: F::Key = flow.key(DIR_OUT);
    let back = |port: U16| -> F::Key { Flow { source: End { ip: by, port }, ..*flow }.turned().key(DIR_IN) };
    if let Some(found) = flows.translation(&forth)
        // The device may have another address since.
        && found.ip == by
        && holds(flows, &back(found.port), flow.source, own)
    {
        return Some(found);
    }

    if own && kind == Kind::Fixed {
        // Without another port to go to, the node goes first.
        let source = End { ip: by, port: flow.source.port };
        return (flows.put(&back(source.port), source, own) && flows.put(&forth, source, own)).then_some(source);
    }
    let changeable = matches!(kind, Kind::Ported | Kind::Request);
    let first = flow.source.port;
    let in_range = kind != Kind::Ported || first.get() >= MIN_PORT;
    let mut port = if in_range { first } else { random_port(flows) };
    let mut tried = 0;
    while tried < PORTS_TRIED {
        if holds(flows, &back(port), flow.source, own) {
            let source = End { ip: by, port };
            if flows.put(&forth, source, own) {
                return Some(source);
            }
            flows.release(&back(port));
            return None;
        }
        if !changeable {
            return None;
        }
        // Somewhere else at first, from there on one after another.
        port = if tried == 0 { random_port(flows) } else { next_port(port) };
        tried += 1;
    }
    let mut tried = 0;
    while tried < PORTS_TAKEN_OVER {
        let port = random_port(flows);
        let key = back(port);
        if is_free_again(flows, flow, &key) {
            let source = End { ip: by, port };
            return (flows.put(&key, flow.source, own) && flows.put(&forth, source, own)).then_some(source);
        }
        tried += 1;
    }
    None
}

/// True for a way back whose connection is over.
#[inline(always)]
fn is_free_again<F: Flows>(flows: &F, flow: &Flow, back: &F::Key) -> bool {
    let Some(holder) = flows.translation(back) else { return true };
    let of_holder = Flow { source: holder, ..*flow };
    flows.is_settled(back) && flows.connection(&of_holder.tracked(DIR_OUT)) != Connection::Live
}

/// True when the answers of a flow come back to `source`, from now on if nobody else has them.
#[inline(always)]
fn holds<F: Flows>(flows: &F, back: &F::Key, source: End, own: bool) -> bool {
    match flows.translation(back) {
        Some(found) => found == source,
        None => flows.claim(back, source, own),
    }
}

#[inline(always)]
fn random_port(flows: &impl Flows) -> U16 {
    U16::new(MIN_PORT + (flows.random() % PORTS) as u16)
}

#[inline(always)]
fn next_port(port: U16) -> U16 {
    U16::new(port.get().wrapping_add(1) | MIN_PORT)
}

/// `cil_from_netdev`: where a packet that came in by a device goes instead; `None` when it goes where it says. Errors are
/// [`arriving_error`]'s.
#[inline(always)]
pub fn arriving<F: Flows>(flows: &F, tables: &impl decide::Tables, received: Traced<'_>) -> Option<End> {
    let Traced { packet, flow, kind, seen } = received;
    let flow = flow?;
    let may_be_ours = match kind {
        Kind::Ported => flow.destination.port.get() >= MIN_PORT,
        Kind::Reply | Kind::Fixed => true,
        Kind::Request | Kind::Error | Kind::Other => false,
    };
    if may_be_ours && let Some(to) = flows.translation(&flow.key(DIR_IN)) {
        let forth = Flow { source: to, destination: flow.source, protocol: flow.protocol };
        let tracked: F::Key = forth.tracked(DIR_OUT);
        if flows.connection(&tracked) == Connection::Over {
            // By now the address may be another pod's.
            return None;
        }
        let key: F::Key = forth.key(DIR_OUT);
        if flows.translation(&key).is_none() {
            // Without this row the flow's next packet would leave with another port.
            flows.put(&key, flow.destination, to.ip == flow.destination.ip);
        }
        flows.track(&tracked, Way::Back, seen);
        return (to != flow.destination).then_some(to);
    }
    // Somebody outside who knows the way to the pod: the answer has to come from the address that was asked.
    if matches!(kind, Kind::Ported | Kind::Request | Kind::Fixed)
        && let Some(pod) = tables.endpoint(&EndpointKey::new(packet.destination, packet.family))
        && !pod.is_host()
        && !flows.is_exempt(packet.source)
        && flows.connection(&flow.turned().tracked(DIR_OUT)) != Connection::Live
    {
        flows.track(&flow.tracked(DIR_IN), Way::Forth, seen);
    }
    None
}

/// Where the destination of the packet that an ICMP error quotes becomes something else because the error leaves the node
/// by a device that masquerades as `by`: the source of the packets that the quoted one answers. `None` when the error goes
/// as it is.
#[inline(always)]
pub fn leaving_error<F: Flows>(
    flows: &F,
    tables: &impl decide::Tables,
    by: NetIp,
    packet: &Packet,
    quoted: &Flow,
) -> Option<End> {
    // A pod tells of its own flows only; the node, by whichever address, of those that it forwards.
    if quoted.destination.ip != packet.source
        && let Some(sender) = tables.endpoint(&EndpointKey::new(packet.source, packet.family))
        && !sender.is_host()
    {
        return None;
    }
    let to = flows.translation(&quoted.turned().key(DIR_OUT))?;
    (to != quoted.destination && to.ip == by).then_some(to)
}

/// Where an ICMP error goes that came in by a device: to whom the packet that it quotes is from. `None` when that is not
/// masqueraded.
#[inline(always)]
pub fn arriving_error<F: Flows>(flows: &F, packet: &Packet, quoted: &Flow) -> Option<End> {
    if quoted.source.ip != packet.destination {
        return None;
    }
    let to = flows.translation(&quoted.turned().key(DIR_IN))?;
    (to != quoted.source).then_some(to)
}

#[cfg(test)]
mod tests;

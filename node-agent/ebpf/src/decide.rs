//! What becomes of a packet.
//!
//! With legacy host routing (the default) everything that a pod sends or receives passes the host stack, where
//! kube-proxy's connection tracking translates service addresses, in both directions and on both nodes:
//!
//! ```text
//! pod → cil_from_container → stack (mark: identity) → cilium_host → cil_from_host ─┬→ cil_lxc_policy → pod
//!                                                                                 └→ cilium_vxlan → other node
//! other node → cilium_vxlan → cil_from_overlay → stack (mark: identity) → cilium_host → cil_from_host → …
//! ```
//!
//! Either both directions of a flow pass connection tracking or none does. Without legacy routing a packet therefore
//! takes the direct path only when kube-proxy translates no packet of its flow. A TCP connection's first segment shows
//! that, and what follows is known by it ([`crate::direct`]), ICMP errors about it too. Of other packets the protocol has
//! to: anything but UDP and SCTP, other ICMP errors (which quote translated packets) and fragments.
//!
//! Without a tunnel (native routing) the stack routes what goes to other nodes, and what comes from them reaches
//! `cil_from_host` unmarked:
//!
//! ```text
//! pod → cil_from_container → stack → the node's device → other node → stack → cilium_host → cil_from_host → …
//! ```
//!
//! A hop is counted once: by the stack where the stack routes, by the delivery on the direct path.

use basal_maps::{
    addr::{FAMILY_IPV4, FAMILY_IPV6, NetIp},
    config::Config,
    endpoint::{EndpointInfo, EndpointKey},
    identity,
    ipcache::{FLAG_HAS_TUNNEL_ENDPOINT, FLAG_IPV6_TUNNEL_ENDPOINT, FLAG_SKIP_TUNNEL, IpPrefix, RemoteEndpointInfo},
    mark,
    reason::Reason,
    tunnel::TunnelValue,
};

use crate::{
    direct::{About, Connections, Part, Pod, Tcp},
    parse::{Ethernet, Packet, Transport, protocol},
};

/// The maps that decisions read.
pub trait Tables {
    /// Row of `cilium_lxc`.
    fn endpoint(&self, key: &EndpointKey) -> Option<&EndpointInfo>;
    /// Longest match in `cilium_ipcache_v2`.
    fn ipcache(&self, prefix: &IpPrefix) -> Option<&RemoteEndpointInfo>;
    /// Longest match in `cilium_tunnel_map`.
    fn tunnel(&self, prefix: &IpPrefix) -> Option<&TunnelValue>;
}

/// What becomes of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict<'a> {
    /// Passes to the host stack with the source's identity in its mark.
    Stack {
        /// The source's identity.
        identity: u32,
    },
    /// Passes as it is and counts nowhere: the node's own link-local chatter.
    Ignore,
    /// Goes to a pod of this node, through the policy program in the pod's slot.
    Deliver {
        /// The pod.
        endpoint: &'a EndpointInfo,
        /// The source's identity.
        identity: u32,
        /// The direct path: nobody has counted the hop, and the pod's namespace is entered at once.
        direct: bool,
    },
    /// Goes to another node.
    Encapsulate {
        /// The node.
        to: TunnelEndpoint,
        /// The source's identity.
        identity: u32,
    },
    /// Nobody has the address. Goes to the stack, which tells the sender.
    Unreachable,
    /// Is dropped.
    Drop(Reason),
}

/// What tells which pod sent a frame.
#[derive(Clone, Copy, Debug)]
pub struct Sender<'a> {
    /// Interface index of the host side of the device pair that it came from.
    pub ifindex: u32,
    /// Its Ethernet header.
    pub ethernet: &'a Ethernet,
}

/// A node to tunnel to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TunnelEndpoint {
    /// Its address.
    pub ip: NetIp,
    /// The address is IPv6.
    pub ipv6: bool,
}

/// Where the maps say that an address is.
enum Place {
    /// On another node.
    Node(TunnelEndpoint),
    /// On another node, and the row does not say which.
    NoEndpoint,
    /// Not behind a tunnel.
    Elsewhere,
}

impl Sender<'_> {
    /// The row of the pod: it may send with its own addresses only, and an address names the device that it is behind.
    ///
    /// # Errors
    /// [`Reason::INVALID_SOURCE_IP`] or [`Reason::INVALID_SOURCE_MAC`].
    #[inline(always)]
    pub fn endpoint<'a>(&self, tables: &'a impl Tables, source: NetIp, family: u8) -> Result<&'a EndpointInfo, Reason> {
        match tables.endpoint(&EndpointKey::new(source, family)) {
            Some(row) if row.is_host() || row.ifindex != self.ifindex => Err(Reason::INVALID_SOURCE_IP),
            Some(row) if row.mac.octets != self.ethernet.source => Err(Reason::INVALID_SOURCE_MAC),
            Some(row) => Ok(row),
            None => Err(Reason::INVALID_SOURCE_IP),
        }
    }
}

/// `cil_from_container`: a packet that a pod sent, seen on the host side of its device pair.
#[inline(always)]
pub fn from_container<'a>(
    tables: &'a (impl Tables + Connections),
    config: &Config,
    sender: Sender<'_>,
    packet: &Packet,
    transport: Transport,
    about: &About,
) -> Verdict<'a> {
    let identity = match sender.endpoint(tables, packet.source, packet.family) {
        Ok(endpoint) => endpoint.sec_id,
        Err(reason) => return Verdict::Drop(reason),
    };
    // Nothing carries groups from pod to pod, and the node's own members of a group are none of a pod's business.
    if packet.is_for_a_group() {
        return Verdict::Drop(Reason::UNROUTABLE);
    }
    if sender.ethernet.is_for_a_group() {
        return Verdict::Drop(Reason::INVALID_DESTINATION_MAC);
    }
    // A tunnel packet of a pod's own would let it claim any identity.
    let to_tunnel_port = !config.native_routing() && u32::from(transport.destination_port()) == config.tunnel_port;
    if packet.protocol == protocol::UDP && !packet.later_fragment && to_tunnel_port {
        return Verdict::Drop(Reason::ENCAPSULATION_PROHIBITED);
    }
    let family = packet.family;
    let (goes_direct, length) = match about {
        About::Own(tcp) => (tcp.part == Part::Opens || goes_on(tables, tcp, Pod::Sends, family), tcp.length),
        About::Quoted(flow) => (tables.is_direct(flow, Pod::Receives, family), packet.length),
        About::Nothing => (cannot_be_translated(packet, transport), packet.length),
    };
    if !goes_direct || !may_go_direct(config, packet) {
        return Verdict::Stack { identity };
    }
    match tables.endpoint(&EndpointKey::new(packet.destination, family)) {
        Some(endpoint) if endpoint.is_host() => Verdict::Stack { identity },
        Some(endpoint) if both_know(tables, about, family) => Verdict::Deliver { endpoint, identity, direct: true },
        Some(_) => Verdict::Stack { identity },
        None => match place(tables, packet.destination, family) {
            // The stack fragments, or answers that the packet is too big.
            Place::Node(to) if length <= config.route_mtu && knows(tables, about, family) => {
                Verdict::Encapsulate { to, identity }
            }
            Place::NoEndpoint => Verdict::Drop(Reason::NO_TUNNEL_ENDPOINT),
            Place::Node(_) | Place::Elsewhere => Verdict::Stack { identity },
        },
    }
}

/// Whether a segment is of a connection that goes past the stack; that it ends one is noted.
#[inline(always)]
fn goes_on(tables: &impl Connections, tcp: &Tcp, pod: Pod, family: u8) -> bool {
    match tcp.part {
        Part::Ends | Part::Resets => tables.end(&tcp.flow, pod, tcp.part == Part::Resets, family),
        Part::Opens | Part::GoesOn => tables.is_direct(&tcp.flow, pod, family),
    }
}

/// Notes the connection that a pod's packet opens to another node, if it opens one; false when that cannot be noted.
#[inline(always)]
fn knows(tables: &impl Connections, about: &About, family: u8) -> bool {
    match about {
        About::Own(Tcp { flow, part: Part::Opens, .. }) => tables.go_direct(flow, Pod::Sends, family),
        _ => true,
    }
}

/// The same on one node, where each end is one of a pod, and the receiver's note has the end of a connection, too.
#[inline(always)]
fn both_know(tables: &impl Connections, about: &About, family: u8) -> bool {
    match about {
        About::Own(Tcp { flow, part: Part::Opens, .. }) => {
            tables.go_direct(flow, Pod::Sends, family) && tables.go_direct(flow, Pod::Receives, family)
        }
        About::Own(tcp) => {
            if tcp.part != Part::GoesOn {
                goes_on(tables, tcp, Pod::Receives, family);
            }
            true
        }
        _ => true,
    }
}

/// `cil_from_host`: a packet that the stack sends to `cilium_host`, its own or one that it forwards.
#[inline(always)]
pub fn from_host<'a>(
    tables: &'a (impl Tables + Connections),
    config: &Config,
    skb_mark: u32,
    packet: &Packet,
    about: &About,
) -> Verdict<'a> {
    if packet.stays_on_link() {
        return Verdict::Ignore;
    }
    if let About::Own(Tcp { flow, part: Part::Opens, .. }) = about {
        tables.go_by_stack(flow, Pod::Sends, packet.family);
        tables.go_by_stack(flow, Pod::Receives, packet.family);
    }
    let identity = match mark::magic(skb_mark) {
        mark::MAGIC_IDENTITY => mark::identity(skb_mark),
        mark::MAGIC_HOST => identity::HOST,
        _ => unmarked_source(tables, config, packet),
    };
    match tables.endpoint(&EndpointKey::new(packet.destination, packet.family)) {
        Some(endpoint) if endpoint.is_host() => Verdict::Stack { identity },
        Some(endpoint) => Verdict::Deliver { endpoint, identity, direct: false },
        None => match place(tables, packet.destination, packet.family) {
            Place::Node(to) => Verdict::Encapsulate { to, identity },
            Place::NoEndpoint => Verdict::Drop(Reason::NO_TUNNEL_ENDPOINT),
            // One that the stack was to answer and sent here again must not go round.
            Place::Elsewhere if mark::magic(skb_mark) != mark::MAGIC_UNREACHABLE => Verdict::Unreachable,
            Place::Elsewhere => Verdict::Drop(Reason::UNROUTABLE),
        },
    }
}

/// `cil_from_overlay`: a packet out of the tunnel.
#[inline(always)]
pub fn from_overlay<'a>(
    tables: &'a (impl Tables + Connections),
    config: &Config,
    vni: u32,
    packet: &Packet,
    transport: Transport,
    about: &About,
) -> Verdict<'a> {
    let Some(mut identity) = identity::from_vni(vni, packet.family, config.split_world()) else {
        return Verdict::Drop(Reason::INVALID_IDENTITY);
    };
    if identity == identity::REMOTE_NODE
        && let Some(row) = tables.ipcache(&IpPrefix::new(packet.source, packet.family))
        && identity::is_remote_node(row.sec_identity)
    {
        // The sender only knows that it is a node; the ipcache knows what else it is.
        identity = row.sec_identity;
    }
    match tables.endpoint(&EndpointKey::new(packet.destination, packet.family)) {
        None => Verdict::Unreachable,
        Some(endpoint) if endpoint.is_host() || !may_go_direct(config, packet) => Verdict::Stack { identity },
        Some(endpoint) => {
            let goes_direct = match about {
                About::Own(tcp) if tcp.part == Part::Opens => opens_direct(tables, packet, tcp),
                About::Own(tcp) => goes_on(tables, tcp, Pod::Receives, packet.family),
                About::Quoted(flow) => tables.is_direct(flow, Pod::Sends, packet.family),
                About::Nothing => cannot_be_translated(packet, transport),
            };
            if goes_direct {
                Verdict::Deliver { endpoint, identity, direct: true }
            } else {
                Verdict::Stack { identity }
            }
        }
    }
}

/// Notes a connection that is opened from another node, if what the pod answers goes back into the tunnel: to a node's
/// own address it may not, and then the stack must have seen the beginning.
#[inline(always)]
fn opens_direct(tables: &(impl Tables + Connections), packet: &Packet, tcp: &Tcp) -> bool {
    matches!(place(tables, packet.source, packet.family), Place::Node(_))
        && tables.go_direct(&tcp.flow, Pod::Receives, packet.family)
}

/// The identity of a source that no program has marked. Only a mark may claim the identity of a pod of this node, and
/// with a tunnel that of any pod: a packet that comes from outside with a pod's address is from the world. Without a
/// tunnel nothing but its address tells which pod of another node sent a packet.
#[inline(always)]
fn unmarked_source(tables: &impl Tables, config: &Config, packet: &Packet) -> u32 {
    match tables.ipcache(&IpPrefix::new(packet.source, packet.family)) {
        Some(row) if row.sec_identity == identity::HOST || identity::is_remote_node(row.sec_identity) => {
            row.sec_identity
        }
        Some(row)
            if config.native_routing()
                && tables.endpoint(&EndpointKey::new(packet.source, packet.family)).is_none() =>
        {
            row.sec_identity
        }
        _ => identity::world(packet.family, config.split_world()),
    }
}

/// Where an address is: its ipcache row's tunnel endpoint when that has one, else the tunnel map's longest match.
#[inline(always)]
fn place(tables: &impl Tables, ip: NetIp, family: u8) -> Place {
    let prefix = IpPrefix::new(ip, family);
    if let Some(row) = tables.ipcache(&prefix) {
        if row.flags & FLAG_SKIP_TUNNEL != 0 {
            return Place::Elsewhere;
        }
        if row.flags & FLAG_HAS_TUNNEL_ENDPOINT != 0 {
            return node(row.tunnel_endpoint, row.flags & FLAG_IPV6_TUNNEL_ENDPOINT != 0);
        }
    }
    match tables.tunnel(&prefix) {
        Some(row) => node(row.tunnel_endpoint, row.family == FAMILY_IPV6),
        None => Place::Elsewhere,
    }
}

#[inline(always)]
fn node(ip: NetIp, ipv6: bool) -> Place {
    if ip.is_unspecified() { Place::NoEndpoint } else { Place::Node(TunnelEndpoint { ip, ipv6 }) }
}

/// False where every packet passes the stack, and for packets whose hop count runs out, which it answers.
#[inline(always)]
fn may_go_direct(config: &Config, packet: &Packet) -> bool {
    !config.legacy_routing() && packet.hops > 1
}

/// True when the packet shows that kube-proxy translates no packet of its flow.
#[inline(always)]
fn cannot_be_translated(packet: &Packet, transport: Transport) -> bool {
    if packet.fragment {
        return false;
    }
    match packet.protocol {
        protocol::TCP | protocol::UDP | protocol::SCTP => false,
        // Behind these may be any protocol.
        protocol::HOP_BY_HOP
        | protocol::ROUTING
        | protocol::FRAGMENT
        | protocol::AUTHENTICATION
        | protocol::DESTINATION_OPTIONS => false,
        protocol::ICMP => packet.family == FAMILY_IPV4 && matches!(transport.icmp_type(), 0 | 8),
        protocol::ICMPV6 => packet.family == FAMILY_IPV6 && matches!(transport.icmp_type(), 128 | 129),
        _ => true,
    }
}

#[cfg(test)]
mod tests;

//! What becomes of a packet, once more and differently: written from the description of the datapath in docs/concepts.md and
//! from the RFCs, over bytes, slow and plain. It shares nothing with the programs but the layouts' numbers.

use std::{
    cell::RefCell,
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
};

use basal_datapath::plan::NodePlan;
use basal_maps::{identity, mark, reason::Reason};

use crate::bench::{EGRESS, HOST, INGRESS, LXC, OK, Outcome, REDIRECT, SHOT, checksum};

/// A pod of the node.
pub(crate) struct Pod {
    pub(crate) ifindex: u32,
    pub(crate) mac: [u8; 6],
    pub(crate) host_mac: [u8; 6],
    pub(crate) identity: u32,
    pub(crate) addresses: Vec<IpAddr>,
}

/// A node as its programs should see it.
pub(crate) struct Model {
    pub(crate) pods: Vec<Pod>,
    pub(crate) plan: NodePlan,
    /// TCP connections that go past the stack, as the node's pods send them.
    pub(crate) direct: RefCell<BTreeSet<[SocketAddr; 2]>>,
}

/// Both ends of a TCP segment, and whether it opens a connection.
struct Segment {
    ends: [SocketAddr; 2],
    opens: bool,
    /// What an ICMP error quotes goes the other way.
    quoted: bool,
}

/// An IP packet in a frame.
struct Ip {
    source: IpAddr,
    destination: IpAddr,
    hops: u8,
    protocol: u8,
    length: usize,
    /// Where the transport header begins in the frame.
    payload: usize,
    fragment: bool,
    first: bool,
}

fn bytes<const N: usize>(frame: &[u8], at: usize) -> Option<[u8; N]> {
    frame.get(at..at + N)?.try_into().ok()
}

fn word(frame: &[u8], at: usize) -> Option<u16> {
    bytes(frame, at).map(u16::from_be_bytes)
}

fn ethertype(frame: &[u8]) -> u16 {
    word(frame, 12).unwrap_or_default()
}

/// The packet, or why it is dropped.
fn ip(frame: &[u8]) -> Result<Ip, Reason> {
    let short = Reason::INVALID_PACKET;
    match ethertype(frame) {
        // RFC 791.
        0x0800 => {
            let header: [u8; 20] = bytes(frame, 14).ok_or(short)?;
            let (version, words) = (header[0] >> 4, usize::from(header[0] & 15));
            if version != 4 || words < 5 {
                return Err(short);
            }
            let more = header[6] & 0x20 != 0;
            let offset = u16::from_be_bytes([header[6] & 0x1f, header[7]]);
            let address = |at: usize| IpAddr::from(bytes::<4>(&header, at).unwrap());
            Ok(Ip {
                source: address(12),
                destination: address(16),
                hops: header[8],
                protocol: header[9],
                length: usize::from(u16::from_be_bytes([header[2], header[3]])),
                payload: 14 + 4 * words,
                fragment: more || offset > 0,
                first: offset == 0,
            })
        }
        // RFC 8200.
        0x86dd => {
            let header: [u8; 40] = bytes(frame, 14).ok_or(short)?;
            if header[0] >> 4 != 6 {
                return Err(short);
            }
            let address = |at: usize| IpAddr::from(bytes::<16>(&header, at).unwrap());
            let fragment = header[6] == 44;
            Ok(Ip {
                source: address(8),
                destination: address(24),
                hops: header[7],
                protocol: header[6],
                length: 40 + usize::from(u16::from_be_bytes([header[4], header[5]])),
                payload: 54,
                fragment,
                first: !fragment,
            })
        }
        // 802.1Q and 802.1ad.
        0x8100 | 0x88a8 => Err(Reason::VLAN_FILTERED),
        _ => Err(Reason::UNSUPPORTED_L3),
    }
}

/// The TCP segment in a whole packet, or the one that an ICMP error quotes (RFC 792, RFC 4443).
fn segment(frame: &[u8], ip: &Ip) -> Option<Segment> {
    let ports = |at: usize| Some([word(frame, at)?, word(frame, at + 2)?]);
    let ends = |[source, destination]: [IpAddr; 2], [from, to]: [u16; 2]| {
        [SocketAddr::new(source, from), SocketAddr::new(destination, to)]
    };
    let at = ip.payload;
    if ip.protocol == 6 {
        // RFC 9293: of FIN, SYN, RST and ACK the first one has only SYN.
        let flags = frame.get(at + 13)? & 0b1_0111;
        let ends = ends([ip.source, ip.destination], ports(at)?);
        return Some(Segment { ends, opens: flags == 0b10, quoted: false });
    }
    let v6 = ip.source.is_ipv6();
    // Without the rest of its first four bytes it is no ICMP message.
    let [kind, ..] = bytes::<4>(frame, at)?;
    let is_error = match ip.protocol {
        1 => !v6 && [3, 11, 12].contains(&kind),
        58 => v6 && (1..=4).contains(&kind),
        _ => false,
    };
    if !is_error {
        return None;
    }
    let quote = at + 8;
    let (addresses, protocol, transport) = if v6 {
        let addresses = [bytes::<16>(frame, quote + 8)?.into(), bytes::<16>(frame, quote + 24)?.into()];
        (addresses, *frame.get(quote + 6)?, quote + 40)
    } else {
        // A later fragment has no ports.
        if !(0x45..=0x4f).contains(frame.get(quote)?) || word(frame, quote + 6)? & 0x1fff != 0 {
            return None;
        }
        let addresses = [bytes::<4>(frame, quote + 12)?.into(), bytes::<4>(frame, quote + 16)?.into()];
        (addresses, *frame.get(quote + 9)?, quote + 4 * usize::from(frame.get(quote)? & 15))
    };
    (protocol == 6).then_some(Segment { ends: ends(addresses, ports(transport)?), opens: false, quoted: true })
}

fn is_for_a_group(address: IpAddr) -> bool {
    address.is_multicast() || address == IpAddr::from([255; 4])
}

/// What lies where.
enum Place<'a> {
    Pod(&'a Pod),
    Host,
    OtherNode,
    Elsewhere,
}

impl Model {
    fn pod_with(&self, address: IpAddr) -> Option<&Pod> {
        self.pods.iter().find(|pod| pod.addresses.contains(&address))
    }

    fn hosts(&self) -> BTreeSet<IpAddr> {
        let plan = &self.plan;
        let routers = [plan.routers.v4.map(IpAddr::from), plan.routers.v6.map(IpAddr::from)];
        routers.into_iter().flatten().chain(plan.node_ips.clone()).chain(plan.health_ips.clone()).collect()
    }

    fn place(&self, address: IpAddr) -> Place<'_> {
        if let Some(pod) = self.pod_with(address) {
            return Place::Pod(pod);
        }
        if self.hosts().contains(&address) {
            return Place::Host;
        }
        // Without a tunnel the stack finds the way, and the programs know none.
        if self.plan.routing.tunnel().is_none() {
            return Place::Elsewhere;
        }
        let mut cidrs = self.plan.remote_nodes.values().flat_map(|node| &node.pod_cidrs);
        if cidrs.any(|cidr| cidr.contains(&address)) { Place::OtherNode } else { Place::Elsewhere }
    }

    fn world(&self, address: IpAddr) -> u32 {
        match (self.plan.dual_stack, address.is_ipv4()) {
            (false, _) => identity::WORLD,
            (true, true) => identity::WORLD_IPV4,
            (true, false) => identity::WORLD_IPV6,
        }
    }

    /// Whether kube-proxy can have nothing to do with what a pod sends, so that it need not pass the stack.
    fn may_go_direct(&self, frame: &[u8], ip: &Ip) -> bool {
        if self.plan.legacy_routing || ip.fragment || ip.hops <= 1 {
            return false;
        }
        if let Some(segment) = segment(frame, ip) {
            let [from, to] = segment.ends;
            let sent = if segment.quoted { [to, from] } else { [from, to] };
            return segment.opens || self.direct.borrow().contains(&sent);
        }
        let icmp_type = frame.get(ip.payload..ip.payload + 4).map_or(0, |start| start[0]);
        let may_be_translated = match ip.protocol {
            // TCP, UDP, SCTP; extension headers, behind which they may be.
            6 | 17 | 132 | 0 | 43 | 44 | 51 | 60 => true,
            // Only echoes quote nothing.
            1 => !(ip.source.is_ipv4() && [0, 8].contains(&icmp_type)),
            58 => !(ip.source.is_ipv6() && [128, 129].contains(&icmp_type)),
            _ => false,
        };
        !may_be_translated
    }

    /// Notes the connection that a segment opens past the stack.
    fn note(&self, frame: &[u8], ip: &Ip, both: bool) {
        if let Some(Segment { ends: [from, to], opens: true, .. }) = segment(frame, ip) {
            let mut direct = self.direct.borrow_mut();
            direct.insert([from, to]);
            if both {
                direct.insert([to, from]);
            }
        }
    }

    /// `cil_from_container` on the device with an index.
    pub(crate) fn pod_sends(&self, ifindex: u32, frame: &[u8]) -> Outcome {
        match self.try_pod_sends(ifindex, frame) {
            Ok(outcome) => outcome,
            Err(reason) => dropped(frame, 0, reason, LXC),
        }
    }

    fn try_pod_sends(&self, ifindex: u32, frame: &[u8]) -> Result<Outcome, Reason> {
        if ethertype(frame) == 0x0806 {
            return self.answer_arp(ifindex, frame);
        }
        let ip = ip(frame)?;
        let start = bytes::<4>(frame, ip.payload).filter(|_| ip.first).unwrap_or_default();
        if ip.source.is_ipv6() && ip.protocol == 58 && start[0] == 135 {
            return self.answer_solicitation(ifindex, frame, ip.source);
        }
        let sender = self.sender(ifindex, frame, ip.source)?;
        if is_for_a_group(ip.destination) {
            return Err(Reason::UNROUTABLE);
        }
        if frame[0] & 1 == 1 {
            return Err(Reason::INVALID_DESTINATION_MAC);
        }
        let port = u16::from_be_bytes([start[2], start[3]]);
        if ip.protocol == 17 && ip.first && self.plan.routing.tunnel().is_some_and(|tunnel| tunnel.port == port) {
            return Err(Reason::ENCAPSULATION_PROHIBITED);
        }
        let stack = passed(frame, sender.identity, LXC);
        if !self.may_go_direct(frame, &ip) {
            return Ok(stack);
        }
        Ok(match self.place(ip.destination) {
            Place::Pod(pod) => {
                self.note(frame, &ip, true);
                deliver(frame, pod, Some(&ip))
            }
            Place::OtherNode if ip.length <= usize::try_from(self.plan.route_mtu()).unwrap() => {
                self.note(frame, &ip, false);
                sent(frame, 0, EGRESS, LXC)
            }
            Place::Host | Place::OtherNode | Place::Elsewhere => stack,
        })
    }

    /// The pod behind a device, when the frame names its address and its MAC address.
    fn sender(&self, ifindex: u32, frame: &[u8], address: IpAddr) -> Result<&Pod, Reason> {
        let pod = self.pod_with(address).filter(|pod| pod.ifindex == ifindex).ok_or(Reason::INVALID_SOURCE_IP)?;
        if frame[6..12] == pod.mac { Ok(pod) } else { Err(Reason::INVALID_SOURCE_MAC) }
    }

    /// RFC 826, for the router's address and the pod behind the device.
    fn answer_arp(&self, ifindex: u32, frame: &[u8]) -> Result<Outcome, Reason> {
        let arp: [u8; 28] = bytes(frame, 14).ok_or(Reason::INVALID_PACKET)?;
        let ignored = Outcome { action: OK, frame: frame.to_vec(), mark: 0, counted: Vec::new() };
        // A probe (RFC 5227) has no sender's address.
        if arp[..6] != [0, 1, 8, 0, 6, 4] || arp[14..18] == [0; 4] {
            return Ok(ignored);
        }
        if arp[8..14] != frame[6..12] {
            return Err(Reason::INVALID_SOURCE_MAC);
        }
        let pod = self.sender(ifindex, frame, IpAddr::from(bytes::<4>(&arp, 14).unwrap()))?;
        if arp[6..8] != [0, 1] || self.plan.routers.v4.is_none_or(|router| arp[24..28] != router.octets()) {
            return Ok(ignored);
        }
        let mut reply = frame.to_vec();
        reply[..6].copy_from_slice(&frame[6..12]);
        reply[6..12].copy_from_slice(&pod.host_mac);
        reply[21] = 2;
        reply[22..28].copy_from_slice(&pod.host_mac);
        reply[28..32].copy_from_slice(&arp[24..28]);
        reply[32..42].copy_from_slice(&arp[8..18]);
        Ok(Outcome { action: REDIRECT, frame: reply, mark: 0, counted: Vec::new() })
    }

    /// RFC 4861, for the router's address.
    fn answer_solicitation(&self, ifindex: u32, frame: &[u8], source: IpAddr) -> Result<Outcome, Reason> {
        let message: [u8; 78] = bytes(frame, 0).ok_or(Reason::INVALID_PACKET)?;
        let router = self.plan.routers.v6.map(|router| router.octets());
        let valid = message[21] == 255 && message[55] == 0 && message[22..38] != [0; 16];
        if !valid || router.is_none_or(|router| message[62..78] != router) {
            return Err(Reason::UNKNOWN_TARGET);
        }
        let link_local = matches!(source, IpAddr::V6(v6) if v6.is_unicast_link_local());
        let mac = match self.sender(ifindex, frame, source) {
            Ok(pod) => pod.host_mac,
            // Sent to one receiver it repeats an answer that was given.
            Err(_) if link_local && frame[0] & 1 == 0 => bytes::<6>(frame, 0).unwrap(),
            Err(reason) => return Err(reason),
        };
        let mut answer = message[..78].to_vec();
        answer[..6].copy_from_slice(&message[6..12]);
        answer[6..12].copy_from_slice(&mac);
        answer[14..20].copy_from_slice(&[0x60, 0, 0, 0, 0, 32]);
        answer[22..38].copy_from_slice(&message[62..78]);
        answer[38..54].copy_from_slice(&message[22..38]);
        answer[54] = 136;
        answer[56..58].fill(0);
        answer[58..62].copy_from_slice(&[0xe0, 0, 0, 0]);
        answer.extend([2, 1]);
        answer.extend(mac);
        // RFC 4443, 2.3: over a pseudo-header of addresses, length and protocol, and the message.
        let pseudo = [&answer[22..54], &[0, 0, 0, 32, 0, 0, 0, 58], &answer[54..]].concat();
        let sum = checksum(&pseudo).to_be_bytes();
        answer[56..58].copy_from_slice(&sum);
        Ok(Outcome { action: REDIRECT, frame: answer, mark: 0, counted: Vec::new() })
    }

    /// `cil_from_host`.
    pub(crate) fn host_sends(&self, skb_mark: u32, frame: &[u8]) -> Outcome {
        let ip = match ip(frame) {
            Ok(ip) => ip,
            Err(reason) => return dropped(frame, skb_mark, reason, HOST),
        };
        let link_local = match ip.destination {
            IpAddr::V4(v4) => v4.is_link_local(),
            IpAddr::V6(v6) => v6.is_unicast_link_local(),
        };
        if link_local || is_for_a_group(ip.destination) {
            return Outcome { action: OK, frame: frame.to_vec(), mark: skb_mark, counted: Vec::new() };
        }
        if let Some(Segment { ends: [from, to], opens: true, .. }) = segment(frame, &ip).filter(|_| !ip.fragment) {
            // kube-proxy may have made it what it is.
            self.direct.borrow_mut().retain(|ends| *ends != [from, to] && *ends != [to, from]);
        }
        match self.place(ip.destination) {
            Place::Pod(pod) => deliver(frame, pod, None),
            Place::OtherNode => sent(frame, skb_mark, EGRESS, HOST),
            // The stack answers, and is asked to no more than once.
            Place::Elsewhere if skb_mark & 0xf00 != 0x700 => {
                Outcome { action: REDIRECT, mark: 0x700, ..dropped(frame, skb_mark, Reason::UNROUTABLE, HOST) }
            }
            Place::Elsewhere => dropped(frame, skb_mark, Reason::UNROUTABLE, HOST),
            Place::Host => passed(frame, self.identity_of(skb_mark, ip.source), HOST),
        }
    }

    /// Who sent what the stack sends: as its mark says, else by the address, of nodes only.
    fn identity_of(&self, skb_mark: u32, source: IpAddr) -> u32 {
        match skb_mark & 0xf00 {
            0xf00 => (skb_mark & 0xff) << 16 | skb_mark >> 16,
            0xc00 => identity::HOST,
            _ if self.hosts().contains(&source) => identity::HOST,
            _ => {
                let mut remote = self.plan.remote_nodes.values();
                let of_node = |ips: &BTreeSet<IpAddr>| ips.contains(&source);
                if remote.any(|node| of_node(&node.node_ips) || of_node(&node.router_ips)) {
                    identity::REMOTE_NODE
                } else {
                    self.world(source)
                }
            }
        }
    }
}

fn dropped(frame: &[u8], mark: u32, reason: Reason, file: u8) -> Outcome {
    Outcome { action: SHOT, frame: frame.to_vec(), mark, counted: vec![(reason.0, EGRESS, file, 1)] }
}

fn sent(frame: &[u8], mark: u32, direction: u8, file: u8) -> Outcome {
    Outcome { action: REDIRECT, frame: frame.to_vec(), mark, counted: vec![(0, direction, file, 1)] }
}

/// To the stack, with the sender's identity.
fn passed(frame: &[u8], identity: u32, file: u8) -> Outcome {
    let mark = mark::encode(mark::MAGIC_IDENTITY, identity);
    Outcome { action: OK, frame: frame.to_vec(), mark, counted: vec![(0, EGRESS, file, 1)] }
}

/// To a pod. The direct path counts the hop itself.
fn deliver(frame: &[u8], pod: &Pod, direct: Option<&Ip>) -> Outcome {
    let mut frame = frame.to_vec();
    frame[..6].copy_from_slice(&pod.mac);
    frame[6..12].copy_from_slice(&pod.host_mac);
    match direct {
        Some(ip) if ip.source.is_ipv4() => {
            frame[22] -= 1;
            let was = !u16::from_be_bytes([frame[24], frame[25]]);
            // RFC 1624, equation 3: HC' = ~(~HC + ~m + m').
            let (old, new) = (u16::from(ip.hops) << 8, u16::from(ip.hops - 1) << 8);
            let mut sum = u32::from(was) + u32::from(!old) + u32::from(new);
            while sum > 0xffff {
                sum = (sum & 0xffff) + (sum >> 16);
            }
            let sum = !u16::try_from(sum).unwrap();
            frame[24..26].copy_from_slice(&sum.to_be_bytes());
        }
        Some(_) => frame[21] -= 1,
        None => {}
    }
    Outcome { action: REDIRECT, frame, mark: 0, counted: vec![(0, INGRESS, LXC, 1)] }
}

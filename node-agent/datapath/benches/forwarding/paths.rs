//! A packet for each main path through the programs.

use basal_datapath::state::Symbol;
use basal_maps::{mark, reason::Reason};

use crate::bench::{ECHO, ICMP, IDENTITY, OK, REDIRECT, SHOT, TCP, UDP, arp, ipv4, ipv6, solicitation};

/// A packet, where it goes, and what becomes of it.
pub(crate) struct Packet {
    pub(crate) symbol: Symbol,
    /// The path, in words.
    pub(crate) path: &'static str,
    pub(crate) mark: u32,
    pub(crate) frame: Vec<u8>,
    /// What the program returns.
    pub(crate) action: u32,
    /// The reason that it is counted by; `None` where nothing counts it.
    pub(crate) reason: Option<u8>,
    /// What a second run would find.
    pub(crate) again: Again,
}

/// Whether a program leaves the packet so that it takes the same path once more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Again {
    /// It does.
    Same,
    /// It does not.
    Changed,
}

/// Those of one configuration.
pub(crate) fn packets(legacy_routing: bool, tunnel: bool) -> Vec<Packet> {
    match (tunnel, legacy_routing) {
        (true, true) => [from_pods(), from_host(), others()].into_iter().flatten().collect(),
        (true, false) => direct(),
        (false, _) => native(),
    }
}

const POD: &str = "10.1.1.7";
const BESIDE: &str = "10.1.1.8";
const REMOTE: &str = "10.1.2.7";
const NOBODY: &str = "10.1.1.99";
const POD_V6: &str = "fd00:1:1::7";
const REMOTE_V6: &str = "fd00:1:2::7";

fn tcp(source: &str, destination: &str) -> Vec<u8> {
    ipv4(source, destination, TCP, &[0; 20])
}

fn tcp_v6() -> Vec<u8> {
    ipv6(POD_V6, REMOTE_V6, TCP, 64, &[0; 20])
}

fn forwarded(action: u32) -> (u32, Option<Reason>) {
    (action, Some(Reason::FORWARDED))
}

fn dropped(reason: Reason) -> (u32, Option<Reason>) {
    (SHOT, Some(reason))
}

/// What a pod sends with legacy host routing.
fn from_pods() -> Vec<Packet> {
    let program = Of { symbol: Symbol::FromContainer, mark: 0 };
    let (same, changed) = (Again::Same, Again::Changed);
    vec![
        program.packet("TCP to the stack", tcp(POD, REMOTE), forwarded(OK), same),
        program.packet("TCP to the stack, IPv6", tcp_v6(), forwarded(OK), same),
        program.packet("UDP to the stack", ipv4(POD, REMOTE, UDP, &[0; 8]), forwarded(OK), same),
        program.packet("dropped for its source", tcp(BESIDE, REMOTE), dropped(Reason::INVALID_SOURCE_IP), same),
        program.packet("ARP answered", arp([10, 1, 1, 1]), (REDIRECT, None), changed),
        program.packet("NDP answered", solicitation(POD_V6, "fd00:1:1::1", &[]), (REDIRECT, None), changed),
    ]
}

/// What the stack sends to `cilium_host` with a tunnel.
fn from_host() -> Vec<Packet> {
    let program = Of { symbol: Symbol::FromHost, mark: mark::encode(mark::MAGIC_IDENTITY, IDENTITY) };
    let unmarked = Of { symbol: Symbol::FromHost, mark: 0 };
    let (same, changed) = (Again::Same, Again::Changed);
    vec![
        // Delivery takes the mark away, and without one the source has to be looked up.
        program.packet("to a pod of this node", tcp(POD, BESIDE), forwarded(REDIRECT), changed),
        unmarked.packet("unmarked, to a pod of this node", tcp(REMOTE, POD), forwarded(REDIRECT), same),
        program.packet("into the tunnel", tcp(POD, REMOTE), forwarded(REDIRECT), same),
        program.packet("into the tunnel, IPv6", tcp_v6(), forwarded(REDIRECT), same),
    ]
}

/// Programs that only look, or that need tunnel information, which a packet has when a tunnel carried it.
fn others() -> Vec<Packet> {
    let program = |symbol| Of { symbol, mark: 0 };
    let (no_key, frame) = (dropped(Reason::NO_TUNNEL_KEY), || tcp(REMOTE, POD));
    vec![
        program(Symbol::ToHost).packet("to the stack", frame(), forwarded(OK), Again::Same),
        program(Symbol::ToOverlay).packet("no tunnel information", frame(), (OK, None), Again::Same),
        program(Symbol::FromOverlay).packet("dropped, no tunnel information", frame(), no_key, Again::Same),
    ]
}

/// What a pod sends without legacy host routing: only what kube-proxy never translates goes past the stack. The packets that
/// open connections come before those that are of them.
fn direct() -> Vec<Packet> {
    let program = Of { symbol: Symbol::FromContainer, mark: 0 };
    let echo = |destination| ipv4(POD, destination, ICMP, &ECHO);
    let mut open = [0; 20];
    open[13] = 2;
    vec![
        program.packet("TCP to the stack", tcp(POD, REMOTE), forwarded(OK), Again::Same),
        program.packet("TCP opened into the tunnel", ipv4(POD, REMOTE, TCP, &open), forwarded(REDIRECT), Again::Same),
        program.packet("TCP into the tunnel", tcp(POD, REMOTE), forwarded(REDIRECT), Again::Same),
        program.packet("TCP opened, IPv6", ipv6(POD_V6, REMOTE_V6, TCP, 64, &open), forwarded(REDIRECT), Again::Same),
        program.packet("TCP into the tunnel, IPv6", tcp_v6(), forwarded(REDIRECT), Again::Same),
        program.packet("TCP opened on one node", ipv4(POD, BESIDE, TCP, &open), forwarded(REDIRECT), Again::Changed),
        program.packet("TCP to a pod of this node", tcp(POD, BESIDE), forwarded(REDIRECT), Again::Changed),
        program.packet("echo to a pod of this node", echo(BESIDE), forwarded(REDIRECT), Again::Changed),
        program.packet("echo into the tunnel", echo(REMOTE), forwarded(REDIRECT), Again::Same),
    ]
}

/// Without a tunnel.
fn native() -> Vec<Packet> {
    let (pod, host) = (Of { symbol: Symbol::FromContainer, mark: 0 }, Of { symbol: Symbol::FromHost, mark: 0 });
    let nobody = (REDIRECT, Some(Reason::UNROUTABLE));
    vec![
        pod.packet("TCP to the stack", tcp(POD, REMOTE), forwarded(OK), Again::Same),
        host.packet("from another node to a pod", tcp(REMOTE, POD), forwarded(REDIRECT), Again::Same),
        host.packet("back for an ICMP error", tcp(REMOTE, NOBODY), nobody, Again::Changed),
    ]
}

/// Where programs masquerade. The first packet makes the flow that the others are of.
pub(crate) fn masquerading() -> Vec<Packet> {
    const NODE: &str = "172.16.0.1";
    const OUTSIDE: &str = "172.16.0.2";
    let [leaves, arrives] = [Symbol::ToNetdev, Symbol::FromNetdev].map(|symbol| Of { symbol, mark: 0 });
    let ported = |source, destination, ports: [u8; 4]| ipv4(source, destination, TCP, &[&ports[..], &[0; 16]].concat());
    let (sent, received) = ([0x9c, 0x40, 0, 80], [0, 80, 0x9c, 0x40]);
    // On to the next program (`TCX_NEXT`, linux/bpf.h).
    let uncounted = (u32::MAX, None);
    vec![
        leaves.packet("TCP of a pod to the outside", ported(POD, OUTSIDE, sent), uncounted, Again::Changed),
        arrives.packet("TCP back to a pod", ported(OUTSIDE, NODE, received), uncounted, Again::Changed),
        leaves.packet("TCP of the node itself", ported(NODE, OUTSIDE, [0xc3, 0x50, 0, 80]), uncounted, Again::Same),
        arrives.packet("TCP to the node itself", ported(OUTSIDE, NODE, [0x9c, 0x40, 0, 80]), uncounted, Again::Same),
    ]
}

/// A program, and the mark that its packets have.
#[derive(Clone, Copy)]
struct Of {
    symbol: Symbol,
    mark: u32,
}

impl Of {
    fn packet(self, path: &'static str, frame: Vec<u8>, fate: (u32, Option<Reason>), again: Again) -> Packet {
        let (action, reason) = fate;
        Packet { symbol: self.symbol, path, mark: self.mark, frame, action, reason: reason.map(|it| it.0), again }
    }
}

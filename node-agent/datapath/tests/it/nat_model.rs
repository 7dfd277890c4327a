//! Packets of flows drawn at random through the programs that masquerade, compared with a model that was written apart from
//! them: which source a packet leaves with, where an answer and an ICMP error go, every byte that comes out.
//!
//! Which free port a flow gets is random, so the model takes it from the packet; that it is free, and stays the flow's, it
//! knows itself.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use proptest::{
    prelude::*,
    sample::{Index, select},
    test_runner::Config,
};

use crate::{
    bench::{Bench, EGRESS, HOST, ICMP, ICMPV6, Outcome, SHOT, TCP, UDP, checksum, ethernet},
    differential::damage,
    draw::{draw, runner},
    harness::sandbox,
    netdev::{GRE, NEXT, NODE, OTHER_POD, POD, ROUTER, WEB},
};

/// Packets of a round.
const PACKETS: u32 = 1000;
/// Networks that pods' packets go to as they are, one address each.
const EXEMPT: [&str; 2] = ["198.18.0.1", "fd18::1"];
/// Ports of which some are used by several.
const PORTS: [u16; 8] = [0, 1, 443, 1024, 32767, 32768, 40000, 65535];
/// The first port that masqueraded packets leave with.
const FIRST: u16 = 32768;
/// `NO_NAT_MAPPING` (pkg/monitor/api, Cilium 1.20).
const NO_NAT_MAPPING: u8 = 167;

/// One end of a flow: for ICMP echoes the port of the asking end is the identifier, and that of the other end 0.
type End = (IpAddr, u16);

/// What a packet is apart from its ends.
#[derive(Debug, Clone)]
struct Body {
    family: usize,
    protocol: u8,
    /// An echo's reply.
    reply: bool,
    /// Bytes of IPv4 options, or an IPv6 header of options; in units of 4 and 8.
    options: u8,
    hops: u8,
    data: Vec<u8>,
}

/// Who sends, to whom.
#[derive(Debug, Clone, Copy)]
enum Step {
    /// One of the pods or the node, by the device that masquerades.
    Out { from: usize, to: usize },
    /// A machine outside to the node or a pod.
    In { from: usize, to: usize },
    /// The answer to a packet that left.
    Answer(Index),
    /// A router's error about a packet that left.
    Error(Index),
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

/// Fills a checksum in, over a pseudo header where there is one.
fn sum(pseudo: &[u8], payload: &mut [u8], at: usize) {
    let value = checksum(&[pseudo, payload].concat());
    payload[at..at + 2].copy_from_slice(&value.to_be_bytes());
}

impl Body {
    fn is_echo(&self) -> bool {
        matches!(self.protocol, ICMP | ICMPV6)
    }

    /// The packet between two ends, in a frame.
    fn frame(&self, from: End, to: End) -> Vec<u8> {
        ethernet(if self.family == 0 { 0x0800 } else { 0x86dd }, &self.packet(from, to))
    }

    fn packet(&self, from: End, to: End) -> Vec<u8> {
        let payload = self.payload(from, to);
        if self.family == 0 {
            let mut header = vec![0; 20];
            header.resize(20 + 4 * usize::from(self.options), 1);
            header[0] = 0x45 + self.options;
            let length = u16::try_from(header.len() + payload.len()).unwrap();
            header[2..4].copy_from_slice(&length.to_be_bytes());
            (header[6], header[8], header[9]) = (0x40, self.hops, self.protocol);
            header[12..16].copy_from_slice(&octets(from.0));
            header[16..20].copy_from_slice(&octets(to.0));
            sum(&[], &mut header, 10);
            return [header, payload].concat();
        }
        // A header of destination options that is all padding (RFC 8200, section 4.2).
        let options = [60, 0, 1, 4, 0, 0, 0, 0].repeat(usize::from(self.options));
        let mut packet = [vec![0x60, 0, 0, 0], vec![0; 2], vec![self.protocol, self.hops]].concat();
        packet.extend([octets(from.0), octets(to.0), options, payload].concat());
        let length = u16::try_from(packet.len() - 40).unwrap();
        packet[4..6].copy_from_slice(&length.to_be_bytes());
        if self.options > 0 {
            packet[6] = 60;
            let last = 40 + 8 * (usize::from(self.options) - 1);
            packet[last] = self.protocol;
        }
        packet
    }

    /// The transport header with its checksum, and the data.
    fn payload(&self, from: End, to: End) -> Vec<u8> {
        let ports = [from.1.to_be_bytes(), to.1.to_be_bytes()].concat();
        let (mut payload, at) = match self.protocol {
            TCP => ([ports, vec![0, 0, 0, 1, 0, 0, 0, 0, 0x50, 0x10, 0xff, 0xff, 0, 0, 0, 0]].concat(), 16),
            UDP => {
                ([ports, u16::try_from(8 + self.data.len()).unwrap().to_be_bytes().to_vec(), vec![0; 2]].concat(), 6)
            }
            GRE => return [&[0, 0, 0x08, 0x00][..], &self.data].concat(),
            _ => {
                let kind = [[8, 128], [0, 129]][usize::from(self.reply)][self.family];
                let id = if self.reply { to.1 } else { from.1 };
                ([vec![kind, 0, 0, 0], id.to_be_bytes().to_vec(), vec![0, 1]].concat(), 2)
            }
        };
        payload.extend(&self.data);
        let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
        let pseudo = [octets(from.0), octets(to.0), length.to_vec(), vec![0, 0, 0, self.protocol]].concat();
        sum(if self.protocol == ICMP { &[] } else { &pseudo }, &mut payload, at);
        payload
    }
}

/// What is known of flows.
#[derive(Default)]
struct Model {
    /// The end that a flow left with, by protocol, its own end and the other one.
    left: BTreeMap<(u8, End, End), End>,
    /// Whose answers come to an end of the node, by protocol, that end and the other one.
    holders: BTreeMap<(u8, End, End), End>,
    /// Connections that somebody outside opened to a pod.
    opened: BTreeSet<(u8, End, End)>,
    /// Packets that left, for answers and errors: what they were, their own end, the end they left with, the other one.
    sent: Vec<(Body, End, End, End)>,
}

/// What must come out.
#[derive(Debug, PartialEq)]
enum Expected {
    Frame(Vec<u8>),
    Drop(u8),
}

impl Model {
    /// What leaves. `actual` is the source port that came out.
    fn leaves(&mut self, body: &Body, from: End, to: End, actual: Option<u16>) -> Expected {
        let node = ip(NODE[body.family]);
        let as_is = Expected::Frame(body.frame(from, to));
        let (own, ported) = (from.0 == node, matches!(body.protocol, TCP | UDP));
        let flow = (body.protocol, from, to);
        let exempt = to.0 == ip(EXEMPT[body.family]);
        if own && (ported && from.1 < FIRST) || !own && (exempt || self.opened.contains(&(body.protocol, to, from))) {
            return as_is;
        }
        let holder = |model: &Self, port: u16| model.holders.get(&(body.protocol, (node, port), to)).copied();
        let port = match self.left.get(&flow) {
            Some(left) if holder(self, left.1) == Some(from) => left.1,
            // Nothing but the address can change: the node goes first.
            _ if body.protocol == GRE && own => 0,
            _ if body.protocol == GRE => {
                if holder(self, 0).is_some_and(|other| other != from) {
                    return Expected::Drop(NO_NAT_MAPPING);
                }
                0
            }
            _ if (!ported || from.1 >= FIRST) && holder(self, from.1).is_none_or(|other| other == from) => from.1,
            _ => {
                let port = actual.expect("a flow whose port is taken gets another one");
                assert!(port >= FIRST, "{port} is no port for packets of pods");
                assert_eq!(holder(self, port), None, "port {port} has two flows");
                port
            }
        };
        let left = (node, port);
        self.left.insert(flow, left);
        self.holders.insert((body.protocol, left, to), from);
        self.sent.push((body.clone(), from, left, to));
        Expected::Frame(body.frame(left, to))
    }

    /// What comes in from outside.
    fn arrives(&mut self, body: &Body, from: End, to: End) -> Vec<u8> {
        let node = ip(NODE[body.family]);
        if to.0 != node {
            // An answer opens nothing, nor does what belongs to a flow of the pod.
            if !body.reply && !self.left.contains_key(&(body.protocol, to, from)) {
                self.opened.insert((body.protocol, from, to));
            }
            return body.frame(from, to);
        }
        let is_answer = !body.is_echo() || body.reply;
        let holder = self.holders.get(&(body.protocol, to, from)).filter(|_| is_answer);
        body.frame(from, holder.copied().unwrap_or(to))
    }
}

/// An ICMP error with what it quotes.
fn error(family: usize, to: IpAddr, quoted: &[u8]) -> Vec<u8> {
    let body = Body { family, protocol: [ICMP, ICMPV6][family], reply: false, options: 0, hops: 63, data: Vec::new() };
    let from = ip(ROUTER[family]);
    let mut message = [&[[11, 3][family], 0, 0, 0, 0, 0, 0, 0][..], quoted].concat();
    let length = u32::try_from(message.len()).unwrap().to_be_bytes();
    let pseudo = [octets(from), octets(to), length.to_vec(), vec![0, 0, 0, body.protocol]].concat();
    sum(if family == 0 { &[] } else { &pseudo }, &mut message, 2);
    // A packet without data has eight bytes of an echo, which these replace.
    let packet = body.packet((from, 0), (to, 0));
    let header = packet.len() - 8;
    let mut packet = [&packet[..header], &message].concat();
    if family == 0 {
        let length = u16::try_from(packet.len()).unwrap().to_be_bytes();
        packet[2..4].copy_from_slice(&length);
        packet[10..12].fill(0);
        sum(&[], &mut packet[..20], 10);
        ethernet(0x0800, &packet)
    } else {
        let length = u16::try_from(message.len()).unwrap().to_be_bytes();
        packet[4..6].copy_from_slice(&length);
        ethernet(0x86dd, &packet)
    }
}

/// The source port or identifier of a frame that came out.
fn port_of(body: &Body, frame: &[u8]) -> Option<u16> {
    let header = [20 + 4 * usize::from(body.options), 40 + 8 * usize::from(body.options)][body.family];
    let at = 14 + header + if body.is_echo() { 4 } else { 0 };
    Some(u16::from_be_bytes(frame.get(at..at + 2)?.try_into().ok()?))
}

fn came_out(outcome: Outcome) -> Expected {
    match (outcome.action, &outcome.counted[..]) {
        (NEXT, []) => Expected::Frame(outcome.frame),
        (SHOT, [(reason, EGRESS, HOST, 1)]) => Expected::Drop(*reason),
        other => panic!("neither passed nor dropped once: {other:?}"),
    }
}

fn run(bench: &Bench, model: &mut Model, mut body: Body, step: Step, ports: (u16, u16)) {
    let family = body.family;
    match step {
        Step::Out { from, to } => {
            let from = (ip([POD, OTHER_POD, NODE][from][family]), ports.0);
            let to = (ip([WEB, ROUTER, EXEMPT][to][family]), ports.1);
            body.reply = false;
            let (from, to) = ends(&body, from, to);
            let frame = body.frame(from, to);
            let outcome = bench.node_sends(&frame);
            let actual = port_of(&body, &outcome.frame);
            let expected = model.leaves(&body, from, to, actual);
            assert_eq!(came_out(outcome), expected, "{body:?} from {from:?} to {to:?}");
        }
        Step::In { from, to } => {
            let from = (ip([WEB, ROUTER][from][family]), ports.0);
            let to = (ip([NODE, POD][to][family]), ports.1);
            let (from, to) = ends(&body, from, to);
            let outcome = bench.node_receives(&body.frame(from, to));
            let expected = model.arrives(&body, from, to);
            assert_eq!(came_out(outcome), Expected::Frame(expected), "{body:?} from {from:?} to {to:?}");
        }
        Step::Answer(index) => {
            if model.sent.is_empty() {
                return;
            }
            let (sent, _, left, to) = index.get(&model.sent).clone();
            let answer = Body { reply: true, hops: body.hops, data: body.data, ..sent };
            let outcome = bench.node_receives(&answer.frame(to, left));
            let expected = model.arrives(&answer, to, left);
            assert_eq!(came_out(outcome), Expected::Frame(expected), "the answer to {left:?} from {to:?}");
        }
        Step::Error(index) => {
            if model.sent.is_empty() {
                return;
            }
            let (sent, own, left, to) = index.get(&model.sent).clone();
            // Behind other headers in what is quoted nobody looks.
            if sent.family == 1 && sent.options > 0 || model.holders.get(&(sent.protocol, left, to)) != Some(&own) {
                return;
            }
            let outcome = bench.node_receives(&error(sent.family, left.0, &sent.packet(left, to)));
            let expected = error(sent.family, own.0, &sent.packet(own, to));
            assert_eq!(came_out(outcome), Expected::Frame(expected), "an error about {sent:?} from {left:?} to {to:?}");
        }
    }
}

/// The ends of a flow: of echoes only who asks has a number, and where there are no ports nobody has.
fn ends(body: &Body, from: End, to: End) -> (End, End) {
    match (body.protocol, body.reply) {
        (GRE, _) => ((from.0, 0), (to.0, 0)),
        (ICMP | ICMPV6, false) => (from, (to.0, 0)),
        (ICMP | ICMPV6, true) => ((from.0, 0), to),
        _ => (from, to),
    }
}

fn bodies() -> impl Strategy<Value = Body> {
    let fields = (0..2_usize, 0..8_usize, any::<bool>(), prop_oneof![4 => Just(0_u8), 1 => 1..3_u8]);
    (fields, select(&[1_u8, 64, 255][..]), prop::collection::vec(any::<u8>(), 0..40)).prop_map(
        |((family, kind, reply, options), hops, data)| {
            let echo = [ICMP, ICMPV6][family];
            let protocol = [TCP, TCP, TCP, UDP, UDP, UDP, echo, GRE][kind];
            Body { family, protocol, reply: reply && protocol == echo, options, hops, data }
        },
    )
}

fn steps() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => (0..3_usize, 0..3_usize).prop_map(|(from, to)| Step::Out { from, to }),
        2 => (0..2_usize, 0..2_usize).prop_map(|(from, to)| Step::In { from, to }),
        4 => any::<Index>().prop_map(Step::Answer),
        3 => any::<Index>().prop_map(Step::Error),
    ]
}

/// A round is over long before the first flow's time is (a minute), of which the model knows nothing.
#[test]
fn flows_are_masqueraded_as_the_model_says() {
    for round in 0..draw(PACKETS).cases.div_ceil(PACKETS) {
        sandbox(|bpffs| {
            let bench = Bench::masquerading(bpffs);
            let model = RefCell::new(Model::default());
            // A packet goes on where the last one ended, so there is nothing to shrink.
            let config = Config { cases: PACKETS, max_shrink_iters: 0, ..draw(PACKETS) };
            let packets = (bodies(), steps(), select(&PORTS[..]), select(&PORTS[..]));
            let result = runner(config, round).run(&packets, |(body, step, from, to)| {
                run(&bench, &mut model.borrow_mut(), body, step, (from, to));
                Ok(())
            });
            result.unwrap();
            let model = model.into_inner();
            let moved = model.left.iter().filter(|((_, own, _), left)| own.1 != left.1).count();
            let opened = model.opened.len();
            assert!(moved > 20 && opened > 10, "{moved} flows with another port, {opened} opened");
        });
    }
}

/// The source address that a frame shows.
fn source_of(frame: &[u8]) -> Option<IpAddr> {
    match frame[12..14] {
        [0x08, 0x00] => frame.get(26..30).and_then(|ip| <[u8; 4]>::try_from(ip).ok()).map(IpAddr::from),
        [0x86, 0xdd] => frame.get(22..38).and_then(|ip| <[u8; 16]>::try_from(ip).ok()).map(IpAddr::from),
        _ => None,
    }
}

#[test]
fn broken_packets_stay_as_they_are_or_are_dropped() {
    sandbox(|bpffs| {
        let bench = Bench::masquerading(bpffs);
        let ours: Vec<IpAddr> = [POD, OTHER_POD, NODE].iter().flatten().map(|text| ip(text)).collect();
        let mut runner = runner(draw(PACKETS / 2), 0);
        let edits = prop::collection::vec((any::<Index>(), any::<u8>()), 1..5);
        let cut = prop_oneof![2 => Just(None), 1 => any::<Index>().prop_map(Some)];
        let cases = (bodies(), 0..3_usize, select(&PORTS[..]), edits, cut);
        let result = runner.run(&cases, |(body, from, port, edits, cut)| {
            let from = (ip([POD, NODE, WEB][from][body.family]), port);
            let (from, to) = ends(&body, from, (ip(ROUTER[body.family]), port));
            let mut frame = body.frame(from, to);
            damage(&mut frame, edits, cut);
            for (outcome, leaves) in [(bench.node_sends(&frame), true), (bench.node_receives(&frame), false)] {
                prop_assert_eq!(outcome.frame.len(), frame.len());
                prop_assert_eq!(&outcome.frame[..14], &frame[..14]);
                let drops: u64 = outcome.counted.iter().map(|(.., packets)| packets).sum();
                prop_assert_eq!((outcome.action == SHOT, outcome.action == NEXT), (drops == 1, drops == 0));
                if leaves && source_of(&frame).is_none_or(|source| !ours.contains(&source)) {
                    prop_assert_eq!((outcome.action, outcome.frame), (NEXT, frame.clone()));
                }
            }
            Ok(())
        });
        result.unwrap();
    });
}

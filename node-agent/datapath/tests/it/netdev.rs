//! Every path of the programs that masquerade, by BPF_PROG_TEST_RUN: exact bytes, what is counted.

use std::net::IpAddr;

use basal_datapath::state::Symbol;
use basal_maps::mark;

use crate::{
    bench::{Bench, EGRESS, HOST, ICMP, ICMPV6, Outcome, SHOT, TCP, UDP, checksum, ethernet, ipv4, ipv6},
    harness::sandbox,
};

const SCTP: u8 = 132;
pub(crate) const GRE: u8 = 47;
const DESTINATION_OPTIONS: u8 = 60;
const FRAGMENT: u8 = 44;

/// Pods, node and a machine outside, by family.
pub(crate) const POD: [&str; 2] = ["10.1.1.7", "fd00:1:1::7"];
pub(crate) const OTHER_POD: [&str; 2] = ["10.1.1.8", "fd00:1:1::8"];
pub(crate) const NODE: [&str; 2] = ["172.16.0.1", "fd16::1"];
pub(crate) const WEB: [&str; 2] = ["192.0.2.80", "2001:db8::80"];
pub(crate) const ROUTER: [&str; 2] = ["203.0.113.1", "2001:db8:ffff::1"];

/// An IP packet in a frame.
fn packet(from: &str, to: &str, protocol: u8, payload: &[u8]) -> Vec<u8> {
    if from.contains(':') { ipv6(from, to, protocol, 64, payload) } else { ipv4(from, to, protocol, payload) }
}

/// A payload with its checksum at an offset, which covers the addresses too.
fn summed(from: &str, to: &str, protocol: u8, mut payload: Vec<u8>, at: usize) -> Vec<u8> {
    let octets = |ip: &str| match ip.parse().unwrap() {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    };
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    let pseudo = [octets(from), octets(to), length.to_vec(), vec![0, 0, 0, protocol]].concat();
    let pseudo = if protocol == ICMP { Vec::new() } else { pseudo };
    let sum = checksum(&[pseudo, payload.clone()].concat()).to_be_bytes();
    payload[at..at + 2].copy_from_slice(&sum);
    payload
}

/// The payload of TCP or UDP.
fn ported(protocol: u8, from: (&str, u16), to: (&str, u16)) -> Vec<u8> {
    let ports = [from.1.to_be_bytes(), to.1.to_be_bytes()].concat();
    let (rest, at) = match protocol {
        TCP => (vec![0, 0, 0, 1, 0, 0, 0, 0, 0x50, 2, 0xff, 0xff, 0, 0, 0, 0], 16),
        _ => (vec![0, 12, 0, 0, b'd', b'a', b't', b'a'], 6),
    };
    summed(from.0, to.0, protocol, [ports, rest].concat(), at)
}

fn segment(protocol: u8, from: (&str, u16), to: (&str, u16)) -> Vec<u8> {
    packet(from.0, to.0, protocol, &ported(protocol, from, to))
}

/// The payload of an ICMP message of a family, with the second four bytes of its header.
fn icmp(from: &str, to: &str, types: [[u8; 2]; 2], second: [u8; 4], data: &[u8]) -> (u8, Vec<u8>) {
    let (protocol, [kind, code]) = if from.contains(':') { (ICMPV6, types[1]) } else { (ICMP, types[0]) };
    let message = [&[kind, code, 0, 0][..], &second, data].concat();
    (protocol, summed(from, to, protocol, message, 2))
}

fn message(from: &str, to: &str, types: [[u8; 2]; 2], second: [u8; 4], data: &[u8]) -> Vec<u8> {
    let (protocol, payload) = icmp(from, to, types, second, data);
    packet(from, to, protocol, &payload)
}

const REQUEST: [[u8; 2]; 2] = [[8, 0], [128, 0]];
const REPLY: [[u8; 2]; 2] = [[0, 0], [129, 0]];
const TIME_EXCEEDED: [[u8; 2]; 2] = [[11, 0], [3, 0]];
const PORT_UNREACHABLE: [[u8; 2]; 2] = [[3, 3], [1, 4]];

/// On to the next program (`TCX_NEXT`, linux/bpf.h).
pub(crate) const NEXT: u32 = u32::MAX;

fn passed(outcome: &Outcome, frame: &[u8]) {
    assert_eq!((outcome.action, &outcome.counted[..]), (NEXT, &[][..]), "{frame:x?}");
    assert_eq!(outcome.frame, frame);
}

#[test]
fn what_leaves_gets_the_nodes_address_and_what_comes_back_the_pods() {
    sandbox(|bpffs| {
        let bench = Bench::masquerading(bpffs);
        for family in [0, 1] {
            let (pod, node, web) = (POD[family], NODE[family], WEB[family]);
            for protocol in [TCP, UDP] {
                // Twice: the first packet makes rows, the second finds them.
                for _ in 0..2 {
                    let sent = bench.node_sends(&segment(protocol, (pod, 40000), (web, 443)));
                    passed(&sent, &segment(protocol, (node, 40000), (web, 443)));
                    let received = bench.node_receives(&segment(protocol, (web, 443), (node, 40000)));
                    passed(&received, &segment(protocol, (web, 443), (pod, 40000)));
                }
            }
            let id = [0x80, 5, 0, 1];
            let sent = bench.node_sends(&message(pod, web, REQUEST, id, b"ping"));
            passed(&sent, &message(node, web, REQUEST, id, b"ping"));
            let received = bench.node_receives(&message(web, node, REPLY, id, b"ping"));
            passed(&received, &message(web, pod, REPLY, id, b"ping"));
            for protocol in [GRE, SCTP] {
                let payload = [0x9c, 0x40, 0, 9, 1, 2, 3, 4, 5, 6, 7, 8];
                let sent = bench.node_sends(&packet(pod, web, protocol, &payload));
                passed(&sent, &packet(node, web, protocol, &payload));
            }
        }
    });
}

/// The source port of TCP or UDP in a frame.
fn source_port(frame: &[u8], header: usize) -> u16 {
    u16::from_be_bytes([frame[14 + header], frame[15 + header]])
}

#[test]
fn a_port_that_changes_is_made_good_in_the_checksum() {
    sandbox(|bpffs| {
        let bench = Bench::masquerading(bpffs);
        for family in [0, 1] {
            let (pod, node, web) = (POD[family], NODE[family], WEB[family]);
            let header = if family == 0 { 20 } else { 40 };
            for protocol in [TCP, UDP] {
                let sent = bench.node_sends(&segment(protocol, (pod, 1024), (web, 443)));
                let port = source_port(&sent.frame, header);
                assert!(port >= 32768, "{port}");
                passed(&sent, &segment(protocol, (node, port), (web, 443)));
                let received = bench.node_receives(&segment(protocol, (web, 443), (node, port)));
                passed(&received, &segment(protocol, (web, 443), (pod, 1024)));
            }
        }
        // UDP without a checksum stays without.
        let none = |from: &str| packet(from, WEB[0], UDP, &[0x9c, 0x41, 0, 53, 0, 8, 0, 0]);
        passed(&bench.node_sends(&none(POD[0])), &none(NODE[0]));
    });
}

#[test]
fn what_keeps_its_source() {
    sandbox(|bpffs| {
        let bench = Bench::masquerading(bpffs);
        for frame in [
            segment(TCP, (NODE[0], 6443), (WEB[0], 50000)),
            segment(TCP, (NODE[0], 50000), (WEB[0], 443)),
            segment(UDP, (NODE[1], 50000), ("fd16::2", 8472)),
            segment(TCP, ("172.16.0.9", 50000), (WEB[0], 443)),
            segment(TCP, (POD[0], 50000), ("198.18.0.1", 443)),
            segment(TCP, (POD[1], 50000), ("fe80::1", 443)),
            segment(TCP, (POD[1], 50000), ("fd18::1", 443)),
            segment(UDP, (POD[0], 50000), ("239.1.1.1", 53)),
            message(POD[0], WEB[0], REPLY, [0, 5, 0, 1], b"ping"),
            message("fe80::1", "ff02::1", [[0, 0], [135, 0]], [0; 4], &[0; 16]),
            ethernet(0x0806, &[0; 28]),
            ethernet(0x0800, &[0x55; 20]),
            ethernet(0x8100, &[0; 46]),
        ] {
            passed(&bench.node_sends(&frame), &frame);
        }
        let frame = segment(UDP, (NODE[0], 50000), (WEB[0], 53));
        let tunnel = mark::encode(mark::MAGIC_OVERLAY, 7);
        assert_eq!(bench.run(Symbol::ToNetdev, bench.netdev(), tunnel, &frame).frame, frame);
        let frame = segment(TCP, (POD[0], 50000), (WEB[0], 443));
        passed(&bench.run(Symbol::ToNetdev, 1, 0, &frame), &frame);
    });
}

#[test]
fn what_comes_in_for_the_node_or_a_pod_itself_is_left_alone() {
    sandbox(|bpffs| {
        let bench = Bench::masquerading(bpffs);
        for frame in [
            segment(TCP, (WEB[0], 50000), (NODE[0], 6443)),
            segment(TCP, (WEB[1], 443), (NODE[1], 50000)),
            message(WEB[0], NODE[0], REQUEST, [0, 5, 0, 1], b"ping"),
            message(WEB[0], NODE[0], REPLY, [0, 5, 0, 1], b"ping"),
            segment(TCP, (WEB[0], 50000), (POD[0], 80)),
            packet(WEB[0], NODE[0], GRE, &[0; 8]),
            ethernet(0x0806, &[0; 28]),
            ethernet(0x86dd, &[0x55; 40]),
        ] {
            passed(&bench.node_receives(&frame), &frame);
        }
        // The pod that was asked answers with its own address.
        let answer = segment(TCP, (POD[0], 80), (WEB[0], 50000));
        passed(&bench.node_sends(&answer), &answer);
    });
}

#[test]
fn what_cannot_be_masqueraded_is_dropped_with_ciliums_reason() {
    sandbox(|bpffs| {
        let bench = Bench::masquerading(bpffs);
        let dropped = |frame: &[u8], reason: u8| {
            let run = bench.node_sends(frame);
            assert_eq!((run.action, run.counted), (SHOT, vec![(reason, EGRESS, HOST, 1)]), "{frame:x?}");
        };
        dropped(&message(POD[0], WEB[0], [[13, 0], [0, 0]], [0; 4], &[0; 12]), 168);
        dropped(&message(POD[1], WEB[1], [[0, 0], [150, 0]], [0; 4], &[0; 12]), 168);
        let options = [DESTINATION_OPTIONS, 0, 1, 4, 0, 0, 0, 0].repeat(6);
        dropped(&packet(POD[1], WEB[1], DESTINATION_OPTIONS, &options), 168);
        let mut later = packet(POD[0], WEB[0], UDP, &[0; 16]);
        (later[20], later[21]) = (0, 2);
        dropped(&later, 175);
        dropped(&packet(POD[1], WEB[1], FRAGMENT, &[UDP, 0, 0, 0x10, 0, 0, 0, 7, 1, 2, 3, 4]), 175);
        let gre = |pod| packet(pod, WEB[0], GRE, &[0; 8]);
        passed(&bench.node_sends(&gre(POD[0])), &gre(NODE[0]));
        dropped(&gre(OTHER_POD[0]), 167);
        // The node itself goes first.
        passed(&bench.node_sends(&gre(NODE[0])), &gre(NODE[0]));
    });
}

/// A fragment of an IPv4 datagram: where it begins in units of 8 bytes, and whether others follow.
fn fragment(mut frame: Vec<u8>, offset: u8, more: bool) -> Vec<u8> {
    (frame[20], frame[21]) = (if more { 0x20 } else { 0 }, offset);
    let sum = {
        frame[24..26].fill(0);
        checksum(&frame[14..34])
    };
    frame[24..26].copy_from_slice(&sum.to_be_bytes());
    frame
}

#[test]
fn fragments_follow_their_first_one() {
    sandbox(|bpffs| {
        let bench = Bench::masquerading(bpffs);
        let (pod, node, web) = (POD[0], NODE[0], WEB[0]);
        let first = |from: &str| fragment(segment(UDP, (from, 40000), (web, 53)), 0, true);
        let last = |from: &str| fragment(packet(from, web, UDP, &[7; 16]), 2, false);
        passed(&bench.node_sends(&first(pod)), &first(node));
        passed(&bench.node_sends(&last(pod)), &last(node));
        let first = |to: &str| fragment(segment(UDP, (web, 53), (to, 40000)), 0, true);
        let last = |to: &str| fragment(packet(web, to, UDP, &[7; 16]), 2, false);
        passed(&bench.node_receives(&first(node)), &first(pod));
        passed(&bench.node_receives(&last(node)), &last(pod));

        let (pod, node, web) = (POD[1], NODE[1], WEB[1]);
        let part = |from: &str, offset: u8, payload: &[u8]| {
            let header = [UDP, 0, 0, offset, 0, 0, 0, 7];
            packet(from, web, FRAGMENT, &[&header[..], payload].concat())
        };
        let first = |from: &str| part(from, 1, &ported(UDP, (from, 40000), (web, 53)));
        passed(&bench.node_sends(&first(pod)), &first(node));
        passed(&bench.node_sends(&part(pod, 0x10, &[7; 16])), &part(node, 0x10, &[7; 16]));
    });
}

#[test]
fn errors_are_translated_with_what_they_quote() {
    sandbox(|bpffs| {
        let bench = Bench::masquerading(bpffs);
        for family in [0, 1] {
            let (pod, node, web, router) = (POD[family], NODE[family], WEB[family], ROUTER[family]);
            let header = if family == 0 { 20 } else { 40 };
            // Of UDP eight bytes are quoted, or all; of TCP eight, without the checksum.
            for (protocol, quoted) in [(UDP, 8), (UDP, 12), (TCP, 8), (TCP, 20)] {
                let sent = bench.node_sends(&segment(protocol, (pod, 1024), (web, 443)));
                let port = source_port(&sent.frame, header);
                let quote =
                    |from: (&str, u16), to: (&str, u16)| segment(protocol, from, to)[14..14 + header + quoted].to_vec();

                let error = |to: &str, port| message(router, to, TIME_EXCEEDED, [0; 4], &quote((to, port), (web, 443)));
                passed(&bench.node_receives(&error(node, port)), &error(pod, 1024));

                let error = |from: &str, teller: &str, port| {
                    message(teller, web, PORT_UNREACHABLE, [0; 4], &quote((web, 443), (from, port)))
                };
                passed(&bench.node_sends(&error(pod, pod, 1024)), &error(node, node, port));
                passed(&bench.node_sends(&error(pod, node, 1024)), &error(node, node, port));
                let other = ROUTER[family];
                passed(&bench.node_sends(&error(pod, other, 1024)), &error(node, other, port));
                let lie = error(pod, OTHER_POD[family], 1024);
                passed(&bench.node_sends(&lie), &lie);
            }
            let id = [0x80, 9, 0, 1];
            bench.node_sends(&message(pod, web, REQUEST, id, b"ping"));
            let error =
                |to: &str| message(router, to, TIME_EXCEEDED, [0; 4], &message(to, web, REQUEST, id, b"ping")[14..]);
            passed(&bench.node_receives(&error(node)), &error(pod));
            // A packet that ends within eight bytes is quoted as a whole.
            bench.node_sends(&packet(pod, web, GRE, &[0, 0, 8, 0]));
            let error =
                |to: &str| message(router, to, TIME_EXCEEDED, [0; 4], &packet(to, web, GRE, &[0, 0, 8, 0])[14..]);
            passed(&bench.node_receives(&error(node)), &error(pod));
            // About nobody's flow, and cut off in what it quotes.
            let stray = message(router, node, TIME_EXCEEDED, [0; 4], &segment(UDP, (node, 65000), (web, 1))[14..]);
            passed(&bench.node_receives(&stray), &stray);
            let short = message(router, node, TIME_EXCEEDED, [0; 4], &[0x45; 12]);
            passed(&bench.node_receives(&short), &short);
        }
    });
}

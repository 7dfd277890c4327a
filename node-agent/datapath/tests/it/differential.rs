//! Packets of every kind through the programs in the kernel, compared with a model that was written apart from them: action,
//! every byte that comes out, the mark, and what is counted.

use std::{cell::RefCell, net::IpAddr};

use basal_datapath::{
    routing::{DirectRoutes, Routing},
    state::Symbol,
};
use proptest::{
    prelude::*,
    sample::{Index, select},
};

use crate::{
    bench::{Bench, GATEWAY_MAC, POD_MAC, checksum},
    draw::{draw, runner},
    forwarding_model::{Model, Pod},
    harness::{TUNNEL, sandbox},
};

/// Packets for each program.
const PACKETS: u32 = 1500;

/// Bytes of an Ethernet header.
const ETHERNET: usize = 14;

/// Addresses that mean something to the node.
const V4: [&str; 14] = [
    "10.1.1.7",
    "10.1.1.8",
    "10.1.1.1",
    "10.1.1.2",
    "10.1.1.99",
    "10.1.2.7",
    "10.1.2.1",
    "192.168.77.1",
    "192.168.77.2",
    "8.8.8.8",
    "224.0.0.22",
    "255.255.255.255",
    "169.254.1.1",
    "0.0.0.0",
];
const V6: [&str; 12] = [
    "fd00:1:1::7",
    "fd00:1:1::8",
    "fd00:1:1::1",
    "fd00:1:1::2",
    "fd00:1:1::99",
    "fd00:1:2::7",
    "fd00:1:2::1",
    "fd77::1",
    "fd77::2",
    "2001:db8::8",
    "ff02::1",
    "fe80::7",
];
const PROTOCOLS: [u8; 14] = [0, 1, 2, 6, 17, 43, 44, 47, 51, 58, 60, 89, 132, 255];
const PORTS: [u16; 4] = [8472, 53, 80, 0];
/// ICMP: echo replies and requests of both families, errors, neighbour discovery.
const TYPES: [u8; 10] = [0, 3, 8, 11, 1, 2, 128, 129, 135, 136];

fn addresses(all: &'static [&'static str]) -> impl Strategy<Value = IpAddr> {
    select(all).prop_map(|text| text.parse().unwrap())
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

fn ethernet(ethertype: u16, payload: &[u8]) -> Vec<u8> {
    [&GATEWAY_MAC, &POD_MAC, &ethertype.to_be_bytes()[..], payload].concat()
}

/// The start of a transport header, and some bytes after it.
fn transport() -> impl Strategy<Value = Vec<u8>> {
    let ports =
        (any::<u16>(), select(&PORTS[..])).prop_map(|(from, to)| [from.to_be_bytes(), to.to_be_bytes()].concat());
    let icmp = (select(&TYPES[..]), any::<[u8; 3]>()).prop_map(|(kind, rest)| [&[kind][..], &rest].concat());
    (prop_oneof![ports, icmp], prop::collection::vec(any::<u8>(), 0..64))
        .prop_map(|(start, rest)| [start, rest].concat())
}

/// Few enough that segments are of the same connections.
fn tcp_ports() -> impl Strategy<Value = Vec<u8>> {
    let port = || select(&[80_u16, 40000][..]).prop_map(u16::to_be_bytes);
    (port(), port()).prop_map(|ports| [ports.0, ports.1].concat())
}

/// A segment, many of which open a connection.
fn tcp() -> impl Strategy<Value = Vec<u8>> {
    let flags = select(&[0x02_u8, 0x02, 0xc2, 0x12, 0x10, 0x18, 0x11, 0x04, 0x03, 0x00][..]);
    (tcp_ports(), any::<[u8; 8]>(), flags, 0..20_usize)
        .prop_map(|(ports, numbers, flags, rest)| [&ports[..], &numbers, &[0x50, flags], &vec![0; 6 + rest]].concat())
}

/// An ICMP error that quotes a segment, whole enough or not.
fn error(v6: bool) -> impl Strategy<Value = Vec<u8>> {
    let (all, types): (&[&str], &[u8]) = if v6 { (&V6, &[1, 2, 3, 4]) } else { (&V4, &[3, 11, 12]) };
    (select(types), addresses(all), addresses(all), tcp_ports(), 0..8_usize).prop_map(
        move |(kind, source, destination, ports, rest)| {
            let head: &[u8] =
                if v6 { &[0x60, 0, 0, 0, 0, 20, 6, 63] } else { &[0x45, 0, 0, 40, 0, 1, 0, 0, 63, 6, 0, 0] };
            [&[kind, 0, 0, 0, 0, 0, 0, 0], head, &octets(source), &octets(destination), &ports, &vec![0; rest]].concat()
        },
    )
}

/// What is above IP, as likely as not of the protocol that the header says.
fn above(v6: bool) -> impl Strategy<Value = (u8, Vec<u8>)> {
    let icmp = if v6 { 58 } else { 1 };
    prop_oneof![
        3 => (select(&PROTOCOLS[..]), transport()),
        4 => tcp().prop_map(|segment| (6, segment)),
        1 => error(v6).prop_map(move |error| (icmp, error)),
    ]
}

fn hops() -> impl Strategy<Value = u8> {
    prop_oneof![3 => Just(64_u8), 1 => select(&[0_u8, 1, 2, 255][..])]
}

fn ipv4() -> impl Strategy<Value = Vec<u8>> {
    let ends = (addresses(&V4), addresses(&V4));
    let sizes = (5..=15_u8, select(&[None, Some(20_u16), Some(1400), Some(1450), Some(1451), Some(65535)][..]));
    let fields = (hops(), prop_oneof![3 => Just(0x4000_u16), 1 => select(&[0_u16, 0x2000, 0x2005, 5][..])]);
    (ends, sizes, fields, above(false)).prop_map(
        |((source, destination), (words, length), (ttl, fragment), (protocol, body))| {
            let header = usize::from(words) * 4;
            let length = length.unwrap_or_else(|| u16::try_from(header + body.len()).unwrap());
            let mut packet = vec![0; header];
            packet[0] = 0x40 | words;
            packet[2..4].copy_from_slice(&length.to_be_bytes());
            packet[6..8].copy_from_slice(&fragment.to_be_bytes());
            (packet[8], packet[9]) = (ttl, protocol);
            packet[12..16].copy_from_slice(&octets(source));
            packet[16..20].copy_from_slice(&octets(destination));
            let sum = checksum(&packet).to_be_bytes();
            packet[10..12].copy_from_slice(&sum);
            ethernet(0x0800, &[packet, body].concat())
        },
    )
}

fn ipv6() -> impl Strategy<Value = Vec<u8>> {
    let ends = (addresses(&V6), addresses(&V6));
    let fields = (hops(), select(&[None, None, Some(1410_u16), Some(1411)][..]));
    (ends, fields, above(true)).prop_map(|((source, destination), (hops, length), (protocol, body))| {
        let length = length.unwrap_or_else(|| u16::try_from(body.len()).unwrap()).to_be_bytes();
        let head = [0x60, 0, 0, 0, length[0], length[1], protocol, hops];
        ethernet(0x86dd, &[&head[..], &octets(source), &octets(destination), &body].concat())
    })
}

fn arp() -> impl Strategy<Value = Vec<u8>> {
    (1..3_u8, addresses(&V4), addresses(&V4)).prop_map(|(operation, sender, target)| {
        let head = [0, 1, 8, 0, 6, 4, 0, operation];
        ethernet(0x0806, &[&head[..], &POD_MAC, &octets(sender), &[0; 6], &octets(target)].concat())
    })
}

fn solicitation() -> impl Strategy<Value = Vec<u8>> {
    let hops = prop_oneof![9 => Just(255_u8), 1 => Just(64)];
    let options = prop::collection::vec(any::<u8>(), 0..16);
    (addresses(&V6), addresses(&V6), hops, options).prop_map(|(source, target, hops, options)| {
        let length = u8::try_from(24 + options.len()).unwrap();
        let head = [0x60, 0, 0, 0, 0, length, 58, hops];
        let body = [&[135, 0, 0, 0, 0, 0, 0, 0][..], &octets(target), &options].concat();
        ethernet(0x86dd, &[&head[..], &octets(source), &octets(target), &body].concat())
    })
}

/// The other pod's, broadcast, multicast, nobody's.
const MACS: [[u8; 6]; 4] = [[2, 1, 1, 0, 0, 8], [0xff; 6], [0x33, 0x33, 0, 0, 0, 1], [0; 6]];

/// A frame, mostly a good one; then MAC addresses are others, some bytes are changed, or the end is cut off.
fn frame() -> impl Strategy<Value = Vec<u8>> {
    let good = prop_oneof![
        8 => ipv4(),
        6 => ipv6(),
        1 => arp(),
        2 => solicitation(),
        1 => (select(&[0x8100_u16, 0x88a8, 0x88cc, 0, 1500][..]), prop::collection::vec(any::<u8>(), 46..90))
            .prop_map(|(ethertype, body)| ethernet(ethertype, &body)),
    ];
    let mac = || prop_oneof![5 => Just(None), 1 => select(&MACS[..]).prop_map(Some)];
    let edits = prop_oneof![3 => Just(Vec::new()), 1 => prop::collection::vec((any::<Index>(), any::<u8>()), 1..4)];
    let cut = prop_oneof![7 => Just(None), 1 => any::<Index>().prop_map(Some)];
    (good, mac(), mac(), edits, cut).prop_map(|(mut frame, destination, source, edits, cut)| {
        frame[..6].copy_from_slice(&destination.unwrap_or(GATEWAY_MAC));
        frame[6..12].copy_from_slice(&source.unwrap_or(POD_MAC));
        damage(&mut frame, edits, cut);
        frame
    })
}

/// Changes some bytes of a frame and cuts off its end, as far as the kernel still tries a program on it.
pub(crate) fn damage(frame: &mut Vec<u8>, edits: Vec<(Index, u8)>, cut: Option<Index>) {
    for (at, byte) in edits {
        let at = at.index(frame.len());
        frame[at] = byte;
    }
    if let Some(cut) = cut {
        frame.truncate(cut.index(frame.len()));
    }
    lengthen(frame);
}

/// The kernel tries no program on less than an Ethernet header, a byte, and the IP header that it announces.
fn lengthen(frame: &mut Vec<u8>) {
    frame.resize(frame.len().max(ETHERNET + 1), 0);
    let least = match frame[12..ETHERNET] {
        [0x08, 0x00] => ETHERNET + 20,
        [0x86, 0xdd] => ETHERNET + 40,
        _ => ETHERNET,
    };
    frame.resize(frame.len().max(least), 0);
}

/// Marks as the stack and kube-proxy set them.
const MARKS: [u32; 8] = [0, 0x700, 0x4000, 0x8000, 0x1111_0f01, 0x0005_0f00, 0x0c00, 0xffff_ffff];

fn compare(legacy: bool, routing: Routing) {
    sandbox(|bpffs| {
        let bench = Bench::with_routing(bpffs, legacy, routing);
        let pods = bench.node.plan.endpoints.iter().map(|(id, endpoint)| Pod {
            ifindex: bench.ifindex(*id),
            mac: endpoint.pod.mac,
            host_mac: endpoint.pod.host_mac,
            identity: endpoint.identity,
            addresses: endpoint.pod.addresses.iter().map(|address| address.ip).collect(),
        });
        let model = Model { pods: pods.collect(), plan: bench.node.plan.clone(), direct: RefCell::default() };
        let mut runner = runner(draw(PACKETS), 0);
        let cases = (frame(), select(&MARKS[..]));
        let result = runner.run(&cases, |(frame, skb_mark)| {
            let pod = bench.ifindex(7);
            let sent = bench.run(Symbol::FromContainer, pod, 0, &frame);
            prop_assert_eq!(sent, model.pod_sends(pod, &frame), "cil_from_container");
            let sent = bench.run(Symbol::FromHost, 0, skb_mark, &frame);
            prop_assert_eq!(sent, model.host_sends(skb_mark, &frame), "cil_from_host");
            Ok(())
        });
        if let Err(failure) = result {
            panic!("legacy routing {legacy}, {routing:?}: {failure}");
        }
    });
}

#[test]
fn the_programs_do_what_the_model_says() {
    compare(true, TUNNEL);
}

#[test]
fn so_they_do_without_legacy_routing() {
    compare(false, TUNNEL);
}

#[test]
fn so_they_do_without_a_tunnel() {
    compare(true, Routing::Native(DirectRoutes::None));
    compare(false, Routing::Native(DirectRoutes::None));
}

//! Every path of the programs, by BPF_PROG_TEST_RUN: what is returned, which bytes come out, what is counted.

use std::{
    collections::BTreeMap,
    fs,
    net::UdpSocket,
    path::{Path, PathBuf},
};

use aya::programs::{SchedClassifier, TestRun as _, TestRunOptions};
use basal_datapath::{linux::maps::PinnedMaps, plan::Peer, rows, state::Symbol};
use basal_maps::{
    ipcache::{FLAG_HAS_TUNNEL_ENDPOINT, IpcacheKey, RemoteEndpointInfo},
    mark,
};
use zerocopy::IntoBytes as _;

use crate::harness::{Netns, Node, node, pair, remote, sandbox};

const OK: u32 = 0;
const SHOT: u32 = 2;
const REDIRECT: u32 = 7;

const INGRESS: u8 = 1;
const EGRESS: u8 = 2;
const HOST: u8 = 1;
const LXC: u8 = 2;
const OVERLAY: u8 = 3;

/// `__sk_buff` (linux/bpf.h): its size, and where mark and ifindex are.
const CONTEXT: usize = 192;
const MARK: usize = 8;
const IFINDEX: usize = 40;

const POD_MAC: [u8; 6] = [2, 1, 1, 0, 0, 7];
const GATEWAY_MAC: [u8; 6] = [2, 2, 1, 0, 0, 7];
const IDENTITY: u32 = 0x0001_1111;

/// What a program did with a packet.
#[derive(Debug)]
struct Run {
    action: u32,
    frame: Vec<u8>,
    mark: u32,
    /// Reason, direction and file of each counter that moved, and by how many packets.
    counted: Vec<(u8, u8, u8, u64)>,
}

/// A node with two pods, whose programs are run by hand.
struct Bench {
    node: Node,
    _pods: [Netns; 2],
}

impl Bench {
    fn new(bpffs: &Path, legacy: bool) -> Self {
        let mut node = node(bpffs, 1);
        node.plan.legacy_routing = legacy;
        node.plan.remote_nodes.insert("two".to_owned(), remote(2));
        let pods = [node.add_pod(7, IDENTITY), node.add_pod(8, 3333)];
        node.converge();
        // Attached, the programs would also count what the kernel sends by itself: solicitations, MLD reports.
        for link in below(&node.paths.bpffs.join("cilium"), 4) {
            node.netns.run(&format!("bpftool link detach pinned {}", link.display())).unwrap();
        }
        Self { node, _pods: pods }
    }

    fn ifindex(&self, id: u16) -> u32 {
        self.node.read().devices[&self.node.plan.endpoints[&id].link].index
    }

    fn run(&self, symbol: Symbol, ifindex: u32, skb_mark: u32, frame: &[u8]) -> Run {
        let maps = PinnedMaps::new(self.node.paths.maps());
        let set = self.node.read().state.programs.first().unwrap().to_string();
        let pin = self.node.paths.bpffs.join("basal/programs").join(set).join(symbol.as_str());
        let before = counters(&maps);
        let mut run = self.node.netns.enter(|| test_run(&pin, ifindex, skb_mark, frame));
        let after = counters(&maps);
        for (key, count) in after {
            let moved = count - before.get(&key).copied().unwrap_or_default();
            if moved > 0 {
                run.counted.push((key.0, key.1, key.2, moved));
            }
        }
        run
    }

    /// What the first pod sends.
    fn pod_sends(&self, frame: &[u8]) -> Run {
        self.run(Symbol::FromContainer, self.ifindex(7), 0, frame)
    }

    /// What the stack sends to `cilium_host`.
    fn host_sends(&self, skb_mark: u32, frame: &[u8]) -> Run {
        self.run(Symbol::FromHost, 0, skb_mark, frame)
    }
}

/// What is so many folders below one.
fn below(folder: &Path, depth: usize) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    if depth == 1 { entries.collect() } else { entries.flat_map(|entry| below(&entry, depth - 1)).collect() }
}

fn counters(maps: &PinnedMaps) -> BTreeMap<(u8, u8, u8), u64> {
    let mut sums = BTreeMap::new();
    for (key, value) in maps.metrics().unwrap() {
        assert_ne!(key.line, 0);
        *sums.entry((key.reason, key.dir, key.file)).or_default() += value.count;
    }
    sums
}

fn test_run(pin: &Path, ifindex: u32, skb_mark: u32, frame: &[u8]) -> Run {
    let program = SchedClassifier::from_pin(pin).unwrap();
    let mut context = [0; CONTEXT];
    context[MARK..MARK + 4].copy_from_slice(&skb_mark.to_ne_bytes());
    context[IFINDEX..IFINDEX + 4].copy_from_slice(&ifindex.to_ne_bytes());
    let (mut data_out, mut ctx_out) = (vec![0; frame.len() + 64], [0; CONTEXT]);
    let mut options = TestRunOptions::new();
    options.data_in = Some(frame);
    options.data_out = Some(&mut data_out);
    options.ctx_in = Some(&context);
    options.ctx_out = Some(&mut ctx_out);
    let result = program.test_run(options).unwrap();
    data_out.truncate(result.data_size_out as usize);
    let marked = ctx_out[MARK..MARK + 4].try_into().map(u32::from_ne_bytes).unwrap();
    Run { action: result.return_value, frame: data_out, mark: marked, counted: Vec::new() }
}

/// The Internet checksum (RFC 1071).
fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = bytes.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

fn ethernet(ethertype: u16, payload: &[u8]) -> Vec<u8> {
    [&GATEWAY_MAC[..], &POD_MAC, &ethertype.to_be_bytes(), payload].concat()
}

fn ipv4(source: &str, destination: &str, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let octets = |ip: &str| ip.parse::<std::net::Ipv4Addr>().unwrap().octets();
    let length = u16::try_from(20 + payload.len()).unwrap().to_be_bytes();
    let mut header = [0x45, 0, length[0], length[1], 0, 1, 0, 0, 64, protocol, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    header[12..16].copy_from_slice(&octets(source));
    header[16..].copy_from_slice(&octets(destination));
    let sum = checksum(&header).to_be_bytes();
    header[10..12].copy_from_slice(&sum);
    ethernet(0x0800, &[&header[..], payload].concat())
}

fn ipv6(source: &str, destination: &str, protocol: u8, hops: u8, payload: &[u8]) -> Vec<u8> {
    let octets = |ip: &str| ip.parse::<std::net::Ipv6Addr>().unwrap().octets();
    let length = u16::try_from(payload.len()).unwrap().to_be_bytes();
    let head = [0x60, 0, 0, 0, length[0], length[1], protocol, hops];
    ethernet(0x86dd, &[&head[..], &octets(source), &octets(destination), payload].concat())
}

const ECHO: [u8; 8] = [8, 0, 0xf7, 0xff, 0, 0, 0, 0];
const ECHO_V6: [u8; 8] = [128, 0, 0, 0, 0, 0, 0, 0];
const ICMP: u8 = 1;
const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMPV6: u8 = 58;

#[test]
fn a_pods_packets_are_marked_and_passed_to_the_stack() {
    sandbox(|bpffs| {
        let bench = Bench::new(bpffs, true);
        for frame in [
            ipv4("10.1.1.7", "10.1.2.7", ICMP, &ECHO),
            ipv4("10.1.1.7", "10.1.1.8", TCP, &[0; 20]),
            ipv4("10.1.1.7", "8.8.8.8", UDP, &[0, 1, 0, 53, 0, 8, 0, 0]),
            ipv6("fd00:1:1::7", "fd00:1:2::7", ICMPV6, 64, &ECHO_V6),
            // What would be a solicitation in IPv6.
            ipv4("10.1.1.7", "10.1.2.7", ICMPV6, &[&[135][..], &[0; 63]].concat()),
        ] {
            let run = bench.pod_sends(&frame);
            assert_eq!((run.action, run.mark), (OK, mark::encode(mark::MAGIC_IDENTITY, IDENTITY)));
            assert_eq!(run.frame, frame);
            assert_eq!(run.counted, [(0, EGRESS, LXC, 1)]);
        }
    });
}

#[test]
fn what_a_pod_may_not_send_is_dropped_with_ciliums_reason() {
    sandbox(|bpffs| {
        let bench = Bench::new(bpffs, true);
        let mut version = ipv4("10.1.1.7", "10.1.2.7", ICMP, &ECHO);
        version[14] = 0x55;
        for (frame, reason) in [
            (ipv4("10.1.1.8", "10.1.2.7", ICMP, &ECHO), 132),
            (ipv4("10.1.1.1", "10.1.2.7", ICMP, &ECHO), 132),
            (ipv6("fe80::1", "ff02::16", ICMPV6, 1, &ECHO_V6), 132),
            (arp([10, 1, 1, 1])[..30].to_vec(), 134),
            (version, 134),
            (ethernet(0x88cc, &[0; 46]), 139),
            (ipv4("10.1.1.7", "192.168.77.2", UDP, &[0x80, 0, 0x21, 0x18, 0, 8, 0, 0]), 170),
            (ipv6("fd00:1:1::7", "fd77::2", UDP, 64, &[0x80, 0, 0x21, 0x18, 0, 8, 0, 0]), 170),
        ] {
            let run = bench.pod_sends(&frame);
            assert_eq!((run.action, run.counted), (SHOT, vec![(reason, EGRESS, LXC, 1)]));
        }
    });
}

fn arp(target: [u8; 4]) -> Vec<u8> {
    let head = [0, 1, 8, 0, 6, 4, 0, 1];
    ethernet(0x0806, &[&head[..], &POD_MAC, &[10, 1, 1, 7], &[0; 6], &target].concat())
}

#[test]
fn arp_for_the_gateway_is_answered_and_nothing_else() {
    sandbox(|bpffs| {
        let bench = Bench::new(bpffs, true);
        let run = bench.pod_sends(&arp([10, 1, 1, 1]));
        let head = [0, 1, 8, 0, 6, 4, 0, 2];
        let body = [&head[..], &GATEWAY_MAC, &[10, 1, 1, 1], &POD_MAC, &[10, 1, 1, 7]].concat();
        let reply = [&POD_MAC[..], &GATEWAY_MAC, &[8, 6], &body].concat();
        assert_eq!((run.action, run.frame), (REDIRECT, reply));

        let other = arp([10, 1, 1, 9]);
        let run = bench.pod_sends(&other);
        assert_eq!((run.action, run.frame), (OK, other));
    });
}

fn solicitation(source: &str, target: &str, option: &[u8]) -> Vec<u8> {
    let target = target.parse::<std::net::Ipv6Addr>().unwrap().octets();
    let message = [&[135, 0, 0, 0, 0, 0, 0, 0][..], &target, option].concat();
    ipv6(source, "ff02::1:ff00:1", ICMPV6, 255, &message)
}

#[test]
fn solicitations_of_the_gateway_are_answered() {
    sandbox(|bpffs| {
        let bench = Bench::new(bpffs, true);
        let option = [&[1, 1][..], &POD_MAC].concat();
        for source in ["fd00:1:1::7", "fe80::1"] {
            for option in [&option[..], &[]] {
                let run = bench.pod_sends(&solicitation(source, "fd00:1:1::1", option));
                assert_eq!(run.action, REDIRECT, "{run:?}");
                let frame = run.frame;
                assert_eq!(frame.len(), 86);
                assert_eq!(frame[..14], [&POD_MAC[..], &GATEWAY_MAC, &[0x86, 0xdd]].concat());
                let expected = ipv6("fd00:1:1::1", source, ICMPV6, 255, &[0; 32]);
                assert_eq!(frame[14..54], expected[14..54]);
                assert_eq!((frame[54], frame[58]), (136, 0xe0));
                assert_eq!(frame[78..], [&[2, 1][..], &GATEWAY_MAC].concat());
                let pseudo = [&frame[22..54], &[0, 0, 0, 32, 0, 0, 0, 58], &frame[54..]].concat();
                assert_eq!(checksum(&pseudo), 0);
            }
        }
        let run = bench.pod_sends(&solicitation("fd00:1:1::7", "fd00:1:1::8", &option));
        assert_eq!((run.action, run.counted), (SHOT, vec![(150, EGRESS, LXC, 1)]));
    });
}

#[test]
fn the_host_delivers_to_pods_by_their_policy_program() {
    sandbox(|bpffs| {
        let bench = Bench::new(bpffs, true);
        let frame = ipv4("10.1.1.1", "10.1.1.8", ICMP, &ECHO);
        let run = bench.host_sends(0, &frame);
        assert_eq!((run.action, run.mark), (REDIRECT, 0));
        let macs = [2, 1, 1, 0, 0, 8, 2, 2, 1, 0, 0, 8];
        assert_eq!(run.frame, [&macs[..], &frame[12..]].concat(), "addressed to the pod, nothing else changed");
        assert_eq!(run.counted, [(0, INGRESS, LXC, 1)]);

        bench
            .node
            .netns
            .run(&format!(
                "bpftool map delete pinned {} key 8 0 0 0",
                bench.node.paths.maps().join("cilium_call_policy").display()
            ))
            .unwrap();
        let run = bench.host_sends(0, &frame);
        assert_eq!((run.action, run.counted), (SHOT, vec![(203, EGRESS, HOST, 1)]));
    });
}

#[test]
fn the_host_sends_to_other_nodes_or_says_why_not() {
    sandbox(|bpffs| {
        let mut bench = Bench::new(bpffs, true);
        for frame in [ipv4("10.1.1.1", "10.1.2.7", ICMP, &ECHO), ipv6("fd00:1:1::1", "fd00:1:2::7", TCP, 64, &[0; 20])]
        {
            let run = bench.host_sends(0, &frame);
            assert_eq!((run.action, run.frame), (REDIRECT, frame));
            assert_eq!(run.counted, [(0, EGRESS, HOST, 1)]);
        }
        let run = bench.host_sends(0, &ipv4("10.1.1.1", "10.1.1.99", ICMP, &ECHO));
        assert_eq!((run.action, run.counted), (SHOT, vec![(151, EGRESS, HOST, 1)]));
        let run = bench.host_sends(0, &ipv4("10.1.1.1", "224.0.0.22", 2, &[0; 8]));
        assert_eq!((run.action, run.counted), (OK, vec![]));

        let broken = RemoteEndpointInfo { flags: FLAG_HAS_TUNNEL_ENDPOINT, ..RemoteEndpointInfo::default() };
        let peer = "10.1.2.9/32".parse().unwrap();
        bench.node.plan.peers.insert(peer, Peer { identity: 9999, tunnel_endpoint: None });
        let row = rows::Row {
            map: rows::MapId::Ipcache,
            key: IpcacheKey::new(peer.addr(), 32).as_bytes().to_vec(),
            value: broken.as_bytes().to_vec(),
        };
        bench.node.with(async |kernel| {
            use basal_datapath::kernel::Kernel as _;
            assert!(kernel.apply(&basal_datapath::op::Op::PutRow(row)).await.is_done());
        });
        let run = bench.host_sends(0, &ipv4("10.1.1.1", "10.1.2.9", ICMP, &ECHO));
        assert_eq!((run.action, run.counted), (SHOT, vec![(160, EGRESS, HOST, 1)]));
    });
}

#[test]
fn the_other_programs_count_and_pass() {
    sandbox(|bpffs| {
        let bench = Bench::new(bpffs, true);
        let frame = ipv4("10.1.2.7", "10.1.1.7", ICMP, &ECHO);
        let run = bench.run(Symbol::ToHost, 0, 0, &frame);
        assert_eq!((run.action, run.counted), (OK, vec![(0, EGRESS, HOST, 1)]));
        let run = bench.run(Symbol::ToOverlay, 0, 0, &frame);
        assert_eq!((run.action, run.mark, run.counted), (OK, 0, vec![]));
        let run = bench.run(Symbol::FromOverlay, 0, 0, &frame);
        assert_eq!((run.action, run.counted), (SHOT, vec![(147, INGRESS, OVERLAY, 1)]));
    });
}

#[test]
fn the_direct_path_counts_one_hop() {
    sandbox(|bpffs| {
        let bench = Bench::new(bpffs, false);
        let run = bench.pod_sends(&ipv4("10.1.1.7", "10.1.1.8", ICMP, &ECHO));
        assert_eq!((run.action, run.mark), (REDIRECT, 0));
        assert_eq!(run.frame[22], 63);
        assert_eq!(checksum(&run.frame[14..34]), 0);
        assert_eq!(run.counted, [(0, INGRESS, LXC, 1)]);
        let run = bench.pod_sends(&ipv6("fd00:1:1::7", "fd00:1:1::8", ICMPV6, 64, &ECHO_V6));
        assert_eq!((run.action, run.frame[21]), (REDIRECT, 63));

        let frame = ipv4("10.1.1.7", "10.1.2.7", ICMP, &ECHO);
        let run = bench.pod_sends(&frame);
        assert_eq!((run.action, run.frame, run.counted), (REDIRECT, frame, vec![(0, EGRESS, LXC, 1)]));
        let run = bench.pod_sends(&ipv4("10.1.1.7", "10.1.1.8", TCP, &[0; 20]));
        assert_eq!(run.action, OK, "kube-proxy may translate its replies");
    });
}

/// Sends an inner packet to a node as its tunnel peer would, under any identifier.
fn inject(from: &Netns, vni: u32, inner: &[u8]) {
    let [_, a, b, c] = vni.to_be_bytes();
    let packet = [&[8, 0, 0, 0, a, b, c, 0][..], inner].concat();
    let socket = from.enter(|| UdpSocket::bind("0.0.0.0:0").unwrap());
    socket.send_to(&packet, "192.168.77.1:8472").unwrap();
}

#[test]
fn the_tunnel_takes_no_packet_that_it_should_not() {
    sandbox(|bpffs| {
        let (mut one, two) = pair(bpffs);
        let _pod = one.add_pod(7, IDENTITY);
        one.converge();
        let maps = PinnedMaps::new(one.paths.maps());
        for (vni, destination, reason) in [(1, "10.1.1.7", 171), (4444, "10.1.1.99", 151), (4444, "8.8.8.8", 151)] {
            let before = counters(&maps).get(&(reason, INGRESS, OVERLAY)).copied().unwrap_or_default();
            inject(&two.netns, vni, &ipv4("10.1.2.7", destination, ICMP, &ECHO));
            // Packets between namespaces of one machine arrive before the sender goes on, or soon.
            let counted =
                || counters(&maps).get(&(reason, INGRESS, OVERLAY)).copied().unwrap_or_default() == before + 1;
            assert!(
                (0..1000).any(|_| {
                    std::thread::yield_now();
                    counted()
                }),
                "{reason} was not counted"
            );
        }
    });
}

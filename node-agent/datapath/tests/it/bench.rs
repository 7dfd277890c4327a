//! A node whose programs are run by hand (BPF_PROG_TEST_RUN), and frames to run them on.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use aya::programs::{SchedClassifier, TestRun as _, TestRunOptions};
use basal_datapath::{linux::maps::PinnedMaps, routing::Routing, state::Symbol};

use crate::harness::{Netns, Node, TUNNEL, masquerading, node, remote};

/// What programs return (linux/pkt_cls.h).
pub(crate) const OK: u32 = 0;
pub(crate) const SHOT: u32 = 2;
pub(crate) const REDIRECT: u32 = 7;

/// Directions and files of `cilium_metrics`.
pub(crate) const INGRESS: u8 = 1;
pub(crate) const EGRESS: u8 = 2;
pub(crate) const HOST: u8 = 1;
pub(crate) const LXC: u8 = 2;
pub(crate) const OVERLAY: u8 = 3;

/// `__sk_buff` (linux/bpf.h): its size, and where mark and ifindex are.
const CONTEXT: usize = 192;
const MARK: usize = 8;
const IFINDEX: usize = 40;
const GSO_SEGS: usize = 164;
const GSO_SIZE: usize = 176;

/// The first pod and its side of the host.
pub(crate) const POD_MAC: [u8; 6] = [2, 1, 1, 0, 0, 7];
pub(crate) const GATEWAY_MAC: [u8; 6] = [2, 2, 1, 0, 0, 7];
pub(crate) const IDENTITY: u32 = 0x0001_1111;

/// What a program does with a packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Outcome {
    pub(crate) action: u32,
    /// The frame that comes out.
    pub(crate) frame: Vec<u8>,
    pub(crate) mark: u32,
    /// Reason, direction and file of each counter that moves, and by how many packets.
    pub(crate) counted: Vec<(u8, u8, u8, u64)>,
}

/// A node with two pods, 7 and 8, that knows another node.
pub(crate) struct Bench {
    pub(crate) node: Node,
    maps: PinnedMaps,
    /// Where the programs are pinned.
    programs: PathBuf,
    ifindexes: BTreeMap<u16, u32>,
    /// Interface index of the device that leads out.
    netdev: u32,
    _pods: [Netns; 2],
}

impl Bench {
    pub(crate) fn new(bpffs: &Path, legacy: bool) -> Self {
        Self::with_routing(bpffs, legacy, TUNNEL)
    }

    pub(crate) fn with_routing(bpffs: &Path, legacy: bool, routing: Routing) -> Self {
        let mut node = node(bpffs, 1);
        node.plan.legacy_routing = legacy;
        node.plan.routing = routing;
        Self::of(node)
    }

    /// A node whose device `w0` masquerades as 172.16.0.1 and fd16::1.
    pub(crate) fn masquerading(bpffs: &Path) -> Self {
        let mut node = node(bpffs, 1);
        node.plan.legacy_routing = false;
        node.plan.bpf_masquerade = masquerading(&["w0"]);
        node.plan.native_networks = ["198.18.0.0/15".parse().unwrap(), "fd18::/64".parse().unwrap()].into();
        node.netns.ip("link add w0 type veth peer name w1");
        node.netns.ip("addr add 172.16.0.1/24 dev w0");
        node.netns.ip("addr add fd16::1/64 dev w0 nodad");
        Self::of(node)
    }

    fn of(mut node: Node) -> Self {
        node.plan.remote_nodes.insert("two".to_owned(), remote(2));
        let pods = [node.add_pod(7, IDENTITY), node.add_pod(8, 3333)];
        node.converge();
        // Attached, the programs would also count what the kernel sends by itself: solicitations, MLD reports.
        for link in below(&node.paths.bpffs.join("cilium"), 4) {
            node.netns.run(&format!("bpftool link detach pinned {}", link.display())).unwrap();
        }
        let observed = node.read();
        Self {
            maps: PinnedMaps::new(node.paths.maps()),
            programs: node.programs(),
            ifindexes: node.plan.endpoints.iter().map(|(id, pod)| (*id, observed.devices[&pod.link].index)).collect(),
            netdev: observed.devices.iter().find(|(name, _)| name.as_str() == "w0").map_or(0, |(_, w0)| w0.index),
            node,
            _pods: pods,
        }
    }

    /// Interface index of the host's side of a pod.
    pub(crate) fn ifindex(&self, id: u16) -> u32 {
        self.ifindexes[&id]
    }

    /// Where a program is pinned.
    pub(crate) fn pin(&self, symbol: Symbol) -> PathBuf {
        self.programs.join(symbol.as_str())
    }

    pub(crate) fn run(&self, symbol: Symbol, ifindex: u32, skb_mark: u32, frame: &[u8]) -> Outcome {
        self.run_in(symbol, &context(ifindex, skb_mark), frame)
    }

    fn run_in(&self, symbol: Symbol, context: &[u8; CONTEXT], frame: &[u8]) -> Outcome {
        let pin = self.pin(symbol);
        let before = counters(&self.maps);
        let mut run = self.node.netns.enter(|| test_run(&pin, context, frame));
        for (key, count) in counters(&self.maps) {
            let moved = count - before.get(&key).copied().unwrap_or_default();
            if moved > 0 {
                run.counted.push((key.0, key.1, key.2, moved));
            }
        }
        run
    }

    /// What the first pod sends.
    pub(crate) fn pod_sends(&self, frame: &[u8]) -> Outcome {
        self.run(Symbol::FromContainer, self.ifindex(7), 0, frame)
    }

    /// What the first pod sends, for the kernel to cut into segments with so many bytes of data.
    pub(crate) fn pod_sends_segments(&self, frame: &[u8], size: u32) -> Outcome {
        let mut context = context(self.ifindex(7), 0);
        context[GSO_SEGS..GSO_SEGS + 4].copy_from_slice(&2_u32.to_ne_bytes());
        context[GSO_SIZE..GSO_SIZE + 4].copy_from_slice(&size.to_ne_bytes());
        self.run_in(Symbol::FromContainer, &context, frame)
    }

    /// What the node sends out of the device that masquerades.
    pub(crate) fn node_sends(&self, frame: &[u8]) -> Outcome {
        self.run(Symbol::ToNetdev, self.netdev, 0, frame)
    }

    /// What that device receives.
    pub(crate) fn node_receives(&self, frame: &[u8]) -> Outcome {
        self.run(Symbol::FromNetdev, self.netdev, 0, frame)
    }

    /// Interface index of the device that leads out.
    pub(crate) fn netdev(&self) -> u32 {
        self.netdev
    }

    /// What the stack sends to `cilium_host`.
    pub(crate) fn host_sends(&self, skb_mark: u32, frame: &[u8]) -> Outcome {
        self.run(Symbol::FromHost, 0, skb_mark, frame)
    }
}

/// What is so many folders below one.
fn below(folder: &Path, depth: usize) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    if depth == 1 { entries.collect() } else { entries.flat_map(|entry| below(&entry, depth - 1)).collect() }
}

/// Packets by reason, direction and file.
pub(crate) fn counters(maps: &PinnedMaps) -> BTreeMap<(u8, u8, u8), u64> {
    let mut sums = BTreeMap::new();
    for (key, value) in maps.metrics().unwrap() {
        assert_ne!(key.line, 0);
        *sums.entry((key.reason, key.dir, key.file)).or_default() += value.count;
    }
    sums
}

/// A `__sk_buff` with what programs read of it.
pub(crate) fn context(ifindex: u32, skb_mark: u32) -> [u8; CONTEXT] {
    let mut context = [0; CONTEXT];
    context[MARK..MARK + 4].copy_from_slice(&skb_mark.to_ne_bytes());
    context[IFINDEX..IFINDEX + 4].copy_from_slice(&ifindex.to_ne_bytes());
    context
}

fn test_run(pin: &Path, context: &[u8; CONTEXT], frame: &[u8]) -> Outcome {
    let program = SchedClassifier::from_pin(pin).unwrap();
    let (mut data_out, mut ctx_out) = (vec![0; frame.len() + 64], [0; CONTEXT]);
    let mut options = TestRunOptions::new();
    options.data_in = Some(frame);
    options.data_out = Some(&mut data_out);
    options.ctx_in = Some(context);
    options.ctx_out = Some(&mut ctx_out);
    let result = program.test_run(options).unwrap();
    data_out.truncate(result.data_size_out as usize);
    let marked = ctx_out[MARK..MARK + 4].try_into().map(u32::from_ne_bytes).unwrap();
    Outcome { action: result.return_value, frame: data_out, mark: marked, counted: Vec::new() }
}

/// The Internet checksum (RFC 1071).
pub(crate) fn checksum(bytes: &[u8]) -> u16 {
    let word = |pair: &[u8]| u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or_default()]);
    let mut sum: u32 = bytes.chunks(2).map(|pair| u32::from(word(pair))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// A frame from the first pod to its gateway.
pub(crate) fn ethernet(ethertype: u16, payload: &[u8]) -> Vec<u8> {
    [&GATEWAY_MAC[..], &POD_MAC, &ethertype.to_be_bytes(), payload].concat()
}

/// An IPv4 packet in such a frame.
pub(crate) fn ipv4(source: &str, destination: &str, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let octets = |ip: &str| ip.parse::<std::net::Ipv4Addr>().unwrap().octets();
    let length = u16::try_from(20 + payload.len()).unwrap().to_be_bytes();
    let mut header = [0x45, 0, length[0], length[1], 0, 1, 0, 0, 64, protocol, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    header[12..16].copy_from_slice(&octets(source));
    header[16..].copy_from_slice(&octets(destination));
    let sum = checksum(&header).to_be_bytes();
    header[10..12].copy_from_slice(&sum);
    ethernet(0x0800, &[&header[..], payload].concat())
}

/// An IPv6 packet in such a frame.
pub(crate) fn ipv6(source: &str, destination: &str, protocol: u8, hops: u8, payload: &[u8]) -> Vec<u8> {
    let octets = |ip: &str| ip.parse::<std::net::Ipv6Addr>().unwrap().octets();
    let length = u16::try_from(payload.len()).unwrap().to_be_bytes();
    let head = [0x60, 0, 0, 0, length[0], length[1], protocol, hops];
    ethernet(0x86dd, &[&head[..], &octets(source), &octets(destination), payload].concat())
}

/// The first pod asks who has an IPv4 address.
pub(crate) fn arp(target: [u8; 4]) -> Vec<u8> {
    let head = [0, 1, 8, 0, 6, 4, 0, 1];
    ethernet(0x0806, &[&head[..], &POD_MAC, &[10, 1, 1, 7], &[0; 6], &target].concat())
}

/// The first pod asks who has an IPv6 address.
pub(crate) fn solicitation(source: &str, target: &str, option: &[u8]) -> Vec<u8> {
    let target = target.parse::<std::net::Ipv6Addr>().unwrap().octets();
    let message = [&[135, 0, 0, 0, 0, 0, 0, 0][..], &target, option].concat();
    ipv6(source, "ff02::1:ff00:1", ICMPV6, 255, &message)
}

pub(crate) const ECHO: [u8; 8] = [8, 0, 0xf7, 0xff, 0, 0, 0, 0];
pub(crate) const ECHO_V6: [u8; 8] = [128, 0, 0, 0, 0, 0, 0, 0];
pub(crate) const ICMP: u8 = 1;
pub(crate) const TCP: u8 = 6;
pub(crate) const UDP: u8 = 17;
pub(crate) const ICMPV6: u8 = 58;

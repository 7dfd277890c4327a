//! Every path of the programs, by BPF_PROG_TEST_RUN: what is returned, which bytes come out, what is counted.

use std::net::UdpSocket;

use basal_datapath::{linux::maps::PinnedMaps, plan::Peer, rows, state::Symbol};
use basal_maps::{
    ipcache::{FLAG_HAS_TUNNEL_ENDPOINT, IpcacheKey, RemoteEndpointInfo},
    mark,
};
use zerocopy::IntoBytes as _;

use crate::{
    bench::{
        Bench, ECHO, ECHO_V6, EGRESS, GATEWAY_MAC, HOST, ICMP, ICMPV6, IDENTITY, INGRESS, LXC, OK, OVERLAY, POD_MAC,
        REDIRECT, SHOT, TCP, UDP, arp, checksum, counters, ethernet, ipv4, ipv6, solicitation,
    },
    harness::{Netns, pair, sandbox},
};

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

/// Drops what a pod sends, each with its reason.
fn dropped<const N: usize>(frames: [(Vec<u8>, u8); N]) {
    sandbox(|bpffs| {
        let bench = Bench::new(bpffs, true);
        for (frame, reason) in &frames {
            let run = bench.pod_sends(frame);
            assert_eq!((run.action, run.counted), (SHOT, vec![(*reason, EGRESS, LXC, 1)]), "{frame:x?}");
        }
    });
}

#[test]
fn what_a_pod_may_not_send_is_dropped_with_ciliums_reason() {
    let mut version = ipv4("10.1.1.7", "10.1.2.7", ICMP, &ECHO);
    version[14] = 0x55;
    dropped([
        (arp([10, 1, 1, 1])[..30].to_vec(), 134),
        (version, 134),
        (ethernet(0x88cc, &[0; 46]), 139),
        (ethernet(0x8100, &[&[0, 5, 8, 0][..], &[0; 46]].concat()), 182),
        (ethernet(0x88a8, &[&[0, 5, 0x81, 0][..], &[0; 46]].concat()), 182),
        (ipv4("10.1.1.7", "192.168.77.2", UDP, &[0x80, 0, 0x21, 0x18, 0, 8, 0, 0]), 170),
        (ipv6("fd00:1:1::7", "fd77::2", UDP, 64, &[0x80, 0, 0x21, 0x18, 0, 8, 0, 0]), 170),
    ]);
}

/// A frame with another source MAC address.
fn spoofed(mut frame: Vec<u8>) -> Vec<u8> {
    frame[6..12].copy_from_slice(&[2, 1, 1, 0, 0, 8]);
    frame
}

#[test]
fn a_pod_cannot_speak_for_another() {
    let mut arp_mac = arp([10, 1, 1, 1]);
    arp_mac[22..28].copy_from_slice(&[2, 1, 1, 0, 0, 8]);
    let mut arp_ip = arp([10, 1, 1, 1]);
    arp_ip[28..32].copy_from_slice(&[10, 1, 1, 8]);
    let mut arp_reply = arp([10, 1, 1, 1]);
    arp_reply[21] = 2;
    arp_reply[28..32].copy_from_slice(&[10, 1, 1, 1]);
    dropped([
        (ipv4("10.1.1.8", "10.1.2.7", ICMP, &ECHO), 132),
        (ipv4("10.1.1.1", "10.1.2.7", ICMP, &ECHO), 132),
        (ipv6("fe80::1", "ff02::16", ICMPV6, 1, &ECHO_V6), 132),
        (ipv6("fd00:1:1::8", "fd00:1:2::7", TCP, 64, &[0; 20]), 132),
        (arp_ip, 132),
        (arp_reply, 132),
        (solicitation("fd00:1:1::8", "fd00:1:1::1", &[]), 132),
        (spoofed(ipv4("10.1.1.7", "10.1.2.7", ICMP, &ECHO)), 130),
        (spoofed(ipv6("fd00:1:1::7", "fd00:1:2::7", TCP, 64, &[0; 20])), 130),
        (spoofed(arp([10, 1, 1, 1])), 130),
        (arp_mac, 130),
        (spoofed(solicitation("fd00:1:1::7", "fd00:1:1::1", &[])), 130),
    ]);
}

#[test]
fn a_pods_packets_for_groups_are_dropped() {
    let broadcast = |mut frame: Vec<u8>| {
        frame[..6].fill(0xff);
        frame
    };
    dropped([
        (ipv4("10.1.1.7", "224.0.0.251", UDP, &[0x14, 0xe9, 0x14, 0xe9, 0, 8, 0, 0]), 151),
        (broadcast(ipv4("10.1.1.7", "255.255.255.255", UDP, &[0, 68, 0, 67, 0, 8, 0, 0])), 151),
        (ipv6("fd00:1:1::7", "ff02::fb", UDP, 255, &[0x14, 0xe9, 0x14, 0xe9, 0, 8, 0, 0]), 151),
        (broadcast(ipv4("10.1.1.7", "10.1.1.8", ICMP, &ECHO)), 131),
        (broadcast(ipv6("fd00:1:1::7", "fd00:1:1::8", ICMPV6, 64, &ECHO_V6)), 131),
    ]);
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

        let mut probe = arp([10, 1, 1, 7]);
        probe[28..32].fill(0);
        for other in [arp([10, 1, 1, 9]), probe] {
            let run = bench.pod_sends(&other);
            assert_eq!((run.action, run.frame), (OK, other));
        }
    });
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
        let gone = ipv4("10.1.1.1", "10.1.1.99", ICMP, &ECHO);
        for (skb_mark, action) in [(0, REDIRECT), (mark::MAGIC_UNREACHABLE, SHOT)] {
            let run = bench.host_sends(skb_mark, &gone);
            assert_eq!((run.action, run.mark), (action, mark::MAGIC_UNREACHABLE), "the stack is asked once to answer");
            assert_eq!((run.frame, run.counted), (gone.clone(), vec![(151, EGRESS, HOST, 1)]));
        }
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

#[test]
fn segments_go_direct_when_each_of_them_fits() {
    sandbox(|bpffs| {
        let bench = Bench::new(bpffs, false);
        let ports = [0x9c, 0x40, 0, 80];
        // A SYN; then more data than fits into the tunnel at once, behind a header with twelve bytes of options.
        let open = [&ports[..], &[0; 8], &[0x50, 2, 0, 0, 0, 0, 0, 0]].concat();
        let data = [&ports[..], &[0; 8], &[0x80, 0x10, 0, 0, 0, 0, 0, 0], &[0; 12], &[7; 2796]].concat();
        for (destination, fits) in [("10.1.2.7", OK), ("10.1.1.8", REDIRECT)] {
            let frame = ipv4("10.1.1.7", destination, TCP, &data);
            assert_eq!(bench.pod_sends(&frame).action, OK, "nobody saw it begin");
            assert_eq!(bench.pod_sends(&ipv4("10.1.1.7", destination, TCP, &open)).action, REDIRECT);
            assert_eq!(bench.pod_sends(&frame).action, fits, "whole, to {destination}");
            assert_eq!(bench.pod_sends_segments(&frame, 1398).action, REDIRECT);
            assert_eq!(bench.pod_sends_segments(&frame, 1399).action, fits, "1451 bytes, to {destination}");
        }
        let (from, to) = ("fd00:1:1::7", "fd00:1:2::7");
        assert_eq!(bench.pod_sends(&ipv6(from, to, TCP, 64, &open)).action, REDIRECT);
        let frame = ipv6(from, to, TCP, 64, &data);
        assert_eq!(bench.pod_sends_segments(&frame, 1378).action, REDIRECT);
        assert_eq!(bench.pod_sends_segments(&frame, 1379).action, OK, "1451 bytes");
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

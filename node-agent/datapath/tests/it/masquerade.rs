//! Masquerading by programs: pods of a node, the node itself, and machines outside that know no pods.

use std::{
    io::ErrorKind,
    net::{IpAddr, SocketAddr, UdpSocket},
    path::Path,
    time::Duration,
};

use basal_datapath::{
    flows::MapUse,
    kernel::Kernel as _,
    op::Op,
    rows,
    state::{Hook, Symbol},
};
use basal_maps::spec::{self, MapSpec};
use basal_runtime::outcome::Outcome;

use crate::{
    answers::{datagram_too_big, refusal, told},
    harness::{Netns, Node, masquerading, outside, sandbox},
    traffic::{PATIENCE, collect, kube_proxy, open, overwrite, rows_of, tcp_source, two_pods},
};

/// A node whose programs masquerade, with two pods, and a machine outside: 172.16.0.2 and fd16::2.
struct World {
    one: Node,
    pods: [Netns; 2],
    outside: Netns,
    _others: (Node, Netns),
}

fn world(bpffs: &Path) -> World {
    let (mut one, two, pod_one, pod_two) = two_pods(bpffs, true);
    let other_pod = one.add_pod(8, 3333);
    let outside = outside(&one);
    one.plan.bpf_masquerade = masquerading(&["w0"]);
    one.converge();
    World { one, pods: [pod_one, other_pod], outside, _others: (two, pod_two) }
}

fn udp(netns: &Netns, address: &str) -> UdpSocket {
    let socket = netns.enter(|| UdpSocket::bind(address).unwrap());
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

/// Sends a datagram and gets it back; gives the address that the server saw.
fn echo(client: &UdpSocket, server: &UdpSocket, to: &str, data: &[u8]) -> SocketAddr {
    client.send_to(data, to).unwrap();
    let mut received = vec![0; 65536];
    let (length, from) = server.recv_from(&mut received).unwrap();
    assert!(received[..length] == *data);
    server.send_to(&received[..length], from).unwrap();
    let (length, _) = client.recv_from(&mut received).unwrap();
    assert!(received[..length] == *data, "what came back is another pod's");
    from
}

#[test]
fn pods_reach_the_outside_by_the_nodes_address_and_nftables_leaves_that_device_alone() {
    sandbox(|bpffs| {
        let World { one, pods: [pod, _other], outside, _others } = world(bpffs);
        let rules = one.netns.run("nft list table inet basal").unwrap();
        let masquerading: Vec<&str> = rules.lines().filter(|line| line.contains("masquerade")).collect();
        assert!(
            masquerading.len() == 2 && masquerading.iter().all(|rule| rule.contains("oifname != \"w0\"")),
            "{rules}"
        );
        for (server, to, node) in [("0.0.0.0", "172.16.0.2", "172.16.0.1"), ("[::]", "[fd16::2]", "fd16::1")] {
            let source = tcp_source(&outside, &format!("{server}:80"), &pod, &format!("{to}:80"));
            assert_eq!(source.ip().to_string(), node);
            let (client, listener) = (udp(&pod, &format!("{server}:0")), udp(&outside, &format!("{server}:53")));
            let source = echo(&client, &listener, &format!("{to}:53"), b"question");
            assert_eq!(source, SocketAddr::new(node.parse().unwrap(), client.local_addr().unwrap().port()));
            pod.ping(to.trim_matches(['[', ']'])).unwrap();
            // And the node itself, which goes through the same programs.
            assert_eq!(
                tcp_source(&outside, &format!("{server}:81"), &one.netns, &format!("{to}:81")).ip().to_string(),
                node
            );
            one.netns.ping(to.trim_matches(['[', ']'])).unwrap();
        }
    });
}

#[test]
fn flows_of_one_port_are_told_apart() {
    sandbox(|bpffs| {
        let World { one, pods, outside, _others } = world(bpffs);
        for (any, to) in [("0.0.0.0", "172.16.0.2:53"), ("[::]", "[fd16::2]:53")] {
            let server = udp(&outside, &format!("{any}:53"));
            let clients = [&pods[0], &one.netns, &pods[1]].map(|netns| udp(netns, &format!("{any}:50000")));
            let seen = clients.each_ref().map(|client| echo(client, &server, to, b"one"));
            assert_eq!(seen[0].port(), 50000, "the first keeps its port");
            let ports = seen.map(|address| address.port());
            assert!(ports[0] != ports[1] && ports[1] != ports[2] && ports[0] != ports[2], "{ports:?}");
            for (client, before) in clients.iter().zip(seen).rev() {
                assert_eq!(echo(client, &server, to, b"two"), before, "a flow keeps its port");
            }
        }
    });
}

#[test]
fn datagrams_in_fragments_are_masqueraded_whole() {
    sandbox(|bpffs| {
        let World { pods: [pod, _other], outside, one: _one, _others } = world(bpffs);
        let data: Vec<u8> = (0..4000_u32).map(|number| number as u8).collect();
        for (any, to) in [("0.0.0.0", "172.16.0.2"), ("[::]", "[fd16::2]")] {
            let (client, server) = (udp(&pod, &format!("{any}:0")), udp(&outside, &format!("{any}:53")));
            assert!(!echo(&client, &server, &format!("{to}:53"), &data).ip().to_string().contains(":1:"));
            pod.run(&format!("ping -n -c 1 -W 5 -s 4000 {}", to.trim_matches(['[', ']']))).unwrap();
        }
    });
}

/// A machine behind the one outside, by a link that takes 1300 bytes: 198.51.100.2 and fd51::2.
fn far(outside: &Netns, nodes: &Netns) -> Netns {
    let far = Netns::new();
    outside.ip(&format!("link add f0 mtu 1300 type veth peer name f0 mtu 1300 netns {}", far.path().display()));
    for (netns, last) in [(outside, 1), (&far, 2)] {
        netns.ip(&format!("addr add 198.51.100.{last}/24 dev f0"));
        netns.ip(&format!("addr add fd51::{last}/64 dev f0 nodad"));
        netns.ip("link set f0 up");
    }
    outside.run("sysctl -q -w net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1").unwrap();
    for (netns, gateways) in [(nodes, ["172.16.0.2", "fd16::2"]), (&far, ["198.51.100.1", "fd51::1"])] {
        gateways.iter().for_each(|gateway| netns.ip(&format!("route add default via {gateway}")));
    }
    far
}

#[test]
fn errors_from_outside_reach_the_pod_that_they_are_about() {
    sandbox(|bpffs| {
        let World { one, pods: [pod, _other], outside, _others } = world(bpffs);
        for to in ["172.16.0.2:9", "[fd16::2]:9"] {
            assert_eq!(refusal(&pod, to), ErrorKind::ConnectionRefused, "{to}");
        }
        let _far = far(&outside, &one.netns);
        for (ping, who) in [("-t 2 198.51.100.2", "From 172.16.0.2 "), ("-t 2 fd51::2", "From fd16::2 ")] {
            let error = told(&pod, ping);
            let exceeded = ["Time to live exceeded", "Time exceeded: Hop limit"];
            assert!(error.contains(who) && exceeded.iter().any(|text| error.contains(text)), "{ping}: {error}");
        }
        assert_eq!(datagram_too_big(&pod, "198.51.100.2:9", 1400), 1300);
        let error = told(&pod, "-M do -s 1352 fd51::2");
        assert!(error.contains("Packet too big: mtu=1300"), "{error}");
    });
}

#[test]
fn errors_of_pods_are_understood_outside() {
    sandbox(|bpffs| {
        let World { pods: [pod, _other], outside, one: _one, _others } = world(bpffs);
        for (any, to) in [("0.0.0.0", "172.16.0.2:53"), ("[::]", "[fd16::2]:53")] {
            let (client, server) = (udp(&pod, &format!("{any}:0")), udp(&outside, &format!("{any}:53")));
            server.connect(echo(&client, &server, to, b"question")).unwrap();
            drop(client);
            server.send(b"too late").unwrap();
            assert_eq!(server.recv(&mut [0; 8]).unwrap_err().kind(), ErrorKind::ConnectionRefused, "{to}");
        }
    });
}

#[test]
fn who_knows_the_way_to_a_pod_gets_answers_from_the_pod() {
    sandbox(|bpffs| {
        let World { pods: [pod, _other], outside, one: _one, _others } = world(bpffs);
        outside.ip("route add 10.1.1.0/24 via 172.16.0.1");
        outside.ip("route add fd00:1:1::/64 via fd16::1");
        for (any, to) in [("0.0.0.0", "10.1.1.7"), ("[::]", "[fd00:1:1::7]")] {
            outside.ping(to.trim_matches(['[', ']'])).unwrap();
            tcp_source(&pod, &format!("{any}:80"), &outside, &format!("{to}:80"));
            let (client, server) = (udp(&outside, &format!("{any}:0")), udp(&pod, &format!("{any}:53")));
            client.connect(format!("{to}:53")).unwrap();
            client.send(b"question").unwrap();
            let (_, from) = server.recv_from(&mut [0; 8]).unwrap();
            server.send_to(b"answer", from).unwrap();
            // A connected socket takes answers from whom it asked only.
            assert_eq!(client.recv(&mut [0; 8]).unwrap(), 6);
        }
    });
}

#[test]
fn services_are_translated_inside_of_it() {
    sandbox(|bpffs| {
        let World { one, pods: [pod, other], outside, _others } = world(bpffs);
        one.netns.ip("route add 10.96.0.0/16 dev u0");
        kube_proxy(&one, "10.96.0.10", "172.16.0.2:8080");
        let source = tcp_source(&outside, "0.0.0.0:8080", &pod, "10.96.0.10:80");
        assert_eq!(source.ip().to_string(), "172.16.0.1", "a Service whose backend is outside");
        kube_proxy(&one, "172.16.0.1", "10.1.1.8:8080");
        let source = tcp_source(&other, "0.0.0.0:8080", &outside, "172.16.0.1:80");
        assert_eq!(source.ip().to_string(), "172.16.0.2", "a NodePort with a pod behind it");
    });
}

#[test]
fn what_goes_to_other_nodes_and_their_pods_is_as_before() {
    sandbox(|bpffs| {
        let (mut one, two, pod_one, pod_two) = two_pods(bpffs, true);
        one.plan.bpf_masquerade = masquerading(&[]);
        let applied = one.converge().concat();
        let hooks = |op: &&Op| matches!(op, Op::Attach(Hook::Device { link, .. }, _) if link.as_str() == "u0");
        assert_eq!(applied.iter().filter(hooks).count(), 2, "the device with the node's address: {applied:#?}");
        for to in ["10.1.2.7", "fd00:1:2::7", "192.168.77.2", "fd77::2"] {
            pod_one.ping(to).unwrap();
        }
        assert_eq!(tcp_source(&pod_two, "0.0.0.0:80", &pod_one, "10.1.2.7:80").ip().to_string(), "10.1.1.7");
        assert_eq!(tcp_source(&two.netns, "0.0.0.0:80", &pod_one, "192.168.77.2:80").ip().to_string(), "192.168.77.1");
        one.plan.native_networks.insert("192.168.77.0/24".parse().unwrap());
        one.converge();
        assert_eq!(tcp_source(&two.netns, "0.0.0.0:80", &pod_one, "192.168.77.2:80").ip().to_string(), "10.1.1.7");
        // No tunnel packet has a row of its own.
        let rows = rows_of::<14, 40>(&one, &spec::NAT4);
        assert!(rows.iter().all(|(key, _)| key[8..10] != 8472_u16.to_be_bytes()), "{rows:?}");
    });
}

#[test]
fn a_connection_goes_on_when_programs_take_over() {
    sandbox(|bpffs| {
        let World { mut one, pods: [pod, _other], outside, _others } = world(bpffs);
        one.plan.bpf_masquerade = None;
        let applied = one.converge().concat();
        assert!(applied.iter().any(|op| matches!(op, Op::Detach(Hook::Device { symbol: Symbol::ToNetdev, .. }))));
        for spec in &spec::OF_MASQUERADING {
            assert!(!one.paths.maps().join(spec.name).exists(), "{} takes memory", spec.name);
        }
        let (client, server) = (udp(&pod, "0.0.0.0:50001"), udp(&outside, "0.0.0.0:53"));
        let seen = echo(&client, &server, "172.16.0.2:53", b"by nftables");
        one.plan.bpf_masquerade = masquerading(&["w0"]);
        one.converge();
        assert_eq!(echo(&client, &server, "172.16.0.2:53", b"by programs"), seen);
        assert_eq!(one.converge(), Vec::<Vec<Op>>::new());
        // Another size is another set, with maps of its own, and nothing is left of the one before.
        one.plan.bpf_masquerade.as_mut().unwrap().sizes.any = 1024;
        one.converge();
        pod.ping("172.16.0.2").unwrap();
        assert_eq!(std::fs::read_dir(one.paths.bpffs.join("basal/programs")).unwrap().count(), 1);
    });
}

#[test]
fn what_leaves_by_a_device_without_programs_is_masqueraded_all_the_same() {
    sandbox(|bpffs| {
        let World { mut one, pods: [pod, _other], outside, _others } = world(bpffs);
        one.plan.bpf_masquerade = masquerading(&["nobody0"]);
        let applied = one.converge().concat();
        let first = |wanted: fn(&Op) -> bool| applied.iter().position(wanted).unwrap();
        let (rule, detached) = (first(|op| matches!(op, Op::SetNft(..))), first(|op| matches!(op, Op::Detach(_))));
        assert!(rule < detached, "a packet meets one of the two");
        assert_eq!(tcp_source(&outside, "0.0.0.0:80", &pod, "172.16.0.2:80").ip().to_string(), "172.16.0.1");
    });
}

#[test]
fn devices_and_addresses_are_followed() {
    sandbox(|bpffs| {
        let World { one, pods: [pod, _other], outside, _others } = world(bpffs);
        let server = udp(&outside, "0.0.0.0:53");
        let client = udp(&pod, "0.0.0.0:50002");
        echo(&client, &server, "172.16.0.2:53", b"before");
        one.netns.ip("addr add 172.16.0.77/24 dev w0");
        one.netns.ip("addr del 172.16.0.1/24 dev w0");
        // The second address became the first one, or went with it.
        one.netns.run("ip addr replace 172.16.0.77/24 dev w0").unwrap();
        one.converge();
        let seen = echo(&client, &server, "172.16.0.2:53", b"after");
        assert_eq!(seen.ip(), IpAddr::from([172, 16, 0, 77]), "the flow, too");

        one.netns.ip("link del w0");
        one.converge();
        assert!(!one.paths.bpffs.join("cilium/devices/w0").exists(), "nothing is left of it");
        let outside = crate::harness::outside(&one);
        one.converge();
        assert_eq!(tcp_source(&outside, "0.0.0.0:80", &pod, "172.16.0.2:80").ip().to_string(), "172.16.0.1");
    });
}

fn left(maps: &[MapUse]) -> usize {
    maps.iter().map(|map| map.rows).sum()
}

/// Offset of the lifetime in a row of connection tracking, and of the time at which a translation was made.
const LIFETIME: usize = 32;
const CREATED: usize = 0;

#[test]
fn what_is_left_of_connections_that_ended_is_taken_away() {
    sandbox(|bpffs| {
        let World { mut one, pods: [pod, _other], outside, _others } = world(bpffs);
        for (any, to) in [("0.0.0.0", "172.16.0.2"), ("[::]", "[fd16::2]")] {
            tcp_source(&outside, &format!("{any}:80"), &pod, &format!("{to}:80"));
            pod.ping(to.trim_matches(['[', ']'])).unwrap();
        }
        let before = collect(&one);
        assert!(before.iter().all(|map| map.deleted == 0), "{before:?}");
        let by_name = |maps: &[MapUse], spec: &MapSpec| *maps.iter().find(|map| map.map == spec.name).unwrap();
        for spec in [&spec::NAT4, &spec::NAT6] {
            let used = by_name(&before, spec);
            assert!(used.rows >= 4 && used.max == 4096, "two flows have two rows each: {used:?}");
        }

        // A connection goes with both of its translations.
        overwrite::<14, 56>(&one, &spec::CT4_TCP, LIFETIME, &[0; 4]);
        let after = collect(&one);
        assert_eq!(by_name(&after, &spec::CT4_TCP).rows, 0);
        assert!(by_name(&after, &spec::NAT4).deleted >= 2 && by_name(&after, &spec::NAT6).deleted == 0);
        assert!(left(&after) < left(&before));

        // Translations whose connection the kernel dropped for room go once they are not new.
        let mut connections = open::<38, 56>(&one, &spec::CT6_ANY);
        let keys: Vec<_> = connections.keys().map(Result::unwrap).collect();
        keys.iter().for_each(|key| connections.remove(key).unwrap());
        assert_eq!(by_name(&collect(&one), &spec::NAT6).deleted, 0, "they may be of a packet on its way");
        overwrite::<38, 56>(&one, &spec::NAT6, CREATED, &[0; 8]);
        assert!(by_name(&collect(&one), &spec::NAT6).deleted >= 2);

        // Traffic goes on, and where nothing masquerades there is nothing to collect.
        pod.ping("172.16.0.2").unwrap();
        one.plan.bpf_masquerade = None;
        one.converge();
        assert_eq!(collect(&one), []);
    });
}

#[test]
fn a_full_map_makes_room_for_new_flows() {
    sandbox(|bpffs| {
        let World { one, pods: [pod, _other], outside, _others } = world(bpffs);
        let server = udp(&outside, "0.0.0.0:53");
        // More flows than the maps have rows for.
        for port in 33000..36000_u16 {
            let client = udp(&pod, &format!("0.0.0.0:{port}"));
            client.send_to(b"x", "172.16.0.2:53").unwrap();
        }
        let client = udp(&pod, "0.0.0.0:60000");
        server.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        while server.recv(&mut [0; 8]).is_ok() {}
        server.set_read_timeout(Some(PATIENCE)).unwrap();
        assert_eq!(echo(&client, &server, "172.16.0.2:53", b"still").ip().to_string(), "172.16.0.1");
        assert!(collect(&one).iter().all(|map| map.rows <= map.max as usize));
    });
}

#[test]
fn rows_of_others_go_and_ours_come_back() {
    sandbox(|bpffs| {
        let World { one, pods: [pod, _other], outside: _outside, _others } = world(bpffs);
        let observed = one.read();
        let device = observed.devices.iter().find(|(name, _)| name.as_str() == "w0").unwrap().1.index;
        let row = rows::masquerade(device, [172, 16, 0, 1].into());
        let foreign = rows::exempt("172.16.0.0/24".parse().unwrap());
        one.with(async |kernel| {
            for op in [Op::DeleteRow { map: row.map, key: row.key.clone() }, Op::PutRow(foreign.clone())] {
                assert!(matches!(kernel.apply(&op).await, Outcome::Done(())));
            }
        });
        let mended = one.converge().concat();
        assert_eq!(mended, [Op::PutRow(row), Op::DeleteRow { map: foreign.map, key: foreign.key }]);
        pod.ping("172.16.0.2").unwrap();
    });
}

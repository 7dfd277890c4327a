//! Two nodes: pods, hosts, services and the outside.

use std::{
    io::{BufRead as _, BufReader, ErrorKind},
    net::UdpSocket,
    process::{Command, Stdio},
    time::Duration,
};

use basal_datapath::{
    plan::DEFAULT_TUNNEL_PORT,
    routing::{Routing, Tunnel},
};

use crate::{
    harness::{Netns, Node, outside, pair, sandbox},
    traffic::{PATIENCE, POD_ONE, POD_TWO, kube_proxy, tcp_source, two_pods},
};

/// Runs `work` while tcpdump listens to tunnel packets on the wire of `node`; gives the VNIs of `count` packets.
fn vnis(node: &Node, count: usize, work: impl FnOnce()) -> Vec<u32> {
    let mut tcpdump = node.netns.enter(|| {
        Command::new("tcpdump")
            .args([
                "-Z",
                "root",
                "-i",
                "u0",
                "-n",
                "-l",
                "--immediate-mode",
                "-T",
                "vxlan",
                "-c",
                &count.to_string(),
                "udp port 8472",
            ])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("tcpdump cannot be run ({error}); install it"))
    });
    let mut log = BufReader::new(tcpdump.stderr.take().unwrap());
    let mut line = String::new();
    while !line.starts_with("listening on") {
        line.clear();
        assert_ne!(log.read_line(&mut line).unwrap(), 0, "tcpdump ended");
    }
    work();
    let output = tcpdump.wait_with_output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let vni = |line: &str| line.split_once("vni ")?.1.split_whitespace().next()?.parse().ok();
    text.lines().filter_map(vni).collect()
}

#[test]
fn pods_and_hosts_reach_each_other_in_both_families() {
    sandbox(|bpffs| {
        let (mut one, two, pod_one, pod_two) = two_pods(bpffs, true);
        let pod_three = one.add_pod(8, 3333);
        one.converge();
        for (from, to, what) in [
            (&pod_one, "10.1.1.8", "pod to pod on a node"),
            (&pod_one, "fd00:1:1::8", "pod to pod on a node, IPv6"),
            (&pod_three, "10.1.1.7", "and back"),
            (&pod_one, "10.1.2.7", "pod to pod across nodes"),
            (&pod_one, "fd00:1:2::7", "pod to pod across nodes, IPv6"),
            (&pod_two, "10.1.1.8", "and back"),
            (&pod_one, "10.1.1.1", "pod to its router"),
            (&pod_one, "fd00:1:1::1", "pod to its router, IPv6"),
            (&pod_one, "192.168.77.1", "pod to its host"),
            (&pod_one, "192.168.77.2", "pod to the other host"),
            (&pod_one, "fd77::2", "pod to the other host, IPv6"),
            (&pod_one, "10.1.2.1", "pod to the other router"),
            (&pod_one, "10.1.1.2", "pod to its node's health address"),
            (&pod_one, "10.1.2.2", "pod to the other node's health address"),
            (&one.netns, "10.1.2.2", "host to the other node's health address"),
            (&one.netns, "fd00:1:2::2", "host to the other node's health address, IPv6"),
            (&one.netns, "10.1.1.7", "host to pod"),
            (&one.netns, "fd00:1:1::7", "host to pod, IPv6"),
            (&one.netns, "10.1.2.7", "host to remote pod"),
            (&one.netns, "fd00:1:2::7", "host to remote pod, IPv6"),
            (&two.netns, "10.1.1.8", "and from the other"),
        ] {
            from.ping(to).unwrap_or_else(|error| panic!("{what}: {error}"));
        }
        // 1472 and 1452 bytes of data fill a packet of 1500, which must be fragmented for the tunnel.
        pod_one.run("ping -n -c 1 -W 5 -s 1472 10.1.2.7").unwrap();
        pod_one.run("ping -n -c 1 -W 5 -s 4000 10.1.2.7").unwrap();
        pod_one.run("ping -n -c 1 -W 5 -s 4000 fd00:1:2::7").unwrap();
        assert_eq!(tcp_source(&pod_two, "0.0.0.0:80", &pod_one, "10.1.2.7:80").ip().to_string(), "10.1.1.7");
        assert_eq!(tcp_source(&pod_two, "[::]:80", &pod_one, "[fd00:1:2::7]:80").ip().to_string(), "fd00:1:1::7");
    });
}

#[test]
fn the_tunnel_carries_the_source_identity() {
    sandbox(|bpffs| {
        let (one, two, pod_one, _pod_two) = two_pods(bpffs, true);
        let from_pod = vnis(&two, 2, || drop(pod_one.ping("10.1.2.7").unwrap()));
        assert_eq!(from_pod, [POD_ONE, POD_TWO]);
        let from_pod = vnis(&two, 2, || drop(pod_one.ping("fd00:1:2::7").unwrap()));
        assert_eq!(from_pod, [POD_ONE, POD_TWO]);
        let from_host = vnis(&two, 2, || drop(one.netns.ping("10.1.2.7").unwrap()));
        assert_eq!(from_host, [6, POD_TWO], "the host is a remote node to others");
    });
}

#[test]
fn the_direct_path_carries_pings_and_leaves_datagrams_to_the_stack() {
    sandbox(|bpffs| {
        let (mut one, _two, pod_one, pod_two) = two_pods(bpffs, false);
        let pod_three = one.add_pod(8, 3333);
        one.converge();
        // Only the direct path works without forwarding.
        one.netns.run("sysctl -qw net.ipv4.ip_forward=0").unwrap();
        for to in ["10.1.1.8", "10.1.2.7"] {
            let answer = pod_one.ping(to).unwrap();
            assert!(answer.contains("ttl=63"), "one hop: {answer}");
        }
        pod_three.ping("10.1.1.7").unwrap();
        let server = pod_two.enter(|| UdpSocket::bind("0.0.0.0:53").unwrap());
        let client = pod_one.enter(|| UdpSocket::bind("0.0.0.0:0").unwrap());
        server.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        client.send_to(b"question", "10.1.2.7:53").unwrap();
        let blocked = server.recv(&mut [0; 8]).unwrap_err();
        assert_eq!(blocked.kind(), ErrorKind::WouldBlock, "UDP goes by the stack, which does not forward");
        one.converge();
        client.send_to(b"question", "10.1.2.7:53").unwrap();
        server.set_read_timeout(Some(PATIENCE)).unwrap();
        server.recv(&mut [0; 8]).unwrap();
        pod_one.ping("fd00:1:1::8").unwrap();
        pod_one.ping("fd00:1:2::7").unwrap();
        pod_one.run("ping -n -c 1 -W 5 -s 1472 10.1.2.7").unwrap();
    });
}

#[test]
fn services_are_translated_both_ways() {
    sandbox(|bpffs| {
        let (mut one, _two, pod_one, pod_two) = two_pods(bpffs, true);
        let pod_three = one.add_pod(8, 3333);
        one.converge();
        one.netns.ip("route add 10.96.0.0/16 dev u0");

        kube_proxy(&one, "10.96.0.10", "10.1.2.7:8080");
        let source = tcp_source(&pod_two, "0.0.0.0:8080", &pod_one, "10.96.0.10:80");
        assert_eq!(source.ip().to_string(), "10.1.1.7", "a remote backend sees the pod");
        let source = tcp_source(&pod_two, "0.0.0.0:8080", &one.netns, "10.96.0.10:80");
        assert_eq!(source.ip().to_string(), "10.1.1.1", "a remote backend sees the host by its router address");
        assert_eq!(udp_answer(&pod_two, &pod_one), "10.96.0.10:80");

        kube_proxy(&one, "10.96.0.10", "10.1.1.8:8080");
        let source = tcp_source(&pod_three, "0.0.0.0:8080", &pod_one, "10.96.0.10:80");
        assert_eq!(source.ip().to_string(), "10.1.1.7", "a local backend sees the pod");
        tcp_source(&pod_three, "0.0.0.0:8080", &one.netns, "10.96.0.10:80");
    });
}

/// Whom a client that sent a datagram to the service hears from.
fn udp_answer(server: &Netns, client: &Netns) -> String {
    let server = server.enter(|| UdpSocket::bind("0.0.0.0:8080").unwrap());
    let client = client.enter(|| UdpSocket::bind("0.0.0.0:0").unwrap());
    for socket in [&server, &client] {
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
    }
    client.send_to(b"question", "10.96.0.10:80").unwrap();
    let mut buffer = [0; 64];
    let (_, from) = server.recv_from(&mut buffer).unwrap();
    server.send_to(b"answer", from).unwrap();
    client.recv_from(&mut buffer).unwrap().1.to_string()
}

#[test]
fn a_node_port_reaches_a_remote_pod() {
    sandbox(|bpffs| {
        let (one, _two, _pod_one, pod_two) = two_pods(bpffs, true);
        let outside = outside(&one);
        kube_proxy(&one, "172.16.0.1", "10.1.2.7:8080");
        let source = tcp_source(&pod_two, "0.0.0.0:8080", &outside, "172.16.0.1:80");
        assert_eq!(source.ip().to_string(), "10.1.1.1", "the reply must come back by the node that translated");
    });
}

#[test]
fn the_outside_sees_the_node() {
    sandbox(|bpffs| {
        let (one, _two, pod_one, _pod_two) = two_pods(bpffs, true);
        let outside = outside(&one);
        assert_eq!(tcp_source(&outside, "0.0.0.0:80", &pod_one, "172.16.0.2:80").ip().to_string(), "172.16.0.1");
        assert_eq!(tcp_source(&outside, "[::]:80", &pod_one, "[fd16::2]:80").ip().to_string(), "fd16::1");
    });
}

#[test]
fn the_tunnel_runs_over_ipv6_too() {
    sandbox(|bpffs| {
        let (mut one, mut two) = pair(bpffs);
        for (node, remote) in [(&mut one, "fd77::2"), (&mut two, "fd77::1")] {
            node.plan.routing = Routing::Tunnel(Tunnel { port: DEFAULT_TUNNEL_PORT, ipv6: true });
            node.plan.remote_nodes.values_mut().for_each(|node| node.tunnel_endpoint = remote.parse().ok());
        }
        let (pod_one, pod_two) = (one.add_pod(7, POD_ONE), two.add_pod(7, POD_TWO));
        one.converge();
        two.converge();
        assert_eq!(vnis(&two, 2, || drop(pod_one.ping("10.1.2.7").unwrap())), [POD_ONE, POD_TWO]);
        pod_one.ping("fd00:1:2::7").unwrap();
        assert_eq!(tcp_source(&pod_two, "0.0.0.0:80", &pod_one, "10.1.2.7:80").ip().to_string(), "10.1.1.7");
    });
}

//! What senders are told about packets that do not arrive: ICMP errors of nodes and pods, translated like what they are
//! about.

use std::{
    io::ErrorKind,
    net::{SocketAddr, UdpSocket},
    time::Duration,
};

use basal_e2e::wait::Stopwatch;

use crate::{
    harness::{Netns, Node, outside, sandbox},
    traffic::{PATIENCE, kube_proxy, tcp_source, two_pods},
};

/// A ping that fails, and what it says.
pub(crate) fn told(from: &Netns, ping: &str) -> String {
    from.run(&format!("ping -n -c 1 -W 20 {ping}")).unwrap_err()
}

#[test]
fn nobody_has_the_address() {
    for legacy in [true, false] {
        sandbox(|bpffs| {
            let (_one, two, pod_one, pod_two) = two_pods(bpffs, legacy);
            for (from, what) in [(&pod_one, "a pod"), (&pod_two, "a pod of another node"), (&two.netns, "another node")]
            {
                for (to, answer) in [
                    ("10.1.1.99", "From 10.1.1.1 icmp_seq=1 Destination Host Unreachable"),
                    ("fd00:1:1::99", "Address unreachable"),
                ] {
                    let error = told(from, to);
                    assert!(error.contains(answer), "{what} to {to}: {error}");
                }
            }
        });
    }
}

#[test]
fn hops_run_out() {
    for legacy in [true, false] {
        sandbox(|bpffs| {
            let (_one, _two, pod_one, _pod_two) = two_pods(bpffs, legacy);
            for (ping, who) in [("-t 1 10.1.2.7", "From 10.1.1.1 "), ("-t 1 fd00:1:2::7", "From fd00:1:1::1 ")] {
                let error = told(&pod_one, ping);
                let exceeded = ["Time to live exceeded", "Time exceeded: Hop limit"];
                assert!(error.contains(who) && exceeded.iter().any(|text| error.contains(text)), "{ping}: {error}");
            }
        });
    }
}

/// Lets pods send packets of 1500 bytes, as one does that does not keep to the MTU of its routes.
fn ignore_route_mtu(node: &Node, pod: &Netns) {
    let [v4, v6] = [node.plan.routers.v4.unwrap().to_string(), node.plan.routers.v6.unwrap().to_string()];
    for gateway in [v4, v6] {
        let family = if gateway.contains(':') { "-6" } else { "-4" };
        pod.run(&format!("ip {family} route replace default via {gateway} dev eth0")).unwrap();
    }
}

#[test]
fn a_packet_is_too_big_for_the_tunnel() {
    for legacy in [true, false] {
        sandbox(|bpffs| {
            let (one, two, pod_one, pod_two) = two_pods(bpffs, legacy);
            ignore_route_mtu(&one, &pod_one);
            ignore_route_mtu(&two, &pod_two);
            for (from, to, answer) in [
                (&pod_one, "-M do -s 1472 10.1.2.7", "Frag needed and DF set (mtu = 1450)"),
                (&pod_two, "-M do -s 1472 10.1.1.7", "Frag needed and DF set (mtu = 1450)"),
                (&pod_one, "-M do -s 1452 fd00:1:2::7", "Packet too big: mtu=1450"),
                (&pod_two, "-M do -s 1452 fd00:1:1::7", "Packet too big: mtu=1450"),
            ] {
                let error = told(from, to);
                assert!(error.contains(answer), "{to}: {error}");
            }
            // With what they learned, and what they are told about segments.
            tcp_source(&pod_two, "0.0.0.0:80", &pod_one, "10.1.2.7:80");
            tcp_source(&pod_one, "[::]:80", &pod_two, "[fd00:1:1::7]:80");
        });
    }
}

/// The path MTU that a machine knows for a destination; 0 for none.
fn path_mtu(machine: &Netns, to: &str) -> u32 {
    let route = machine.run(&format!("ip route get {to}")).unwrap();
    let mut words = route.split_whitespace().skip_while(|word| *word != "mtu").skip(1);
    words.next().and_then(|mtu| mtu.parse().ok()).unwrap_or_default()
}

/// Sends a datagram of so many bytes with `DF`, and waits until the sender knows a path MTU.
pub(crate) fn datagram_too_big(from: &Netns, to: &str, bytes: usize) -> u32 {
    let (ip, _) = to.split_once(':').unwrap();
    let socket = from.enter(|| UdpSocket::bind("0.0.0.0:0").unwrap());
    let watch = Stopwatch::start();
    loop {
        // One that is told at once has learned it.
        socket.send_to(&vec![0; bytes], to).map(drop).unwrap_or_default();
        match path_mtu(from, ip) {
            0 if watch.elapsed() < PATIENCE => std::thread::sleep(Duration::from_millis(20)),
            mtu => return mtu,
        }
    }
}

#[test]
fn a_translated_packet_is_too_big() {
    sandbox(|bpffs| {
        let (one, _two, pod_one, pod_two) = two_pods(bpffs, true);
        let outside = outside(&one);
        kube_proxy(&one, "172.16.0.1", "10.1.2.7:8080");
        assert_eq!(datagram_too_big(&outside, "172.16.0.1:80", 1472), 1450, "a client of a NodePort, about the tunnel");

        one.netns.ip("link set w0 mtu 1300");
        assert_eq!(datagram_too_big(&pod_one, "172.16.0.2:80", 1400), 1300, "a masqueraded pod, about the way out");
        tcp_source(&pod_two, "0.0.0.0:8080", &outside, "172.16.0.1:80");
        assert_eq!(path_mtu(&pod_two, "10.1.1.1"), 1300, "a backend of another node, about the way to the client");
    });
}

/// What a client that sends a datagram is told by its own stack.
pub(crate) fn refusal(client: &Netns, to: &str) -> ErrorKind {
    let address: SocketAddr = to.parse().unwrap();
    let any = if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = client.enter(|| UdpSocket::bind(any).unwrap());
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket.connect(address).unwrap();
    socket.send(b"question").unwrap();
    socket.recv(&mut [0; 8]).unwrap_err().kind()
}

#[test]
fn nobody_listens() {
    sandbox(|bpffs| {
        let (mut one, _two, pod_one, _pod_two) = two_pods(bpffs, true);
        let _pod_three = one.add_pod(8, 3333);
        one.converge();
        let outside = outside(&one);
        one.netns.ip("route add 10.96.0.0/16 dev u0");
        for (service, backend) in [("10.96.0.10", "10.1.2.7:8080"), ("10.96.0.10", "10.1.1.8:8080")] {
            kube_proxy(&one, service, backend);
            assert_eq!(refusal(&pod_one, "10.96.0.10:80"), ErrorKind::ConnectionRefused, "a Service at {backend}");
        }
        kube_proxy(&one, "172.16.0.1", "10.1.2.7:8080");
        assert_eq!(refusal(&outside, "172.16.0.1:80"), ErrorKind::ConnectionRefused, "a NodePort");
        for (from, to) in [
            (&pod_one, "10.1.2.7:9"),
            (&pod_one, "[fd00:1:2::7]:9"),
            (&pod_one, "172.16.0.2:9"),
            (&one.netns, "10.1.1.7:9"),
        ] {
            assert_eq!(refusal(from, to), ErrorKind::ConnectionRefused, "{to}");
        }
    });
}

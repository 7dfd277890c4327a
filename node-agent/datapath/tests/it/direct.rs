//! TCP connections that go past the stack without legacy host routing, and those that must not.

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{SocketAddr, SocketAddrV4, TcpListener, TcpStream},
    os::fd::AsRawFd as _,
    path::Path,
    time::Duration,
};

use basal_maps::spec::{self, MapSpec};
use nix::{
    libc::linger,
    sys::socket::{AddressFamily, SockFlag, SockType, SockaddrIn, bind, connect, setsockopt, socket, sockopt},
};

use crate::{
    harness::{Netns, Node, sandbox},
    traffic::{PATIENCE, collect, kube_proxy, open, overwrite, rows_of, tcp_source, two_pods},
};

/// Two nodes without legacy host routing: a pod on each, and another one on the first, 10.1.1.8.
struct World {
    one: Node,
    two: Node,
    pod_one: Netns,
    pod_two: Netns,
    pod_three: Netns,
}

fn world(bpffs: &Path) -> World {
    let (mut one, two, pod_one, pod_two) = two_pods(bpffs, false);
    let pod_three = one.add_pod(8, 3333);
    one.converge();
    World { one, two, pod_one, pod_two, pod_three }
}

/// A connection that stays.
struct Stream {
    client: TcpStream,
    server: TcpStream,
}

impl Stream {
    fn new(client: &Netns, server: &Netns, to: &str) -> Self {
        Self::at(client, "0.0.0.0:0", server, to, to)
    }

    /// From `from`, to a server that listens at `at` and is known as `to`.
    fn at(client: &Netns, from: &str, server: &Netns, at: &str, to: &str) -> Self {
        let at: SocketAddr = at.parse().unwrap();
        let listener = server.enter(|| TcpListener::bind(at).unwrap());
        let client = client.enter(|| connected(from.parse().unwrap(), to.parse().unwrap()));
        let (server, _) = listener.accept().unwrap();
        for stream in [&client, &server] {
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            stream.set_write_timeout(Some(PATIENCE)).unwrap();
        }
        Self { client, server }
    }

    /// More than one segment, both ways.
    fn works(&self) {
        let (data, mut received) = (vec![7; 100_000], vec![0; 100_000]);
        for (mut from, mut to) in [(&self.client, &self.server), (&self.server, &self.client)] {
            std::thread::scope(|scope| {
                scope.spawn(|| from.write_all(&data).unwrap());
                to.read_exact(&mut received).unwrap();
            });
        }
    }

    /// Breaks it off, so that its ports are free at once.
    fn reset(self) {
        setsockopt(&self.client, sockopt::Linger, &linger { l_onoff: 1, l_linger: 0 }).unwrap();
    }
}

/// A connection from a port, which others may have had.
fn connected(from: SocketAddrV4, to: SocketAddrV4) -> TcpStream {
    let socket = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap();
    setsockopt(&socket, sockopt::ReuseAddr, &true).unwrap();
    bind(socket.as_raw_fd(), &SockaddrIn::from(from)).unwrap();
    connect(socket.as_raw_fd(), &SockaddrIn::from(to)).unwrap();
    socket.into()
}

fn noted(node: &Node, spec: &MapSpec) -> usize {
    if spec.key_size == 14 { rows_of::<14, 12>(node, spec).len() } else { rows_of::<38, 12>(node, spec).len() }
}

/// Without it the stack passes on nothing.
fn forward(node: &Node, on: u8) {
    node.netns.run(&format!("sysctl -qw net.ipv4.ip_forward={on} net.ipv6.conf.all.forwarding={on}")).unwrap();
}

#[test]
fn connections_between_pods_go_past_the_stack() {
    sandbox(|bpffs| {
        let World { one, two, pod_one, pod_two, pod_three } = world(bpffs);
        for node in [&one, &two] {
            forward(node, 0);
        }
        for (server, to) in [(&pod_two, "10.1.2.7:80"), (&pod_three, "10.1.1.8:80")] {
            assert_eq!(tcp_source(server, "0.0.0.0:80", &pod_one, to).ip().to_string(), "10.1.1.7");
        }
        for (server, to) in [(&pod_two, "[fd00:1:2::7]:80"), (&pod_three, "[fd00:1:1::8]:80")] {
            assert_eq!(tcp_source(server, "[::]:80", &pod_one, to).ip().to_string(), "fd00:1:1::7");
        }
        // One for the pod of a connection to another node, two on one node.
        for spec in [&spec::DIRECT4, &spec::DIRECT6] {
            assert_eq!((noted(&one, spec), noted(&two, spec)), (3, 1), "{}", spec.name);
        }
        let refused = pod_one.enter(|| TcpStream::connect_timeout(&"10.1.2.7:9".parse().unwrap(), PATIENCE));
        assert_eq!(refused.unwrap_err().kind(), ErrorKind::ConnectionRefused);
    });
}

#[test]
fn services_are_translated_both_ways_whatever_went_direct_before() {
    sandbox(|bpffs| {
        let World { one, two: _two, pod_one, pod_two, pod_three } = world(bpffs);
        one.netns.ip("route add 10.96.0.0/16 dev u0");
        for (pod, backend) in [(&pod_two, "10.1.2.7:8080"), (&pod_three, "10.1.1.8:8080")] {
            kube_proxy(&one, "10.96.0.10", backend);
            let direct = || Stream::at(&pod_one, "0.0.0.0:40000", pod, backend, backend);
            let service = || Stream::at(&pod_one, "0.0.0.0:40000", pod, backend, "10.96.0.10:80");
            for connect in [&service as &dyn Fn() -> Stream, &direct, &service, &direct] {
                let stream = connect();
                stream.works();
                stream.reset();
            }
        }
    });
}

/// A kernel takes one port for two destinations, and kube-proxy may make them the same.
#[test]
fn of_two_connections_with_the_same_ends_the_newer_one_works() {
    sandbox(|bpffs| {
        let World { one, pod_one, pod_two, .. } = &world(bpffs);
        one.netns.ip("route add 10.96.0.0/16 dev u0");
        kube_proxy(one, "10.96.0.10", "10.1.2.7:8080");
        let older = Stream::at(pod_one, "0.0.0.0:40000", pod_two, "10.1.2.7:8080", "10.1.2.7:8080");
        older.works();
        Stream::at(pod_one, "0.0.0.0:40000", pod_two, "10.1.2.7:8080", "10.96.0.10:80").works();
        assert_eq!((&older.server).read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    });
}

/// To a port of the other node, which translates it to its own pod.
#[test]
fn what_another_node_translates_passes_its_stack() {
    sandbox(|bpffs| {
        let World { two, pod_one, pod_two, .. } = &world(bpffs);
        kube_proxy(two, "10.1.2.1", "10.1.2.7:8080");
        let stream = Stream::at(pod_one, "0.0.0.0:0", pod_two, "0.0.0.0:8080", "10.1.2.1:80");
        stream.works();
        assert_eq!(noted(two, &spec::DIRECT4), 0);
    });
}

#[test]
fn a_connection_outlives_its_notes_and_the_way_that_it_goes() {
    sandbox(|bpffs| {
        let World { mut one, mut two, pod_one, pod_two, pod_three: _pod_three } = world(bpffs);
        kube_proxy(&one, "10.96.0.10", "10.1.2.7:8080");
        kube_proxy(&two, "10.96.0.10", "10.1.2.7:8080");
        let stream = Stream::new(&pod_one, &pod_two, "10.1.2.7:80");
        stream.works();
        for node in [&one, &two] {
            let mut map = open::<14, 12>(node, &spec::DIRECT4);
            for (key, _) in rows_of::<14, 12>(node, &spec::DIRECT4) {
                map.remove(&key).unwrap();
            }
            stream.works();
        }
        let stream = Stream::new(&pod_one, &pod_two, "10.1.2.7:81");
        for legacy in [true, false] {
            for node in [&mut one, &mut two] {
                node.plan.legacy_routing = legacy;
                node.converge();
                stream.works();
                let has_map = node.paths.maps().join(spec::DIRECT4.name).exists();
                assert_eq!(has_map, !legacy, "it takes memory");
            }
        }
        stream.works();
    });
}

#[test]
fn more_connections_than_notes_go_on() {
    sandbox(|bpffs| {
        let World { one, pod_one, pod_two, .. } = &world(bpffs);
        kube_proxy(one, "10.96.0.10", "10.1.2.7:8080");
        let quiet = Stream::new(pod_one, pod_two, "10.1.2.7:80");
        let busy = Stream::new(pod_one, pod_two, "10.1.2.7:81");
        let mut map = open::<14, 12>(one, &spec::DIRECT4);
        for number in 0..spec::DIRECT4.max_entries * 5 / 4 {
            let [a, b, c, d] = number.to_be_bytes();
            map.insert([10, 2, b, c, 10, 1, 1, 7, a, d, 0, 80, 6, 0], [0; 12], 0).unwrap();
            if number % 10_000 == 0 {
                busy.works();
            }
        }
        quiet.works();
        busy.works();
        Stream::new(pod_one, pod_two, "10.1.2.7:82").works();
    });
}

#[test]
fn notes_of_connections_that_ended_are_taken_away() {
    sandbox(|bpffs| {
        let World { one, two, pod_one, pod_two, pod_three } = &world(bpffs);
        let open = Stream::new(pod_one, pod_two, "10.1.2.7:80");
        Stream::new(pod_one, pod_two, "10.1.2.7:81").works();
        Stream::new(pod_one, pod_three, "10.1.1.8:81").works();
        Stream::new(pod_one, pod_two, "10.1.2.7:82").reset();
        assert_eq!((noted(one, &spec::DIRECT4), noted(two, &spec::DIRECT4)), (5, 3));
        for node in [one, two] {
            let deleted = |node| collect(node).iter().map(|map| map.deleted).sum::<usize>();
            assert_eq!(deleted(node), 0, "their ends may be sent again");
            // Long ago.
            overwrite::<14, 12>(node, &spec::DIRECT4, 4, &[0; 4]);
            let left = collect(node);
            assert_eq!(
                left.iter().map(|map| (map.map, map.rows)).collect::<Vec<_>>(),
                [("basal_direct_v4", 1), ("basal_direct_v6", 0)]
            );
        }
        open.works();
    });
}

#[test]
fn who_asks_for_nobody_is_told_at_once() {
    sandbox(|bpffs| {
        let World { one, pod_one, .. } = &world(bpffs);
        // kube-proxy drops errors about what passed connection tracking by.
        kube_proxy(one, "10.96.0.10", "10.1.2.7:8080");
        for to in ["10.1.2.99:80", "[fd00:1:2::99]:80"] {
            let nobody = pod_one.enter(|| TcpStream::connect_timeout(&to.parse().unwrap(), PATIENCE));
            assert_eq!(nobody.unwrap_err().kind(), ErrorKind::HostUnreachable, "{to}");
        }
    });
}

#[test]
fn a_pod_that_sends_too_large_packets_is_told() {
    sandbox(|bpffs| {
        let World { pod_one, pod_two, pod_three, .. } = &world(bpffs);
        for pod in [pod_one, pod_two, pod_three] {
            // 1500 bytes of its device, where 1450 fit into the tunnel.
            let routes = pod.run("ip route show default").unwrap();
            let gateway = routes.split_whitespace().nth(2).unwrap().to_owned();
            pod.ip(&format!("route replace default via {gateway} dev eth0 mtu 1500"));
        }
        Stream::new(pod_one, pod_two, "10.1.2.7:80").works();
        Stream::new(pod_one, pod_three, "10.1.1.8:80").works();
        let route = pod_one.run("ip route get 10.1.2.7").unwrap();
        assert!(route.contains("mtu 1450"), "{route}");
    });
}

#[test]
fn where_one_node_goes_by_the_stack_the_other_need_not() {
    sandbox(|bpffs| {
        let World { one, mut two, pod_one, pod_two, pod_three: _pod_three } = world(bpffs);
        two.plan.legacy_routing = true;
        two.converge();
        kube_proxy(&two, "10.96.0.10", "10.1.2.7:8080");
        forward(&one, 0);
        Stream::new(&pod_one, &pod_two, "10.1.2.7:80").works();
        Stream::new(&pod_two, &pod_one, "10.1.1.7:80").works();
        forward(&one, 1);
        let blocked = Duration::from_millis(300);
        forward(&two, 0);
        let blocked = pod_one.enter(|| TcpStream::connect_timeout(&"10.1.2.7:80".parse().unwrap(), blocked));
        assert_eq!(blocked.unwrap_err().kind(), ErrorKind::TimedOut);
    });
}

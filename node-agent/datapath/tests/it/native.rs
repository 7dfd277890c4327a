//! Nodes without a tunnel.

use std::{collections::BTreeSet, net::IpAddr, path::Path};

use basal_datapath::{
    op::Op,
    plan::RemoteNode,
    routing::{DirectRoutes, NoRoute, Routing},
    rows::MapId,
    state::NodeState,
};

use crate::{
    harness::{Netns, Node, TUNNEL, node, outside, remote, sandbox},
    traffic::tcp_source,
};

/// The metric of routes that a node makes over its own devices.
const METRIC: &str = "metric 25185";

/// A network that machines are attached to.
struct Lan(Netns);

impl Lan {
    fn new() -> Self {
        let netns = Netns::new();
        netns.ip("link add br0 type bridge");
        netns.ip("link set br0 up");
        Self(netns)
    }

    /// Gives a machine a device on this network.
    fn attach(&self, machine: &Netns, device: &str, port: &str, addresses: &[&str]) {
        machine.ip(&format!("link add {device} type veth peer name {port} netns {}", self.0.path().display()));
        self.0.ip(&format!("link set {port} master br0"));
        self.0.ip(&format!("link set {port} up"));
        for address in addresses {
            let nodad = if address.contains(':') { "nodad" } else { "" };
            machine.ip(&format!("addr add {address} dev {device} {nodad}"));
        }
        machine.ip(&format!("link set {device} up"));
    }
}

/// Two nodes on one network that know each other, with a pod each: 10.1.1.7 and 10.1.2.7.
struct Two {
    one: Node,
    two: Node,
    pod_one: Netns,
    pod_two: Netns,
    lan: Lan,
}

fn two(bpffs: &Path, routes: DirectRoutes) -> Two {
    let lan = Lan::new();
    let make = |number: u8, other: u8| {
        let mut node = node(bpffs, number);
        node.plan.routing = Routing::Native(routes);
        node.plan.remote_nodes.insert(format!("n{other}"), remote(other));
        let addresses = [format!("192.168.77.{number}/24"), format!("fd77::{number}/64")];
        lan.attach(&node.netns, "u0", &format!("n{number}"), &addresses.each_ref().map(String::as_str));
        node
    };
    let (mut one, mut two) = (make(1, 2), make(2, 1));
    let (pod_one, pod_two) = (one.add_pod(7, 1111), two.add_pod(7, 2222));
    one.converge();
    two.converge();
    Two { one, two, pod_one, pod_two, lan }
}

fn routes(node: &Node, what: &str) -> String {
    node.netns.run(&format!("ip route show {what}")).unwrap()
        + &node.netns.run(&format!("ip -6 route show {what}")).unwrap()
}

#[test]
fn pods_and_hosts_reach_each_other_with_whole_packets_and_their_own_addresses() {
    sandbox(|bpffs| {
        let Two { one, two, pod_one, pod_two, lan: _lan } = two(bpffs, DirectRoutes::All);
        for (from, to, what) in [
            (&pod_one, "10.1.2.7", "pod to pod"),
            (&pod_one, "fd00:1:2::7", "pod to pod, IPv6"),
            (&pod_two, "10.1.1.7", "and back"),
            (&pod_one, "192.168.77.1", "pod to its host"),
            (&pod_one, "192.168.77.2", "pod to the other host"),
            (&pod_one, "fd77::2", "pod to the other host, IPv6"),
            (&pod_one, "10.1.2.1", "pod to the other router"),
            (&pod_one, "10.1.2.2", "pod to the other node's health address"),
            (&one.netns, "10.1.1.7", "host to pod"),
            (&one.netns, "10.1.2.7", "host to remote pod"),
            (&one.netns, "fd00:1:2::7", "host to remote pod, IPv6"),
            (&one.netns, "10.1.2.2", "host to the other node's health address"),
            (&two.netns, "fd00:1:1::7", "and from the other"),
        ] {
            from.ping(to).unwrap_or_else(|error| panic!("{what}: {error}"));
        }
        // 1472 and 1452 bytes of data fill a packet of 1500.
        pod_one.run("ping -n -c 1 -W 5 -M do -s 1472 10.1.2.7").unwrap();
        pod_one.run("ping -n -c 1 -W 5 -M do -s 1452 fd00:1:2::7").unwrap();
        assert_eq!(tcp_source(&pod_two, "0.0.0.0:80", &pod_one, "10.1.2.7:80").ip().to_string(), "10.1.1.7");
        assert_eq!(tcp_source(&pod_two, "[::]:80", &pod_one, "[fd00:1:2::7]:80").ip().to_string(), "fd00:1:1::7");

        let observed = one.read();
        assert!(!observed.devices.keys().any(|name| name.as_str() == "cilium_vxlan"));
        assert!(observed.state.maps[&MapId::Tunnel].is_empty());
        assert!(observed.state.maps[&MapId::Ipcache].values().all(|row| row[4..20] == [0; 16]), "no tunnel endpoints");
        assert_eq!(observed.state.hooks.len(), 5, "cilium_host twice, cilium_net, and the pod's two");
    });
}

#[test]
fn so_they_do_on_the_direct_path() {
    sandbox(|bpffs| {
        let Two { mut one, mut two, pod_one, pod_two, lan: _lan } = two(bpffs, DirectRoutes::All);
        for node in [&mut one, &mut two] {
            node.plan.legacy_routing = false;
            node.converge();
        }
        pod_one.ping("10.1.2.7").unwrap();
        pod_one.ping("fd00:1:2::7").unwrap();
        assert_eq!(tcp_source(&pod_two, "0.0.0.0:80", &pod_one, "10.1.2.7:80").ip().to_string(), "10.1.1.7");
    });
}

#[test]
fn who_sends_to_an_address_that_nobody_has_is_told() {
    sandbox(|bpffs| {
        let Two { one: _one, two: _two, pod_one, pod_two, lan: _lan } = two(bpffs, DirectRoutes::All);
        for (from, what) in [(&pod_two, "a pod of another node"), (&pod_one, "a pod")] {
            for (to, answer) in [("10.1.1.99", "Destination Host Unreachable"), ("fd00:1:1::99", "Address unreachable")]
            {
                let error = from.run(&format!("ping -n -c 1 -W 20 {to}")).unwrap_err();
                assert!(error.contains(answer), "{what} to {to}: {error}");
            }
        }
    });
}

#[test]
fn only_what_leaves_the_native_networks_takes_the_nodes_address() {
    sandbox(|bpffs| {
        let Two { mut one, two: _two, pod_one, pod_two: _pod_two, lan: _lan } = two(bpffs, DirectRoutes::All);
        let outside = outside(&one);
        let seen = |server: &str, to: &str| tcp_source(&outside, server, &pod_one, to).ip().to_string();
        assert_eq!(seen("0.0.0.0:80", "172.16.0.2:80"), "172.16.0.1");
        assert_eq!(seen("[::]:80", "[fd16::2]:80"), "fd16::1");

        one.plan.native_networks =
            BTreeSet::from(["172.16.0.0/12", "fd00::/8"].map(|network| network.parse().unwrap()));
        one.converge();
        outside.ip("route add 10.1.1.0/24 via 172.16.0.1");
        outside.ip("route add fd00:1:1::/64 via fd16::1");
        assert_eq!(seen("0.0.0.0:80", "172.16.0.2:80"), "10.1.1.7");
        assert_eq!(seen("[::]:80", "[fd16::2]:80"), "fd00:1:1::7");
    });
}

/// A third node, on a network behind a router that knows where all pods are. Others have their default routes by it.
struct Third {
    three: Node,
    pod: Netns,
    _router: Netns,
    _far: Lan,
}

fn third(bpffs: &Path, near: &Two) -> Third {
    let (router, far) = (Netns::new(), Lan::new());
    near.lan.attach(&router, "r0", "r0", &["192.168.77.254/24", "fd77::254/64"]);
    far.attach(&router, "r1", "r1", &["192.168.88.254/24", "fd88::254/64"]);
    router.run("sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1").unwrap();
    for (number, v4, v6) in [(1, "192.168.77.1", "fd77::1"), (3, "192.168.88.3", "fd88::3")] {
        router.ip(&format!("route add 10.1.{number}.0/24 via {v4}"));
        router.ip(&format!("route add fd00:1:{number}::/64 via {v6}"));
    }
    let mut three = node(bpffs, 3);
    three.plan.routing = Routing::Native(DirectRoutes::SameLink);
    three.plan.node_ips = node_ips_of_three();
    three.plan.remote_nodes.insert("n1".to_owned(), remote(1));
    let pod = three.add_pod(7, 3333);
    far.attach(&three.netns, "u0", "n3", &["192.168.88.3/24", "fd88::3/64"]);
    for (netns, v4, v6) in
        [(&near.one.netns, "192.168.77.254", "fd77::254"), (&three.netns, "192.168.88.254", "fd88::254")]
    {
        netns.ip(&format!("route add default via {v4}"));
        netns.ip(&format!("route add default via {v6}"));
    }
    three.converge();
    Third { three, pod, _router: router, _far: far }
}

fn node_ips_of_three() -> BTreeSet<IpAddr> {
    ["192.168.88.3", "fd88::3"].iter().map(|ip| ip.parse().unwrap()).collect()
}

#[test]
fn a_node_behind_a_router_is_the_networks_business() {
    sandbox(|bpffs| {
        let mut near = two(bpffs, DirectRoutes::All);
        let third = third(bpffs, &near);
        let addresses = node_ips_of_three();
        let three = RemoteNode { next_hops: addresses.iter().copied().collect(), node_ips: addresses, ..remote(3) };
        near.one.plan.remote_nodes.insert("n3".to_owned(), three);
        near.one.converge();
        let without = near.one.plan.without_route(&near.one.read());
        assert!(matches!(without["n3"], NoRoute::NotOnLink(_)), "{without:?}");
        assert_eq!(without.len(), 1, "the rest goes on: {without:?}");
        near.pod_one.ping("10.1.2.7").unwrap();

        near.one.plan.routing = Routing::Native(DirectRoutes::SameLink);
        assert_eq!(near.one.converge(), Vec::<Vec<Op>>::new(), "the difference is who is told");
        assert!(near.one.plan.without_route(&near.one.read()).is_empty());
        assert!(!routes(&near.one, METRIC).contains("10.1.3.0/24"));
        for to in ["10.1.3.7", "fd00:1:3::7"] {
            near.pod_one.ping(to).unwrap();
        }
        third.pod.ping("10.1.1.7").unwrap();
        assert_eq!(tcp_source(&third.pod, "0.0.0.0:80", &near.pod_one, "10.1.3.7:80").ip().to_string(), "10.1.1.7");
        assert_eq!(routes(&third.three, METRIC), "", "nobody shares a link with it");
    });
}

#[test]
fn routes_follow_a_node_to_other_addresses_devices_and_blocks() {
    sandbox(|bpffs| {
        let Two { mut one, mut two, pod_one, pod_two: _pod_two, lan } = two(bpffs, DirectRoutes::All);
        let other = Lan::new();
        other.attach(&one.netns, "u1", "n1", &["192.168.99.1/24", "fd99::1/64"]);
        other.attach(&two.netns, "u1", "n2", &["192.168.99.2/24", "fd99::2/64"]);
        let move_to = |one: &mut Node, v4: &str, v6: &str| {
            let hops = [v4, v6].map(|ip| ip.parse().unwrap());
            one.plan.remote_nodes.get_mut("n2").unwrap().next_hops = hops.to_vec();
            one.converge();
            routes(one, METRIC)
        };
        two.netns.ip("addr add 192.168.77.22/24 dev u0");
        two.netns.ip("addr add fd77::22/64 dev u0 nodad");
        let found = move_to(&mut one, "192.168.77.22", "fd77::22");
        assert!(found.contains("10.1.2.0/24 via 192.168.77.22 dev u0"), "{found}");
        let found = move_to(&mut one, "192.168.99.2", "fd99::2");
        assert!(found.contains("10.1.2.0/24 via 192.168.99.2 dev u1"), "{found}");
        assert!(found.contains("fd00:1:2::/64 via fd99::2 dev u1"), "{found}");
        assert!(!found.contains("dev u0"), "{found}");
        let back = ["192.168.99.1", "fd99::1"].map(|ip| ip.parse().unwrap());
        two.plan.remote_nodes.get_mut("n1").unwrap().next_hops = back.to_vec();
        two.converge();
        lan.0.ip("link set br0 down");
        pod_one.ping("10.1.2.7").unwrap();
        pod_one.ping("fd00:1:2::7").unwrap();

        let node = one.plan.remote_nodes.get_mut("n2").unwrap();
        node.pod_cidrs = BTreeSet::from(["10.1.5.0/24".parse().unwrap()]);
        one.converge();
        let found = routes(&one, METRIC);
        assert_eq!(found.lines().count(), 1, "{found}");
        assert!(found.starts_with("10.1.5.0/24 via 192.168.99.2 dev u1"), "{found}");
    });
}

#[test]
fn routes_of_others_are_left_alone_and_ours_are_put_right() {
    sandbox(|bpffs| {
        let Two { mut one, two: _two, pod_one: _pod_one, pod_two: _pod_two, lan: _lan } = two(bpffs, DirectRoutes::All);
        for route in [
            "10.1.2.0/24 via 192.168.77.9 dev u0 proto static metric 10",
            "10.1.2.0/24 via 192.168.77.9 dev u0 proto kernel",
            "10.9.0.0/24 via 192.168.77.9 dev u0 proto kernel metric 30000",
            "10.9.1.0/24 via 192.168.77.9 dev u0 proto static metric 25185",
            "10.9.2.0/24 dev u0 proto kernel metric 25185",
            "fd09::/64 via fd77::9 dev u0 proto bird metric 25185",
        ] {
            one.netns.ip(&format!("route add {route}"));
        }
        let theirs = |one: &Node| {
            let ours =
                |line: &&str| line.contains(METRIC) && line.contains("10.1.2.0/24") || line.contains("fd00:1:2::");
            routes(one, "").lines().filter(|line| !ours(line)).map(str::to_owned).collect::<Vec<_>>()
        };
        let before = theirs(&one);
        assert_eq!(one.converge(), Vec::<Vec<Op>>::new());
        for (command, kinds) in [
            ("ip route del 10.1.2.0/24 metric 25185", vec!["set-route"]),
            ("ip -6 route del fd00:1:2::/64 metric 25185", vec!["set-route"]),
            ("ip route replace 10.1.2.0/24 via 192.168.77.9 dev u0 proto kernel metric 25185", vec!["set-route"]),
            ("ip route add 10.9.9.0/24 via 192.168.77.9 dev u0 proto kernel metric 25185", vec!["delete-route"]),
            ("ip route add fd09:9::/64 via fd77::9 dev u0 proto kernel metric 25185", vec!["delete-route"]),
        ] {
            one.netns.run(command).unwrap();
            let rounds = one.converge();
            assert_eq!(rounds.concat().iter().map(Op::kind).collect::<Vec<_>>(), kinds, "after {command}: {rounds:#?}");
        }
        one.plan.remote_nodes.clear();
        one.converge();
        assert_eq!(theirs(&one), before);
    });
}

#[test]
fn a_node_changes_from_tunnel_to_native_and_back() {
    sandbox(|bpffs| {
        let Two { mut one, mut two, pod_one, pod_two: _pod_two, lan: _lan } = two(bpffs, DirectRoutes::All);
        let native = one.read().state;
        let [tunnel, direct] = [TUNNEL, Routing::Native(DirectRoutes::All)];
        let change = |one: &mut Node, two: &mut Node, routing| {
            for node in [one, two] {
                node.plan.routing = routing;
                node.converge();
            }
            for to in ["10.1.2.7", "fd00:1:2::7"] {
                pod_one.ping(to).unwrap();
            }
        };
        change(&mut one, &mut two, tunnel);
        let tunneled = one.read().state;
        assert_eq!(routes(&one, METRIC), "");
        assert_eq!((tunneled.links.len(), tunneled.hooks.len()), (4, 7));

        change(&mut one, &mut two, direct);
        assert_eq!(one.read().state, native);

        change(&mut one, &mut two, tunnel);
        let again = one.read().state;
        // The device is another one, and its index is in the programs.
        assert!(again.hooks.keys().eq(tunneled.hooks.keys()) && again.programs.len() == 1);
        let but_programs = |state| NodeState { hooks: Default::default(), programs: Default::default(), ..state };
        assert_eq!(but_programs(again), but_programs(tunneled));
    });
}

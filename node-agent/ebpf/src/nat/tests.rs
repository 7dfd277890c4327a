extern crate std;

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, BTreeSet},
    vec::Vec,
};

use basal_maps::{
    config::{FLAG_NATIVE_ROUTING, FLAG_REMOTE_NODE_MASQUERADE},
    endpoint::EndpointInfo,
    flow::TupleV4,
    ipcache::RemoteEndpointInfo,
    tunnel::TunnelValue,
};

use super::*;

const NODE: [u8; 4] = [192, 168, 0, 1];
const OTHER_NODE: [u8; 4] = [192, 168, 0, 2];
const POD_A: [u8; 4] = [10, 0, 1, 7];
const POD_B: [u8; 4] = [10, 0, 1, 8];
const REMOTE_POD: [u8; 4] = [10, 0, 2, 9];
const WEB: [u8; 4] = [192, 0, 2, 80];
const SYN: Seen = Seen { is_tcp: true, tcp_flags: 2, bytes: 74, identity: 0 };

/// The maps of a node with two pods.
#[derive(Default)]
struct Model {
    nat: RefCell<BTreeMap<TupleV4, End>>,
    /// How many rows the map of NAT takes.
    room: Option<usize>,
    tracked: RefCell<BTreeSet<TupleV4>>,
    /// Connections that are over.
    over: RefCell<BTreeSet<TupleV4>>,
    random: Cell<u32>,
    config: Option<Config>,
    keeps: u32,
}

impl decide::Tables for Model {
    fn endpoint(&self, key: &EndpointKey) -> Option<&EndpointInfo> {
        const POD: EndpointInfo = EndpointInfo { ifindex: 9, flags: 0, sec_id: 777, ..EndpointInfo::HOST };
        const KEEPS: EndpointInfo = EndpointInfo { flags: FLAG_NO_SNAT_V4, ..POD };
        match key.ip.v4_octets() {
            POD_A | POD_B if self.keeps != 0 => Some(&KEEPS),
            POD_A | POD_B => Some(&POD),
            NODE => Some(&EndpointInfo::HOST),
            _ => None,
        }
    }

    fn ipcache(&self, prefix: &IpPrefix) -> Option<&RemoteEndpointInfo> {
        const NODE_ROW: RemoteEndpointInfo = RemoteEndpointInfo {
            sec_identity: identity::REMOTE_NODE,
            tunnel_endpoint: NetIp::UNSPECIFIED,
            pad: 0,
            key: 0,
            flags: 0,
        };
        (prefix.ip.v4_octets() == OTHER_NODE).then_some(&NODE_ROW)
    }

    fn tunnel(&self, _: &IpPrefix) -> Option<&TunnelValue> {
        None
    }
}

impl Flows for Model {
    type Key = TupleV4;

    fn translation(&self, key: &TupleV4) -> Option<End> {
        self.nat.borrow().get(key).copied()
    }

    fn claim(&self, key: &TupleV4, to: End, own: bool) -> bool {
        !self.nat.borrow().contains_key(key) && self.put(key, to, own)
    }

    fn put(&self, key: &TupleV4, to: End, _: bool) -> bool {
        let full = self.room.is_some_and(|room| self.nat.borrow().len() >= room);
        let has_room = !full || self.nat.borrow().contains_key(key);
        if has_room {
            self.nat.borrow_mut().insert(*key, to);
        }
        has_room
    }

    fn release(&self, key: &TupleV4) {
        self.nat.borrow_mut().remove(key);
    }

    fn is_settled(&self, _: &TupleV4) -> bool {
        true
    }

    fn connection(&self, key: &TupleV4) -> Connection {
        match (self.tracked.borrow().contains(key), self.over.borrow().contains(key)) {
            (_, true) => Connection::Over,
            (true, false) => Connection::Live,
            (false, false) => Connection::Unknown,
        }
    }

    fn track(&self, key: &TupleV4, _: Way, _: Seen) {
        self.over.borrow_mut().remove(key);
        self.tracked.borrow_mut().insert(*key);
    }

    fn random(&self) -> u32 {
        self.random.set(self.random.get() + 1);
        self.random.get()
    }

    fn is_exempt(&self, ip: NetIp) -> bool {
        ip.v4_octets()[..3] == REMOTE_POD[..3]
    }
}

fn end(ip: [u8; 4], port: u16) -> End {
    End::new(ip.into(), port)
}

fn packet(source: [u8; 4], destination: [u8; 4], protocol: u8) -> Packet {
    Packet {
        family: FAMILY_IPV4,
        source: NetIp::v4(source),
        destination: NetIp::v4(destination),
        hops: 64,
        protocol,
        length: 60,
        header: 20,
        fragment: false,
        later_fragment: false,
    }
}

impl Model {
    fn send_as(&self, kind: Kind, protocol: u8, source: End, destination: End) -> Leaving {
        let flow = Flow { source, destination, protocol };
        let packet = packet(source.ip.v4_octets(), destination.ip.v4_octets(), protocol);
        let config = self.config.unwrap_or(Config::UNSET);
        let sent = Traced { packet: &packet, flow: Some(&flow), kind, seen: SYN };
        leaving(self, self, &config, NetIp::v4(NODE), sent)
    }

    /// TCP that leaves.
    fn send(&self, source: End, destination: End) -> Leaving {
        self.send_as(Kind::Ported, protocol::TCP, source, destination)
    }

    fn receive_as(&self, kind: Kind, protocol: u8, source: End, destination: End) -> Option<End> {
        let flow = Flow { source, destination, protocol };
        let packet = packet(source.ip.v4_octets(), destination.ip.v4_octets(), protocol);
        arriving(self, self, Traced { packet: &packet, flow: Some(&flow), kind, seen: SYN })
    }

    /// TCP that comes in.
    fn receive(&self, source: End, destination: End) -> Option<End> {
        self.receive_as(Kind::Ported, protocol::TCP, source, destination)
    }

    /// The source that TCP of a pod leaves with.
    fn source(&self, source: End, destination: End) -> End {
        match self.send(source, destination) {
            Leaving::From(source) => source,
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_pod_leaves_by_the_nodes_address_and_answers_find_it() {
    let model = Model::default();
    let (pod, web) = (end(POD_A, 40000), end(WEB, 443));
    assert_eq!(model.send(pod, web), Leaving::From(end(NODE, 40000)), "a port that is free is kept");
    assert_eq!(model.receive(web, end(NODE, 40000)), Some(pod));
    assert_eq!(model.send(pod, web), Leaving::From(end(NODE, 40000)));
    assert_eq!(model.nat.borrow().len(), 2);
    // Addresses as of the answer, ports as of the packet.
    let (dport, sport) = (U16::new(443), U16::new(40000));
    let tracked = TupleV4 { daddr: POD_A, saddr: WEB, dport, sport, nexthdr: protocol::TCP, flags: DIR_OUT };
    assert_eq!(*model.tracked.borrow(), BTreeSet::from([tracked]));
    assert_eq!(model.receive(end(WEB, 444), end(NODE, 40000)), None, "nobody asked this one");
}

#[test]
fn a_port_that_belongs_to_another_flow_is_not_given_twice() {
    let model = Model::default();
    let web = end(WEB, 443);
    let mut given = BTreeMap::new();
    // The node itself has the port first.
    assert_eq!(model.send(end(NODE, 50000), web), Leaving::AsIs);
    given.insert(end(NODE, 50000).port.get(), end(NODE, 50000));
    for last in [7, 8] {
        let pod = end([10, 0, 1, last], 50000);
        let source = model.source(pod, web);
        assert!(source.port.get() >= MIN_PORT);
        assert_eq!(given.insert(source.port.get(), pod), None, "two flows have {source:?}");
    }
    for (port, owner) in given {
        let to = model.receive(web, end(NODE, port));
        assert_eq!(to.unwrap_or(end(NODE, port)), owner);
    }
    // Towards another destination the port is free.
    assert_eq!(model.send(end(POD_A, 50000), end(WEB, 444)), Leaving::From(end(NODE, 50000)));
}

#[test]
fn the_node_gets_another_port_where_a_pod_has_its_own() {
    let model = Model::default();
    let web = end(WEB, 443);
    assert_eq!(model.source(end(POD_A, 50000), web), end(NODE, 50000));
    let Leaving::From(source) = model.send(end(NODE, 50000), web) else { panic!("the answers would be the pod's") };
    assert_eq!(model.receive(web, source), Some(end(NODE, 50000)));
    assert_eq!(model.receive(web, end(NODE, 50000)), Some(end(POD_A, 50000)));
    // A server of the node's below the range is nobody's rival.
    assert_eq!(model.send(end(NODE, 6443), end(WEB, 50000)), Leaving::AsIs);
    assert_eq!(model.nat.borrow().len(), 4);
}

#[test]
fn ports_below_the_range_become_others() {
    let model = Model::default();
    let source = model.source(end(POD_A, 1024), end(WEB, 443));
    assert!(source.port.get() >= MIN_PORT);
    assert_eq!(model.receive(end(WEB, 443), source), Some(end(POD_A, 1024)));
    assert_eq!(next_port(U16::new(65535)).get(), MIN_PORT);
    assert_eq!(next_port(U16::new(40000)).get(), 40001);
}

#[test]
fn who_is_answered_sees_the_address_that_it_asked() {
    let model = Model::default();
    let (client, server) = (end(WEB, 50000), end(POD_A, 80));
    assert_eq!(model.receive(client, server), None);
    assert_eq!(model.send(server, client), Leaving::AsIs);
    assert!(model.nat.borrow().is_empty());
    // Not so a new flow of the pod's to the same machine, nor a flow whose answers go past the node's address.
    assert_eq!(model.source(end(POD_A, 40000), end(WEB, 443)), end(NODE, 40000));
    assert_eq!(model.receive(end(WEB, 443), end(POD_A, 40000)), None);
    assert_eq!(model.source(end(POD_A, 40000), end(WEB, 443)), end(NODE, 40000), "still masqueraded");
}

#[test]
fn what_keeps_its_source() {
    let model = Model::default();
    let web = end(WEB, 443);
    assert_eq!(model.send(end([172, 16, 0, 9], 40000), web), Leaving::AsIs, "forwarded for somebody else");
    assert_eq!(model.send(end(POD_A, 40000), end(REMOTE_POD, 80)), Leaving::AsIs, "an exempt network");
    assert_eq!(model.send(end(POD_A, 40000), end([239, 1, 1, 1], 80)), Leaving::AsIs, "a group");
    let metadata = model.send(end(POD_A, 40000), end([169, 254, 169, 254], 80));
    assert_eq!(metadata, Leaving::From(end(NODE, 40000)), "a cloud's own server, which knows no pods");
    let model = Model::default();
    assert_eq!(Model { keeps: 1, ..Model::default() }.send(end(POD_A, 40000), web), Leaving::AsIs, "the row says so");
    assert!(model.nat.borrow().is_empty());
}

#[test]
fn other_nodes_see_pods_in_native_routing_unless_told_otherwise() {
    let to_node = |flags| {
        let config = Config { flags, ..Config::UNSET };
        Model { config: Some(config), ..Model::default() }.send(end(POD_A, 40000), end(OTHER_NODE, 22))
    };
    assert_eq!(to_node(0), Leaving::From(end(NODE, 40000)), "in a tunnel");
    assert_eq!(to_node(FLAG_NATIVE_ROUTING), Leaving::AsIs);
    assert_eq!(to_node(FLAG_NATIVE_ROUTING | FLAG_REMOTE_NODE_MASQUERADE), Leaving::From(end(NODE, 40000)));
}

#[test]
fn echoes_are_known_by_their_identifier() {
    let model = Model::default();
    for pod in [POD_A, POD_B] {
        let sent = model.send_as(Kind::Request, protocol::ICMP, end(pod, 5), end(WEB, 0));
        let Leaving::From(source) = sent else { panic!("{sent:?}") };
        let to = model.receive_as(Kind::Reply, protocol::ICMP, end(WEB, 0), End { ip: NetIp::v4(NODE), ..source });
        assert_eq!(to, Some(end(pod, 5)));
    }
    assert_eq!(model.receive_as(Kind::Reply, protocol::ICMP, end(WEB, 0), end(NODE, 99)), None, "the node's own");
    // A pod that answers one, and something that is no echo.
    assert_eq!(model.send_as(Kind::Reply, protocol::ICMP, end(POD_A, 0), end(WEB, 5)), Leaving::AsIs);
    let timestamp = model.send_as(Kind::Other, protocol::ICMP, end(POD_A, 0), end(WEB, 0));
    assert_eq!(timestamp, Leaving::Drop(Reason::UNSUPPORTED_BY_NAT));
}

#[test]
fn a_protocol_without_ports_has_one_flow_to_a_destination() {
    let model = Model::default();
    let gre = |source, destination| model.send_as(Kind::Fixed, 47, end(source, 0), end(destination, 0));
    assert_eq!(gre(POD_A, WEB), Leaving::From(end(NODE, 0)));
    assert_eq!(gre(POD_B, WEB), Leaving::Drop(Reason::NO_NAT_MAPPING));
    assert_eq!(model.receive_as(Kind::Fixed, 47, end(WEB, 0), end(NODE, 0)), Some(end(POD_A, 0)));
    assert_eq!(gre(NODE, WEB), Leaving::AsIs);
    assert_eq!(model.receive_as(Kind::Fixed, 47, end(WEB, 0), end(NODE, 0)), None, "the node goes first");
    let sctp = model.send_as(Kind::Fixed, protocol::SCTP, end(POD_A, 1000), end(WEB, 9));
    assert_eq!(sctp, Leaving::From(end(NODE, 1000)), "its checksum leaves the port no choice");
}

#[test]
fn rows_that_the_kernel_dropped_are_put_back() {
    let model = Model::default();
    let (pod, web) = (end(POD_A, 1024), end(WEB, 443));
    let source = model.source(pod, web);
    let rows: Vec<TupleV4> = model.nat.borrow().keys().copied().collect();
    for lost in rows {
        model.release(&lost);
        // Either side may be the next to send.
        if lost.flags == DIR_OUT {
            assert_eq!(model.receive(web, source), Some(pod));
        }
        assert_eq!(model.source(pod, web), source, "after {lost:?} was dropped");
        assert_eq!(model.nat.borrow().len(), 2);
    }
}

#[test]
fn a_flow_moves_on_when_the_device_has_another_address() {
    let model = Model::default();
    let (pod, web) = (end(POD_A, 40000), end(WEB, 443));
    model.send(pod, web);
    let flow = Flow { source: pod, destination: web, protocol: protocol::TCP };
    let other = NetIp::v4([192, 168, 0, 77]);
    let packet = packet(POD_A, WEB, protocol::TCP);
    let sent = Traced { packet: &packet, flow: Some(&flow), kind: Kind::Ported, seen: SYN };
    let left = leaving(&model, &model, &Config::UNSET, other, sent);
    assert_eq!(left, Leaving::From(End { ip: other, ..pod }));
    assert_eq!(model.receive(web, End { ip: other, ..pod }), Some(pod));
}

#[test]
fn a_full_map_drops_pods_and_spares_the_node() {
    for room in [0, 1] {
        let model = Model { room: Some(room), ..Model::default() };
        assert_eq!(model.send(end(POD_A, 40000), end(WEB, 443)), Leaving::Drop(Reason::NO_NAT_MAPPING));
        assert!(model.nat.borrow().is_empty(), "nothing half is left");
        assert_eq!(model.send(end(NODE, 40000), end(WEB, 443)), Leaving::AsIs);
    }
}

impl Model {
    /// All connections are over.
    fn end_all(&self) {
        self.over.borrow_mut().extend(self.tracked.borrow().iter());
    }
}

#[test]
fn ports_of_connections_that_are_over_are_given_again() {
    let model = Model::default();
    let web = end(WEB, 443);
    // Every port of the range has a flow.
    for port in MIN_PORT..=u16::MAX {
        model.nat.borrow_mut().insert(TupleV4::new(web, end(NODE, port), protocol::TCP, DIR_IN), end(POD_A, port));
        let flow = Flow { source: end(POD_A, port), destination: web, protocol: protocol::TCP };
        model.track(&flow.tracked(DIR_OUT), Way::Forth, SYN);
    }
    assert_eq!(model.send(end(POD_B, 40000), web), Leaving::Drop(Reason::NO_NAT_MAPPING));
    model.end_all();
    let source = model.source(end(POD_B, 40000), web);
    assert_eq!(model.receive(web, source), Some(end(POD_B, 40000)));
}

#[test]
fn an_answer_to_a_connection_that_is_over_reaches_no_pod() {
    let model = Model::default();
    let (pod, web) = (end(POD_A, 40000), end(WEB, 443));
    let source = model.source(pod, web);
    model.end_all();
    assert_eq!(model.receive(web, source), None, "the address may be another pod's by now");
    assert_eq!(model.source(pod, web), source);
    assert_eq!(model.receive(web, source), Some(pod), "the flow goes on");
    // Nor does a question of long ago let a pod leave with its own address.
    let (client, server) = (end(WEB, 123), end(POD_A, 123));
    model.receive(client, server);
    assert_eq!(model.send(server, client), Leaving::AsIs);
    model.end_all();
    assert!(matches!(model.send(server, client), Leaving::From(_)));
}

#[test]
fn a_fragment_without_its_first_one_leaves_with_no_pods_address() {
    let model = Model::default();
    let left = |source| {
        let packet = packet(source, WEB, protocol::UDP);
        let sent = Traced { packet: &packet, flow: None, kind: Kind::Ported, seen: SYN };
        leaving(&model, &model, &Config::UNSET, NetIp::v4(NODE), sent)
    };
    assert_eq!(left(POD_A), Leaving::Drop(Reason::NO_FIRST_FRAGMENT));
    assert_eq!(left(NODE), Leaving::AsIs);
}

#[test]
fn errors_reach_who_they_are_about_and_tell_the_truth_outside() {
    let model = Model::default();
    let (pod, web) = (end(POD_A, 1024), end(WEB, 443));
    let source = model.source(pod, web);
    let router = [203, 0, 113, 1];

    // A router tells of the masqueraded packet.
    let quoted = Flow { source, destination: web, protocol: protocol::TCP };
    assert_eq!(arriving_error(&model, &packet(router, NODE, protocol::ICMP), &quoted), Some(pod));
    let other = Flow { source: end(NODE, 6443), ..quoted };
    assert_eq!(arriving_error(&model, &packet(router, NODE, protocol::ICMP), &other), None);
    assert_eq!(arriving_error(&model, &packet(router, OTHER_NODE, protocol::ICMP), &quoted), None, "forwarded");

    // The pod, or the node on its behalf, tells of an answer.
    let quoted = Flow { source: web, destination: pod, protocol: protocol::TCP };
    for teller in [POD_A, NODE, [172, 16, 0, 9]] {
        let told = leaving_error(&model, &model, NetIp::v4(NODE), &packet(teller, WEB, protocol::ICMP), &quoted);
        assert_eq!(told, Some(source));
    }
    let liar = leaving_error(&model, &model, NetIp::v4(NODE), &packet(POD_B, WEB, protocol::ICMP), &quoted);
    assert_eq!(liar, None, "another pod's flow is none of its business");
}

#[test]
fn kinds_and_ports() {
    let head = [0x10, 0x01, 0x20, 0x02, 0x30, 0x03, 0, 1];
    let seen = |family, number, icmp_type| {
        let kind = Kind::of(family, number, icmp_type);
        let (source, destination) = kind.ports(number, &head);
        (kind, source.get(), destination.get())
    };
    assert_eq!(seen(FAMILY_IPV4, protocol::TCP, 0), (Kind::Ported, 0x1001, 0x2002));
    assert_eq!(seen(FAMILY_IPV4, protocol::SCTP, 0), (Kind::Fixed, 0x1001, 0x2002));
    assert_eq!(seen(FAMILY_IPV4, 47, 0), (Kind::Fixed, 0, 0));
    assert_eq!(seen(FAMILY_IPV4, protocol::ICMP, 8), (Kind::Request, 0x3003, 0));
    assert_eq!(seen(FAMILY_IPV6, protocol::ICMPV6, 129), (Kind::Reply, 0, 0x3003));
    assert_eq!(seen(FAMILY_IPV4, protocol::ICMP, 11), (Kind::Error, 0, 0));
    assert_eq!(seen(FAMILY_IPV6, protocol::ICMPV6, 2), (Kind::Error, 0, 0));
    assert_eq!(seen(FAMILY_IPV6, protocol::ICMPV6, 135), (Kind::Other, 0, 0));
    assert_eq!(seen(FAMILY_IPV6, protocol::ICMP, 8).0, Kind::Fixed, "ICMP of the other family is any protocol");
}

/// Numbers that look random (xorshift).
fn next(state: &mut u32) -> usize {
    *state ^= *state << 13;
    *state ^= *state >> 17;
    *state ^= *state << 5;
    *state as usize
}

#[test]
fn whatever_is_sent_and_dropped_an_answer_reaches_who_asked() {
    let mut state = 1741;
    let mut sources = BTreeMap::new();
    let model = Model::default();
    for _ in 0..20_000 {
        let sender = [POD_A, POD_B, NODE][next(&mut state) % 3];
        let source = end(sender, [1024, 40000, 50000, 50001][next(&mut state) % 4]);
        let to = end([WEB, OTHER_NODE][next(&mut state) % 2], [80, 443][next(&mut state) % 2]);
        let left = match model.send(source, to) {
            Leaving::From(left) => left,
            Leaving::AsIs => source,
            Leaving::Drop(reason) => panic!("{source:?} to {to:?}: {reason:?}"),
        };
        assert!(left.ip == NetIp::v4(NODE) && (left.port.get() >= MIN_PORT || source.port == left.port));
        assert_eq!(model.receive(to, left).unwrap_or(left), source, "the answer of {to:?} to {left:?}");
        // As long as no row is dropped a flow keeps its port.
        let before = sources.insert((sender, source.port, to.ip.v4_octets(), to.port), left);
        assert!(before.is_none_or(|before| before == left), "{source:?} had {before:?} and now has {left:?}");
        if next(&mut state).is_multiple_of(50) {
            let rows: Vec<TupleV4> = model.nat.borrow().keys().copied().collect();
            model.release(&rows[next(&mut state) % rows.len()]);
            sources.clear();
        }
    }
}

extern crate std;

use std::{cell::RefCell, collections::BTreeMap, vec::Vec};

use basal_maps::{
    addr::Mac64,
    config::{FLAG_LEGACY_ROUTING, FLAG_NATIVE_ROUTING},
    endpoint::EndpointInfo,
    ipcache::IpcacheKey,
};

use zerocopy::big_endian::U16;

use super::*;
use crate::nat::Flow;

mod direct;

const ROUTER: [u8; 4] = [10, 0, 1, 1];
const POD_A: [u8; 4] = [10, 0, 1, 7];
const POD_B: [u8; 4] = [10, 0, 1, 8];
const REMOTE_POD: [u8; 4] = [10, 0, 2, 9];
const REMOTE_NODE: [u8; 4] = [192, 168, 0, 2];
const WORLD: [u8; 4] = [8, 8, 8, 8];
const LXC_A: u32 = 20;
const MAC_A: [u8; 6] = [2, 0, 0, 0, 0, 20];
const FRAME_A: Ethernet = Ethernet { destination: [2, 0, 0, 0, 1, 20], source: MAC_A, ethertype: U16::new(0x0800) };
const FROM_A: Sender = Sender { ifindex: LXC_A, ethernet: &FRAME_A };

const ECHO: Transport = Transport([8, 0, 0, 0]);

#[derive(Default)]
struct Model {
    endpoints: BTreeMap<EndpointKey, EndpointInfo>,
    ipcache: Vec<(IpcacheKey, RemoteEndpointInfo)>,
    tunnel: Vec<(IpcacheKey, TunnelValue)>,
    direct: RefCell<Vec<Flow>>,
    /// Ends of connections as they were noted.
    ended: RefCell<Vec<(Flow, u32)>>,
    /// The map of connections takes no more.
    full: bool,
}

/// The brute-force longest match.
fn longest<'a, V>(rows: &'a [(IpcacheKey, V)], prefix: &IpPrefix) -> Option<&'a V> {
    let bits = |p: &IpPrefix| u128::from_be_bytes(p.ip.0);
    let matches = |key: &IpcacheKey| {
        let length = key.prefixlen - 32;
        let mask = if length == 0 { 0 } else { u128::MAX << (128 - length) };
        key.prefix.family == prefix.family && bits(&key.prefix) & mask == bits(prefix) & mask
    };
    rows.iter().filter(|(key, _)| matches(key)).max_by_key(|(key, _)| key.prefixlen).map(|(_, value)| value)
}

impl Tables for Model {
    fn endpoint(&self, key: &EndpointKey) -> Option<&EndpointInfo> {
        self.endpoints.get(key)
    }

    fn ipcache(&self, prefix: &IpPrefix) -> Option<&RemoteEndpointInfo> {
        longest(&self.ipcache, prefix)
    }

    fn tunnel(&self, prefix: &IpPrefix) -> Option<&TunnelValue> {
        longest(&self.tunnel, prefix)
    }
}

impl Connections for Model {
    fn is_direct(&self, flow: &Flow, pod: Pod, _: u8) -> bool {
        self.direct.borrow().contains(&pod.sent(flow))
    }

    fn go_direct(&self, flow: &Flow, pod: Pod, _: u8) -> bool {
        if !self.full {
            self.direct.borrow_mut().push(pod.sent(flow));
        }
        !self.full
    }

    fn go_by_stack(&self, flow: &Flow, pod: Pod, _: u8) {
        self.direct.borrow_mut().retain(|sent| *sent != pod.sent(flow));
    }

    fn end(&self, flow: &Flow, pod: Pod, reset: bool, family: u8) -> bool {
        let noted = self.is_direct(flow, pod, family);
        if noted {
            self.ended.borrow_mut().push((pod.sent(flow), pod.ends(reset)));
        }
        noted
    }
}

/// Decisions on packets that are about no TCP connection, or about one that cannot be told.
fn from_container<'a>(
    model: &'a Model,
    config: &Config,
    sender: Sender<'_>,
    packet: &Packet,
    transport: Transport,
) -> Verdict<'a> {
    super::from_container(model, config, sender, packet, transport, &About::Nothing)
}

fn from_host<'a>(model: &'a Model, config: &Config, skb_mark: u32, packet: &Packet) -> Verdict<'a> {
    super::from_host(model, config, skb_mark, packet, &About::Nothing)
}

fn from_overlay<'a>(model: &'a Model, config: &Config, vni: u32, packet: &Packet, transport: Transport) -> Verdict<'a> {
    super::from_overlay(model, config, vni, packet, transport, &About::Nothing)
}

/// A pod whose MAC address ends in its device's index.
fn pod(ifindex: u32, lxc_id: u16, sec_id: u32) -> EndpointInfo {
    let mac = Mac64 { octets: [2, 0, 0, 0, 0, ifindex as u8], pad: [0; 2] };
    EndpointInfo { ifindex, lxc_id, sec_id, mac, ..EndpointInfo::default() }
}

/// Two pods here, one over there known by its CIDR's row in the tunnel map only.
fn node() -> Model {
    let mut model = Model::default();
    let key = |ip: [u8; 4]| EndpointKey::from(core::net::IpAddr::from(ip));
    model.endpoints.insert(key(ROUTER), EndpointInfo::HOST);
    model.endpoints.insert(key(POD_A), pod(LXC_A, 7, 1111));
    model.endpoints.insert(key(POD_B), pod(21, 8, 2222));
    let cidr = |ip: [u8; 4], bits| IpcacheKey::new(ip.into(), bits);
    model.ipcache.push((cidr([0; 4], 0), RemoteEndpointInfo::new(identity::WORLD, None)));
    model.ipcache.push((cidr(ROUTER, 32), RemoteEndpointInfo::new(identity::HOST, None)));
    model.ipcache.push((cidr(POD_A, 32), RemoteEndpointInfo::new(1111, None)));
    model.tunnel.push((cidr([10, 0, 2, 0], 24), TunnelValue::new(REMOTE_NODE.into(), 3)));
    model
}

fn config(flags: u32) -> Config {
    Config { route_mtu: 1450, tunnel_port: 8472, flags, ..Config::UNSET }
}

fn packet(source: [u8; 4], destination: [u8; 4], protocol: u8) -> Packet {
    Packet {
        family: FAMILY_IPV4,
        source: NetIp::v4(source),
        destination: NetIp::v4(destination),
        hops: 64,
        protocol,
        length: 84,
        header: 20,
        fragment: false,
        later_fragment: false,
    }
}

const TO_REMOTE: TunnelEndpoint = TunnelEndpoint { ip: NetIp::v4(REMOTE_NODE), ipv6: false };

#[test]
fn a_pods_packets_pass_the_stack_with_its_identity() {
    let (model, config) = (node(), config(FLAG_LEGACY_ROUTING));
    for destination in [POD_B, REMOTE_POD, WORLD, ROUTER] {
        let verdict = from_container(&model, &config, FROM_A, &packet(POD_A, destination, protocol::ICMP), ECHO);
        assert_eq!(verdict, Verdict::Stack { identity: 1111 }, "{destination:?}");
    }
}

#[test]
fn a_pod_sends_from_its_own_address_and_device_only() {
    let (model, config) = (node(), config(FLAG_LEGACY_ROUTING));
    for (source, ifindex) in [(WORLD, LXC_A), (POD_B, LXC_A), (ROUTER, LXC_A), (ROUTER, 0), (POD_A, 21)] {
        let sender = Sender { ifindex, ..FROM_A };
        let verdict = from_container(&model, &config, sender, &packet(source, POD_B, protocol::TCP), ECHO);
        assert_eq!(verdict, Verdict::Drop(Reason::INVALID_SOURCE_IP), "{source:?} on {ifindex}");
    }
    let sender = Sender { ethernet: &Ethernet { source: [2, 0, 0, 0, 0, 21], ..FRAME_A }, ..FROM_A };
    let verdict = from_container(&model, &config, sender, &packet(POD_A, POD_B, protocol::TCP), ECHO);
    assert_eq!(verdict, Verdict::Drop(Reason::INVALID_SOURCE_MAC));
}

#[test]
fn a_pod_sends_to_no_group() {
    for config in [config(FLAG_LEGACY_ROUTING), config(0)] {
        let model = node();
        for destination in [[224, 0, 0, 251], [239, 255, 255, 250], [255; 4]] {
            let verdict = from_container(&model, &config, FROM_A, &packet(POD_A, destination, 2), ECHO);
            assert_eq!(verdict, Verdict::Drop(Reason::UNROUTABLE), "{destination:?}");
        }
        let metadata = packet(POD_A, [169, 254, 169, 254], protocol::TCP);
        assert_eq!(from_container(&model, &config, FROM_A, &metadata, ECHO), Verdict::Stack { identity: 1111 });
        let broadcast = Sender { ethernet: &Ethernet { destination: [0xff; 6], ..FRAME_A }, ..FROM_A };
        let verdict = from_container(&model, &config, broadcast, &packet(POD_A, POD_B, protocol::ICMP), ECHO);
        assert_eq!(verdict, Verdict::Drop(Reason::INVALID_DESTINATION_MAC));
    }
}

#[test]
fn a_pod_cannot_send_tunnel_packets() {
    let (model, config) = (node(), config(FLAG_LEGACY_ROUTING));
    let vxlan = Transport([0x80, 0, 0x21, 0x18]);
    let udp = packet(POD_A, REMOTE_NODE, protocol::UDP);
    let verdict = from_container(&model, &config, FROM_A, &udp, vxlan);
    assert_eq!(verdict, Verdict::Drop(Reason::ENCAPSULATION_PROHIBITED));
    let tcp = packet(POD_A, REMOTE_NODE, protocol::TCP);
    assert_eq!(from_container(&model, &config, FROM_A, &tcp, vxlan), Verdict::Stack { identity: 1111 });
    let later = Packet { fragment: true, later_fragment: true, ..udp };
    assert_eq!(from_container(&model, &config, FROM_A, &later, vxlan), Verdict::Stack { identity: 1111 });
}

#[test]
fn only_flows_that_kube_proxy_cannot_touch_go_direct() {
    let (model, config) = (node(), config(0));
    let local = pod(21, 8, 2222);
    let direct = |packet: Packet, transport| match from_container(&model, &config, FROM_A, &packet, transport) {
        Verdict::Stack { identity: 1111 } => false,
        Verdict::Deliver { endpoint, identity: 1111, direct: true } => *endpoint == local,
        other => panic!("{other:?}"),
    };
    let echo = packet(POD_A, POD_B, protocol::ICMP);
    assert!(direct(echo, ECHO));
    assert!(direct(echo, Transport([0; 4])), "echo reply");
    assert!(direct(packet(POD_A, POD_B, 47), ECHO), "GRE");
    assert!(!direct(echo, Transport([3, 4, 0, 0])), "errors quote packets that may have been translated");
    assert!(!direct(Packet { fragment: true, ..echo }, ECHO));
    assert!(!direct(Packet { hops: 1, ..echo }, ECHO), "the stack says that time was exceeded");
    for protocol in [protocol::TCP, protocol::UDP, protocol::SCTP, protocol::FRAGMENT, protocol::ICMPV6] {
        assert!(!direct(packet(POD_A, POD_B, protocol), ECHO), "{protocol}");
    }
}

#[test]
fn the_direct_path_crosses_nodes_when_the_packet_fits() {
    let (model, config) = (node(), config(0));
    let echo = packet(POD_A, REMOTE_POD, protocol::ICMP);
    let verdict = |packet| from_container(&model, &config, FROM_A, &packet, ECHO);
    assert_eq!(verdict(echo), Verdict::Encapsulate { to: TO_REMOTE, identity: 1111 });
    assert_eq!(verdict(Packet { length: 1451, ..echo }), Verdict::Stack { identity: 1111 });
    assert_eq!(verdict(packet(POD_A, WORLD, protocol::ICMP)), Verdict::Stack { identity: 1111 });
    assert_eq!(verdict(packet(POD_A, ROUTER, protocol::ICMP)), Verdict::Stack { identity: 1111 });
}

#[test]
fn the_host_delivers_by_endpoint_then_ipcache_then_tunnel_map() {
    let (mut model, config) = (node(), config(FLAG_LEGACY_ROUTING));
    let marked = mark::encode(mark::MAGIC_IDENTITY, 1111);
    let local = pod(21, 8, 2222);
    assert_eq!(
        from_host(&model, &config, marked, &packet(POD_A, POD_B, protocol::TCP)),
        Verdict::Deliver { endpoint: &local, identity: 1111, direct: false }
    );
    let remote = packet(POD_A, REMOTE_POD, protocol::TCP);
    assert_eq!(
        from_host(&model, &config, marked, &remote),
        Verdict::Encapsulate { to: TO_REMOTE, identity: 1111 },
        "by the tunnel map, although the ipcache has a row for the world"
    );
    let other = [192, 168, 0, 9];
    let row = RemoteEndpointInfo::new(3333, Some(other.into()));
    model.ipcache.push((IpcacheKey::new(REMOTE_POD.into(), 32), row));
    let to = TunnelEndpoint { ip: NetIp::v4(other), ipv6: false };
    assert_eq!(from_host(&model, &config, marked, &remote), Verdict::Encapsulate { to, identity: 1111 });
}

#[test]
fn a_row_that_names_no_node_is_told_from_none() {
    let (mut model, config) = (node(), config(FLAG_LEGACY_ROUTING));
    let row = RemoteEndpointInfo { flags: FLAG_HAS_TUNNEL_ENDPOINT, ..RemoteEndpointInfo::default() };
    model.ipcache.push((IpcacheKey::new(REMOTE_POD.into(), 32), row));
    let remote = packet(ROUTER, REMOTE_POD, protocol::TCP);
    assert_eq!(from_host(&model, &config, 0, &remote), Verdict::Drop(Reason::NO_TUNNEL_ENDPOINT));
    let skip = RemoteEndpointInfo { flags: FLAG_SKIP_TUNNEL, ..RemoteEndpointInfo::default() };
    model.ipcache = std::vec![(IpcacheKey::new(REMOTE_POD.into(), 32), skip)];
    assert_eq!(from_host(&model, &config, 0, &remote), Verdict::Unreachable);
}

#[test]
fn only_a_mark_claims_a_pods_identity() {
    let (model, config) = (node(), config(FLAG_LEGACY_ROUTING));
    let identity = |skb_mark, source| match from_host(&model, &config, skb_mark, &packet(source, POD_B, protocol::TCP))
    {
        Verdict::Deliver { identity, .. } => identity,
        other => panic!("{other:?}"),
    };
    assert_eq!(identity(0, ROUTER), identity::HOST);
    assert_eq!(identity(0x4000, ROUTER), identity::HOST, "kube-proxy's mark says nothing about identity");
    assert_eq!(identity(0, POD_A), identity::WORLD, "a pod's address without a mark came from outside");
    assert_eq!(identity(0, WORLD), identity::WORLD);
    assert_eq!(identity(mark::MAGIC_HOST, WORLD), identity::HOST);
    let marked = mark::encode(mark::MAGIC_IDENTITY, 0x12_3456);
    assert_eq!(identity(marked, WORLD), 0x12_3456, "a service address, after translation back");
}

#[test]
fn link_local_chatter_of_the_host_is_ignored() {
    let model = node();
    let verdict = from_host(&model, &config(1), 0, &packet(ROUTER, [224, 0, 0, 22], 2));
    assert_eq!(verdict, Verdict::Ignore);
}

#[test]
fn the_tunnels_identity_reaches_the_stack() {
    let (mut model, config) = (node(), config(FLAG_LEGACY_ROUTING));
    let verdict = |model: &Model, vni, source, destination| {
        let packet = packet(source, destination, protocol::TCP);
        match from_overlay(model, &config, vni, &packet, ECHO) {
            Verdict::Stack { identity } => Ok(identity),
            Verdict::Drop(reason) => Err(reason),
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(verdict(&model, 4444, REMOTE_POD, POD_A), Ok(4444));
    assert_eq!(verdict(&model, 4444, REMOTE_POD, ROUTER), Ok(4444));
    assert_eq!(verdict(&model, 1, REMOTE_POD, POD_A), Err(Reason::INVALID_IDENTITY));

    assert_eq!(verdict(&model, 6, REMOTE_NODE, POD_A), Ok(identity::REMOTE_NODE));
    let apiserver = RemoteEndpointInfo::new(identity::KUBE_APISERVER, None);
    model.ipcache.push((IpcacheKey::new(REMOTE_NODE.into(), 32), apiserver));
    assert_eq!(verdict(&model, 6, REMOTE_NODE, POD_A), Ok(identity::KUBE_APISERVER));
    assert_eq!(verdict(&model, 6, POD_A, POD_B), Ok(identity::REMOTE_NODE), "no pod's identity from an address");
}

#[test]
fn the_tunnels_direct_path_is_for_the_same_flows() {
    let (model, config) = (node(), config(0));
    let local = pod(LXC_A, 7, 1111);
    let verdict = |protocol| from_overlay(&model, &config, 4444, &packet(REMOTE_POD, POD_A, protocol), ECHO);
    assert_eq!(verdict(protocol::ICMP), Verdict::Deliver { endpoint: &local, identity: 4444, direct: true });
    assert_eq!(verdict(protocol::TCP), Verdict::Stack { identity: 4444 });
}

/// [`node`] in native routing: the pod over there is known by its row in the ipcache, which names no node.
fn native() -> (Model, Config) {
    let mut model = node();
    model.tunnel.clear();
    model.ipcache.push((IpcacheKey::new(REMOTE_POD.into(), 32), RemoteEndpointInfo::new(3333, None)));
    (model, config(FLAG_LEGACY_ROUTING | FLAG_NATIVE_ROUTING))
}

#[test]
fn without_a_tunnel_the_stack_routes_to_other_nodes() {
    let (model, legacy) = native();
    let direct = Config { flags: FLAG_NATIVE_ROUTING, ..legacy };
    for config in [legacy, direct] {
        for (protocol, transport) in [(protocol::ICMP, ECHO), (protocol::UDP, Transport([0x80, 0, 0x21, 0x18]))] {
            let packet = packet(POD_A, REMOTE_POD, protocol);
            let verdict = from_container(&model, &config, FROM_A, &packet, transport);
            assert_eq!(verdict, Verdict::Stack { identity: 1111 }, "port 8472 is no tunnel's");
        }
    }
    let local = from_container(&model, &direct, FROM_A, &packet(POD_A, POD_B, protocol::ICMP), ECHO);
    assert!(matches!(local, Verdict::Deliver { direct: true, .. }));
}

#[test]
fn without_a_tunnel_an_address_tells_which_pod_of_another_node_sent() {
    let (model, config) = native();
    let identity = |skb_mark, source| match from_host(&model, &config, skb_mark, &packet(source, POD_B, protocol::TCP))
    {
        Verdict::Deliver { identity, .. } => identity,
        other => panic!("{other:?}"),
    };
    assert_eq!(identity(0, REMOTE_POD), 3333);
    assert_eq!(identity(0x4000, REMOTE_POD), 3333);
    assert_eq!(identity(0, WORLD), identity::WORLD);
    assert_eq!(identity(0, ROUTER), identity::HOST);
    assert_eq!(identity(0, POD_A), identity::WORLD, "what pods of this node send is marked");
    assert_eq!(identity(mark::encode(mark::MAGIC_IDENTITY, 1111), POD_A), 1111);
}

#[test]
fn senders_are_told_once_that_nobody_has_an_address() {
    let gone = packet(REMOTE_POD, [10, 0, 1, 99], protocol::TCP);
    for (model, config) in [native(), (node(), config(FLAG_LEGACY_ROUTING)), (node(), config(0))] {
        for skb_mark in [0, 0x4000, mark::encode(mark::MAGIC_IDENTITY, 1111)] {
            assert_eq!(from_host(&model, &config, skb_mark, &gone), Verdict::Unreachable);
        }
        assert_eq!(from_host(&model, &config, mark::MAGIC_UNREACHABLE, &gone), Verdict::Drop(Reason::UNROUTABLE));
    }
    let (model, config) = (node(), config(FLAG_LEGACY_ROUTING));
    assert_eq!(from_overlay(&model, &config, 4444, &gone, ECHO), Verdict::Unreachable);
}

//! Computes what a node should have.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use basal_maps::{
    addr::{Mac64, NetIp},
    config::{Config, FLAG_LEGACY_ROUTING, FLAG_NATIVE_ROUTING, FLAG_SPLIT_WORLD},
    endpoint::EndpointInfo,
    identity,
};
use ipnet::IpNet;

use crate::{
    forward,
    kernel::Observed,
    masquerade::{BpfMasquerade, Masquerading, masquerade_hooks, masqueraded_by_programs},
    names::IfName,
    nft::{self, Masquerade, NftPlan},
    program::{Object, ProgramSet},
    routing::{Routing, Tunnel},
    rows,
    state::{Address, Hook, Link, LinkKind, NodeState, PodSide, Route, RouteKey, Symbol, SysctlKey},
};

/// Bytes that VXLAN adds to a packet over IPv4: outer Ethernet 14, IPv4 20, UDP 8, VXLAN 8.
pub const TUNNEL_OVERHEAD_IPV4: u32 = 50;
/// The same over IPv6, whose header has 40 bytes.
pub const TUNNEL_OVERHEAD_IPV6: u32 = 70;
/// Bytes that every link must carry in one IPv6 packet (RFC 8200, 5).
const IPV6_LEAST_MTU: u32 = 1280;
/// Cilium's UDP port for VXLAN.
pub const DEFAULT_TUNNEL_PORT: u16 = 8472;

/// Everything that a node's datapath follows from, as far as the kernel is concerned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodePlan {
    /// The router addresses (CiliumInternalIP): the pods' gateways, from this node's pod CIDRs.
    pub routers: Routers,
    /// The addresses of its blocks that others look for this node at (CiliumNode's `spec.health`): it answers itself.
    pub health_ips: BTreeSet<IpAddr>,
    /// Pod CIDRs of this node.
    pub local_cidrs: BTreeSet<IpNet>,
    /// This node's own addresses, without the router addresses.
    pub node_ips: BTreeSet<IpAddr>,
    /// MTU of the devices in bytes: the smallest of the node's network devices.
    pub device_mtu: u32,
    /// How packets get to the pods of other nodes.
    pub routing: Routing,
    /// What pods send to these keeps its source: networks in which their addresses are known. In native routing a family
    /// without one has the blocks of the other nodes in its place.
    pub native_networks: BTreeSet<IpNet>,
    /// The other nodes by name.
    pub remote_nodes: BTreeMap<String, RemoteNode>,
    /// This node's pods by endpoint id.
    pub endpoints: BTreeMap<u16, Endpoint>,
    /// Addresses and prefixes of the cluster that etcd told about, other than this node's own pods.
    pub peers: BTreeMap<IpNet, Peer>,
    /// All pod traffic passes the host stack (DESIGN 4.13).
    pub legacy_routing: bool,
    /// The cluster has both families.
    pub dual_stack: bool,
    /// Masquerade IPv4 from pods to the outside.
    pub masquerade_ipv4: bool,
    /// Masquerade IPv6 from pods to the outside.
    pub masquerade_ipv6: bool,
    /// Programs masquerade instead of nftables.
    pub bpf_masquerade: Option<BpfMasquerade>,
    /// What programs are loaded from.
    pub object: Object,
}

/// The router addresses; a family without one is off.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Routers {
    /// IPv4 gateway of the pods.
    pub v4: Option<Ipv4Addr>,
    /// IPv6 gateway of the pods.
    pub v6: Option<Ipv6Addr>,
}

impl Routers {
    /// The addresses that there are.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> + use<> {
        self.v4.map(IpAddr::V4).into_iter().chain(self.v6.map(IpAddr::V6))
    }

    /// The address of the family that `ip` has.
    #[must_use]
    pub fn for_family_of(&self, ip: IpAddr) -> Option<IpAddr> {
        match ip {
            IpAddr::V4(_) => self.v4.map(IpAddr::V4),
            IpAddr::V6(_) => self.v6.map(IpAddr::V6),
        }
    }
}

/// Another node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RemoteNode {
    /// Its id in `cilium_node_map_v2`.
    pub node_id: u16,
    /// Where its tunnel packets go; none without a tunnel.
    pub tunnel_endpoint: Option<IpAddr>,
    /// The addresses that routes to its pods lead by, one of a family at most.
    pub next_hops: Vec<IpAddr>,
    /// Its pod CIDRs.
    pub pod_cidrs: BTreeSet<IpNet>,
    /// Its own addresses.
    pub node_ips: BTreeSet<IpAddr>,
    /// Its router addresses.
    pub router_ips: BTreeSet<IpAddr>,
    /// Identity of its addresses: [`identity::REMOTE_NODE`] or [`identity::KUBE_APISERVER`].
    pub identity: u32,
}

/// A pod of this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// Host side of its device pair.
    pub link: IfName,
    /// The pod's side.
    pub pod: PodSide,
    /// Its security identity.
    pub identity: u32,
}

/// Whom an address or prefix belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer {
    /// Security identity.
    pub identity: u32,
    /// The node that serves it, when that is another one.
    pub tunnel_endpoint: Option<IpAddr>,
}

impl NodePlan {
    /// MTU of routes to pods of other nodes and of the pods' default routes, in bytes.
    #[must_use]
    pub fn route_mtu(&self) -> u32 {
        self.device_mtu.saturating_sub(self.tunnel_overhead())
    }

    fn tunnel_overhead(&self) -> u32 {
        match self.routing {
            Routing::Tunnel(Tunnel { ipv6: true, .. }) => TUNNEL_OVERHEAD_IPV6,
            Routing::Tunnel(Tunnel { ipv6: false, .. }) => TUNNEL_OVERHEAD_IPV4,
            Routing::Native(_) => 0,
        }
    }

    /// Why pods of different nodes cannot do with the MTU, and the way out: IPv6 has a least one, in the tunnel too.
    #[must_use]
    pub fn mtu_problem(&self) -> Option<String> {
        let (mtu, least) = (self.device_mtu, IPV6_LEAST_MTU + self.tunnel_overhead());
        let place = if self.routing.tunnel().is_some() { " in the tunnel, which" } else { ", which" };
        (self.routers.v6.is_some() && mtu < least).then(|| {
            format!(
                "MTU {mtu} is too small for IPv6{place} needs {least}: raise that of the node's device or \
                 the key mtu, or set enable-ipv6 to \"false\""
            )
        })
    }

    /// What the node should have. What depends on a device's interface index appears once that device exists, so a node
    /// is complete after the second round of reading and applying.
    #[must_use]
    pub fn desired(&self, observed: &Observed) -> NodeState {
        let mut state = NodeState::default();
        self.devices(&mut state);
        self.routes(observed, &mut state);
        state.maps = self.rows();
        let devices = self.masquerading(observed);
        self.masquerade_rows(&devices, &mut state);
        self.endpoints(observed, &mut state);
        self.programs(observed, &devices, &mut state);
        let by_programs = masqueraded_by_programs(&devices, &observed.state);
        let masquerades = |v6, on: bool| {
            on.then(|| Masquerade { keeps_source: self.keeps_source(v6), by_programs: by_programs.clone() })
        };
        let nft = NftPlan {
            local_cidrs: self.local_cidrs.clone(),
            routers: self.routers.addresses().collect(),
            tunnel_port: self.routing.tunnel().map(|tunnel| tunnel.port),
            masquerade_ipv4: masquerades(false, self.masquerade_ipv4),
            masquerade_ipv6: masquerades(true, self.masquerade_ipv6),
        };
        state.nft.insert(nft::TABLE.to_owned(), nft.table());
        // Where there is no such table, nothing keeps packets from pods.
        state.forward = observed.state.forward.keys().map(|table| (*table, forward::rules())).collect();
        state
    }

    /// The addresses of its blocks that the node keeps for itself; they are on `cilium_host`.
    fn own_ips(&self) -> impl Iterator<Item = IpAddr> {
        self.routers.addresses().chain(self.health_ips.iter().copied())
    }

    fn devices(&self, state: &mut NodeState) {
        let (host, net) = (IfName::host(), IfName::net());
        let link = |kind, arp| Link { kind, mtu: self.device_mtu, up: true, arp };
        state.links.insert(host.clone(), link(LinkKind::Veth { peer: net.clone() }, false));
        state.links.insert(net.clone(), link(LinkKind::Veth { peer: host.clone() }, false));
        let mut devices = vec![host.clone(), net];
        if let Some(Tunnel { port, .. }) = self.routing.tunnel() {
            state.links.insert(IfName::vxlan(), link(LinkKind::Vxlan { port }, true));
            devices.push(IfName::vxlan());
        }
        for ip in self.own_ips() {
            state.addresses.insert(Address { link: host.clone(), net: ip.into() });
        }

        let mut set = |key: SysctlKey, value: &str| {
            state.sysctls.insert(key, value.to_owned());
        };
        set(SysctlKey::global("net/ipv4/ip_forward"), "1");
        set(SysctlKey::global("net/ipv4/conf/all/rp_filter"), "0");
        if self.routers.v6.is_some() {
            set(SysctlKey::global("net/ipv6/conf/all/disable_ipv6"), "0");
            set(SysctlKey::global("net/ipv6/conf/all/forwarding"), "1");
        }
        for device in &devices {
            for (name, value) in DEVICE_SYSCTLS_IPV4 {
                set(SysctlKey::device("ipv4", device, name), value);
            }
            if self.routers.v6.is_some() {
                set(SysctlKey::device("ipv6", device, "forwarding"), "1");
            }
        }
    }

    fn routes(&self, observed: &Observed, state: &mut NodeState) {
        let host = IfName::host();
        if let Some(router) = self.routers.v4 {
            // The kernel takes a gateway only when a more specific route of narrower scope leads to it.
            let key = RouteKey { destination: IpAddr::V4(router).into(), link: host.clone() };
            state.routes.insert(key, Route::default());
        }
        let local = self.local_cidrs.iter().map(|cidr| (cidr, None));
        let tunneled = self.remote_nodes.values().filter(|_| self.routing.tunnel().is_some());
        let remote = tunneled.flat_map(|node| &node.pod_cidrs).map(|cidr| (cidr, Some(self.route_mtu())));
        for (cidr, mtu) in local.chain(remote) {
            let Some(router) = self.routers.for_family_of(cidr.addr()) else { continue };
            // IPv6 refuses one of the node's own addresses as gateway.
            let route = Route { gateway: Some(router).filter(IpAddr::is_ipv4), source: Some(router), mtu };
            state.routes.insert(RouteKey { destination: cidr.trunc(), link: host.clone() }, route);
        }
        state.routes.extend(self.direct_routes(observed));
    }

    /// The rows of what needs no device: of all maps, but those of endpoints in `cilium_lxc`.
    #[must_use]
    pub fn rows(&self) -> rows::Rows {
        // A map without rows is ours as well: rows that others left in it go.
        let masquerades = self.bpf_masquerade.is_some();
        let maps = rows::MapId::ALL.into_iter().filter(|map| masquerades || !map.is_for_masquerading());
        let mut all: rows::Rows = maps.map(|map| (map, BTreeMap::new())).collect();
        let mut put = |row: rows::Row| row.insert_into(&mut all);
        for router in self.routers.addresses() {
            let everything = match router {
                IpAddr::V4(_) => IpNet::from(ipnet::Ipv4Net::default()),
                IpAddr::V6(_) => IpNet::from(ipnet::Ipv6Net::default()),
            };
            let family = basal_maps::addr::family_of(router);
            put(rows::ipcache(everything, identity::world(family, self.dual_stack), None));
        }
        let tunnel_to = |endpoint: Option<IpAddr>| endpoint.filter(|_| self.routing.tunnel().is_some());
        for node in self.remote_nodes.values() {
            let tunnel_endpoint = tunnel_to(node.tunnel_endpoint);
            // Without a tunnel there is nothing to say of a block: addresses in it that nobody told about are the world's.
            if let Some(endpoint) = tunnel_endpoint {
                for cidr in &node.pod_cidrs {
                    put(rows::ipcache(*cidr, identity::WORLD, tunnel_endpoint));
                    put(rows::tunnel(*cidr, endpoint, node.node_id));
                }
            }
            for ip in &node.node_ips {
                put(rows::ipcache((*ip).into(), node.identity, None));
                put(rows::node(*ip, node.node_id));
            }
            for ip in &node.router_ips {
                put(rows::ipcache((*ip).into(), node.identity, tunnel_endpoint));
            }
        }
        for (cidr, peer) in &self.peers {
            put(rows::ipcache(*cidr, peer.identity, tunnel_to(peer.tunnel_endpoint)));
        }
        for endpoint in self.endpoints.values() {
            for address in &endpoint.pod.addresses {
                put(rows::ipcache(address.ip.into(), endpoint.identity, None));
            }
        }
        for ip in self.node_ips.iter().copied().chain(self.own_ips()) {
            put(rows::host(ip));
            put(rows::ipcache(ip.into(), identity::HOST, None));
        }
        all
    }

    fn endpoints(&self, observed: &Observed, state: &mut NodeState) {
        for (id, endpoint) in &self.endpoints {
            let kind = LinkKind::Endpoint(Some(endpoint.pod.clone()));
            let link = Link { kind, mtu: self.device_mtu, up: true, arp: true };
            state.links.insert(endpoint.link.clone(), link);
            state.sysctls.insert(SysctlKey::device("ipv4", &endpoint.link, "rp_filter"), "0".to_owned());

            let Some(device) = observed.devices.get(&endpoint.link) else { continue };
            let info = EndpointInfo {
                ifindex: device.index,
                lxc_id: *id,
                mac: Mac64::from(endpoint.pod.mac),
                node_mac: Mac64::from(endpoint.pod.host_mac),
                sec_id: endpoint.identity,
                ..EndpointInfo::default()
            };
            for address in &endpoint.pod.addresses {
                rows::endpoint(address.ip, &info).insert_into(&mut state.maps);
            }
        }
    }

    fn programs(&self, observed: &Observed, devices: &[Masquerading<'_>], state: &mut NodeState) {
        let usable = |name: &IfName| match (state.links.get(name), observed.state.links.get(name)) {
            (Some(wanted), Some(found)) => wanted.kind.fits(&found.kind),
            _ => false,
        };
        let vxlan = IfName::vxlan();
        let (tunnel_port, vxlan_ifindex) = match self.routing {
            Routing::Native(_) => (0, 0),
            Routing::Tunnel(tunnel) => match observed.devices.get(&vxlan).filter(|_| usable(&vxlan)) {
                Some(device) => (tunnel.port, device.index),
                None => return,
            },
        };
        let flag = |on, flag| if on { flag } else { 0 };
        let config = Config {
            router_ipv4: self.routers.v4.map_or(NetIp::UNSPECIFIED, |ip| NetIp::v4(ip.octets())),
            router_ipv6: self.routers.v6.map_or(NetIp::UNSPECIFIED, |ip| NetIp::v6(ip.octets())),
            vxlan_ifindex,
            route_mtu: self.route_mtu(),
            tunnel_port: u32::from(tunnel_port),
            flags: flag(self.legacy_routing, FLAG_LEGACY_ROUTING)
                | flag(self.dual_stack, FLAG_SPLIT_WORLD)
                | flag(matches!(self.routing, Routing::Native(_)), FLAG_NATIVE_ROUTING),
            ..Config::UNSET
        };
        let set = ProgramSet { object: self.object, config: self.masquerade_config(config) };
        let hash = set.hash();
        let of_tunnel = [(vxlan.clone(), Symbol::FromOverlay), (vxlan, Symbol::ToOverlay)];
        let of_tunnel = of_tunnel.into_iter().filter(|_| self.routing.tunnel().is_some());
        for (link, symbol) in
            [(IfName::host(), Symbol::FromHost), (IfName::host(), Symbol::ToHost), (IfName::net(), Symbol::ToHost)]
                .into_iter()
                .chain(of_tunnel)
        {
            state.hooks.insert(Hook::Device { link, symbol }, hash);
        }
        for (id, endpoint) in self.endpoints.iter().filter(|(_, endpoint)| usable(&endpoint.link)) {
            state.hooks.insert(Hook::Policy { id: *id }, hash);
            state.hooks.insert(Hook::Endpoint { id: *id, link: endpoint.link.clone() }, hash);
        }
        state.hooks.extend(masquerade_hooks(devices).map(|hook| (hook, hash)));
        state.programs.insert(hash);
        state.load_from = Some(set);
    }
}

/// Parameters of `cilium_host`, `cilium_net` and `cilium_vxlan`, below `net/ipv4/conf/<device>`. Packets on them may
/// carry the node's own addresses as source and are forwarded without redirects.
pub const DEVICE_SYSCTLS_IPV4: [(&str, &str); 4] =
    [("accept_local", "1"), ("forwarding", "1"), ("rp_filter", "0"), ("send_redirects", "0")];

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::{diff::diff, kernel::Device, routing::DirectRoutes, rows::MapId, state::PodAddress};

    pub(crate) fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    pub(crate) fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    fn tunnel(ipv6: bool) -> Routing {
        Routing::Tunnel(Tunnel { port: DEFAULT_TUNNEL_PORT, ipv6 })
    }

    pub(crate) fn plan() -> NodePlan {
        let pod = PodSide {
            netns: "/run/netns/pod".into(),
            name: IfName::new("eth0").unwrap(),
            mac: [2, 0, 0, 0, 0, 1],
            host_mac: [2, 0, 0, 0, 0, 2],
            addresses: vec![PodAddress { ip: ip("10.0.1.7"), gateway: ip("10.0.1.1") }],
            route_mtu: 1450,
        };
        let link = IfName::new("lxc0123456789ab").unwrap();
        let remote = RemoteNode {
            node_id: 3,
            tunnel_endpoint: Some(ip("192.168.0.2")),
            next_hops: vec![ip("192.168.0.2")],
            pod_cidrs: [net("10.0.2.0/24"), net("fd00:0:2::/64")].into(),
            node_ips: [ip("192.168.0.2")].into(),
            router_ips: [ip("10.0.2.1")].into(),
            identity: identity::REMOTE_NODE,
        };
        NodePlan {
            routers: Routers { v4: Some(Ipv4Addr::new(10, 0, 1, 1)), v6: Some("fd00:0:1::1".parse().unwrap()) },
            health_ips: [ip("10.0.1.2")].into(),
            local_cidrs: [net("10.0.1.0/24"), net("fd00:0:1::/64")].into(),
            node_ips: [ip("192.168.0.1")].into(),
            device_mtu: 1500,
            routing: tunnel(false),
            native_networks: BTreeSet::new(),
            remote_nodes: [("worker-2".to_owned(), remote)].into(),
            endpoints: [(7, Endpoint { link, pod, identity: 4321 })].into(),
            peers: BTreeMap::new(),
            legacy_routing: true,
            dual_stack: true,
            masquerade_ipv4: true,
            masquerade_ipv6: true,
            bpf_masquerade: None,
            object: Object::new(b""),
        }
    }

    pub(crate) fn observed(state: NodeState) -> Observed {
        let device = |index| Device { index, ..Device::default() };
        let devices = state.links.keys().cloned().zip((10..).map(device)).collect();
        Observed { state, devices, ..Observed::default() }
    }

    #[test]
    fn the_second_round_completes_a_node() {
        let plan = plan();
        let first = plan.desired(&Observed::default());
        assert!(first.hooks.is_empty() && first.programs.is_empty());
        let second = plan.desired(&observed(first.clone()));
        assert_eq!(second.hooks.len(), 7);
        assert_eq!(second.programs.len(), 1);
        assert_eq!(second.maps[&MapId::Endpoints].len(), 5, "two routers, a health and a node address, and a pod");
        let third = plan.desired(&observed(second.clone()));
        assert_eq!(diff(&third, &second), []);
    }

    #[test]
    fn routes_carry_the_tunnel_mtu_to_other_nodes_only() {
        let state = plan().desired(&Observed::default());
        let route =
            |text| state.routes.get(&RouteKey { destination: net(text), link: IfName::host() }).unwrap().clone();
        let (v4, v6) = (ip("10.0.1.1"), ip("fd00:0:1::1"));
        assert_eq!(route("10.0.1.1/32"), Route::default());
        assert_eq!(route("10.0.1.0/24"), Route { gateway: Some(v4), source: Some(v4), mtu: None });
        assert_eq!(route("10.0.2.0/24"), Route { gateway: Some(v4), source: Some(v4), mtu: Some(1450) });
        assert_eq!(route("fd00:0:2::/64"), Route { gateway: None, source: Some(v6), mtu: Some(1450) });
        assert_eq!(NodePlan { routing: tunnel(true), ..plan() }.route_mtu(), 1430);
    }

    #[test]
    fn an_mtu_that_ipv6_cannot_do_with_is_told() {
        let with = |device_mtu, ipv6| NodePlan { device_mtu, routing: tunnel(ipv6), ..plan() };
        assert_eq!(with(1330, false).mtu_problem(), None);
        assert!(with(1329, false).mtu_problem().unwrap().contains("needs 1330"));
        assert_eq!(with(1350, true).mtu_problem(), None);
        assert!(with(1349, true).mtu_problem().unwrap().contains("needs 1350"));
        let native = |device_mtu| NodePlan { device_mtu, routing: Routing::Native(DirectRoutes::None), ..plan() };
        assert_eq!(native(1280).mtu_problem(), None);
        assert!(native(1279).mtu_problem().unwrap().contains("IPv6, which needs 1280"));
        let ipv4 = Routers { v6: None, ..plan().routers };
        assert_eq!(NodePlan { routers: ipv4, ..with(1000, false) }.mtu_problem(), None);
    }

    #[test]
    fn an_endpoint_is_attached_only_when_its_device_and_rows_are_there() {
        let plan = plan();
        let mut with_base = plan.desired(&Observed::default());
        with_base.links.retain(|name, _| !name.is_endpoint());
        let state = plan.desired(&observed(with_base));
        assert!(!state.hooks.keys().any(|hook| matches!(hook, Hook::Endpoint { .. } | Hook::Policy { .. })));
        assert_eq!(state.hooks.len(), 5);
    }

    #[test]
    fn a_vxlan_device_that_will_be_made_again_gives_no_index() {
        let plan = plan();
        let mut found = plan.desired(&Observed::default());
        found.links.get_mut(&IfName::vxlan()).unwrap().kind = LinkKind::Vxlan { port: 4789 };
        assert!(plan.desired(&observed(found)).programs.is_empty());
    }
}

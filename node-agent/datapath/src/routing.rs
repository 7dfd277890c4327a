//! How packets get to the pods of other nodes.
//!
//! In a tunnel (Cilium's `routing-mode: tunnel`), or as they are (`native`): then the network between the nodes has to
//! know which node has which pods, or the nodes make routes themselves to those that they share a link with
//! (`auto-direct-node-routes`).

use std::{collections::BTreeMap, fmt, net::IpAddr};

use ipnet::IpNet;

use crate::{
    kernel::Observed,
    names::IfName,
    plan::{NodePlan, RemoteNode},
    state::{Route, RouteKey},
};

/// How packets get to the pods of other nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Routing {
    /// In VXLAN, from node to node.
    Tunnel(Tunnel),
    /// As pods sent them.
    Native(DirectRoutes),
}

/// What a tunnel runs over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tunnel {
    /// UDP port.
    pub port: u16,
    /// Nodes reach each other by IPv6.
    pub ipv6: bool,
}

/// Which routes to other nodes' pods a node makes itself, by way of these nodes' own addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DirectRoutes {
    /// None: the network has them.
    None,
    /// To every node; one that shares no link with this one is reported.
    All,
    /// To those that share a link with this one; the network has the others.
    SameLink,
}

impl Routing {
    /// The tunnel, where there is one.
    #[must_use]
    pub fn tunnel(self) -> Option<Tunnel> {
        match self {
            Self::Tunnel(tunnel) => Some(tunnel),
            Self::Native(_) => None,
        }
    }
}

/// Why a node makes no route to another's pods.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NoRoute {
    /// The node is not on a link of this one's: a router is between them.
    NotOnLink(IpAddr),
    /// The address is this node's own.
    Own(IpAddr),
    /// The node has no address of the family that its pods have.
    NoAddress(IpNet),
}

impl fmt::Display for NoRoute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotOnLink(ip) => write!(f, "{ip} is on no network of this node's devices"),
            Self::Own(ip) => write!(f, "{ip} is an address of this node"),
            Self::NoAddress(cidr) => write!(f, "it has no address by which {cidr} could be reached"),
        }
    }
}

impl NodePlan {
    /// The routes that the node makes itself.
    pub(crate) fn direct_routes(&self, observed: &Observed) -> BTreeMap<RouteKey, Route> {
        let hops = self.hops(observed).filter_map(|(_, cidr, hop)| Some((cidr, hop.ok()?)));
        hops.map(|(cidr, (gateway, link))| {
            let route = Route { gateway: Some(gateway), source: None, mtu: None };
            (RouteKey { destination: cidr.trunc(), link }, route)
        })
        .collect()
    }

    /// The nodes that should have a route and cannot, with the reason. As far as anybody asked for it.
    #[must_use]
    pub fn without_route(&self, observed: &Observed) -> BTreeMap<String, NoRoute> {
        if self.routing != Routing::Native(DirectRoutes::All) {
            return BTreeMap::new();
        }
        self.hops(observed).filter_map(|(name, _, hop)| Some((name.to_owned(), hop.err()?))).collect()
    }

    /// Each block of other nodes with the address that it is behind and the device which that is on.
    fn hops<'a>(
        &'a self,
        observed: &'a Observed,
    ) -> impl Iterator<Item = (&'a str, IpNet, Result<(IpAddr, IfName), NoRoute>)> {
        let asked = matches!(self.routing, Routing::Native(DirectRoutes::All | DirectRoutes::SameLink));
        let nodes = self.remote_nodes.iter().filter(move |_| asked);
        nodes.flat_map(move |(name, node)| {
            let blocks = node.pod_cidrs.iter().filter(|cidr| self.routers.for_family_of(cidr.addr()).is_some());
            blocks.map(move |cidr| (name.as_str(), *cidr, hop(node, *cidr, observed)))
        })
    }
}

fn hop(node: &RemoteNode, cidr: IpNet, observed: &Observed) -> Result<(IpAddr, IfName), NoRoute> {
    let same_family = |ip: &&IpAddr| ip.is_ipv4() == cidr.addr().is_ipv4();
    let ip = *node.next_hops.iter().find(same_family).ok_or(NoRoute::NoAddress(cidr))?;
    if observed.device_with(ip).is_some() {
        return Err(NoRoute::Own(ip));
    }
    observed.link_to(ip).map(|link| (ip, link.clone())).ok_or(NoRoute::NotOnLink(ip))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use basal_maps::config::FLAG_NATIVE_ROUTING;

    use super::*;
    use crate::{
        diff::diff,
        op::Op,
        plan::tests::{ip, net, observed, plan},
        rows::MapId,
        state::{Hook, NodeState, Symbol},
    };

    /// A node whose other node has these addresses.
    fn native(routes: DirectRoutes, hops: &[&str]) -> NodePlan {
        let mut plan = NodePlan { routing: Routing::Native(routes), ..plan() };
        let other = plan.remote_nodes.get_mut("worker-2").unwrap();
        other.next_hops = hops.iter().map(|hop| ip(hop)).collect();
        plan
    }

    /// Two devices; a part of the first one's network is behind a router.
    fn two_links() -> Observed {
        let link = |name: &str| IfName::new(name).ok();
        let networks = [
            ("192.168.0.0/16", link("eth0")),
            ("192.168.8.0/24", None),
            ("fc00::/64", link("eth0")),
            ("172.16.0.0/24", link("eth1")),
        ];
        let networks = networks.map(|(network, link)| (net(network), link)).into();
        let device = crate::kernel::Device { addresses: vec![net("192.168.0.1/16")], ..Default::default() };
        Observed { networks, devices: [(link("eth0").unwrap(), device)].into(), ..Observed::default() }
    }

    fn routes(plan: &NodePlan) -> Vec<String> {
        let state = plan.desired(&two_links());
        let routes = state.routes.iter().filter(|(key, _)| !key.link.is_managed());
        routes
            .map(|(key, route)| format!("{} via {} dev {}", key.destination, route.gateway.unwrap(), key.link))
            .collect()
    }

    #[test]
    fn a_route_leads_by_the_device_that_the_next_hop_is_on() {
        let found = routes(&native(DirectRoutes::All, &["192.168.0.2", "fc00::2"]));
        assert_eq!(found, ["10.0.2.0/24 via 192.168.0.2 dev eth0", "fd00:0:2::/64 via fc00::2 dev eth0"]);
        let found = routes(&native(DirectRoutes::SameLink, &["172.16.0.9", "fc00::2"]));
        assert_eq!(found, ["10.0.2.0/24 via 172.16.0.9 dev eth1", "fd00:0:2::/64 via fc00::2 dev eth0"]);
        assert_eq!(routes(&native(DirectRoutes::None, &["192.168.0.2", "fc00::2"])), [""; 0]);
        assert_eq!(routes(&plan()), [""; 0]);
    }

    #[test]
    fn who_has_no_route_is_told_when_every_node_should_have_one() {
        for (hops, why) in [
            (&["192.168.8.2", "fc00::2"][..], NoRoute::NotOnLink(ip("192.168.8.2"))),
            (&["10.9.9.9", "fc00::2"], NoRoute::NotOnLink(ip("10.9.9.9"))),
            (&["192.168.0.1", "fc00::2"], NoRoute::Own(ip("192.168.0.1"))),
            (&["fc00::2"], NoRoute::NoAddress(net("10.0.2.0/24"))),
        ] {
            let plan = native(DirectRoutes::All, hops);
            assert_eq!(routes(&plan), ["fd00:0:2::/64 via fc00::2 dev eth0"], "the rest goes on");
            assert_eq!(plan.without_route(&two_links()), [("worker-2".to_owned(), why)].into());
            for routes in [DirectRoutes::SameLink, DirectRoutes::None] {
                assert!(native(routes, hops).without_route(&two_links()).is_empty());
            }
        }
        let ipv4 = NodePlan {
            routers: crate::plan::Routers { v6: None, ..plan().routers },
            ..native(DirectRoutes::All, &["192.168.0.2"])
        };
        assert!(ipv4.without_route(&two_links()).is_empty(), "the family is off");
    }

    /// The state that a node has after it was made from nothing.
    fn complete(plan: &NodePlan) -> NodeState {
        let first = plan.desired(&two_links());
        plan.desired(&Observed { networks: two_links().networks, ..observed(first) })
    }

    #[test]
    fn nothing_of_a_tunnel_is_in_native_routing() {
        let plan = native(DirectRoutes::All, &["192.168.0.2", "fc00::2"]);
        let state = complete(&plan);
        assert!(!state.links.contains_key(&IfName::vxlan()));
        assert!(state.sysctls.keys().all(|key| key.device_name() != Some("cilium_vxlan")));
        assert!(state.maps[&MapId::Tunnel].is_empty());
        let flags = state.maps[&MapId::Ipcache].values().map(|row| row[23]).collect::<BTreeSet<_>>();
        assert_eq!(flags, [0].into(), "no row has a tunnel endpoint");
        let config = state.load_from.unwrap().config;
        assert_eq!(config.flags & FLAG_NATIVE_ROUTING, FLAG_NATIVE_ROUTING);
        assert_eq!((config.route_mtu, config.vxlan_ifindex, config.tunnel_port), (1500, 0, 0));
        let of_host = state.routes.keys().filter(|key| key.link == IfName::host());
        assert_eq!(of_host.count(), 3, "the router and two blocks of this node");
    }

    #[test]
    fn a_change_of_routing_leaves_nothing_behind() {
        let direct = native(DirectRoutes::All, &["192.168.0.2", "fc00::2"]);
        let (tunnel, native) = (complete(&plan()), complete(&direct));
        let ops = diff(&native, &tunnel);
        let on_vxlan = |symbol| Hook::Device { link: IfName::vxlan(), symbol };
        for op in [
            Op::DeleteLinks([IfName::vxlan()].into()),
            Op::Detach(on_vxlan(Symbol::FromOverlay)),
            Op::Detach(on_vxlan(Symbol::ToOverlay)),
            Op::DeleteRoute(RouteKey { destination: net("10.0.2.0/24"), link: IfName::host() }),
        ] {
            assert!(ops.contains(&op), "{op} is not in {ops:#?}");
        }
        let rows =
            |wanted: MapId| ops.iter().filter(move |op| matches!(op, Op::DeleteRow { map, .. } if *map == wanted));
        assert_eq!(rows(MapId::Tunnel).count(), 2);
        let position = |wanted: fn(&Op) -> bool| ops.iter().position(wanted).unwrap();
        let new = position(|op| matches!(op, Op::SetRoute(key, _) if !key.link.is_managed()));
        assert!(new < position(|op| matches!(op, Op::DeleteRoute(_))), "a packet finds one of the two");

        let back = diff(&tunnel, &native);
        let gone = RouteKey { destination: net("10.0.2.0/24"), link: IfName::new("eth0").unwrap() };
        assert!(back.contains(&Op::DeleteRoute(gone)), "{back:#?}");
    }
}

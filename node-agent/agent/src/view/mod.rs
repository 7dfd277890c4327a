//! What the agent knows of the cluster, and what follows from it for the kernel.
//!
//! Two layers. The *base* is small: this node, its endpoints, the other nodes; it becomes a [`NodePlan`]. The *overlay*
//! is large: the ip→identity records of other nodes' pods, each one row of the ipcache, which stands where the base has
//! none for the same network. So a change of a record touches one row, whatever else is known.

pub mod ids;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use basal_crds::{
    address::AddressType,
    directory::{IpOwner, NodeId},
    identity::IdentityId,
    kvstore::{IpTarget, NodeRecord},
};
use basal_datapath::{
    kernel::Observed,
    plan::{Endpoint, NodePlan, Peer, RemoteNode},
    scope::Scope,
};
use basal_ipam::prefix::Family;
use ipnet::IpNet;

use crate::{endpoint::record::EndpointId, view::ids::NodeIds};

/// What the agent knows.
#[derive(Debug, Clone)]
pub struct View {
    key: NodeId,
    /// This node; without endpoints, nodes and peers.
    local: NodePlan,
    /// The address whose device says the MTU; `None` when the MTU is configured.
    mtu_of: Option<IpAddr>,
    endpoints: BTreeMap<EndpointId, Endpoint>,
    nodes: BTreeMap<NodeId, NodeRecord>,
    ids: NodeIds,
    ips: BTreeMap<IpNet, IpOwner>,
    /// The health addresses of the other nodes, with their tunnel endpoints.
    health: BTreeMap<IpNet, Option<IpAddr>>,
    changes: Changes,
}

/// What may have changed since [`View::take_changes`].
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Changes {
    /// Everything of the base.
    pub base: bool,
    /// These endpoints, as they were and as they are.
    pub endpoints: Scope,
    /// These networks of the overlay.
    pub networks: BTreeSet<IpNet>,
    /// What is made inside of these pods.
    pub pods: BTreeSet<EndpointId>,
}

impl Changes {
    /// Whether nothing changed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        !self.base && self.endpoints.is_empty() && self.networks.is_empty() && self.pods.is_empty()
    }

    /// Adds what another knows.
    pub fn merge(&mut self, other: Self) {
        self.base |= other.base;
        self.endpoints.merge(other.endpoints);
        self.networks.extend(other.networks);
        self.pods.extend(other.pods);
    }
}

impl View {
    /// Knows nothing but its own node. `ids` is what the node map holds.
    #[must_use]
    pub fn new(key: NodeId, local: NodePlan, ids: NodeIds) -> Self {
        Self {
            key,
            local,
            mtu_of: None,
            endpoints: BTreeMap::new(),
            nodes: BTreeMap::new(),
            ids,
            ips: BTreeMap::new(),
            health: BTreeMap::new(),
            changes: Changes { base: true, ..Changes::default() },
        }
    }

    /// This node.
    #[must_use]
    pub fn local(&self) -> &NodePlan {
        &self.local
    }

    /// Replaces what is known of this node, and what of other things follows from it.
    pub fn set_local(&mut self, local: NodePlan) {
        if self.local == local {
            return;
        }
        let before = std::mem::replace(&mut self.local, local);
        self.changes.base = true;
        if before.node_ips != self.local.node_ips {
            // Which records are leftovers of this node's own is another question now.
            let moved = |host| before.node_ips.contains(host) != self.local.node_ips.contains(host);
            let touched = self.ips.iter().filter(|(_, owner)| owner.host_ip.as_ref().is_some_and(moved));
            self.changes.networks.extend(touched.map(|(network, _)| *network));
        }
        if before.routing != self.local.routing {
            let tunnels: Vec<_> = self
                .nodes
                .values()
                .flat_map(|record| {
                    let tunnel = self.tunnel_endpoint(record);
                    health_networks(record).map(move |network| (network, tunnel))
                })
                .collect();
            self.changes.networks.extend(tunnels.iter().map(|(network, _)| *network));
            self.health = tunnels.into_iter().collect();
        }
        let route_mtu = self.local.route_mtu();
        for (id, endpoint) in self.endpoints.iter_mut().filter(|(_, endpoint)| endpoint.pod.route_mtu != route_mtu) {
            endpoint.pod.route_mtu = route_mtu;
            self.changes.pods.insert(*id);
        }
    }

    /// From now on the MTU is that of the device with this address.
    pub fn take_mtu_of(&mut self, ip: IpAddr) {
        self.mtu_of = Some(ip);
    }

    /// Follows the MTU of the node's device; answers it when it is another one. As long as no device has the address, it
    /// stays what it was.
    pub fn saw_devices(&mut self, observed: &Observed) -> Option<u32> {
        let (_, device) = observed.device_with(self.mtu_of?)?;
        let device_mtu = Some(device.mtu).filter(|mtu| *mtu != self.local.device_mtu)?;
        self.set_local(NodePlan { device_mtu, ..self.local.clone() });
        Some(device_mtu)
    }

    /// The endpoints of this node whose interfaces exist.
    #[must_use]
    pub fn endpoints(&self) -> &BTreeMap<EndpointId, Endpoint> {
        &self.endpoints
    }

    /// The other nodes.
    #[must_use]
    pub fn nodes(&self) -> &BTreeMap<NodeId, NodeRecord> {
        &self.nodes
    }

    /// What the ip→identity records say.
    #[must_use]
    pub fn ips(&self) -> &BTreeMap<IpNet, IpOwner> {
        &self.ips
    }

    /// An endpoint came or changed.
    pub fn put_endpoint(&mut self, id: EndpointId, mut endpoint: Endpoint) {
        let route_mtu = self.local.route_mtu();
        if endpoint.pod.route_mtu != route_mtu {
            // It became another one while the interface was made.
            endpoint.pod.route_mtu = route_mtu;
            self.changes.pods.insert(id);
        }
        self.changes.endpoints.add(id.get(), &endpoint);
        if let Some(before) = self.endpoints.insert(id, endpoint) {
            self.changes.endpoints.add(id.get(), &before);
        }
    }

    /// What is made inside of the pods is made again: what is there may be another agent's.
    pub fn renew_pods(&mut self) {
        self.changes.pods.extend(self.endpoints.keys());
    }

    /// An endpoint has another identity.
    pub fn set_identity(&mut self, id: EndpointId, identity: IdentityId) {
        if let Some(endpoint) = self.endpoints.get_mut(&id).filter(|endpoint| endpoint.identity != identity.get()) {
            endpoint.identity = identity.get();
            self.changes.endpoints.add(id.get(), endpoint);
        }
    }

    /// An endpoint went.
    pub fn remove_endpoint(&mut self, id: EndpointId) {
        if let Some(before) = self.endpoints.remove(&id) {
            self.changes.endpoints.add(id.get(), &before);
        }
    }

    /// A node came or changed. This node's own record changes nothing: it knows better.
    pub fn put_node(&mut self, record: NodeRecord) {
        let key = (record.cluster.clone(), record.name.clone());
        if key == self.key || self.nodes.get(&key) == Some(&record) {
            return;
        }
        self.remove_node(&key);
        let tunnel = self.tunnel_endpoint(&record);
        for network in health_networks(&record) {
            self.health.insert(network, tunnel);
            self.changes.networks.insert(network);
        }
        self.nodes.insert(key, record);
        self.changes.base = true;
    }

    /// A node went.
    pub fn remove_node(&mut self, key: &NodeId) {
        let Some(record) = self.nodes.remove(key) else { return };
        for network in health_networks(&record) {
            self.health.remove(&network);
            self.changes.networks.insert(network);
        }
        self.changes.base = true;
    }

    /// An ip→identity record came or changed.
    pub fn put_ip(&mut self, target: IpTarget, owner: IpOwner) {
        let network = target.network();
        if self.ips.insert(network, owner) != Some(owner) {
            self.changes.networks.insert(network);
        }
    }

    /// An ip→identity record went.
    pub fn remove_ip(&mut self, target: IpTarget) {
        let network = target.network();
        if self.ips.remove(&network).is_some() {
            self.changes.networks.insert(network);
        }
    }

    /// What may have changed since the last call.
    pub fn take_changes(&mut self) -> Changes {
        std::mem::take(&mut self.changes)
    }

    /// Puts changes back that could not be applied.
    pub fn put_back(&mut self, changes: Changes) {
        self.changes.merge(changes);
    }

    /// Where a node's tunnel ends: an address of the family that the tunnel runs over. None without a tunnel.
    #[must_use]
    pub fn tunnel_endpoint(&self, record: &NodeRecord) -> Option<IpAddr> {
        record.node_ip(if self.local.routing.tunnel()?.ipv6 { Family::V6 } else { Family::V4 })
    }

    /// The base. With a tunnel a node without an address that it could end at is left out: it cannot be reached.
    pub fn base(&mut self) -> NodePlan {
        let nodes = self.nodes.iter().map(|(key, record)| {
            let hosts = record.addresses.iter().filter(|address| is_host(&address.kind));
            (key, hosts.map(|address| address.ip).collect())
        });
        let ids = self.ids.assign(nodes).clone();
        let mut plan = self.local.clone();
        plan.endpoints = self.endpoints.iter().map(|(id, endpoint)| (id.get(), endpoint.clone())).collect();
        plan.remote_nodes = self.nodes.iter().filter_map(|(key, record)| self.remote_node(key, record, &ids)).collect();
        plan
    }

    /// The part of the base that says what should be in a scope; see there.
    #[must_use]
    pub fn base_of(&self, scope: &Scope) -> NodePlan {
        let touched = self.endpoints.iter().map(|(id, endpoint)| (id.get(), endpoint));
        let touched = touched.filter(|(id, endpoint)| scope.touches(*id, endpoint));
        let endpoints = touched.map(|(id, endpoint)| (id, endpoint.clone())).collect();
        NodePlan { endpoints, ..self.local.clone() }
    }

    fn remote_node(
        &self,
        key: &NodeId,
        record: &NodeRecord,
        ids: &BTreeMap<NodeId, u16>,
    ) -> Option<(String, RemoteNode)> {
        let of_kind = |wanted: fn(&AddressType) -> bool| {
            record.addresses.iter().filter(move |address| wanted(&address.kind)).map(|address| address.ip).collect()
        };
        let tunnel_endpoint = self.tunnel_endpoint(record);
        if self.local.routing.tunnel().is_some() && tunnel_endpoint.is_none() {
            return None;
        }
        let node = RemoteNode {
            node_id: *ids.get(key)?,
            tunnel_endpoint,
            next_hops: [Family::V4, Family::V6].into_iter().filter_map(|family| record.node_ip(family)).collect(),
            pod_cidrs: record.cidrs().collect(),
            node_ips: of_kind(is_host),
            router_ips: of_kind(|kind| *kind == AddressType::CiliumInternalIp),
            identity: IdentityId::REMOTE_NODE.get(),
        };
        Some((format!("{}/{}", key.0, key.1), node))
    }

    /// What the overlay says of a network; `None` when nothing.
    #[must_use]
    pub fn overlay(&self, network: IpNet) -> Option<Peer> {
        if let Some(IpOwner { host_ip, identity }) = self.ips.get(&network) {
            // A record with this node's address that belongs to no endpoint is a leftover of its own.
            let here = host_ip.is_some_and(|host| self.local.node_ips.contains(&host));
            let tunnel_endpoint = host_ip.filter(|_| self.local.routing.tunnel().is_some());
            return (!here).then_some(Peer { identity: identity.get(), tunnel_endpoint });
        }
        let tunnel_endpoint = *self.health.get(&network)?;
        Some(Peer { identity: IdentityId::HEALTH.get(), tunnel_endpoint })
    }

    /// All of the overlay.
    pub fn overlays(&self) -> impl Iterator<Item = (IpNet, Peer)> {
        let networks: BTreeSet<&IpNet> = self.ips.keys().chain(self.health.keys()).collect();
        networks.into_iter().filter_map(|network| Some((*network, self.overlay(*network)?)))
    }
}

fn is_host(kind: &AddressType) -> bool {
    matches!(kind, AddressType::InternalIp | AddressType::ExternalIp)
}

fn health_networks(record: &NodeRecord) -> impl Iterator<Item = IpNet> + use<> {
    let v4 = record.ipv4_health.map(|ip| IpNet::from(IpAddr::V4(ip)));
    let v6 = record.ipv6_health.map(|ip| IpNet::from(IpAddr::V6(ip)));
    v4.into_iter().chain(v6)
}

#[cfg(test)]
pub(crate) mod tests {
    use basal_crds::{
        address::NodeAddress,
        names::{ClusterId, ClusterName},
    };
    use basal_datapath::{
        plan::Routers,
        program::Object,
        routing::{DirectRoutes, Routing, Tunnel},
    };
    use basal_ipam::names::NodeName;

    use super::*;

    pub(crate) fn key(name: &str) -> NodeId {
        (ClusterName::default(), NodeName::new(name).unwrap())
    }

    pub(crate) fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    pub(crate) fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    /// An address is behind a node.
    pub(crate) fn put_ip(view: &mut View, address: &str, host: &str, identity: u32) {
        let owner = IpOwner { host_ip: Some(ip(host)), identity: IdentityId::new(identity) };
        view.put_ip(IpTarget::Host(ip(address)), owner);
    }

    pub(crate) fn local() -> NodePlan {
        NodePlan {
            routers: Routers { v4: "10.0.0.1".parse().ok(), v6: "fd00::1".parse().ok() },
            health_ips: BTreeSet::from([ip("10.0.0.2"), ip("fd00::2")]),
            local_cidrs: BTreeSet::from([net("10.0.0.0/24"), net("fd00::/112")]),
            node_ips: BTreeSet::from([ip("172.18.0.1"), ip("fc00::1")]),
            device_mtu: 1500,
            routing: Routing::Tunnel(Tunnel { port: 8472, ipv6: false }),
            native_networks: BTreeSet::new(),
            remote_nodes: BTreeMap::new(),
            endpoints: BTreeMap::new(),
            peers: BTreeMap::new(),
            legacy_routing: true,
            dual_stack: true,
            masquerade_ipv4: true,
            masquerade_ipv6: true,
            bpf_masquerade: None,
            object: Object::new(b"view"),
        }
    }

    pub(crate) fn node(name: &str, host: u8, block: u8) -> NodeRecord {
        let mut record = NodeRecord::new(NodeName::new(name).unwrap(), ClusterName::default(), ClusterId::new(0));
        let address = |kind, text: String| NodeAddress { kind, ip: text.parse().unwrap() };
        record.addresses = vec![
            address(AddressType::InternalIp, format!("172.18.0.{host}")),
            address(AddressType::InternalIp, format!("fc00::{host}")),
            address(AddressType::CiliumInternalIp, format!("10.0.{block}.1")),
            address(AddressType::Hostname, format!("192.0.2.{host}")),
        ];
        record.ipv4_cidrs = vec![format!("10.0.{block}.0/24").parse().unwrap()];
        record.ipv6_cidrs = vec![format!("fd00:{block}::/112").parse().unwrap()];
        record.ipv4_health = format!("10.0.{block}.2").parse().ok();
        record
    }

    fn view() -> View {
        View::new(key("n0"), local(), NodeIds::default())
    }

    #[test]
    fn a_node_becomes_part_of_the_base() {
        let mut view = view();
        view.put_node(node("n1", 9, 1));
        let expected = RemoteNode {
            node_id: 1,
            tunnel_endpoint: Some(ip("172.18.0.9")),
            next_hops: vec![ip("172.18.0.9"), ip("fc00::9")],
            pod_cidrs: BTreeSet::from([net("10.0.1.0/24"), net("fd00:1::/112")]),
            node_ips: BTreeSet::from([ip("172.18.0.9"), ip("fc00::9")]),
            router_ips: BTreeSet::from([ip("10.0.1.1")]),
            identity: 6,
        };
        assert_eq!(view.base().remote_nodes, BTreeMap::from([("default/n1".to_owned(), expected)]));
        let health = Peer { identity: 4, tunnel_endpoint: Some(ip("172.18.0.9")) };
        assert_eq!(view.overlays().collect::<Vec<_>>(), [(net("10.0.1.2/32"), health)]);

        view.remove_node(&key("n1"));
        assert_eq!(view.base(), local());
        assert_eq!(view.overlays().count(), 0);
    }

    #[test]
    fn a_node_that_no_tunnel_reaches_is_left_out() {
        let mut view = view();
        let mut record = node("n1", 9, 1);
        record.addresses.remove(0);
        view.put_node(record);
        assert_eq!(view.base().remote_nodes, BTreeMap::new());
    }

    #[test]
    fn without_a_tunnel_nothing_has_an_endpoint_and_every_node_counts() {
        let local = NodePlan { routing: Routing::Native(DirectRoutes::All), ..local() };
        let mut view = View::new(key("n0"), local, NodeIds::default());
        let mut record = node("n1", 9, 1);
        record.addresses.remove(0);
        view.put_node(record);
        put_ip(&mut view, "10.0.1.7", "172.18.0.9", 300);
        let found = view.base().remote_nodes["default/n1"].clone();
        assert_eq!((found.tunnel_endpoint, found.next_hops), (None, vec![ip("fc00::9")]));
        let peer = |identity| Peer { identity, tunnel_endpoint: None };
        let overlay: Vec<_> = view.overlays().collect();
        assert_eq!(overlay, [(net("10.0.1.2/32"), peer(4)), (net("10.0.1.7/32"), peer(300))]);
    }

    #[test]
    fn records_of_other_nodes_are_the_overlay() {
        let mut view = view();
        view.take_changes();
        put_ip(&mut view, "10.0.1.7", "172.18.0.9", 300);
        put_ip(&mut view, "10.0.0.8", "172.18.0.1", 300);
        let changes = view.take_changes();
        assert_eq!(
            changes,
            Changes { networks: [net("10.0.1.7/32"), net("10.0.0.8/32")].into(), ..Changes::default() }
        );
        let peer = Peer { identity: 300, tunnel_endpoint: Some(ip("172.18.0.9")) };
        assert_eq!(
            view.overlays().collect::<Vec<_>>(),
            [(net("10.0.1.7/32"), peer)],
            "a leftover of our own counts for nothing"
        );

        put_ip(&mut view, "10.0.1.7", "172.18.0.9", 300);
        assert!(view.take_changes().is_empty(), "the same again is no change");
        view.remove_ip(IpTarget::Host(ip("10.0.1.7")));
        assert_eq!(view.overlays().count(), 0);
    }

    #[test]
    fn a_node_that_moves_takes_everything_with_it() {
        let mut view = view();
        view.put_node(node("n1", 9, 1));
        put_ip(&mut view, "10.0.1.7", "172.18.0.9", 300);
        put_ip(&mut view, "10.0.0.8", "172.18.0.1", 300);
        view.take_changes();
        let node_ips = BTreeSet::from([ip("172.18.0.7"), ip("fc00::1")]);
        view.set_local(NodePlan { node_ips, ..local() });
        let changes = view.take_changes();
        assert_eq!(changes, Changes { base: true, networks: [net("10.0.0.8/32")].into(), ..Changes::default() });
        assert!(view.overlay(net("10.0.0.8/32")).is_some(), "the address is another node's now");

        let routing = Routing::Tunnel(Tunnel { port: 8472, ipv6: true });
        view.set_local(NodePlan { routing, ..view.local().clone() });
        assert_eq!(view.take_changes().networks, [net("10.0.1.2/32")].into());
        let health = view.overlay(net("10.0.1.2/32")).unwrap();
        assert_eq!(health.tunnel_endpoint, Some(ip("fc00::9")));
        assert_eq!(view.base().remote_nodes["default/n1"].tunnel_endpoint, Some(ip("fc00::9")));
    }

    #[test]
    fn the_mtu_is_that_of_the_device_with_the_nodes_address() {
        let mut view = view();
        let device = |ip: &str, mtu| basal_datapath::kernel::Device {
            mtu,
            addresses: vec![ip.parse().unwrap()],
            ..Default::default()
        };
        let devices = |mtu| Observed {
            devices: [("eth0", device("172.18.0.1/16", mtu)), ("eth1", device("10.9.0.1/24", 900))]
                .map(|(name, device)| (name.parse().unwrap(), device))
                .into(),
            ..Observed::default()
        };
        assert_eq!(view.saw_devices(&devices(1400)), None, "it is configured");
        view.take_mtu_of(ip("172.18.0.1"));
        assert_eq!(view.saw_devices(&devices(1500)), None);
        assert_eq!(view.saw_devices(&devices(1400)), Some(1400));
        assert_eq!(view.base().route_mtu(), 1350);
        view.take_mtu_of(ip("172.18.0.77"));
        assert_eq!((view.saw_devices(&devices(1300)), view.local().device_mtu), (None, 1400));
    }

    #[test]
    fn its_own_record_changes_nothing() {
        let mut view = view();
        view.take_changes();
        view.put_node(node("n0", 1, 0));
        assert!(view.take_changes().is_empty());
    }
}

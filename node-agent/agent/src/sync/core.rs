//! From the view to ops.

use std::collections::{BTreeMap, BTreeSet};

use basal_datapath::{
    diff::diff,
    kernel::{Device, Observed},
    names::IfName,
    op::Op,
    plan::{Endpoint, NodePlan, Peer},
    routing::NoRoute,
    rows::{self, MapId, Row},
    scope::Scope,
    state::{Hook, Link, LinkKind, NodeState, Symbol},
};
use ipnet::IpNet;

use crate::{
    endpoint::record::EndpointId,
    view::{Changes, View},
};

type Map = BTreeMap<Vec<u8>, Vec<u8>>;

/// The view, and what the kernel is believed to hold.
#[derive(Debug)]
pub struct Core {
    /// What the agent knows.
    pub view: View,
    /// What the kernel holds, as last read and as changed since.
    known: Observed,
    /// The ipcache rows of the base but for its endpoints, as last desired. The overlay's stand where these and those of
    /// the endpoints have none.
    node_rows: Map,
    /// The ipcache rows that the base has for addresses of its endpoints, which stand before all others.
    endpoint_rows: Map,
    /// The nodes that should have a route to their pods and cannot, as last planned.
    without_route: BTreeMap<String, NoRoute>,
    /// Interfaces that are being made: what there is of them is not looked at.
    making: BTreeSet<IfName>,
    /// Interfaces whose pods' ends are to be brought up to date. The kernel's answer does not show what is there.
    outdated: BTreeSet<IfName>,
}

/// What one comparison of everything gave.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct FullPass {
    /// The changes, in order.
    pub ops: Vec<Op>,
    /// Endpoints whose interface is gone; they are no longer in the view.
    pub lost: Vec<EndpointId>,
    /// The MTU of the node's device, when it is another one than before.
    pub mtu: Option<u32>,
}

impl Core {
    /// Starts from what the kernel holds.
    #[must_use]
    pub fn new(view: View, observed: Observed) -> Self {
        let (making, outdated) = (BTreeSet::new(), BTreeSet::new());
        let (node_rows, endpoint_rows) = (Map::new(), Map::new());
        Self { view, known: observed, node_rows, endpoint_rows, without_route: BTreeMap::new(), making, outdated }
    }

    /// The nodes that should have a route to their pods and cannot, by `<cluster>/<name>`.
    #[must_use]
    pub fn without_route(&self) -> &BTreeMap<String, NoRoute> {
        &self.without_route
    }

    /// The devices that programs masquerade on.
    #[must_use]
    pub fn masquerade_devices(&self) -> BTreeSet<String> {
        let hooks = self.known.state.hooks.keys().filter(|hook| hook.symbol() == Symbol::ToNetdev);
        hooks.filter_map(Hook::link).map(ToString::to_string).collect()
    }

    /// What the kernel is believed to hold.
    #[must_use]
    pub fn known(&self) -> &Observed {
        &self.known
    }

    /// A device was read.
    pub fn saw_device(&mut self, name: IfName, device: Device) {
        self.known.devices.insert(name, device);
    }

    /// Follows the MTU of the node's device, as far as the devices are known; answers it when it is another one.
    pub fn follow_mtu(&mut self) -> Option<u32> {
        self.view.saw_devices(&self.known)
    }

    /// An interface is being made, beside the ops of this core.
    pub fn making(&mut self, name: IfName) {
        self.making.insert(name);
    }

    /// Nobody is at work on the interface any more.
    pub fn made(&mut self, name: &IfName) {
        self.making.remove(name);
    }

    /// The interface that an endpoint needs.
    #[must_use]
    pub fn link_of(&self, endpoint: &Endpoint) -> Link {
        let kind = LinkKind::Endpoint(Some(endpoint.pod.clone()));
        Link { kind, mtu: self.view.local().device_mtu, up: true, arp: true }
    }

    /// Everything that differs from what was just read.
    pub fn full(&mut self, observed: Observed) -> FullPass {
        let (lost, mtu) = self.saw(observed);
        let changes = self.view.take_changes();
        let desired = self.desired();
        let mut ops = diff(&desired, &self.known.state);
        self.update_pods(&changes, &mut ops);
        FullPass { ops, lost, mtu }
    }

    /// The same for what was read without the rows of the ipcache, which are taken to be as they were.
    pub fn full_without_ipcache(&mut self, mut observed: Observed) -> FullPass {
        let rows = self.known.state.maps.remove(&MapId::Ipcache);
        observed.state.maps.extend(rows.map(|rows| (MapId::Ipcache, rows)));
        let (lost, mtu) = self.saw(observed);
        let changes = Changes { base: true, ..self.view.take_changes() };
        FullPass { ops: self.delta(&changes), lost, mtu }
    }

    /// Everything was read. Answers the endpoints whose interface is gone, and the MTU when it is another one.
    fn saw(&mut self, observed: Observed) -> (Vec<EndpointId>, Option<u32>) {
        self.known = observed;
        for name in self.making.clone() {
            self.forget(&name);
        }
        let mtu = self.follow_mtu();
        let gone = |endpoint: &Endpoint| !self.known.devices.contains_key(&endpoint.link);
        let lost: Vec<_> =
            self.view.endpoints().iter().filter(|(_, endpoint)| gone(endpoint)).map(|(id, _)| *id).collect();
        for id in &lost {
            self.view.remove_endpoint(*id);
        }
        (lost, mtu)
    }

    /// What some changes lead to.
    pub fn delta(&mut self, changes: &Changes) -> Vec<Op> {
        let mut touched: BTreeSet<Vec<u8>> = changes.networks.iter().map(|network| key_of(*network)).collect();
        let overlay: BTreeMap<Vec<u8>, Option<Vec<u8>>> = changes
            .networks
            .iter()
            .map(|network| {
                (key_of(*network), self.view.overlay(*network).map(|peer| overlay_row(*network, peer).value))
            })
            .collect();
        let planned = if changes.base { self.base_delta() } else { self.endpoints_delta(&changes.endpoints) };
        let Some((mut base_ops, rows)) = planned else {
            // Fresh maps are filled from the op that loads programs: it needs every row.
            let mut ops = diff(&self.desired(), &self.known.state);
            self.update_pods(changes, &mut ops);
            return ops;
        };
        touched.extend(rows);
        self.update_pods(changes, &mut base_ops);
        let Some(held) = self.known.state.maps.get(&MapId::Ipcache) else { return base_ops };
        let (mut puts, mut deletes) = (Vec::new(), Vec::new());
        for key in touched {
            let wanted = match self.endpoint_rows.get(&key).or_else(|| self.node_rows.get(&key)) {
                Some(value) => Some(value.clone()),
                None => match overlay.get(&key) {
                    Some(value) => value.clone(),
                    None => network_of(&key)
                        .and_then(|network| Some(overlay_row(network, self.view.overlay(network)?).value)),
                },
            };
            match (wanted, held.get(&key)) {
                (Some(value), found) if found != Some(&value) => {
                    puts.push(Op::PutRow(Row { map: MapId::Ipcache, key, value }));
                }
                (None, Some(_)) => deletes.push(Op::DeleteRow { map: MapId::Ipcache, key }),
                _ => {}
            }
        }
        // A route or program that sends packets somewhere finds its row; a row goes after what used it.
        puts.into_iter().chain(base_ops).chain(deletes).collect()
    }

    /// Adds what brings the pods' ends up to date, for pods that no other op does that for.
    fn update_pods(&mut self, changes: &Changes, ops: &mut Vec<Op>) {
        let endpoints = self.view.endpoints();
        let changed = changes.pods.iter().filter_map(|id| endpoints.get(id));
        self.outdated.extend(changed.map(|endpoint| endpoint.link.clone()));
        for endpoint in endpoints.values().filter(|endpoint| self.outdated.contains(&endpoint.link)) {
            if !ops.iter().any(|op| matches!(op, Op::SetLink(name, _) if *name == endpoint.link)) {
                ops.push(Op::SetLink(endpoint.link.clone(), self.link_of(endpoint)));
            }
        }
    }

    /// What a change of the whole base leads to, but for the ipcache, and the keys there whose rows may be others now. `None`
    /// when programs are to be loaded.
    fn base_delta(&mut self) -> Option<(Vec<Op>, BTreeSet<Vec<u8>>)> {
        let before = (std::mem::take(&mut self.node_rows), std::mem::take(&mut self.endpoint_rows));
        let mut desired = self.base();
        desired.maps.remove(&MapId::Ipcache);
        let mut touched = differing(&before.0, &self.node_rows);
        touched.extend(differing(&before.1, &self.endpoint_rows));
        // The one part that is large is compared by the keys that were touched.
        let held = self.known.state.maps.remove(&MapId::Ipcache);
        let ops = diff(&desired, &self.known.state);
        self.known.state.maps.extend(held.map(|held| (MapId::Ipcache, held)));
        let loads = ops.iter().any(|op| matches!(op, Op::LoadPrograms { .. }));
        (!loads).then_some((ops, touched))
    }

    /// The same for a change of some endpoints: nothing else is planned or compared.
    fn endpoints_delta(&mut self, scope: &Scope) -> Option<(Vec<Op>, BTreeSet<Vec<u8>>)> {
        if scope.is_empty() {
            return Some(Default::default());
        }
        let desired = self.view.base_of(scope).desired(&self.known);
        if !desired.programs.is_subset(&self.known.state.programs) {
            return None;
        }
        let [mut desired, mut held] = [scope.of(&desired), scope.of(&self.known.state)];
        let mut rows = desired.maps.remove(&MapId::Ipcache).unwrap_or_default();
        held.maps.remove(&MapId::Ipcache);
        let touched: BTreeSet<_> = scope.networks().map(key_of).collect();
        for key in &touched {
            match rows.remove_entry(key) {
                Some((key, value)) => drop(self.endpoint_rows.insert(key, value)),
                None => drop(self.endpoint_rows.remove(key)),
            }
        }
        Some((diff(&desired, &held), touched))
    }

    /// What the node should have by the base.
    fn base(&mut self) -> NodeState {
        let plan = self.view.base();
        self.without_route = plan.without_route(&self.known);
        let desired = plan.desired(&self.known);
        let rows = desired.maps.get(&MapId::Ipcache);
        let addresses = plan.endpoints.values().flat_map(|endpoint| &endpoint.pod.addresses);
        let keys = addresses.map(|address| key_of(address.ip.into()));
        self.endpoint_rows =
            keys.filter_map(|key| rows?.get_key_value(&key)).map(|(key, value)| (key.clone(), value.clone())).collect();
        let nodes = NodePlan { endpoints: BTreeMap::new(), ..plan };
        self.node_rows = nodes.rows().remove(&MapId::Ipcache).unwrap_or_default();
        desired
    }

    /// Everything that the node should have.
    fn desired(&mut self) -> NodeState {
        let mut desired = self.base();
        let rows = desired.maps.entry(MapId::Ipcache).or_default();
        for (network, peer) in self.view.overlays() {
            let row = overlay_row(network, peer);
            rows.entry(row.key).or_insert(row.value);
        }
        desired
    }

    /// An op was carried out.
    pub fn applied(&mut self, op: &Op) {
        let state = &mut self.known.state;
        match op {
            Op::SetSysctl(key, value) => drop(state.sysctls.insert(key.clone(), value.clone())),
            Op::SetLink(name, link) => {
                state.links.insert(name.clone(), link.clone());
                self.outdated.remove(name);
            }
            Op::DeleteLinks(names) => {
                let peers = names.iter().filter_map(|name| match state.links.get(name) {
                    Some(Link { kind: LinkKind::Veth { peer }, .. }) => Some(peer.clone()),
                    _ => None,
                });
                for name in &peers.chain(names.iter().cloned()).collect::<BTreeSet<_>>() {
                    self.forget(name);
                }
            }
            Op::AddAddress(address) => drop(state.addresses.insert(address.clone())),
            Op::DeleteAddress(address) => drop(state.addresses.remove(address)),
            Op::LoadPrograms { set, rows } => {
                let hash = set.hash();
                state.programs.insert(hash);
                state.broken_programs.remove(&hash);
                for (map, rows) in rows {
                    state.maps.entry(*map).or_default().extend(rows.iter().map(|(k, v)| (k.clone(), v.clone())));
                }
            }
            Op::UnloadPrograms(hash) => {
                state.programs.remove(hash);
                state.broken_programs.remove(hash);
            }
            Op::PutRow(row) => {
                state.maps.entry(row.map).or_default().insert(row.key.clone(), row.value.clone());
            }
            Op::DeleteRow { map, key } => {
                if let Some(rows) = state.maps.get_mut(map) {
                    rows.remove(key);
                }
            }
            Op::Attach(hook, hash) => drop(state.hooks.insert(hook.clone(), *hash)),
            Op::Detach(hook) => drop(state.hooks.remove(hook)),
            Op::SetRoute(key, route) => drop(state.routes.insert(key.clone(), route.clone())),
            Op::DeleteRoute(key) => drop(state.routes.remove(key)),
            Op::SetNft(name, table) => drop(state.nft.insert(name.clone(), table.clone())),
            Op::DeleteNft(name) => drop(state.nft.remove(name)),
            Op::SetForward(table, rules) => drop(state.forward.insert(*table, rules.clone())),
        }
    }
}

impl Core {
    /// A device is gone, or is not ours to look at now; what hangs on it goes with it.
    fn forget(&mut self, name: &IfName) {
        let state = &mut self.known.state;
        state.links.remove(name);
        self.known.devices.remove(name);
        self.outdated.remove(name);
        state.addresses.retain(|address| address.link != *name);
        state.routes.retain(|key, _| key.link != *name);
        state.hooks.retain(|hook, _| hook.link() != Some(name));
        state.sysctls.retain(|key, _| key.device_name() != Some(name.as_str()));
    }
}

/// Whether an op is about an endpoint: then its failure is the endpoint's.
#[must_use]
pub fn concerns(op: &Op, id: EndpointId, endpoint: &Endpoint) -> bool {
    match op {
        Op::SetLink(name, _) => *name == endpoint.link,
        Op::DeleteLinks(names) => names.contains(&endpoint.link),
        Op::SetSysctl(key, _) => key.device_name() == Some(endpoint.link.as_str()),
        Op::PutRow(row) => endpoint.pod.addresses.iter().any(|address| {
            let own = |other: Row| other.map == row.map && other.key == row.key;
            own(rows::ipcache(address.ip.into(), 0, None)) || own(rows::host(address.ip))
        }),
        Op::Attach(hook, _) | Op::Detach(hook) => match hook {
            Hook::Endpoint { id: of, .. } | Hook::Policy { id: of } => *of == id.get(),
            Hook::Device { .. } => false,
        },
        // Without programs no endpoint works.
        Op::LoadPrograms { .. } => true,
        _ => false,
    }
}

fn overlay_row(network: IpNet, peer: Peer) -> Row {
    rows::ipcache(network, peer.identity, peer.tunnel_endpoint)
}

fn key_of(network: IpNet) -> Vec<u8> {
    rows::ipcache(network, 0, None).key
}

fn network_of(key: &[u8]) -> Option<IpNet> {
    use zerocopy::FromBytes as _;
    let (ip, bits) = basal_maps::ipcache::IpcacheKey::read_from_bytes(key).ok()?.cidr()?;
    IpNet::new(ip, bits).ok()
}

/// The keys whose rows are not the same in both.
fn differing(one: &Map, other: &Map) -> BTreeSet<Vec<u8>> {
    let left = one.iter().filter(|(key, value)| other.get(*key) != Some(*value)).map(|(key, _)| key);
    let right = other.keys().filter(|key| !one.contains_key(*key));
    left.chain(right).cloned().collect()
}

#[cfg(test)]
mod tests {
    use basal_crds::{identity::IdentityId, kvstore::IpTarget};
    use basal_datapath::state::{PodAddress, PodSide};
    use proptest::prelude::*;

    use super::*;
    use crate::view::{
        ids::NodeIds,
        tests::{ip, key, local, node, put_ip},
    };

    fn core() -> Core {
        Core::new(View::new(key("n0"), local(), NodeIds::default()), Observed::default())
    }

    fn endpoint(last: u8, identity: u32) -> Endpoint {
        let link = IfName::new(format!("lxc{last:012}")).unwrap();
        let address = PodAddress { ip: ip(&format!("10.0.0.{last}")), gateway: ip("10.0.0.1") };
        let pod = PodSide {
            netns: "/run/netns/x".into(),
            name: IfName::new("eth0").unwrap(),
            mac: [2, 0, 0, 0, 0, last],
            host_mac: [2, 0, 0, 0, 1, last],
            addresses: vec![address],
            route_mtu: 1450,
        };
        Endpoint { link, pod, identity }
    }

    /// Carries ops out on what is known, and gives every device that is made an index.
    fn carry_out(core: &mut Core, ops: &[Op]) {
        for op in ops {
            core.applied(op);
            if let Op::SetLink(name, _) = op {
                let index = 10 + u32::try_from(core.known.devices.len()).unwrap();
                core.known.devices.entry(name.clone()).or_insert(Device { index, ..Device::default() });
            }
        }
    }

    fn converge(core: &mut Core) {
        for _ in 0..3 {
            let ops = core.full(core.known.clone()).ops;
            carry_out(core, &ops);
        }
        assert_eq!(core.full(core.known.clone()), FullPass::default());
    }

    fn attach(core: &mut Core, id: u16, endpoint: Endpoint) {
        let link = core.link_of(&endpoint);
        carry_out(core, &[Op::SetLink(endpoint.link.clone(), link)]);
        core.view.put_endpoint(EndpointId::new(id).unwrap(), endpoint);
    }

    #[test]
    fn an_empty_node_is_complete_after_two_rounds() {
        let mut core = core();
        converge(&mut core);
        assert!(core.known.state.hooks.len() >= 5, "{:?}", core.known.state.hooks);
    }

    #[test]
    fn an_endpoint_whose_interface_went_is_told_and_cleaned_up() {
        let mut core = core();
        attach(&mut core, 7, endpoint(7, 300));
        converge(&mut core);
        let rows = core.known.state.maps[&MapId::Endpoints].len();
        carry_out(&mut core, &[Op::DeleteLinks([endpoint(7, 300).link].into())]);
        let pass = core.full(core.known.clone());
        assert_eq!(pass.lost, [EndpointId::new(7).unwrap()]);
        carry_out(&mut core, &pass.ops);
        assert_eq!(core.known.state.maps[&MapId::Endpoints].len(), rows - 1);
    }

    #[test]
    fn a_record_costs_one_op() {
        let mut core = core();
        converge(&mut core);
        put_ip(&mut core.view, "10.0.1.7", "172.18.0.9", 300);
        let changes = core.view.take_changes();
        let ops = core.delta(&changes);
        assert_eq!(ops, [Op::PutRow(rows::ipcache("10.0.1.7/32".parse().unwrap(), 300, Some(ip("172.18.0.9"))))]);
    }

    #[test]
    fn an_endpoint_costs_what_is_its_own() {
        let mut core = core();
        core.view.put_node(node("n1", 9, 1));
        converge(&mut core);
        // What a comparison of the nodes would find.
        core.known.state.maps.get_mut(&MapId::Tunnel).unwrap().clear();
        attach(&mut core, 7, endpoint(7, 300));
        let changes = core.view.take_changes();
        let ops = core.delta(&changes);
        let kinds: Vec<_> = ops.iter().map(Op::kind).collect();
        assert_eq!(kinds, ["put-row", "set-sysctl", "put-row", "attach", "attach"]);
        carry_out(&mut core, &ops);
        assert_eq!(core.delta(&changes), [], "and again it costs nothing");
        core.view.remove_endpoint(EndpointId::new(7).unwrap());
        let changes = core.view.take_changes();
        let kinds: Vec<_> = core.delta(&changes).iter().map(Op::kind).collect();
        assert_eq!(kinds, ["delete-links", "detach", "detach", "delete-row", "delete-row"]);
        assert_eq!(core.full(core.known.clone()).ops.len(), 5 + 2, "two blocks of the node");
    }

    /// What the whole plan wants and the kernel does not have, by none of what the core keeps between changes.
    fn missing(core: &Core) -> Vec<Op> {
        let mut view = core.view.clone();
        let mut desired = view.base().desired(&core.known);
        let rows = desired.maps.get_mut(&MapId::Ipcache).unwrap();
        for (network, peer) in view.overlays() {
            let row = overlay_row(network, peer);
            rows.entry(row.key).or_insert(row.value);
        }
        diff(&desired, &core.known.state)
    }

    /// Addresses that everybody may claim: the router, a pod of this node's, another node's router, health and host
    /// address, and a pod of another node's.
    const CLAIMED: [&str; 6] = ["10.0.0.1", "10.0.0.3", "10.0.1.1", "10.0.1.2", "172.18.0.3", "10.0.2.3"];

    #[derive(Debug, Clone)]
    enum Event {
        Node(u8, u8, u8),
        NodeGone(u8),
        Ip(usize, u8, u32),
        IpGone(usize),
        Endpoint(u16, u8, [usize; 2], u32),
        Identity(u16, u32),
        EndpointGone(u16),
        Local(u32, usize),
    }

    fn event() -> impl Strategy<Value = Event> {
        let claimed = || 0..CLAIMED.len();
        prop_oneof![
            2 => (1_u8..4, 2_u8..5, 1_u8..4).prop_map(|(n, h, b)| Event::Node(n, h, b)),
            1 => (1_u8..4).prop_map(Event::NodeGone),
            2 => (claimed(), 1_u8..5, 256_u32..260).prop_map(|(a, h, i)| Event::Ip(a, h, i)),
            1 => claimed().prop_map(Event::IpGone),
            4 => (2_u16..5, 2_u8..5, [claimed(), claimed()], 256_u32..260)
                .prop_map(|(e, link, ips, i)| Event::Endpoint(e, link, ips, i)),
            1 => (2_u16..5, 256_u32..260).prop_map(|(e, i)| Event::Identity(e, i)),
            2 => (2_u16..5).prop_map(Event::EndpointGone),
            1 => (0_u32..2, claimed()).prop_map(|(mtu, a)| Event::Local(1400 + 100 * mtu, a)),
        ]
    }

    fn happen(core: &mut Core, event: Event) {
        match event {
            Event::Node(n, host, block) => core.view.put_node(node(&format!("n{n}"), host, block)),
            Event::NodeGone(n) => core.view.remove_node(&key(&format!("n{n}"))),
            Event::Ip(a, host, identity) => {
                put_ip(&mut core.view, CLAIMED[a], &format!("172.18.0.{host}"), identity);
            }
            Event::IpGone(a) => core.view.remove_ip(IpTarget::Host(ip(CLAIMED[a]))),
            Event::Endpoint(e, link, ips, identity) => {
                let mut endpoint = endpoint(link, identity);
                let gateway = ip("10.0.0.1");
                endpoint.pod.addresses = ips.map(|a| PodAddress { ip: ip(CLAIMED[a]), gateway }).into();
                attach(core, e, endpoint);
            }
            Event::Identity(e, identity) => {
                core.view.set_identity(EndpointId::new(e).unwrap(), IdentityId::new(identity));
            }
            Event::EndpointGone(e) => core.view.remove_endpoint(EndpointId::new(e).unwrap()),
            Event::Local(device_mtu, a) => {
                let node_ips = BTreeSet::from([ip("172.18.0.1"), ip(CLAIMED[a])]);
                core.view.set_local(NodePlan { device_mtu, node_ips, ..core.view.local().clone() });
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]
        /// Applying deltas leaves nothing for the comparison of everything to find, whoever claims an address or a device
        /// that another has, and whatever happened since the last one.
        #[test]
        fn deltas_lead_where_a_full_comparison_leads(
            rounds in proptest::collection::vec(proptest::collection::vec(event(), 1..4), 0..15),
        ) {
            let mut core = core();
            converge(&mut core);
            for events in rounds {
                for event in events {
                    happen(&mut core, event);
                }
                let changes = core.view.take_changes();
                let ops = core.delta(&changes);
                carry_out(&mut core, &ops);
                prop_assert_eq!(missing(&core), []);
            }
            prop_assert_eq!(core.full(core.known.clone()), FullPass::default());
        }
    }
}

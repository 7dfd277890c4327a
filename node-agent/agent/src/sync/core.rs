//! From the view to ops.

use std::collections::{BTreeMap, BTreeSet};

use basal_datapath::{
    diff::diff,
    kernel::{Device, Observed},
    names::IfName,
    op::Op,
    plan::{Endpoint, Peer},
    routing::NoRoute,
    rows::{self, MapId, Row},
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
    /// The ipcache rows of the base, as last desired: the overlay's stand where these have none.
    base_rows: Map,
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
        Self { view, known: observed, base_rows: Map::new(), without_route: BTreeMap::new(), making, outdated }
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
        let mut base_ops = Vec::new();
        if changes.base {
            let mut desired = self.base();
            let rows = desired.maps.remove(&MapId::Ipcache).unwrap_or_default();
            touched.extend(differing(&self.base_rows, &rows));
            self.base_rows = rows;
            // The one part that is large is compared by the keys that were touched.
            let held = self.known.state.maps.remove(&MapId::Ipcache);
            base_ops = diff(&desired, &self.known.state);
            if let Some(held) = held {
                self.known.state.maps.insert(MapId::Ipcache, held);
            }
            if base_ops.iter().any(|op| matches!(op, Op::LoadPrograms { .. })) {
                // Fresh maps are filled from the op: it needs every row.
                base_ops = diff(&self.desired(), &self.known.state);
                self.update_pods(changes, &mut base_ops);
                return base_ops;
            }
        }
        self.update_pods(changes, &mut base_ops);
        let Some(held) = self.known.state.maps.get(&MapId::Ipcache) else { return base_ops };
        let (mut puts, mut deletes) = (Vec::new(), Vec::new());
        for key in touched {
            let wanted = match self.base_rows.get(&key) {
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

    /// What the node should have by the base.
    fn base(&mut self) -> NodeState {
        let plan = self.view.base();
        self.without_route = plan.without_route(&self.known);
        plan.desired(&self.known)
    }

    /// Everything that the node should have.
    fn desired(&mut self) -> NodeState {
        let mut desired = self.base();
        let rows = desired.maps.entry(MapId::Ipcache).or_default();
        self.base_rows = rows.clone();
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
            Op::DeleteLink(name) => {
                let peer = match state.links.remove(name) {
                    Some(Link { kind: LinkKind::Veth { peer }, .. }) => Some(peer),
                    _ => None,
                };
                for name in peer.iter().chain([name]) {
                    self.forget(name);
                }
            }
            Op::AddAddress(address) => drop(state.addresses.insert(address.clone())),
            Op::DeleteAddress(address) => drop(state.addresses.remove(address)),
            Op::LoadPrograms { config, rows } => {
                state.programs.insert(basal_datapath::program::ProgramHash::of(config));
                for (map, rows) in rows {
                    state.maps.entry(*map).or_default().extend(rows.iter().map(|(k, v)| (k.clone(), v.clone())));
                }
            }
            Op::UnloadPrograms(hash) => drop(state.programs.remove(hash)),
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
        Op::SetLink(name, _) | Op::DeleteLink(name) => *name == endpoint.link,
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
    use basal_crds::{
        identity::IdentityId,
        kvstore::{IpRecord, IpTarget},
    };
    use basal_datapath::state::{PodAddress, PodSide};
    use proptest::prelude::*;

    use super::*;
    use crate::view::{
        ids::NodeIds,
        tests::{ip, key, local, node},
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
        carry_out(&mut core, &[Op::DeleteLink(endpoint(7, 300).link)]);
        let pass = core.full(core.known.clone());
        assert_eq!(pass.lost, [EndpointId::new(7).unwrap()]);
        carry_out(&mut core, &pass.ops);
        assert_eq!(core.known.state.maps[&MapId::Endpoints].len(), rows - 1);
    }

    #[test]
    fn a_record_costs_one_op() {
        let mut core = core();
        converge(&mut core);
        core.view.put_ip(IpRecord::new(IpTarget::Host(ip("10.0.1.7")), ip("172.18.0.9"), IdentityId::new(300)));
        let changes = core.view.take_changes();
        let ops = core.delta(&changes);
        assert_eq!(ops, [Op::PutRow(rows::ipcache("10.0.1.7/32".parse().unwrap(), 300, Some(ip("172.18.0.9"))))]);
    }

    #[derive(Debug, Clone)]
    enum Event {
        Node(u8, u8, u8),
        NodeGone(u8),
        Ip(u8, u8, u32),
        IpGone(u8),
        Endpoint(u16, u32),
        EndpointGone(u16),
    }

    fn event() -> impl Strategy<Value = Event> {
        prop_oneof![
            (1_u8..4, 2_u8..5, 1_u8..4).prop_map(|(n, h, b)| Event::Node(n, h, b)),
            (1_u8..4).prop_map(Event::NodeGone),
            (1_u8..4, 1_u8..5, 256_u32..260).prop_map(|(a, h, i)| Event::Ip(a, h, i)),
            (1_u8..4).prop_map(Event::IpGone),
            (2_u16..5, 256_u32..260).prop_map(|(e, i)| Event::Endpoint(e, i)),
            (2_u16..5).prop_map(Event::EndpointGone),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        /// Applying deltas leaves nothing for the comparison of everything to find.
        #[test]
        fn deltas_lead_where_a_full_comparison_leads(events in proptest::collection::vec(event(), 0..25)) {
            let mut core = core();
            converge(&mut core);
            for event in events {
                match event {
                    Event::Node(n, host, block) => core.view.put_node(node(&format!("n{n}"), host, block)),
                    Event::NodeGone(n) => core.view.remove_node(&key(&format!("n{n}"))),
                    // Addresses of our own block, of other blocks, and one that is a node's router address.
                    Event::Ip(a, host, identity) => core.view.put_ip(IpRecord::new(
                        IpTarget::Host(ip(&format!("10.0.{}.{a}", a - 1))),
                        ip(&format!("172.18.0.{host}")),
                        IdentityId::new(identity),
                    )),
                    Event::IpGone(a) => core.view.remove_ip(IpTarget::Host(ip(&format!("10.0.{}.{a}", a - 1)))),
                    Event::Endpoint(e, identity) => {
                        let last = u8::try_from(e).unwrap();
                        attach(&mut core, e, endpoint(last, identity));
                    }
                    Event::EndpointGone(e) => core.view.remove_endpoint(EndpointId::new(e).unwrap()),
                }
                let changes = core.view.take_changes();
                let ops = core.delta(&changes);
                carry_out(&mut core, &ops);
                let pass = core.full(core.known.clone());
                prop_assert_eq!(pass, FullPass::default());
            }
        }
    }
}

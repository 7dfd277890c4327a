//! What a change of some endpoints can reach: it is planned and compared alone, at a cost that does not grow with the
//! cluster.
//!
//! The plan for it is a [`crate::plan::NodePlan`] too, of this node with the endpoints that the scope touches and without
//! the other nodes. Within the scope that wants what the whole plan wants, but for one thing: a row of the ipcache that
//! another node has for an endpoint's address, and that the endpoint's own covers.

use std::{collections::BTreeSet, net::IpAddr};

use ipnet::IpNet;

use crate::{
    names::IfName,
    plan::Endpoint,
    rows::{self, MapId, Rows},
    state::{Hook, NodeState},
};

/// Some endpoints, by all that tells what of a [`NodeState`] is theirs. One that changed is added as it was and as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Scope {
    ids: BTreeSet<u16>,
    links: BTreeSet<IfName>,
    ips: BTreeSet<IpAddr>,
}

impl Scope {
    /// Adds an endpoint.
    pub fn add(&mut self, id: u16, endpoint: &Endpoint) {
        self.ids.insert(id);
        self.links.insert(endpoint.link.clone());
        self.ips.extend(endpoint.pod.addresses.iter().map(|address| address.ip));
    }

    /// Adds the endpoints of another.
    pub fn merge(&mut self, other: Self) {
        self.ids.extend(other.ids);
        self.links.extend(other.links);
        self.ips.extend(other.ips);
    }

    /// Whether it has no endpoint.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    /// Whether an endpoint has something in it, its own or what it shares with one that was added: then what should be
    /// there follows from this one as well.
    #[must_use]
    pub fn touches(&self, id: u16, endpoint: &Endpoint) -> bool {
        let mut ips = endpoint.pod.addresses.iter().map(|address| address.ip);
        self.ids.contains(&id) || self.links.contains(&endpoint.link) || ips.any(|ip| self.ips.contains(&ip))
    }

    /// The addresses, as networks.
    pub fn networks(&self) -> impl Iterator<Item = IpNet> {
        self.ips.iter().copied().map(IpNet::from)
    }

    /// What of a state is in it: devices, their parameters, hooks and rows. Endpoints have nothing else; what others put
    /// on their devices is found when everything is compared.
    #[must_use]
    pub fn of(&self, state: &NodeState) -> NodeState {
        let of_link = |name: &str| self.links.iter().any(|link| link.as_str() == name);
        let sysctls = state.sysctls.iter().filter(|(key, _)| key.device_name().is_some_and(of_link));
        let links = self.links.iter().filter_map(|name| state.links.get_key_value(name));
        let hooks = state.hooks.iter().filter(|(hook, _)| self.has(hook));
        NodeState {
            sysctls: sysctls.map(|(key, value)| (key.clone(), value.clone())).collect(),
            links: links.map(|(name, link)| (name.clone(), link.clone())).collect(),
            hooks: hooks.map(|(hook, hash)| (hook.clone(), *hash)).collect(),
            maps: self.rows(&state.maps),
            ..NodeState::default()
        }
    }

    fn has(&self, hook: &Hook) -> bool {
        match hook {
            Hook::Endpoint { id, link } => self.ids.contains(id) || self.links.contains(link),
            Hook::Policy { id } => self.ids.contains(id),
            Hook::Device { link, .. } => self.links.contains(link),
        }
    }

    /// Its rows, of the maps that have rows of endpoints.
    fn rows(&self, all: &Rows) -> Rows {
        let keys = [
            (MapId::Endpoints, self.ips.iter().map(|ip| rows::host(*ip).key).collect::<Vec<_>>()),
            (MapId::Ipcache, self.networks().map(|network| rows::ipcache(network, 0, None).key).collect()),
        ];
        let of_map = |(map, keys): (MapId, Vec<Vec<u8>>)| {
            let all = all.get(&map)?;
            let found = keys.into_iter().filter_map(|key| all.get_key_value(&key));
            Some((map, found.map(|(key, value)| (key.clone(), value.clone())).collect()))
        };
        keys.into_iter().filter_map(of_map).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::{
        plan::{
            NodePlan, RemoteNode,
            tests::{ip, net, observed, plan},
        },
        routing::{DirectRoutes, Routing},
        state::PodAddress,
    };

    /// Addresses of endpoints and of others: a router, a health and a node address of this node, and some of the other's.
    const IPS: [&str; 7] = ["10.0.1.7", "10.0.1.8", "10.0.1.1", "10.0.1.2", "192.168.0.1", "192.168.0.2", "10.0.2.1"];

    fn endpoint(link: usize, ips: &[usize], identity: u32) -> Endpoint {
        let mut endpoint = plan().endpoints.remove(&7).unwrap();
        endpoint.link = IfName::new(format!("lxc{link:012}")).unwrap();
        let addresses = ips.iter().map(|n| PodAddress { ip: ip(IPS[*n]), gateway: ip("10.0.1.1") });
        endpoint.pod.addresses = addresses.collect();
        endpoint.identity = identity;
        endpoint
    }

    fn any_endpoint() -> impl Strategy<Value = Endpoint> {
        (0_usize..3, proptest::collection::vec(0..IPS.len(), 1..3), 256_u32..259)
            .prop_map(|(link, ips, identity)| endpoint(link, &ips, identity))
    }

    proptest! {
        /// Whatever endpoints share with each other, with this node and with others.
        #[test]
        fn a_part_of_the_plan_wants_what_the_whole_wants(
            endpoints in proptest::collection::btree_map(1_u16..5, any_endpoint(), 0..4),
            changed in proptest::collection::vec((1_u16..5, any_endpoint()), 0..3),
            block in prop_oneof![Just("10.0.2.0/24"), Just("10.0.1.7/32")],
            native in any::<bool>(),
        ) {
            let mut whole = NodePlan { endpoints, ..plan() };
            let other = whole.remote_nodes.get_mut("worker-2").unwrap();
            other.pod_cidrs.insert(net(block));
            if native {
                whole.routing = Routing::Native(DirectRoutes::All);
            }
            let mut scope = Scope::default();
            for (id, endpoint) in &changed {
                scope.add(*id, endpoint);
            }
            let touched = whole.endpoints.iter().filter(|(id, endpoint)| scope.touches(**id, endpoint));
            let endpoints = touched.map(|(id, endpoint)| (*id, endpoint.clone())).collect();
            let part = NodePlan { endpoints, remote_nodes: BTreeMap::<_, RemoteNode>::new(), ..whole.clone() };

            let found = observed(whole.desired(&crate::kernel::Observed::default()));
            let (wanted, mut in_part) = (scope.of(&whole.desired(&found)), scope.of(&part.desired(&found)));
            let beside = NodePlan { endpoints: BTreeMap::new(), ..whole }.rows();
            for (key, value) in &scope.rows(&beside)[&MapId::Ipcache] {
                let rows = in_part.maps.get_mut(&MapId::Ipcache).unwrap();
                rows.entry(key.clone()).or_insert_with(|| value.clone());
            }
            prop_assert_eq!(in_part, wanted);
        }
    }

    #[test]
    fn an_endpoint_is_whole_in_its_scope_and_nothing_else_is() {
        let all = plan();
        let found = observed(all.desired(&crate::kernel::Observed::default()));
        let state = all.desired(&found);
        let mut scope = Scope::default();
        scope.add(7, &all.endpoints[&7]);
        let part = scope.of(&state);
        assert_eq!((part.links.len(), part.sysctls.len(), part.hooks.len()), (1, 1, 2));
        assert_eq!(
            part.maps.iter().map(|(map, rows)| (*map, rows.len())).collect::<Vec<_>>(),
            [(MapId::Endpoints, 1), (MapId::Ipcache, 1)]
        );
        assert_eq!((part.routes.len(), part.nft.len(), part.programs.len()), (0, 0, 0));
        assert_eq!(Scope::default().of(&state).links.len(), 0);
    }
}

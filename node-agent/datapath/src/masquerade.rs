//! Masquerading by programs on the devices that lead out of the node, instead of by nftables (Cilium's
//! `enable-bpf-masquerade`).

use std::{collections::BTreeSet, fmt, net::IpAddr, str::FromStr};

use basal_maps::config::{Config, FLAG_BPF_MASQUERADE, FLAG_REMOTE_NODE_MASQUERADE};
use ipnet::IpNet;

use crate::{
    kernel::{Device, Observed},
    names::{IfName, IfNameError},
    plan::NodePlan,
    program::ProgramHash,
    rows,
    state::{Hook, NodeState, Symbol},
};

/// Masquerading by programs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BpfMasquerade {
    /// The devices that lead out of the node; without any, those that have an address of the node or a default route.
    pub devices: Vec<DevicePattern>,
    /// In native routing, masquerade what pods send to other nodes, too (`enable-remote-node-masquerade`).
    pub remote_nodes: bool,
    /// How large the maps are.
    pub sizes: FlowSizes,
}

/// How many rows the maps of flows have, each family on its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FlowSizes {
    /// TCP connections (`bpf-ct-global-tcp-max`).
    pub tcp: u32,
    /// Other connections (`bpf-ct-global-any-max`).
    pub any: u32,
    /// Translations, two for each connection (`bpf-nat-global-max`).
    pub nat: u32,
}

impl Default for FlowSizes {
    /// What Cilium gives a node with little memory: 85 MB with both families.
    fn default() -> Self {
        Self { tcp: 131_072, any: 65_536, nat: 131_072 }
    }
}

/// A name of a device, or what names start with (`eth+`), as in Cilium's `devices`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DevicePattern {
    start: IfName,
    whole: bool,
}

impl DevicePattern {
    /// True for the device's name.
    #[must_use]
    pub fn fits(&self, name: &IfName) -> bool {
        if self.whole { *name == self.start } else { name.as_str().starts_with(self.start.as_str()) }
    }
}

impl FromStr for DevicePattern {
    type Err = IfNameError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let start = text.strip_suffix('+');
        Ok(Self { start: IfName::new(start.unwrap_or(text))?, whole: start.is_none() })
    }
}

impl fmt::Display for DevicePattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.start, if self.whole { "" } else { "+" })
    }
}

/// A device that has programs that masquerade.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Masquerading<'a> {
    /// Its name.
    pub(crate) link: &'a IfName,
    /// Its interface index.
    index: u32,
    /// The addresses that it masquerades with, one of a family at most.
    by: Vec<IpAddr>,
}

/// Where the programs go.
pub(crate) fn masquerade_hooks(devices: &[Masquerading<'_>]) -> impl Iterator<Item = Hook> {
    devices.iter().flat_map(|device| hooks_of(device.link))
}

fn hooks_of(link: &IfName) -> [Hook; 2] {
    [Symbol::FromNetdev, Symbol::ToNetdev].map(|symbol| Hook::Device { link: link.clone(), symbol })
}

/// The devices that have their programs: what leaves there needs no rule of nftables. Everywhere else, and for as long as
/// the kernel does not take the programs, the rule masquerades.
pub(crate) fn masqueraded_by_programs(devices: &[Masquerading<'_>], found: &NodeState) -> BTreeSet<IfName> {
    let is_ours = |hook: &Hook| found.hooks.get(hook).is_some_and(|hash| *hash != ProgramHash::FOREIGN);
    let links = devices.iter().map(|device| device.link);
    links.filter(|link| hooks_of(link).iter().all(is_ours)).cloned().collect()
}

impl NodePlan {
    /// The devices that programs masquerade on.
    pub(crate) fn masquerading<'a>(&self, observed: &'a Observed) -> Vec<Masquerading<'a>> {
        let Some(masquerade) = &self.bpf_masquerade else { return Vec::new() };
        let candidates = observed.devices.iter().filter(|(name, device)| {
            // Programs look for an Ethernet header.
            !name.is_managed()
                && device.mac.is_some_and(|mac| mac != [0; 6])
                && self.leads_out(masquerade, name, observed)
        });
        let families = [(false, self.masquerade_ipv4), (true, self.masquerade_ipv6)];
        let on = families.into_iter().filter(|(_, on)| *on).map(|(v6, _)| v6);
        let with_addresses = candidates.map(|(link, device)| {
            let by = on.clone().filter_map(|v6| self.masquerade_address(device, v6, observed)).collect();
            Masquerading { link, index: device.index, by }
        });
        with_addresses.filter(|device| !device.by.is_empty()).collect()
    }

    fn leads_out(&self, masquerade: &BpfMasquerade, name: &IfName, observed: &Observed) -> bool {
        if !masquerade.devices.is_empty() {
            return masquerade.devices.iter().any(|pattern| pattern.fits(name));
        }
        let is_the_nodes = |ip: &IpAddr| observed.device_with(*ip).is_some_and(|(holder, _)| holder == name);
        observed.default_devices.contains(name) || self.node_ips.iter().any(is_the_nodes)
    }

    /// The node's own address on the device, else another one of the device's, else one of the node's on another device.
    fn masquerade_address(&self, device: &Device, v6: bool, observed: &Observed) -> Option<IpAddr> {
        let global = |ip: &IpAddr| match ip {
            IpAddr::V4(ip) => !ip.is_link_local() && !ip.is_loopback(),
            IpAddr::V6(ip) => !ip.is_unicast_link_local() && !ip.is_loopback(),
        };
        let of_family = |ip: &IpAddr| ip.is_ipv6() == v6 && global(ip);
        let on_device: Vec<IpAddr> = device.addresses.iter().map(IpNet::addr).filter(of_family).collect();
        let nodes = || self.node_ips.iter().copied().filter(of_family);
        nodes()
            .find(|ip| on_device.contains(ip))
            .or_else(|| on_device.first().copied())
            .or_else(|| nodes().find(|ip| observed.device_with(*ip).is_some()))
    }

    /// What the load-time constants say of it.
    pub(crate) fn masquerade_config(&self, config: Config) -> Config {
        let Some(BpfMasquerade { remote_nodes, sizes, .. }) = &self.bpf_masquerade else { return config };
        let remote_nodes = if *remote_nodes { FLAG_REMOTE_NODE_MASQUERADE } else { 0 };
        Config {
            flags: config.flags | FLAG_BPF_MASQUERADE | remote_nodes,
            ct_tcp_max: sizes.tcp,
            ct_any_max: sizes.any,
            nat_max: sizes.nat,
            ..config
        }
    }

    /// Rows that the programs read.
    pub(crate) fn masquerade_rows(&self, devices: &[Masquerading<'_>], state: &mut NodeState) {
        if self.bpf_masquerade.is_none() {
            return;
        }
        for device in devices {
            for by in &device.by {
                rows::masquerade(device.index, *by).insert_into(&mut state.maps);
            }
        }
        for v6 in [false, true] {
            for network in self.keeps_source(v6).unwrap_or_default() {
                rows::exempt(network).insert_into(&mut state.maps);
            }
        }
    }

    /// Where pods' packets of a family keep their source on devices that are not ours: the native networks. In native
    /// routing the blocks of other nodes stand for a family without one; in a tunnel nothing does, and there is nothing to
    /// ask for. No network is within another.
    pub(crate) fn keeps_source(&self, v6: bool) -> Option<BTreeSet<IpNet>> {
        let of_family = |network: &&IpNet| network.addr().is_ipv6() == v6;
        let mut networks: Vec<IpNet> = self.native_networks.iter().filter(of_family).map(IpNet::trunc).collect();
        if networks.is_empty() {
            if self.routing.tunnel().is_some() {
                return None;
            }
            let blocks = self.remote_nodes.values().flat_map(|node| &node.pod_cidrs);
            networks.extend(blocks.filter(of_family).map(IpNet::trunc));
        }
        Some(IpNet::aggregate(&networks).into_iter().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        plan::tests::{ip, net, observed, plan},
        routing::{DirectRoutes, Routing},
        rows::MapId,
    };

    fn device(index: u32, addresses: &[&str]) -> Device {
        let addresses = addresses.iter().map(|address| net(address)).collect();
        Device { index, mac: Some([2, 0, 0, 0, 0, 1]), addresses, ..Device::default() }
    }

    fn name(text: &str) -> IfName {
        IfName::new(text).unwrap()
    }

    /// A node at 192.168.0.1 with two more devices, and one without Ethernet headers.
    fn devices() -> Observed {
        let mut found = Observed::default();
        found.devices.extend([
            (name("eth0"), device(2, &["192.168.0.9/24", "192.168.0.1/24", "fe80::1/64", "2001:db8::1/64"])),
            (name("eth1"), device(3, &["10.9.0.1/24"])),
            (name("docker0"), device(4, &["172.17.0.1/16"])),
            (name("lo"), Device { mac: Some([0; 6]), ..device(1, &["127.0.0.1/8"]) }),
            (name("wg0"), Device { mac: None, ..device(5, &["10.8.0.1/24"]) }),
        ]);
        found.default_devices.extend([name("eth1"), name("wg0")]);
        found
    }

    fn masquerading(devices: &[&str]) -> NodePlan {
        let devices = devices.iter().map(|pattern| pattern.parse().unwrap()).collect();
        NodePlan { bpf_masquerade: Some(BpfMasquerade { devices, ..BpfMasquerade::default() }), ..plan() }
    }

    fn found(plan: &NodePlan) -> Vec<(String, Vec<IpAddr>)> {
        let observed = devices();
        plan.masquerading(&observed).into_iter().map(|device| (device.link.to_string(), device.by)).collect()
    }

    #[test]
    fn devices_that_lead_out_are_found_or_named() {
        let node = ("eth0".to_owned(), vec![ip("192.168.0.1"), ip("2001:db8::1")]);
        let other = |name: &str, v4| (name.to_owned(), vec![ip(v4)]);
        assert_eq!(found(&masquerading(&[])), [node.clone(), other("eth1", "10.9.0.1")]);
        assert_eq!(found(&masquerading(&["eth+"])), [node.clone(), other("eth1", "10.9.0.1")]);
        assert_eq!(found(&masquerading(&["docker0", "eth"])), [other("docker0", "172.17.0.1")]);
        assert_eq!(found(&masquerading(&["wg0"])), [], "no Ethernet header");
        assert_eq!(found(&plan()), [], "nftables masquerades");
        let ipv6 = NodePlan { masquerade_ipv4: false, ..masquerading(&[]) };
        assert_eq!(found(&ipv6), [("eth0".to_owned(), vec![ip("2001:db8::1")])]);
    }

    #[test]
    fn a_device_without_an_address_borrows_the_nodes() {
        let mut observed = devices();
        observed.devices.insert(name("eth1"), device(3, &["fe80::3/64"]));
        let found = masquerading(&["eth1"]);
        assert_eq!(found.masquerading(&observed)[0].by, [ip("192.168.0.1")]);
        observed.devices.remove(&name("eth0"));
        assert!(found.masquerading(&observed).is_empty());
    }

    #[test]
    fn patterns_are_read() {
        for bad in ["", "+", "a b", "sixteen-bytes-xx"] {
            assert!(bad.parse::<DevicePattern>().is_err(), "{bad:?}");
        }
        let text = |text: &str| text.parse::<DevicePattern>().unwrap().to_string();
        assert_eq!((text("eth+"), text("eth0")), ("eth+".to_owned(), "eth0".to_owned()));
    }

    fn desired(plan: &NodePlan) -> NodeState {
        let first = plan.desired(&Observed::default());
        let mut observed = observed(first);
        observed.devices.extend(devices().devices);
        observed.default_devices = devices().default_devices;
        plan.desired(&observed)
    }

    #[test]
    fn programs_take_the_place_of_the_rule() {
        let (by_nft, by_programs) = (desired(&plan()), desired(&masquerading(&[])));
        let without =
            |state: &NodeState| state.nft["basal"].chains["postrouting"].rules[0].to_string().contains("eth0");
        assert!(!without(&by_nft) && !without(&by_programs), "the rule stays until the programs are there");
        let mut attached = observed(by_programs.clone());
        attached.devices.extend(devices().devices);
        attached.default_devices = devices().default_devices;
        assert!(without(&masquerading(&[]).desired(&attached)));
        attached.state.hooks.values_mut().for_each(|hash| *hash = ProgramHash::FOREIGN);
        assert!(!without(&masquerading(&[]).desired(&attached)), "somebody else's programs");
        assert_eq!(by_nft.hooks.len() + 4, by_programs.hooks.len());
        assert_eq!(by_programs.maps[&MapId::Masquerade].len(), 3);
        assert!(by_programs.maps[&MapId::Exempt4].is_empty(), "a tunnel's packets do not leave by these devices");
        assert!(!by_nft.maps.contains_key(&MapId::Masquerade));
        let config = by_programs.load_from.unwrap().config;
        assert!(config.bpf_masquerade() && !config.remote_node_masquerade());
        assert_eq!((config.ct_tcp_max, config.nat_max), (131_072, 131_072));
        assert_ne!(by_nft.programs, by_programs.programs);
    }

    #[test]
    fn a_native_network_stands_for_blocks_and_holds_in_a_tunnel_too() {
        let native = NodePlan { routing: Routing::Native(DirectRoutes::None), ..plan() };
        assert_eq!(plan().keeps_source(false), None);
        assert_eq!(native.keeps_source(false), Some([net("10.0.2.0/24")].into()));
        let networks: BTreeSet<IpNet> = [net("10.1.2.3/8"), net("10.0.2.0/24")].into();
        for plan in [plan(), native] {
            let plan = NodePlan { native_networks: networks.clone(), ..plan };
            assert_eq!(plan.keeps_source(false), Some([net("10.0.0.0/8")].into()), "no element within another");
        }
    }

    #[test]
    fn native_networks_and_blocks_of_other_nodes_are_exempt() {
        let native = Routing::Native(DirectRoutes::None);
        let blocks = desired(&NodePlan { routing: native, ..masquerading(&[]) }).maps;
        assert_eq!(blocks[&MapId::Exempt4].len() + blocks[&MapId::Exempt6].len(), 2);
        let networks = [net("10.0.0.0/8")].into();
        let of_both = desired(&NodePlan { native_networks: networks, ..masquerading(&[]) }).maps;
        assert_eq!(of_both[&MapId::Exempt4].keys().next().unwrap()[..], [8, 0, 0, 0, 10, 0, 0, 0]);
    }
}

//! What of an endpoint is not as ADD left it, in words: for CNI's CHECK.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use basal_maps::{endpoint::EndpointKey, ipcache::IpcacheKey};
use ipnet::IpNet;
use zerocopy::FromBytes as _;

use crate::{
    kernel::{Device, PodDevice},
    names::IfName,
    op::Op,
    rows::MapId,
    state::{Hook, Link, NodeState, PodSide, Route},
};

/// Both ends of an endpoint's pair as they should be.
#[derive(Debug, Clone, Copy)]
pub struct Pair<'a> {
    /// The host's end.
    pub host: &'a IfName,
    /// The pod's end.
    pub pod: &'a PodSide,
    /// MTU of both in bytes.
    pub mtu: u32,
}

/// The routes of a pod's address: to its gateway on the link, and by it to everything else.
pub fn pod_routes(pod: &PodSide) -> impl Iterator<Item = (IpNet, Route)> {
    pod.addresses.iter().flat_map(|address| {
        let everything = match address.ip {
            IpAddr::V4(_) => IpNet::new_assert(Ipv4Addr::UNSPECIFIED.into(), 0),
            IpAddr::V6(_) => IpNet::new_assert(Ipv6Addr::UNSPECIFIED.into(), 0),
        };
        let default = Route { gateway: Some(address.gateway), source: None, mtu: Some(pod.route_mtu) };
        [(address.gateway.into(), Route::default()), (everything, default)]
    })
}

impl Pair<'_> {
    /// Compares with the two ends as they were found. What others added in the pod is not looked at.
    #[must_use]
    pub fn differences(&self, host: Option<&Device>, found: Option<&PodDevice>) -> Vec<String> {
        let name = &self.pod.name;
        let Some(host) = host else { return vec![format!("the interface {} is gone", self.host)] };
        let Some(PodDevice { device, routes }) = found else {
            return vec![format!("there is no interface {name} in the pod")];
        };
        if host.peer != Some(device.index) || device.peer != Some(host.index) {
            return vec![format!("{name} in the pod is not the other end of {}", self.host)];
        }
        let mut differences = Vec::new();
        if device.mac != Some(self.pod.mac) {
            differences.push(format!("{name} in the pod has another hardware address than it was given"));
        }
        if device.mtu != self.mtu {
            differences.push(format!("{name} in the pod has MTU {}, not {}", device.mtu, self.mtu));
        }
        if !device.up {
            differences.push(format!("{name} in the pod is down"));
        }
        for address in &self.pod.addresses {
            let wanted = IpNet::from(address.ip);
            if !device.addresses.contains(&wanted) {
                differences.push(format!("{name} in the pod lacks the address {wanted}"));
            }
        }
        for (destination, wanted) in pod_routes(self.pod) {
            match routes.get(&destination) {
                None => differences.push(format!("the pod lacks the route {}", text(destination, &wanted, name))),
                // Which address the kernel prefers as source follows from the addresses.
                Some(found) if (found.gateway, found.mtu) != (wanted.gateway, wanted.mtu) => {
                    let [found, wanted] = [found, &wanted].map(|route| text(destination, route, name));
                    differences.push(format!("the pod has the route {found}, not {wanted}"));
                }
                Some(_) => {}
            }
        }
        differences
    }
}

/// A route as `ip route` writes it.
fn text(destination: IpNet, route: &Route, link: &IfName) -> String {
    let mut text = if destination.prefix_len() == 0 { "default".to_owned() } else { destination.to_string() };
    if let Some(gateway) = route.gateway {
        text = format!("{text} via {gateway}");
    }
    text = format!("{text} dev {link}");
    match route.mtu {
        Some(mtu) => format!("{text} mtu {mtu}"),
        None => text,
    }
}

/// What is wrong on the host when a change is due.
#[must_use]
pub fn host_difference(op: &Op, observed: &NodeState) -> String {
    match op {
        Op::SetLink(name, wanted) => match observed.links.get(name) {
            Some(found) => link_difference(name, wanted, found),
            None => format!("the interface {name} is gone"),
        },
        Op::Attach(Hook::Policy { id }, _) => match observed.hooks.get(&Hook::Policy { id: *id }) {
            Some(_) => format!("slot {id} of cilium_call_policy holds a program that is not the agent's"),
            None => format!("slot {id} of cilium_call_policy is empty"),
        },
        Op::Attach(hook, _) if observed.hooks.contains_key(hook) => format!("{hook} is not the agent's"),
        Op::Attach(hook, _) => format!("{hook} is not attached"),
        Op::PutRow(row) => {
            let what = place(row.map, &row.key);
            let found = observed.maps.get(&row.map).is_some_and(|rows| rows.contains_key(&row.key));
            if found { format!("{what} differs") } else { format!("{what} is missing") }
        }
        Op::SetSysctl(key, wanted) => match observed.sysctls.get(key) {
            Some(found) => format!("{} is {found}, not {wanted}", key.path()),
            None => format!("{} is not {wanted}", key.path()),
        },
        Op::LoadPrograms { .. } => "the programs are not loaded".to_owned(),
        other => format!("{other} is due"),
    }
}

fn link_difference(name: &IfName, wanted: &Link, found: &Link) -> String {
    if !wanted.kind.fits(&found.kind) {
        format!("{name} is of another kind than it was made")
    } else if wanted.up != found.up {
        format!("{name} is {}", if found.up { "up" } else { "down" })
    } else if wanted.mtu != found.mtu {
        format!("{name} has MTU {}, not {}", found.mtu, wanted.mtu)
    } else {
        format!("{name} has ARP {}", if found.arp { "on" } else { "off" })
    }
}

/// A row, by its map and the address that it is about.
fn place(map: MapId, key: &[u8]) -> String {
    let address = match map {
        MapId::Endpoints => {
            EndpointKey::read_from_bytes(key).ok().and_then(|key| key.ip.to_ip(key.family)).map(|ip| ip.to_string())
        }
        MapId::Ipcache => {
            IpcacheKey::read_from_bytes(key).ok().and_then(|key| key.cidr()).map(|(ip, bits)| format!("{ip}/{bits}"))
        }
        MapId::Tunnel | MapId::Nodes | MapId::Masquerade | MapId::Exempt4 | MapId::Exempt6 => None,
    };
    let map = map.spec().name;
    match address {
        Some(address) => format!("the row of {address} in {map}"),
        None => format!("a row in {map}"),
    }
}

#[cfg(test)]
mod tests {
    use basal_maps::config::Config;

    use super::*;
    use crate::{
        program::{Object, ProgramHash, ProgramSet},
        rows,
        state::{LinkKind, PodAddress, SysctlKey},
    };

    fn pod() -> PodSide {
        let address =
            |ip: &str, gateway: &str| PodAddress { ip: ip.parse().unwrap(), gateway: gateway.parse().unwrap() };
        PodSide {
            netns: "/run/netns/x".into(),
            name: IfName::new("eth0").unwrap(),
            mac: [2, 0, 0, 0, 0, 1],
            host_mac: [2, 0, 0, 0, 0, 2],
            addresses: vec![address("10.0.1.7", "10.0.1.1"), address("fd00::7", "fd00::1")],
            route_mtu: 1450,
        }
    }

    fn lxc() -> IfName {
        IfName::new("lxc0123456789ab").unwrap()
    }

    fn host() -> Device {
        Device { index: 12, peer: Some(2), mtu: 1500, up: true, ..Device::default() }
    }

    fn found() -> PodDevice {
        let pod = pod();
        let device = Device {
            index: 2,
            peer: Some(12),
            mac: Some(pod.mac),
            mtu: 1500,
            up: true,
            kind: Some("veth".into()),
            addresses: pod.addresses.iter().map(|address| address.ip.into()).collect(),
        };
        PodDevice { device, routes: pod_routes(&pod).collect() }
    }

    fn differences(host: &Device, found: &PodDevice) -> Vec<String> {
        Pair { host: &lxc(), pod: &pod(), mtu: 1500 }.differences(Some(host), Some(found))
    }

    #[test]
    fn what_is_as_it_was_made_has_no_differences() {
        let mut added = found();
        added.device.addresses.push("192.0.2.1/24".parse().unwrap());
        added.routes.insert("192.0.2.0/24".parse().unwrap(), Route::default());
        assert_eq!(differences(&host(), &added), Vec::<String>::new(), "what others added is theirs");
    }

    type Change = fn(&mut Device, &mut PodDevice);

    #[test]
    fn each_difference_is_named() {
        let changes: [(Change, &str); 9] = [
            (|host, _| host.peer = Some(3), "eth0 in the pod is not the other end of lxc0123456789ab"),
            (|_, pod| pod.device.peer = Some(13), "eth0 in the pod is not the other end of lxc0123456789ab"),
            (|_, pod| pod.device.mac = None, "eth0 in the pod has another hardware address than it was given"),
            (|_, pod| pod.device.mtu = 1400, "eth0 in the pod has MTU 1400, not 1500"),
            (|_, pod| pod.device.up = false, "eth0 in the pod is down"),
            (|_, pod| pod.device.addresses.truncate(1), "eth0 in the pod lacks the address fd00::7/128"),
            (
                |_, pod| {
                    pod.routes.remove(&"0.0.0.0/0".parse().unwrap());
                },
                "the pod lacks the route default via 10.0.1.1 dev eth0 mtu 1450",
            ),
            (
                |_, pod| {
                    pod.routes.remove(&"10.0.1.1/32".parse().unwrap());
                },
                "the pod lacks the route 10.0.1.1/32 dev eth0",
            ),
            (
                |_, pod| pod.routes.get_mut(&"::/0".parse().unwrap()).unwrap().mtu = None,
                "the pod has the route default via fd00::1 dev eth0, not default via fd00::1 dev eth0 mtu 1450",
            ),
        ];
        for (change, expected) in changes {
            let (mut host, mut found) = (host(), found());
            change(&mut host, &mut found);
            assert_eq!(differences(&host, &found), [expected]);
        }
        let (lxc, pod) = (lxc(), pod());
        let pair = Pair { host: &lxc, pod: &pod, mtu: 1500 };
        assert_eq!(pair.differences(None, Some(&found())), ["the interface lxc0123456789ab is gone"]);
        assert_eq!(pair.differences(Some(&host()), None), ["there is no interface eth0 in the pod"]);
    }

    #[test]
    fn what_is_wrong_on_the_host_is_named() {
        let link = |mtu, up| Link { kind: LinkKind::Endpoint(None), mtu, up, arp: true };
        let set = Op::SetLink(lxc(), link(1500, true));
        let hash = ProgramSet { object: Object::new(b""), config: Config::UNSET }.hash();
        let from_container = Hook::Endpoint { id: 7, link: lxc() };
        let row = rows::host("10.0.1.7".parse().unwrap());
        let rp_filter = SysctlKey::device("ipv4", &lxc(), "rp_filter");
        let mut observed = NodeState::default();
        for (op, expected) in [
            (&set, "the interface lxc0123456789ab is gone"),
            (&Op::Attach(Hook::Policy { id: 7 }, hash), "slot 7 of cilium_call_policy is empty"),
            (
                &Op::Attach(from_container.clone(), hash),
                "cil_from_container on lxc0123456789ab of endpoint 7 is not attached",
            ),
            (&Op::PutRow(row.clone()), "the row of 10.0.1.7 in cilium_lxc is missing"),
            (
                &Op::PutRow(rows::ipcache("10.0.1.7/32".parse().unwrap(), 300, None)),
                "the row of 10.0.1.7/32 in cilium_ipcache_v2 is missing",
            ),
        ] {
            assert_eq!(host_difference(op, &observed), expected);
        }
        observed.hooks.insert(from_container.clone(), ProgramHash::FOREIGN);
        observed.hooks.insert(Hook::Policy { id: 7 }, ProgramHash::FOREIGN);
        observed.sysctls.insert(rp_filter.clone(), "1".into());
        row.clone().insert_into(&mut observed.maps);
        for (op, expected) in [
            (
                &Op::Attach(Hook::Policy { id: 7 }, hash),
                "slot 7 of cilium_call_policy holds a program that is not the agent's",
            ),
            (
                &Op::Attach(from_container, hash),
                "cil_from_container on lxc0123456789ab of endpoint 7 is not the agent's",
            ),
            (&Op::PutRow(row), "the row of 10.0.1.7 in cilium_lxc differs"),
            (&Op::SetSysctl(rp_filter, "0".into()), "net/ipv4/conf/lxc0123456789ab/rp_filter is 1, not 0"),
        ] {
            assert_eq!(host_difference(op, &observed), expected);
        }
        for (found, expected) in [
            (link(1500, false), "lxc0123456789ab is down"),
            (link(1400, true), "lxc0123456789ab has MTU 1400, not 1500"),
            (Link { arp: false, ..link(1500, true) }, "lxc0123456789ab has ARP off"),
            (
                Link { kind: LinkKind::Other("dummy".into()), ..link(1500, true) },
                "lxc0123456789ab is of another kind than it was made",
            ),
        ] {
            observed.links.insert(lxc(), found);
            assert_eq!(host_difference(&set, &observed), expected);
        }
    }
}

//! The result of ADD in the form of each version of the CNI specification ("Section 5: Result Types", and the results
//! of the older specifications 0.2.0 and 0.4.0).

use ipnet::IpNet;
use serde_json::{Map, Value, json};

use crate::{
    api::{AddResult, AddressResult, InterfaceResult, RouteResult},
    version::Version,
};

/// The result as the runtime reads it from standard output.
#[must_use]
pub fn to_json(result: &AddResult, version: Version) -> Value {
    let mut wire = Map::new();
    wire.insert("cniVersion".into(), version.as_str().into());
    if version < Version::V0_3_0 {
        for address in &result.addresses {
            let key = if is_v4(&address.address) { "ip4" } else { "ip6" };
            wire.insert(key.into(), by_family(address, &result.routes));
        }
    } else {
        let interfaces =
            [interface(&result.host, None, version), interface(&result.container, Some(&result.netns), version)];
        wire.insert("interfaces".into(), Value::from_iter(interfaces));
        wire.insert("ips".into(), result.addresses.iter().map(|address| ip(address, version)).collect());
        wire.insert("routes".into(), result.routes.iter().map(|each| route(each, version)).collect());
    }
    wire.insert("dns".into(), json!({}));
    Value::Object(wire)
}

fn is_v4(net: &IpNet) -> bool {
    matches!(net, IpNet::V4(_))
}

fn interface(interface: &InterfaceResult, netns: Option<&str>, version: Version) -> Value {
    let mut wire = json!({"name": interface.name, "mac": interface.mac});
    if let Some(netns) = netns {
        wire["sandbox"] = netns.into();
    }
    if version >= Version::V1_1_0 {
        wire["mtu"] = interface.mtu.into();
    }
    wire
}

fn ip(address: &AddressResult, version: Version) -> Value {
    // Index 1 is the interface inside the container.
    let mut wire = json!({"address": address.address, "gateway": address.gateway, "interface": 1});
    if version < Version::V1_0_0 {
        wire["version"] = if is_v4(&address.address) { "4" } else { "6" }.into();
    }
    wire
}

fn route(route: &RouteResult, version: Version) -> Value {
    let mut wire = json!({"dst": route.dst});
    if let Some(gateway) = route.gateway {
        wire["gw"] = gateway.to_string().into();
    }
    if let (Some(mtu), true) = (route.mtu, version >= Version::V1_1_0) {
        wire["mtu"] = mtu.into();
    }
    wire
}

fn by_family(address: &AddressResult, routes: &[RouteResult]) -> Value {
    let same = routes.iter().filter(|route| is_v4(&route.dst) == is_v4(&address.address));
    let routes: Vec<_> = same.map(|each| route(each, Version::V0_2_0)).collect();
    json!({"ip": address.address, "gateway": address.gateway, "routes": routes})
}

#[cfg(test)]
mod tests {
    use super::*;

    fn result() -> AddResult {
        let interface = |name: &str, mac: &str| InterfaceResult { name: name.into(), mac: mac.into(), mtu: 1500 };
        let net = |text: &str| text.parse().unwrap();
        let ip = |text: &str| text.parse().unwrap();
        AddResult {
            host: interface("lxc0123456789ab", "02:00:00:00:00:01"),
            container: interface("eth0", "02:00:00:00:00:02"),
            netns: "/run/netns/x".into(),
            addresses: vec![
                AddressResult { address: net("10.0.1.5/32"), gateway: ip("10.0.1.1") },
                AddressResult { address: net("fd00::5/128"), gateway: ip("fd00::1") },
            ],
            routes: vec![
                RouteResult { dst: net("10.0.1.1/32"), gateway: None, mtu: None },
                RouteResult { dst: net("0.0.0.0/0"), gateway: Some(ip("10.0.1.1")), mtu: Some(1450) },
                RouteResult { dst: net("::/0"), gateway: Some(ip("fd00::1")), mtu: Some(1450) },
            ],
        }
    }

    #[test]
    fn newest_form() {
        let expected = json!({
            "cniVersion": "1.1.0",
            "interfaces": [
                {"name": "lxc0123456789ab", "mac": "02:00:00:00:00:01", "mtu": 1500},
                {"name": "eth0", "mac": "02:00:00:00:00:02", "sandbox": "/run/netns/x", "mtu": 1500},
            ],
            "ips": [
                {"address": "10.0.1.5/32", "gateway": "10.0.1.1", "interface": 1},
                {"address": "fd00::5/128", "gateway": "fd00::1", "interface": 1},
            ],
            "routes": [
                {"dst": "10.0.1.1/32"},
                {"dst": "0.0.0.0/0", "gw": "10.0.1.1", "mtu": 1450},
                {"dst": "::/0", "gw": "fd00::1", "mtu": 1450},
            ],
            "dns": {},
        });
        assert_eq!(to_json(&result(), Version::V1_1_0), expected);
    }

    #[test]
    fn older_forms() {
        let v1 = to_json(&result(), Version::V1_0_0);
        assert_eq!(v1["interfaces"][0], json!({"name": "lxc0123456789ab", "mac": "02:00:00:00:00:01"}));
        assert_eq!(v1["routes"][1], json!({"dst": "0.0.0.0/0", "gw": "10.0.1.1"}));
        let v04 = to_json(&result(), Version::V0_4_0);
        assert_eq!(v04["ips"][1]["version"], "6");
        let expected = json!({
            "cniVersion": "0.2.0",
            "ip4": {"ip": "10.0.1.5/32", "gateway": "10.0.1.1",
                "routes": [{"dst": "10.0.1.1/32"}, {"dst": "0.0.0.0/0", "gw": "10.0.1.1"}]},
            "ip6": {"ip": "fd00::5/128", "gateway": "fd00::1", "routes": [{"dst": "::/0", "gw": "fd00::1"}]},
            "dns": {},
        });
        assert_eq!(to_json(&result(), Version::V0_2_0), expected);
    }
}

//! Rows of maps as text.

use std::{collections::BTreeMap, net::IpAddr};

use basal_maps::{
    addr::{Mac64, NetIp},
    endpoint::{EndpointInfo, EndpointKey},
    ipcache::{
        FLAG_HAS_TUNNEL_ENDPOINT, FLAG_IPV6_TUNNEL_ENDPOINT, FLAG_REMOTE_CLUSTER, FLAG_SKIP_TUNNEL, IpcacheKey,
        RemoteEndpointInfo,
    },
    metrics::{Direction, MetricsKey, MetricsValue, file_name},
    node::{NodeKey, NodeValue},
    reason::Reason,
    tunnel::{TunnelKey, TunnelValue},
};
use serde::Serialize;

use super::Pairs;

fn ip(ip: NetIp, family: u8) -> String {
    ip.to_ip(family).map_or_else(|| format!("<family {family}>"), |ip| ip.to_string())
}

fn mac(mac: &Mac64) -> String {
    mac.octets.map(|octet| format!("{octet:02X}")).join(":")
}

/// `10.244.1.87:0` and `id=1478  sec_id=22446 …`, or `(localhost)` for the node's own addresses.
pub(super) fn endpoints(rows: &[(EndpointKey, EndpointInfo)]) -> Pairs {
    let pair = |(key, info): &(EndpointKey, EndpointInfo)| {
        let value = if info.is_host() {
            "(localhost)".to_owned()
        } else {
            format!(
                "id={:<5} sec_id={:<5} flags=0x{:04X} ifindex={:<3} mac={} nodemac={} parent_ifindex={:<3} rt_info:{}",
                info.lxc_id,
                info.sec_id,
                info.flags,
                info.ifindex,
                mac(&info.mac),
                mac(&info.node_mac),
                info.parent_ifindex,
                info.rt_info,
            )
        };
        (with_port(&ip(key.ip, key.family)), vec![value])
    };
    rows.iter().map(pair).collect()
}

/// Cilium prints addresses of these maps with a port that is always 0.
fn with_port(ip: &str) -> String {
    if ip.contains(':') { format!("[{ip}]:0") } else { format!("{ip}:0") }
}

/// `10.1.0.0:0` and `192.168.1.5:0`.
pub(super) fn tunnels(rows: &[(TunnelKey, TunnelValue)]) -> Pairs {
    let pair = |(key, value): &(TunnelKey, TunnelValue)| {
        let network = ip(key.prefix.ip, key.prefix.family);
        (with_port(&network), vec![with_port(&ip(value.tunnel_endpoint, value.family))])
    };
    rows.iter().map(pair).collect()
}

/// `10.244.0.132/32` and `identity=13837 encryptkey=0 tunnelendpoint=192.168.76.2 flags=hastunnel`.
pub(super) fn ipcache(rows: &[(IpcacheKey, RemoteEndpointInfo)]) -> Pairs {
    const FLAGS: [(u8, &str); 4] = [
        (FLAG_SKIP_TUNNEL, "skiptunnel"),
        (FLAG_HAS_TUNNEL_ENDPOINT, "hastunnel"),
        (FLAG_IPV6_TUNNEL_ENDPOINT, "ipv6tunnel"),
        (FLAG_REMOTE_CLUSTER, "remotecluster"),
    ];
    let pair = |(key, info): &(IpcacheKey, RemoteEndpointInfo)| {
        let prefix = key.cidr().map_or_else(|| "<unknown>".to_owned(), |(ip, bits)| format!("{ip}/{bits}"));
        let names: Vec<&str> = FLAGS.iter().filter(|(flag, _)| info.flags & flag != 0).map(|(_, name)| *name).collect();
        let flags = if names.is_empty() { "<none>".to_owned() } else { names.join(",") };
        let endpoint = info.tunnel_endpoint().unwrap_or(IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED));
        let value =
            format!("identity={} encryptkey={} tunnelendpoint={endpoint} flags={flags}", info.sec_identity, info.key);
        (prefix, vec![value])
    };
    rows.iter().map(pair).collect()
}

/// One node id with its addresses.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub(super) struct NodeId {
    /// In hexadecimal, `0x1`.
    pub(super) id: String,
    /// Its addresses.
    pub(super) ips: Vec<String>,
    /// The IPsec SPI.
    pub(super) spi: u8,
}

/// Node ids, ascending.
pub(super) fn node_ids(rows: &[(NodeKey, NodeValue)]) -> Vec<NodeId> {
    let mut ids: BTreeMap<u16, NodeId> = BTreeMap::new();
    for (key, value) in rows {
        let node = ids.entry(value.id).or_insert_with(|| NodeId {
            id: format!("0x{:x}", value.id),
            ips: Vec::new(),
            spi: value.spi,
        });
        node.ips.push(ip(key.ip, key.family));
        node.ips.sort();
    }
    ids.into_values().collect()
}

/// One row of the metrics.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub(super) struct Metric {
    reason: String,
    direction: &'static str,
    packets: u64,
    bytes: u64,
    line: u16,
    file: String,
}

impl Metric {
    /// The cells of its row.
    pub(super) fn cells(&self) -> Vec<String> {
        let numbers = [self.packets.to_string(), self.bytes.to_string(), self.line.to_string()];
        let [packets, bytes, line] = numbers;
        vec![self.reason.clone(), self.direction.to_owned(), packets, bytes, line, self.file.clone()]
    }
}

/// Counters with their words.
pub(super) fn metrics(rows: &[(MetricsKey, MetricsValue)]) -> Vec<Metric> {
    let metric = |(key, value): &(MetricsKey, MetricsValue)| Metric {
        reason: Reason(key.reason).text().map_or_else(|| format!("reason {}", key.reason), str::to_owned),
        direction: Direction::from_bits(key.dir).as_str(),
        packets: value.count,
        bytes: value.bytes,
        line: key.line,
        file: file_name(key.file).map_or_else(|| format!("unknown({})", key.file), str::to_owned),
    };
    rows.iter().map(metric).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn endpoints_look_as_in_cilium() {
        let info = EndpointInfo {
            ifindex: 12,
            lxc_id: 1478,
            flags: 0,
            mac: Mac64::from([0x4e, 0x03, 0x9f, 0x4e, 0xc1, 0x30]),
            node_mac: Mac64::from([0x36, 0x4d, 0xf7, 0xa2, 0xb9, 0x04]),
            sec_id: 22446,
            ..EndpointInfo::HOST
        };
        let rows =
            [(EndpointKey::from(at("10.244.1.87")), info), (EndpointKey::from(at("10.0.0.1")), EndpointInfo::HOST)];
        let pairs = endpoints(&rows);
        assert_eq!(
            pairs["10.244.1.87:0"],
            [
                "id=1478  sec_id=22446 flags=0x0000 ifindex=12  mac=4E:03:9F:4E:C1:30 nodemac=36:4D:F7:A2:B9:04 parent_ifindex=0   rt_info:0"
            ]
        );
        assert_eq!(pairs["10.0.0.1:0"], ["(localhost)"]);
    }

    #[test]
    fn ipcache_rows_look_as_in_cilium() {
        let rows = [
            (IpcacheKey::new(at("10.244.0.132"), 32), RemoteEndpointInfo::new(13837, Some(at("192.168.76.2")))),
            (IpcacheKey::new(at("10.244.1.87"), 32), RemoteEndpointInfo::new(22446, None)),
            (IpcacheKey::new(at("fd00::"), 120), RemoteEndpointInfo::new(2, Some(at("fc00::2")))),
        ];
        let pairs = ipcache(&rows);
        assert_eq!(
            pairs["10.244.0.132/32"],
            ["identity=13837 encryptkey=0 tunnelendpoint=192.168.76.2 flags=hastunnel"]
        );
        assert_eq!(pairs["10.244.1.87/32"], ["identity=22446 encryptkey=0 tunnelendpoint=0.0.0.0 flags=<none>"]);
        assert_eq!(pairs["fd00::/120"], ["identity=2 encryptkey=0 tunnelendpoint=fc00::2 flags=hastunnel,ipv6tunnel"]);
    }

    #[test]
    fn addresses_of_a_node_id_stand_together() {
        let node = |ip: &str, id| (NodeKey::from(at(ip)), NodeValue { id, spi: 0, pad: 0 });
        let ids = node_ids(&[node("10.0.0.7", 1), node("fc00::7", 1), node("10.0.0.8", 26)]);
        assert_eq!(ids[0], NodeId { id: "0x1".into(), ips: vec!["10.0.0.7".into(), "fc00::7".into()], spi: 0 });
        assert_eq!(ids[1].id, "0x1a");
    }

    #[test]
    fn metrics_have_words() {
        let key = |reason, dir, file| MetricsKey { reason, dir, line: 7, file, pad1: 0, pad2: 0 };
        let value = MetricsValue { count: 3, bytes: 180 };
        let rows = metrics(&[(key(132, 2, 2), value), (key(0, 1, 3), value), (key(250, 0, 99), value)]);
        assert_eq!(rows[0].cells(), ["Invalid source ip", "EGRESS", "3", "180", "7", "bpf_lxc.c"]);
        assert_eq!(rows[1].cells(), ["Success", "INGRESS", "3", "180", "7", "bpf_overlay.c"]);
        assert_eq!(rows[2].reason, "reason 250");
    }
}

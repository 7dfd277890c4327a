//! Who talks to whom.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    path::Path,
    time::Duration,
};

use aya::{
    Pod,
    maps::{HashMap, Map, MapData},
};
use basal_datapath::{flows::MapUse, kernel::Kernel as _};
use basal_maps::spec::MapSpec;

use crate::harness::{Netns, Node, pair};

/// Identities of the two pods.
pub(crate) const POD_ONE: u32 = 1111;
pub(crate) const POD_TWO: u32 = 2222;

/// Long enough to never decide a test that passes.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// What a TCP server at `address` in `server` sends to a client of `to`: the address that the client came from.
pub(crate) fn tcp_source(server: &Netns, address: &str, client: &Netns, to: &str) -> SocketAddr {
    let listener = server.enter(|| TcpListener::bind(address).unwrap());
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let (mut stream, from) = listener.accept().unwrap();
            stream.write_all(from.to_string().as_bytes()).unwrap();
            // More than one segment, both ways.
            stream.write_all(&[b' '; 100_000]).unwrap();
        });
        let mut stream = client.enter(|| TcpStream::connect_timeout(&to.parse().unwrap(), PATIENCE).unwrap());
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text.trim_end().parse().unwrap()
    })
}

/// Two nodes with a pod each: 10.1.1.7 and 10.1.2.7.
pub(crate) fn two_pods(bpffs: &Path, legacy: bool) -> (Node, Node, Netns, Netns) {
    let (mut one, mut two) = pair(bpffs);
    (one.plan.legacy_routing, two.plan.legacy_routing) = (legacy, legacy);
    let pod_one = one.add_pod(7, POD_ONE);
    let pod_two = two.add_pod(7, POD_TWO);
    one.converge();
    two.converge();
    (one, two, pod_one, pod_two)
}

/// Services as kube-proxy makes them: translation in the host stack before routing, and of what the host itself sends. What
/// connection tracking cannot make sense of is dropped.
pub(crate) fn kube_proxy(node: &Node, service: &str, backend: &str) {
    let rules = format!(
        "table ip kube-proxy {{
            chain prerouting {{ type nat hook prerouting priority dstnat;
                ip daddr {service} tcp dport 80 dnat to {backend}
                ip daddr {service} udp dport 80 dnat to {backend}
            }}
            chain output {{ type nat hook output priority -100;
                ip daddr {service} tcp dport 80 dnat to {backend}
            }}
            chain forward {{ type filter hook forward priority filter;
                ct state invalid drop
            }}
        }}"
    );
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), rules).unwrap();
    node.netns.run("nft delete table ip kube-proxy").unwrap_or_default();
    node.netns.run(&format!("nft -f {}", file.path().display())).unwrap();
}

/// The rows of a map.
pub(crate) fn rows_of<const K: usize, const V: usize>(node: &Node, spec: &MapSpec) -> Vec<([u8; K], [u8; V])>
where
    [u8; K]: Pod,
    [u8; V]: Pod,
{
    open(node, spec).iter().map(Result::unwrap).collect()
}

pub(crate) fn open<const K: usize, const V: usize>(node: &Node, spec: &MapSpec) -> HashMap<MapData, [u8; K], [u8; V]>
where
    [u8; K]: Pod,
    [u8; V]: Pod,
{
    let data = MapData::from_pin(node.paths.maps().join(spec.name)).unwrap();
    HashMap::try_from(Map::LruHashMap(data)).unwrap()
}

/// Writes into every row of a map, at an offset.
pub(crate) fn overwrite<const K: usize, const V: usize>(node: &Node, spec: &MapSpec, offset: usize, bytes: &[u8])
where
    [u8; K]: Pod,
    [u8; V]: Pod,
{
    let rows = rows_of::<K, V>(node, spec);
    let mut map = open::<K, V>(node, spec);
    for (key, mut value) in rows {
        value[offset..offset + bytes.len()].copy_from_slice(bytes);
        map.insert(key, value, 0).unwrap();
    }
}

/// Takes away what is left of connections that ended.
pub(crate) fn collect(node: &Node) -> Vec<MapUse> {
    node.with(async |kernel| kernel.collect_flows().await.unwrap())
}

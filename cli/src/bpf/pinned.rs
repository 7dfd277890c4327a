//! Rows of pinned maps, as the types of their layouts.

use std::{net::IpAddr, path::Path};

use anyhow::Context as _;
use aya::{
    Pod,
    maps::{HashMap, LpmTrie, Map, MapData, MapError, PerCpuHashMap},
};
use basal_maps::{
    endpoint::{EndpointInfo, EndpointKey},
    ipcache::{IpcacheKey, RemoteEndpointInfo},
    metrics::{MetricsKey, MetricsValue},
    node::{NodeKey, NodeValue},
    spec::{self, MapSpec},
    tunnel::{TunnelKey, TunnelValue},
};
use ipnet::IpNet;
use zerocopy::{FromBytes, transmute};

fn open(folder: &Path, spec: &MapSpec) -> anyhow::Result<Map> {
    let path = folder.join(spec.name);
    let opened = MapData::from_pin(&path).and_then(Map::from_map_data);
    opened.with_context(|| {
        format!("cannot open {}; is the agent running on this node, and are you root?", path.display())
    })
}

/// Rows of a map whose keys and values are these many bytes. Rows that vanish while they are read are left out.
fn rows<K, V>(found: impl Iterator<Item = Result<(K, V), MapError>>) -> anyhow::Result<Vec<(K, V)>> {
    found.filter(|row| !matches!(row, Err(MapError::KeyNotFound))).map(|row| Ok(row?)).collect()
}

/// `cilium_lxc`.
pub(super) fn endpoints(folder: &Path) -> anyhow::Result<Vec<(EndpointKey, EndpointInfo)>> {
    let map: HashMap<_, [u8; 20], [u8; 48]> = open(folder, &spec::ENDPOINTS)?.try_into()?;
    Ok(rows(map.iter())?.into_iter().map(|(key, value)| (transmute!(key), transmute!(value))).collect())
}

/// `cilium_node_map_v2`.
pub(super) fn node_ids(folder: &Path) -> anyhow::Result<Vec<(NodeKey, NodeValue)>> {
    let map: HashMap<_, [u8; 20], [u8; 4]> = open(folder, &spec::NODES)?.try_into()?;
    Ok(rows(map.iter())?.into_iter().map(|(key, value)| (transmute!(key), transmute!(value))).collect())
}

/// `cilium_ipcache_v2`.
pub(super) fn ipcache(folder: &Path) -> anyhow::Result<Vec<(IpcacheKey, RemoteEndpointInfo)>> {
    let map: LpmTrie<_, [u8; 20], [u8; 24]> = open(folder, &spec::IPCACHE)?.try_into()?;
    trie(rows(map.iter())?.into_iter().map(|(key, value)| (key.prefix_len(), key.data(), value)))
}

/// `cilium_tunnel_map`.
pub(super) fn tunnels(folder: &Path) -> anyhow::Result<Vec<(TunnelKey, TunnelValue)>> {
    let map: LpmTrie<_, [u8; 20], [u8; 20]> = open(folder, &spec::TUNNEL)?.try_into()?;
    trie(rows(map.iter())?.into_iter().map(|(key, value)| (key.prefix_len(), key.data(), value)))
}

/// aya splits the length off a key; our layouts hold it.
fn trie<K: FromBytes, V: FromBytes, const N: usize>(
    rows: impl Iterator<Item = (u32, [u8; 20], [u8; N])>,
) -> anyhow::Result<Vec<(K, V)>> {
    rows.map(|(length, data, value)| {
        let key = [length.to_ne_bytes().as_slice(), &data].concat();
        let key = K::read_from_bytes(&key).ok().context("the map's key has another size than its layout")?;
        let value = V::read_from_bytes(&value).ok().context("the map's value has another size than its layout")?;
        Ok((key, value))
    })
    .collect()
}

/// Rows of a map of flows, whose keys and values are these many bytes; `why` there may be none.
pub(super) fn flows<K: FromBytes, V: FromBytes, const N: usize, const M: usize>(
    folder: &Path,
    spec: &MapSpec,
    why: &'static str,
) -> anyhow::Result<Vec<(K, V)>>
where
    [u8; N]: Pod,
    [u8; M]: Pod,
{
    let map = open(folder, spec).context(why)?;
    let map: HashMap<_, [u8; N], [u8; M]> = map.try_into()?;
    let found = rows(map.iter())?;
    let read =
        found.iter().filter_map(|(key, value)| Some((K::read_from_bytes(key).ok()?, V::read_from_bytes(value).ok()?)));
    Ok(read.collect())
}

/// `cilium_ipmasq_v4` and `cilium_ipmasq_v6`.
pub(super) fn exempt(folder: &Path) -> anyhow::Result<Vec<IpNet>> {
    let why = "nothing is exempt unless enable-bpf-masquerade is \"true\"";
    let v4: LpmTrie<_, [u8; 4], u8> = open(folder, &spec::EXEMPT4).context(why)?.try_into()?;
    let v6: LpmTrie<_, [u8; 16], u8> = open(folder, &spec::EXEMPT6).context(why)?.try_into()?;
    let (v4, v6) = (rows(v4.iter())?, rows(v6.iter())?);
    let v4 = v4.iter().map(|(key, _)| (IpAddr::from(key.data()), key.prefix_len()));
    let v6 = v6.iter().map(|(key, _)| (IpAddr::from(key.data()), key.prefix_len()));
    let mut networks = Vec::new();
    for (ip, length) in v4.chain(v6) {
        networks.push(IpNet::new(ip, u8::try_from(length)?)?);
    }
    networks.sort();
    Ok(networks)
}

/// `cilium_metrics`, summed over the CPUs.
pub(super) fn metrics(folder: &Path) -> anyhow::Result<Vec<(MetricsKey, MetricsValue)>> {
    let map: PerCpuHashMap<_, [u8; 8], [u8; 16]> = open(folder, &spec::METRICS)?.try_into()?;
    let sum = |cpus: &[[u8; 16]]| {
        let mut sum = MetricsValue { count: 0, bytes: 0 };
        for cpu in cpus {
            let cpu: MetricsValue = transmute!(*cpu);
            sum.count += cpu.count;
            sum.bytes += cpu.bytes;
        }
        sum
    };
    Ok(rows(map.iter())?.into_iter().map(|(key, cpus)| (transmute!(key), sum(&cpus))).collect())
}

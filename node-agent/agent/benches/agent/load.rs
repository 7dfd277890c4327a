//! A cluster of 1,000 nodes as the records of it: nobody runs on them.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::Duration,
};

use basal_crds::{
    address::{AddressType, NodeAddress},
    identity::IdentityId,
    kvstore::{IpRecord, IpTarget, NodeRecord, keys},
    labels::Labels,
    names::{ClusterId, ClusterName},
};
use basal_datapath::rows::MapId;
use basal_e2e::{
    say::say,
    wait::{self, Check},
};
use basal_ipam::names::NodeName;
use basal_objects::object::resources;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use serde_json::json;

use super::{
    cluster::Cluster,
    node::{Node, confirm},
};

/// Nodes.
pub(crate) const NODES: u16 = 1000;
/// Pods on each, with an address of each family.
const PODS: u16 = 15;
/// Addresses of pods.
const ADDRESSES: usize = NODES as usize * PODS as usize * 2;
/// Blocks of nodes.
const BLOCKS: usize = NODES as usize * 2;
/// Identities, each of two or three pods.
const IDENTITIES: u32 = 6000;
/// The first of them.
const FIRST_IDENTITY: u32 = 1000;
/// Objects that are made at the same time.
const AT_ONCE: usize = 64;
/// How long an agent may take to have all of it in its maps.
const PATIENCE: Duration = Duration::from_secs(300);

/// The tunnel endpoint of a node.
pub(crate) fn host_ip(node: u16) -> Ipv4Addr {
    let [high, low] = node.to_be_bytes();
    Ipv4Addr::new(172, 20, high, low)
}

fn host_ip6(node: u16) -> Ipv6Addr {
    Ipv6Addr::new(0xfc00, 0, 0, 0, 0, 0, 1, node)
}

/// The addresses of a node's pod, 1 to 254; the first 15 are in the load.
pub(crate) fn pod_ips(node: u16, pod: u8) -> [IpAddr; 2] {
    let [high, low] = node.to_be_bytes();
    [
        Ipv4Addr::new(10, 192 + high, low, pod).into(),
        Ipv6Addr::new(0xfd00, 0x8000, 0, 0, 0, 0, node, u16::from(pod)).into(),
    ]
}

fn blocks(node: u16) -> [String; 2] {
    let [v4, v6] = pod_ips(node, 0);
    [format!("{v4}/24"), format!("{v6}/112")]
}

/// The identity of a pod of the load.
pub(crate) fn identity(node: u16, pod: u8) -> IdentityId {
    IdentityId::new(FIRST_IDENTITY + (u32::from(node) * u32::from(PODS) + u32::from(pod)) % IDENTITIES)
}

/// The text of a record.
pub(crate) fn record(node: u16, ip: IpAddr, identity: IdentityId) -> Vec<u8> {
    let mut record = IpRecord::new(IpTarget::Host(ip), host_ip(node).into(), identity);
    record.namespace = "default".to_owned();
    record.pod_name = format!("app-{node}-{identity}");
    record.service_account = "default".to_owned();
    record.to_json().into_bytes()
}

fn labels(identity: u32) -> anyhow::Result<Labels> {
    let text = format!(
        "k8s:app=app-{identity};k8s:io.cilium.k8s.policy.cluster=default;\
         k8s:io.cilium.k8s.policy.serviceaccount=default;k8s:io.kubernetes.pod.namespace=default;"
    );
    Ok(Labels::parse_canonical(&text)?)
}

/// Nodes and pods of the load.
fn pods() -> impl Iterator<Item = (u16, u8)> {
    (0..NODES).flat_map(|node| (1..=PODS).map(move |pod| (node, pod.to_be_bytes()[1])))
}

/// Writes it into both stores, once.
pub(crate) fn ensure(cluster: &Cluster) -> anyhow::Result<()> {
    if !cluster.is_loaded.get() {
        say("  writing the load");
        cluster.wait("writing the load into etcd", into_etcd(cluster))?;
        cluster.wait("writing the load as objects", into_objects(cluster))?;
        cluster.is_loaded.set(true);
    }
    Ok(())
}

/// Waits until every address and every block is in an agent's ipcache.
pub(crate) fn wait_seen(node: &Node<'_>) -> anyhow::Result<()> {
    let maps = node.pinned();
    wait::until("the load in the agent's maps", PATIENCE, Duration::from_millis(100), || {
        let rows = maps.rows(MapId::Ipcache)?.map_or(0, |rows| rows.len());
        let is_there = rows >= ADDRESSES + BLOCKS;
        Ok(if is_there { Check::Done(()) } else { Check::NotYet(format!("{rows} rows")) })
    })
}

/// Writes it into etcd: 1,000 nodes, 30,000 addresses, 6,000 identities.
async fn into_etcd(cluster: &Cluster) -> anyhow::Result<()> {
    let name = ClusterName::default();
    let mut values = Vec::new();
    for node in 0..NODES {
        let node_name = NodeName::new(&format!("load-{node}"))?;
        let mut record = NodeRecord::new(node_name.clone(), name.clone(), ClusterId::new(0));
        let ips: [IpAddr; 2] = [host_ip(node).into(), host_ip6(node).into()];
        record.addresses = ips.map(|ip| NodeAddress { kind: AddressType::InternalIp, ip }).into();
        let [v4, v6] = blocks(node);
        record.ipv4_cidrs.push(v4.parse()?);
        record.ipv6_cidrs.push(v6.parse()?);
        values.push((keys::node(&name, &node_name), record.to_json().into_bytes()));
    }
    for id in FIRST_IDENTITY..FIRST_IDENTITY + IDENTITIES {
        values.push((keys::identity(IdentityId::new(id)), labels(id)?.canonical().into_bytes()));
    }
    for (node, pod) in pods() {
        let identity = identity(node, pod);
        for ip in pod_ips(node, pod) {
            values.push((keys::ip(IpTarget::Host(ip)), record(node, ip, identity)));
        }
    }
    cluster.put(values).await
}

/// Writes the same as custom resources: 1,000 CiliumNodes, 15,000 CiliumEndpoints, 6,000 CiliumIdentities.
async fn into_objects(cluster: &Cluster) -> anyhow::Result<()> {
    let nodes = stream::iter(0..NODES).map(|node| make_node(cluster, node)).buffer_unordered(AT_ONCE);
    nodes.try_collect::<()>().await?;
    let identities = stream::iter(FIRST_IDENTITY..FIRST_IDENTITY + IDENTITIES);
    identities.map(|id| make_identity(cluster, id)).buffer_unordered(AT_ONCE).try_collect::<()>().await?;
    let pods = stream::iter(pods()).map(|(node, pod)| make_endpoint(cluster, node, pod)).buffer_unordered(AT_ONCE);
    pods.try_collect().await
}

async fn make_node(cluster: &Cluster, node: u16) -> anyhow::Result<()> {
    let blocks = blocks(node);
    let address = |ip: String| json!({"type": "InternalIP", "ip": ip});
    let object = json!({"apiVersion": "cilium.io/v2", "kind": "CiliumNode", "metadata": {"name": format!("load-{node}")},
        "spec": {"addresses": [address(host_ip(node).to_string()), address(host_ip6(node).to_string())],
            "ipam": {"podCIDRs": blocks}}});
    let object = cluster.create(resources::CILIUM_NODE, object).await?;
    confirm(cluster, &object, &blocks).await
}

async fn make_identity(cluster: &Cluster, id: u32) -> anyhow::Result<()> {
    let object = json!({"apiVersion": "cilium.io/v2", "kind": "CiliumIdentity", "metadata": {"name": id.to_string()},
        "security-labels": labels(id)?.to_security_labels()});
    cluster.create(resources::CILIUM_IDENTITY, object).await.map(drop)
}

async fn make_endpoint(cluster: &Cluster, node: u16, pod: u8) -> anyhow::Result<()> {
    let identity = identity(node, pod).get();
    let [v4, v6] = pod_ips(node, pod);
    let name = format!("app-{node}-{pod}");
    let labels: Vec<String> = labels(identity)?.iter().map(ToString::to_string).collect();
    let object = json!({"apiVersion": "cilium.io/v2", "kind": "CiliumEndpoint",
    "metadata": {"namespace": "default", "name": name},
    "status": {
        "id": 1, "state": "ready",
        "identity": {"id": identity, "labels": labels},
        "networking": {"addressing": [{"ipv4": v4, "ipv6": v6}], "node": host_ip(node)},
        "external-identifiers": {"k8s-namespace": "default", "k8s-pod-name": name,
            "pod-name": format!("default/{name}")},
    }});
    cluster.create(resources::CILIUM_ENDPOINT, object).await.map(drop)
}

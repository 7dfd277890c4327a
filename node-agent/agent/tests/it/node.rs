//! Registration, claim, and the other nodes.

use std::time::Duration;

use basal_agent::sync::task::FULL_PASS_INTERVAL;
use basal_cni::api::{AgentError, Answer, ComponentState, Request};
use basal_crds::{
    address::{AddressType, NodeAddress},
    kvstore::{NodeRecord, keys},
    names::{ClusterId, ClusterName},
};
use basal_datapath::{
    op::Op,
    rows::{self, MapId},
};
use basal_ipam::{cell::BlockState, names::NodeName};
use basal_objects::object::{ObjectKey, resources};
use serde_json::json;
use tokio::time::Instant;

use crate::world::World;

pub(crate) fn record(name: &str) -> NodeRecord {
    let mut record = NodeRecord::new(NodeName::new(name).unwrap(), ClusterName::default(), ClusterId::new(0));
    let address = |ip: &str| NodeAddress { kind: AddressType::InternalIp, ip: ip.parse().unwrap() };
    record.addresses = vec![address("172.18.0.2"), address("fc00::2")];
    record.ipv4_cidrs = vec!["10.0.2.0/24".parse().unwrap()];
    record
}

#[tokio::test(start_paused = true)]
async fn a_node_is_registered_and_waits_for_a_confirmed_block() {
    let mut world = World::new().await;
    world.start();
    world.until("the CiliumNode exists", || !world.objects.all(&resources::CILIUM_NODE).is_empty()).await;
    let node = world.cilium_node().await;
    assert_eq!(node.0["spec"]["addresses"][0], json!({"type": "InternalIP", "ip": "172.18.0.1"}));
    assert_eq!(node.0["metadata"]["ownerReferences"][0]["kind"], "Node");
    assert_eq!(node.labels()["zone"], "a");

    // Listed is not confirmed.
    world.claim("10.0.1.0/24", BlockState::Pending).await;
    world
        .until("the claim is waited for", || {
            let pending = world.readiness.pending();
            pending.iter().any(|pending| pending.name == "podcidr" && pending.reason.contains("PodCIDR"))
        })
        .await;
    assert!(!world.path("net.d").exists());

    world.grant(&["10.0.1.0/24", "fd00::/120"]).await;
    world.until_ready().await;
    let node = world.cilium_node().await;
    assert_eq!(node.0["spec"]["addresses"][2], json!({"type": "CiliumInternalIP", "ip": "10.0.1.1"}));
    assert_eq!(node.0["spec"]["health"]["ipv4"], "10.0.1.2");
    assert_eq!(world.ask(Request::Ready).await, Answer::Ready);
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn other_nodes_become_tunnels_and_stay_for_a_while_when_they_go() {
    let mut world = World::ready().await;
    let key = keys::node(&ClusterName::default(), &NodeName::new("n2").unwrap());
    world.put(&key, record("n2").to_json().as_bytes()).await;
    let tunnel = rows::tunnel("10.0.2.0/24".parse().unwrap(), "172.18.0.2".parse().unwrap(), 1);
    let has = || world.kernel.observed().state.maps[&MapId::Tunnel].get(&tunnel.key) == Some(&tunnel.value);
    world.until("the tunnel exists", has).await;
    let Answer::Nodes(nodes) = world.ask(Request::Nodes).await else { panic!("no nodes") };
    assert_eq!(
        nodes.iter().map(|node| (node.name.as_str(), node.local)).collect::<Vec<_>>(),
        [("n1", true), ("n2", false)]
    );

    let delete = basal_kvstore::kv::Op::Delete(basal_kvstore::kv::Keys::One(key));
    let txn = basal_kvstore::kv::Txn { then: vec![delete], ..Default::default() };
    assert!(basal_kvstore::kv::Kv::txn(&*world.kv, txn).await.is_done());
    tokio::time::sleep(std::time::Duration::from_secs(20)).await;
    assert!(has(), "the node went at once");
    tokio::time::sleep(std::time::Duration::from_secs(3600)).await;
    assert!(has(), "the last node went although etcd holds no node at all");
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_lost_claim_withdraws_records_and_refuses_new_pods() {
    let mut world = World::ready().await;
    world.add("c1", None).await;
    world.until("the records are there", || world.keys("cilium/state/ip/").len() == 2).await;

    world.claim("10.0.1.0/24", BlockState::Quarantined).await;
    world
        .until("the IPv4 record went", || world.keys("cilium/state/ip/") == ["cilium/state/ip/v1/default/fd00::3"])
        .await;
    let (_, answer) = world.offer("c2", None).await;
    let Answer::Error(AgentError::TryAgain { message }) = answer else { panic!("served: {answer:?}") };
    assert!(message.contains("10.0.1.0/24"), "{message}");
    let Answer::Status(status) = world.ask(Request::Status).await else { panic!("no status") };
    assert_eq!(status.cilium.state, ComponentState::Failure);

    world.claim("10.0.1.0/24", BlockState::Granted).await;
    world.until("the records are back", || world.keys("cilium/state/ip/").len() == 2).await;
    world.add("c2", None).await;
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_change_of_the_claim_is_noticed_at_once_and_after_a_broken_watch() {
    let mut world = World::ready().await;
    let soon = std::time::Duration::from_secs(2);
    world.claim("10.0.1.0/24", BlockState::Quarantined).await;
    tokio::time::sleep(soon).await;
    assert!(!world.readiness.is_ready(), "the claim is gone");
    world.claim("10.0.1.0/24", BlockState::Granted).await;
    tokio::time::sleep(soon).await;
    assert!(world.readiness.is_ready(), "the claim is back");
    world.kv.cut_watches();
    tokio::time::sleep(soon).await;
    world.claim("10.0.1.0/24", BlockState::Quarantined).await;
    tokio::time::sleep(soon).await;
    assert!(!world.readiness.is_ready(), "the claim is gone again");
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn the_claim_of_a_node_that_is_gone_is_followed_to_its_end() {
    let mut world = World::ready().await;
    world.delete(resources::NODE, &ObjectKey::cluster("n1")).await;
    tokio::time::sleep(std::time::Duration::from_secs(120)).await;
    assert!(world.readiness.is_ready(), "as long as the ledger holds the claim nobody else has the block");
    world.claim_of("10.0.1.0/24", BlockState::Quarantined, "gone").await;
    world
        .until("the claim is lost", || {
            let pending = world.readiness.pending();
            pending.iter().any(|pending| pending.name == "podcidr" && pending.reason.contains("10.0.1.0/24 is gone"))
        })
        .await;
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_policy_is_reported_as_not_enforced() {
    let mut world = World::ready().await;
    let policy = json!({"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"name": "deny", "namespace": "shop"}, "spec": {"podSelector": {}}});
    world.create(resources::NETWORK_POLICY, policy).await;
    world
        .until("an event tells", || {
            let events = world.objects.all(&resources::EVENT);
            events.iter().any(|event| event.0["note"].as_str().is_some_and(|note| note.contains("NOT ENFORCED")))
        })
        .await;
    let Answer::Status(status) = world.ask(Request::Status).await else { panic!("no status") };
    assert_eq!(status.policy.message, "NOT ENFORCED: NetworkPolicy shop/deny");
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_policy_has_one_event_of_each_edition_whoever_tells_of_it() {
    let mut world = World::ready().await;
    let policy = json!({"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"name": "deny", "namespace": "shop"}, "spec": {"podSelector": {}}});
    world.create(resources::NETWORK_POLICY, policy).await;
    let events = || world.objects.all(&resources::EVENT).into_iter().filter(|event| event.0["reason"] == "NotEnforced");
    world.until("an event tells", || events().count() == 1).await;
    // The agent of another node is to this one as it is to itself after a restart.
    world.stop().await;
    world.start();
    world.until_ready().await;
    tokio::time::sleep(Duration::from_secs(600)).await;
    let events: Vec<_> =
        world.objects.all(&resources::EVENT).into_iter().filter(|event| event.0["reason"] == "NotEnforced").collect();
    assert_eq!(events.len(), 1, "{events:?}");
    assert_eq!(events[0].0.get("series"), None, "nobody counts how many nodes there are");

    let key = ObjectKey::namespaced("shop", "deny");
    world
        .patch(resources::NETWORK_POLICY, &key, None, json!({"spec": {"podSelector": {"matchLabels": {"a": "b"}}}}))
        .await;
    world.until("the new edition is told of", || world.objects.all(&resources::EVENT).len() == 2).await;
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn another_address_of_the_node_is_followed() {
    let mut world = World::ready().await;
    let pod = world.pod("web-0", json!({"app": "web"})).await;
    world.add("c1", Some(pod)).await;
    let key = keys::node(&ClusterName::default(), &NodeName::new("n2").unwrap());
    world.put(&key, record("n2").to_json().as_bytes()).await;
    world.until("the pod is shown", || world.objects.all(&resources::CILIUM_ENDPOINT).len() == 1).await;
    world.until("the tunnel exists", || world.kernel.observed().state.maps[&MapId::Tunnel].len() == 1).await;
    world.kernel.take_log();

    world.kernel.change_device("eth0", |eth0| eth0.addresses[0] = "172.18.0.9/16".parse().unwrap());
    let addresses =
        json!([{"type": "InternalIP", "address": "172.18.0.9"}, {"type": "InternalIP", "address": "fc00::1"}]);
    world
        .patch(resources::NODE, &ObjectKey::cluster("n1"), Some("status"), json!({"status": {"addresses": addresses}}))
        .await;

    let moved = "172.18.0.9".parse().unwrap();
    let row = rows::host(moved);
    let old = rows::host("172.18.0.1".parse().unwrap());
    world
        .until("the rows follow", || {
            let rows = &world.kernel.observed().state.maps[&MapId::Endpoints];
            rows.get(&row.key) == Some(&row.value) && !rows.contains_key(&old.key)
        })
        .await;
    world.until("ip records follow", || world.ip_record("10.0.1.3").unwrap()["HostIP"] == "172.18.0.9").await;
    world
        .until("the reference follows", || {
            let references = world.keys("cilium/state/identities/v1/value/");
            references.len() == 1 && references[0].ends_with("/172.18.0.9")
        })
        .await;
    world
        .until("the objects follow", || {
            let node = world.objects.all(&resources::CILIUM_NODE).remove(0);
            let endpoint = world.objects.all(&resources::CILIUM_ENDPOINT).remove(0);
            node.0["spec"]["addresses"][0]["ip"] == "172.18.0.9"
                && node.0["spec"]["addresses"][2]["type"] == "CiliumInternalIP"
                && endpoint.0["status"]["networking"]["node"] == "172.18.0.9"
        })
        .await;
    let Answer::Nodes(nodes) = world.ask(Request::Nodes).await else { panic!("no nodes") };
    assert_eq!(nodes[0].tunnel_endpoint, Some(moved));
    assert!(world.runs() && world.readiness.is_ready());
    let log = world.kernel.take_log();
    assert!(log.iter().all(|op| matches!(op, Op::PutRow(_) | Op::DeleteRow { .. })), "only what differs: {log:?}");
    assert_eq!(world.del("c1").await, Answer::Deleted);
    world.stop_clean().await;
}

#[tokio::test(start_paused = true)]
async fn another_mtu_of_the_device_is_followed() {
    let mut world = World::ready().await;
    world.add("c1", None).await;
    let key = keys::node(&ClusterName::default(), &NodeName::new("n2").unwrap());
    world.put(&key, record("n2").to_json().as_bytes()).await;
    let to_n2 = "10.0.2.0/24".parse::<ipnet::IpNet>().unwrap();
    let route_mtu = || {
        let state = world.kernel.observed().state;
        state.routes.iter().find(|(key, _)| key.destination == to_n2).and_then(|(_, route)| route.mtu)
    };
    world.until("the route exists", || route_mtu() == Some(1450)).await;
    let before = Instant::now();
    world.kernel.change_device("eth0", |eth0| eth0.mtu = 1400);
    world.until("the route follows", || route_mtu() == Some(1350)).await;
    assert!(before.elapsed() < FULL_PASS_INTERVAL, "the kernel told of it");
    world
        .until("all else follows", || {
            let state = world.kernel.observed().state;
            state.links.values().all(|link| link.mtu == 1400)
                && state.programs.len() == 1
                && state.hooks.values().all(|hash| state.programs.contains(hash))
        })
        .await;
    let default = "0.0.0.0/0".parse().unwrap();
    let pod = world.kernel.pod("c1");
    assert_eq!((pod.device.mtu, pod.routes[&default].mtu), (1400, Some(1350)));
    let result = world.add("c2", None).await;
    assert_eq!((result.container.mtu, result.routes[1].mtu), (1400, Some(1350)));
    let Answer::Status(status) = world.ask(Request::Status).await else { panic!("no status") };
    assert_eq!(status.drift, 0, "nobody changed what is ours");
    assert!(world.runs());
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_node_whose_addresses_change_family_gives_its_pods_other_routes() {
    let mut world = World::ready().await;
    world.add("c1", None).await;
    let addresses = json!([{"type": "InternalIP", "address": "fc00::1"}]);
    world
        .patch(resources::NODE, &ObjectKey::cluster("n1"), Some("status"), json!({"status": {"addresses": addresses}}))
        .await;
    let default = "::/0".parse().unwrap();
    world.until("the pod's routes follow", || world.kernel.pod("c1").routes[&default].mtu == Some(1430)).await;
    world.until("ip records follow", || world.ip_record("10.0.1.3").unwrap()["HostIP"] == "fc00::1").await;
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn what_is_changed_behind_its_back_is_mended_and_counted() {
    let mut world = World::ready().await;
    let before = world.kernel.observed().state;
    let (key, _) = before.routes.first_key_value().unwrap();
    world.kernel.tamper(&basal_datapath::op::Op::DeleteRoute(key.clone()));
    world.until("the route is back", || world.kernel.observed().state == before).await;
    let Answer::Status(status) = world.ask(Request::Status).await else { panic!("no status") };
    assert_eq!(status.drift, 1);
    world.stop().await;
}

/// The ipcache's rows are most of what there is to read, and nothing tells of a change of them.
#[tokio::test(start_paused = true)]
async fn news_of_the_kernel_are_followed_without_reading_the_ipcache() {
    let mut world = World::ready().await;
    let key = keys::node(&ClusterName::default(), &NodeName::new("n2").unwrap());
    world.put(&key, record("n2").to_json().as_bytes()).await;
    let rows = |map| world.kernel.observed().state.maps.get(&map).cloned().unwrap_or_default();
    world.until("the tunnel exists", || !rows(MapId::Tunnel).is_empty()).await;
    tokio::time::sleep(FULL_PASS_INTERVAL / 6).await;
    let (tunnel, ipcache, reads) = (rows(MapId::Tunnel), rows(MapId::Ipcache), world.kernel.reads());
    for (map, rows) in [(MapId::Tunnel, &tunnel), (MapId::Ipcache, &ipcache)] {
        for key in rows.keys().cloned() {
            world.kernel.tamper(&Op::DeleteRow { map, key });
        }
    }
    world.kernel.change_device("eth0", |_| {});
    world.until("the tunnel is back", || rows(MapId::Tunnel) == tunnel).await;
    assert!(rows(MapId::Ipcache).is_empty() && world.kernel.reads() == reads);
    world.until("the ipcache is back", || rows(MapId::Ipcache) == ipcache).await;
    assert_eq!(world.kernel.reads(), reads + 2, "read, mended and read once more");
    world.stop().await;
}

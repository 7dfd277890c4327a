//! An agent without etcd: the cluster's records are custom resources.

use std::time::Duration;

use basal_cni::api::{AgentError, Answer, ComponentState, Request};
use basal_datapath::rows::{self, MapId};
use basal_maps::ipcache::{IpcacheKey, RemoteEndpointInfo};
use basal_objects::object::{ObjectKey, resources};
use serde_json::{Value, json};
use zerocopy::{FromBytes as _, IntoBytes as _};

use crate::world::{Source, World};

async fn ready() -> World {
    World::ready_with(Source::CustomResources).await
}

/// Another node with a confirmed block, as its agent and the operator write it.
async fn other_node(world: &World, name: &str, host: u8) {
    let block = format!("10.0.{host}.0/24");
    let node = json!({"apiVersion": "cilium.io/v2", "kind": "CiliumNode", "metadata": {"name": name}, "spec": {
        "addresses": [{"type": "InternalIP", "ip": format!("172.18.0.{host}")}], "ipam": {"podCIDRs": [block]}}});
    let created = world.create(resources::CILIUM_NODE, node).await;
    let body = json!({"status": {"ipam": {"pod-cidrs": {block: {"status": "in-use"}}}}});
    world.patch(resources::CILIUM_NODE, &created.key(), Some("status"), body).await;
}

/// The CiliumEndpoint of a pod on another node.
fn other_endpoint(name: &str, ip: &str, host: u8, identity: u32) -> Value {
    json!({"apiVersion": "cilium.io/v2", "kind": "CiliumEndpoint", "metadata": {"name": name, "namespace": "shop"},
        "status": {"id": 9, "identity": {"id": identity, "labels": ["k8s:a=b"]}, "state": "ready",
            "networking": {"addressing": [{"ipv4": ip}], "node": format!("172.18.0.{host}")}}})
}

/// The identity of an IPv4 address in the kernel's ipcache.
fn identity_of(world: &World, ip: &str) -> Option<u32> {
    let wanted: std::net::IpAddr = ip.parse().unwrap();
    let state = world.kernel.observed().state;
    let value = state.maps[&MapId::Ipcache].get(IpcacheKey::new(wanted, 32).as_bytes())?;
    Some(RemoteEndpointInfo::read_from_bytes(value).ok()?.sec_identity)
}

#[tokio::test(start_paused = true)]
async fn a_node_waits_for_the_operators_word_and_says_that_it_has_no_etcd() {
    let mut world = World::with(Source::CustomResources).await;
    world.start();
    world.until("the CiliumNode exists", || !world.objects.all(&resources::CILIUM_NODE).is_empty()).await;
    world.list(&["10.0.1.0/24", "fd00::/120"]).await;
    world
        .until("the word is waited for", || {
            let pending = world.readiness.pending();
            let wanted = "the CiliumNode's status does not confirm the claim to 10.0.1.0/24 yet";
            pending.iter().any(|pending| pending.name == "podcidr" && pending.reason.contains(wanted))
        })
        .await;
    world.confirm("10.0.1.0/24", json!({"status": "in-use"})).await;
    world.confirm("fd00::/120", json!({"status": "in-use"})).await;
    world.until_ready().await;
    let Answer::Status(status) = world.ask(Request::Status).await else { panic!("no status") };
    assert_eq!((status.kvstore.state, status.kvstore.message.as_str()), (ComponentState::Disabled, ""));
    assert!(status.healthy());
    world.stop().await;
    assert_eq!(world.keys(""), [""; 0], "nobody talks to etcd");
}

#[tokio::test(start_paused = true)]
async fn a_pod_gets_an_identity_and_leaves_nothing_behind() {
    let mut world = ready().await;
    let pods = [world.pod("web-0", json!({"app": "web"})).await, world.pod("web-1", json!({"app": "web"})).await];
    for (container, pod) in ["c1", "c2"].into_iter().zip(pods) {
        world.add(container, Some(pod)).await;
    }
    world.until("the objects are there", || world.objects.all(&resources::CILIUM_ENDPOINT).len() == 2).await;
    let identities = world.objects.all(&resources::CILIUM_IDENTITY);
    assert_eq!(identities.len(), 1);
    assert_eq!(identities[0].0["security-labels"]["k8s:app"], "web");
    assert_eq!(identities[0].labels()["io.kubernetes.pod.namespace"], "shop");
    let id: u64 = identities[0].name().parse().unwrap();
    for endpoint in world.objects.all(&resources::CILIUM_ENDPOINT) {
        assert_eq!(endpoint.0["status"]["identity"]["id"], id);
        assert_eq!(endpoint.0["status"]["networking"]["node"], "172.18.0.1");
    }
    for container in ["c1", "c2"] {
        assert_eq!(world.del(container).await, Answer::Deleted);
    }
    world.until("nothing is left", || world.leftovers().is_empty()).await;
    assert_eq!(world.objects.all(&resources::CILIUM_IDENTITY).len(), 1, "the operator collects identities");
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn other_nodes_and_their_pods_become_rows() {
    let mut world = ready().await;
    other_node(&world, "n2", 2).await;
    other_node(&world, "n3", 3).await;
    world.create(resources::CILIUM_ENDPOINT, other_endpoint("far", "10.0.2.7", 2, 4711)).await;
    world.create(resources::CILIUM_ENDPOINT, other_endpoint("away", "10.0.3.7", 3, 4712)).await;
    let tunnel = rows::tunnel("10.0.2.0/24".parse().unwrap(), "172.18.0.2".parse().unwrap(), 1);
    let has = |world: &World| world.kernel.observed().state.maps[&MapId::Tunnel].contains_key(&tunnel.key);
    world.until("the tunnel exists", || has(&world)).await;
    world.until("the pod is known", || identity_of(&world, "10.0.2.7") == Some(4711)).await;

    world.delete(resources::CILIUM_ENDPOINT, &ObjectKey::namespaced("shop", "far")).await;
    world.until("the pod is forgotten", || identity_of(&world, "10.0.2.7").is_none()).await;
    world.delete(resources::CILIUM_NODE, &ObjectKey::cluster("n2")).await;
    tokio::time::sleep(Duration::from_secs(20)).await;
    assert!(has(&world), "the node went at once");
    tokio::time::sleep(Duration::from_secs(20)).await;
    assert!(!has(&world), "the node is gone");
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_lost_claim_takes_the_node_out_of_its_endpoints_and_refuses_new_pods() {
    let mut world = ready().await;
    let pod = world.pod("web-0", json!({"app": "web"})).await;
    world.add("c1", Some(pod)).await;
    let networking = |world: &World| {
        let endpoints = world.objects.all(&resources::CILIUM_ENDPOINT);
        endpoints.first().map(|endpoint| endpoint.0["status"]["networking"].clone()).unwrap_or_default()
    };
    world.until("the record is there", || networking(&world)["node"] == "172.18.0.1").await;
    world.confirm("10.0.1.0/24", Value::Null).await;
    world.until("the record went", || networking(&world)["node"] == "").await;
    assert!(networking(&world)["addressing"][0]["ipv4"].is_string(), "the operator sees that the address is in use");
    let (_, answer) = world.offer("c2", None).await;
    let Answer::Error(AgentError::TryAgain { message }) = answer else { panic!("served: {answer:?}") };
    assert!(message.contains("the claim to 10.0.1.0/24 is gone from the CiliumNode's status"), "{message}");

    world.confirm("10.0.1.0/24", json!({"status": "in-use"})).await;
    world.until("the record is back", || networking(&world)["node"] == "172.18.0.1").await;
    world.add("c2", None).await;
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn what_somebody_deletes_comes_back() {
    let mut world = ready().await;
    let pod = world.pod("web-0", json!({"app": "web"})).await;
    world.add("c1", Some(pod)).await;
    let has = |world: &World| {
        let (endpoints, identities) = (resources::CILIUM_ENDPOINT, resources::CILIUM_IDENTITY);
        !world.objects.all(&endpoints).is_empty() && !world.objects.all(&identities).is_empty()
    };
    world.until("the objects are there", || has(&world)).await;
    let identity = world.objects.all(&resources::CILIUM_IDENTITY)[0].key();
    // One more endpoint: the deletion of the last one would be held back.
    world.create(resources::CILIUM_ENDPOINT, other_endpoint("far", "10.0.2.7", 2, 4711)).await;
    world.delete(resources::CILIUM_ENDPOINT, &ObjectKey::namespaced("shop", "web-0")).await;
    world.delete(resources::CILIUM_IDENTITY, &identity).await;
    world.until("the objects are back", || has(&world)).await;
    assert_eq!(world.objects.all(&resources::CILIUM_IDENTITY)[0].key(), identity);
    let key = ObjectKey::namespaced("shop", "web-0");
    world
        .until("the endpoint is back", || world.objects.all(&resources::CILIUM_ENDPOINT).iter().any(|o| o.key() == key))
        .await;
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_restart_changes_nothing_and_ends_what_an_earlier_run_left() {
    let mut world = ready().await;
    let pod = world.pod("web-0", json!({"app": "web"})).await;
    world.add("c1", Some(pod)).await;
    world.until("the object is there", || world.objects.all(&resources::CILIUM_ENDPOINT).len() == 1).await;
    world.stop().await;
    world.create(resources::CILIUM_ENDPOINT, other_endpoint("leftover", "10.0.1.9", 1, 300)).await;
    world.create(resources::CILIUM_ENDPOINT, other_endpoint("far", "10.0.2.7", 2, 4711)).await;
    let before = world.kernel.observed();
    world.kernel.take_log();

    world.start();
    world.until_ready().await;
    let names = |world: &World| -> Vec<String> {
        world.objects.all(&resources::CILIUM_ENDPOINT).iter().map(|object| object.name().to_owned()).collect()
    };
    assert_eq!(names(&world), ["far", "web-0"]);
    world.until("the other pod is known", || identity_of(&world, "10.0.2.7") == Some(4711)).await;
    assert_eq!(world.kernel.observed().state.links, before.state.links);
    world.stop().await;
}

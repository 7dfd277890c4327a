//! The CNI contract.

use std::collections::BTreeSet;

use basal_cni::{
    api::{AgentError, Answer, CheckRequest, DelRequest, Request},
    client::Deadline,
    delete_queue::Producer,
};
use basal_datapath::op::Op;
use basal_objects::object::{ObjectKey, resources};
use serde_json::json;

use crate::world::{World, attachment};

#[tokio::test(start_paused = true)]
async fn an_add_makes_everything_and_a_del_leaves_nothing() {
    let mut world = World::ready().await;
    let pod = world.pod("web-0", json!({"app": "web", "pod-template-hash": "x"})).await;
    let result = world.add("c1", Some(pod)).await;
    let addresses: Vec<_> = result.addresses.iter().map(|address| address.address.to_string()).collect();
    assert_eq!(addresses, ["10.0.1.3/32", "fd00::3/128"]);
    assert_eq!(result.addresses[0].gateway.to_string(), "10.0.1.1");
    assert_eq!(result.host.name, attachment("c1").host_interface());

    let key = ObjectKey::namespaced("shop", "web-0");
    world
        .until("the CiliumEndpoint is ready", || {
            let all = world.objects.all(&resources::CILIUM_ENDPOINT);
            all.iter().any(|object| object.key() == key && object.0["status"]["state"] == "ready")
        })
        .await;
    let object = world.get(resources::CILIUM_ENDPOINT, &key).await.unwrap();
    let identity = object.0["status"]["identity"]["id"].as_u64().unwrap();
    assert!(identity >= 256, "{identity}");
    let labels: Vec<_> = object.0["status"]["identity"]["labels"].as_array().unwrap().to_vec();
    assert!(
        labels.contains(&json!("k8s:app=web")) && !labels.contains(&json!("k8s:pod-template-hash=x")),
        "{labels:?}"
    );
    let record = &world.kv.contents()["cilium/state/ip/v1/default/10.0.1.3"];
    let record: serde_json::Value = serde_json::from_slice(record).unwrap();
    assert_eq!((&record["ID"], &record["HostIP"]), (&json!(identity), &json!("172.18.0.1")));
    assert_eq!((&record["K8sNamespace"], &record["K8sPodName"]), (&json!("shop"), &json!("web-0")));

    assert_eq!(world.del("c1").await, Answer::Deleted);
    assert_eq!(world.del("c1").await, Answer::Deleted, "a second DEL is no error");
    world.until("nothing is left", || world.leftovers().is_empty()).await;
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn an_add_that_nobody_acknowledges_leaves_nothing() {
    let mut world = World::ready().await;
    let (stream, answer) = world.offer("c1", None).await;
    assert!(matches!(answer, Answer::Added(_)), "{answer:?}");
    assert!(!world.leftovers().is_empty());
    drop(stream);
    world.until("nothing is left", || world.leftovers().is_empty()).await;
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_label_that_changes_changes_the_identity() {
    let mut world = World::ready().await;
    let pod = world.pod("web-0", json!({"app": "web"})).await;
    world.add("c1", Some(pod)).await;
    let identity = || {
        let contents = world.kv.contents();
        let record = contents.get("cilium/state/ip/v1/default/10.0.1.3")?;
        serde_json::from_slice::<serde_json::Value>(record).ok()?["ID"].as_u64()
    };
    let before = identity().unwrap();
    let key = ObjectKey::namespaced("shop", "web-0");
    let seen = world.get(resources::POD, &key).await.unwrap();
    let patch = basal_objects::port::MergePatch {
        resource_version: seen.resource_version().to_owned(),
        uid: seen.uid().to_owned(),
        subresource: None,
        body: json!({"metadata": {"labels": {"app": "other"}}}),
    };
    assert!(basal_objects::port::Objects::patch(&*world.objects, resources::POD, &key, patch).await.is_done());
    world.until("the identity is another", || identity().is_some_and(|now| now != before)).await;
    // The reference on the old one is given back.
    world.until("one reference is left", || world.keys("cilium/state/identities/v1/value/").len() == 1).await;
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn check_sees_what_was_tampered_with() {
    let mut world = World::ready().await;
    let result = world.add("c1", None).await;
    let check = || {
        let addresses = result.addresses.iter().map(|address| address.address).collect();
        Request::Check(CheckRequest { attachment: attachment("c1"), netns: result.netns.clone(), addresses })
    };
    assert_eq!(world.ask(check()).await, Answer::Intact);
    let row = basal_datapath::rows::host("10.0.1.3".parse().unwrap());
    world.kernel.tamper(&Op::DeleteRow { map: row.map, key: row.key });
    let Answer::Error(AgentError::Damaged { message }) = world.ask(check()).await else { panic!("it is intact") };
    assert!(message.contains("cilium_lxc"), "{message}");
    let mut other = check();
    if let Request::Check(request) = &mut other {
        request.attachment.container_id = "c9".into();
    }
    assert!(matches!(world.ask(other).await, Answer::Error(AgentError::UnknownAttachment { .. })));
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn gc_removes_what_the_runtime_does_not_list() {
    let mut world = World::ready().await;
    world.add("c1", None).await;
    world.add("c2", None).await;
    let answer = world.ask(Request::Gc { valid: BTreeSet::from([attachment("c1")]) }).await;
    assert_eq!(answer, Answer::Collected { removed: BTreeSet::from([attachment("c2")]) });
    assert_eq!(world.del("c1").await, Answer::Deleted);
    world.until("nothing is left", || world.leftovers().is_empty()).await;
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn deletes_that_were_queued_are_carried_out_at_the_start() {
    let mut world = World::ready().await;
    world.add("c1", None).await;
    world.stop().await;
    let producer =
        Producer::lock(&world.path("run/deleteQueue"), Deadline::after(std::time::Duration::from_secs(1))).unwrap();
    producer.push(&DelRequest { attachment: attachment("c1") }).unwrap();
    drop(producer);
    world.start();
    world.until("nothing is left", || world.leftovers().is_empty()).await;
    world.until_ready().await;
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn addresses_are_unique_and_used_again_only_after_a_rest() {
    let mut world = World::ready().await;
    let mut seen = BTreeSet::new();
    for i in 0..20 {
        let result = world.add(&format!("c{i}"), None).await;
        assert!(seen.insert(result.addresses[0].address), "{:?}", result.addresses);
        if i % 2 == 0 {
            assert_eq!(world.del(&format!("c{i}")).await, Answer::Deleted);
        }
    }
    world.stop().await;
}

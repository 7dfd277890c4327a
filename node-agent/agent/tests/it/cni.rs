//! The CNI contract.

use std::{collections::BTreeSet, time::Duration};

use basal_agent::sync::task::{FULL_PASS_INTERVAL, MAKING_AT_ONCE};
use basal_cni::{
    api::{AddRequest, AgentError, Answer, CheckRequest, DelRequest, Request},
    client::Deadline,
    delete_queue::Producer,
};
use basal_datapath::{
    kernel::PodDevice,
    names::IfName,
    op::Op,
    state::{Hook, Link},
};
use basal_objects::object::{ObjectKey, resources};
use futures::future::join_all;
use serde_json::json;
use tokio::time::Instant;

use crate::{
    faulty::{Planned, Side},
    world::{World, acknowledge, add_request, attachment},
};

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
    let record = world.ip_record("10.0.1.3").unwrap();
    assert_eq!((&record["ID"], &record["HostIP"]), (&json!(identity), &json!("172.18.0.1")));
    assert_eq!((&record["K8sNamespace"], &record["K8sPodName"]), (&json!("shop"), &json!("web-0")));

    assert_eq!(world.del("c1").await, Answer::Deleted);
    assert_eq!(world.del("c1").await, Answer::Deleted, "a second DEL is no error");
    world.stop_clean().await;
}

#[tokio::test(start_paused = true)]
async fn an_add_that_nobody_acknowledges_leaves_nothing() {
    let mut world = World::ready().await;
    let (stream, answer) = world.offer("c1", None).await;
    assert!(matches!(answer, Answer::Added(_)), "{answer:?}");
    assert!(!world.leftovers().is_empty());
    drop(stream);
    world.stop_clean().await;
}

#[tokio::test(start_paused = true)]
async fn a_label_that_changes_changes_the_identity() {
    let mut world = World::ready().await;
    let pod = world.pod("web-0", json!({"app": "web"})).await;
    world.add("c1", Some(pod)).await;
    let identity = || world.ip_record("10.0.1.3")?["ID"].as_u64();
    let before = identity().unwrap();
    let key = ObjectKey::namespaced("shop", "web-0");
    world.patch(resources::POD, &key, None, json!({"metadata": {"labels": {"app": "other"}}})).await;
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
async fn check_looks_into_the_pod() {
    let mut world = World::ready().await;
    let result = world.add("c1", None).await;
    let check = async || {
        let addresses = result.addresses.iter().map(|address| address.address).collect();
        let request = CheckRequest { attachment: attachment("c1"), netns: result.netns.clone(), addresses };
        world.ask(Request::Check(request)).await
    };
    assert_eq!(check().await, Answer::Intact);
    let intact = world.kernel.pod("c1");
    type Change = fn(&mut PodDevice);
    let changes: [(Change, &str); 5] = [
        (|pod| pod.device.mtu = 1400, "eth0 in the pod has MTU 1400, not 1500"),
        (|pod| pod.device.addresses.clear(), "eth0 in the pod lacks the address 10.0.1.3/32"),
        (|pod| pod.routes.clear(), "the pod lacks the route default via 10.0.1.1 dev eth0 mtu 1450"),
        (|pod| pod.device.peer = Some(99), "eth0 in the pod is not the other end of lxc"),
        (|pod| pod.device.up = false, "eth0 in the pod is down"),
    ];
    for (change, expected) in changes {
        world.kernel.change_pod("c1", change);
        let answer = check().await;
        let Answer::Error(AgentError::Damaged { message }) = answer else { panic!("{expected}: {answer:?}") };
        assert!(message.contains(expected), "{message}");
        world.kernel.change_pod("c1", |pod| *pod = intact.clone());
    }
    assert_eq!(check().await, Answer::Intact);
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn check_says_what_is_wrong_on_the_host() {
    let mut world = World::ready().await;
    let result = world.add("c1", None).await;
    let name = IfName::new(&result.host.name).unwrap();
    let link = Link { up: false, ..world.kernel.observed().state.links[&name].clone() };
    for (op, expected) in [
        (Op::SetLink(name.clone(), link), format!("{name} is down")),
        (Op::Detach(Hook::Policy { id: 1 }), "slot 1 of cilium_call_policy is empty".to_owned()),
        (
            Op::Detach(Hook::Endpoint { id: 1, link: name.clone() }),
            format!("cil_from_container on {name} of endpoint 1 is not attached"),
        ),
    ] {
        world.kernel.tamper(&op);
        let addresses = result.addresses.iter().map(|address| address.address).collect();
        let request = CheckRequest { attachment: attachment("c1"), netns: result.netns.clone(), addresses };
        let answer = world.ask(Request::Check(request)).await;
        let Answer::Error(AgentError::Damaged { message }) = answer else { panic!("{expected}: {answer:?}") };
        assert!(message.contains(&expected), "{message}");
        tokio::time::sleep(FULL_PASS_INTERVAL / 2).await;
    }
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn many_pods_do_not_queue_behind_one_another() {
    let mut world = World::ready().await;
    let making = Duration::from_secs(10);
    world.kernel.make_slowly(making);
    let (before, reads, count) = (Instant::now(), world.kernel.reads(), 4 * MAKING_AT_ONCE);
    let names: Vec<String> = (0..count).map(|i| format!("c{i}")).collect();
    let results = join_all(names.iter().map(|name| world.add(name, None))).await;
    assert!(before.elapsed() < 6 * making, "{:?}", before.elapsed());
    assert_eq!(world.kernel.most_at_work(), MAKING_AT_ONCE);
    let addresses: BTreeSet<_> = results.iter().flat_map(|result| &result.addresses).map(|a| a.address).collect();
    assert_eq!(addresses.len(), 2 * count);
    assert!(world.kernel.reads() - reads <= 2, "an ADD does not read everything");
    world.kernel.make_slowly(Duration::ZERO);
    tokio::time::sleep(FULL_PASS_INTERVAL).await;
    let Answer::Status(status) = world.ask(Request::Status).await else { panic!("no status") };
    assert_eq!((status.endpoints, status.drift), (count, 0));
    let answers = join_all(names.iter().map(|name| world.del(name))).await;
    assert!(answers.iter().all(|answer| *answer == Answer::Deleted), "{answers:?}");
    world.stop_clean().await;
}

#[tokio::test(start_paused = true)]
async fn calls_for_one_container_wait_for_each_other() {
    let mut world = World::ready().await;
    world.kernel.make_slowly(Duration::from_secs(100));
    // The kernel fails the test when one interface is made twice at the same time.
    let (one, two) = futures::join!(world.try_add("c1", None), world.try_add("c1", None));
    assert!(matches!(&one.1, Answer::Error(AgentError::TryAgain { .. })), "{one:?}");
    assert_eq!(two.1, Answer::Committed);
    let Answer::Endpoints(endpoints) = world.ask(Request::Endpoints).await else { panic!("no endpoints") };
    let ips: Vec<_> = endpoints.iter().filter_map(|endpoint| endpoint.ipv4).collect();
    assert_eq!(ips, [two.0.addresses[0].address.addr()]);

    // A comparison in the middle of an ADD leaves its interface alone; a DEL waits for it.
    world.kernel.take_log();
    let reads = world.kernel.reads();
    let (added, deleted) = futures::join!(world.try_add("c2", None), async {
        tokio::time::sleep(Duration::from_secs(90)).await;
        assert!(world.kernel.reads() > reads);
        let removed = |op: &Op| matches!(op, Op::DeleteLinks(_));
        assert!(!world.kernel.take_log().iter().any(removed));
        world.del("c2").await
    });
    assert!(matches!(&added.1, Answer::Error(AgentError::TryAgain { .. })), "{added:?}");
    assert_eq!(deleted, Answer::Deleted);
    assert_eq!(world.del("c1").await, Answer::Deleted);
    world.stop_clean().await;
}

#[tokio::test(start_paused = true)]
async fn gc_removes_what_the_runtime_does_not_list() {
    let mut world = World::ready().await;
    world.add("c1", None).await;
    world.add("c2", None).await;
    let answer = world.ask(Request::Gc { valid: BTreeSet::from([attachment("c1")]) }).await;
    assert_eq!(answer, Answer::Collected { removed: BTreeSet::from([attachment("c2")]) });
    assert_eq!(world.del("c1").await, Answer::Deleted);
    world.stop_clean().await;
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

#[tokio::test(start_paused = true)]
async fn a_full_disk_is_told_and_leaves_nothing() {
    let mut world = World::ready().await;
    let name = attachment("c1").host_interface();
    let draft = world.path(&format!("run/state/endpoints/{name}.draft"));
    std::os::unix::fs::symlink("/dev/full", draft).unwrap();
    let (_, answer) = world.offer("c1", None).await;
    let Answer::Error(AgentError::TryAgain { message }) = answer else { panic!("served: {answer:?}") };
    let expected = "No space left on device (os error 28); endpoints cannot be added until it can be written";
    assert!(message.contains(&name) && message.contains(expected), "{message}");
    assert_eq!(world.leftovers(), [""; 0]);

    world.add("c1", None).await;
    assert_eq!(world.del("c1").await, Answer::Deleted);
    world.stop_clean().await;
}

#[tokio::test(start_paused = true)]
async fn pods_leave_a_full_disk() {
    let mut world = World::ready().await;
    for container in ["c1", "c2"] {
        world.add(container, None).await;
        // The next write of its record meets a full disk.
        let name = attachment(container).host_interface();
        std::os::unix::fs::symlink("/dev/full", world.path(&format!("run/state/endpoints/{name}.draft"))).unwrap();
    }
    assert_eq!(world.del("c1").await, Answer::Deleted);
    let answer = world.ask(Request::Gc { valid: BTreeSet::new() }).await;
    assert_eq!(answer, Answer::Collected { removed: [attachment("c2")].into() });
    world.stop_clean().await;
}

#[tokio::test(start_paused = true)]
async fn a_record_that_may_have_been_written_is_removed() {
    let mut world = World::ready().await;
    world.script.arm(&[Side::Node], &[Planned::lost_answer(0)]);
    let (_, answer) = world.offer("c1", None).await;
    assert!(matches!(answer, Answer::Error(AgentError::TryAgain { .. })), "{answer:?}");
    assert_eq!(world.leftovers(), [""; 0]);
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn an_interface_that_cannot_be_read_back_is_removed() {
    let mut world = World::ready().await;
    // After its record and the interface itself.
    world.script.arm(&[Side::Node], &[Planned::refusal_of_a_read(2)]);
    let (_, answer) = world.offer("c1", None).await;
    let Answer::Error(AgentError::TryAgain { message }) = answer else { panic!("served: {answer:?}") };
    assert!(message.contains("reading the kernel failed"), "{message}");
    assert_eq!(world.leftovers(), [""; 0]);
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_del_of_nothing_and_a_second_add_are_served() {
    let mut world = World::ready().await;
    assert_eq!(world.del("c1").await, Answer::Deleted);
    let first = world.add("c1", None).await;
    let second = world.add("c1", None).await;
    assert_ne!(first.addresses, second.addresses, "an address rests before it is used again");
    let Answer::Endpoints(endpoints) = world.ask(Request::Endpoints).await else { panic!("no endpoints") };
    let ips: Vec<_> = endpoints.iter().filter_map(|endpoint| endpoint.ipv4).collect();
    assert_eq!(ips, [second.addresses[0].address.addr()]);
    assert_eq!(world.del("c1").await, Answer::Deleted);
    world.stop_clean().await;
}

#[tokio::test(start_paused = true)]
async fn a_requested_address_is_given_waited_for_or_refused() {
    let mut world = World::ready().await;
    let ask = async |container: &str, ips: &[&str]| {
        let ips = ips.iter().map(|ip| ip.parse().unwrap()).collect();
        world.call(Request::Add(AddRequest { ips, ..add_request(container, None) })).await.unwrap()
    };
    let (stream, answer) = ask("c1", &["10.0.1.77"]).await;
    let Answer::Added(result) = answer else { panic!("{answer:?}") };
    let given: Vec<_> = result.addresses.iter().map(|address| address.address.addr().to_string()).collect();
    assert_eq!((given.len(), given[0].as_str()), (2, "10.0.1.77"), "the other family has one as well: {given:?}");
    assert_eq!(acknowledge(stream).await.unwrap(), Answer::Committed);
    for (ips, why) in [
        (["10.0.2.7"], "requested address 10.0.2.7 is not in this node's blocks"),
        (["10.0.1.255"], "requested address 10.0.1.255 is the first or last one"),
    ] {
        let (_, answer) = ask("c2", &ips).await;
        assert!(matches!(&answer, Answer::Error(error) if error.to_string().contains(why)), "{ips:?}: {answer:?}");
    }
    // Somebody has it, and lets it go.
    let ((stream, answer), deleted) = futures::join!(ask("c2", &["10.0.1.77"]), world.del("c1"));
    let Answer::Added(again) = answer else { panic!("{answer:?}") };
    assert_eq!((again.addresses[0].address, deleted), (result.addresses[0].address, Answer::Deleted));
    assert_eq!(acknowledge(stream).await.unwrap(), Answer::Committed);
    assert_eq!(world.del("c2").await, Answer::Deleted);
    world.stop_clean().await;
}

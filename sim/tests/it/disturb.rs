//! What each fault in the world and on the watches does, seen from a process.

use std::time::Duration;

use basal_kvstore::kv::{KvError, Op, Range, Txn};
use basal_objects::{
    object::{Object, ObjectKey, resources},
    port::{MergePatch, ObjectEvent, Objects as _, Refusal, Scope},
};
use basal_runtime::outcome::Outcome;
use basal_sim::{
    explore,
    fault::{Fault, FaultPlan},
    process::{ProcessPorts, Restart},
    world::{Options, Trouble, World},
};
use futures::StreamExt as _;
use serde_json::json;

const fn secs(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn run(plan: FaultPlan, scenario: impl AsyncFnOnce(&World) -> Result<(), Trouble>) {
    let run = explore::run(Options::seeded(1).with(plan), scenario).unwrap();
    assert_eq!(run.result, Ok(()), "{}", run.report);
}

fn put(key: &str) -> Txn {
    Txn { then: vec![Op::Put { key: key.to_owned(), value: b"1".to_vec(), lease: 0 }], ..Txn::default() }
}

fn told(world: &World) -> Vec<String> {
    let keys = world.kv().contents().into_keys();
    keys.filter_map(|key| key.strip_prefix("told/").map(str::to_owned)).collect()
}

async fn tell(ports: &ProcessPorts, number: &mut u32, what: &str) {
    *number += 1;
    assert!(ports.kv.txn(put(&format!("told/{number:02} {what}"))).await.is_done());
}

async fn create(world: &World, name: &str) {
    let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}});
    assert!(world.objects().create(resources::NODE, Object(node)).await.is_done());
}

/// Opens a watch of Nodes (call 1), asks for nothing once a second (calls 2 and on), tells what the watch says.
async fn follow(ports: ProcessPorts) {
    let mut number = 0;
    let mut nodes = ports.objects.watch(resources::NODE, &Scope::default());
    let asking = ports.clone();
    drop(ports.env.spawn(
        "asking",
        Box::pin(async move {
            loop {
                tokio::time::sleep(secs(1)).await;
                drop(asking.objects.get(resources::LEASE, &ObjectKey::cluster("none")).await);
            }
        }),
    ));
    while let Some(event) = nodes.next().await {
        let what = match event {
            Ok(ObjectEvent::Restarted) => "list".to_owned(),
            Ok(ObjectEvent::Listed(node)) => format!("listed {}", node.name()),
            Ok(ObjectEvent::InSync) => continue,
            Ok(ObjectEvent::Applied(node)) => format!("applied {}", node.name()),
            Ok(ObjectEvent::Deleted(node)) => format!("deleted {}", node.name()),
            Err(_) => "error".to_owned(),
        };
        let at = ports.env.now().as_second() - 1_767_225_600;
        tell(&ports, &mut number, &format!("{at}s {what}")).await;
    }
}

/// Two Nodes come, at 5 s and at 6 s; looks at what a watch told after 60 s. Call 3 is the process's first question (1 opens
/// the watch, 2 tells of the empty list).
fn two_nodes(fault: Option<Fault>) -> Vec<String> {
    let plan = fault.map_or_else(FaultPlan::none, |fault| FaultPlan::at(4, fault));
    let mut seen = Vec::new();
    run(plan, async |world| {
        world.start("process", Restart::Never, follow);
        world.pass(secs(5)).await?;
        create(world, "a").await;
        world.pass(secs(1)).await?;
        create(world, "b").await;
        world.pass(secs(60)).await?;
        seen = told(world);
        Ok(())
    });
    seen
}

#[test]
fn watches_of_a_process() {
    assert_eq!(two_nodes(None), ["01 0s list", "02 5s applied a", "03 6s applied b"]);
    assert_eq!(two_nodes(Some(Fault::Lag(secs(20)))), ["01 0s list", "02 22s applied a", "03 22s applied b"]);
    assert_eq!(
        two_nodes(Some(Fault::Gap(secs(0)))),
        ["01 0s list", "02 2s list", "03 5s applied a", "04 6s applied b"]
    );
    assert_eq!(
        two_nodes(Some(Fault::Gap(secs(10)))),
        ["01 0s list", "02 12s list", "03 12s listed a", "04 12s listed b"]
    );
    assert_eq!(
        two_nodes(Some(Fault::DropEvent)),
        ["01 0s list", "02 6s applied b", "03 35s list", "04 35s listed a", "05 35s listed b"]
    );
}

#[test]
fn another_api_server_is_behind_for_a_while() {
    run(FaultPlan::at(12, Fault::FailOver(1)), async |world| {
        create(world, "a").await;
        world.start("process", Restart::Never, follow);
        world.pass(secs(2)).await?;
        create(world, "b").await;
        world.pass(secs(30)).await?;
        let told = told(world);
        assert_eq!(told[..3], ["01 0s list", "02 0s listed a", "03 2s applied b"]);
        // The list does not know b any more; ten seconds later it comes again.
        assert!(
            told[3].ends_with("list") && told[4].ends_with("listed a") && told[5].ends_with("applied b"),
            "{told:?}"
        );
        Ok(())
    });
}

#[test]
fn a_lease_that_is_lost_names_nobody_and_its_requests_take_longer() {
    run(FaultPlan::at(2, Fault::LoseLease(secs(8))), async |world| {
        let lease = json!({
            "apiVersion": "coordination.k8s.io/v1", "kind": "Lease",
            "metadata": {"name": "one", "namespace": "default"}, "spec": {"holderIdentity": "process"},
        });
        assert!(world.objects().create(resources::LEASE, Object(lease)).await.is_done());
        world.start("process", Restart::Never, async |ports: ProcessPorts| {
            let key = ObjectKey::namespaced("default", "one");
            let seen = ports.objects.get(resources::LEASE, &key).await.unwrap().unwrap();
            let patch = MergePatch {
                resource_version: seen.resource_version().to_owned(),
                uid: seen.uid().to_owned(),
                subresource: None,
                body: json!({"spec": {"renewTime": "now"}}),
            };
            let renewed = ports.objects.patch(resources::LEASE, &key, patch).await;
            assert!(matches!(renewed, Outcome::Refused(Refusal::Conflict(_))));
            tell(&ports, &mut 0, "refused").await;
        });
        world.pass(secs(7)).await?;
        assert_eq!(world.objects().all(&resources::LEASE)[0].0["spec"].get("holderIdentity"), None);
        assert!(told(world).is_empty());
        world.pass(secs(2)).await?;
        assert_eq!(told(world), ["01 refused"]);
        Ok(())
    });
}

#[test]
fn a_conflict_by_the_word_of_the_server_changes_nothing() {
    run(FaultPlan::at(1, Fault::Conflict), async |world| {
        world.start("process", Restart::Never, async |ports: ProcessPorts| {
            let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "a"}});
            let created = ports.objects.create(resources::NODE, Object(node)).await;
            assert!(matches!(created, Outcome::Refused(Refusal::Conflict(_))));
            tell(&ports, &mut 0, "refused").await;
        });
        world.pass(secs(1)).await?;
        assert!(world.objects().all(&resources::NODE).is_empty());
        assert_eq!(told(world), ["01 refused"]);
        Ok(())
    });
}

/// Makes three revisions, one of them under a lease, then a watch (call 5), then reads (call 6).
async fn history(ports: ProcessPorts) {
    let Outcome::Done(lease) = ports.kv.lease_grant(secs(600)).await else { panic!("no lease") };
    let leased = Op::Put { key: "leased".to_owned(), value: b"1".to_vec(), lease: lease.id };
    assert!(ports.kv.txn(Txn { then: vec![leased], ..Txn::default() }).await.is_done());
    assert!(ports.kv.txn(put("second")).await.is_done());
    assert!(ports.kv.txn(put("third")).await.is_done());
    let mut watch = ports.kv.watch("", 2);
    let read = ports.kv.range(Range::prefix("")).await;
    let keys = read.map(|read| read.kvs.iter().map(|kv| kv.key.clone()).collect::<Vec<_>>().join(","));
    let first = watch.next().await;
    let first = match first {
        Some(Ok(batch)) => format!("{} events", batch.events.len()),
        Some(Err(KvError::Compacted { .. })) => "compacted".to_owned(),
        Some(Err(_)) => "broken".to_owned(),
        None => "ended".to_owned(),
    };
    let clock = ports.env.now().as_second() - 1_767_225_600;
    tell(&ports, &mut 0, &format!("{}; {first}; {clock}", keys.unwrap_or_else(|_| "lost".to_owned()))).await;
}

#[test]
fn what_happens_to_etcd_and_to_the_clock() {
    for (fault, expected) in [
        (Fault::EndLeases, "second,third; 4 events; 0"),
        (Fault::NewEtcdLeader, "lost; 3 events; 0"),
        (Fault::Compact, "leased,second,third; compacted; 0"),
        (Fault::Restore(1), "leased,second; 2 events; 0"),
        (Fault::Rewind(2), "leased; 1 events; 0"),
        (Fault::ClockJump(-3600), "leased,second,third; 3 events; -3600"),
    ] {
        run(FaultPlan::at(6, fault), async |world| {
            let before = world.kv().header();
            world.start("process", Restart::Never, history);
            world.pass(secs(5)).await?;
            assert_eq!(told(world), [format!("01 {expected}")], "{fault}");
            let restored = matches!(fault, Fault::Restore(_));
            assert_eq!(world.kv().header().cluster_id != before.cluster_id, restored, "{fault}");
            let put_back = restored || matches!(fault, Fault::Rewind(_));
            assert_eq!(world.rollbacks(), u64::from(put_back), "{fault}");
            Ok(())
        });
    }
}

//! What each fault does, seen from the process and from the server.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use basal_kvstore::kv::{Compare, Is, KvError, KvRefusal, Op, Range, Txn};
use basal_objects::{
    object::{Object, ObjectKey, resources},
    port::{MergePatch, Preconditions, ReadError, Refusal, Scope},
};
use basal_runtime::outcome::Outcome;
use basal_sim::{
    explore,
    fault::{Fault, FaultPlan},
    process::{ProcessPorts, Restart},
    world::{Options, Trouble, World},
};
use futures::{FutureExt as _, StreamExt as _, future::BoxFuture};
use serde_json::json;

/// Runs `program` once in a process that does not start again, with one fault, and looks at the world 10 s later.
fn with_fault<F>(call: u64, fault: Fault, program: fn(ProcessPorts) -> F, look: impl AsyncFn(&World))
where
    F: Future<Output = ()> + Send + 'static,
{
    let run = explore::run(Options::seeded(1).with(FaultPlan::at(call, fault)), async |world| {
        world.start("process", Restart::Never, program);
        world.pass(Duration::from_secs(10)).await?;
        look(world).await;
        Ok(())
    });
    let run = run.unwrap();
    assert_eq!(run.result, Ok(()), "{}", run.report);
}

fn put(key: &str) -> Txn {
    Txn { then: vec![Op::Put { key: key.to_owned(), value: b"1".to_vec(), lease: 0 }], ..Txn::default() }
}

fn stored(world: &World, key: &str) -> bool {
    world.kv().contents().contains_key(key)
}

/// What the process saw, told by a second key.
async fn tell(ports: &ProcessPorts, seen: impl Into<String>) {
    assert!(ports.kv.txn(put(&format!("seen/{}", seen.into()))).await.is_done());
}

async fn write_and_tell(ports: ProcessPorts) {
    let seen = match ports.kv.txn(put("a")).await {
        Outcome::Done(_) => "done",
        Outcome::Refused(KvRefusal::Unavailable(_)) => "unavailable",
        Outcome::Refused(_) => "refused",
        Outcome::Unknown(_) => "unknown",
    };
    tell(&ports, seen).await;
}

#[test]
fn a_write_to_etcd() {
    for (fault, happened, seen) in [
        (Fault::CrashBefore, false, None),
        (Fault::CrashAfter, true, None),
        (Fault::LoseRequest, false, Some("unknown")),
        (Fault::LoseAnswer, true, Some("unknown")),
        (Fault::Unavailable, false, Some("unavailable")),
        (Fault::Throttle, false, Some("unavailable")),
        (Fault::Delay(Duration::from_secs(5)), true, Some("done")),
        (Fault::Delay(Duration::from_secs(15)), false, None),
        (Fault::Stall(Duration::from_secs(5)), true, Some("done")),
        (Fault::Stall(Duration::from_secs(15)), false, None),
        (Fault::Overtake, true, Some("done")),
    ] {
        with_fault(1, fault, write_and_tell, async |world| {
            assert_eq!(stored(world, "a"), happened, "{fault}");
            let told: Vec<String> = world.kv().contents().into_keys().filter(|key| key.starts_with("seen/")).collect();
            assert_eq!(told, seen.map(|seen| format!("seen/{seen}")).into_iter().collect::<Vec<_>>(), "{fault}");
        });
    }
}

async fn read_and_tell(ports: ProcessPorts) {
    let seen = match ports.kv.range(Range::one("a")).await {
        Ok(_) => "done",
        Err(KvError::Unavailable(_)) => "unavailable",
        Err(_) => "refused",
    };
    tell(&ports, seen).await;
    let seen = match ports.objects.get(resources::NODE, &ObjectKey::cluster("a")).await {
        Ok(_) => "then-done",
        Err(ReadError::TooManyRequests { .. }) => "then-throttled",
        Err(_) => "then-unavailable",
    };
    tell(&ports, seen).await;
}

#[test]
fn a_read() {
    for (call, fault, seen) in [
        (1, Fault::LoseAnswer, ["seen/then-done", "seen/unavailable"]),
        (1, Fault::LoseRequest, ["seen/then-done", "seen/unavailable"]),
        (1, Fault::Unavailable, ["seen/then-done", "seen/unavailable"]),
        (1, Fault::Overtake, ["seen/done", "seen/then-done"]),
        (3, Fault::Throttle, ["seen/done", "seen/then-throttled"]),
        (3, Fault::Unavailable, ["seen/done", "seen/then-unavailable"]),
    ] {
        with_fault(call, fault, read_and_tell, async |world| {
            assert_eq!(world.kv().contents().into_keys().collect::<Vec<_>>(), seen, "{fault}");
        });
    }
}

async fn compare_and_write(ports: ProcessPorts) {
    assert!(ports.kv.txn(put("a")).await.is_done());
    let revision = ports.kv.range(Range::one("a")).await.unwrap().kvs[0].mod_revision;
    let txn = Txn { when: vec![Compare::new("a", Is::ModRevision(revision))], ..put("b") };
    let Outcome::Done(answer) = ports.kv.txn(txn).await else { panic!("no answer") };
    tell(&ports, if answer.succeeded { "then" } else { "else" }).await;
}

#[test]
fn an_overtaken_transaction_finds_its_condition_broken() {
    with_fault(3, Fault::Overtake, compare_and_write, async |world| {
        assert!(!stored(world, "b"));
        assert!(stored(world, "seen/else"));
        assert_eq!(world.kv().value("a").as_deref(), Some(&b"1"[..]), "the value is as it was");
    });
}

async fn read_patch_and_delete(ports: ProcessPorts) {
    let node = Object(json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "a"}}));
    let Outcome::Done(seen) = ports.objects.create(resources::NODE, node).await else { panic!("not created") };
    let patch = MergePatch {
        resource_version: seen.resource_version().to_owned(),
        uid: seen.uid().to_owned(),
        subresource: None,
        body: json!({"spec": {"unschedulable": true}}),
    };
    let patched = ports.objects.patch(resources::NODE, &seen.key(), patch).await;
    tell(&ports, if matches!(patched, Outcome::Refused(Refusal::Conflict(_))) { "conflict" } else { "other" }).await;
    let Some(seen) = ports.objects.get(resources::NODE, &seen.key()).await.unwrap() else { panic!("no node") };
    let only_if = Preconditions { uid: seen.uid().to_owned(), resource_version: seen.resource_version().to_owned() };
    let deleted = ports.objects.delete(resources::NODE, &seen.key(), only_if).await;
    tell(&ports, if deleted.is_done() { "deleted" } else { "kept" }).await;
}

#[test]
fn an_overtaken_patch_conflicts() {
    with_fault(2, Fault::Overtake, read_patch_and_delete, async |world| {
        assert!(stored(world, "seen/conflict"));
        assert!(stored(world, "seen/deleted"));
    });
    with_fault(5, Fault::Overtake, read_patch_and_delete, async |world| {
        assert!(stored(world, "seen/other"));
        assert!(stored(world, "seen/kept"));
    });
}

async fn watch_and_tell(ports: ProcessPorts) {
    let mut watch = ports.objects.watch(resources::NODE, &Scope::default());
    tell(&ports, if watch.next().await.is_some_and(|item| item.is_err()) { "error" } else { "event" }).await;
    assert!(watch.next().await.is_some_and(|item| item.is_ok()), "the watch goes on");
    let mut watch = ports.kv.watch("seen/", 1);
    tell(&ports, if watch.next().await.is_some_and(|item| item.is_err()) { "kv-error" } else { "kv-event" }).await;
}

#[test]
fn a_watch_that_cannot_be_opened() {
    with_fault(1, Fault::Unavailable, watch_and_tell, async |world| {
        assert_eq!(world.kv().contents().into_keys().collect::<Vec<_>>(), ["seen/error", "seen/kv-event"]);
    });
    with_fault(3, Fault::Unavailable, watch_and_tell, async |world| {
        assert_eq!(world.kv().contents().into_keys().collect::<Vec<_>>(), ["seen/event", "seen/kv-error"]);
    });
}

#[test]
fn a_request_on_its_way_arrives_without_its_sender() {
    let options = Options::seeded(1).with(FaultPlan::at(1, Fault::Delay(Duration::from_secs(60))));
    let run = explore::run(options, async |world: &World| {
        world.start("process", Restart::Never, write_and_tell);
        world.pass(Duration::from_secs(30)).await?;
        world.kill("process");
        assert!(!stored(world, "a"));
        world.pass(Duration::from_secs(31)).await?;
        assert!(stored(world, "a"));
        assert!(!stored(world, "seen/done"));
        Ok(())
    });
    assert_eq!(run.unwrap().result, Ok(()));
}

#[test]
fn a_killed_process_starts_again_and_a_stopped_one_does_not() {
    let run = explore::run(Options::seeded(1), async |world: &World| {
        let starts = Arc::new(Mutex::new(0));
        let seen = Arc::clone(&starts);
        world.start("process", Restart::After(Duration::from_secs(5)), move |ports| -> BoxFuture<'static, ()> {
            *seen.lock().unwrap() += 1;
            async move { ports.stop.cancelled().await }.boxed()
        });
        world.kill("process");
        world.pass(Duration::from_secs(4)).await?;
        assert_eq!(*starts.lock().unwrap(), 1);
        world.pass(Duration::from_secs(2)).await?;
        assert_eq!(*starts.lock().unwrap(), 2);
        world.stop("process");
        world.pass(Duration::from_secs(60)).await?;
        assert_eq!(*starts.lock().unwrap(), 2);
        Ok(())
    });
    assert_eq!(run.unwrap().result, Ok(()));
}

#[test]
fn a_panic_in_a_task_condemns_the_run() {
    let run = explore::run(Options::seeded(1), async |world: &World| {
        world.start("process", Restart::Never, async |ports: ProcessPorts| {
            drop(ports.env.spawn("bad", Box::pin(async { panic!("broken") })));
            std::future::pending::<()>().await;
        });
        world.pass(Duration::from_secs(1)).await
    });
    let run = run.unwrap();
    let Err(Trouble::Unsafe { what, .. }) = run.result else { panic!("{}", run.report) };
    assert_eq!(what, "process/1 panicked in task bad: broken");
}

//! One seed, one run.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use basal_kvstore::kv::{Compare, Is, Op, Range, Txn};
use basal_objects::{
    object::{Object, resources},
    port::Scope,
};
use basal_runtime::outcome::Outcome;
use basal_sim::{
    explore::{Run, run},
    fault::{Fault, FaultPlan},
    process::{ProcessPorts, Restart},
    world::{Options, Trouble, World},
};
use futures::{StreamExt as _, select_biased};
use serde_json::json;

const COUNTER: &str = "test/counter";

/// Raises a shared counter at random moments, in a race with its like, and tells the API server.
async fn count(ports: ProcessPorts) {
    loop {
        tokio::time::sleep(Duration::from_millis(ports.env.random_u64() % 50)).await;
        let Ok(read) = ports.kv.range(Range::one(COUNTER)).await else { continue };
        let (revision, value) = read
            .kvs
            .first()
            .map_or((0, 0), |kv| (kv.mod_revision, String::from_utf8_lossy(&kv.value).parse::<u64>().unwrap()));
        let put = Op::Put { key: COUNTER.to_owned(), value: (value + 1).to_string().into_bytes(), lease: 0 };
        let when = vec![Compare::new(COUNTER, Is::ModRevision(revision))];
        let raised = ports.kv.txn(Txn { when, then: vec![put], or_else: Vec::new() }).await;
        if !matches!(raised, Outcome::Done(answer) if answer.succeeded) {
            continue;
        }
        let name = format!("{}-{}", ports.id.name, value + 1);
        let object = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}});
        let created = ports.objects.create(resources::NODE, Object(object)).await;
        assert!(!matches!(created, Outcome::Refused(_)), "{created:?}");
    }
}

/// Follows both stores in tasks of their own and together.
async fn follow(ports: ProcessPorts) {
    let (kv, env) = (Arc::clone(&ports.kv), Arc::clone(&ports.env));
    let task = async move {
        let mut counter = kv.watch("test/", 1);
        while counter.next().await.is_some() {}
    };
    drop(env.spawn("follow-counter", Box::pin(task)));
    let mut nodes = ports.objects.watch(resources::NODE, &Scope::default()).fuse();
    let mut pods = ports.objects.watch(resources::POD, &Scope::default()).fuse();
    loop {
        select_biased! {
            node = nodes.next() => drop(node),
            pod = pods.next() => drop(pod),
        }
    }
}

async fn race(world: &World) -> Result<(), Trouble> {
    for name in ["one", "two", "three"] {
        world.start(name, Restart::After(Duration::from_millis(300)), count);
    }
    world.start("follower", Restart::Never, follow);
    world.pass(Duration::from_secs(1)).await?;
    world.kill("two");
    world.pass(Duration::from_secs(1)).await?;
    world.pause("three");
    world.pass(Duration::from_secs(1)).await?;
    world.resume("three");
    world.pass(Duration::from_secs(1)).await
}

fn trace(options: Options) -> Vec<String> {
    let run: Run = run(options, race).unwrap();
    assert_eq!(run.result, Ok(()), "{}", run.report);
    run.lines()
}

#[test]
fn one_seed_gives_one_trace() {
    let options = Options::seeded(1).with(FaultPlan::at(40, Fault::CrashAfter).and(90, Fault::LoseAnswer));
    let first = trace(options.clone());
    assert!(first.len() > 300, "only {} lines", first.len());
    assert!(first.iter().any(|line| line.contains("starts task follow-counter")), "tasks are in the trace");
    for _ in 0..200 {
        assert_eq!(trace(options.clone()), first);
    }
}

#[test]
fn seeds_give_different_orders() {
    let traces: BTreeSet<Vec<String>> = (0..10).map(|seed| trace(Options::seeded(seed))).collect();
    assert_eq!(traces.len(), 10);
}

#[test]
fn a_run_without_faults_is_the_run_with_a_fault_until_that_happens() {
    let calm = trace(Options::seeded(3));
    let crashed = trace(Options::seeded(3).with(FaultPlan::at(60, Fault::CrashBefore)));
    let departs = crashed.iter().position(|line| line.contains("[crash before]")).unwrap();
    assert_eq!(crashed[..departs], calm[..departs]);
    assert_ne!(crashed, calm);
}

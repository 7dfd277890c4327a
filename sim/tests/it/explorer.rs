//! The explorer finds a planted bug, and replays it.

use std::{collections::BTreeSet, time::Duration};

use basal_objects::{
    object::{Object, resources},
    port::{Freshness, MergePatch, Scope},
};
use basal_runtime::outcome::Outcome;
use basal_sim::{
    explore::{Failure, every_single_fault, run},
    fault::{Fault, FaultPlan},
    process::{ProcessPorts, Restart},
    safety::BlockSafety,
    world::{Options, Trouble, World},
};
use serde_json::{Value, json};

const NODES: usize = 4;

fn block(object: &Object) -> Option<&str> {
    object.0.pointer("/spec/ipam/podCIDRs/0").and_then(Value::as_str)
}

/// Gives each CiliumNode with an even, or odd, number the first block that no CiliumNode has, and claims it nowhere.
async fn careless(ports: ProcessPorts) {
    let mine = |node: &Object| {
        let number: usize = node.name().trim_start_matches('n').parse().expect("a number");
        number.is_multiple_of(2) == (ports.id.name == "even")
    };
    loop {
        tokio::time::sleep(Duration::from_secs(1)).await;
        let listed = ports.objects.list(resources::CILIUM_NODE, &Scope::default(), Freshness::Quorum).await;
        let Ok(list) = listed else { continue };
        let taken: BTreeSet<&str> = list.items.iter().filter_map(block).collect();
        let Some(node) = list.items.iter().find(|node| mine(node) && block(node).is_none()) else { continue };
        let free = (0..).map(|i| format!("10.0.{i}.0/24")).find(|cidr| !taken.contains(cidr.as_str()));
        let patch = MergePatch {
            resource_version: node.resource_version().to_owned(),
            uid: node.uid().to_owned(),
            subresource: None,
            body: json!({"spec": {"ipam": {"podCIDRs": [free]}}}),
        };
        drop(ports.objects.patch(resources::CILIUM_NODE, &node.key(), patch).await);
    }
}

/// Two careless ones that work half a second apart: that goes well as long as nothing takes long.
async fn serve(world: &World) -> Result<(), Trouble> {
    world.objects().define(&resources::CILIUM_NODE, false).expect("the first definition");
    let mut safety = BlockSafety::new("default", Duration::ZERO);
    world.watch_over(Box::new(move |world| {
        safety.look(world.kv(), world.objects()).map_err(|breach| breach.to_string())
    }));
    for i in 0..NODES {
        let node = json!({"apiVersion": "cilium.io/v2", "kind": "CiliumNode", "metadata": {"name": format!("n{i}")}});
        let created = world.user().objects.create(resources::CILIUM_NODE, Object(node)).await;
        assert!(matches!(created, Outcome::Done(_)));
    }
    world.start("even", Restart::After(Duration::from_secs(2)), careless);
    world.pass(Duration::from_millis(500)).await?;
    world.start("odd", Restart::After(Duration::from_secs(2)), careless);
    let served = |world: &World| world.objects().all(&resources::CILIUM_NODE).iter().all(|node| block(node).is_some());
    world.until("a block for every node", Duration::from_secs(120), served).await?;
    world.settle(Duration::from_secs(10), Duration::from_secs(60)).await
}

#[test]
fn what_is_only_careless_survives_crashes() {
    let faults = [Fault::CrashBefore, Fault::CrashAfter, Fault::LoseAnswer, Fault::Overtake];
    let runs = every_single_fault(&Options::seeded(1), &faults, |trace| trace, serve).unwrap();
    assert!(runs > 4 * NODES, "only {runs} runs");
}

#[test]
fn a_late_write_gives_a_block_twice_and_its_report_replays_it() {
    let late = Fault::Delay(Duration::from_millis(700));
    let Err(Failure::Broken { trouble, report }) =
        every_single_fault(&Options::seeded(1), &[late], |trace| trace, serve)
    else {
        panic!("the bug was not found")
    };
    assert!(trouble.to_string().contains("by its CiliumNode, and 10.0."), "{trouble}");
    let call: u64 = report.split("at #").nth(1).unwrap().split(';').next().unwrap().parse().unwrap();
    let options = Options::seeded(1).with(FaultPlan::at(call, late));
    assert_eq!(run(options, serve).unwrap().result, Err(trouble));
}

//! Two operators serve twenty nodes, and at every single one of their calls something goes wrong.

use std::{collections::BTreeSet, time::Duration};

use basal_sim::{
    explore::{every_single_fault, run},
    fault::{Fault, FaultPlan},
    world::{Options, Trouble, World},
};

use crate::cluster::{LIMIT, Over, add_node, cilium_nodes, is_served, operator, pod_cidrs, pool, watch_over};

const NODES: u8 = 20;

fn name(n: u8) -> String {
    format!("n{n:02}")
}

/// Nodes join one after another, the last by name first: a leader that knows more of them than its predecessor did would
/// give the free blocks to others. Ends when all nodes are served and nobody writes any more.
async fn serve(world: &World, over: Over) -> Result<(), Trouble> {
    watch_over(world);
    let pool = pool(&["10.0.0.0/16"], &["fd00::/104"]);
    operator(world, over, "a", &pool);
    operator(world, over, "b", &pool);
    for n in (1..=NODES).rev() {
        add_node(world, &name(n), n).await;
        world.pass(Duration::from_millis(500)).await?;
    }
    world.until("all nodes are served", LIMIT, |w| (1..=NODES).all(|n| is_served(w, &name(n)))).await?;
    world.settle(Duration::from_secs(60), LIMIT).await?;
    let nodes = cilium_nodes(world);
    assert!(nodes.values().all(|node| pod_cidrs(node).len() == 2), "{nodes:#?}");
    let blocks: BTreeSet<String> = nodes.values().flat_map(pod_cidrs).collect();
    assert_eq!(blocks.len(), 2 * usize::from(NODES));
    Ok(())
}

/// Runs the scenario without faults, and then with one at each of its calls.
fn explore(seed: u64, over: Over, fault: Fault) {
    let scenario = async |world: &World| serve(world, over).await;
    let runs =
        every_single_fault(&Options::seeded(seed), &[fault], scenario).unwrap_or_else(|failure| panic!("{failure}"));
    assert!(runs > 100, "only {runs} runs");
}

#[test]
fn a_crash_after_any_call_gives_every_node_its_blocks_once() {
    explore(1, Over::Etcd, Fault::CrashAfter);
}

#[test]
fn a_crash_after_any_call_without_etcd_gives_every_node_its_blocks_once() {
    explore(1, Over::CustomResources, Fault::CrashAfter);
}

#[test]
fn a_lost_answer_to_any_call_gives_every_node_its_blocks_once() {
    explore(2, Over::Etcd, Fault::LoseAnswer);
}

#[test]
fn a_lost_answer_to_any_call_without_etcd_gives_every_node_its_blocks_once() {
    explore(2, Over::CustomResources, Fault::LoseAnswer);
}

/// The leader stands still before the write leaves, long enough for the other one to lead, and then sends it.
#[test]
fn a_leader_that_wakes_up_late_gives_no_block_twice() {
    explore(4, Over::Etcd, Fault::Stall(Duration::from_secs(60)));
}

#[test]
fn a_leader_that_wakes_up_late_without_etcd_gives_no_block_twice() {
    explore(4, Over::CustomResources, Fault::Stall(Duration::from_secs(60)));
}

#[test]
fn one_seed_gives_one_trace() {
    for over in Over::BOTH {
        let options = Options::seeded(3).with(FaultPlan::at(60, Fault::CrashAfter));
        let scenario = async |world: &World| serve(world, over).await;
        let first = run(options.clone(), scenario).unwrap();
        assert_eq!(first.result, Ok(()), "{}", first.report);
        for _ in 0..10 {
            assert_eq!(run(options.clone(), scenario).unwrap().lines(), first.lines());
        }
    }
}

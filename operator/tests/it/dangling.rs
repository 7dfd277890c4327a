//! CiliumNodes that no Node stands behind: they get their time, then they go, and they do not eat the pool.

use std::time::Duration;

use basal_objects::object::{Object, resources};
use basal_sim::world::{Trouble, World};
use serde_json::{Value, json};

use crate::cluster::{
    LIMIT, Over, QUARANTINE, Setup, add_node, cilium_nodes, is_served, operator_of, pod_cidrs, pool, record, run,
};

const PATIENCE: Duration = Duration::from_secs(300);
const COLLECTED: &str = "basal_operator_ciliumnodes_collected_total";

/// Room for 64 nodes.
fn setup(over: Over) -> Setup {
    Setup::new(over, pool(&["10.0.0.0/18"], &["fd00::/114"]))
}

/// The kinds, which an operator installs otherwise.
async fn define(world: &World) {
    for definition in basal_crds::resources::crds() {
        assert!(world.user().objects.create(resources::CRD, Object(definition.object)).await.is_done());
    }
}

/// A CiliumNode without Node.
async fn leave(world: &World, name: &str, annotations: Value, pod_cidrs: &[&str]) {
    let object = json!({
        "apiVersion": "cilium.io/v2", "kind": "CiliumNode",
        "metadata": { "name": name, "annotations": annotations },
        "spec": { "addresses": [], "ipam": { "podCIDRs": pod_cidrs } },
    });
    assert!(world.user().objects.create(resources::CILIUM_NODE, Object(object)).await.is_done());
}

fn collected_events(world: &World) -> usize {
    let events = world.objects().all(&resources::EVENT);
    events.iter().filter(|event| event.0["reason"] == "CiliumNodeCollected").count()
}

/// Waits in long steps, since each look at so many objects takes time.
async fn until(world: &World, what: &str, within: Duration, holds: impl Fn(&World) -> bool) -> Result<(), Trouble> {
    let begun = tokio::time::Instant::now();
    while !holds(world) {
        if begun.elapsed() > within {
            return Err(Trouble::TimedOut { what: what.to_owned(), within });
        }
        world.pass(Duration::from_secs(5)).await?;
    }
    Ok(())
}

fn all_served(world: &World) -> bool {
    (1..=20).all(|n| is_served(world, &format!("n{n}")))
}

#[test]
fn five_hundred_of_them_do_not_eat_a_pool_of_64_blocks() {
    run(30, async |world, over| {
        define(world).await;
        // Every block of the pool is listed by one of them, so for all that anybody knows it may be in use.
        for number in 0..500 {
            let blocks = [format!("10.0.{number}.0/24"), format!("fd00::{:x}/120", number << 8)];
            let blocks: Vec<&str> = blocks.iter().filter(|_| number < 64).map(String::as_str).collect();
            leave(world, &format!("old{number}"), json!({}), &blocks).await;
        }
        let setup = setup(over);
        operator_of(world, "a", setup.clone());
        for n in 1..=20 {
            add_node(world, &format!("n{n}"), n).await;
        }
        let rest = PATIENCE + QUARANTINE + Duration::from_secs(60);
        until(world, "all nodes are served", rest, all_served).await?;
        assert_eq!(cilium_nodes(world).len(), 20);
        assert_eq!(setup.shown.value(COLLECTED), 500);
        until(world, "an event for each", LIMIT, |w| collected_events(w) == 500).await
    });
}

#[test]
fn those_that_appear_later_hold_nothing_back() {
    run(31, async |world, over| {
        let setup = setup(over);
        operator_of(world, "a", setup.clone());
        add_node(world, "n1", 1).await;
        world.until("n1 is served", LIMIT, |w| is_served(w, "n1")).await?;
        for number in 0..500 {
            leave(world, &format!("old{number}"), json!({}), &[]).await;
        }
        for n in 2..=20 {
            add_node(world, &format!("n{n}"), n).await;
        }
        until(world, "all nodes are served", Duration::from_secs(60), all_served).await?;
        assert_eq!(cilium_nodes(world).len(), 520, "they have their time");
        until(world, "they are collected", PATIENCE + Duration::from_secs(60), |w| cilium_nodes(w).len() == 20).await?;
        assert_eq!(setup.shown.value(COLLECTED), 500);
        Ok(())
    });
}

#[test]
fn a_node_that_joins_in_time_gets_the_block_that_was_written_for_it() {
    run(32, async |world, over| {
        operator_of(world, "a", setup(over));
        add_node(world, "n1", 1).await;
        world.until("n1 is served", LIMIT, |w| is_served(w, "n1")).await?;
        leave(world, "n2", json!({}), &["10.0.33.0/24"]).await;
        world.pass(PATIENCE - Duration::from_secs(10)).await?;
        assert_eq!(pod_cidrs(&cilium_nodes(world)["n2"]), ["10.0.33.0/24"]);
        add_node(world, "n2", 2).await;
        world.until("n2 is served", LIMIT, |w| is_served(w, "n2")).await?;
        assert_eq!(pod_cidrs(&cilium_nodes(world)["n2"])[0], "10.0.33.0/24");
        world.pass(PATIENCE * 2).await?;
        assert_eq!(pod_cidrs(&cilium_nodes(world)["n2"])[0], "10.0.33.0/24");
        Ok(())
    });
}

/// The first leader saw the block listed, so the ledger holds a claim for a node that never was.
#[test]
fn what_it_listed_at_the_start_of_a_term_rests_before_it_is_free() {
    run(33, async |world, over| {
        define(world).await;
        leave(world, "old", json!({}), &["10.0.0.0/24"]).await;
        let mut setup = setup(over);
        setup.pool = pool(&["10.0.0.0/24"], &["fd00::/120"]);
        operator_of(world, "a", setup);
        add_node(world, "n1", 1).await;
        world.pass(PATIENCE + QUARANTINE - Duration::from_secs(5)).await?;
        assert!(!is_served(world, "n1"), "the block waits, then it rests");
        assert!(!cilium_nodes(world).contains_key("old"));
        world.until("n1 is served then", LIMIT, |w| is_served(w, "n1")).await
    });
}

#[test]
fn an_annotation_keeps_one_without_blocks_and_zero_keeps_them_all() {
    run(34, async |world, over| {
        operator_of(world, "a", setup(over));
        add_node(world, "n1", 1).await;
        world.until("n1 is served", LIMIT, |w| is_served(w, "n1")).await?;
        leave(world, "kept", json!({ "cilium.io/do-not-gc": "true" }), &["10.0.40.0/24"]).await;
        leave(world, "old", json!({}), &["10.0.41.0/24"]).await;
        world.pass(PATIENCE * 2).await?;
        assert_eq!(pod_cidrs(&cilium_nodes(world)["kept"]), [""; 0]);
        assert!(!cilium_nodes(world).contains_key("old"));
        Ok(())
    });
    run(35, async |world, over| {
        let mut setup = setup(over);
        setup.node_gc = None;
        operator_of(world, "a", setup);
        add_node(world, "n1", 1).await;
        world.until("n1 is served", LIMIT, |w| is_served(w, "n1")).await?;
        leave(world, "old", json!({}), &["10.0.41.0/24"]).await;
        world.pass(PATIENCE * 12).await?;
        assert_eq!(pod_cidrs(&cilium_nodes(world)["old"]), ["10.0.41.0/24"]);
        assert_eq!(record(world, "old"), None);
        Ok(())
    });
}

//! What nodes bring along, and what a pool cannot give.

use std::time::Duration;

use basal_objects::object::{Object, resources};
use basal_sim::world::World;
use serde_json::json;

use crate::{
    cluster::{LIMIT, add_node, cilium_nodes, definitions, error, is_served, operator, patch, pod_cidrs, pool, run},
    endpoints::{endpoint, pod},
};

/// Notes of the Warning events with a reason.
fn warnings(world: &World, reason: &str) -> Vec<String> {
    let events = world.objects().all(&resources::EVENT).into_iter();
    events
        .filter(|event| event.0["type"] == "Warning" && event.0["reason"] == reason)
        .map(|event| event.0["note"].as_str().unwrap_or_default().to_owned())
        .collect()
}

/// As they are where Cilium ran before.
async fn create_definitions(world: &World) {
    for definition in definitions() {
        assert!(world.user().objects.create(resources::CRD, definition).await.is_done());
    }
}

/// A CiliumNode that lists a block already.
async fn carry(world: &World, name: &str, block: &str) {
    let object = json!({
        "apiVersion": "cilium.io/v2", "kind": "CiliumNode", "metadata": { "name": name },
        "spec": { "addresses": [], "ipam": { "podCIDRs": [block] } },
    });
    assert!(world.user().objects.create(resources::CILIUM_NODE, Object(object)).await.is_done());
}

#[test]
fn an_exhausted_pool_is_named_in_status_and_event() {
    run(8, async |world, over| {
        operator(world, over, "a", &pool(&["10.0.0.0/24"], &["fd00::/120"]));
        add_node(world, "n1", 1).await;
        world.until("n1 is served", LIMIT, |w| is_served(w, "n1")).await?;
        add_node(world, "n2", 2).await;
        let told = |w: &World| {
            cilium_nodes(w).get("n2").is_some_and(|object| {
                let error = error(object);
                error.starts_with("allocator full") && error.contains("10.0.0.0/24") && error.contains("append")
            })
        };
        world.until("n2 is refused", LIMIT, told).await?;
        world.until("an event says so", LIMIT, |w| !warnings(w, "PoolExhausted").is_empty()).await?;
        assert!(pod_cidrs(&cilium_nodes(world)["n2"]).is_empty(), "both families or none");
        world.stop("a");
        world.pass(Duration::from_secs(30)).await?;
        operator(world, over, "b", &pool(&["10.0.0.0/24", "10.9.0.0/24"], &["fd00::/120", "fd09::/120"]));
        world.until("the appended CIDR serves n2", LIMIT, |w| is_served(w, "n2")).await?;
        assert_eq!(pod_cidrs(&cilium_nodes(world)["n2"]), ["10.9.0.0/24", "fd09::/120"]);
        world.until("the error is gone", LIMIT, |w| error(&cilium_nodes(w)["n2"]).is_empty()).await
    });
}

#[test]
fn foreign_blocks_are_taken_out_of_the_spec_and_reported() {
    run(9, async |world, over| {
        operator(world, over, "a", &pool(&["10.0.0.0/16"], &["fd00::/104"]));
        add_node(world, "n1", 1).await;
        add_node(world, "n2", 2).await;
        world.until("both are served", LIMIT, |w| is_served(w, "n1") && is_served(w, "n2")).await?;
        let (mine, theirs) = (pod_cidrs(&cilium_nodes(world)["n1"]), pod_cidrs(&cilium_nodes(world)["n2"]));
        // The user breaks the promise here, not the operator.
        world.watch_over(Box::new(|_| Ok(())));
        for (wish, reason) in [
            ("192.168.0.0/24", "PodCIDRConflict"),
            (theirs[0].as_str(), "PodCIDRConflict"),
            ("10.0.77.1/24", "PodCIDRUnaligned"),
            ("garbage", "PodCIDRInvalid"),
        ] {
            let seen = cilium_nodes(world)["n1"].clone();
            let body = json!({ "spec": { "ipam": { "podCIDRs": [wish, mine[1]] } } });
            patch(world, resources::CILIUM_NODE, &seen, None, body).await;
            world.until("the own blocks are back", LIMIT, |w| pod_cidrs(&cilium_nodes(w)["n1"]) == mine).await?;
            world.until("an event says why", LIMIT, |w| !warnings(w, reason).is_empty()).await?;
        }
        assert_eq!(pod_cidrs(&cilium_nodes(world)["n2"]), theirs);
        Ok(())
    });
}

#[test]
fn blocks_that_nodes_bring_are_adopted_by_a_new_cluster() {
    run(10, async |world, over| {
        // Two nodes list one block before Basal begins: the promise holds from the first term on.
        world.watch_over(Box::new(|_| Ok(())));
        create_definitions(world).await;
        for (name, n) in [("n1", 1), ("n2", 2)] {
            add_node(world, name, n).await;
            carry(world, name, "10.0.40.0/24").await;
        }
        world.pass(Duration::from_secs(1)).await?;
        operator(world, over, "a", &pool(&["10.0.0.0/16"], &["fd00::/104"]));
        world.until("both are served", LIMIT, |w| is_served(w, "n1") && is_served(w, "n2")).await?;
        let first = |name: &str| pod_cidrs(&cilium_nodes(world)[name])[0].clone();
        assert_eq!(first("n1"), "10.0.40.0/24", "the first name keeps it");
        assert_ne!(first("n2"), "10.0.40.0/24", "the other one gets a fresh block");
        world.until("the loser is told", LIMIT, |w| !warnings(w, "PodCIDRNotKept").is_empty()).await
    });
}

/// The ledger is lost, and so are the CiliumNodes: what pods have addresses in is their nodes' all the same.
#[test]
fn blocks_that_only_pods_tell_of_are_their_nodes() {
    run(17, async |world, over| {
        create_definitions(world).await;
        add_node(world, "n1", 1).await;
        add_node(world, "n2", 2).await;
        // Nobody runs what the last one stands for: it waits to be collected.
        for (name, node, address) in
            [("on-n1", "n1", "10.0.40.7"), ("on-n9", "n9", "10.0.0.7"), ("of-nobody", "", "10.0.1.7")]
        {
            let uid = if node.is_empty() { "gone".to_owned() } else { pod(world, name, node, "Running").await };
            endpoint(world, name, Some(&uid), address).await;
        }
        let uid = pod(world, "done", "n2", "Succeeded").await;
        endpoint(world, "done", Some(&uid), "10.0.40.8").await;
        operator(world, over, "a", &pool(&["10.0.0.0/16"], &["fd00::/104"]));
        world.until("both are served", LIMIT, |w| is_served(w, "n1") && is_served(w, "n2")).await?;
        let first = |name: &str| pod_cidrs(&cilium_nodes(world)[name])[0].clone();
        assert_eq!(first("n1"), "10.0.40.0/24", "its pods run there");
        assert_eq!(first("n2"), "10.0.1.0/24", "the block before it rests, since there is no Node n9");
        Ok(())
    });
}

/// A listed block is its carrier's, whoever else has endpoints in it: they may be of a node that had it before.
#[test]
fn a_listed_block_is_not_given_to_whose_pods_seem_to_be_in_it() {
    run(18, async |world, over| {
        world.watch_over(Box::new(|_| Ok(())));
        create_definitions(world).await;
        add_node(world, "n1", 1).await;
        add_node(world, "n2", 2).await;
        let uid = pod(world, "on-n1", "n1", "Running").await;
        endpoint(world, "on-n1", Some(&uid), "10.0.40.7").await;
        carry(world, "n2", "10.0.40.0/24").await;
        operator(world, over, "a", &pool(&["10.0.0.0/16"], &["fd00::/104"]));
        world.until("both are served", LIMIT, |w| is_served(w, "n1") && is_served(w, "n2")).await?;
        assert_eq!(pod_cidrs(&cilium_nodes(world)["n2"])[0], "10.0.40.0/24");
        assert_ne!(pod_cidrs(&cilium_nodes(world)["n1"])[0], "10.0.40.0/24");
        Ok(())
    });
}

//! Nodes that are gone give back what they had, after a rest.

use std::time::Duration;

use basal_kvstore::kv::{Keys, Op, Txn};
use basal_objects::object::resources;
use basal_sim::{explore::every_single_fault, fault::Fault, world::Options};

use crate::{
    cluster::{
        LIMIT, Over, QUARANTINE, add_node, cilium_nodes, delete, error, is_served, is_withdrawn, operator, patch,
        pod_cidrs, pool, run, run_over,
    },
    endpoints::{endpoint, pod, warnings_of},
};

#[test]
fn the_block_of_a_gone_node_rests_before_the_next_one_gets_it() {
    run(4, async |world, over| {
        // Room for one node.
        operator(world, over, "a", &pool(&["10.0.0.0/24"], &["fd00::/120"]));
        add_node(world, "n1", 1).await;
        world.until("n1 is served", LIMIT, |w| is_served(w, "n1")).await?;
        let blocks = pod_cidrs(&cilium_nodes(world)["n1"]);
        let ip = "cilium/state/ip/v1/default/10.0.0.9";
        if over == Over::Etcd {
            let put = Op::Put { key: ip.to_owned(), value: b"{}".to_vec(), lease: 0 };
            assert!(world.user().kv.txn(Txn { then: vec![put], ..Txn::default() }).await.is_done());
        }

        delete(world, resources::NODE, "n1").await;
        world.until("nothing of n1 is published", LIMIT, |w| is_withdrawn(w, "n1")).await?;
        world.until("its addresses are gone", LIMIT, |w| !w.kv().contents().contains_key(ip)).await?;

        add_node(world, "n2", 2).await;
        let refused = |w: &basal_sim::world::World| {
            cilium_nodes(w).get("n2").is_some_and(|object| error(object).contains("quarantined"))
        };
        world.until("n2 is refused with the reason", LIMIT, refused).await?;
        let since = tokio::time::Instant::now();
        world.until("n2 is served then", LIMIT, |w| is_served(w, "n2")).await?;
        assert!(since.elapsed() >= QUARANTINE / 2, "the block has rested");
        assert_eq!(pod_cidrs(&cilium_nodes(world)["n2"]), blocks);
        world.until("the error is gone", LIMIT, |w| error(&cilium_nodes(w)["n2"]).is_empty()).await?;
        world.settle(Duration::from_secs(120), LIMIT).await
    });
}

/// An API server whose cache is behind says nothing of a Node that joined since; only the server itself can say that it is
/// gone.
#[test]
fn a_node_that_an_old_cache_does_not_know_keeps_its_blocks() {
    run(17, async |world, over| {
        operator(world, over, "a", &pool(&["10.0.0.0/16"], &["fd00::/104"]));
        add_node(world, "n1", 1).await;
        world.until("n1 is served", LIMIT, |w| is_served(w, "n1")).await?;
        let before = world.objects().revision();
        add_node(world, "n2", 2).await;
        world.until("n2 is served", LIMIT, |w| is_served(w, "n2")).await?;
        world.settle(Duration::from_secs(60), LIMIT).await?;
        let seen = cilium_nodes(world)["n2"].clone();

        let behind = world.objects().revision() - before;
        world.objects().fail_over(behind, Duration::from_secs(30));
        world.pass(Duration::from_secs(60)).await?;
        assert!(is_served(world, "n2"));
        assert_eq!(cilium_nodes(world)["n2"].resource_version(), seen.resource_version());
        assert!(!is_withdrawn(world, "n2"));
        Ok(())
    });
}

#[test]
fn a_node_that_returns_gets_its_blocks_back() {
    run(5, async |world, over| {
        operator(world, over, "a", &pool(&["10.0.0.0/16"], &["fd00::/104"]));
        for n in 1..=3 {
            add_node(world, &format!("n{n}"), n).await;
        }
        world.until("all are served", LIMIT, |w| (1..=3).all(|n| is_served(w, &format!("n{n}")))).await?;
        let blocks = pod_cidrs(&cilium_nodes(world)["n2"]);
        delete(world, resources::NODE, "n2").await;
        world.until("nothing of n2 is published", LIMIT, |w| is_withdrawn(w, "n2")).await?;
        add_node(world, "n2", 2).await;
        world.until("n2 is served again", LIMIT, |w| is_served(w, "n2")).await?;
        assert_eq!(pod_cidrs(&cilium_nodes(world)["n2"]), blocks);
        Ok(())
    });
}

#[test]
fn a_record_that_still_uses_the_block_lets_it_rest_longer() {
    run(6, async |world, over| {
        operator(world, over, "a", &pool(&["10.0.0.0/24"], &["fd00::/120"]));
        add_node(world, "n1", 1).await;
        world.until("n1 is served", LIMIT, |w| is_served(w, "n1")).await?;
        delete(world, resources::NODE, "n1").await;
        world.until("nothing of n1 is published", LIMIT, |w| is_withdrawn(w, "n1")).await?;
        let endpoint = serde_json::json!({
            "apiVersion": "cilium.io/v2", "kind": "CiliumEndpoint",
            "metadata": { "name": "late", "namespace": "default" },
            "status": { "networking": { "addressing": [{ "ipv4": "10.0.0.77" }] } },
        });
        let objects = world.user().objects;
        let endpoint = basal_objects::object::Object(endpoint);
        assert!(objects.create(resources::CILIUM_ENDPOINT, endpoint).await.is_done());
        add_node(world, "n2", 2).await;
        world.pass(QUARANTINE * 4).await?;
        assert!(!is_served(world, "n2"), "somebody still has an address of the block");
        let key = basal_objects::object::ObjectKey::namespaced("default", "late");
        let seen = objects.get(resources::CILIUM_ENDPOINT, &key).await.unwrap().unwrap();
        let only_if = basal_objects::port::Preconditions {
            uid: seen.uid().to_owned(),
            resource_version: seen.resource_version().to_owned(),
        };
        assert!(objects.delete(resources::CILIUM_ENDPOINT, &key, only_if).await.is_done());
        world.until("n2 is served then", LIMIT, |w| is_served(w, "n2")).await
    });
}

/// The full pass looks at the node, and its block comes due while the answer is on its way.
#[test]
fn a_late_answer_frees_no_block_that_pods_use() {
    const FULL_PASS: Duration = Duration::from_secs(300);
    let scenario = async |world: &basal_sim::world::World| {
        // Room for one node.
        operator(world, Over::Etcd, "a", &pool(&["10.0.0.0/24"], &["fd00::/120"]));
        add_node(world, "n1", 1).await;
        world.until("n1 is served", LIMIT, |w| is_served(w, "n1")).await?;
        let uid = pod(world, "web", "n1", "Running").await;
        endpoint(world, "web", Some(&uid), "10.0.0.9").await;
        world.pass(FULL_PASS + Duration::from_secs(5) - QUARANTINE).await?;
        delete(world, resources::NODE, "n1").await;
        world.pass(QUARANTINE + Duration::from_secs(30)).await?;
        add_node(world, "n2", 2).await;
        world.pass(Duration::from_secs(5)).await?;
        assert!(!is_served(world, "n2"), "a pod runs in its block");
        Ok(())
    };
    let late = Fault::Delay(Duration::from_secs(12));
    let runs = every_single_fault(&Options::seeded(47), &[late], |trace| trace, scenario);
    assert!(runs.unwrap_or_else(|failure| panic!("{failure}")) > 100);
}

/// The pod is on n1, so n2's block does not wait for it.
#[test]
fn an_endpoint_that_cannot_be_read_keeps_the_blocks_of_its_node() {
    run(36, async |world, over| {
        // Room for two nodes.
        operator(world, over, "a", &pool(&["10.0.0.0/23"], &["fd00::/119"]));
        for n in 1..=2 {
            add_node(world, &format!("n{n}"), n).await;
        }
        world.until("both are served", LIMIT, |w| is_served(w, "n1") && is_served(w, "n2")).await?;
        let blocks = ["n1", "n2"].map(|name| pod_cidrs(&cilium_nodes(world)[name]));
        let uid = pod(world, "web", "n1", "Running").await;
        endpoint(world, "web", Some(&uid), "10.0.0.x").await;
        for name in ["n1", "n2"] {
            delete(world, resources::NODE, name).await;
        }
        world.until("the records are gone", LIMIT, |w| is_withdrawn(w, "n1") && is_withdrawn(w, "n2")).await?;
        for n in 3..=4 {
            add_node(world, &format!("n{n}"), n).await;
        }
        world.pass(QUARANTINE * 5).await?;
        let served = |world: &basal_sim::world::World, blocks: &[String]| {
            cilium_nodes(world).values().filter(|object| pod_cidrs(object) == blocks).count()
        };
        assert_eq!((served(world, &blocks[0]), served(world, &blocks[1])), (0, 1));
        let told = warnings_of(world, "web", "EndpointUnreadable");
        assert!(told[0].contains("\"10.0.0.x\"") && told[0].contains("node n1"), "{told:?}");

        let key = basal_objects::object::ObjectKey::namespaced("default", "web");
        let seen = world.user().objects.get(resources::CILIUM_ENDPOINT, &key).await.unwrap().unwrap();
        let elsewhere = serde_json::json!({ "status": { "networking": { "addressing": [{ "ipv4": "192.0.2.7" }] } } });
        patch(world, resources::CILIUM_ENDPOINT, &seen, None, elsewhere).await;
        world.until("its block is free then", LIMIT, |w| served(w, &blocks[0]) == 1).await
    });
}

/// Nobody can tell whose it is, until the collection of CiliumEndpoints takes it away.
#[test]
fn an_endpoint_that_cannot_be_read_and_has_no_pod_keeps_every_block() {
    run(37, async |world, over| {
        operator(world, over, "a", &pool(&["10.0.0.0/24"], &["fd00::/120"]));
        add_node(world, "n1", 1).await;
        world.until("n1 is served", LIMIT, |w| is_served(w, "n1")).await?;
        world.pass(std::time::Duration::from_secs(300)).await?;
        endpoint(world, "left", None, "nonsense").await;
        delete(world, resources::NODE, "n1").await;
        add_node(world, "n2", 2).await;
        world.pass(QUARANTINE * 3).await?;
        assert!(!is_served(world, "n2"));
        world.until("n2 is served then", LIMIT, |w| is_served(w, "n2")).await
    });
}

#[test]
fn records_below_the_prefix_that_are_no_nodes_are_left_alone() {
    run_over(Over::Etcd, 7, async |world| {
        let key = "cilium/state/nodes/v1/default/NOT A NODE";
        let put = Op::Put { key: key.to_owned(), value: b"x".to_vec(), lease: 0 };
        assert!(world.user().kv.txn(Txn { then: vec![put], ..Txn::default() }).await.is_done());
        operator(world, Over::Etcd, "a", &pool(&["10.0.0.0/16"], &["fd00::/104"]));
        add_node(world, "n1", 1).await;
        world.until("n1 is served", LIMIT, |w| is_served(w, "n1")).await?;
        assert!(world.kv().contents().contains_key(key));
        let gone = Op::Delete(Keys::One(key.to_owned()));
        assert!(world.user().kv.txn(Txn { then: vec![gone], ..Txn::default() }).await.is_done());
        Ok(())
    });
}

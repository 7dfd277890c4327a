//! What is there only where claims are custom resources: the active store, cells that somebody deletes, identities.

use std::{collections::BTreeSet, time::Duration};

use basal_objects::object::{Object, Resource, resources};
use basal_sim::world::World;
use serde_json::{Value, json};

use crate::{
    cluster::{
        LIMIT, Over, add_node, cilium_nodes, delete, is_served, ledger, operator, patch, pod_cidrs, pool, run_over,
    },
    endpoints::pod,
};

/// The reasons of events about objects of a kind.
pub(crate) fn told(world: &World, resource: Resource) -> BTreeSet<String> {
    let events = world.objects().all(&resources::EVENT).into_iter();
    let of_kind = events.filter(|event| event.0["regarding"]["kind"] == resource.kind);
    of_kind.filter_map(|event| event.0["reason"].as_str().map(str::to_owned)).collect()
}

/// Whether the Ledger has a condition of this type and reason that is true.
pub(crate) fn is_condition(world: &World, kind: &str, reason: &str) -> bool {
    let conditions = ledger(world).pointer("/status/conditions").and_then(Value::as_array).cloned().unwrap_or_default();
    conditions.iter().any(|c| c["type"] == kind && c["status"] == "True" && c["reason"] == reason)
}

fn cell(world: &World, name: &str) -> Option<Object> {
    world.objects().all(&resources::POD_CIDR_CELL).into_iter().find(|object| object.name() == name)
}

#[test]
fn an_operator_for_another_store_grants_nothing_and_says_so() {
    for (active, other) in [(Over::Etcd, Over::CustomResources), (Over::CustomResources, Over::Etcd)] {
        run_over(active, 20, async |world| {
            let pool = pool(&["10.0.0.0/16"], &["fd00::/104"]);
            operator(world, active, "a", &pool);
            add_node(world, "n1", 1).await;
            world.until("n1 is served", LIMIT, |w| is_served(w, "n1")).await?;
            let written = (world.objects().all(&resources::POD_CIDR_CELL).len(), world.kv().contents().len());
            world.stop("a");
            world.pass(Duration::from_secs(10)).await?;
            operator(world, other, "b", &pool);
            add_node(world, "n2", 2).await;
            let refused = |w: &World| told(w, resources::LEDGER).contains("LedgerNotActive");
            world.until("an event says so", LIMIT, refused).await?;
            world.pass(Duration::from_secs(120)).await?;
            assert!(!cilium_nodes(world).contains_key("n2"));
            // Leases in etcd may have ended meanwhile; nothing came.
            assert_eq!(world.objects().all(&resources::POD_CIDR_CELL).len(), written.0);
            assert!(world.kv().contents().len() <= written.1);
            world.stop("b");
            world.pass(Duration::from_secs(30)).await?;
            operator(world, active, "c", &pool);
            world.until("n2 is served by the active store", LIMIT, |w| is_served(w, "n2")).await
        });
    }
}

#[test]
fn a_cell_that_somebody_deletes_goes_on_and_is_reported() {
    run_over(Over::CustomResources, 21, async |world| {
        operator(world, Over::CustomResources, "a", &pool(&["10.0.0.0/16"], &["fd00::/104"]));
        add_node(world, "n1", 1).await;
        world.until("n1 is served", LIMIT, |w| is_served(w, "n1")).await?;
        world.until("the Ledger is ready", LIMIT, |w| is_condition(w, "Ready", "Active")).await?;
        delete(world, resources::POD_CIDR_CELL, "default-10-0-0-0-16").await;
        let reported = |w: &World| told(w, resources::POD_CIDR_CELL).contains("CellDeletionRequested");
        world.until("an event says so", LIMIT, reported).await?;
        world.until("the Ledger says so", LIMIT, |w| is_condition(w, "Stalled", "CellDeletionRequested")).await?;
        add_node(world, "n2", 2).await;
        world.until("n2 is served", LIMIT, |w| is_served(w, "n2")).await?;
        let blocks = |name: &str| pod_cidrs(&cilium_nodes(world)[name]).into_iter().collect::<BTreeSet<_>>();
        assert!(blocks("n1").is_disjoint(&blocks("n2")));
        let cell = cell(world, "default-10-0-0-0-16").unwrap();
        assert!(cell.is_deleting());
        assert_eq!(cell.0["spec"]["blocks"].as_array().map(Vec::len), Some(2));
        Ok(())
    });
}

#[test]
fn a_cell_that_is_gone_is_made_anew_from_what_nodes_carry() {
    run_over(Over::CustomResources, 22, async |world| {
        operator(world, Over::CustomResources, "a", &pool(&["10.0.0.0/16"], &["fd00::/104"]));
        for n in 1..=2 {
            add_node(world, &format!("n{n}"), n).await;
        }
        world.until("both are served", LIMIT, |w| is_served(w, "n1") && is_served(w, "n2")).await?;
        let before: Vec<Vec<String>> = cilium_nodes(world).values().map(pod_cidrs).collect();
        // The user breaks the promise here, not the operator.
        world.watch_over(Box::new(|_| Ok(())));
        let seen = cell(world, "default-10-0-0-0-16").unwrap();
        let body = json!({ "metadata": { "finalizers": null } });
        patch(world, resources::POD_CIDR_CELL, &seen, None, body).await;
        delete(world, resources::POD_CIDR_CELL, "default-10-0-0-0-16").await;
        // The next claim ends the term, and with it what was still to be told.
        let reported = |w: &World| told(w, resources::POD_CIDR_CELL).contains("CellDeleted");
        world.until("an event says so", LIMIT, reported).await?;
        add_node(world, "n3", 3).await;
        world.until("n3 is served", LIMIT, |w| is_served(w, "n3")).await?;
        world.settle(Duration::from_secs(60), LIMIT).await?;
        let after: Vec<Vec<String>> = cilium_nodes(world).values().map(pod_cidrs).collect();
        assert_eq!(after[..2], before);
        assert_eq!(after.iter().flatten().collect::<BTreeSet<_>>().len(), 6);
        let cell = cell(world, "default-10-0-0-0-16").unwrap();
        assert_eq!(cell.0["spec"]["blocks"].as_array().map(Vec::len), Some(3));
        Ok(())
    });
}

/// The terms that wrote the cells last.
fn stamps(world: &World) -> BTreeSet<String> {
    let cells = world.objects().all(&resources::POD_CIDR_CELL);
    cells.iter().filter_map(|cell| Some(cell.0["spec"]["term"].as_str()?.to_owned())).collect()
}

#[test]
fn a_leader_that_is_stopped_in_order_spares_the_next_one_the_stamps_and_one_that_is_killed_does_not() {
    run_over(Over::CustomResources, 24, async |world| {
        let pool = pool(&["10.0.0.0/16"], &["fd00::/104"]);
        operator(world, Over::CustomResources, "a", &pool);
        add_node(world, "n1", 1).await;
        world.until("n1 is served", LIMIT, |w| is_served(w, "n1")).await?;
        let first = stamps(world);
        world.stop("a");
        world
            .until("the end is noted", LIMIT, |w| {
                ledger(w).pointer("/spec/ended/term").and_then(Value::as_str).is_some_and(|term| first.contains(term))
            })
            .await?;
        operator(world, Over::CustomResources, "b", &pool);
        let leads = |w: &World, other: &BTreeSet<String>| {
            ledger(w).pointer("/spec/term").and_then(Value::as_str).is_some_and(|term| !other.contains(term))
        };
        world.until("the next one leads", LIMIT, |w| leads(w, &first)).await?;
        world.settle(Duration::from_secs(60), LIMIT).await?;
        assert_eq!(stamps(world), first, "nothing to stamp, and nothing to write");

        world.kill("b");
        operator(world, Over::CustomResources, "c", &pool);
        world.until("the cells are stamped", LIMIT, |w| stamps(w).is_disjoint(&first)).await?;
        add_node(world, "n2", 2).await;
        world.until("n2 is served", LIMIT, |w| is_served(w, "n2")).await
    });
}

#[test]
fn identities_that_no_endpoint_names_are_marked_and_then_go() {
    run_over(Over::CustomResources, 23, async |world| {
        operator(world, Over::CustomResources, "a", &pool(&["10.0.0.0/16"], &["fd00::/104"]));
        add_node(world, "n1", 1).await;
        world.until("n1 is served", LIMIT, |w| is_served(w, "n1")).await?;
        let objects = world.user().objects;
        for id in ["300", "301", "not-a-number"] {
            let identity = json!({
                "apiVersion": "cilium.io/v2", "kind": "CiliumIdentity", "metadata": { "name": id },
                "security-labels": { "k8s:app": id },
            });
            assert!(objects.create(resources::CILIUM_IDENTITY, Object(identity)).await.is_done());
        }
        // Without its pod the endpoint would be collected.
        pod(world, "pod", "n1", "Running").await;
        let endpoint = json!({
            "apiVersion": "cilium.io/v2", "kind": "CiliumEndpoint",
            "metadata": { "name": "pod", "namespace": "default" },
            "status": { "identity": { "id": 300 } },
        });
        assert!(objects.create(resources::CILIUM_ENDPOINT, Object(endpoint)).await.is_done());
        let identities = |w: &World| -> Vec<String> {
            w.objects().all(&resources::CILIUM_IDENTITY).iter().map(|object| object.name().to_owned()).collect()
        };
        let marked = |w: &World| {
            let all = w.objects().all(&resources::CILIUM_IDENTITY);
            all.iter().any(|o| o.name() == "301" && o.annotations().contains_key("io.cilium.heartbeat"))
        };
        let hours = Duration::from_secs(3 * 3600);
        world.until("the unused one is marked", hours, marked).await?;
        world.until("and goes", hours, |w| identities(w) == ["300", "not-a-number"]).await?;
        world.pass(hours).await?;
        assert_eq!(identities(world), ["300", "not-a-number"]);
        Ok(())
    });
}

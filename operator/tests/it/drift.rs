//! What changes behind the operator's back, while the watches tell nothing, is found by the full pass and counted.

use std::time::Duration;

use basal_kvstore::{
    kv::{Keys, Op, Txn},
    ledger::LedgerKeys,
};
use basal_objects::object::resources;
use basal_sim::world::{Trouble, World};
use serde_json::json;

use crate::{
    cluster::{
        LIMIT, Over, Setup, add_node, cilium_nodes, delete, is_served, is_withdrawn, operator_of, patch, pod_cidrs,
        pool, record, run, run_over,
    },
    weather::Sky,
};

/// The period of the full pass, and the time that a watch may be late.
const PASS: Duration = Duration::from_secs(300 + 10);
const SOON: Duration = Duration::from_secs(30);
const KINDS: [&str; 4] = ["node", "cilium_node", "record", "ledger"];

fn drift(setup: &Setup) -> [u64; 4] {
    KINDS.map(|kind| setup.shown.value(&format!("basal_operator_drift_total{{kind=\"{kind}\"}}")))
}

/// Three nodes that are served.
async fn three(world: &World, over: Over) -> Result<Setup, Trouble> {
    let setup = Setup::new(over, pool(&["10.0.0.0/16"], &["fd00::/104"]));
    operator_of(world, "a", setup.clone());
    for n in 1..=3 {
        add_node(world, &format!("n{n}"), n).await;
    }
    world.until("all are served", LIMIT, |w| (1..=3).all(|n| is_served(w, &format!("n{n}")))).await?;
    world.pass(Duration::from_secs(5)).await?;
    Ok(setup)
}

/// Does something while no watch tells of it, and waits a while.
async fn unseen(world: &World, setup: &Setup, change: impl AsyncFnOnce(&World)) -> Result<(), Trouble> {
    setup.api_server.set(Sky::Blind);
    setup.etcd.set(Sky::Blind);
    change(world).await;
    world.pass(Duration::from_secs(1)).await?;
    setup.api_server.set(Sky::Clear);
    setup.etcd.set(Sky::Clear);
    world.pass(Duration::from_secs(60)).await
}

async fn etcd(world: &World, op: Op) {
    assert!(world.user().kv.txn(Txn { then: vec![op], ..Txn::default() }).await.is_done());
}

#[test]
fn cilium_nodes_that_were_changed_or_deleted() {
    run(40, async |world, over| {
        let setup = three(world, over).await?;
        let before = cilium_nodes(world);
        let blocks = |name: &str| pod_cidrs(&before[name]);
        unseen(world, &setup, async |world| {
            let none = json!({ "spec": { "ipam": { "podCIDRs": null } } });
            patch(world, resources::CILIUM_NODE, &before["n1"], None, none).await;
            delete(world, resources::CILIUM_NODE, "n2").await;
        })
        .await?;
        assert!(pod_cidrs(&cilium_nodes(world)["n1"]).is_empty() && !cilium_nodes(world).contains_key("n2"));
        assert_eq!(drift(&setup), [0, 0, 0, 0]);
        let back = |world: &World, name: &str| cilium_nodes(world).get(name).map(pod_cidrs) == Some(blocks(name));
        world.until("the blocks are back", PASS, |w| back(w, "n1") && back(w, "n2")).await?;
        assert_eq!(drift(&setup), [0, 2, 0, 0]);
        world.pass(PASS * 2).await?;
        assert_eq!(drift(&setup), [0, 2, 0, 0], "it is counted once");
        Ok(())
    });
}

#[test]
fn nodes_that_came_or_went() {
    run(41, async |world, over| {
        let setup = three(world, over).await?;
        unseen(world, &setup, async |world| {
            add_node(world, "n4", 4).await;
            delete(world, resources::NODE, "n3").await;
        })
        .await?;
        assert!(!is_served(world, "n4"));
        world.until("n4 is served", PASS, |w| is_served(w, "n4")).await?;
        world.until("n3 is withdrawn", SOON, |w| is_withdrawn(w, "n3")).await?;
        assert_eq!(drift(&setup)[0], 2);
        Ok(())
    });
}

#[test]
fn records_that_were_changed_deleted_or_made() {
    run_over(Over::Etcd, 42, async |world| {
        let setup = three(world, Over::Etcd).await?;
        let key = |name: &str| format!("cilium/state/nodes/v1/default/{name}");
        let before = ["n1", "n2"].map(|name| record(world, name));
        unseen(world, &setup, async |world| {
            etcd(world, Op::Put { key: key("n1"), value: b"{}".to_vec(), lease: 0 }).await;
            etcd(world, Op::Delete(Keys::One(key("n2")))).await;
            etcd(world, Op::Put { key: key("n9"), value: b"{}".to_vec(), lease: 0 }).await;
        })
        .await?;
        assert_eq!((record(world, "n2"), drift(&setup)), (None, [0, 0, 0, 0]));
        let mended = |w: &World| ["n1", "n2"].map(|name| record(w, name)) == before && record(w, "n9").is_none();
        world.until("the records are as they were", PASS, mended).await?;
        assert_eq!(drift(&setup), [0, 0, 3, 0]);
        Ok(())
    });
}

#[test]
fn cells_that_were_deleted() {
    run_over(Over::Etcd, 43, async |world| {
        let setup = three(world, Over::Etcd).await?;
        let blocks: Vec<_> = cilium_nodes(world).values().map(pod_cidrs).collect();
        // The user breaks the promise here, not the operator.
        world.watch_over(Box::new(|_| Ok(())));
        let cells = "basal/ipam/v1/default/cells/ipv4/";
        let cell = |world: &World| {
            let contents = world.kv().contents();
            contents
                .iter()
                .find(|(key, _)| key.starts_with(cells))
                .map(|(_, text)| String::from_utf8_lossy(text).into_owned())
        };
        assert!(cell(world).is_some());
        unseen(world, &setup, async |world| {
            etcd(world, Op::Delete(Keys::Prefix(cells.to_owned()))).await;
        })
        .await?;
        assert_eq!((cell(world), drift(&setup)), (None, [0, 0, 0, 0]));
        let claimed = |w: &World| cell(w).is_some_and(|text| ["n1", "n2", "n3"].iter().all(|name| text.contains(name)));
        world.until("the claims are back", PASS, claimed).await?;
        assert_eq!(drift(&setup), [0, 0, 0, 1]);
        world.pass(SOON).await?;
        assert_eq!(cilium_nodes(world).values().map(pod_cidrs).collect::<Vec<_>>(), blocks);
        Ok(())
    });
}

/// Full passes fall into the joins and leaves of nodes, and the watches are as late as a simulated one is.
#[test]
fn what_is_only_late_is_no_drift() {
    run(44, async |world, over| {
        let setup = three(world, over).await?;
        for n in 4..=120 {
            add_node(world, &format!("n{n}"), n).await;
            world.pass(Duration::from_millis(8_000 + u64::from(n) * 17)).await?;
            if n % 3 == 0 {
                delete(world, resources::NODE, &format!("n{}", n - 2)).await;
            }
        }
        assert_eq!(drift(&setup), [0, 0, 0, 0]);
        Ok(())
    });
}

/// Nobody asks for the fence where no node has anything to do, and a revision that fell has caught up.
#[test]
fn a_fence_that_went_when_etcd_was_put_back() {
    run_over(Over::Etcd, 46, async |world| {
        let setup = Setup::new(Over::Etcd, pool(&["10.0.0.0/16"], &[]));
        operator_of(world, "a", setup.clone());
        let fence = LedgerKeys::new("default").fence();
        let fenced = |world: &World| world.kv().contents().contains_key(&fence);
        world.until("a term", LIMIT, fenced).await?;
        world.pass(SOON).await?;
        let elected = |world: &World| world.objects().all(&resources::LEASE)[0].0["spec"]["acquireTime"].clone();
        let before = elected(world);
        world.kv().roll_back(1000, false);
        assert!(!fenced(world));
        for _ in 0..50 {
            etcd(world, Op::Put { key: "other".to_owned(), value: Vec::new(), lease: 0 }).await;
        }
        world.until("another term", PASS + SOON, fenced).await?;
        assert_eq!(drift(&setup), [0, 0, 0, 1]);
        assert_ne!(elected(world), before, "the Lease was given back: another replica may be able to work");
        Ok(())
    });
}

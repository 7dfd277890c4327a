//! Nodes that are there get what they need, once.

use std::{collections::BTreeSet, time::Duration};

use basal_kvstore::kv::{Keys, Op, Txn};
use basal_objects::object::resources;
use serde_json::json;

use crate::{
    cluster::{
        LIMIT, Over, Setup, add_node, cilium_nodes, confirmed, error, is_served, operator, operator_of, patch,
        pod_cidrs, pool, record, run,
    },
    endpoints::warnings_of,
};

#[test]
fn twenty_nodes_get_blocks_records_and_nothing_twice() {
    run(1, async |world, over| {
        operator(world, over, "a", &pool(&["10.0.0.0/16"], &["fd00::/104"]));
        operator(world, over, "b", &pool(&["10.0.0.0/16"], &["fd00::/104"]));
        for n in 1..=20 {
            add_node(world, &format!("n{n}"), n).await;
        }
        world.until("all nodes are served", LIMIT, |w| (1..=20).all(|n| is_served(w, &format!("n{n}")))).await?;
        let all: Vec<String> = cilium_nodes(world).values().flat_map(pod_cidrs).collect();
        assert_eq!(all.len(), 40);
        assert_eq!(all.iter().collect::<BTreeSet<_>>().len(), 40);

        let listed = pod_cidrs(&cilium_nodes(world)["n7"]);
        match record(world, "n7") {
            Some(record) => {
                assert_eq!(over, Over::Etcd);
                assert_eq!(record["Name"], "n7");
                assert_eq!(record["IPAddresses"][0], json!({ "Type": "InternalIP", "IP": "172.18.0.7" }));
                assert_eq!(listed[0], format!("{}/24", record["IPv4AllocCIDR"]["IP"].as_str().unwrap()));
            }
            None => {
                assert_eq!(over, Over::CustomResources);
                assert_eq!(confirmed(&cilium_nodes(world)["n7"]), listed);
                assert!(world.kv().contents().is_empty(), "nobody needs an etcd");
            }
        }
        let owner = &cilium_nodes(world)["n7"].0["metadata"]["ownerReferences"][0];
        assert_eq!((owner["kind"].as_str(), owner["name"].as_str()), (Some("Node"), Some("n7")));
        world.settle(Duration::from_secs(60), LIMIT).await
    });
}

/// The nodes of a cell are served while claims of later ones are written into it.
#[test]
fn nodes_that_keep_coming_do_not_hold_up_each_other() {
    const CHANGED: &str =
        "basal_operator_controller_reconciled_total{controller=\"ciliumnode\",outcome=\"LedgerChanged\"}";
    run(3, async |world, over| {
        let setup = Setup::new(over, pool(&["10.0.0.0/16"], &["fd00::/104"]));
        operator_of(world, "a", setup.clone());
        add_node(world, "n1", 1).await;
        world.until("n1 is served", LIMIT, |w| is_served(w, "n1")).await?;
        for n in 2..=60 {
            add_node(world, &format!("n{n}"), n).await;
        }
        world.until("all nodes are served", LIMIT, |w| (1..=60).all(|n| is_served(w, &format!("n{n}")))).await?;
        assert_eq!(setup.shown.value(CHANGED), 0);
        Ok(())
    });
}

#[test]
fn what_somebody_changes_or_deletes_is_put_back() {
    run(2, async |world, over| {
        operator(world, over, "a", &pool(&["10.0.0.0/16"], &["fd00::/104"]));
        add_node(world, "n1", 1).await;
        world.until("n1 is served", LIMIT, |w| is_served(w, "n1")).await?;
        let (before, text) = (pod_cidrs(&cilium_nodes(world)["n1"]), record(world, "n1"));

        let seen = cilium_nodes(world)["n1"].clone();
        patch(world, resources::CILIUM_NODE, &seen, None, json!({ "spec": { "ipam": { "podCIDRs": null } } })).await;
        world.until("the blocks are back", LIMIT, |w| pod_cidrs(&cilium_nodes(w)["n1"]) == before).await?;

        if over == Over::Etcd {
            let delete = Op::Delete(Keys::One("cilium/state/nodes/v1/default/n1".to_owned()));
            assert!(world.user().kv.txn(Txn { then: vec![delete], ..Txn::default() }).await.is_done());
            world.until("the record is back", LIMIT, |w| record(w, "n1") == text).await?;
        } else {
            let foreign = json!({ "192.168.0.0/24": { "status": "depleted" }, before[0].as_str(): null });
            let seen = cilium_nodes(world)["n1"].clone();
            let body = json!({ "status": { "ipam": { "pod-cidrs": foreign } } });
            patch(world, resources::CILIUM_NODE, &seen, Some("status"), body).await;
            let mended = |w: &basal_sim::world::World| {
                let entries = cilium_nodes(w)["n1"].0["status"]["ipam"]["pod-cidrs"].clone();
                entries.as_object().is_some_and(|entries| entries.len() == 2)
                    && confirmed(&cilium_nodes(w)["n1"]) == before
            };
            world.until("the confirmation is back, and nothing beside", LIMIT, mended).await?;
        }

        crate::cluster::delete(world, resources::CILIUM_NODE, "n1").await;
        let back = |w: &basal_sim::world::World| cilium_nodes(w).get("n1").map(pod_cidrs) == Some(before.clone());
        world.until("the CiliumNode is back with the same blocks", LIMIT, back).await
    });
}

#[test]
fn a_standby_takes_over_when_the_leader_dies() {
    run(3, async |world, over| {
        let pool = pool(&["10.0.0.0/16"], &["fd00::/104"]);
        operator(world, over, "a", &pool);
        add_node(world, "n1", 1).await;
        world.until("n1 is served", LIMIT, |w| is_served(w, "n1")).await?;
        let before = pod_cidrs(&cilium_nodes(world)["n1"]);
        operator(world, over, "b", &pool);
        world.pause("a");
        add_node(world, "n2", 2).await;
        world.until("n2 is served by the standby", LIMIT, |w| is_served(w, "n2")).await?;
        world.resume("a");
        add_node(world, "n3", 3).await;
        world.until("n3 is served", LIMIT, |w| is_served(w, "n3")).await?;
        world.settle(Duration::from_secs(60), LIMIT).await?;
        assert_eq!(pod_cidrs(&cilium_nodes(world)["n1"]), before);
        Ok(())
    });
}

#[test]
fn nodes_with_one_address_are_served_and_told() {
    run(38, async |world, over| {
        let setup = Setup::new(over, pool(&["10.0.0.0/16"], &["fd00::/104"]));
        operator_of(world, "a", setup.clone());
        for (name, number) in [("n1", 1), ("n2", 2), ("twin", 1)] {
            add_node(world, name, number).await;
        }
        world.until("all are served", LIMIT, |w| ["n1", "n2", "twin"].iter().all(|name| is_served(w, name))).await?;
        let told = |world: &basal_sim::world::World, name: &str| warnings_of(world, name, "NodeAddressShared");
        // One event on the Node and one on the CiliumNode.
        let both = |w: &basal_sim::world::World| told(w, "n1").len() == 2 && told(w, "twin").len() == 2;
        world.until("both are told", LIMIT, both).await?;
        let notes = |name: &str| told(world, name).concat();
        assert!(notes("n1").contains("172.18.0.1 is an address of this node and of twin"), "{}", notes("n1"));
        assert!(notes("twin").contains("this node and of n1"), "{}", notes("twin"));
        assert_eq!(notes("n2"), "");
        assert_eq!(setup.shown.value("basal_operator_nodes_sharing_address"), 2);
        assert!(cilium_nodes(world).values().all(|object| error(object).is_empty()), "nobody is refused");
        crate::cluster::delete(world, resources::NODE, "twin").await;
        let none = |_: &basal_sim::world::World| setup.shown.value("basal_operator_nodes_sharing_address") == 0;
        world.until("nobody shares any more", LIMIT, none).await
    });
}

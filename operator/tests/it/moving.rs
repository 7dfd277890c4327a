//! The claims are moved from one store to the other under running operators, and back.

use std::{collections::BTreeSet, time::Duration};

use basal_crds::kvstore::NodeRecord;
use basal_objects::object::{Object, ObjectKey, resources};
use basal_sim::{
    explore::every_single_fault,
    fault::Fault,
    trace::{Entry, What},
    world::{Options, Trouble, World},
};
use serde_json::{Value, json};

use crate::{
    cluster::{
        LIMIT, Over, add_node, cilium_nodes, confirmed, delete, is_served, ledger, operator, patch, pod_cidrs, pool,
        record, run_over, watch_over,
    },
    endpoints::pod,
    without_etcd::{is_condition, told},
};

const IP: &str = "cilium/state/ip/v1/default/10.0.0.9";
const FENCE: &str = "basal/ipam/v1/default/fence";

fn start(world: &World, over: Over, names: &[&str]) {
    for name in names {
        operator(world, over, name, &pool(&["10.0.0.0/16"], &["fd00::/104"]));
    }
}

/// What `kubectl patch ledger default --type merge` does.
async fn ask(world: &World, spec: Value) {
    let seen = world.objects().all(&resources::LEDGER).remove(0);
    patch(world, resources::LEDGER, &seen, None, json!({ "spec": spec })).await;
}

fn says(world: &World, store: &str, move_to: Option<&str>, leaving: Option<&str>) -> bool {
    let spec = ledger(world)["spec"].clone();
    spec["store"] == store && spec["moveTo"].as_str() == move_to && spec["leaving"].as_str() == leaving
}

fn blocks(world: &World) -> Vec<(String, Vec<String>)> {
    cilium_nodes(world).iter().map(|(name, object)| (name.clone(), pod_cidrs(object))).collect()
}

/// Whether a node's blocks are known to agents with etcd and to agents without.
fn is_known_twice(world: &World, name: &str) -> bool {
    let Some(object) = cilium_nodes(world).remove(name) else { return false };
    let Some(record) = record(world, name) else { return false };
    let record = NodeRecord::parse(record.to_string().as_bytes()).unwrap();
    let recorded: Vec<String> = record.cidrs().map(|cidr| cidr.to_string()).collect();
    let listed = pod_cidrs(&object);
    listed.len() == 2 && confirmed(&object) == listed && recorded == listed
}

/// What the Ledger's condition says.
fn message(world: &World) -> String {
    let conditions = ledger(world)["status"]["conditions"].clone();
    let ready = conditions.as_array().into_iter().flatten().find(|one| one["type"] == "Ready");
    ready.and_then(|one| one["message"].as_str()).unwrap_or_default().to_owned()
}

/// What an agent writes when it starts.
async fn agent_says(world: &World, node: &str, store: &str) {
    let seen = cilium_nodes(world).remove(node).unwrap();
    let body = json!({ "metadata": { "annotations": { "basal.io/agent-store": store } } });
    patch(world, resources::CILIUM_NODE, &seen, None, body).await;
}

fn text(world: &World, key: &str) -> String {
    let value = world.kv().value(key).unwrap_or_default();
    String::from_utf8(value).unwrap()
}

fn identities(world: &World) -> BTreeSet<String> {
    world.objects().all(&resources::CILIUM_IDENTITY).iter().map(|object| object.name().to_owned()).collect()
}

async fn create(world: &World, resource: basal_objects::object::Resource, object: Value) {
    assert!(world.user().objects.create(resource, Object(object)).await.is_done());
}

async fn identity(world: &World, id: &str) {
    let object = json!({
        "apiVersion": "cilium.io/v2", "kind": "CiliumIdentity", "metadata": { "name": id },
        "security-labels": { "k8s:app": id },
    });
    create(world, resources::CILIUM_IDENTITY, object).await;
}

/// A pod with its endpoint, as an agent publishes it in either mode.
async fn endpoint(world: &World, name: &str, address: &str, identity: u32) {
    let uid = pod(world, name, "n1", "Running").await;
    let object = json!({
        "apiVersion": "cilium.io/v2", "kind": "CiliumEndpoint",
        "metadata": { "name": name, "namespace": "default",
            "ownerReferences": [{ "apiVersion": "v1", "kind": "Pod", "name": name, "uid": uid }] },
        "status": { "identity": { "id": identity }, "networking": {
            "addressing": [{ "ipv4": address }], "node": "172.18.0.1" } },
    });
    create(world, resources::CILIUM_ENDPOINT, object).await;
}

async fn put(world: &World, key: &str, value: &str) {
    use basal_kvstore::kv::{Op, Txn};
    let put = Op::Put { key: key.to_owned(), value: value.into(), lease: 0 };
    assert!(world.user().kv.txn(Txn { then: vec![put], ..Txn::default() }).await.is_done());
}

/// Starts with three nodes and claims in a store.
async fn three_nodes(world: &World, over: Over) -> Result<(), Trouble> {
    start(world, over, &["a", "b"]);
    for n in 1..=3 {
        add_node(world, &format!("n{n}"), n).await;
    }
    world.until("all are served", LIMIT, |w| (1..=3).all(|n| is_served(w, &format!("n{n}")))).await
}

#[test]
fn claims_go_to_etcd_and_back_and_agents_read_both_places_meanwhile() {
    run_over(Over::CustomResources, 40, async |world| {
        three_nodes(world, Over::CustomResources).await?;
        let before = blocks(world);
        identity(world, "300").await;
        endpoint(world, "web", "10.0.0.9", 300).await;
        // Of an earlier time with etcd.
        put(world, "cilium/state/identities/v1/id/299", "k8s:app=300;").await;
        put(world, "cilium/state/nodes/v1/default/gone", "{}").await;

        ask(world, json!({ "moveTo": "etcd" })).await;
        world.until("it waits for an operator with etcd", LIMIT, |w| is_condition(w, "Ready", "MoveRequested")).await?;
        world.stop("a");
        world.stop("b");
        start(world, Over::Etcd, &["c", "d"]);
        world.until("etcd is active", LIMIT, |w| says(w, "etcd", None, Some("custom-resources"))).await?;
        assert!(text(world, "cilium/state/identities/v1/id/299").is_empty());
        assert_eq!(text(world, "cilium/state/identities/v1/id/300"), "k8s:app=300;");
        assert!(text(world, IP).contains(r#""ID":300"#), "{}", text(world, IP));
        assert!(record(world, "gone").is_none());
        assert!((1..=3).all(|n| is_known_twice(world, &format!("n{n}"))));
        world.until("an event says so", LIMIT, |w| told(w, resources::LEDGER).contains("LedgerMoved")).await?;
        world.until("the Ledger says what is left to do", LIMIT, |w| is_condition(w, "Ready", "LeavingStore")).await?;

        add_node(world, "n4", 4).await;
        world.until("a new node is known in both places", LIMIT, |w| is_known_twice(w, "n4")).await?;
        identity(world, "301").await;
        put(world, "cilium/state/identities/v1/id/302", "k8s:app=302;").await;
        let exchanged =
            |w: &World| identities(w).contains("302") && text(w, "cilium/state/identities/v1/id/301") == "k8s:app=301;";
        world.until("identities are exchanged", LIMIT, exchanged).await?;
        endpoint(world, "db", "10.0.0.10", 301).await;
        world
            .until("a new pod is known", LIMIT, |w| !text(w, "cilium/state/ip/v1/default/10.0.0.10").is_empty())
            .await?;
        let key = ObjectKey::namespaced("default", "web");
        let seen = world.user().objects.get(resources::CILIUM_ENDPOINT, &key).await.unwrap().unwrap();
        let only_if = basal_objects::port::Preconditions {
            uid: seen.uid().to_owned(),
            resource_version: seen.resource_version().to_owned(),
        };
        assert!(world.user().objects.delete(resources::CILIUM_ENDPOINT, &key, only_if).await.is_done());
        world.until("a pod that is gone is forgotten", LIMIT, |w| text(w, IP).is_empty()).await?;

        let (some, all) = ("1 of 4 agents are changed", "4 of 4 agents are changed");
        agent_says(world, "n1", "etcd").await;
        world.until("a changed agent is counted", LIMIT, |w| message(w).contains(some)).await?;
        for n in 2..=4 {
            agent_says(world, &format!("n{n}"), "etcd").await;
        }
        world.until("all agents are changed", LIMIT, |w| is_condition(w, "Ready", "AgentsChanged")).await?;
        assert!(message(world).contains(all), "{}", message(world));

        ask(world, json!({ "leaving": null })).await;
        world.until("etcd alone", LIMIT, |w| is_condition(w, "Ready", "Active")).await?;
        assert_eq!(blocks(world)[..3], before);

        // The leader reaches both stores, so that it goes on with the other one at once.
        ask(world, json!({ "moveTo": "custom-resources" })).await;
        world.until("custom resources are active", LIMIT, |w| says(w, "custom-resources", None, Some("etcd"))).await?;
        assert!(text(world, FENCE).starts_with("sealed-"));
        assert!((1..=4).all(|n| is_known_twice(world, &format!("n{n}"))));
        add_node(world, "n5", 5).await;
        world.until("a new node is known in both places", LIMIT, |w| is_known_twice(w, "n5")).await?;
        delete(world, resources::NODE, "n4").await;
        world
            .until("one that is gone in neither", LIMIT, |w| {
                !cilium_nodes(w).contains_key("n4") && record(w, "n4").is_none()
            })
            .await?;

        world.stop("c");
        world.stop("d");
        start(world, Over::CustomResources, &["e"]);
        world.until("without etcd", LIMIT, |w| says(w, "custom-resources", None, None)).await?;
        add_node(world, "n6", 6).await;
        world.until("a new node is served", LIMIT, |w| is_served(w, "n6")).await?;
        assert!(record(world, "n6").is_none());
        let after = blocks(world);
        assert_eq!(after[..3], before);
        assert_eq!(after.iter().flat_map(|(_, blocks)| blocks).collect::<BTreeSet<_>>().len(), 10);
        Ok(())
    });
}

/// Nobody asked for it, or somebody changed their mind.
#[test]
fn a_move_that_is_called_off_leaves_the_old_store_at_work() {
    run_over(Over::CustomResources, 41, async |world| {
        three_nodes(world, Over::CustomResources).await?;
        let cell = "basal/ipam/v1/default/cells/ipv4/10.0.0.0/16";
        put(world, cell, "torn").await;
        ask(world, json!({ "moveTo": "etcd" })).await;
        world.stop("a");
        world.stop("b");
        start(world, Over::Etcd, &["c"]);
        world.until("it stops before the seal", LIMIT, |w| is_condition(w, "Stalled", "MoveStopped")).await?;
        assert!(!ledger(world)["spec"]["term"].as_str().unwrap().starts_with("sealed-"));
        ask(world, json!({ "moveTo": null })).await;
        let refused = |w: &World| told(w, resources::LEDGER).contains("LedgerNotActive");
        world.until("the operator with etcd refuses", LIMIT, refused).await?;
        world.stop("c");
        start(world, Over::CustomResources, &["d"]);
        add_node(world, "n4", 4).await;
        world.until("n4 is served", LIMIT, |w| is_served(w, "n4")).await?;

        // A mover that died after the seal.
        world.stop("d");
        world.pass(Duration::from_secs(30)).await?;
        ask(world, json!({ "moveTo": "etcd", "term": "sealed-1" })).await;
        start(world, Over::CustomResources, &["e"]);
        add_node(world, "n5", 5).await;
        let sealed = |w: &World| told(w, resources::LEDGER).contains("LedgerSealed");
        world.until("the seal is respected", LIMIT, sealed).await?;
        world.pass(Duration::from_secs(60)).await?;
        assert!(!cilium_nodes(world).contains_key("n5"));
        ask(world, json!({ "moveTo": null })).await;
        world.until("n5 is served", LIMIT, |w| is_served(w, "n5")).await
    });
}

/// Against the rules of the API, which keep an administrator from it.
#[test]
fn a_leader_sees_within_its_term_that_its_store_is_not_the_active_one() {
    for (over, other) in [(Over::Etcd, "custom-resources"), (Over::CustomResources, "etcd")] {
        run_over(over, 42, async |world| {
            three_nodes(world, over).await?;
            world.until("the Ledger is ready", LIMIT, |w| is_condition(w, "Ready", "Active")).await?;
            world.watch_over(Box::new(|_| Ok(())));
            ask(world, json!({ "store": other })).await;
            let refused = |w: &World| told(w, resources::LEDGER).contains("LedgerNotActive");
            world.until("it refuses", LIMIT, refused).await?;
            add_node(world, "n4", 4).await;
            world.pass(Duration::from_secs(60)).await?;
            assert!(!cilium_nodes(world).contains_key("n4"));
            Ok(())
        });
    }
}

/// Moves the claims out of a store, with operators of both kinds around, and serves one node more.
async fn moves(world: &World, from: Over) -> Result<(), Trouble> {
    watch_over(world);
    start(world, from, &["a"]);
    for n in 1..=2 {
        add_node(world, &format!("n{n}"), n).await;
    }
    world.until("both are served", LIMIT, |w| is_served(w, "n1") && is_served(w, "n2")).await?;
    let before = blocks(world);
    identity_for(world, from).await;
    let to = if from == Over::Etcd { "custom-resources" } else { "etcd" };
    ask(world, json!({ "moveTo": to })).await;
    start(world, Over::Etcd, &["b", "c"]);
    world
        .until("the claims are moved", LIMIT, |w| {
            // One that crashed was started again.
            w.stop("a");
            ledger(w)["spec"]["store"] == to
        })
        .await?;
    add_node(world, "n3", 3).await;
    world.until("n3 is served", LIMIT, |w| is_served(w, "n3")).await?;
    world.until("agents may be changed", LIMIT, |w| is_condition(w, "Ready", "LeavingStore")).await?;
    world.settle(Duration::from_secs(60), LIMIT).await?;
    let after = blocks(world);
    assert_eq!(after[..2], before);
    assert_eq!(after.iter().flat_map(|(_, blocks)| blocks).collect::<BTreeSet<_>>().len(), 6);
    assert!(identities(world).contains("300"));
    assert_eq!(text(world, "cilium/state/identities/v1/id/300"), "k8s:app=300;");
    Ok(())
}

async fn identity_for(world: &World, from: Over) {
    match from {
        Over::Etcd => put(world, "cilium/state/identities/v1/id/300", "k8s:app=300;").await,
        Over::CustomResources => identity(world, "300").await,
    }
}

/// What happens between the request and the new node.
fn during(trace: &[Entry]) -> &[Entry] {
    let at = |trace: &[Entry], words: &str| {
        let by_user = |entry: &Entry| {
            let is_user = entry.who.as_ref().is_some_and(|who| who.name == "user");
            is_user && matches!(&entry.what, What::Call { call, .. } if call.request.contains(words))
        };
        trace.iter().position(by_user).unwrap()
    };
    let asked = &trace[at(trace, "patch ledgers")..];
    &asked[..at(asked, "create nodes")]
}

/// Runs the scenario, and then once for each of those calls with a fault at it.
fn explore(seed: u64, fault: Fault) {
    for from in Over::BOTH {
        let scenario = async |world: &World| moves(world, from).await;
        let runs = every_single_fault(&Options::seeded(seed), &[fault], during, scenario)
            .unwrap_or_else(|failure| panic!("out of {from:?}: {failure}"));
        assert!(runs > 20, "only {runs} runs");
    }
}

#[test]
fn a_crash_after_any_call_of_a_move_is_made_good() {
    explore(43, Fault::CrashAfter);
}

#[test]
fn a_lost_answer_to_any_call_of_a_move_is_made_good() {
    explore(44, Fault::LoseAnswer);
}

#[test]
fn a_mover_that_wakes_up_late_moves_nothing() {
    explore(45, Fault::Stall(Duration::from_secs(60)));
}

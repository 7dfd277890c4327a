//! Days on which a server does not do what it should, a clock is wrong, or somebody changes the pool: what is served stays
//! served, `/readyz` says what is wrong, and what was left undone is done afterwards.

use std::{collections::BTreeMap, time::Duration};

use basal_objects::object::resources;
use basal_sim::world::{Trouble, World};
use serde_json::{Value, json};

use crate::{
    cluster::{
        LIMIT, Over, Setup, add_node, cilium_nodes, delete, error, is_served, leader, ledger, operator, operator_of,
        patch, pod_cidrs, pool, pool_of, record, run, run_over,
    },
    weather::{Sky, Weather},
};

const MINUTE: Duration = Duration::from_secs(60);

fn names(count: u8) -> impl Iterator<Item = String> {
    (1..=count).map(|n| format!("n{n}"))
}

async fn add_nodes(world: &World, numbers: impl Iterator<Item = u8>) {
    for n in numbers {
        add_node(world, &format!("n{n}"), n).await;
    }
}

fn all_served(count: u8) -> impl Fn(&World) -> bool {
    move |world| names(count).all(|name| is_served(world, &name))
}

/// Blocks and record of each node.
fn published(world: &World) -> BTreeMap<String, (Vec<String>, Option<Value>)> {
    let nodes = cilium_nodes(world);
    nodes.iter().map(|(name, object)| (name.clone(), (pod_cidrs(object), record(world, name)))).collect()
}

/// What a condition of the Ledger says, while it holds.
fn condition(world: &World, kind: &str) -> String {
    let conditions = ledger(world).pointer("/status/conditions").and_then(Value::as_array).cloned().unwrap_or_default();
    let holding = conditions.iter().find(|condition| condition["type"] == kind && condition["status"] == "True");
    holding.and_then(|condition| condition["message"].as_str()).unwrap_or_default().to_owned()
}

/// The notes of events with a reason.
fn events(world: &World, reason: &str) -> Vec<String> {
    let events = world.objects().all(&resources::EVENT).into_iter().filter(|event| event.0["reason"] == reason);
    events.map(|event| event.0["note"].as_str().unwrap_or_default().to_owned()).collect()
}

/// Two nodes that are served by two replicas under one weather, each of which shows its own readiness.
async fn two_replicas(world: &World, over: Over) -> Result<[Setup; 2], Trouble> {
    let first = Setup::new(over, pool(&["10.0.0.0/16"], &["fd00::/104"]));
    let second = Setup { readiness: crate::cluster::LastReadiness::default(), ..first.clone() };
    operator_of(world, "a", first.clone());
    operator_of(world, "b", second.clone());
    add_nodes(world, 1..=2).await;
    world.until("both are served", LIMIT, all_served(2)).await?;
    let ready = |_: &World| first.readiness.pending().is_empty() && second.readiness.pending().is_empty();
    world.until("both replicas are ready", LIMIT, ready).await?;
    Ok([first, second])
}

/// A server has a bad time, while nodes join: nothing that is published changes, both replicas say on `/readyz` what is wrong,
/// and afterwards the new nodes are served.
async fn bad_time(
    world: &World,
    setups: &[Setup; 2],
    weather: &Weather,
    (sky, lasts): (Sky, Duration),
    says: &str,
) -> Result<(), Trouble> {
    let before = published(world);
    weather.set(sky);
    add_nodes(world, 3..=6).await;
    world.pass(lasts).await?;
    for setup in setups {
        let pending = setup.readiness.pending();
        assert!(pending.iter().any(|why| why.contains(says)), "{sky:?}: {pending:?}");
    }
    assert_eq!(published(world), before, "{sky:?}");
    weather.set(Sky::Clear);
    world.until("all are served", LIMIT, all_served(6)).await?;
    let ready = |_: &World| setups.iter().all(|setup| setup.readiness.pending().is_empty());
    world.until("both replicas are ready again", LIMIT, ready).await?;
    let after = published(world);
    assert!(before.iter().all(|(name, was)| after[name] == *was), "{sky:?}");
    world.settle(MINUTE, LIMIT).await
}

#[test]
fn an_api_server_that_is_away_for_ten_minutes() {
    run(60, async |world, over| {
        let setups = two_replicas(world, over).await?;
        let away = (Sky::Away, 10 * MINUTE);
        bad_time(world, &setups, &setups[0].api_server, away, "API server: the API server did not answer").await
    });
}

#[test]
fn an_api_server_that_asks_for_pauses_for_a_minute() {
    run(61, async |world, over| {
        let setups = two_replicas(world, over).await?;
        bad_time(world, &setups, &setups[0].api_server, (Sky::Throttled, MINUTE), "API server").await
    });
}

#[test]
fn an_etcd_that_is_away_or_full() {
    run_over(Over::Etcd, 62, async |world| {
        let setups = two_replicas(world, Over::Etcd).await?;
        let (leads, etcd) = (leader(world), &setups[0].etcd);
        bad_time(world, &setups, etcd, (Sky::Away, 10 * MINUTE), "etcd: etcd did not take the request").await?;
        assert_eq!(leader(world), leads, "a leader without etcd leads on: another one could do no more");
        Ok(())
    });
    run_over(Over::Etcd, 63, async |world| {
        let setups = two_replicas(world, Over::Etcd).await?;
        bad_time(world, &setups, &setups[0].etcd, (Sky::Full, 2 * MINUTE), "etcd: etcd is full").await
    });
}

#[test]
fn an_etcd_that_takes_seconds_for_each_answer() {
    run_over(Over::Etcd, 64, async |world| {
        let [setup, _] = two_replicas(world, Over::Etcd).await?;
        let leads = leader(world);
        setup.etcd.set(Sky::Slow(Duration::from_secs(4)));
        add_nodes(world, 3..=12).await;
        world.until("the nodes are served, slowly", LIMIT, all_served(12)).await?;
        assert_eq!(leader(world), leads, "the Lease does not wait for etcd");
        setup.etcd.set(Sky::Clear);
        world.settle(MINUTE, LIMIT).await
    });
}

/// Of a node whose addresses change the record is all that changes, and nothing else would bring the node up again before
/// the next full pass.
#[test]
fn a_record_that_got_lost_is_written_again() {
    run_over(Over::Etcd, 65, async |world| {
        let setup = Setup::new(Over::Etcd, pool(&["10.0.0.0/16"], &["fd00::/104"]));
        operator_of(world, "a", setup.clone());
        add_node(world, "n1", 1).await;
        world.until("n1 is served", LIMIT, |w| is_served(w, "n1")).await?;
        world.pass(MINUTE).await?;
        let before = record(world, "n1");
        setup.etcd.set(Sky::Lossy);
        let moved = json!({ "addresses": [{ "type": "InternalIP", "ip": "172.18.0.9" }] });
        patch(world, resources::CILIUM_NODE, &cilium_nodes(world)["n1"], None, json!({ "spec": moved })).await;
        world.pass(Duration::from_secs(10)).await?;
        assert_eq!(record(world, "n1"), before);
        setup.etcd.set(Sky::Clear);
        let renewed = |w: &World| record(w, "n1").is_some_and(|it| it["IPAddresses"][0]["IP"] == "172.18.0.9");
        world.until("the record follows", MINUTE, renewed).await
    });
}

#[test]
fn two_clusters_of_one_name_do_not_share_an_etcd() {
    run_over(Over::Etcd, 66, async |world| {
        let setup = Setup::new(Over::Etcd, pool(&["10.0.0.0/16"], &["fd00::/104"]));
        operator_of(world, "a", setup.clone());
        add_node(world, "n1", 1).await;
        world.until("n1 is served", LIMIT, |w| is_served(w, "n1")).await?;
        world.stop("a");
        world.pass(MINUTE).await?;
        // The same API server with another uid of kube-system is another cluster to whoever asks.
        delete(world, resources::NAMESPACE, "kube-system").await;
        let namespace = json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": "kube-system" } });
        let made = world.user().objects.create(resources::NAMESPACE, basal_objects::object::Object(namespace)).await;
        assert!(made.is_done());
        let (before, keys) = (published(world), world.kv().contents());
        add_node(world, "n2", 2).await;
        operator_of(world, "b", setup.clone());
        let told = |w: &World| events(w, "LedgerOfAnotherCluster").iter().any(|note| note.contains("cluster-name"));
        world.until("an event says so", LIMIT, told).await?;
        let pending = setup.readiness.pending();
        assert!(pending.iter().any(|why| why.starts_with("etcd: the key basal/ipam/v1/default/owner")), "{pending:?}");
        assert_eq!(published(world), before);
        let basal = |contents: BTreeMap<String, Vec<u8>>| -> BTreeMap<String, Vec<u8>> {
            contents.into_iter().filter(|(key, _)| key.starts_with("basal/")).collect()
        };
        assert_eq!(basal(world.kv().contents()), basal(keys), "not even the fence");
        Ok(())
    });
}

#[test]
fn a_pool_that_is_changed_takes_nothing_away() {
    run(67, async |world, over| {
        operator(world, over, "a", &pool(&["10.0.0.0/24", "10.1.0.0/24"], &["fd00::/104"]));
        add_nodes(world, 1..=2).await;
        world.until("both are served", LIMIT, all_served(2)).await?;
        let before = published(world);
        world.stop("a");
        world.pass(Duration::from_secs(5)).await?;

        // Both CIDRs of the nodes go, another one comes.
        operator(world, over, "b", &pool(&["10.2.0.0/23"], &["fd00::/104"]));
        add_node(world, "n3", 3).await;
        world.until("n3 is served", LIMIT, |w| is_served(w, "n3")).await?;
        assert_eq!(pod_cidrs(&cilium_nodes(world)["n3"])[0], "10.2.0.0/24");
        let now = published(world);
        assert!(before.iter().all(|(name, was)| now[name] == *was), "orphaned blocks stay their nodes'");
        world.until("the Ledger says so", LIMIT, |w| condition(w, "BlocksOrphaned").contains("2 blocks")).await?;
        let is_noted = |note: &String| note.contains("it no longer has 10.0.0.0/24 (blocks of /24)");
        let noted = |w: &World| events(w, "PoolChanged").iter().any(is_noted);
        world.until("an event says so", LIMIT, noted).await?;
        delete(world, resources::NODE, "n1").await;
        world.until("n1 is gone", LIMIT, |w| !cilium_nodes(w).contains_key("n1")).await?;
        world.pass(5 * MINUTE).await?;
        add_nodes(world, 4..=5).await;
        world.until("n4 is served", LIMIT, |w| is_served(w, "n4")).await?;
        let full = |w: &World| cilium_nodes(w).get("n5").is_some_and(|n5| error(n5).contains("10.2.0.0/23"));
        world.until("n5 gets none of the CIDRs that are gone", LIMIT, full).await?;
        world.until("the Ledger says so", LIMIT, |w| condition(w, "PoolExhausted").contains("10.2.0.0/23")).await?;
        let pools = ledger(world)["status"]["pools"].clone();
        assert_eq!(pools[0], json!({ "cidr": "10.2.0.0/23", "maskSize": 24, "free": 0, "blocks": { "granted": 2 } }));
        world.stop("b");
        world.pass(Duration::from_secs(5)).await?;

        // They come back.
        operator(world, over, "c", &pool(&["10.2.0.0/23", "10.0.0.0/24", "10.1.0.0/24"], &["fd00::/104"]));
        world.until("n5 is served from what n1 left", LIMIT, |w| is_served(w, "n5")).await?;
        assert_eq!(pod_cidrs(&cilium_nodes(world)["n5"])[0], before["n1"].0[0]);
        assert_eq!(published(world)["n2"], before["n2"]);
        world.until("nothing is orphaned", LIMIT, |w| condition(w, "BlocksOrphaned").is_empty()).await?;
        world.settle(MINUTE, LIMIT).await
    });
}

#[test]
fn another_mask_is_for_new_nodes_and_one_that_does_not_fit_is_refused() {
    run(68, async |world, over| {
        let masks = |ipv4| pool_of(&["10.0.0.0/16"], ipv4, &["fd00::/104"], 120);
        operator(world, over, "a", &masks(24));
        add_node(world, "n1", 1).await;
        world.until("n1 is served", LIMIT, |w| is_served(w, "n1")).await?;
        let before = published(world);
        for (replica, mask, n) in [("b", 26, 2), ("c", 22, 3)] {
            world.stop(if replica == "b" { "a" } else { "b" });
            world.pass(Duration::from_secs(5)).await?;
            operator(world, over, replica, &masks(mask));
            let name = format!("n{n}");
            add_node(world, &name, n).await;
            world.until("the new node is served", LIMIT, |w| is_served(w, &name)).await?;
            let block = pod_cidrs(&cilium_nodes(world)[&name])[0].clone();
            assert!(block.ends_with(&format!("/{mask}")), "{block}");
        }
        assert_eq!(published(world)["n1"], before["n1"]);
        world.stop("c");
        world.pass(Duration::from_secs(5)).await?;
        operator(world, over, "d", &masks(30));
        add_node(world, "n4", 4).await;
        let refused =
            |w: &World| cilium_nodes(w).get("n4").is_some_and(|n4| error(n4).contains("use 28 or less, or append"));
        world.until("n4 is told which masks are possible", LIMIT, refused).await?;
        world.until("the Ledger says so", LIMIT, |w| condition(w, "PoolUnusable").contains("use 28 or less")).await?;
        assert_eq!(published(world)["n1"], before["n1"]);
        Ok(())
    });
}

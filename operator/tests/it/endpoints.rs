//! CiliumEndpoints without pod are collected, and no others.

use std::{collections::BTreeSet, time::Duration};

use basal_objects::object::{Object, Resource, resources};
use basal_runtime::outcome::Outcome;
use basal_sim::{
    explore,
    fault::{Fault, FaultPlan},
    trace::What,
    world::{Options, Trouble, World},
};
use serde_json::{Value, json};

use crate::{
    cluster::{LIMIT, Over, Setup, add_node, is_served, operator_of, patch, pool, run},
    weather::Sky,
};

const EVERY: Duration = Duration::from_secs(60);
const DELETED: &str = "basal_operator_endpoint_gc_objects_total{outcome=\"success\"}";
const FAILED: &str = "basal_operator_endpoint_gc_objects_total{outcome=\"fail\"}";

async fn create(world: &World, resource: Resource, object: Value) -> Object {
    match world.user().objects.create(resource, Object(object)).await {
        Outcome::Done(object) => object,
        other => panic!("not created: {other:?}"),
    }
}

/// A pod on a node, in a phase; answers its uid.
pub(crate) async fn pod(world: &World, name: &str, node: &str, phase: &str) -> String {
    let object = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": { "namespace": "default", "name": name },
        "spec": { "nodeName": node, "containers": [{ "name": "c", "image": "i" }] },
    });
    let created = create(world, resources::POD, object).await;
    patch(world, resources::POD, &created, Some("status"), json!({ "status": { "phase": phase } })).await;
    created.uid().to_owned()
}

/// A CiliumEndpoint with an address, owned by a Pod of this uid.
pub(crate) async fn endpoint(world: &World, name: &str, owner: Option<&str>, address: &str) {
    let owners: Vec<Value> =
        owner.iter().map(|uid| json!({ "apiVersion": "v1", "kind": "Pod", "name": name, "uid": uid })).collect();
    let object = json!({
        "apiVersion": "cilium.io/v2", "kind": "CiliumEndpoint",
        "metadata": { "name": name, "namespace": "default", "ownerReferences": owners },
        "status": { "networking": { "addressing": [{ "ipv4": address }] } },
    });
    create(world, resources::CILIUM_ENDPOINT, object).await;
}

/// Notes of the Warning events with a reason about an object.
pub(crate) fn warnings_of(world: &World, name: &str, reason: &str) -> Vec<String> {
    let events = world.objects().all(&resources::EVENT).into_iter();
    let about = |event: &Object| {
        event.0["type"] == "Warning" && event.0["reason"] == reason && event.0["regarding"]["name"] == name
    };
    events.filter(about).map(|event| event.0["note"].as_str().unwrap_or_default().to_owned()).collect()
}

fn endpoints(world: &World) -> BTreeSet<String> {
    world.objects().all(&resources::CILIUM_ENDPOINT).iter().map(|object| object.name().to_owned()).collect()
}

fn names(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

/// An operator that leads, so that the kinds are known.
async fn led(world: &World, over: Over, every: Option<Duration>) -> Result<Setup, Trouble> {
    let mut setup = Setup::new(over, pool(&["10.0.0.0/16"], &["fd00::/104"]));
    setup.duties.endpoint_gc = every;
    operator_of(world, "a", setup.clone());
    add_node(world, "n1", 1).await;
    world.until("n1 is served", LIMIT, |w| is_served(w, "n1")).await?;
    Ok(setup)
}

#[test]
fn only_endpoints_whose_pod_is_gone_or_has_ended_are_collected() {
    run(20, async |world, over| {
        let setup = led(world, over, Some(EVERY)).await?;
        let runs = pod(world, "runs", "n1", "Running").await;
        let waits = pod(world, "waits", "n1", "Pending").await;
        let ended = pod(world, "ended", "n1", "Succeeded").await;
        pod(world, "replaced", "n1", "Running").await;
        pod(world, "unowned", "n1", "Running").await;
        for (number, (name, owner)) in [
            ("runs", Some(runs.as_str())),
            ("waits", Some(waits.as_str())),
            ("ended", Some(ended.as_str())),
            ("replaced", Some("another")),
            ("unowned", None),
            ("gone", Some("long-gone")),
            ("left", None),
        ]
        .into_iter()
        .enumerate()
        {
            endpoint(world, name, owner, &format!("10.0.0.{number}")).await;
        }
        world.until("four are collected", LIMIT, |w| endpoints(w).len() == 3).await?;
        world.pass(EVERY * 3).await?;
        assert_eq!(endpoints(world), names(&["runs", "waits", "unowned"]));
        assert_eq!((setup.shown.value(DELETED), setup.shown.value(FAILED)), (4, 0));
        Ok(())
    });
}

/// The API server's memory shows no pod at all; each is there when it is read.
#[test]
fn a_list_that_lags_behind_collects_nothing() {
    run(21, async |world, over| {
        let setup = led(world, over, Some(EVERY)).await?;
        let uid = pod(world, "runs", "n1", "Running").await;
        endpoint(world, "runs", Some(&uid), "10.0.0.9").await;
        setup.api_server.set(Sky::Blind);
        setup.etcd.set(Sky::Blind);
        world.pass(EVERY * 3).await?;
        assert_eq!(endpoints(world), names(&["runs"]));
        assert_eq!((setup.shown.value(DELETED), setup.shown.value(FAILED)), (0, 0));
        Ok(())
    });
}

#[test]
fn a_collection_that_is_off_collects_nothing() {
    run(22, async |world, over| {
        led(world, over, None).await?;
        endpoint(world, "left", None, "10.0.0.9").await;
        world.pass(Duration::from_secs(3600)).await?;
        assert_eq!(endpoints(world), names(&["left"]));
        Ok(())
    });
}

/// One endpoint without pod, until after the second round; answers whether it was there between the rounds.
async fn two_rounds(world: &World) -> Result<(bool, u64, u64), Trouble> {
    let setup = led(world, Over::Etcd, Some(EVERY)).await?;
    endpoint(world, "left", None, "10.0.0.9").await;
    world.until("it is to be deleted", LIMIT, |w| w.trace().iter().any(|entry| is_delete(&entry.what))).await?;
    world.pass(EVERY / 2).await?;
    let between = endpoints(world).contains("left");
    let (deleted, failed) = (setup.shown.value(DELETED), setup.shown.value(FAILED));
    world.pass(EVERY).await?;
    assert!(!endpoints(world).contains("left"));
    Ok((between, deleted, failed))
}

fn is_delete(what: &What) -> bool {
    matches!(what, What::Call { call, .. } if call.request.starts_with("delete ciliumendpoints"))
}

/// The same run with a fault at the delete.
fn with_fault(fault: Option<Fault>) -> (bool, u64, u64) {
    let options = Options::seeded(23);
    let mut seen = None;
    let baseline = explore::run(options.clone(), async |world| {
        seen = Some(two_rounds(world).await?);
        Ok(())
    })
    .unwrap();
    let Some(fault) = fault else {
        assert_eq!(baseline.result, Ok(()), "{}", baseline.report);
        return seen.unwrap();
    };
    let number = baseline.trace.iter().find_map(|entry| match &entry.what {
        What::Call { call, .. } if is_delete(&entry.what) => call.number,
        _ => None,
    });
    let options = options.with(FaultPlan::at(number.unwrap(), fault));
    let run = explore::run(options, async |world| {
        seen = Some(two_rounds(world).await?);
        Ok(())
    })
    .unwrap();
    assert_eq!(run.result, Ok(()), "{}", run.report);
    seen.unwrap()
}

#[test]
fn whoever_writes_an_endpoint_meanwhile_keeps_it_and_trouble_is_counted() {
    assert_eq!(with_fault(None), (false, 1, 0));
    assert_eq!(with_fault(Some(Fault::Overtake)), (true, 0, 0), "the delete is of what was read");
    assert_eq!(with_fault(Some(Fault::LoseRequest)), (true, 0, 1));
    assert_eq!(with_fault(Some(Fault::LoseAnswer)), (false, 0, 1), "it may have happened");
    assert_eq!(with_fault(Some(Fault::Throttle)), (true, 0, 1));
}

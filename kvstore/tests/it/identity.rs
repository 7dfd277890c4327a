//! Identities are allocated once for all nodes, and collected when nobody uses them.

use std::sync::Arc;

use basal_crds::{
    directory::{AllocateError, Directory},
    identity::{IdentityId, IdentityRange},
    kvstore::keys,
    labels::Labels,
    names::ClusterId,
};
use basal_kvstore::{
    directory::EtcdDirectory,
    identity_gc::{GcReport, IdentityGc},
    kv::{Compare, Is},
    lock::Locks,
};
use basal_runtime::env::{Env, SeededEnv};
use basal_sim::kv::ModelKv;

use crate::support::{agent, delete, get, labels, lease_of, pass, put, session_with, shared};

const WEB: &str = "k8s:app.kubernetes.io/name=web;k8s:io.kubernetes.pod.namespace=default;";

/// Where a leader that may not collect any more finds another term than its own.
const FENCE: &str = "basal/ipam/v1/default/fence";

fn gc(model: &ModelKv) -> IdentityGc {
    let range = IdentityRange::of(ClusterId::new(0));
    let guard = Compare::new(FENCE, Is::Absent);
    IdentityGc::new(shared(model), Locks::new(session_with(model)), range, guard)
}

fn key(prefix: &str, name: impl std::fmt::Display) -> String {
    format!("{prefix}{name}")
}

#[tokio::test(start_paused = true)]
async fn labels_get_one_identity_on_all_nodes() {
    let model = ModelKv::new(1);
    let agents = ["10.0.0.1", "10.0.0.2", "fd00::3"].map(|ip| Arc::new(agent(&model, ip)));
    let env = SeededEnv::new(7);
    let (sender, mut ids) = futures::channel::mpsc::unbounded();
    let mut tasks = Vec::new();
    for agent in agents.iter().cycle().take(30) {
        let (agent, sender) = (Arc::clone(agent), sender.clone());
        let task = async move {
            let id = agent.allocate_identity(&labels(WEB)).await.unwrap();
            sender.unbounded_send(id).unwrap();
        };
        tasks.push(env.spawn("allocate", Box::pin(task)));
    }
    for task in tasks {
        task.join().await;
    }
    let id = ids.try_recv().unwrap();
    while let Ok(other) = ids.try_recv() {
        assert_eq!(other, id);
    }
    let master = keys::identity(id);
    assert_eq!(get(&model, &master).await.as_deref(), Some(WEB));
    assert_eq!(lease_of(&model, &master).await, 0);
    let references: Vec<String> =
        model.contents().into_keys().filter(|key| key.starts_with(keys::IDENTITY_VALUES_PREFIX)).collect();
    let expected =
        ["10.0.0.1", "10.0.0.2", "fd00::3"].map(|ip| key(keys::IDENTITY_VALUES_PREFIX, format!("{WEB}/{ip}")));
    assert_eq!(references, expected);
    for reference in &references {
        assert_eq!(get(&model, reference).await, Some(id.to_string()));
        assert_ne!(lease_of(&model, reference).await, 0);
    }
    assert!(!model.contents().keys().any(|key| key.starts_with(keys::IDENTITY_LOCKS_PREFIX)), "no lock is left");
}

#[tokio::test(start_paused = true)]
async fn the_reference_goes_with_its_last_user_and_the_identity_is_found_again() {
    let model = ModelKv::new(1);
    let first = agent(&model, "10.0.0.1");
    let web = labels(WEB);
    let id = first.allocate_identity(&web).await.unwrap();
    assert_eq!(first.allocate_identity(&web).await, Ok(id));
    let reference = keys::identity_reference(&web, "10.0.0.1".parse().unwrap());
    first.release_identity(&web);
    pass(1).await;
    assert!(get(&model, &reference).await.is_some(), "one user is left");
    first.release_identity(&web);
    first.release_identity(&web);
    pass(1).await;
    assert_eq!(get(&model, &reference).await, None);
    assert_eq!(get(&model, &keys::identity(id)).await.as_deref(), Some(WEB));
    assert_eq!(agent(&model, "10.0.0.2").allocate_identity(&web).await, Ok(id), "without any reference");
}

#[tokio::test(start_paused = true)]
async fn a_reference_without_its_identity_brings_the_identity_back() {
    let model = ModelKv::new(1);
    let web = labels(WEB);
    put(&model, &keys::identity_reference(&web, "10.0.0.9".parse().unwrap()), "777").await;
    let id = agent(&model, "10.0.0.1").allocate_identity(&web).await;
    assert_eq!(id, Ok(IdentityId::new(777)));
    assert_eq!(get(&model, &keys::identity(IdentityId::new(777))).await.as_deref(), Some(WEB));
}

#[tokio::test(start_paused = true)]
async fn identities_in_use_survive_deletion_and_an_emptied_store() {
    let model = ModelKv::new(1);
    let empty = model.snapshot();
    let agent = agent(&model, "10.0.0.1");
    let web = labels(WEB);
    let id = agent.allocate_identity(&web).await.unwrap();
    delete(&model, &keys::identity(id)).await;
    pass(1).await;
    assert_eq!(get(&model, &keys::identity(id)).await.as_deref(), Some(WEB));
    model.restore(&empty, 2);
    pass(310).await;
    assert_eq!(get(&model, &keys::identity(id)).await.as_deref(), Some(WEB));
    let reference = keys::identity_reference(&web, "10.0.0.1".parse().unwrap());
    assert_eq!(get(&model, &reference).await, Some(id.to_string()));
}

#[tokio::test(start_paused = true)]
async fn a_reference_that_somebody_deleted_comes_back_before_the_identity_is_collected() {
    let model = ModelKv::new(1);
    let agents = [agent(&model, "10.0.0.1"), agent(&model, "10.0.0.2")];
    let web = labels(WEB);
    let id = agents[0].allocate_identity(&web).await.unwrap();
    let reference = keys::identity_reference(&web, "10.0.0.1".parse().unwrap());
    delete(&model, &reference).await;
    // Identities that come and go elsewhere keep nobody from looking after their own.
    for turn in 0..31 {
        put(&model, &keys::identity(IdentityId::new(40_000 + turn)), "k8s:other=1;").await;
        pass(10).await;
    }
    assert_eq!(get(&model, &reference).await, Some(id.to_string()));

    // Too late: the identity was collected.
    delete(&model, &reference).await;
    delete(&model, &keys::identity(id)).await;
    pass(10).await;
    assert_eq!(get(&model, &keys::identity(id)).await.as_deref(), Some(WEB));
    assert_eq!(get(&model, &reference).await, Some(id.to_string()));
}

#[tokio::test(start_paused = true)]
async fn a_number_that_was_given_away_is_not_used_for_new_endpoints() {
    let model = ModelKv::new(1);
    let agent = agent(&model, "10.0.0.1");
    let web = labels(WEB);
    let id = agent.allocate_identity(&web).await.unwrap();
    model.cut_watches();
    put(&model, &keys::identity(id), "k8s:other=1;").await;
    pass(310).await;
    let new = agent.allocate_identity(&web).await.unwrap();
    assert_ne!(new, id);
    assert_eq!(get(&model, &keys::identity(id)).await.as_deref(), Some("k8s:other=1;"));
}

#[tokio::test(start_paused = true)]
async fn a_full_range_is_said_to_be_full() {
    let model = ModelKv::new(1);
    let agent = agent(&model, "10.0.0.1");
    for id in 256..=65_535 {
        agent.identity_store().learn(IdentityId::new(id), labels("k8s:a=1;"));
    }
    let refused = agent.allocate_identity(&labels(WEB)).await.unwrap_err();
    assert_eq!(refused, AllocateError::Exhausted { labels: labels(WEB), count: 32_640 });
}

#[tokio::test(start_paused = true)]
async fn two_rounds_without_a_user_end_an_identity() {
    let model = ModelKv::new(1);
    let agents = [agent(&model, "10.0.0.1"), agent(&model, "10.0.0.2")];
    let (web, used) = (labels(WEB), labels("k8s:used=1;"));
    let id = agents[0].allocate_identity(&web).await.unwrap();
    let kept = agents[1].allocate_identity(&used).await.unwrap();
    put(&model, &keys::identity(IdentityId::new(70_000)), WEB).await;
    put(&model, &key(keys::IDENTITY_IDS_PREFIX, "x"), WEB).await;
    let mut gc = gc(&model);
    let invalid = vec![key(keys::IDENTITY_IDS_PREFIX, "x")];
    let report =
        |alive, unused, deleted| GcReport { alive, unused, deleted, invalid: invalid.clone(), ..GcReport::default() };
    assert_eq!(gc.round().await, Ok(report(2, 0, 0)));
    agents[0].release_identity(&web);
    pass(1).await;
    assert_eq!(gc.round().await, Ok(report(1, 1, 0)));
    assert_eq!(gc.round().await, Ok(report(1, 0, 1)));
    assert_eq!(get(&model, &keys::identity(id)).await, None);
    assert_eq!(get(&model, &keys::identity(kept)).await.as_deref(), Some("k8s:used=1;"));
    assert!(get(&model, &keys::identity(IdentityId::new(70_000))).await.is_some(), "another cluster's");
}

/// An identity that its only user has let go of, and a collector that found it unused in its first round.
async fn unused_once(model: &ModelKv, agent: &EtcdDirectory, labels: &Labels) -> (IdentityId, IdentityGc) {
    let id = agent.allocate_identity(labels).await.unwrap();
    agent.release_identity(labels);
    pass(1).await;
    let mut gc = gc(model);
    assert_eq!(gc.round().await.unwrap().unused, 1);
    (id, gc)
}

#[tokio::test(start_paused = true)]
async fn an_identity_that_is_used_between_the_rounds_stays() {
    let model = ModelKv::new(1);
    let (agent, web) = (agent(&model, "10.0.0.1"), labels(WEB));
    let (id, mut gc) = unused_once(&model, &agent, &web).await;
    assert_eq!(agent.allocate_identity(&web).await, Ok(id));
    assert_eq!(gc.round().await, Ok(GcReport { alive: 1, ..GcReport::default() }));
    agent.release_identity(&web);
    pass(1).await;
    assert_eq!(gc.round().await.unwrap().deleted, 0, "counted from the start again");
    assert_eq!(gc.round().await.unwrap().deleted, 1);
}

#[tokio::test(start_paused = true)]
async fn who_does_not_lead_any_more_collects_nothing() {
    let model = ModelKv::new(1);
    let (id, mut gc) = unused_once(&model, &agent(&model, "10.0.0.1"), &labels(WEB)).await;
    put(&model, FENCE, "the next term").await;
    assert_eq!(gc.round().await.unwrap().deleted, 0);
    assert_eq!(get(&model, &keys::identity(id)).await.as_deref(), Some(WEB));
}

#[tokio::test(start_paused = true)]
async fn locks_that_were_left_behind_go_in_the_second_round() {
    let model = ModelKv::new(1);
    let stale = format!("{}/1f", keys::identity_lock(&Labels::default()));
    put(&model, &stale, "").await;
    let mut gc = gc(&model);
    assert_eq!(gc.round().await.unwrap().stale_locks, 0);
    assert_eq!(gc.round().await.unwrap().stale_locks, 1);
    assert_eq!(get(&model, &stale).await, None);
}

//! What the operator writes beside the ledger.

use std::collections::BTreeMap;

use basal_crds::{
    kvstore::{Capabilities, ClusterConfig, keys},
    names::{ClusterId, ClusterName},
};
use basal_ipam::{
    ledger::Guard,
    names::{NodeName, TermId},
};
use basal_kvstore::{
    ledger::LedgerKeys,
    records::{Guarded, NodeRecords, enforce_cluster_config, heartbeat},
};
use basal_sim::kv::ModelKv;

use crate::support::{delete, env, get, lease_of, pass, put, session, shared, target};

fn guard() -> Guard {
    Guard { term: TermId::from_random(1, 2), cells: BTreeMap::new() }
}

#[tokio::test(start_paused = true)]
async fn a_node_record_needs_the_term() {
    let model = ModelKv::new(1);
    let (ledger, cluster) = (LedgerKeys::new("default"), ClusterName::default());
    let records = NodeRecords::new(shared(&model), ledger.clone(), cluster.clone());
    let (guard, name) = (guard(), NodeName::new("a").unwrap());
    let key = keys::node(&cluster, &name);
    let publish = || records.publish(&guard, &name, "text".to_owned());
    assert_eq!(publish().await, Guarded::GuardLost, "there is no fence");
    put(&model, &ledger.fence(), guard.term.as_str()).await;
    assert_eq!(publish().await, Guarded::Done(model.header().revision));
    assert_eq!(get(&model, &key).await.as_deref(), Some("text"));
    assert_eq!(lease_of(&model, &key).await, 0);
    put(&model, &ledger.fence(), "another term").await;
    assert_eq!(records.withdraw(&guard, &name).await, Guarded::GuardLost);
    assert!(get(&model, &key).await.is_some());
    put(&model, &ledger.fence(), guard.term.as_str()).await;
    assert!(matches!(records.withdraw(&guard, &name).await, Guarded::Done(_)));
    assert_eq!(get(&model, &key).await, None);
}

#[tokio::test(start_paused = true)]
async fn a_block_is_cleared_of_its_addresses_and_no_others() {
    let model = ModelKv::new(1);
    let ledger = LedgerKeys::new("default");
    let records = NodeRecords::new(shared(&model), ledger.clone(), ClusterName::default());
    // More than one transaction takes.
    let inside: Vec<String> = (0..200).map(|i| keys::ip(target(&format!("10.1.0.{i}")))).collect();
    let outside = keys::ip(target("10.1.1.1"));
    for key in inside.iter().chain([&outside]) {
        put(&model, key, "x").await;
    }
    assert_eq!(records.withdraw_addresses(&guard(), &inside).await, Guarded::GuardLost);
    put(&model, &ledger.fence(), guard().term.as_str()).await;
    let before = model.header().revision;
    assert_eq!(records.withdraw_addresses(&guard(), &inside).await, Guarded::Done(before + 2));
    let left = model.contents();
    assert_eq!(left.len(), 2);
    assert!(get(&model, &outside).await.is_some());
}

#[tokio::test(start_paused = true)]
async fn the_heart_beats_once_a_minute() {
    let (model, session) = session();
    let task = env().spawn("heartbeat", Box::pin(heartbeat(session)));
    pass(1).await;
    let first = get(&model, keys::HEARTBEAT).await.unwrap();
    assert_eq!(first, "2026-01-01T00:00:00Z");
    pass(60).await;
    assert_eq!(get(&model, keys::HEARTBEAT).await.as_deref(), Some("2026-01-01T00:01:00Z"));
    assert_ne!(lease_of(&model, keys::HEARTBEAT).await, 0);
    task.abort();
}

#[tokio::test(start_paused = true)]
async fn the_clusters_configuration_is_defended() {
    let (model, session) = session();
    let cluster = ClusterName::new("here").unwrap();
    let capabilities = Capabilities { max_connected_clusters: 255, ..Capabilities::default() };
    let config = ClusterConfig { id: ClusterId::new(3), capabilities };
    let key = keys::cluster_config(&cluster);
    let task = env().spawn("config", Box::pin(enforce_cluster_config(session, cluster, config.clone())));
    let expected = Some(config.to_json());
    pass(1).await;
    assert_eq!(get(&model, &key).await, expected);
    put(&model, &key, "{}").await;
    put(&model, &keys::cluster_config(&ClusterName::new("there").unwrap()), "{}").await;
    pass(1).await;
    assert_eq!(get(&model, &key).await, expected);
    delete(&model, &key).await;
    pass(1).await;
    assert_eq!(get(&model, &key).await, expected);
    let revision = model.header().revision;
    pass(10).await;
    assert_eq!(model.header().revision, revision, "what is right is not written");
    task.abort();
}

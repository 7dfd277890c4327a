//! What the operator writes beside the ledger.

use std::collections::BTreeMap;

use basal_crds::{
    kvstore::{Capabilities, ClusterConfig, NodeRecord, keys},
    names::{ClusterId, ClusterName, NodeName},
};
use basal_ipam::{ledger::Guard, names::TermId};
use basal_kvstore::{
    ledger::LedgerKeys,
    records::{Guarded, NodeRecords, delete_ip_records_in, enforce_cluster_config, heartbeat, ip_records_in},
};
use basal_sim::kv::ModelKv;

use crate::support::{delete, env, get, ip_record, lease_of, pass, put, session, shared, target};

#[tokio::test(start_paused = true)]
async fn a_node_record_needs_the_term() {
    let model = ModelKv::new(1);
    let ledger = LedgerKeys::new("default");
    let records = NodeRecords::new(shared(&model), ledger.clone());
    let term = TermId::from_random(1, 2);
    let guard = Guard { term, cells: BTreeMap::new() };
    let record = NodeRecord::new(NodeName::new("a").unwrap(), ClusterName::default(), ClusterId::default());
    let key = keys::node(&record.cluster, &record.name);
    assert_eq!(records.publish(&guard, &record).await, Guarded::GuardLost, "there is no fence");
    put(&model, &ledger.fence(), guard.term.as_str()).await;
    assert_eq!(records.publish(&guard, &record).await, Guarded::Done);
    assert_eq!(get(&model, &key).await, Some(record.to_json()));
    assert_eq!(lease_of(&model, &key).await, 0);
    put(&model, &ledger.fence(), "another term").await;
    assert_eq!(records.withdraw(&guard, &record.cluster, &record.name).await, Guarded::GuardLost);
    assert!(get(&model, &key).await.is_some());
}

#[tokio::test(start_paused = true)]
async fn a_block_is_cleared_of_its_addresses_and_no_others() {
    let model = ModelKv::new(1);
    for i in 0..200 {
        let ip = format!("10.1.0.{i}");
        put(&model, &keys::ip(target(&ip)), &ip_record(&ip, "10.0.0.1", 300).to_json()).await;
    }
    put(&model, &keys::ip(target("10.1.1.1")), "x").await;
    let block = "10.1.0.0/24".parse().unwrap();
    assert_eq!(ip_records_in(&model, block).await.unwrap().len(), 200);
    assert_eq!(delete_ip_records_in(&model, block).await, Ok(200));
    assert_eq!(ip_records_in(&model, block).await, Ok(Vec::new()));
    assert_eq!(model.contents().len(), 1);
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

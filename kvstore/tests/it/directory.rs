//! What an agent sees of the cluster.

use std::time::Duration;

use basal_crds::{
    directory::{Change, Changes, Directory},
    kvstore::{NodeRecord, keys},
    names::{ClusterId, ClusterName},
};
use basal_ipam::names::NodeName;
use basal_sim::kv::ModelKv;
use futures::StreamExt;

use crate::support::{agent, delete, env, get, ip_record, labels, pass, put, target};

fn node(name: &str) -> NodeRecord {
    NodeRecord::new(NodeName::new(name).unwrap(), ClusterName::default(), ClusterId::default())
}

async fn publish(model: &ModelKv, name: &str) -> String {
    let record = node(name);
    let key = keys::node(&record.cluster, &record.name);
    put(model, &key, &record.to_json()).await;
    key
}

/// What comes within a time, in words.
async fn seen<K: std::fmt::Debug, V>(changes: &mut Changes<K, V>, seconds: u64, name: fn(&K) -> String) -> Vec<String> {
    let mut all = Vec::new();
    let end = tokio::time::Instant::now() + Duration::from_secs(seconds);
    while let Ok(change) = tokio::time::timeout_at(end, changes.next()).await {
        all.push(match change.unwrap() {
            Change::Upsert(key, _) => format!("+{}", name(&key)),
            Change::Delete(key) => format!("-{}", name(&key)),
            Change::Invalid { name, problem } => format!("!{name}: {problem}"),
            Change::InSync => "in sync".to_owned(),
            Change::Stale(_) => "stale".to_owned(),
        });
    }
    all
}

#[tokio::test(start_paused = true)]
async fn a_node_is_gone_after_thirty_seconds_without_it() {
    let model = ModelKv::new(1);
    let key = publish(&model, "a").await;
    publish(&model, "b").await;
    let mut nodes = agent(&model, "10.0.0.1").nodes();
    let name = |key: &(ClusterName, NodeName)| key.1.to_string();
    assert_eq!(seen(&mut nodes, 1, name).await, ["+a", "+b", "in sync"]);
    delete(&model, &key).await;
    assert!(seen(&mut nodes, 29, name).await.is_empty());
    publish(&model, "a").await;
    assert_eq!(seen(&mut nodes, 100, name).await, ["+a"]);
    delete(&model, &key).await;
    assert_eq!(seen(&mut nodes, 31, name).await, ["-a"]);
}

#[tokio::test(start_paused = true)]
async fn an_emptied_store_takes_nothing_away() {
    let model = ModelKv::new(1);
    let empty = model.snapshot();
    publish(&model, "a").await;
    publish(&model, "b").await;
    let mut nodes = agent(&model, "10.0.0.1").nodes();
    let name = |key: &(ClusterName, NodeName)| key.1.to_string();
    seen(&mut nodes, 1, name).await;
    model.restore(&empty, 2);
    assert_eq!(seen(&mut nodes, 3600, name).await, ["stale", "in sync"]);
    publish(&model, "a").await;
    assert_eq!(seen(&mut nodes, 29, name).await, ["+a"]);
    assert_eq!(seen(&mut nodes, 60, name).await, ["-b"]);
}

#[tokio::test(start_paused = true)]
async fn records_that_cannot_be_read_are_told_and_change_nothing() {
    let model = ModelKv::new(1);
    let key = publish(&model, "a").await;
    put(&model, "cilium/state/nodes/v1/lonely", "{}").await;
    let mut nodes = agent(&model, "10.0.0.1").nodes();
    let name = |key: &(ClusterName, NodeName)| key.1.to_string();
    let first = seen(&mut nodes, 1, name).await;
    assert_eq!((first[0].as_str(), first[2].as_str()), ("+a", "in sync"));
    assert!(first[1].starts_with("!cilium/state/nodes/v1/lonely: key "), "{first:?}");
    put(&model, &key, "{\"Name\":7}").await;
    let second = seen(&mut nodes, 3600, name).await;
    assert!(second.len() == 1 && second[0].contains("Name: "), "{second:?}");
    put(&model, &key, &node("b").to_json()).await;
    assert!(seen(&mut nodes, 3600, name).await[0].contains("its key of a"));
}

#[tokio::test(start_paused = true)]
async fn addresses_go_at_once_unless_they_are_lost() {
    let model = ModelKv::new(1);
    let empty = model.snapshot();
    let (ours, other) = (agent(&model, "10.0.0.1"), agent(&model, "10.0.0.2"));
    let mut ips = ours.ips();
    let name = |key: &basal_crds::kvstore::IpTarget| key.to_string();
    assert_eq!(seen(&mut ips, 1, name).await, ["in sync"]);
    ours.publish_ip(&ip_record("10.1.0.1", "10.0.0.1", 300));
    other.publish_ip(&ip_record("10.1.1.1", "10.0.0.2", 300));
    assert_eq!(seen(&mut ips, 1, name).await, ["+10.1.0.1", "+10.1.1.1"]);
    other.withdraw_ip(target("10.1.1.1"));
    assert_eq!(seen(&mut ips, 1, name).await, ["-10.1.1.1"]);
    other.publish_ip(&ip_record("10.1.1.1", "10.0.0.2", 301));
    assert_eq!(seen(&mut ips, 1, name).await, ["+10.1.1.1"]);
    // The store loses everything; the owners see it and write it again, and nobody forgets an address.
    let mut others = other.ips();
    seen(&mut others, 1, name).await;
    let follower = env().spawn("other", Box::pin(async move { while others.next().await.is_some() {} }));
    model.restore(&empty, 2);
    let after = seen(&mut ips, 3600, name).await;
    assert!(after.iter().all(|change| !change.starts_with('-')), "{after:?}");
    assert!(after.contains(&"+10.1.0.1".to_owned()) && after.contains(&"+10.1.1.1".to_owned()), "{after:?}");
    follower.abort();
}

#[tokio::test(start_paused = true)]
async fn our_own_addresses_come_back_when_somebody_deletes_them() {
    let model = ModelKv::new(1);
    let agent = agent(&model, "10.0.0.1");
    let mut ips = agent.ips();
    let name = |key: &basal_crds::kvstore::IpTarget| key.to_string();
    agent.publish_ip(&ip_record("10.1.0.1", "10.0.0.1", 300));
    agent.publish_ip(&ip_record("10.1.0.2", "10.0.0.1", 300));
    seen(&mut ips, 1, name).await;
    delete(&model, &keys::ip(target("10.1.0.1"))).await;
    assert_eq!(seen(&mut ips, 1, name).await, ["-10.1.0.1", "+10.1.0.1"]);
    assert!(get(&model, &keys::ip(target("10.1.0.1"))).await.is_some());
}

#[tokio::test(start_paused = true)]
async fn what_an_earlier_run_left_is_withdrawn() {
    let model = ModelKv::new(1);
    for (ip, host) in [("10.1.0.1", "10.0.0.1"), ("10.1.0.2", "10.0.0.1"), ("10.1.1.1", "10.0.0.2")] {
        put(&model, &keys::ip(target(ip)), &ip_record(ip, host, 300).to_json()).await;
    }
    let agent = agent(&model, "10.0.0.1");
    agent.publish_ip(&ip_record("10.1.0.2", "10.0.0.1", 300));
    assert_eq!(agent.withdraw_leftover_ips().await, Ok(1));
    pass(1).await;
    let left: Vec<String> = model.contents().into_keys().collect();
    assert_eq!(left, [keys::ip(target("10.1.0.2")), keys::ip(target("10.1.1.1"))]);
}

#[tokio::test(start_paused = true)]
async fn identities_are_followed_by_any_number() {
    let model = ModelKv::new(1);
    let agent = agent(&model, "10.0.0.1");
    let name = |key: &basal_crds::identity::IdentityId| key.to_string();
    let mut early = agent.identities();
    let id = agent.allocate_identity(&labels("k8s:a=1;")).await.unwrap();
    let other = agent.allocate_identity(&labels("k8s:b=1;")).await.unwrap();
    let early = seen(&mut early, 1, name).await;
    assert_eq!(early, ["in sync".to_owned(), format!("+{id}"), format!("+{other}")]);
    let late = seen(&mut agent.identities(), 1, name).await;
    let (low, high) = (id.min(other), id.max(other));
    assert_eq!(late, [format!("+{low}"), format!("+{high}"), "in sync".to_owned()]);
}

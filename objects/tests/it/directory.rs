//! The directory beyond what its conformance suite asks: lost watches, emptied servers, and others at the same identity.

use std::{fmt::Debug, sync::Arc, time::Duration};

use basal_crds::{
    directory::{Change, Changes, Directory, IpOwner},
    identity::IdentityId,
    kvstore::{IpRecord, IpTarget},
    labels::Labels,
    names::{Cluster, ClusterName},
};
use basal_ipam::names::NodeName;
use basal_objects::{
    directory::{DirectoryConfig, ObjectDirectory},
    object::{
        Object, ObjectKey, Resource,
        resources::{CILIUM_ENDPOINT, CILIUM_IDENTITY, CILIUM_NODE, CRD},
    },
    port::{MergePatch, Objects as _, Preconditions},
};
use basal_runtime::env::{SeededEnv, SharedEnv};
use basal_sim::objects::ModelObjects;
use futures::StreamExt as _;
use serde_json::{Value, json};

const HEARTBEAT: &str = "io.cilium.heartbeat";

struct World {
    model: ModelObjects,
}

impl World {
    async fn new() -> Self {
        let env: SharedEnv = Arc::new(SeededEnv::new(1));
        let world = Self { model: ModelObjects::new(env) };
        for definition in basal_crds::resources::crds() {
            world.create(CRD, definition.object).await;
        }
        world
    }

    /// The directory of an agent whose random numbers follow from a seed.
    fn agent(&self, seed: u64, node_ip: &str) -> ObjectDirectory {
        let env: SharedEnv = Arc::new(SeededEnv::new(seed));
        let config = DirectoryConfig { cluster: Cluster::default(), node_ips: vec![node_ip.parse().unwrap()] };
        ObjectDirectory::start(&env, Arc::new(self.model.clone()), config)
    }

    async fn create(&self, resource: Resource, object: Value) -> Object {
        match self.model.create(resource, Object(object)).await {
            basal_runtime::outcome::Outcome::Done(object) => object,
            other => panic!("not created: {other:?}"),
        }
    }

    async fn delete(&self, resource: Resource, key: &ObjectKey) {
        let seen = self.model.get(resource, key).await.unwrap().unwrap();
        let (uid, resource_version) = (seen.uid().to_owned(), seen.resource_version().to_owned());
        assert!(self.model.delete(resource, key, Preconditions { uid, resource_version }).await.is_done());
    }

    async fn patch(&self, resource: Resource, seen: &Object, subresource: Option<&'static str>, body: Value) {
        let (resource_version, uid) = (seen.resource_version().to_owned(), seen.uid().to_owned());
        let patch = MergePatch { resource_version, uid, subresource, body };
        assert!(self.model.patch(resource, &seen.key(), patch).await.is_done());
    }

    async fn node(&self, name: &str) {
        let object = json!({"apiVersion": "cilium.io/v2", "kind": "CiliumNode", "metadata": {"name": name},
            "spec": {"addresses": [], "ipam": {"podCIDRs": ["10.0.0.0/24"]}}});
        let created = self.create(CILIUM_NODE, object).await;
        self.confirm(&created, json!({"status": "in-use"})).await;
    }

    async fn confirm(&self, node: &Object, said: Value) {
        let body = json!({"status": {"ipam": {"pod-cidrs": {"10.0.0.0/24": said}}}});
        self.patch(CILIUM_NODE, node, Some("status"), body).await;
    }

    async fn endpoint(&self, name: &str, ip: &str, identity: u32) {
        let object = json!({"apiVersion": "cilium.io/v2", "kind": "CiliumEndpoint",
            "metadata": {"namespace": "default", "name": name},
            "status": {"identity": {"id": identity},
                "networking": {"addressing": [{"ipv4": ip}], "node": "172.18.0.9"}}});
        self.create(CILIUM_ENDPOINT, object).await;
    }

    async fn identity(&self, id: u32, labels: &Labels, annotations: Value) -> Object {
        let object = json!({"apiVersion": "cilium.io/v2", "kind": "CiliumIdentity",
            "metadata": {"name": id.to_string(), "annotations": annotations},
            "security-labels": labels.to_security_labels()});
        self.create(CILIUM_IDENTITY, object).await
    }
}

fn labels(text: &str) -> Labels {
    Labels::parse_canonical(text).unwrap()
}

fn target(ip: &str) -> IpTarget {
    IpTarget::Host(ip.parse().unwrap())
}

async fn pass(seconds: u64) {
    tokio::time::sleep(Duration::from_secs(seconds)).await;
}

/// What comes within a time, in words.
async fn seen<K: Debug, V>(
    changes: &mut Changes<K, V>,
    seconds: u64,
    name: impl Fn(&K, Option<&V>) -> String,
) -> Vec<String> {
    let mut all = Vec::new();
    let end = tokio::time::Instant::now() + Duration::from_secs(seconds);
    while let Ok(change) = tokio::time::timeout_at(end, changes.next()).await {
        all.push(match change.unwrap() {
            Change::Upsert(key, value) => format!("+{}", name(&key, Some(&value))),
            Change::Delete(key) => format!("-{}", name(&key, None)),
            Change::Invalid { name, problem } => format!("!{name}: {problem}"),
            Change::InSync => "in sync".to_owned(),
            Change::Stale(_) => "stale".to_owned(),
        });
    }
    all
}

fn node_name<V>(key: &(ClusterName, NodeName), _: Option<&V>) -> String {
    key.1.to_string()
}

fn ip_name(key: &IpTarget, owner: Option<&IpOwner>) -> String {
    owner.map_or_else(|| key.to_string(), |owner| format!("{key} {}", owner.identity))
}

#[tokio::test(start_paused = true)]
async fn an_emptied_server_takes_nothing_away() {
    let world = World::new().await;
    world.node("a").await;
    world.node("b").await;
    let mut nodes = world.agent(1, "172.18.0.1").nodes();
    assert_eq!(seen(&mut nodes, 1, node_name).await, ["+a", "+b", "in sync"]);
    for name in ["a", "b"] {
        world.delete(CILIUM_NODE, &ObjectKey::cluster(name)).await;
    }
    assert_eq!(seen(&mut nodes, 3600, node_name).await, [""; 0]);
    world.node("a").await;
    assert_eq!(seen(&mut nodes, 29, node_name).await, ["+a"]);
    assert_eq!(seen(&mut nodes, 60, node_name).await, ["-b"]);
}

#[tokio::test(start_paused = true)]
async fn what_is_missing_after_a_lost_watch_waits_and_what_is_the_same_is_not_told_again() {
    let world = World::new().await;
    for (name, ip) in [("a", "10.0.0.1"), ("b", "10.0.0.2"), ("c", "10.0.0.3")] {
        world.endpoint(name, ip, 300).await;
    }
    let mut ips = world.agent(1, "172.18.0.1").ips();
    assert_eq!(seen(&mut ips, 1, ip_name).await, ["+10.0.0.1 300", "+10.0.0.2 300", "+10.0.0.3 300", "in sync"]);
    for name in ["a", "b"] {
        world.delete(CILIUM_ENDPOINT, &ObjectKey::namespaced("default", name)).await;
    }
    world.model.cut_watches();
    assert_eq!(seen(&mut ips, 29, ip_name).await, ["in sync"]);
    world.endpoint("b", "10.0.0.2", 301).await;
    assert_eq!(seen(&mut ips, 60, ip_name).await, ["+10.0.0.2 301", "-10.0.0.1"]);
}

#[tokio::test(start_paused = true)]
async fn a_block_that_is_no_longer_confirmed_takes_its_node_away_as_patiently() {
    let world = World::new().await;
    world.node("a").await;
    world.node("b").await;
    let mut nodes = world.agent(1, "172.18.0.1").nodes();
    seen(&mut nodes, 1, node_name).await;
    let node = async || world.model.get(CILIUM_NODE, &ObjectKey::cluster("a")).await.unwrap().unwrap();
    world.confirm(&node().await, Value::Null).await;
    assert_eq!(seen(&mut nodes, 20, node_name).await, [""; 0]);
    world.confirm(&node().await, json!({"status": "in-use"})).await;
    assert_eq!(seen(&mut nodes, 60, node_name).await, ["+a"], "it came back in time");
    world.confirm(&node().await, Value::Null).await;
    assert_eq!(seen(&mut nodes, 60, node_name).await, ["-a"]);
}

#[tokio::test(start_paused = true)]
async fn an_address_that_changes_hands_is_never_gone() {
    let world = World::new().await;
    world.endpoint("other", "10.0.0.9", 299).await;
    world.endpoint("old", "10.0.0.1", 300).await;
    let mut ips = world.agent(1, "172.18.0.1").ips();
    seen(&mut ips, 1, ip_name).await;
    world.endpoint("new", "10.0.0.1", 301).await;
    world.delete(CILIUM_ENDPOINT, &ObjectKey::namespaced("default", "old")).await;
    assert_eq!(seen(&mut ips, 60, ip_name).await, ["+10.0.0.1 301"]);
    world.delete(CILIUM_ENDPOINT, &ObjectKey::namespaced("default", "new")).await;
    assert_eq!(seen(&mut ips, 1, ip_name).await, ["-10.0.0.1"]);
}

#[tokio::test(start_paused = true)]
async fn an_endpoint_that_cannot_be_read_stays_as_it_was() {
    let world = World::new().await;
    world.endpoint("a", "10.0.0.1", 300).await;
    let mut ips = world.agent(1, "172.18.0.1").ips();
    seen(&mut ips, 1, ip_name).await;
    let key = ObjectKey::namespaced("default", "a");
    let object = world.model.get(CILIUM_ENDPOINT, &key).await.unwrap().unwrap();
    world.patch(CILIUM_ENDPOINT, &object, None, json!({"status": {"networking": {"node": "n9"}}})).await;
    world.model.cut_watches();
    let told = seen(&mut ips, 3600, ip_name).await;
    assert_eq!(told, ["!CiliumEndpoint default/a: status.networking.node: \"n9\" is not an IP address", "in sync"]);
}

#[tokio::test(start_paused = true)]
async fn the_writer_hears_of_published_endpoints_that_somebody_deleted() {
    let world = World::new().await;
    for (name, ip) in [("ours", "10.0.0.1"), ("withdrawn", "10.0.0.2"), ("other", "10.0.0.3")] {
        world.endpoint(name, ip, 300).await;
    }
    let agent = world.agent(1, "172.18.0.9");
    for (name, ip) in [("ours", "10.0.0.1"), ("withdrawn", "10.0.0.2")] {
        let record = IpRecord::new(target(ip), "172.18.0.9".parse().unwrap(), IdentityId::new(300));
        agent.publish_ip(&IpRecord { namespace: "default".into(), pod_name: name.into(), ..record });
    }
    agent.withdraw_ip(target("10.0.0.2"));
    let (mut vanished, mut ips) = (agent.vanished(), agent.ips());
    seen(&mut ips, 1, ip_name).await;
    for name in ["withdrawn", "ours"] {
        world.delete(CILIUM_ENDPOINT, &ObjectKey::namespaced("default", name)).await;
    }
    seen(&mut ips, 1, ip_name).await;
    assert_eq!(vanished.next().await, Some(ObjectKey::namespaced("default", "ours")));
    drop((agent, ips));
    assert_eq!(vanished.next().await, None);
}

#[tokio::test(start_paused = true)]
async fn the_oldest_identity_of_the_labels_is_used_and_its_mark_removed() {
    let world = World::new().await;
    let web = labels("k8s:app=web;");
    world.identity(900, &web, json!({HEARTBEAT: "2026-01-01T00:00:00Z", "other": "stays"})).await;
    pass(10).await;
    world.identity(800, &web, json!({})).await;
    world.identity(700, &labels("k8s:app=web;k8s:more=1;"), json!({})).await;
    assert_eq!(world.agent(1, "172.18.0.1").allocate_identity(&web).await, Ok(IdentityId::new(900)));
    let identity = world.model.get(CILIUM_IDENTITY, &ObjectKey::cluster("900")).await.unwrap().unwrap();
    assert_eq!(identity.annotations().into_keys().collect::<Vec<_>>(), ["other"]);
    assert_eq!(world.model.all(&CILIUM_IDENTITY).len(), 3);
}

#[tokio::test(start_paused = true)]
async fn a_number_that_another_node_took_first_is_passed_over() {
    let world = World::new().await;
    // The same seed: both draw the same number.
    let (one, other) = (world.agent(7, "172.18.0.1"), world.agent(7, "172.18.0.2"));
    let (a, b) = (labels("k8s:a=1;"), labels("k8s:b=1;"));
    let (first, second) = futures::join!(one.allocate_identity(&a), other.allocate_identity(&b));
    assert_ne!(first.unwrap(), second.unwrap());
    assert_eq!(world.model.all(&CILIUM_IDENTITY).len(), 2);
}

#[tokio::test(start_paused = true)]
async fn pods_with_one_set_of_labels_share_one_identity_however_many_start_at_once() {
    let world = World::new().await;
    let agent = world.agent(7, "172.18.0.1");
    let web = labels("k8s:app=web;");
    let all = futures::future::join_all((0..20).map(|_| agent.allocate_identity(&web))).await;
    let first = all[0].clone().unwrap();
    assert!(all.into_iter().all(|id| id == Ok(first)));
    assert_eq!(world.model.all(&CILIUM_IDENTITY).len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_number_that_was_given_away_is_not_used_for_new_endpoints() {
    let world = World::new().await;
    let agent = world.agent(1, "172.18.0.1");
    let web = labels("k8s:app=web;");
    let id = agent.allocate_identity(&web).await.unwrap();
    pass(1).await;
    world.delete(CILIUM_IDENTITY, &ObjectKey::cluster(id.to_string())).await;
    world.identity(id.get(), &labels("k8s:other=1;"), json!({})).await;
    pass(310).await;
    let new = agent.allocate_identity(&web).await.unwrap();
    assert_ne!(new, id);
    let identity = world.model.get(CILIUM_IDENTITY, &ObjectKey::cluster(id.to_string())).await.unwrap().unwrap();
    assert_eq!(identity.0["security-labels"], json!({"k8s:other": "1"}));
}

//! Watches and the caches that they fill, through outages of the API server.

use std::{collections::BTreeSet, sync::Arc};

use basal_e2e::servers::{ApiServer, ApiServerOptions};
use basal_objects::{
    cache::{Cache, Source, Version},
    object::{
        Object, ObjectKey,
        resources::{CILIUM_NODE, NODE},
    },
    port::{ObjectEvent, Objects, Preconditions, ReadError, Scope},
};
use basal_runtime::{outcome::Outcome, readiness::Readiness};
use futures::StreamExt;
use serde_json::json;

use super::{connect, created, env, named, patch, start, until, within};

/// The label that the test writes. A node whose label is `bad` is no valid one.
fn label(node: &Object) -> Result<String, String> {
    match node.labels().get("label") {
        Some(&"bad") => Err("metadata.labels.label: must not be bad".to_owned()),
        label => Ok(label.copied().unwrap_or_default().to_owned()),
    }
}

fn names(cache: &Cache<String>) -> BTreeSet<String> {
    cache.read(|store| store.iter().map(|(key, _)| key.name.clone()).collect())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_begins_with_a_list_and_goes_on_with_changes() {
    let server = start();
    let objects = connect(&server, "admin").await;
    let first = created(&objects, "a").await;
    let mut watch = objects.watch(NODE, &Scope::default());
    let mut next = async || within("an event", watch.next()).await.unwrap();
    assert_eq!(next().await, Ok(ObjectEvent::Restarted));
    let Ok(ObjectEvent::Listed(listed)) = next().await else { panic!("no object listed") };
    assert_eq!((listed.uid(), &listed.0["kind"], &listed.0["apiVersion"]), (first.uid(), &json!("Node"), &json!("v1")));
    assert_eq!(next().await, Ok(ObjectEvent::InSync));
    let changed = patch(&first, json!({"metadata": {"labels": {"label": "x"}}}));
    let Outcome::Done(second) = objects.patch(NODE, &named("a"), changed).await else { panic!("no patch") };
    let Ok(ObjectEvent::Applied(applied)) = next().await else { panic!("no change") };
    assert_eq!(applied.resource_version(), second.resource_version());
    let only_if =
        Preconditions { uid: second.uid().to_owned(), resource_version: second.resource_version().to_owned() };
    assert_eq!(objects.delete(NODE, &named("a"), only_if).await, Outcome::Done(()));
    let Ok(ObjectEvent::Deleted(deleted)) = next().await else { panic!("no delete") };
    assert_eq!(deleted.key(), named("a"));
    assert!(Version::new(deleted.resource_version()) > Version::new(second.resource_version()));

    // What cannot be watched says why, and goes on trying.
    let nobody = connect(&server, "nobody").await;
    let mut forbidden = nobody.watch(NODE, &Scope::default());
    let mut unknown = objects.watch(CILIUM_NODE, &Scope::default());
    for _attempt in 0..2 {
        assert!(matches!(forbidden.next().await, Some(Err(ReadError::Forbidden(_)))));
        let missing = ReadError::UnknownKind("ciliumnodes.cilium.io".to_owned());
        assert_eq!(unknown.next().await, Some(Err(missing)));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_streams_no_lists_is_watched_alike() {
    let args = vec!["--feature-gates=WatchList=false".to_owned()];
    let server = ApiServer::start(ApiServerOptions { args, ..ApiServerOptions::default() }).unwrap();
    let objects = connect(&server, "admin").await;
    let first = created(&objects, "a").await;
    let mut watch = objects.watch(NODE, &Scope::default());
    let mut next = async || within("an event", watch.next()).await.unwrap();
    assert_eq!(next().await, Ok(ObjectEvent::Restarted));
    assert_eq!(next().await, Ok(ObjectEvent::Listed(first)));
    assert_eq!(next().await, Ok(ObjectEvent::InSync));
    let second = created(&objects, "b").await;
    assert_eq!(next().await, Ok(ObjectEvent::Applied(second)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cache_survives_an_outage_in_which_the_watched_revision_is_lost() {
    let mut server = start();
    let objects: Arc<dyn Objects> = Arc::new(connect(&server, "admin").await);
    for name in ["kept", "deleted", "changed"] {
        created(&*objects, name).await;
    }
    let readiness = Readiness::new();
    let (scope, ready) = (Scope::default(), readiness.guard("node cache"));
    let (cache, task) =
        Cache::follow(Source { objects: &objects, env: env().as_ref(), resource: NODE, scope, parse: label, ready });
    within("the first list", cache.wait_synced()).await;
    within("readiness", readiness.ready()).await;
    let changes = cache.subscribe();
    assert_eq!(within("what is there", changes.next()).await.len(), 3);

    // Own writes become visible.
    let changed = objects.get(NODE, &named("changed")).await.unwrap().unwrap();
    let body = json!({"metadata": {"labels": {"label": "bad"}}});
    let Outcome::Done(changed) = objects.patch(NODE, &named("changed"), patch(&changed, body)).await else {
        panic!("no patch")
    };
    let version = Version::new(changed.resource_version());
    until("the own write in the cache", async || cache.has_seen(&named("changed"), &version)).await;
    let invalid = cache.get(&named("changed")).unwrap();
    assert_eq!(invalid.valid(), None);
    assert_eq!(within("the change", changes.next()).await, BTreeSet::from([named("changed")]));

    // While the server is away an object vanishes from etcd, and the history with it: after the restart the watch cannot
    // go on where it was.
    server.kill().unwrap();
    until("the failure of the watch", async || cache.failure().is_some()).await;
    assert_eq!(names(&cache).len(), 3, "an outage is no deletion");
    let etcd = server.etcd();
    etcd.etcdctl(&["del", "/registry/minions/deleted"]).unwrap();
    let status = etcd.etcdctl(&["endpoint", "status", "-w", "json"]).unwrap();
    let status: serde_json::Value = serde_json::from_str(&status).unwrap();
    let revision = status.pointer("/0/Status/header/revision").unwrap().to_string();
    etcd.etcdctl(&["compact", &revision]).unwrap();
    server.restart().unwrap();
    let wanted = BTreeSet::from(["changed".to_owned(), "kept".to_owned()]);
    until("the deletion in the cache", async || names(&cache) == wanted).await;
    assert!(within("the change", changes.next()).await.contains(&ObjectKey::cluster("deleted")));
    created(&*objects, "new").await;
    until("the new object", async || names(&cache).contains("new")).await;
    assert_eq!(cache.failure(), None);
    task.abort();
}

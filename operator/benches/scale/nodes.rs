//! Nodes that are objects alone: no kubelet and no agent stands behind them, and the bench writes what those would.

use std::{
    collections::BTreeSet,
    sync::atomic::{AtomicUsize, Ordering},
};

use anyhow::Context as _;
use basal_crds::kvstore::keys;
use basal_kvstore::kv::{Range, WatchEvent};
use basal_objects::{
    object::{Object, Resource, resources},
    port::{ObjectEvent, Objects, Refusal, Scope},
};
use basal_runtime::outcome::Outcome;
use futures::{Stream, StreamExt as _, TryStreamExt as _, future::BoxFuture, stream};
use serde_json::{Map, Value, json};

use super::servers::{Clients, done};

/// Nodes that are made at the same time: twice as many as the operator writes at once, so that it never waits for them.
const CREATES: usize = 64;

/// Who makes what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Made {
    /// The Node alone.
    Node,
    /// The Node, and then the CiliumNode, as the node's agent does. The operator makes it if it comes first.
    Both,
}

/// The name of a Node.
pub(crate) fn name(number: u32) -> String {
    format!("node-{number}")
}

/// The labels of a Node, as a kubelet sets them.
pub(crate) fn labels(number: u32) -> [(&'static str, String); 5] {
    [
        ("kubernetes.io/hostname", name(number)),
        ("kubernetes.io/os", "linux".to_owned()),
        ("kubernetes.io/arch", "amd64".to_owned()),
        ("topology.kubernetes.io/region", "r1".to_owned()),
        ("topology.kubernetes.io/zone", format!("z{}", number % 3)),
    ]
}

/// The InternalIPs of a Node, IPv4 and IPv6.
pub(crate) fn addresses(number: u32) -> [String; 2] {
    let (high, low) = (number >> 8, number & 0xff);
    [format!("172.{}.{}.{low}", 16 + (high >> 8), high & 0xff), format!("fc00::{number:x}")]
}

fn metadata(number: u32) -> Value {
    let labels: Map<String, Value> =
        labels(number).into_iter().map(|(key, value)| (key.to_owned(), value.into())).collect();
    json!({ "name": name(number), "labels": labels })
}

async fn create_node(objects: &dyn Objects, number: u32) -> anyhow::Result<Object> {
    let [v4, v6] = addresses(number);
    let node = json!({
        "apiVersion": "v1", "kind": "Node", "metadata": metadata(number),
        "status": { "addresses": [
            { "type": "InternalIP", "address": v4 },
            { "type": "InternalIP", "address": v6 },
            { "type": "Hostname", "address": name(number) },
        ] },
    });
    done(objects.create(resources::NODE, Object(node)).await)
}

/// `None`: somebody else made it.
async fn create_cilium_node(objects: &dyn Objects, number: u32, node: &Object) -> anyhow::Result<Option<Object>> {
    let [v4, v6] = addresses(number);
    let mut object = json!({
        "apiVersion": "cilium.io/v2", "kind": "CiliumNode", "metadata": metadata(number),
        "spec": {
            "addresses": [{ "type": "InternalIP", "ip": v4 }, { "type": "InternalIP", "ip": v6 }],
            "ipam": {},
        },
    });
    object["metadata"]["ownerReferences"] =
        json!([{ "apiVersion": "v1", "kind": "Node", "name": name(number), "uid": node.uid() }]);
    match objects.create(resources::CILIUM_NODE, Object(object)).await {
        Outcome::Refused(Refusal::AlreadyExists) => Ok(None),
        other => done(other).map(Some),
    }
}

/// Makes nodes as fast as the API server takes them; answers each with the CiliumNode that was made for it.
pub(crate) fn make(
    objects: &dyn Objects,
    numbers: std::ops::Range<u32>,
    made: Made,
) -> impl Stream<Item = anyhow::Result<(u32, Option<Object>)>> {
    let make = move |number| async move {
        let node = create_node(objects, number).await.with_context(|| format!("creating {}", name(number)))?;
        let cilium_node = match made {
            Made::Node => None,
            Made::Both => create_cilium_node(objects, number, &node)
                .await
                .with_context(|| format!("creating the CiliumNode of {}", name(number)))?,
        };
        Ok((number, cilium_node))
    };
    stream::iter(numbers).map(make).buffer_unordered(CREATES)
}

/// Makes nodes and waits until each is served.
pub(crate) async fn make_and_wait(clients: &Clients, numbers: std::ops::Range<u32>) -> anyhow::Result<()> {
    let served = wait_served(clients, numbers.clone()).await?;
    let made = make(clients.ports.objects.as_ref(), numbers, Made::Both).try_for_each(async |_| Ok(()));
    futures::try_join!(made, served).map(drop)
}

/// What waits until the last write for each node is seen: its record in etcd, or the status that confirms its blocks.
pub(crate) async fn wait_served<'a>(
    clients: &'a Clients,
    numbers: std::ops::Range<u32>,
) -> anyhow::Result<BoxFuture<'a, anyhow::Result<()>>> {
    let mut missing: BTreeSet<String> = numbers.map(name).collect();
    let Some(kv) = clients.kv.as_deref() else {
        let objects = clients.ports.objects.as_ref();
        return Ok(Box::pin(async move {
            until(objects, resources::CILIUM_NODE, missing, &AtomicUsize::new(0), is_confirmed).await
        }));
    };
    let prefix = keys::nodes_of(clients.ports.cluster.name());
    let before = kv.range(Range { keys_only: true, limit: 1, ..Range::prefix(&prefix) }).await?;
    let mut batches = kv.watch(&prefix, before.header.revision + 1);
    Ok(Box::pin(async move {
        while !missing.is_empty() {
            for event in batches.next().await.context("the watch of the node records ended")??.events {
                if let (WatchEvent::Put(_), Some(name)) = (&event, event.key().strip_prefix(&prefix)) {
                    missing.remove(name);
                }
            }
        }
        Ok(())
    }))
}

/// Waits until each object of a kind was seen to be `fine`, and counts them.
pub(crate) async fn until(
    objects: &dyn Objects,
    resource: Resource,
    mut missing: BTreeSet<String>,
    seen: &AtomicUsize,
    fine: fn(&Object) -> bool,
) -> anyhow::Result<()> {
    // One alone is watched alone: the others' list would be in the way of what is measured.
    let fields = (missing.len() == 1).then(|| missing.first().map(|name| format!("metadata.name={name}"))).flatten();
    let mut events = objects.watch(resource, &Scope { fields, ..Scope::default() });
    while !missing.is_empty() {
        match events.next().await.with_context(|| format!("the watch of the {} ended", resource.plural))? {
            Ok(ObjectEvent::Listed(object) | ObjectEvent::Applied(object)) if fine(&object) => {
                seen.fetch_add(usize::from(missing.remove(object.name())), Ordering::Relaxed);
            }
            // The watch begins anew by itself; it does so while a kind is young.
            Ok(_) | Err(_) => {}
        }
    }
    Ok(())
}

fn is_confirmed(cilium_node: &Object) -> bool {
    let confirmed = cilium_node.0.pointer("/status/ipam/pod-cidrs").and_then(Value::as_object);
    confirmed.is_some_and(|blocks| !blocks.is_empty())
}

//! Machines with a kubelet, an agent and pods, as far as the operator can tell: Nodes, CiliumEndpoints, ip records.

use std::net::IpAddr;

use basal_crds::kvstore::keys::IPS_PREFIX;
use basal_ipam::prefix::PodCidr;
use basal_kvstore::kv::{Keys, Op, Txn};
use basal_objects::{
    object::{Object, ObjectKey, Resource, resources},
    port::{MergePatch, Preconditions},
};
use serde_json::{Value, json};

use crate::{process::ProcessPorts, world::World};

/// Tries of somebody who edits an object that others write too.
const TRIES: usize = 5;

/// What a person or a machine does beside the operator. Its calls do not go wrong.
pub(super) struct Hands<'a> {
    world: &'a World,
    ports: ProcessPorts,
}

impl<'a> Hands<'a> {
    pub(super) fn new(world: &'a World) -> Self {
        Self { world, ports: world.user() }
    }

    pub(super) async fn get(&self, resource: Resource, name: &str) -> Option<Object> {
        // A server without faults has no other answer to a kind that it knows.
        self.ports.objects.get(resource, &ObjectKey::cluster(name)).await.ok().flatten()
    }

    /// Creates an object, unless there is one.
    pub(super) async fn create(&self, resource: Resource, object: Value) {
        drop(self.ports.objects.create(resource, Object(object)).await);
    }

    /// Deletes an object, if there is one.
    pub(super) async fn delete(&self, resource: Resource, key: &ObjectKey) {
        for _ in 0..TRIES {
            let Ok(Some(seen)) = self.ports.objects.get(resource, key).await else { return };
            let only_if =
                Preconditions { uid: seen.uid().to_owned(), resource_version: seen.resource_version().to_owned() };
            if self.ports.objects.delete(resource, key, only_if).await.is_done() {
                return;
            }
        }
    }

    /// Replaces `spec.ipam.podCIDRs` of a CiliumNode, if there is one.
    pub(super) async fn write_pod_cidrs(&self, name: &str, list: &[String]) {
        for _ in 0..TRIES {
            let Some(seen) = self.get(resources::CILIUM_NODE, name).await else { return };
            let patch = MergePatch {
                resource_version: seen.resource_version().to_owned(),
                uid: seen.uid().to_owned(),
                subresource: None,
                body: json!({ "spec": { "ipam": { "podCIDRs": list } } }),
            };
            if self.ports.objects.patch(resources::CILIUM_NODE, &seen.key(), patch).await.is_done() {
                return;
            }
        }
    }

    /// Registers a Node with one address of each family.
    pub(super) async fn register(&self, name: &str, number: u8) {
        let addresses = json!([
            { "type": "InternalIP", "address": format!("172.18.0.{number}") },
            { "type": "InternalIP", "address": format!("fc00::{number:x}") },
        ]);
        let node = json!({
            "apiVersion": "v1", "kind": "Node",
            "metadata": { "name": name, "labels": { "kubernetes.io/hostname": name } },
            "status": { "addresses": addresses },
        });
        self.create(resources::NODE, node).await;
    }

    /// Starts a pod with an address of each block.
    pub(super) async fn start_pod(&self, node: &str, number: u8, blocks: &[PodCidr]) {
        let addresses: Vec<IpAddr> = blocks.iter().map(|block| address(*block, number)).collect();
        let of = |family: fn(&IpAddr) -> bool| addresses.iter().find(|ip| family(ip)).map(ToString::to_string);
        let pair = json!({ "ipv4": of(IpAddr::is_ipv4), "ipv6": of(IpAddr::is_ipv6) });
        let name = pod(node, number);
        // A CiliumEndpoint without its pod would be collected.
        let pod = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": { "name": name, "namespace": "default" },
            "spec": { "nodeName": node, "containers": [{ "name": "main" }] },
        });
        self.create(resources::POD, pod).await;
        let endpoint = json!({
            "apiVersion": "cilium.io/v2", "kind": "CiliumEndpoint",
            "metadata": { "name": name, "namespace": "default" },
            "status": { "networking": { "addressing": [pair] } },
        });
        self.create(resources::CILIUM_ENDPOINT, endpoint).await;
        let puts = addresses.iter().map(|ip| Op::Put { key: ip_key(*ip), value: b"{}".to_vec(), lease: 0 });
        self.write(puts.collect()).await;
    }

    /// Ends a pod.
    pub(super) async fn end_pod(&self, node: &str, number: u8) {
        let key = ObjectKey::namespaced("default", pod(node, number));
        let seen = self.ports.objects.get(resources::CILIUM_ENDPOINT, &key).await.ok().flatten();
        let pair = seen.as_ref().and_then(|seen| seen.0.pointer("/status/networking/addressing/0"));
        let addresses = pair.and_then(Value::as_object).into_iter().flat_map(|pair| pair.values());
        let ips = addresses.filter_map(|text| text.as_str()?.parse().ok());
        self.write(ips.map(|ip| Op::Delete(Keys::One(ip_key(ip)))).collect()).await;
        self.delete(resources::CILIUM_ENDPOINT, &key).await;
        self.delete(resources::POD, &key).await;
    }

    async fn write(&self, then: Vec<Op>) {
        if !then.is_empty() {
            drop(self.ports.kv.txn(Txn { then, ..Txn::default() }).await);
        }
    }

    /// What only names owners that are gone goes.
    pub(super) fn collect_garbage(&self) {
        self.world.objects().collect_garbage();
    }
}

fn pod(node: &str, number: u8) -> String {
    format!("{node}-pod{number}")
}

fn ip_key(ip: IpAddr) -> String {
    format!("{IPS_PREFIX}{ip}")
}

/// An address of a block that is neither its first nor its last.
fn address(block: PodCidr, number: u8) -> IpAddr {
    block.nth(block.family().bits(), 1 + u128::from(number % 2)).address()
}

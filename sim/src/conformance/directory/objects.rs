//! Others, at the API server.

use std::sync::Arc;

use async_trait::async_trait;
use basal_crds::{
    identity::IdentityId,
    kvstore::{IpRecord, NodeRecord},
    labels::Labels,
    resources::{CiliumIdentity, crds},
};
use basal_ipam::names::NodeName;
use basal_objects::{
    object::{
        Object, ObjectKey, Resource,
        resources::{CILIUM_ENDPOINT, CILIUM_IDENTITY, CILIUM_NODE, CRD, NAMESPACE},
    },
    port::{MergePatch, ObjectEvent, Objects, Preconditions, Scope},
};
use basal_runtime::outcome::Outcome;
use serde_json::{Value, json};

use super::{super::Verdict, POD_NAMESPACE, done, next};

/// Others, at the API server.
#[expect(missing_debug_implementations, reason = "holds a trait object")]
pub struct ObjectsAdmin(pub Arc<dyn Objects>);

/// Makes the kinds known that the suite needs, and a namespace for its pods.
///
/// # Errors
/// When they cannot be created.
pub async fn prepare(objects: &Arc<dyn Objects>) -> Verdict {
    let admin = ObjectsAdmin(Arc::clone(objects));
    for definition in crds() {
        done("create a kind", admin.create(CRD, definition.object).await)?;
    }
    for resource in [CILIUM_NODE, CILIUM_ENDPOINT, CILIUM_IDENTITY] {
        // A watch goes on after errors, so it gets there when the kind does.
        let mut watch = objects.watch(resource, &Scope::default());
        while !matches!(next("the new kind", &mut watch).await?, Ok(ObjectEvent::InSync)) {}
    }
    let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": POD_NAMESPACE}});
    done("create a namespace", admin.create(NAMESPACE, namespace).await)
}

fn answer<T, R: std::fmt::Debug>(outcome: Outcome<T, R>) -> Result<T, String> {
    match outcome {
        Outcome::Done(value) => Ok(value),
        Outcome::Refused(refusal) => Err(format!("refused: {refusal:?}")),
        Outcome::Unknown(why) => Err(why),
    }
}

impl ObjectsAdmin {
    async fn create(&self, resource: Resource, object: Value) -> Result<(), String> {
        answer(self.0.create(resource, Object(object)).await).map(drop)
    }

    async fn get(&self, resource: Resource, key: &ObjectKey) -> Result<Option<Object>, String> {
        self.0.get(resource, key).await.map_err(|error| error.to_string())
    }

    async fn patch(
        &self,
        resource: Resource,
        key: &ObjectKey,
        subresource: Option<&'static str>,
        body: Value,
    ) -> Result<(), String> {
        let seen = self.get(resource, key).await?.ok_or_else(|| format!("there is no {key}"))?;
        let (resource_version, uid) = (seen.resource_version().to_owned(), seen.uid().to_owned());
        let patch = MergePatch { resource_version, uid, subresource, body };
        answer(self.0.patch(resource, key, patch).await).map(drop)
    }

    async fn delete(&self, resource: Resource, key: &ObjectKey) -> Result<(), String> {
        let seen = self.get(resource, key).await?.ok_or_else(|| format!("there is no {key}"))?;
        let only_if =
            Preconditions { uid: seen.uid().to_owned(), resource_version: seen.resource_version().to_owned() };
        answer(self.0.delete(resource, key, only_if).await)
    }
}

fn node_key(name: &NodeName) -> ObjectKey {
    ObjectKey::cluster(name.as_str())
}

fn endpoint_key(record: &IpRecord) -> ObjectKey {
    ObjectKey::namespaced(record.namespace.clone(), record.pod_name.clone())
}

#[async_trait]
impl super::DirectoryAdmin for ObjectsAdmin {
    /// Blocks are listed first, then confirmed, as by the operator.
    async fn put_node(&self, record: &NodeRecord) -> Result<(), String> {
        let key = node_key(&record.name);
        let blocks: Vec<String> = record.cidrs().map(|cidr| cidr.to_string()).collect();
        let addresses: Vec<Value> =
            record.addresses.iter().map(|a| json!({"type": a.kind.as_str(), "ip": a.ip.to_string()})).collect();
        let mut health = json!({});
        if let Some(ip) = record.ipv4_health {
            health["ipv4"] = ip.to_string().into();
        }
        let spec = json!({"addresses": addresses, "bootid": record.boot_id, "health": health,
            "ipam": {"podCIDRs": blocks}});
        if self.get(CILIUM_NODE, &key).await?.is_some() {
            self.patch(CILIUM_NODE, &key, None, json!({ "spec": spec })).await?;
        } else {
            let object = json!({"apiVersion": CILIUM_NODE.api_version(), "kind": CILIUM_NODE.kind,
                "metadata": {"name": key.name}, "spec": spec});
            self.create(CILIUM_NODE, object).await?;
        }
        let mut uses = json!({});
        for block in blocks {
            uses[block] = json!({"status": "in-use"});
        }
        self.patch(CILIUM_NODE, &key, Some("status"), json!({"status": {"ipam": {"pod-cidrs": uses}}})).await
    }

    async fn spoil_node(&self, name: &NodeName) -> Result<(), String> {
        self.patch(CILIUM_NODE, &node_key(name), None, json!({"spec": {"health": {"ipv4": "x"}}})).await
    }

    async fn delete_node(&self, name: &NodeName) -> Result<(), String> {
        self.delete(CILIUM_NODE, &node_key(name)).await
    }

    /// The CiliumEndpoint that the agent writes for the pod.
    async fn put_ip(&self, record: &IpRecord) -> Result<(), String> {
        let mut addressing = json!({});
        let ip = record.target.ip();
        addressing[if ip.is_ipv4() { "ipv4" } else { "ipv6" }] = ip.to_string().into();
        let node = record.host_ip.map(|ip| ip.to_string()).unwrap_or_default();
        let object = json!({"apiVersion": CILIUM_ENDPOINT.api_version(), "kind": CILIUM_ENDPOINT.kind,
            "metadata": {"namespace": record.namespace, "name": record.pod_name},
            "status": {"id": 1, "state": "ready", "identity": {"id": record.identity.get()},
                "networking": {"addressing": [addressing], "node": node}}});
        self.create(CILIUM_ENDPOINT, object).await
    }

    async fn delete_ip(&self, record: &IpRecord) -> Result<(), String> {
        self.delete(CILIUM_ENDPOINT, &endpoint_key(record)).await
    }

    async fn leave_ip(&self, record: &IpRecord) -> Result<(), String> {
        self.put_ip(record).await
    }

    async fn identity(&self, id: IdentityId) -> Result<Option<Labels>, String> {
        let Some(object) = self.get(CILIUM_IDENTITY, &ObjectKey::cluster(id.to_string())).await? else {
            return Ok(None);
        };
        let identity: CiliumIdentity = object.parse().map_err(|error| error.to_string())?;
        Labels::from_security_labels(&identity.security_labels).map(Some).map_err(|error| error.to_string())
    }

    async fn delete_identity(&self, id: IdentityId) -> Result<(), String> {
        self.delete(CILIUM_IDENTITY, &ObjectKey::cluster(id.to_string())).await
    }
}

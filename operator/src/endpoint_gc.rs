//! Collecting CiliumEndpoints whose pod is gone or has ended, as Cilium's operator does it: they are left where no agent
//! saw the pod go, and a block does not leave quarantine while an endpoint has an address in it.
//!
//! Lists only say where to look. What decides is a read of the pod at quorum, made after the endpoint was read; and the
//! delete holds only for the endpoint as it was read, so an agent that writes it meanwhile wins.

use std::{collections::BTreeMap, fmt, sync::Arc};

use basal_objects::{
    object::{Object, ObjectKey, resources},
    port::{Freshness, Objects, Preconditions, ReadError, Refusal, Scope, gather},
};
use basal_runtime::outcome::Outcome;
use futures::{StreamExt as _, stream};
use serde_json::Value;
use tracing::{info, warn};

use crate::node::endpoints::{has_ended, owning_pod};

/// Pods that are read at once.
const CONCURRENCY: usize = 16;

/// What one round did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct EndpointGcReport {
    /// Endpoints that stay.
    pub alive: usize,
    /// Endpoints that were deleted.
    pub deleted: usize,
    /// Endpoints that were to be deleted, or looked at, and could not be. The next round tries again.
    pub failed: usize,
}

/// Why an endpoint has no pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Dead {
    /// There is no pod of its name.
    Gone,
    /// The pod of its name is another one than the one that owns it.
    Replaced,
    /// The pod's containers have all ended and will not start again.
    Ended,
}

impl fmt::Display for Dead {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Gone => "its pod is gone",
            Self::Replaced => "its pod is gone, and another one has the name",
            Self::Ended => "its pod has ended",
        })
    }
}

/// A CiliumEndpoint, as far as it matters here.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Endpoint {
    key: ObjectKey,
    uid: String,
    resource_version: String,
    /// The uid of the pod that owns it; `None` when nothing owns it.
    pod: Option<String>,
}

impl Endpoint {
    /// `None` for one that is none of a pod's, or goes already.
    fn of(object: &Object) -> Option<Self> {
        let pod = owning_pod(object);
        let owners = object.0.pointer("/metadata/ownerReferences").and_then(Value::as_array);
        if object.is_deleting() || (pod.is_none() && owners.is_some_and(|owners| !owners.is_empty())) {
            return None;
        }
        Some(Self {
            key: object.key(),
            uid: object.uid().to_owned(),
            resource_version: object.resource_version().to_owned(),
            pod: pod.map(str::to_owned),
        })
    }

    /// Why its pod is dead, by the pod of its name; `None` when it lives.
    fn dead(&self, pod: Option<&Pod>) -> Option<Dead> {
        match pod {
            None => Some(Dead::Gone),
            Some(pod) if self.pod.as_ref().is_some_and(|uid| *uid != pod.uid) => Some(Dead::Replaced),
            Some(pod) => pod.ended.then_some(Dead::Ended),
        }
    }
}

/// A Pod, as far as it matters here.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Pod {
    uid: String,
    ended: bool,
}

impl Pod {
    fn of(object: &Object) -> Self {
        Self { uid: object.uid().to_owned(), ended: has_ended(object) }
    }
}

/// Collects the CiliumEndpoints of the cluster.
#[derive(Clone)]
pub struct EndpointGc {
    objects: Arc<dyn Objects>,
}

impl EndpointGc {
    /// Works through the ports of a leader.
    #[must_use]
    pub fn new(objects: Arc<dyn Objects>) -> Self {
        Self { objects }
    }

    /// One round.
    ///
    /// # Errors
    /// A list could not be read; nothing was deleted.
    pub async fn round(&self) -> Result<EndpointGcReport, ReadError> {
        let (objects, everywhere, mut total) = (self.objects.as_ref(), Scope::default(), 0);
        let endpoints = gather(objects, resources::CILIUM_ENDPOINT, &everywhere, Freshness::Quorum, |object| {
            total += 1;
            Endpoint::of(object)
        });
        let mut by_namespace: BTreeMap<Option<String>, Vec<Endpoint>> = BTreeMap::new();
        for endpoint in endpoints.await? {
            by_namespace.entry(endpoint.key.namespace.clone()).or_default().push(endpoint);
        }
        let mut suspects = Vec::new();
        // One namespace after the other, since pods are large and the API server sends all of theirs.
        for (namespace, endpoints) in by_namespace {
            let scope = Scope { namespace, ..Scope::default() };
            let pod = |pod: &Object| Some((pod.name().to_owned(), Pod::of(pod)));
            let pods = gather(objects, resources::POD, &scope, Freshness::Any, pod).await?;
            let pods: BTreeMap<String, Pod> = pods.into_iter().collect();
            suspects.extend(endpoints.into_iter().filter(|one| one.dead(pods.get(&one.key.name)).is_some()));
        }
        let mut report = EndpointGcReport { alive: total - suspects.len(), ..EndpointGcReport::default() };
        let ends = stream::iter(suspects).map(|endpoint| self.collect(endpoint)).buffer_unordered(CONCURRENCY);
        let ends: Vec<End> = ends.collect().await;
        for end in ends {
            match end {
                End::Alive => report.alive += 1,
                End::Deleted => report.deleted += 1,
                End::Failed => report.failed += 1,
                End::GoneAlready => {}
            }
        }
        Ok(report)
    }

    /// Looks at the pod itself, and deletes the endpoint if it has none.
    async fn collect(&self, endpoint: Endpoint) -> End {
        let pod = match self.objects.get(resources::POD, &endpoint.key).await {
            Ok(pod) => pod,
            Err(error) => {
                warn!(endpoint = %endpoint.key, %error, "the pod of a CiliumEndpoint could not be read");
                return End::Failed;
            }
        };
        let Some(dead) = endpoint.dead(pod.as_ref().map(Pod::of).as_ref()) else { return End::Alive };
        let Endpoint { key, uid, resource_version, .. } = endpoint;
        let only_if = Preconditions { uid, resource_version };
        match self.objects.delete(resources::CILIUM_ENDPOINT, &key, only_if).await {
            Outcome::Done(()) => {
                info!(endpoint = %key, why = %dead, "CiliumEndpoint deleted");
                End::Deleted
            }
            Outcome::Refused(Refusal::NotFound(_)) => End::GoneAlready,
            // Its agent wrote it since, so it lives.
            Outcome::Refused(Refusal::Conflict(_)) => End::Alive,
            Outcome::Refused(refusal) => {
                warn!(endpoint = %key, %refusal, "a CiliumEndpoint without pod was not deleted");
                End::Failed
            }
            Outcome::Unknown(why) => {
                warn!(endpoint = %key, why, "a CiliumEndpoint without pod may not have been deleted");
                End::Failed
            }
        }
    }
}

/// What became of an endpoint that seemed to have no pod.
enum End {
    Alive,
    Deleted,
    GoneAlready,
    Failed,
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn endpoint(owners: &Value) -> Object {
        let metadata = json!({
            "namespace": "ns", "name": "p", "uid": "e", "resourceVersion": "5", "ownerReferences": owners,
        });
        Object(json!({ "metadata": metadata }))
    }

    fn pod(uid: &str, phase: &str) -> Pod {
        Pod::of(&Object(json!({ "metadata": { "uid": uid }, "status": { "phase": phase } })))
    }

    #[test]
    fn a_pod_is_the_owner_alive_and_of_that_uid() {
        let owner = json!([{ "apiVersion": "v1", "kind": "Pod", "name": "p", "uid": "u1" }]);
        let one = Endpoint::of(&endpoint(&owner)).unwrap();
        assert_eq!(one.dead(Some(&pod("u1", "Running"))), None);
        assert_eq!(one.dead(Some(&pod("u1", "Pending"))), None);
        assert_eq!(one.dead(Some(&pod("u1", "Unknown"))), None);
        assert_eq!(one.dead(Some(&pod("u1", "Succeeded"))), Some(Dead::Ended));
        assert_eq!(one.dead(Some(&pod("u1", "Failed"))), Some(Dead::Ended));
        assert_eq!(one.dead(Some(&pod("u2", "Running"))), Some(Dead::Replaced));
        assert_eq!(one.dead(None), Some(Dead::Gone));
    }

    #[test]
    fn without_an_owner_the_name_tells_and_other_owners_decide_themselves() {
        let one = Endpoint::of(&endpoint(&json!([]))).unwrap();
        assert_eq!(one.dead(Some(&pod("u2", "Running"))), None);
        assert_eq!(one.dead(None), Some(Dead::Gone));
        let of_node = json!([{ "apiVersion": "cilium.io/v2", "kind": "CiliumNode", "name": "n", "uid": "u" }]);
        assert_eq!(Endpoint::of(&endpoint(&of_node)), None);
        let mut going = endpoint(&json!([]));
        going.0["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
        assert_eq!(Endpoint::of(&going), None);
    }
}

//! Policies that exist and are not enforced: whoever wrote them must not believe that they are.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
};

use basal_objects::{
    cache::{Cache, Source},
    events::{EventRecorder, EventType, Happening, Regarding},
    object::{Object, ObjectKey, Resource, resources::NETWORK_POLICY},
    port::{Objects, Scope},
};
use basal_runtime::{
    env::{SharedEnv, TaskHandle},
    readiness::Readiness,
    reason::Reason,
    sync::lock,
};
use tokio_util::sync::CancellationToken;

use crate::metrics::AgentMetrics;

const NOT_ENFORCED: Reason = Reason::new("NotEnforced");
const WATCHED: Reason = Reason::new("Watched");

const fn cilium(kind: &'static str, plural: &'static str, namespaced: bool) -> Resource {
    Resource { group: "cilium.io", version: "v2", kind, plural, namespaced }
}

/// The kinds that are looked for.
const KINDS: [Resource; 3] = [
    NETWORK_POLICY,
    cilium("CiliumNetworkPolicy", "ciliumnetworkpolicies", true),
    cilium("CiliumClusterwideNetworkPolicy", "ciliumclusterwidenetworkpolicies", false),
];

/// The policies that there are.
#[derive(Debug, Clone, Default)]
pub struct Policies {
    found: Arc<Mutex<BTreeMap<(Resource, ObjectKey), Version>>>,
}

/// Which policy of a name, and which edition of its rules.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Version {
    uid: String,
    generation: i64,
}

impl Version {
    /// Reads an object; for a cache.
    fn parse(object: &Object) -> Result<Self, String> {
        let generation = object.0.pointer("/metadata/generation").and_then(serde_json::Value::as_i64);
        Ok(Self { uid: object.uid().to_owned(), generation: generation.unwrap_or_default() })
    }

    /// The same on every node.
    fn event_name(&self) -> String {
        format!("not-enforced.{}.{}", self.uid, self.generation)
    }
}

impl Policies {
    /// The line of the status; `None` when there is no policy.
    #[must_use]
    pub fn status(&self) -> Option<String> {
        let found = lock(&self.found);
        let ((resource, first), _) = found.first_key_value()?;
        let more = match found.len() {
            1 => String::new(),
            n => format!(" and {} more", n - 1),
        };
        Some(format!("NOT ENFORCED: {} {first}{more}", resource.kind))
    }

    /// Begins to watch. Readiness does not depend on it.
    pub fn watch(
        &self,
        env: &SharedEnv,
        objects: &Arc<dyn Objects>,
        events: &EventRecorder,
        metrics: &AgentMetrics,
        stop: &CancellationToken,
    ) -> Vec<TaskHandle> {
        // Whether policies can be watched is not a matter of this node's readiness.
        let apart = Readiness::new();
        let mut tasks = Vec::new();
        for resource in KINDS {
            let (cache, task) = Cache::follow(Source {
                objects,
                env: &**env,
                resource,
                scope: Scope::default(),
                parse: Version::parse,
                ready: apart.guard(resource.kind),
            });
            tasks.push(task);
            let (policies, events, metrics, stop) = (self.clone(), events.clone(), metrics.clone(), stop.clone());
            let follow = async move { policies.follow(resource, &cache, &events, &metrics).await };
            tasks.push(env.spawn(
                "policies",
                Box::pin(async move { stop.run_until_cancelled(follow).await.unwrap_or_default() }),
            ));
        }
        tasks
    }

    async fn follow(&self, resource: Resource, cache: &Cache<Version>, events: &EventRecorder, metrics: &AgentMetrics) {
        let changes = cache.subscribe();
        loop {
            for key in changes.next().await {
                let version = cache.get(&key).and_then(|cached| cached.valid().cloned());
                let Some(version) = version else {
                    lock(&self.found).remove(&(resource, key));
                    continue;
                };
                let before = lock(&self.found).insert((resource, key.clone()), version.clone());
                if before.as_ref() == Some(&version) {
                    continue;
                }
                tracing::warn!(kind = resource.kind, %key, "a policy exists and is NOT ENFORCED");
                // Every node tells, of each edition: together they make one event.
                let shared = Some(version.event_name());
                events.record(Happening {
                    regarding: Regarding { resource, key, uid: version.uid },
                    event_type: EventType::Warning,
                    reason: NOT_ENFORCED,
                    action: WATCHED,
                    note: "This policy is NOT ENFORCED: Basal does not enforce policies yet. All traffic that it means to \
                           forbid is allowed."
                        .to_owned(),
                    shared,
                });
            }
            metrics.policies_not_enforced.set(i64::try_from(lock(&self.found).len()).unwrap_or(i64::MAX));
        }
    }
}

//! Gives endpoints their identities, and new ones when labels change.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use basal_crds::{directory::Directory, labels::Labels};
use basal_objects::{cache::Cache, object::ObjectKey};
use basal_runtime::{
    backoff::{Backoff, Failures},
    env::SharedEnv,
};
use futures::{FutureExt, StreamExt, select_biased, stream};
use tokio_util::sync::CancellationToken;

use super::{
    filter::LabelFilter,
    labels::{PodFacts, pod_labels},
};
use crate::{
    endpoint::{Endpoints, manager::PodDetails},
    journal::JournalKey,
    pods::{PodInfo, pod_key},
};

/// So many allocations at once.
const CONCURRENCY: usize = 16;
const RETRY: Backoff = Backoff::new(Duration::from_millis(500), Duration::from_secs(30));

/// What the task works with.
pub struct Identities {
    /// Clock and randomness.
    pub env: SharedEnv,
    /// Where identities are allocated.
    pub directory: Arc<dyn Directory>,
    /// Whom they are for.
    pub endpoints: Endpoints,
    /// The pods of this node.
    pub pods: Cache<PodInfo>,
    /// The labels of all namespaces.
    pub namespaces: Cache<BTreeMap<String, String>>,
    /// Which labels count.
    pub filter: LabelFilter,
    /// The cluster's name.
    pub cluster: String,
}

/// An endpoint that needs another identity, or whose pod's details changed.
type Task = (JournalKey, Labels, PodDetails);

impl Identities {
    /// Runs until it is stopped.
    pub async fn run(self, stop: CancellationToken) {
        let (pods, namespaces) = (self.pods.subscribe(), self.namespaces.subscribe());
        let mut endpoints = self.endpoints.changes();
        let mut failures = Failures::none(RETRY);
        loop {
            endpoints.mark_unchanged();
            let todo = self.todo();
            let results: Vec<bool> =
                stream::iter(todo).map(|task| self.give(task)).buffer_unordered(CONCURRENCY).collect().await;
            let retry = if results.contains(&false) {
                Some(failures.next(&*self.env))
            } else {
                failures.reset();
                None
            };
            let pause = async {
                match retry {
                    Some(pause) => tokio::time::sleep(pause).await,
                    None => std::future::pending().await,
                }
            };
            select_biased! {
                () = stop.cancelled().fuse() => return,
                _ = pods.next().fuse() => {}
                _ = namespaces.next().fuse() => {}
                changed = endpoints.changed().fuse() => if changed.is_err() { return },
                () = pause.fuse() => {}
            }
        }
    }

    fn todo(&self) -> Vec<Task> {
        let held: Vec<_> = self.endpoints.read(|state| {
            let with_pod = |(key, slot): (&JournalKey, &crate::endpoint::state::Slot)| {
                let pod = slot.record.as_ref()?.pod.clone()?;
                Some((key.clone(), pod, slot.reference.clone()))
            };
            state.iter().filter_map(with_pod).collect()
        });
        let mut todo = Vec::new();
        for (key, pod, reference) in held {
            let cached = self.pods.get(&pod_key(&pod));
            let Some(info) = cached.as_ref().and_then(|cached| cached.valid()) else { continue };
            if !info.is(&pod) {
                continue;
            }
            let cached = self.namespaces.get(&ObjectKey::cluster(pod.namespace.clone()));
            let Some(namespace_labels) = cached.as_ref().and_then(|cached| cached.valid()) else { continue };
            let facts = PodFacts {
                namespace: &pod.namespace,
                labels: &info.labels,
                namespace_labels,
                service_account: &info.details.service_account,
                cluster: &self.cluster,
            };
            match pod_labels(facts) {
                Ok(labels) => {
                    let labels = self.filter.pick(&labels);
                    if reference.as_ref() != Some(&labels) || self.endpoints.details(&key) != info.details {
                        todo.push((key, labels, info.details.clone()));
                    }
                }
                Err(error) => tracing::warn!(%pod, %error, "labels that no identity can have"),
            }
        }
        todo
    }

    async fn give(&self, (key, labels, details): Task) -> bool {
        match self.directory.allocate_identity(&labels).await {
            Ok(identity) => {
                self.endpoints.identify(&key, identity, labels, details).await;
                true
            }
            Err(error) => {
                tracing::warn!(%key, %error, "no identity yet");
                false
            }
        }
    }
}

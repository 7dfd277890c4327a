//! Keeps the CiliumEndpoints of this node's pods written.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex},
    time::Duration,
};

use basal_objects::{
    cache::Cache,
    object::{ObjectKey, resources::CILIUM_ENDPOINT},
    port::{MergePatch, Objects, Preconditions, Refusal},
};
use basal_runtime::{
    backoff::Backoff,
    env::SharedEnv,
    outcome::Outcome,
    queue::{Next, Queue},
    sync::lock,
};
use futures::{
    FutureExt, StreamExt, select_biased,
    stream::{self, BoxStream},
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::object::{Shown, Step, attachment_id, plan};
use crate::{
    endpoint::{Endpoints, record::Phase},
    metrics::AgentMetrics,
    node::{facts::Underlay, watch::ClaimReport},
    pods::{PodInfo, pod_key},
};

const CAPACITY: usize = 8192;
const CONCURRENCY: usize = 16;
const RETRY: Backoff = Backoff::new(Duration::from_millis(500), Duration::from_secs(60));

/// What the task works with.
pub struct Publisher {
    /// Clock and randomness.
    pub env: SharedEnv,
    /// The API server.
    pub objects: Arc<dyn Objects>,
    /// Whose objects they are.
    pub endpoints: Endpoints,
    /// The pods of this node.
    pub pods: Cache<PodInfo>,
    /// The node's addresses.
    pub underlay: watch::Receiver<Underlay>,
    /// The claim: an endpoint with an address in a block that was lost is not shown behind this node any more.
    pub claim: watch::Receiver<ClaimReport>,
    /// What is counted.
    pub metrics: AgentMetrics,
}

/// What the task remembers of pods.
#[derive(Debug, Default)]
struct Memory {
    /// What was written last, or is about to be.
    shown: BTreeMap<ObjectKey, Shown>,
    /// Attachments that a pod's object may still show.
    gone: BTreeMap<ObjectKey, BTreeSet<String>>,
}

impl Publisher {
    /// Runs until it is stopped. `vanished` names objects that were written and are gone.
    pub async fn run(self, vanished: BoxStream<'static, ObjectKey>, stop: CancellationToken) {
        let queue = Queue::new(Arc::clone(&self.env), CAPACITY, RETRY);
        let memory = Mutex::new(Memory::default());
        let feed = self.feed(&queue, &memory, vanished).fuse();
        let work = self.work(&queue, &memory).fuse();
        futures::pin_mut!(feed, work);
        select_biased! {
            () = stop.cancelled().fuse() => {}
            () = feed => {}
            () = work => {}
        }
    }

    /// Compares what is to be shown with what was, and queues the difference.
    async fn feed(
        &self,
        queue: &Queue<ObjectKey>,
        memory: &Mutex<Memory>,
        mut vanished: BoxStream<'static, ObjectKey>,
    ) {
        let (mut endpoints, mut claim) = (self.endpoints.changes(), self.claim.clone());
        let pods = self.pods.subscribe();
        let mut underlay = self.underlay.clone();
        // A run before this one may have ended between the end of an endpoint and that of its object.
        for key in self.pods.read(|pods| pods.iter().map(|(key, _)| key.clone()).collect::<Vec<_>>()) {
            queue.add(key).await;
        }
        loop {
            endpoints.mark_unchanged();
            underlay.mark_unchanged();
            claim.mark_unchanged();
            let wanted = self.wanted();
            let changed: Vec<ObjectKey> = {
                let mut memory = lock(memory);
                let before = std::mem::replace(&mut memory.shown, wanted.clone());
                let changed: BTreeSet<ObjectKey> = before
                    .iter()
                    .filter(|(key, shown)| wanted.get(*key) != Some(*shown))
                    .map(|(key, _)| key)
                    .chain(wanted.keys().filter(|key| !before.contains_key(*key)))
                    .cloned()
                    .collect();
                for key in &changed {
                    if let Some(shown) = before.get(key) {
                        let id = attachment_id(&shown.record.attachment);
                        memory.gone.entry(key.clone()).or_default().insert(id);
                    }
                }
                changed.into_iter().collect()
            };
            for key in changed {
                queue.add(key).await;
            }
            select_biased! {
                changed = endpoints.changed().fuse() => if changed.is_err() { return },
                changed = underlay.changed().fuse() => if changed.is_err() { return },
                changed = claim.changed().fuse() => if changed.is_err() { return },
                _ = pods.next().fuse() => {}
                key = vanished.next().fuse() => match key {
                    Some(key) => queue.add(key).await,
                    None => return,
                },
            }
        }
    }

    /// The newest committed endpoint of each pod.
    fn wanted(&self) -> BTreeMap<ObjectKey, Shown> {
        let records: Vec<_> = self.endpoints.read(|state| {
            let committed = |slot: &crate::endpoint::state::Slot| {
                slot.record.clone().filter(|record| record.phase == Phase::Committed)
            };
            state.iter().filter_map(|(key, slot)| Some((key.clone(), committed(slot)?, slot.state_text()))).collect()
        });
        let (node_ip, lost) = (self.underlay.borrow().tunnel_ip, self.claim.borrow().lost.clone());
        let mut wanted = BTreeMap::new();
        for (key, record, state) in records {
            let Some(pod) = &record.pod else { continue };
            let object_key = pod_key(pod);
            let cached = self.pods.get(&object_key);
            let Some(info) = cached.as_ref().and_then(|cached| cached.valid()) else { continue };
            if info.is(pod) {
                let is_lost = record.addresses.iter().any(|ip| lost.iter().any(|block| block.contains_address(ip)));
                let node_ip = (!is_lost).then_some(node_ip);
                let details = self.endpoints.details(&key);
                let shown = Shown { record, state, pod_uid: info.uid.clone(), details, node_ip };
                wanted.insert(object_key, shown);
            }
        }
        wanted
    }

    /// The uid of a pod of this node, whose endpoints are all known.
    fn pod_uid(&self, key: &ObjectKey) -> Option<String> {
        // A record that cannot be read does not say whose endpoint it is.
        let all_known = self.endpoints.read(|state| state.iter().all(|(_, slot)| slot.record.is_some()));
        let cached = self.pods.get(key).filter(|_| all_known)?;
        cached.valid().map(|info| info.uid.clone())
    }

    async fn work(&self, queue: &Queue<ObjectKey>, memory: &Mutex<Memory>) {
        loop {
            let keys = queue.take(CONCURRENCY).await;
            stream::iter(keys)
                .for_each_concurrent(CONCURRENCY, |key| async move {
                    let next = match self.write(&key, memory).await {
                        Ok(()) => Next::Settled,
                        Err(problem) => {
                            tracing::warn!(%key, problem, "CiliumEndpoint");
                            self.metrics.object_failures.inc();
                            Next::Failed
                        }
                    };
                    queue.done(&key, next);
                })
                .await;
        }
    }

    async fn write(&self, key: &ObjectKey, memory: &Mutex<Memory>) -> Result<(), String> {
        let existing = self.objects.get(CILIUM_ENDPOINT, key).await.map_err(|error| error.to_string())?;
        let (shown, gone) = {
            let memory = lock(memory);
            let gone: Vec<_> = memory.gone.get(key).into_iter().flatten().cloned().collect();
            (memory.shown.get(key).cloned(), gone)
        };
        let version = existing.as_ref().map(|object| (object.uid().to_owned(), object.resource_version().to_owned()));
        let (uid, resource_version) = version.unwrap_or_default();
        let pod_uid = if shown.is_none() { self.pod_uid(key) } else { None };
        let outcome = match plan(existing.as_ref(), shown.as_ref(), &gone, pod_uid.as_deref()) {
            Step::Nothing => Outcome::Done(()),
            Step::Create(object) => self.objects.create(CILIUM_ENDPOINT, object).await.map(drop),
            Step::Patch(body) => {
                let patch = MergePatch { resource_version, uid, subresource: None, body };
                self.objects.patch(CILIUM_ENDPOINT, key, patch).await.map(drop)
            }
            Step::Delete => self.objects.delete(CILIUM_ENDPOINT, key, Preconditions { uid, resource_version }).await,
        };
        match outcome {
            Outcome::Done(()) => {}
            // Its namespace or its pod is going: the object goes with it.
            Outcome::Refused(Refusal::NotFound(_)) if shown.is_none() => {}
            Outcome::Refused(refusal) => return Err(refusal.to_string()),
            Outcome::Unknown(why) => return Err(why),
        }
        let mut memory = lock(memory);
        if memory.shown.get(key) == shown.as_ref() {
            memory.gone.remove(key);
        }
        Ok(())
    }
}

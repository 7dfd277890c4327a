//! Events (`events.k8s.io/v1`) that tell users what happened to an object: `kubectl describe` shows them.
//!
//! Recording never waits and never fails: what does not fit into the bounded queue is counted and dropped. What happens
//! again is counted in the first event's series ([`series::Correlator`]) instead of making new ones.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use basal_runtime::{
    env::{SharedEnv, TaskHandle},
    outcome::Outcome,
    reason::Reason,
};
use futures::{FutureExt, future::pending, pin_mut, select_biased};
use serde_json::json;
use tokio::{
    sync::mpsc,
    time::{Instant, sleep_until},
};
use tracing::{debug, warn};

use self::series::{Correlator, Failure, Stored, Work};
use crate::{
    conditions::truncated,
    leadership::lease::micro_time,
    object::{Object, ObjectKey, Resource, resources::EVENT},
    port::{MergePatch, Objects, Refusal},
};

pub mod series;

/// The longest note that the API takes, in bytes.
const MAX_NOTE: usize = 1024;

/// The longest name of an event, in bytes.
const MAX_NAME: usize = 253;

/// Happenings that wait to be written.
const QUEUE: usize = 1000;

/// The namespace of events about objects without one.
const DEFAULT_NAMESPACE: &str = "default";

/// Whether an event tells of something wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum EventType {
    /// As intended.
    Normal,
    /// Somebody should look.
    Warning,
}

/// The object that an event is about.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Regarding {
    /// Its kind.
    pub resource: Resource,
    /// Which one.
    pub key: ObjectKey,
    /// Its uid.
    pub uid: String,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Happening {
    /// To what.
    pub regarding: Regarding,
    /// Whether it is bad.
    pub event_type: EventType,
    /// Why, in one closed word.
    pub reason: Reason,
    /// What was done, or tried.
    pub action: Reason,
    /// For people: what, where, and what to do. What is beyond 1,024 bytes is cut off.
    pub note: String,
    /// When many processes tell of the same: what names this happening, in lower-case letters, digits, `-` and `.`. Those
    /// that tell of it under one name make one event together. `None`: each makes its own.
    pub shared: Option<String>,
}

/// Who tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reporter {
    /// The program; `basal-operator`.
    pub controller: &'static str,
    /// The process; the name of its pod or its identity in the election.
    pub instance: String,
}

/// Takes happenings.
#[derive(Debug, Clone)]
pub struct EventRecorder {
    queue: mpsc::Sender<Happening>,
    dropped: Arc<AtomicU64>,
}

impl EventRecorder {
    /// Starts the task that writes events. It ends when every clone of the recorder is gone.
    #[must_use]
    pub fn start(objects: Arc<dyn Objects>, env: &SharedEnv, reporter: Reporter) -> (Self, TaskHandle) {
        let (queue, happenings) = mpsc::channel(QUEUE);
        let writer = Writer { objects, env: Arc::clone(env), reporter, correlator: Correlator::default() };
        let task = env.spawn("events", Box::pin(writer.run(happenings)));
        (Self { queue, dropped: Arc::default() }, task)
    }

    /// Records.
    pub fn record(&self, happening: Happening) {
        if self.queue.try_send(happening).is_err() {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Happenings that were dropped because too many waited; a metric shows it.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }
}

struct Writer {
    objects: Arc<dyn Objects>,
    env: SharedEnv,
    reporter: Reporter,
    correlator: Correlator,
}

impl Writer {
    async fn run(mut self, mut happenings: mpsc::Receiver<Happening>) {
        loop {
            let due = self.correlator.next_due();
            let next = {
                let received = happenings.recv().fuse();
                let timer = async { if let Some(due) = due { sleep_until(due).await } else { pending().await } }.fuse();
                pin_mut!(received, timer);
                // What is due comes first, so that a flood of happenings cannot keep it back.
                select_biased! { () = timer => None, happening = received => Some(happening) }
            };
            match next {
                Some(Some(happening)) => self.correlator.happened(happening, Instant::now()),
                Some(None) => return,
                None => {
                    if let Some((happening, work)) = self.correlator.take(Instant::now()) {
                        let written = self.write(&happening, &work).await;
                        self.correlator.written(&happening, written, Instant::now());
                    }
                }
            }
        }
    }

    async fn write(&self, happening: &Happening, work: &Work) -> Result<Stored, Failure> {
        let outcome = match work {
            Work::Create => {
                let random = || format!("{:016x}", self.env.random_u64());
                let suffix = happening.shared.clone().unwrap_or_else(random);
                self.objects.create(EVENT, event(happening, &self.reporter, &suffix, self.env.now())).await
            }
            Work::Series { stored, count } => {
                let last = micro_time(self.env.now());
                let patch = MergePatch {
                    resource_version: stored.resource_version.clone(),
                    uid: stored.uid.clone(),
                    subresource: None,
                    body: json!({"series": {"count": count, "lastObservedTime": last}}),
                };
                self.objects.patch(EVENT, &stored.key, patch).await
            }
        };
        match outcome {
            Outcome::Done(object) => Ok(Stored {
                key: object.key(),
                uid: object.uid().to_owned(),
                resource_version: object.resource_version().to_owned(),
            }),
            // Another process told of it already.
            Outcome::Refused(Refusal::AlreadyExists) if happening.shared.is_some() => Err(Failure::Gone),
            // The event expired, or somebody changed it: what happens next makes a new one.
            Outcome::Refused(Refusal::NotFound(_) | Refusal::Conflict(_)) => Err(Failure::Gone),
            Outcome::Refused(Refusal::Unavailable(_) | Refusal::TooManyRequests { .. }) | Outcome::Unknown(_) => {
                Err(Failure::Later)
            }
            Outcome::Refused(refusal) => {
                let reason = happening.reason;
                warn!(%reason, object = %happening.regarding.key, %refusal, "an event was not written");
                debug!(note = happening.note, "the note of the event");
                Err(Failure::Gone)
            }
        }
    }
}

/// The event as it is created.
fn event(happening: &Happening, reporter: &Reporter, suffix: &str, now: jiff::Timestamp) -> Object {
    let Happening { regarding, event_type, reason, action, note, shared: _ } = happening;
    let namespace = regarding.key.namespace.as_deref().unwrap_or(DEFAULT_NAMESPACE);
    let room = MAX_NAME.saturating_sub(suffix.len() + 1);
    let name = truncated(&regarding.key.name, room).trim_end_matches(['.', '-']);
    Object(json!({
        "apiVersion": EVENT.api_version(),
        "kind": EVENT.kind,
        "metadata": {"namespace": namespace, "name": format!("{name}.{suffix}")},
        "eventTime": micro_time(now),
        "type": match event_type { EventType::Normal => "Normal", EventType::Warning => "Warning" },
        "reason": reason.as_str(),
        "action": action.as_str(),
        "note": truncated(note, MAX_NOTE),
        "reportingController": reporter.controller,
        "reportingInstance": truncated(&reporter.instance, 128),
        "regarding": {
            "apiVersion": regarding.resource.api_version(),
            "kind": regarding.resource.kind,
            "namespace": regarding.key.namespace,
            "name": regarding.key.name,
            "uid": regarding.uid,
        },
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::object::resources::CILIUM_NODE;

    #[test]
    fn an_event_has_every_field_that_the_api_demands_and_its_note_fits() {
        let happening = Happening {
            regarding: Regarding { resource: CILIUM_NODE, key: ObjectKey::cluster("n1"), uid: "u1".into() },
            event_type: EventType::Warning,
            reason: Reason::new("PoolExhausted"),
            action: Reason::new("GrantBlock"),
            note: "🐝".repeat(300),
            shared: None,
        };
        let reporter = Reporter { controller: "basal-operator", instance: "operator-1".into() };
        let object = event(&happening, &reporter, "00ff", jiff::Timestamp::UNIX_EPOCH);
        assert_eq!(object.key(), ObjectKey::namespaced("default", "n1.00ff"));
        assert_eq!(object.0["note"].as_str().unwrap().len(), 1024);
        assert_eq!(object.0["eventTime"], "1970-01-01T00:00:00.000000Z");
        let regarding =
            json!({"apiVersion": "cilium.io/v2", "kind": "CiliumNode", "namespace": null, "name": "n1", "uid": "u1"});
        assert_eq!(object.0["regarding"], regarding);
        let texts = ["type", "reason", "action", "reportingController", "reportingInstance"]
            .map(|f| object.0[f].as_str().unwrap());
        assert_eq!(texts, ["Warning", "PoolExhausted", "GrantBlock", "basal-operator", "operator-1"]);
    }
}

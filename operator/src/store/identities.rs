//! Collecting CiliumIdentity objects that nobody uses, as Cilium's operator does it where identities are custom resources.
//!
//! In use is what a CiliumEndpoint names. An identity without a sign of life for a while is first marked by an annotation;
//! an agent that wants it takes the mark away, which changes the object. One that still has the mark in the next round is
//! deleted, at the resourceVersion at which that was seen.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use basal_crds::{
    identity::{IdentityId, IdentityRange},
    resources::{CiliumEndpoint, HEARTBEAT_ANNOTATION},
};
use basal_objects::{
    object::{Object, resources},
    port::{Freshness, MergePatch, Objects, Preconditions, ReadError, Refusal, Scope, gather},
};
use basal_runtime::{
    env::{SharedEnv, TaskHandle},
    outcome::Outcome,
};
use serde_json::{Value, json};
use tokio::time::Instant;
use tracing::{info, warn};

use crate::metrics::OperatorMetrics;

/// One identity as a round sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Seen {
    id: IdentityId,
    uid: String,
    resource_version: String,
    /// Whether it has the annotation.
    marked: bool,
}

/// What a round does with an identity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// Announces that it will go.
    Mark,
    /// Takes the announcement back.
    Unmark,
    /// Deletes it.
    Delete,
}

/// The last sign of life of each identity, and the resourceVersion that it had then.
#[derive(Debug, Default)]
struct Heartbeats(BTreeMap<IdentityId, (Instant, String)>);

impl Heartbeats {
    /// Decides about all identities. A use, a change by somebody else, and the first sight are signs of life.
    fn round(
        &mut self,
        all: &[Seen],
        used: &BTreeSet<IdentityId>,
        timeout: Duration,
        now: Instant,
    ) -> Vec<(Seen, Step)> {
        let names: BTreeSet<IdentityId> = all.iter().map(|seen| seen.id).collect();
        self.0.retain(|id, _| names.contains(id));
        let mut steps = Vec::new();
        for seen in all {
            let in_use = used.contains(&seen.id);
            let changed = self.0.get(&seen.id).is_none_or(|(_, version)| *version != seen.resource_version);
            if in_use || changed {
                self.0.insert(seen.id, (now, seen.resource_version.clone()));
            }
            let silent = self.0.get(&seen.id).is_some_and(|(at, _)| now.saturating_duration_since(*at) >= timeout);
            let step = match (in_use, silent, seen.marked) {
                (true, _, true) => Step::Unmark,
                (false, true, false) => Step::Mark,
                (false, true, true) => Step::Delete,
                _ => continue,
            };
            steps.push((seen.clone(), step));
        }
        steps
    }

    /// Our own write is no sign of life.
    fn wrote(&mut self, id: IdentityId, resource_version: &str) {
        if let Some((_, version)) = self.0.get_mut(&id) {
            resource_version.clone_into(version);
        }
    }
}

/// Starts the collection; it ends when the handle is aborted.
pub(super) fn start(
    env: &SharedEnv,
    objects: &Arc<dyn Objects>,
    range: IdentityRange,
    pace: (Duration, Duration),
    metrics: &OperatorMetrics,
) -> TaskHandle {
    let collector = Collector {
        env: Arc::clone(env),
        objects: Arc::clone(objects),
        range,
        heartbeats: Heartbeats::default(),
        metrics: metrics.clone(),
    };
    env.spawn("identity-gc", Box::pin(collector.run(pace.0, pace.1)))
}

struct Collector {
    env: SharedEnv,
    objects: Arc<dyn Objects>,
    range: IdentityRange,
    heartbeats: Heartbeats,
    metrics: OperatorMetrics,
}

impl Collector {
    async fn run(mut self, interval: Duration, timeout: Duration) {
        loop {
            tokio::time::sleep(interval).await;
            match self.round(timeout).await {
                Ok((alive, deleted)) => {
                    info!(alive, deleted, "identity collection");
                    self.metrics.collected("crd", Some((alive, deleted)));
                }
                Err(error) => {
                    warn!(%error, "identity collection failed; the next round tries again");
                    self.metrics.collected("crd", None);
                }
            }
        }
    }

    /// One round; answers how many identities stay and how many went.
    async fn round(&mut self, timeout: Duration) -> Result<(usize, usize), ReadError> {
        let (objects, scope) = (self.objects.as_ref(), Scope::default());
        // Identities first: one that an endpoint takes meanwhile is in use then.
        let seen = |object: &Object| self.seen(object);
        let all = gather(objects, resources::CILIUM_IDENTITY, &scope, Freshness::Quorum, seen).await?;
        let used = gather(objects, resources::CILIUM_ENDPOINT, &scope, Freshness::Quorum, used_by).await?;
        let used = used.into_iter().collect();
        let steps = self.heartbeats.round(&all, &used, timeout, Instant::now());
        let mut deleted = 0;
        for (seen, step) in steps {
            if self.write(&seen, step).await {
                deleted += usize::from(step == Step::Delete);
            }
        }
        Ok((all.len() - deleted, deleted))
    }

    /// An identity of this cluster; others, and what is none, are left alone.
    fn seen(&self, object: &Object) -> Option<Seen> {
        let id: IdentityId = object.name().parse().ok()?;
        self.range.contains(id).then(|| Seen {
            id,
            uid: object.uid().to_owned(),
            resource_version: object.resource_version().to_owned(),
            marked: object.annotations().contains_key(HEARTBEAT_ANNOTATION),
        })
    }

    /// Whether it was written. What was not is looked at again in the next round.
    async fn write(&mut self, seen: &Seen, step: Step) -> bool {
        let key = basal_objects::object::ObjectKey::cluster(seen.id.to_string());
        let (uid, resource_version) = (seen.uid.clone(), seen.resource_version.clone());
        let mark = match step {
            Step::Delete => {
                let only_if = Preconditions { uid, resource_version };
                let deleted = self.objects.delete(resources::CILIUM_IDENTITY, &key, only_if).await;
                return told(seen, step, deleted);
            }
            Step::Mark => json!(self.env.now().to_string()),
            Step::Unmark => Value::Null,
        };
        let body = json!({ "metadata": { "annotations": { HEARTBEAT_ANNOTATION: mark } } });
        let patch = MergePatch { resource_version, uid, subresource: None, body };
        match self.objects.patch(resources::CILIUM_IDENTITY, &key, patch).await {
            Outcome::Done(object) => {
                self.heartbeats.wrote(seen.id, object.resource_version());
                true
            }
            other => told(seen, step, other),
        }
    }
}

fn told<T>(seen: &Seen, step: Step, outcome: Outcome<T, Refusal>) -> bool {
    let why = match outcome {
        Outcome::Done(_) => return true,
        // Somebody wrote it: a sign of life.
        Outcome::Refused(Refusal::Conflict(_) | Refusal::NotFound(_)) => return false,
        Outcome::Refused(refusal) => refusal.to_string(),
        Outcome::Unknown(why) => why,
    };
    warn!(identity = %seen.id, ?step, why, "an identity was not written");
    false
}

/// The identity that an endpoint names.
fn used_by(object: &Object) -> Option<IdentityId> {
    let endpoint: CiliumEndpoint = object.parse().ok()?;
    u32::try_from(endpoint.status.identity?.id).ok().map(IdentityId::new)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(1800);

    fn seen(id: u32, resource_version: &str, marked: bool) -> Seen {
        let (uid, resource_version) = (format!("u{id}"), resource_version.to_owned());
        Seen { id: IdentityId::new(id), uid, resource_version, marked }
    }

    #[tokio::test(start_paused = true)]
    async fn an_identity_is_marked_before_it_goes_and_a_change_keeps_it() {
        let mut heartbeats = Heartbeats::default();
        let mut round = |all: &[Seen], used: &[u32]| -> Vec<(u32, Step)> {
            let used = used.iter().map(|id| IdentityId::new(*id)).collect();
            let steps = heartbeats.round(all, &used, TIMEOUT, Instant::now());
            for (seen, step) in &steps {
                if *step != Step::Delete {
                    heartbeats.wrote(seen.id, "ours");
                }
            }
            steps.into_iter().map(|(seen, step)| (seen.id.get(), step)).collect()
        };
        let fresh = [seen(300, "1", false), seen(301, "1", false)];
        assert_eq!(round(&fresh, &[300]), []);
        tokio::time::advance(TIMEOUT - Duration::from_secs(1)).await;
        assert_eq!(round(&fresh, &[300]), [], "not silent for long enough");
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!(round(&fresh, &[300]), [(301, Step::Mark)]);
        // An agent took the mark away.
        assert_eq!(round(&[seen(300, "1", false), seen(301, "9", false)], &[300]), []);
        tokio::time::advance(TIMEOUT).await;
        assert_eq!(round(&[seen(300, "1", false), seen(301, "9", false)], &[300]), [(301, Step::Mark)]);
        assert_eq!(
            round(&[seen(300, "1", true), seen(301, "ours", true)], &[300]),
            [(300, Step::Unmark), (301, Step::Delete)]
        );
        assert_eq!(round(&[], &[]), []);
    }
}

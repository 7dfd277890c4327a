//! Allocating identities by the protocol of Cilium's agents in CRD mode.
//!
//! A CiliumIdentity is named by its number and holds the labels. Nobody locks: two agents that cannot see each other may
//! make two identities for one set of labels, and both are good. The oldest one is used. The operator marks an identity
//! that nobody refers to by an annotation before it deletes it; who takes one up removes the mark. Nothing is written when
//! an identity is no longer used: CiliumEndpoints are the references.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex},
};

use basal_crds::{
    directory::{
        AllocateError, Changes,
        identities::{ATTEMPTS, IdentityFeed, IdentityTable},
        patience::Patience,
    },
    identity::{IdentityId, IdentityPlace, IdentityRange},
    labels::{Labels, SOURCE_K8S},
    resources::{CiliumIdentity, HEARTBEAT_ANNOTATION},
};
use basal_runtime::{env::SharedEnv, outcome::Outcome, sync::lock};
use futures::StreamExt as _;
use jiff::Timestamp;
use serde_json::{Map, Value, json};

use super::follow::follow;
use crate::{
    object::{Object, ObjectKey, resources::CILIUM_IDENTITY},
    port::{MergePatch, Objects, ReadError, Refusal},
};

/// The one label that the object's metadata repeat: it makes a column of `kubectl get`.
const POD_NAMESPACE: &str = "io.kubernetes.pod.namespace";

/// The identities of one cluster.
pub(super) struct Identities {
    env: SharedEnv,
    objects: Arc<dyn Objects>,
    range: IdentityRange,
    /// Aged by `metadata.creationTimestamp`.
    table: Mutex<IdentityTable<Timestamp>>,
    pub(super) feed: IdentityFeed,
    /// One allocation at a time for each set of labels.
    turns: Mutex<BTreeMap<Labels, Arc<tokio::sync::Mutex<()>>>>,
}

/// What is kept of a CiliumIdentity.
#[derive(Debug, Clone, PartialEq)]
struct Seen {
    labels: Labels,
    created: Timestamp,
}

fn created(object: &Object) -> Result<Timestamp, String> {
    let text = object.0.pointer("/metadata/creationTimestamp").and_then(Value::as_str).unwrap_or_default();
    text.parse().map_err(|error| format!("metadata.creationTimestamp: {text:?}: {error}"))
}

/// How an identity is ordered among those of the same labels. The API server puts the time into each object; one without
/// would be used last.
fn age(object: &Object) -> Timestamp {
    created(object).unwrap_or(Timestamp::MAX)
}

/// The labels of a CiliumIdentity.
///
/// # Errors
/// The field that does not parse.
pub fn identity_labels(object: &Object) -> Result<Labels, String> {
    let identity: CiliumIdentity = object.parse().map_err(|error| format!("metadata, security-labels: {error}"))?;
    Labels::from_security_labels(&identity.security_labels).map_err(|error| format!("security-labels: {error}"))
}

fn read(object: &Object) -> Result<Vec<(IdentityId, Seen)>, String> {
    let id = object.name().parse().map_err(|error| format!("metadata.name: {error}"))?;
    Ok(vec![(id, Seen { labels: identity_labels(object)?, created: created(object)? })])
}

/// The CiliumIdentity of a number and its labels.
#[must_use]
pub fn identity_object(id: IdentityId, labels: &Labels) -> Object {
    let mut metadata = Map::from_iter([("name".to_owned(), Value::from(id.to_string()))]);
    if let Some(namespace) = labels.get(POD_NAMESPACE).filter(|label| label.source() == SOURCE_K8S) {
        metadata.insert("labels".to_owned(), json!({ POD_NAMESPACE: namespace.value() }));
    }
    Object(json!({
        "apiVersion": CILIUM_IDENTITY.api_version(),
        "kind": CILIUM_IDENTITY.kind,
        "metadata": metadata,
        "security-labels": labels.to_security_labels(),
    }))
}

impl Identities {
    pub(super) fn new(env: SharedEnv, objects: Arc<dyn Objects>, range: IdentityRange) -> Self {
        let (table, feed, turns) = (Mutex::default(), IdentityFeed::default(), Mutex::default());
        Self { env, objects, range, table, feed, turns }
    }

    /// Keeps the table up to date, restores what is in use here, and tells everybody who follows.
    pub(super) async fn follow(self: Arc<Self>) {
        let this = Arc::clone(&self);
        let seen = move |id: &IdentityId, found: Option<&Seen>| match found {
            Some(Seen { labels, created }) => lock(&this.table).known.insert(*id, labels.clone(), *created),
            None => {
                lock(&this.table).known.remove(*id);
                this.feed.lost();
            }
        };
        let changes = follow(&*self.objects, CILIUM_IDENTITY, Patience::AfterLoss, read, seen);
        let changes = changes.map(|change| change.map(|seen| seen.labels)).boxed();
        self.feed.run(changes, || self.restore()).await;
    }

    pub(super) fn subscribe(&self) -> Changes<IdentityId, Labels> {
        self.feed.follow(|| lock(&self.table).known.iter().map(|(id, labels)| (id, labels.clone())).collect())
    }

    pub(super) async fn allocate(&self, labels: &Labels) -> Result<IdentityId, AllocateError> {
        let listed = self.feed.listed().await;
        listed.map_err(|why| AllocateError::Unavailable { labels: labels.clone(), why })?;
        let turn = {
            let mut turns = lock(&self.turns);
            turns.retain(|_, turn| Arc::strong_count(turn) > 1);
            Arc::clone(turns.entry(labels.clone()).or_default())
        };
        let _turn = turn.lock().await;
        let in_use = lock(&self.table).use_again(labels);
        match in_use {
            Some(id) => Ok(id),
            None => self.find_or_make(labels).await,
        }
    }

    async fn find_or_make(&self, labels: &Labels) -> Result<IdentityId, AllocateError> {
        let known: Vec<IdentityId> =
            lock(&self.table).known.ids(labels).filter(|id| self.range.contains(*id)).collect();
        let mut refused = BTreeSet::new();
        for id in known {
            if self.take(labels, id, true).await? {
                return Ok(id);
            }
            refused.insert(id);
        }
        let drawn = self.range.drawn_in(IdentityPlace::CustomResources);
        for _ in 0..ATTEMPTS {
            let free = lock(&self.table).known.free(drawn, &refused, self.env.random_u64());
            let Some(id) = free else {
                return Err(AllocateError::Exhausted { labels: labels.clone(), count: drawn.count() });
            };
            if self.take(labels, id, false).await? {
                return Ok(id);
            }
            refused.insert(id);
        }
        Err(AllocateError::Unavailable {
            labels: labels.clone(),
            why: format!("{ATTEMPTS} free numbers were taken by other nodes at the same time"),
        })
    }

    /// Makes the identity exist with these labels and without the operator's mark, and holds it. `false` when it has
    /// other labels, or is on its way out.
    async fn take(&self, labels: &Labels, id: IdentityId, exists: bool) -> Result<bool, AllocateError> {
        let Some(created) = self.ensure(labels, id, exists).await? else { return Ok(false) };
        let mut table = lock(&self.table);
        table.known.insert(id, labels.clone(), created);
        table.hold(labels, id);
        Ok(true)
    }

    /// As [`Self::take`], without holding it; answers when it was created.
    async fn ensure(&self, labels: &Labels, id: IdentityId, exists: bool) -> Result<Option<Timestamp>, AllocateError> {
        let key = ObjectKey::cluster(id.to_string());
        let mut exists = exists;
        for _ in 0..ATTEMPTS {
            if !exists {
                match self.objects.create(CILIUM_IDENTITY, identity_object(id, labels)).await {
                    Outcome::Done(stored) => return Ok(Some(age(&stored))),
                    // Somebody was faster, or the answer was lost: it has to be looked at.
                    Outcome::Refused(Refusal::AlreadyExists) | Outcome::Unknown(_) => {}
                    Outcome::Refused(refusal) => return Err(refused(labels, &refusal)),
                }
            }
            let found = self.objects.get(CILIUM_IDENTITY, &key).await.map_err(|error| unread(labels, &error))?;
            exists = found.is_some();
            let Some(found) = found else { continue };
            if found.is_deleting() || identity_labels(&found).as_ref() != Ok(labels) {
                return Ok(None);
            }
            if !found.annotations().contains_key(HEARTBEAT_ANNOTATION) {
                return Ok(Some(age(&found)));
            }
            let patch = MergePatch {
                resource_version: found.resource_version().to_owned(),
                uid: found.uid().to_owned(),
                subresource: None,
                body: json!({ "metadata": { "annotations": { HEARTBEAT_ANNOTATION: null } } }),
            };
            match self.objects.patch(CILIUM_IDENTITY, &key, patch).await {
                Outcome::Done(stored) => return Ok(Some(age(&stored))),
                Outcome::Refused(Refusal::Conflict(_) | Refusal::NotFound(_)) | Outcome::Unknown(_) => {}
                Outcome::Refused(refusal) => return Err(refused(labels, &refusal)),
            }
        }
        let why = format!("CiliumIdentity {id} changed {ATTEMPTS} times while it was looked at");
        Err(AllocateError::Unavailable { labels: labels.clone(), why })
    }

    pub(super) fn release(&self, labels: &Labels) {
        lock(&self.table).release(labels);
    }

    /// Creates again what is in use here and gone. Answers the numbers that stand for other labels now; they are not used
    /// for new endpoints any more.
    async fn restore(&self) -> Vec<(IdentityId, Labels)> {
        let missing = lock(&self.table).missing();
        let mut taken = Vec::new();
        for (id, labels) in missing {
            match self.ensure(&labels, id, false).await {
                Ok(Some(created)) => lock(&self.table).known.insert(id, labels, created),
                Ok(None) => {
                    lock(&self.table).give_up(&labels);
                    taken.push((id, labels));
                }
                Err(error) => tracing::warn!(%id, %error, "an identity in use cannot be restored"),
            }
        }
        taken
    }
}

fn unread(labels: &Labels, error: &ReadError) -> AllocateError {
    let (labels, why) = (labels.clone(), error.to_string());
    match error {
        ReadError::Forbidden(_) | ReadError::UnknownKind(_) => AllocateError::Refused { labels, why },
        ReadError::TooManyRequests { .. } | ReadError::Unavailable(_) => AllocateError::Unavailable { labels, why },
    }
}

fn refused(labels: &Labels, refusal: &Refusal) -> AllocateError {
    let (labels, why) = (labels.clone(), refusal.to_string());
    match refusal {
        Refusal::Forbidden(_) | Refusal::Invalid(_) | Refusal::NotFound(_) => AllocateError::Refused { labels, why },
        Refusal::Conflict(_) | Refusal::AlreadyExists | Refusal::TooManyRequests { .. } | Refusal::Unavailable(_) => {
            AllocateError::Unavailable { labels, why }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_is_one_of_ciliums() {
        let labels = Labels::parse_canonical("k8s:app=web;k8s:io.kubernetes.pod.namespace=shop;").unwrap();
        let object = identity_object(IdentityId::new(300), &labels);
        assert_eq!(
            object.0,
            json!({"apiVersion": "cilium.io/v2", "kind": "CiliumIdentity",
                "metadata": {"name": "300", "labels": {"io.kubernetes.pod.namespace": "shop"}},
                "security-labels": {"k8s:app": "web", "k8s:io.kubernetes.pod.namespace": "shop"}})
        );
        assert_eq!(identity_labels(&object), Ok(labels));
    }

    #[test]
    fn what_cannot_be_read_is_named() {
        let identity = |name: &str, created: &str, labels: Value| {
            let metadata = json!({"name": name, "creationTimestamp": created});
            read(&Object(json!({"metadata": metadata, "security-labels": labels}))).unwrap_err()
        };
        let now = "2026-01-01T00:00:00Z";
        assert!(identity("web", now, json!({"k8s:a": "b"})).starts_with("metadata.name: "));
        assert!(identity("300", now, json!({"a": "b"})).starts_with("security-labels: "));
        assert!(identity("300", now, Value::Null).contains("security-labels"));
    }
}

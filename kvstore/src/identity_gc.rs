//! Collecting identities that nobody uses, as Cilium's operator does it: an identity goes when two rounds in a row found
//! no reference to it, its key was not written in between, and both still holds under the lock on its labels.
//!
//! Cilium locks every identity in every round. Here one listing tells which identities have no reference, and only
//! those are locked and looked at again.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use basal_crds::{
    identity::{IdentityId, IdentityRange},
    kvstore::{keys, parse_identity_labels, parse_identity_value},
    labels::Labels,
};
use basal_runtime::outcome::Outcome;
use futures::StreamExt;

use crate::{
    kv::{Compare, Is, KeyValue, Keys, Kv, KvError, KvRefusal, LeaseId, Op, OpAnswer, Range, Revision, Txn, TxnAnswer},
    lock::{LockError, Locks},
    pages::{PAGE_SIZE, list},
};

/// Identities under lock at once. A bound on concurrency stands in for Cilium's rate
/// (`identity-gc-rate-limit` per `identity-gc-rate-interval`).
const CONCURRENCY: usize = 16;

/// What one round did.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct GcReport {
    /// Identities in use.
    pub alive: usize,
    /// Identities without a user that the next round may delete.
    pub unused: usize,
    /// Identities that were deleted.
    pub deleted: usize,
    /// Identities that were to be deleted and could not be.
    pub failed: usize,
    /// Locks that were left behind and were deleted.
    pub stale_locks: usize,
    /// Keys that are no identities. They are left alone.
    pub invalid: Vec<String>,
}

/// Why a round came to nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("identity GC: {0}; the next round tries again")]
pub struct GcError(#[from] KvError);

/// An identity that a round found to have no user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unused {
    /// The identity.
    pub id: IdentityId,
    /// Its labels.
    pub labels: Labels,
    /// The last write of its key.
    pub revision: Revision,
}

/// What a listing says, without memory.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Survey {
    /// Identities in use.
    pub alive: usize,
    /// Identities without a user.
    pub unused: Vec<Unused>,
    /// Keys that are no identities.
    pub invalid: Vec<String>,
}

/// Looks through the keys of identities (`id/`) and references (`value/`). Identities of other clusters are passed over.
#[must_use]
pub fn survey(range: &IdentityRange, ids: &[KeyValue], references: &[KeyValue]) -> Survey {
    let mut survey = Survey::default();
    let mut used: BTreeSet<(&str, IdentityId)> = BTreeSet::new();
    for kv in references {
        match reference(kv) {
            Some(used_by) => {
                used.insert(used_by);
            }
            None => survey.invalid.push(kv.key.clone()),
        }
    }
    for kv in ids {
        let (Ok(id), Ok(labels)) = (keys::parse_identity(&kv.key), parse_identity_labels(&kv.value)) else {
            survey.invalid.push(kv.key.clone());
            continue;
        };
        if !range.contains(id) {
            continue;
        }
        if used.contains(&(labels.canonical().as_str(), id)) {
            survey.alive += 1;
        } else {
            survey.unused.push(Unused { id, labels, revision: kv.mod_revision });
        }
    }
    survey
}

/// The labels, as written in the key, and the identity that a reference is about.
fn reference(kv: &KeyValue) -> Option<(&str, IdentityId)> {
    let rest = kv.key.strip_prefix(keys::IDENTITY_VALUES_PREFIX)?;
    // Labels hold slashes too; the node's address holds none.
    let (labels, node) = rest.rsplit_once('/')?;
    node.parse::<IpAddr>().ok()?;
    Some((labels, parse_identity_value(&kv.value).ok()?))
}

/// Remembers what the last round found.
#[derive(Debug, Clone, Default)]
pub struct Rounds {
    unused: BTreeMap<IdentityId, Revision>,
    locks: BTreeMap<String, (Revision, LeaseId)>,
}

impl Rounds {
    /// Ends a round; answers what may be deleted: what the round before found unused too, with the same write.
    pub fn identities(&mut self, unused: Vec<Unused>) -> Vec<Unused> {
        let before = std::mem::take(&mut self.unused);
        self.unused = unused.iter().map(|unused| (unused.id, unused.revision)).collect();
        unused.into_iter().filter(|unused| before.get(&unused.id) == Some(&unused.revision)).collect()
    }

    /// Ends a round over the keys of locks; answers those that were there in the round before, under the same lease.
    pub fn stale_locks(&mut self, locks: &[KeyValue]) -> Vec<(String, Revision)> {
        let now: BTreeMap<_, _> = locks.iter().map(|kv| (kv.key.clone(), (kv.mod_revision, kv.lease))).collect();
        let before = std::mem::replace(&mut self.locks, now);
        let same = self.locks.iter().filter(|(key, state)| before.get(*key) == Some(*state));
        same.map(|(key, (revision, _))| (key.clone(), *revision)).collect()
    }
}

/// Collects the identities of one cluster.
pub struct IdentityGc {
    kv: Arc<dyn Kv>,
    locks: Locks,
    range: IdentityRange,
    /// What must hold for an identity to be deleted.
    guard: Compare,
    rounds: Rounds,
}

impl IdentityGc {
    /// Starts with no memory: the first round deletes nothing. Identities are deleted only while `guard`
    /// holds, which the fence of a leader's term is for: a late deletion would set a number free.
    #[must_use]
    pub fn new(kv: Arc<dyn Kv>, locks: Locks, range: IdentityRange, guard: Compare) -> Self {
        Self { kv, locks, range, guard, rounds: Rounds::default() }
    }

    /// One round. The time between two of them is `identity-gc-interval`.
    ///
    /// # Errors
    /// A listing failed: nothing was changed, and nothing is remembered of this round.
    pub async fn round(&mut self) -> Result<GcReport, GcError> {
        let ids = list(&*self.kv, keys::IDENTITY_IDS_PREFIX, PAGE_SIZE, false).await?;
        // References are listed later: one that is made meanwhile is seen.
        let references = list(&*self.kv, keys::IDENTITY_VALUES_PREFIX, PAGE_SIZE, false).await?;
        let held = list(&*self.kv, keys::IDENTITY_LOCKS_PREFIX, PAGE_SIZE, true).await?;
        let Survey { alive, unused, invalid } = survey(&self.range, &ids.kvs, &references.kvs);
        let mut report = GcReport { alive, unused: unused.len(), invalid, ..GcReport::default() };
        for (key, revision) in self.rounds.stale_locks(&held.kvs) {
            report.stale_locks += usize::from(delete_if_unchanged(&*self.kv, key, revision).await);
        }
        let due = self.rounds.identities(unused);
        let mut collecting = futures::stream::iter(due)
            .map(|unused| collect(&*self.kv, &self.locks, &self.guard, unused))
            .buffered(CONCURRENCY);
        while let Some(collected) = collecting.next().await {
            match collected {
                Ok(true) => {
                    report.deleted += 1;
                    report.unused -= 1;
                }
                Ok(false) => {
                    report.alive += 1;
                    report.unused -= 1;
                }
                Err(error) => {
                    tracing::warn!(%error, "an identity without users could not be deleted");
                    report.failed += 1;
                }
            }
        }
        Ok(report)
    }
}

/// Why one identity stays although it has no user.
#[derive(Debug, thiserror::Error)]
enum CollectError {
    #[error(transparent)]
    Lock(#[from] LockError),
    #[error("identity {0}: {1}")]
    Refused(IdentityId, KvRefusal),
    #[error("identity {0}: the lock was lost, or etcd did not answer")]
    Lost(IdentityId),
}

/// Deletes an identity if, under the lock on its labels, it still has no user and was not written. `Ok(false)` when it
/// has, or was.
async fn collect(kv: &dyn Kv, locks: &Locks, guard: &Compare, unused: Unused) -> Result<bool, CollectError> {
    let held = locks.lock(&keys::identity_lock(&unused.labels)).await?;
    let read = Txn {
        when: vec![held.guard()],
        then: vec![Op::Get(Range::prefix(keys::identity_references_of(&unused.labels)))],
        or_else: Vec::new(),
    };
    let Outcome::Done(TxnAnswer { succeeded: true, answers, .. }) = kv.txn(read).await else {
        return Err(CollectError::Lost(unused.id));
    };
    let labels = unused.labels.canonical();
    let is_used = answers.iter().any(|answer| match answer {
        OpAnswer::Get(range) => range.kvs.iter().any(|kv| reference(kv) == Some((labels.as_str(), unused.id))),
        OpAnswer::Put | OpAnswer::Delete(_) => false,
    });
    let deleted = if is_used {
        false
    } else {
        let key = keys::identity(unused.id);
        let txn = Txn {
            when: vec![held.guard(), guard.clone(), Compare::new(key.clone(), Is::ModRevision(unused.revision))],
            then: vec![Op::Delete(Keys::One(key))],
            or_else: Vec::new(),
        };
        match kv.txn(txn).await {
            Outcome::Done(answer) => answer.succeeded,
            Outcome::Refused(refusal) => return Err(CollectError::Refused(unused.id, refusal)),
            Outcome::Unknown(_) => return Err(CollectError::Lost(unused.id)),
        }
    };
    // A lock that could not be given back is deleted by the session.
    drop(held.unlock().await);
    Ok(deleted)
}

/// True when it was deleted. Whatever else happened, the next round finds the key again.
async fn delete_if_unchanged(kv: &dyn Kv, key: String, revision: Revision) -> bool {
    let when = vec![Compare::new(key.clone(), Is::ModRevision(revision))];
    let txn = Txn { when, then: vec![Op::Delete(Keys::One(key))], or_else: Vec::new() };
    matches!(kv.txn(txn).await, Outcome::Done(TxnAnswer { succeeded: true, .. }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use basal_crds::names::ClusterId;

    fn kv(key: &str, value: &str, mod_revision: Revision) -> KeyValue {
        KeyValue { key: key.into(), value: value.into(), create_revision: 1, mod_revision, version: 1, lease: 7 }
    }

    fn id(number: u32, labels: &str, revision: Revision) -> KeyValue {
        kv(&format!("{}{number}", keys::IDENTITY_IDS_PREFIX), labels, revision)
    }

    fn reference_to(labels: &str, node: &str, number: &str) -> KeyValue {
        kv(&format!("{}{labels}/{node}", keys::IDENTITY_VALUES_PREFIX), number, 9)
    }

    #[test]
    fn an_identity_is_used_when_a_reference_has_both_its_labels_and_its_number() {
        let range = IdentityRange::of(ClusterId::new(0));
        let (a, b) = ("k8s:a/x=1;", "k8s:b=1;");
        let ids = [id(300, a, 5), id(301, a, 6), id(302, b, 7), id(70_000, b, 8), id(303, "", 9)];
        let references = [
            reference_to(a, "10.0.0.1", "300"),
            reference_to(b, "10.0.0.1", "300"),
            reference_to(b, "fd00::1", "30x"),
            reference_to(b, "node", "302"),
        ];
        let found = survey(&range, &ids, &references);
        assert_eq!(found.alive, 1);
        assert_eq!(found.unused.iter().map(|u| (u.id.get(), u.revision)).collect::<Vec<_>>(), [(301, 6), (302, 7)]);
        assert_eq!(found.invalid.len(), 3, "two references and one identity");
    }

    #[test]
    fn two_rounds_must_find_the_same_write() {
        let unused = |number, revision| Unused { id: IdentityId::new(number), labels: Labels::new(), revision };
        let mut rounds = Rounds::default();
        assert_eq!(rounds.identities(vec![unused(300, 5), unused(301, 5), unused(302, 5)]), []);
        let second = vec![unused(300, 5), unused(301, 6)];
        assert_eq!(rounds.identities(second), [unused(300, 5)]);
        assert_eq!(rounds.identities(vec![unused(301, 6), unused(302, 5)]), [unused(301, 6)]);
    }

    #[test]
    fn a_lock_is_stale_when_two_rounds_see_the_same_holder() {
        let lock = |key: &str, revision, lease| KeyValue { lease, ..kv(key, "", revision) };
        let mut rounds = Rounds::default();
        assert_eq!(rounds.stale_locks(&[lock("a", 5, 1), lock("b", 5, 1), lock("c", 5, 1)]), []);
        let second = [lock("a", 5, 1), lock("b", 6, 1), lock("c", 5, 2)];
        assert_eq!(rounds.stale_locks(&second), [("a".to_owned(), 5)]);
    }
}

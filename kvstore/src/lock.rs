//! Locks in etcd by the protocol that Cilium's agents use: a key `<path>/<lease id in hexadecimal>` for everybody who
//! wants the lock, and the lowest create revision owns it. Every write under the lock compares the create revision
//! of the owner's key, so a lock that was lost (its lease ran out) protects nothing but also breaks nothing.
//!
//! Inside one process a lock is taken once at a time, because all share one lease and so one key.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, Weak},
    time::Duration,
};

use basal_runtime::{outcome::Outcome, sync::lock as locked};
use futures::StreamExt;
use tokio::sync::OwnedMutexGuard;

use crate::{
    kv::{Compare, Is, Keys, Kv, KvError, KvRefusal, Op, OpAnswer, Range, RangeAnswer, Revision, Txn, WatchEvent},
    session::{LockLease, NoLease, Session},
};

/// How long a lock is waited for.
pub const LOCK_WAIT: Duration = Duration::from_secs(60);

/// Why a lock was not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LockError {
    /// There is no lease to hold it by.
    #[error(transparent)]
    NoLease(#[from] NoLease),
    /// Somebody else holds it for too long.
    #[error("lock {path}: held by others for {LOCK_WAIT:?}")]
    TimedOut {
        /// The lock.
        path: String,
    },
    /// The lease ran out while it was waited for.
    #[error("lock {path}: the lease ran out while waiting")]
    LeaseLost {
        /// The lock.
        path: String,
    },
    /// etcd refused.
    #[error("lock {path}: {refusal}")]
    Refused {
        /// The lock.
        path: String,
        /// Why.
        refusal: KvRefusal,
    },
    /// etcd did not answer.
    #[error("lock {path}: {why}")]
    Unavailable {
        /// The lock.
        path: String,
        /// Why.
        why: String,
    },
}

type PathLocks = Mutex<BTreeMap<String, Weak<tokio::sync::Mutex<()>>>>;

/// Takes locks by one session.
#[derive(Clone)]
pub struct Locks {
    session: Session,
    paths: Arc<PathLocks>,
}

/// A lock that is held. Dropping it has the session delete the key soon; [`Self::unlock`] deletes it now.
pub struct Held {
    key: String,
    revision: Revision,
    lease: LockLease,
    unlocked: bool,
    _local: OwnedMutexGuard<()>,
}

impl Locks {
    /// Takes locks by this session's lock lease.
    #[must_use]
    pub fn new(session: Session) -> Self {
        Self { session, paths: Arc::default() }
    }

    /// Takes the lock `path`, after everybody who came before.
    ///
    /// # Errors
    /// See [`LockError`]; no key is left behind for longer than the lease.
    pub async fn lock(&self, path: &str) -> Result<Held, LockError> {
        let timed_out = |_| LockError::TimedOut { path: path.to_owned() };
        tokio::time::timeout(LOCK_WAIT, self.lock_unbounded(path)).await.map_err(timed_out)?
    }

    async fn lock_unbounded(&self, path: &str) -> Result<Held, LockError> {
        let local = self.local(path).lock_owned().await;
        let lease = self.session.lock_lease().await?;
        let key = format!("{path}/{:x}", lease.id);
        // A key that was dropped here a moment ago must not be taken for a new one.
        self.session.settled_key(&key).await;
        // From here on the key may exist, so that every way out deletes it.
        let mut held = Held { key, revision: 0, lease, unlocked: false, _local: local };
        let answer = held.enqueue(path).await?;
        let kvs = keys_of_lock(path, &answer);
        held.revision = kvs.get(&held.key).copied().unwrap_or_default();
        if held.revision == 0 {
            return Err(LockError::LeaseLost { path: path.to_owned() });
        }
        held.wait_for_turn(path, kvs, answer.header.revision).await?;
        Ok(held)
    }

    fn local(&self, path: &str) -> Arc<tokio::sync::Mutex<()>> {
        let mut paths = locked(&self.paths);
        paths.retain(|_, lock| lock.strong_count() > 0);
        if let Some(lock) = paths.get(path).and_then(Weak::upgrade) {
            return lock;
        }
        let lock = Arc::default();
        paths.insert(path.to_owned(), Arc::downgrade(&lock));
        lock
    }
}

/// Everybody's key of a lock with its create revision. Deeper keys belong to other locks.
fn keys_of_lock(path: &str, answer: &RangeAnswer) -> BTreeMap<String, Revision> {
    let is_holder = |key: &str| {
        key.strip_prefix(path)
            .and_then(|rest| rest.strip_prefix('/'))
            .is_some_and(|lease| !lease.is_empty() && lease.bytes().all(|b| b.is_ascii_hexdigit()))
    };
    answer.kvs.iter().filter(|kv| is_holder(&kv.key)).map(|kv| (kv.key.clone(), kv.create_revision)).collect()
}

impl Held {
    /// The condition under which writes are made while the lock is held.
    #[must_use]
    pub fn guard(&self) -> Compare {
        Compare::new(self.key.clone(), Is::CreateRevision(self.revision))
    }

    /// Gives the lock back.
    pub async fn unlock(mut self) -> Outcome<(), KvRefusal> {
        let txn =
            Txn { when: vec![self.guard()], then: vec![Op::Delete(Keys::One(self.key.clone()))], or_else: Vec::new() };
        let outcome = self.kv().txn(txn).await;
        self.unlocked = outcome.is_done();
        outcome.map(|_| ())
    }

    fn kv(&self) -> Arc<dyn Kv> {
        Arc::clone(self.lease.session().kv())
    }

    /// Puts our key behind the others' and answers everybody's.
    async fn enqueue(&self, path: &str) -> Result<RangeAnswer, LockError> {
        let everybody = || Op::Get(Range::prefix(format!("{path}/")));
        let put = Op::Put { key: self.key.clone(), value: Vec::new(), lease: self.lease.id };
        let txn = Txn {
            when: vec![Compare::new(self.key.clone(), Is::Absent)],
            then: vec![put, everybody()],
            or_else: vec![everybody()],
        };
        let path = path.to_owned();
        match self.kv().txn(txn).await {
            Outcome::Done(answer) => answer
                .answers
                .into_iter()
                .find_map(|answer| match answer {
                    OpAnswer::Get(range) => Some(range),
                    _ => None,
                })
                .ok_or_else(|| LockError::Unavailable { path, why: "etcd answered no list".to_owned() }),
            Outcome::Refused(refusal) => {
                if matches!(refusal, KvRefusal::LeaseNotFound(_)) {
                    self.lease.gone();
                }
                Err(LockError::Refused { path, refusal })
            }
            Outcome::Unknown(why) => Err(LockError::Unavailable { path, why }),
        }
    }

    /// Waits until every older key is gone.
    async fn wait_for_turn(
        &self,
        path: &str,
        mut kvs: BTreeMap<String, Revision>,
        mut revision: Revision,
    ) -> Result<(), LockError> {
        loop {
            if !kvs.contains_key(&self.key) {
                return Err(LockError::LeaseLost { path: path.to_owned() });
            }
            let mut older: BTreeSet<String> =
                kvs.into_iter().filter(|(_, created)| *created < self.revision).map(|(key, _)| key).collect();
            if older.is_empty() {
                return Ok(());
            }
            let mut watch = self.kv().watch(&format!("{path}/"), revision + 1);
            while let Some(Ok(batch)) = watch.next().await {
                for event in batch.events {
                    if let WatchEvent::Delete { key, .. } = event {
                        if key == self.key {
                            return Err(LockError::LeaseLost { path: path.to_owned() });
                        }
                        older.remove(&key);
                    }
                }
                if older.is_empty() {
                    return Ok(());
                }
            }
            // The watch broke: look again.
            let unavailable = |error: KvError| LockError::Unavailable { path: path.to_owned(), why: error.to_string() };
            let answer = self.kv().range(Range::prefix(format!("{path}/"))).await.map_err(unavailable)?;
            revision = answer.header.revision;
            kvs = keys_of_lock(path, &answer);
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if !self.unlocked {
            self.lease.session().delete(&self.key);
        }
    }
}

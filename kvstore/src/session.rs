//! A session with etcd: leases that are kept alive, and keys that stay there as long as the session lives.
//!
//! A key that was handed to the session is written, written again after its lease was lost, and deleted when it is
//! taken back, however long etcd is away in between. The decisions are in [`crate::leases`]; this is the task that
//! carries them out.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use basal_runtime::{env::SharedEnv, outcome::Outcome, sync::lock};
use futures::{FutureExt, StreamExt, pin_mut, select_biased, stream::FuturesUnordered};
use tokio::{sync::Notify, time::Instant};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::{
    kv::{Kv, KvError, KvRefusal, LeaseId, Op, Txn, TxnAnswer},
    leases::{Action, Ended, LeaseKind, LeaseRules, Leases, SessionReport},
};

/// How long somebody who needs a lease waits for one.
const LEASE_WAIT: Duration = Duration::from_secs(10);

/// There is no lease to write under.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("no etcd lease within {LEASE_WAIT:?}: {why}")]
pub struct NoLease {
    why: String,
}

/// A session. Clones are the same session; it ends with the last of them, and its keys with their leases.
#[derive(Clone)]
pub struct Session {
    shared: Arc<Shared>,
    _end: Arc<DropGuard>,
}

struct Shared {
    env: SharedEnv,
    kv: Arc<dyn Kv>,
    rules: LeaseRules,
    state: Mutex<Leases>,
    /// Wakes the session's task.
    wake: Notify,
    /// Wakes everybody who waits for a change, in the order of waiting.
    changed: Notify,
}

impl Session {
    /// Starts the session's task. Nothing is written before there is something to write.
    pub fn start(env: SharedEnv, kv: Arc<dyn Kv>, rules: LeaseRules) -> Self {
        let shared = Arc::new(Shared {
            env: Arc::clone(&env),
            kv,
            rules,
            state: Mutex::new(Leases::new(rules)),
            wake: Notify::new(),
            changed: Notify::new(),
        });
        let end = CancellationToken::new();
        env.spawn("etcd-session", Box::pin(run(Arc::clone(&shared), end.clone())));
        Self { shared, _end: Arc::new(end.drop_guard()) }
    }

    /// The key ought to have this value from now on. Returns at once; [`Self::settled`] tells when it is there.
    pub fn put(&self, key: &str, value: &[u8]) {
        self.change(|state| state.want(key, value));
    }

    /// The key ought to be gone. Returns at once.
    pub fn delete(&self, key: &str) {
        self.change(|state| state.unwant(key));
    }

    /// The key was seen to be missing or changed by somebody else: writes it again, if this session wants it.
    pub fn rewrite(&self, key: &str) {
        self.change(|state| state.rewrite(key));
    }

    /// The value that this session keeps at a key.
    #[must_use]
    pub fn wanted(&self, key: &str) -> Option<Vec<u8>> {
        lock(&self.shared.state).wanted(key).map(<[u8]>::to_vec)
    }

    /// Carries out a transaction that puts this value at this key, under the lease that it is given; where the
    /// transaction succeeds, the session keeps the key from then on.
    pub async fn put_by(
        &self,
        key: &str,
        value: &[u8],
        txn: impl FnOnce(LeaseId) -> Txn,
    ) -> Outcome<TxnAnswer, KvRefusal> {
        let lease = match self.lease(LeaseKind::Data).await {
            Ok(lease) => lease,
            Err(error) => return Outcome::Refused(KvRefusal::Unavailable(error.to_string())),
        };
        let place = Place { session: self, lease };
        let outcome = self.shared.kv.txn(txn(lease)).await;
        self.change(|state| match &outcome {
            Outcome::Done(answer) if answer.succeeded => state.adopt(key, value, lease),
            Outcome::Refused(KvRefusal::LeaseNotFound(_)) => state.lease_gone(lease),
            _ => {}
        });
        drop(place);
        outcome
    }

    /// A lease that holds for at least half its time from now. A data lease has a place reserved that the caller
    /// gives back.
    async fn lease(&self, kind: LeaseKind) -> Result<LeaseId, NoLease> {
        let wait = self.until(|state| state.reserve(kind, Instant::now()));
        tokio::time::timeout(LEASE_WAIT, wait).await.map_err(|elapsed| NoLease {
            why: lock(&self.shared.state).trouble().map_or_else(|| elapsed.to_string(), str::to_owned),
        })
    }

    /// A lock lease, counted as used until [`LockLease`] is dropped.
    ///
    /// # Errors
    /// No lease could be had in time.
    pub(crate) async fn lock_lease(&self) -> Result<LockLease, NoLease> {
        self.change(Leases::add_lock_user);
        let mut user = LockLease { session: self.clone(), id: 0 };
        user.id = self.lease(LeaseKind::Lock).await?;
        Ok(user)
    }

    /// The store that the session writes to.
    #[must_use]
    pub fn kv(&self) -> &Arc<dyn Kv> {
        &self.shared.kv
    }

    /// The surroundings that the session runs in.
    #[must_use]
    pub fn env(&self) -> &SharedEnv {
        &self.shared.env
    }

    /// The session's state now.
    #[must_use]
    pub fn report(&self) -> SessionReport {
        lock(&self.shared.state).report()
    }

    /// Waits until everything that is wanted is there and everything else is gone.
    pub async fn settled(&self) {
        self.until(|state| (state.report().pending == 0).then_some(())).await;
    }

    /// Waits until nothing is to be done about one key any more.
    pub(crate) async fn settled_key(&self, key: &str) {
        self.until(|state| state.is_settled(key).then_some(())).await;
    }

    /// Waits for the end of an action of the session's task, whatever it was.
    pub async fn changed(&self) {
        self.shared.changed.notified().await;
    }

    /// Looks at the state until it has an answer, now and after every change.
    async fn until<T>(&self, mut look: impl FnMut(&mut Leases) -> Option<T>) -> T {
        loop {
            let changed = self.shared.changed.notified();
            pin_mut!(changed);
            // From here on no change is missed.
            changed.as_mut().enable();
            if let Some(answer) = self.change(&mut look) {
                return answer;
            }
            changed.await;
        }
    }

    /// Ends all leases at once, and all their keys. For a writer that goes for good; a process that will be back
    /// leaves its leases to themselves.
    pub async fn revoke(self) -> Outcome<(), KvRefusal> {
        let ids: Vec<LeaseId> = lock(&self.shared.state).ids().collect();
        for id in ids {
            match self.shared.kv.lease_revoke(id).await {
                Outcome::Done(()) => {}
                failed => return failed,
            }
        }
        Outcome::Done(())
    }

    fn change<T>(&self, change: impl FnOnce(&mut Leases) -> T) -> T {
        let answer = change(&mut lock(&self.shared.state));
        self.shared.wake.notify_one();
        answer
    }
}

/// A place in a data lease that is given back in any case.
struct Place<'a> {
    session: &'a Session,
    lease: LeaseId,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.session.change(|state| state.unreserve(self.lease));
    }
}

/// A lock lease in use.
pub(crate) struct LockLease {
    session: Session,
    pub(crate) id: LeaseId,
}

impl LockLease {
    /// The lease was found not to exist.
    pub(crate) fn gone(&self) {
        self.session.change(|state| state.lease_gone(self.id));
    }

    pub(crate) fn session(&self) -> &Session {
        &self.session
    }
}

impl Drop for LockLease {
    fn drop(&mut self) {
        self.session.change(Leases::remove_lock_user);
    }
}

async fn run(shared: Arc<Shared>, end: CancellationToken) {
    let mut running = FuturesUnordered::new();
    loop {
        let now = Instant::now();
        let (actions, wake) = {
            let mut state = lock(&shared.state);
            (state.start(now), state.next_wake(now))
        };
        for action in actions {
            running.push(perform(Arc::clone(&shared), action, now));
        }
        let timer = async {
            match wake {
                Some(time) => tokio::time::sleep_until(time).await,
                None => std::future::pending().await,
            }
        };
        select_biased! {
            () = end.cancelled().fuse() => return,
            (action, ended, began) = running.select_next_some() => {
                let random = shared.env.random_u64();
                lock(&shared.state).ended(&action, ended, began, Instant::now(), random);
                shared.changed.notify_waiters();
            }
            () = shared.wake.notified().fuse() => {}
            () = timer.fuse() => {}
        }
    }
}

async fn perform(shared: Arc<Shared>, action: Action, began: Instant) -> (Action, Ended, Instant) {
    let ended = match &action {
        Action::Grant(kind) => {
            let ttl = match kind {
                LeaseKind::Data => shared.rules.data_ttl,
                LeaseKind::Lock => shared.rules.lock_ttl,
            };
            match shared.kv.lease_grant(ttl).await {
                Outcome::Done(lease) => Ended::Granted(lease),
                // A lease that was granted without our knowledge runs out by itself.
                Outcome::Unknown(why) => Ended::Failed(why),
                Outcome::Refused(refusal) => refusal.into(),
            }
        }
        Action::KeepAlive(id) => match shared.kv.lease_keep_alive(*id).await {
            Ok(ttl) => Ended::Alive(ttl),
            Err(KvError::LeaseNotFound(_)) => Ended::LeaseGone,
            Err(error) => Ended::Failed(error.to_string()),
        },
        Action::Put { key, value, lease } => {
            write(&shared, Op::Put { key: key.clone(), value: value.clone(), lease: *lease }).await
        }
        Action::Delete { key } => write(&shared, Op::Delete(crate::kv::Keys::One(key.clone()))).await,
    };
    match &ended {
        Ended::LeaseGone => tracing::warn!(?action, "an etcd lease is gone; its keys are written again"),
        Ended::Refused(why) | Ended::Failed(why) => tracing::debug!(?action, why, "etcd session"),
        _ => {}
    }
    (action, ended, began)
}

async fn write(shared: &Shared, op: Op) -> Ended {
    match shared.kv.txn(Txn { then: vec![op], ..Txn::default() }).await {
        Outcome::Done(_) => Ended::Done,
        // Writing the same once more does no harm.
        Outcome::Unknown(why) => Ended::Failed(why),
        Outcome::Refused(refusal) => refusal.into(),
    }
}

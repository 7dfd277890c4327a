//! What a session keeps in etcd, as a pure state machine: which keys ought to be there, which leases they hang on,
//! and what to do next. [`crate::session`] carries it out.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use basal_runtime::backoff::Backoff;
use tokio::time::Instant;

use crate::kv::{KvRefusal, Lease, LeaseId};

/// Waits after a refused or failed action: Cilium's.
const BACKOFF: Backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(60));

/// Writes and deletions under way at once. Leases are granted and kept alive besides.
const MAX_WRITES: usize = 16;

/// What a lease is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum LeaseKind {
    /// Records; `kvstore-lease-ttl`.
    Data,
    /// Locks; 25 s. Kept alive only while somebody uses it.
    Lock,
}

/// The rules of a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LeaseRules {
    /// How long a data lease lives without a keep-alive (`kvstore-lease-ttl`).
    pub data_ttl: Duration,
    /// How long a lock lease lives without a keep-alive.
    pub lock_ttl: Duration,
    /// At most so many keys hang on one lease.
    pub max_keys: usize,
}

impl Default for LeaseRules {
    fn default() -> Self {
        Self { data_ttl: Duration::from_secs(15 * 60), lock_ttl: Duration::from_secs(25), max_keys: 1000 }
    }
}

/// A `kvstore-lease-ttl` that Cilium refuses too.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("kvstore-lease-ttl is {0:?}; it must be from 25s to 24h")]
pub struct BadLeaseTtl(Duration);

impl LeaseRules {
    /// Cilium's rules with this `kvstore-lease-ttl`.
    ///
    /// # Errors
    /// It is below 25 s or above 24 h.
    pub fn with_data_ttl(data_ttl: Duration) -> Result<Self, BadLeaseTtl> {
        let allowed = Duration::from_secs(25)..=Duration::from_secs(24 * 3600);
        if !allowed.contains(&data_ttl) {
            return Err(BadLeaseTtl(data_ttl));
        }
        Ok(Self { data_ttl, ..Self::default() })
    }
}

/// Something to do in etcd.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Action {
    /// Get a lease.
    Grant(LeaseKind),
    /// Keep a lease alive.
    KeepAlive(LeaseId),
    /// Write a key under a lease.
    Put {
        /// The key.
        key: String,
        /// The value.
        value: Vec<u8>,
        /// The lease.
        lease: LeaseId,
    },
    /// Delete a key.
    Delete {
        /// The key.
        key: String,
    },
}

/// How an action ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ended {
    /// A lease was granted.
    Granted(Lease),
    /// A lease lives on for so long.
    Alive(Duration),
    /// A key was written or deleted.
    Done,
    /// A lease does not exist.
    LeaseGone,
    /// Refused for a reason that lies in the request or in the user's rights.
    Refused(String),
    /// Not taken, or nobody knows.
    Failed(String),
}

impl From<KvRefusal> for Ended {
    fn from(refusal: KvRefusal) -> Self {
        match refusal {
            KvRefusal::LeaseNotFound(_) => Self::LeaseGone,
            KvRefusal::Unavailable(_) | KvRefusal::NoSpace(_) => Self::Failed(refusal.to_string()),
            KvRefusal::Denied(_) | KvRefusal::Invalid(_) => Self::Refused(refusal.to_string()),
        }
    }
}

/// The state of a session in numbers.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SessionReport {
    /// Data leases held.
    pub leases: usize,
    /// Lock leases held.
    pub lock_leases: usize,
    /// Keys that ought to be in etcd.
    pub keys: usize,
    /// Keys that have yet to be written or deleted.
    pub pending: usize,
    /// Leases lost since the start.
    pub lost_leases: u64,
    /// What went wrong last, until something succeeds.
    pub last_error: Option<String>,
}

#[derive(Debug)]
struct HeldLease {
    kind: LeaseKind,
    ttl: Duration,
    renew_at: Instant,
    /// From when on, by our own clock, the lease may have expired.
    doubtful_at: Instant,
    keys: BTreeSet<String>,
    /// Places promised to a writer that writes by itself.
    reserved: usize,
    busy: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Wanted {
    /// The key with this value.
    Value(Vec<u8>),
    /// No key.
    Nothing,
}

#[derive(Debug)]
struct Entry {
    wanted: Wanted,
    /// Where the wanted value stands.
    written: Option<LeaseId>,
    busy: bool,
    /// Changed while a write was under way: that write's end says nothing.
    stale: bool,
    refusals: u32,
    not_before: Option<Instant>,
}

/// Keys and leases of one session.
#[derive(Debug)]
pub struct Leases {
    rules: LeaseRules,
    entries: BTreeMap<String, Entry>,
    held: BTreeMap<LeaseId, HeldLease>,
    granting: BTreeSet<LeaseKind>,
    /// Somebody waits for a lease of this kind with room.
    asked: BTreeSet<LeaseKind>,
    /// Locks that are held or waited for.
    lock_users: usize,
    writes: usize,
    failures: u32,
    /// After a failure nothing new starts before this time.
    pause: Option<Instant>,
    lost: u64,
    last_error: Option<String>,
}

impl Leases {
    /// No keys, no leases.
    #[must_use]
    pub fn new(rules: LeaseRules) -> Self {
        Self {
            rules,
            entries: BTreeMap::new(),
            held: BTreeMap::new(),
            granting: BTreeSet::new(),
            asked: BTreeSet::new(),
            lock_users: 0,
            writes: 0,
            failures: 0,
            pause: None,
            lost: 0,
            last_error: None,
        }
    }

    /// The key ought to have this value from now on.
    pub fn want(&mut self, key: &str, value: &[u8]) {
        self.set(key, Wanted::Value(value.to_vec()));
    }

    /// The key ought not to be there.
    pub fn unwant(&mut self, key: &str) {
        self.set(key, Wanted::Nothing);
    }

    fn set(&mut self, key: &str, wanted: Wanted) {
        match self.entries.get_mut(key) {
            Some(entry) if entry.wanted == wanted => {}
            Some(entry) => {
                entry.wanted = wanted;
                entry.stale = entry.busy;
                (entry.refusals, entry.not_before) = (0, None);
                if let Some(lease) = entry.written.take() {
                    self.release(lease, key);
                }
            }
            None => {
                let entry = Entry { wanted, written: None, busy: false, stale: false, refusals: 0, not_before: None };
                self.entries.insert(key.to_owned(), entry);
            }
        }
    }

    /// Somebody wrote this key under a lease of this session by himself; it is kept from now on.
    pub fn adopt(&mut self, key: &str, value: &[u8], lease: LeaseId) {
        self.want(key, value);
        self.rewrite(key);
        let (Some(held), Some(entry)) = (self.held.get_mut(&lease), self.entries.get_mut(key)) else { return };
        if entry.busy {
            // Whether that write or ours came last is not known.
            entry.stale = true;
        } else {
            held.keys.insert(key.to_owned());
            entry.written = Some(lease);
        }
    }

    /// The key was seen to be missing or to hold something else: it is written again if it is wanted.
    pub fn rewrite(&mut self, key: &str) {
        if let Some(entry) = self.entries.get_mut(key)
            && let Some(lease) = entry.written.take()
        {
            self.release(lease, key);
        }
    }

    /// The value that a key ought to have.
    #[must_use]
    pub fn wanted(&self, key: &str) -> Option<&[u8]> {
        match &self.entries.get(key)?.wanted {
            Wanted::Value(value) => Some(value),
            Wanted::Nothing => None,
        }
    }

    /// Whether nothing is to be done about a key.
    #[must_use]
    pub fn is_settled(&self, key: &str) -> bool {
        self.entries.get(key).is_none_or(Entry::is_settled)
    }

    /// Counts a lock that is held or waited for.
    pub fn add_lock_user(&mut self) {
        self.lock_users += 1;
    }

    /// Counts one less.
    pub fn remove_lock_user(&mut self) {
        self.lock_users = self.lock_users.saturating_sub(1);
    }

    /// A lease of this kind with room for one more key, with a place reserved in a data lease. Without one the next
    /// actions get one.
    pub fn reserve(&mut self, kind: LeaseKind, now: Instant) -> Option<LeaseId> {
        let found = self.with_room(kind, now);
        match found.and_then(|id| self.held.get_mut(&id)) {
            Some(held) => {
                self.asked.remove(&kind);
                if kind == LeaseKind::Data {
                    held.reserved += 1;
                }
            }
            None => {
                self.asked.insert(kind);
            }
        }
        found
    }

    /// Gives a reserved place back, also after it was used through [`Self::adopt`].
    pub fn unreserve(&mut self, lease: LeaseId) {
        if let Some(held) = self.held.get_mut(&lease) {
            held.reserved = held.reserved.saturating_sub(1);
        }
    }

    fn with_room(&self, kind: LeaseKind, now: Instant) -> Option<LeaseId> {
        self.held
            .iter()
            .filter(|(_, held)| held.kind == kind && held.keys.len() + held.reserved < self.rules.max_keys)
            // A lock must not hang on a lease that may be gone already.
            .find(|(_, held)| kind == LeaseKind::Data || now + held.ttl / 2 < held.doubtful_at)
            .map(|(id, _)| *id)
    }

    fn release(&mut self, lease: LeaseId, key: &str) {
        if let Some(held) = self.held.get_mut(&lease) {
            held.keys.remove(key);
        }
    }

    /// Takes out what is to be done now. The caller reports the end of each action with [`Self::ended`].
    pub fn start(&mut self, now: Instant) -> Vec<Action> {
        self.drop_idle_lock_leases(now);
        let mut actions = Vec::new();
        for (id, held) in &mut self.held {
            if !held.busy && held.renew_at <= now {
                held.busy = true;
                actions.push(Action::KeepAlive(*id));
            }
        }
        if self.pause.is_some_and(|pause| now < pause) {
            return actions;
        }
        self.start_writes(now, &mut actions);
        for kind in self.asked.clone() {
            if self.with_room(kind, now).is_none() && self.granting.insert(kind) {
                actions.push(Action::Grant(kind));
            }
        }
        actions
    }

    fn start_writes(&mut self, now: Instant, actions: &mut Vec<Action>) {
        let due: Vec<String> = self
            .entries
            .iter()
            .filter(|(_, entry)| entry.is_due(now))
            .map(|(key, _)| key.clone())
            .take(MAX_WRITES.saturating_sub(self.writes))
            .collect();
        for key in due {
            let room = self.with_room(LeaseKind::Data, now);
            let Some(entry) = self.entries.get_mut(&key) else { continue };
            let action = match (&entry.wanted, room) {
                (Wanted::Nothing, _) => Action::Delete { key: key.clone() },
                (Wanted::Value(value), Some(lease)) => {
                    if let Some(held) = self.held.get_mut(&lease) {
                        held.keys.insert(key.clone());
                    }
                    Action::Put { key: key.clone(), value: value.clone(), lease }
                }
                (Wanted::Value(_), None) => {
                    self.asked.insert(LeaseKind::Data);
                    continue;
                }
            };
            (entry.busy, entry.stale) = (true, false);
            self.writes += 1;
            actions.push(action);
        }
    }

    fn drop_idle_lock_leases(&mut self, now: Instant) {
        if self.lock_users == 0 {
            self.held.retain(|_, held| held.kind == LeaseKind::Data || held.busy || now < held.renew_at);
        }
    }

    /// An action that began at `began` has ended. `random` is for the jitter of waits.
    pub fn ended(&mut self, action: &Action, ended: Ended, began: Instant, now: Instant, random: u64) {
        let ended = match (action, ended) {
            // A refused lease concerns every key, not one.
            (Action::Grant(_) | Action::KeepAlive(_), Ended::Refused(why)) => Ended::Failed(why),
            (_, ended) => ended,
        };
        match action {
            Action::Grant(kind) => {
                self.granting.remove(kind);
                if let Ended::Granted(lease) = ended {
                    self.hold(*kind, lease, began);
                }
            }
            Action::KeepAlive(id) => match (&ended, self.held.get_mut(id)) {
                (Ended::LeaseGone, _) => self.lose(*id),
                (Ended::Alive(ttl), Some(held)) => held.renewed(*ttl, began),
                (_, Some(held)) => {
                    held.busy = false;
                    held.renew_at = now + (held.ttl / 12).max(Duration::from_secs(1));
                }
                (_, None) => {}
            },
            Action::Put { key, lease, .. } => {
                self.writes = self.writes.saturating_sub(1);
                if ended == Ended::LeaseGone {
                    self.lose(*lease);
                }
                self.write_ended(key, Some(*lease), &ended, now, random);
            }
            Action::Delete { key } => {
                self.writes = self.writes.saturating_sub(1);
                self.write_ended(key, None, &ended, now, random);
            }
        }
        self.note(&ended, now, random);
    }

    /// Keeps count of failures that concern etcd as a whole.
    fn note(&mut self, ended: &Ended, now: Instant, random: u64) {
        match ended {
            Ended::Failed(why) => {
                self.failures = self.failures.saturating_add(1);
                self.pause = Some(now + BACKOFF.delay(self.failures, random));
                self.last_error = Some(why.clone());
            }
            Ended::Refused(why) => self.last_error = Some(why.clone()),
            Ended::Granted(_) | Ended::Alive(_) | Ended::Done | Ended::LeaseGone => {
                (self.failures, self.pause) = (0, None);
                if self.entries.values().all(|entry| entry.refusals == 0) {
                    self.last_error = None;
                }
            }
        }
    }

    fn write_ended(&mut self, key: &str, lease: Option<LeaseId>, ended: &Ended, now: Instant, random: u64) {
        let Some(entry) = self.entries.get_mut(key) else { return };
        entry.busy = false;
        let stale = std::mem::take(&mut entry.stale);
        match ended {
            Ended::Done if !stale && lease.is_none() => {
                self.entries.remove(key);
                return;
            }
            Ended::Done if !stale => {
                entry.refusals = 0;
                entry.written = lease.filter(|lease| self.held.contains_key(lease));
            }
            Ended::Refused(_) => {
                entry.refusals = entry.refusals.saturating_add(1);
                entry.not_before = Some(now + BACKOFF.delay(entry.refusals, random));
            }
            _ => {}
        }
        if let Some(lease) = lease
            && entry.written != Some(lease)
        {
            self.release(lease, key);
        }
    }

    fn hold(&mut self, kind: LeaseKind, lease: Lease, began: Instant) {
        let mut held = HeldLease {
            kind,
            ttl: lease.ttl,
            renew_at: began,
            doubtful_at: began,
            keys: BTreeSet::new(),
            reserved: 0,
            busy: false,
        };
        held.renewed(lease.ttl, began);
        self.held.insert(lease.id, held);
        self.asked.remove(&kind);
    }

    /// A lease is gone, and with it all its keys: they are written again under another one.
    fn lose(&mut self, id: LeaseId) {
        let Some(held) = self.held.remove(&id) else { return };
        self.lost += 1;
        for key in held.keys {
            if let Some(entry) = self.entries.get_mut(&key)
                && entry.written == Some(id)
            {
                entry.written = None;
            }
        }
    }

    /// The lease does not exist, as somebody else found out.
    pub fn lease_gone(&mut self, id: LeaseId) {
        self.lose(id);
    }

    /// When [`Self::start`] may have something to do, if nothing else happens before.
    #[must_use]
    pub fn next_wake(&self, now: Instant) -> Option<Instant> {
        let renewals = self.held.values().filter(|held| !held.busy).map(|held| held.renew_at);
        let ready = |time: Instant| self.pause.map_or(time, |pause| pause.max(time));
        let writes = self
            .entries
            .values()
            .filter(|entry| !entry.busy && !entry.is_settled())
            .filter(|entry| self.may_write_now(entry))
            .map(|entry| ready(entry.not_before.unwrap_or(now)));
        let grants = self.asked.difference(&self.granting).map(|_| ready(now));
        renewals.chain(writes).chain(grants).min()
    }

    /// Whether a write need not wait for the end of another action.
    fn may_write_now(&self, entry: &Entry) -> bool {
        self.writes < MAX_WRITES && (entry.wanted == Wanted::Nothing || !self.granting.contains(&LeaseKind::Data))
    }

    /// Why nobody gets a lease at the moment, if it is so.
    #[must_use]
    pub fn trouble(&self) -> Option<&str> {
        self.last_error.as_deref()
    }

    /// All leases held.
    pub fn ids(&self) -> impl Iterator<Item = LeaseId> + '_ {
        self.held.keys().copied()
    }

    /// The state in numbers.
    #[must_use]
    pub fn report(&self) -> SessionReport {
        let count = |kind| self.held.values().filter(|held| held.kind == kind).count();
        SessionReport {
            leases: count(LeaseKind::Data),
            lock_leases: count(LeaseKind::Lock),
            keys: self.entries.values().filter(|entry| entry.wanted != Wanted::Nothing).count(),
            pending: self.entries.values().filter(|entry| !entry.is_settled()).count(),
            lost_leases: self.lost,
            last_error: self.last_error.clone(),
        }
    }
}

impl Entry {
    fn is_settled(&self) -> bool {
        self.written.is_some()
    }

    fn is_due(&self, now: Instant) -> bool {
        !self.busy && !self.is_settled() && self.not_before.is_none_or(|time| time <= now)
    }
}

impl HeldLease {
    /// The lease lives for `ttl` from the moment on when etcd was asked, at the earliest.
    fn renewed(&mut self, ttl: Duration, asked: Instant) {
        self.busy = false;
        self.ttl = ttl;
        self.renew_at = asked + ttl / 3;
        self.doubtful_at = asked + ttl;
    }
}

#[cfg(test)]
mod tests;

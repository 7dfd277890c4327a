//! Allocating identities by the protocol of Cilium's agents in kvstore mode.
//!
//! `id/<number>` holds the labels of an identity and has no lease; `value/<labels>/<node>` holds the number, under the
//! lease of the node that uses it; both are written under the lock `locks/<labels>`. Where Cilium writes the first,
//! then the second, one transaction writes both here, so that no identity is left without a user by a crash.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::{Arc, Mutex},
};

use basal_crds::{
    directory::AllocateError,
    identity::{IdentityId, IdentityRange},
    kvstore::{keys, parse_identity_value},
    labels::Labels,
};
use basal_runtime::{outcome::Outcome, sync::lock};

use crate::{
    kv::{Compare, Is, KvRefusal, Op, OpAnswer, Range, Txn, TxnAnswer},
    lock::{Held, LockError, Locks},
    session::Session,
};

/// How often a number that turned out to be taken is replaced by another before the caller is told to try later.
const ATTEMPTS: usize = 16;

/// What is known of all identities, from a watch.
#[derive(Debug, Clone, Default)]
pub struct KnownIdentities {
    by_id: BTreeMap<IdentityId, Labels>,
    by_labels: BTreeMap<Labels, BTreeSet<IdentityId>>,
}

impl KnownIdentities {
    /// An identity exists with these labels.
    pub fn insert(&mut self, id: IdentityId, labels: Labels) {
        self.remove(id);
        self.by_labels.entry(labels.clone()).or_default().insert(id);
        self.by_id.insert(id, labels);
    }

    /// An identity is gone.
    pub fn remove(&mut self, id: IdentityId) {
        let Some(labels) = self.by_id.remove(&id) else { return };
        if let Some(ids) = self.by_labels.get_mut(&labels) {
            ids.remove(&id);
            if ids.is_empty() {
                self.by_labels.remove(&labels);
            }
        }
    }

    /// The labels of an identity.
    #[must_use]
    pub fn labels(&self, id: IdentityId) -> Option<&Labels> {
        self.by_id.get(&id)
    }

    /// The identities with these labels, the lowest first. More than one exist when two agents could not see each
    /// other; all are good.
    pub fn ids<'a>(&'a self, labels: &Labels) -> impl Iterator<Item = IdentityId> + use<'a> {
        self.by_labels.get(labels).into_iter().flatten().copied()
    }

    /// Every identity with its labels.
    pub fn iter(&self) -> impl Iterator<Item = (IdentityId, &Labels)> {
        self.by_id.iter().map(|(id, labels)| (*id, labels))
    }

    /// A number of the range that is neither taken nor excepted: the first one at or after the place that `random`
    /// points to.
    #[must_use]
    pub fn free(&self, range: &IdentityRange, except: &BTreeSet<IdentityId>, random: u64) -> Option<IdentityId> {
        let count = u64::from(range.count());
        let first = u64::from(range.first().get());
        (0..count)
            .map(|step| first + (random % count + step) % count)
            .filter_map(|number| u32::try_from(number).ok().map(IdentityId::new))
            .find(|id| !self.by_id.contains_key(id) && !except.contains(id))
    }
}

/// An identity that endpoints of this node use.
#[derive(Debug, Clone, Copy)]
struct InUse {
    id: IdentityId,
    users: usize,
    /// The address that its reference is named after.
    node_ip: IpAddr,
}

/// Allocates the identities of one cluster for one node.
#[derive(Clone)]
pub struct IdentityStore {
    session: Session,
    locks: Locks,
    range: IdentityRange,
    state: Arc<Mutex<State>>,
}

struct State {
    /// What new references of this node are named after: its IPv4 address, else its IPv6 address.
    node_ip: IpAddr,
    known: KnownIdentities,
    in_use: BTreeMap<Labels, InUse>,
}

impl IdentityStore {
    /// Nothing is known yet; whoever follows the identities tells by [`Self::learn`] and [`Self::forget`].
    #[must_use]
    pub fn new(session: Session, locks: Locks, range: IdentityRange, node_ip: IpAddr) -> Self {
        let state = State { node_ip, known: KnownIdentities::default(), in_use: BTreeMap::new() };
        Self { session, locks, range, state: Arc::new(Mutex::new(state)) }
    }

    /// An identity was seen.
    pub fn learn(&self, id: IdentityId, labels: Labels) {
        lock(&self.state).known.insert(id, labels);
    }

    /// An identity was seen to be gone.
    pub fn forget(&self, id: IdentityId) {
        lock(&self.state).known.remove(id);
    }

    /// What is known.
    #[must_use]
    pub fn known(&self) -> KnownIdentities {
        lock(&self.state).known.clone()
    }

    /// The identity of these labels, with one user more.
    ///
    /// # Errors
    /// See [`AllocateError`]. Nothing is held then, and what may have been written has no user.
    pub async fn allocate(&self, labels: &Labels) -> Result<IdentityId, AllocateError> {
        if let Some(id) = self.use_again(labels) {
            return Ok(id);
        }
        let held = self.locks.lock(&keys::identity_lock(labels)).await.map_err(|error| lock_failed(labels, error))?;
        // Somebody in this process may have had the lock before us.
        let allocated = match self.use_again(labels) {
            Some(id) => Ok(id),
            None => self.allocate_locked(labels, &held).await,
        };
        // A lock that could not be given back is deleted by the session.
        drop(held.unlock().await);
        allocated
    }

    fn use_again(&self, labels: &Labels) -> Option<IdentityId> {
        let mut state = lock(&self.state);
        let in_use = state.in_use.get_mut(labels)?;
        in_use.users += 1;
        Some(in_use.id)
    }

    async fn allocate_locked(&self, labels: &Labels, held: &Held) -> Result<IdentityId, AllocateError> {
        let mut refused = BTreeSet::new();
        for id in self.candidates(labels, held).await? {
            if self.claim(labels, id, held).await? {
                return Ok(id);
            }
            refused.insert(id);
        }
        for _ in 0..ATTEMPTS {
            let random = self.session.env().random_u64();
            let free = lock(&self.state).known.free(&self.range, &refused, random);
            let Some(id) = free else {
                return Err(AllocateError::Exhausted { labels: labels.clone(), count: self.range.count() });
            };
            if self.claim(labels, id, held).await? {
                return Ok(id);
            }
            refused.insert(id);
        }
        Err(AllocateError::Unavailable {
            labels: labels.clone(),
            why: format!("{ATTEMPTS} free numbers were taken by other nodes at the same time"),
        })
    }

    /// Identities that these labels have already: the known ones, and those that other nodes refer to.
    async fn candidates(&self, labels: &Labels, held: &Held) -> Result<Vec<IdentityId>, AllocateError> {
        let known: Vec<IdentityId> =
            lock(&self.state).known.ids(labels).filter(|id| self.range.contains(*id)).collect();
        if !known.is_empty() {
            return Ok(known);
        }
        let references = Op::Get(Range::prefix(keys::identity_references_of(labels)));
        let txn = Txn { when: vec![held.guard()], then: vec![references], or_else: Vec::new() };
        let answer = self.done(labels, self.session.kv().txn(txn).await)?;
        if !answer.succeeded {
            return Err(lock_lost(labels));
        }
        let mut ids = BTreeSet::new();
        for answer in answer.answers {
            let OpAnswer::Get(range) = answer else { continue };
            for kv in range.kvs {
                // A reference's key ends with a node's address; a longer one belongs to other labels.
                let is_ours = keys::parse_identity_reference(&kv.key).is_ok_and(|(of, _)| of == *labels);
                ids.extend(parse_identity_value(&kv.value).ok().filter(|id| is_ours && self.range.contains(*id)));
            }
        }
        Ok(ids.into_iter().collect())
    }

    /// Refers to the identity, and creates it if it does not exist. `false` when it has other labels.
    async fn claim(&self, labels: &Labels, id: IdentityId, held: &Held) -> Result<bool, AllocateError> {
        let master = keys::identity(id);
        let text = labels.canonical();
        let node_ip = lock(&self.state).node_ip;
        let reference = keys::identity_reference(labels, node_ip);
        let value = id.to_string();
        let put = |key: &str, value: &str, lease| Op::Put { key: key.to_owned(), value: value.into(), lease };
        let exists = |lease| Txn {
            when: vec![held.guard(), Compare::new(master.clone(), Is::Value(text.clone().into_bytes()))],
            then: vec![put(&reference, &value, lease)],
            or_else: Vec::new(),
        };
        let is_new = |lease| Txn {
            when: vec![held.guard(), Compare::new(master.clone(), Is::Absent)],
            then: vec![put(&master, &text, 0), put(&reference, &value, lease)],
            or_else: Vec::new(),
        };
        // A number that nobody has is tried as new first: one round trip for a new identity, two for a known one
        // that was collected meanwhile.
        let is_known = lock(&self.state).known.labels(id).is_some();
        for turn in [is_known, !is_known] {
            let outcome = if turn {
                self.session.put_by(&reference, value.as_bytes(), exists).await
            } else {
                self.session.put_by(&reference, value.as_bytes(), is_new).await
            };
            if outcome.is_unknown() {
                // It may stand under our lease, and nobody would ever take it back.
                self.session.delete(&reference);
            }
            if self.done(labels, outcome)?.succeeded {
                let mut state = lock(&self.state);
                state.known.insert(id, labels.clone());
                state.in_use.insert(labels.clone(), InUse { id, users: 1, node_ip });
                self.rename(&mut state);
                return Ok(true);
            }
        }
        self.check_still_held(labels, held).await.map(|()| false)
    }

    /// Tells a lost lock from a number that has other labels.
    async fn check_still_held(&self, labels: &Labels, held: &Held) -> Result<(), AllocateError> {
        let txn = Txn { when: vec![held.guard()], ..Txn::default() };
        let answer = self.done(labels, self.session.kv().txn(txn).await)?;
        if answer.succeeded { Ok(()) } else { Err(lock_lost(labels)) }
    }

    fn done(&self, labels: &Labels, outcome: Outcome<TxnAnswer, KvRefusal>) -> Result<TxnAnswer, AllocateError> {
        let labels = || labels.clone();
        match outcome {
            Outcome::Done(answer) => Ok(answer),
            Outcome::Unknown(why) => Err(AllocateError::Unavailable { labels: labels(), why }),
            Outcome::Refused(refusal) => Err(refused(labels(), &refusal)),
        }
    }

    /// One user less; without users the node's reference goes. The identity itself is left to the operator.
    pub fn release(&self, labels: &Labels) {
        let mut state = lock(&self.state);
        let Some(in_use) = state.in_use.get_mut(labels) else { return };
        in_use.users = in_use.users.saturating_sub(1);
        if in_use.users == 0 {
            let node_ip = in_use.node_ip;
            state.in_use.remove(labels);
            self.session.delete(&keys::identity_reference(labels, node_ip));
        }
    }

    /// The node's address is another one: references are named after it. The old ones could become another node's.
    pub fn moved(&self, node_ip: IpAddr) {
        let mut state = lock(&self.state);
        state.node_ip = node_ip;
        self.rename(&mut state);
    }

    /// Renames the references that are named after another address than the node's.
    fn rename(&self, state: &mut State) {
        let node_ip = state.node_ip;
        for (labels, in_use) in state.in_use.iter_mut().filter(|(_, in_use)| in_use.node_ip != node_ip) {
            // The identity is not without a reference in between for long: whoever collects identities looks twice.
            self.session.put(&keys::identity_reference(labels, node_ip), in_use.id.to_string().as_bytes());
            self.session.delete(&keys::identity_reference(labels, in_use.node_ip));
            in_use.node_ip = node_ip;
        }
    }

    /// Creates again what is in use here and gone from the store. To be called when an identity was seen to go, after
    /// every listing, and from time to time.
    ///
    /// An identity that exists with other labels now (the store was emptied, and its number was given away) is not
    /// used for new endpoints any more; the answer lists these.
    pub async fn restore(&self) -> Vec<(IdentityId, Labels)> {
        let missing: Vec<(IdentityId, Labels)> = {
            let state = lock(&self.state);
            let gone = |(labels, in_use): &(&Labels, &InUse)| state.known.labels(in_use.id) != Some(*labels);
            state.in_use.iter().filter(gone).map(|(labels, in_use)| (in_use.id, labels.clone())).collect()
        };
        let mut taken = Vec::new();
        for (id, labels) in missing {
            let key = keys::identity(id);
            let txn = Txn {
                when: vec![Compare::new(key.clone(), Is::Absent)],
                then: vec![Op::Put { key: key.clone(), value: labels.canonical().into_bytes(), lease: 0 }],
                or_else: vec![Op::Get(Range::one(key))],
            };
            match self.session.kv().txn(txn).await {
                Outcome::Done(answer) => {
                    if is_other(&answer, &labels) {
                        if let Some(in_use) = lock(&self.state).in_use.remove(&labels) {
                            self.session.delete(&keys::identity_reference(&labels, in_use.node_ip));
                        }
                        taken.push((id, labels));
                    }
                }
                Outcome::Refused(refusal) => tracing::warn!(%id, %refusal, "an identity in use cannot be restored"),
                Outcome::Unknown(why) => tracing::warn!(%id, why, "an identity in use cannot be restored"),
            }
        }
        taken
    }
}

/// True when the key was read and holds other labels.
fn is_other(answer: &TxnAnswer, labels: &Labels) -> bool {
    answer.answers.iter().any(|answer| match answer {
        OpAnswer::Get(range) => range.kvs.iter().any(|kv| kv.value != labels.canonical().into_bytes()),
        OpAnswer::Put | OpAnswer::Delete(_) => false,
    })
}

fn lock_lost(labels: &Labels) -> AllocateError {
    AllocateError::Unavailable { labels: labels.clone(), why: "the lock's lease ran out".to_owned() }
}

fn lock_failed(labels: &Labels, error: LockError) -> AllocateError {
    match error {
        LockError::Refused { refusal, .. } => refused(labels.clone(), &refusal),
        other => AllocateError::Unavailable { labels: labels.clone(), why: other.to_string() },
    }
}

fn refused(labels: Labels, refusal: &KvRefusal) -> AllocateError {
    let why = refusal.to_string();
    match refusal {
        KvRefusal::Denied(_) | KvRefusal::Invalid(_) => AllocateError::Refused { labels, why },
        KvRefusal::LeaseNotFound(_) | KvRefusal::NoSpace(_) | KvRefusal::Unavailable(_) => {
            AllocateError::Unavailable { labels, why }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use basal_crds::names::ClusterId;

    fn labels(text: &str) -> Labels {
        Labels::parse_canonical(text).unwrap()
    }

    #[test]
    fn several_identities_of_one_set_of_labels_are_known() {
        let mut known = KnownIdentities::default();
        let (a, b) = (labels("k8s:a=1;"), labels("k8s:b=1;"));
        for (id, labels) in [(301, &a), (300, &a), (302, &b)] {
            known.insert(IdentityId::new(id), labels.clone());
        }
        assert_eq!(known.ids(&a).map(IdentityId::get).collect::<Vec<_>>(), [300, 301]);
        known.insert(IdentityId::new(300), b.clone());
        known.remove(IdentityId::new(302));
        known.remove(IdentityId::new(302));
        assert_eq!(known.ids(&a).map(IdentityId::get).collect::<Vec<_>>(), [301]);
        assert_eq!(known.ids(&b).map(IdentityId::get).collect::<Vec<_>>(), [300]);
        assert_eq!(known.labels(IdentityId::new(300)), Some(&b));
        assert_eq!(known.iter().count(), 2);
    }

    #[test]
    fn every_free_number_of_the_range_can_be_drawn_and_no_other() {
        let range = IdentityRange::of(ClusterId::new(0));
        let mut known = KnownIdentities::default();
        let draw = |known: &KnownIdentities, except: &BTreeSet<IdentityId>, random| {
            known.free(&range, except, random).map(IdentityId::get)
        };
        let none = BTreeSet::new();
        assert_eq!(draw(&known, &none, 0), Some(256));
        assert_eq!(draw(&known, &none, u64::from(range.count()) - 1), Some(65_535));
        known.insert(IdentityId::new(65_535), labels("k8s:a=1;"));
        assert_eq!(draw(&known, &none, u64::from(range.count()) - 1), Some(256), "the search wraps around");
        let except = BTreeSet::from([IdentityId::new(256)]);
        assert_eq!(draw(&known, &except, u64::from(range.count()) - 1), Some(257));
        for id in 256..=65_535 {
            known.insert(IdentityId::new(id), labels("k8s:a=1;"));
        }
        assert_eq!(draw(&known, &none, 12_345), None);
    }
}

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
    directory::{
        AllocateError,
        identities::{ATTEMPTS, IdentityTable, KnownIdentities},
    },
    identity::{IdentityId, IdentityPlace, IdentityRange},
    kvstore::{keys, parse_identity_value},
    labels::Labels,
};
use basal_runtime::{outcome::Outcome, sync::lock};

use crate::{
    kv::{Compare, Is, KvRefusal, MAX_TXN_OPS, Op, OpAnswer, Range, Txn, TxnAnswer},
    lock::{Held, LockError, Locks},
    session::Session,
};

/// What the references of this node are named after, so that they can be renamed when its address changes.
#[derive(Debug)]
struct References {
    /// The address of new ones: the node's IPv4 address, else its IPv6 address.
    node_ip: IpAddr,
    /// Those there are, each with its identity and its address.
    named: BTreeMap<Labels, (IdentityId, IpAddr)>,
}

/// Allocates the identities of one cluster for one node.
#[derive(Clone)]
pub struct IdentityStore {
    session: Session,
    locks: Locks,
    range: IdentityRange,
    /// Locked before the references where both are.
    table: Arc<Mutex<IdentityTable>>,
    references: Arc<Mutex<References>>,
}

impl IdentityStore {
    /// Nothing is known yet; whoever follows the identities tells by [`Self::learn`] and [`Self::forget`].
    #[must_use]
    pub fn new(session: Session, locks: Locks, range: IdentityRange, node_ip: IpAddr) -> Self {
        let references = Arc::new(Mutex::new(References { node_ip, named: BTreeMap::new() }));
        Self { session, locks, range, table: Arc::default(), references }
    }

    /// An identity was seen.
    pub fn learn(&self, id: IdentityId, labels: Labels) {
        lock(&self.table).known.insert(id, labels, ());
    }

    /// An identity was seen to be gone.
    pub fn forget(&self, id: IdentityId) {
        lock(&self.table).known.remove(id);
    }

    /// What is known.
    #[must_use]
    pub fn known(&self) -> KnownIdentities {
        lock(&self.table).known.clone()
    }

    /// The identity of these labels, with one user more.
    ///
    /// # Errors
    /// See [`AllocateError`]. Nothing is held then, and what may have been written has no user.
    pub async fn allocate(&self, labels: &Labels) -> Result<IdentityId, AllocateError> {
        let in_use = lock(&self.table).use_again(labels);
        if let Some(id) = in_use {
            return Ok(id);
        }
        let held = self.locks.lock(&keys::identity_lock(labels)).await.map_err(|error| lock_failed(labels, error))?;
        // Somebody in this process may have had the lock before us.
        let in_use = lock(&self.table).use_again(labels);
        let allocated = match in_use {
            Some(id) => Ok(id),
            None => self.allocate_locked(labels, &held).await,
        };
        // A lock that could not be given back is deleted by the session.
        drop(held.unlock().await);
        allocated
    }

    async fn allocate_locked(&self, labels: &Labels, held: &Held) -> Result<IdentityId, AllocateError> {
        let mut refused = BTreeSet::new();
        for id in self.candidates(labels, held).await? {
            if self.claim(labels, id, held).await? {
                return Ok(id);
            }
            refused.insert(id);
        }
        let drawn = self.range.drawn_in(IdentityPlace::Etcd);
        for _ in 0..ATTEMPTS {
            let random = self.session.env().random_u64();
            let free = lock(&self.table).known.free(drawn, &refused, random);
            let Some(id) = free else {
                return Err(AllocateError::Exhausted { labels: labels.clone(), count: drawn.count() });
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
            lock(&self.table).known.ids(labels).filter(|id| self.range.contains(*id)).collect();
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
        let node_ip = lock(&self.references).node_ip;
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
        let is_known = lock(&self.table).known.labels(id).is_some();
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
                let mut table = lock(&self.table);
                table.known.insert(id, labels.clone(), ());
                table.hold(labels, id);
                let mut references = lock(&self.references);
                references.named.insert(labels.clone(), (id, node_ip));
                self.rename(&mut references);
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
        // The lock is held, so that a user who comes meanwhile writes the reference after its deletion.
        let mut table = lock(&self.table);
        if table.release(labels) {
            self.dereference(labels);
        }
    }

    fn dereference(&self, labels: &Labels) {
        if let Some((_, node_ip)) = lock(&self.references).named.remove(labels) {
            self.session.delete(&keys::identity_reference(labels, node_ip));
        }
    }

    /// The node's address is another one: references are named after it. The old ones could become another node's.
    pub fn moved(&self, node_ip: IpAddr) {
        let mut references = lock(&self.references);
        references.node_ip = node_ip;
        self.rename(&mut references);
    }

    /// Renames the references that are named after another address than the node's.
    fn rename(&self, references: &mut References) {
        let node_ip = references.node_ip;
        for (labels, (id, named)) in references.named.iter_mut().filter(|(_, (_, named))| *named != node_ip) {
            // The identity is not without a reference in between for long: whoever collects identities looks twice.
            self.session.put(&keys::identity_reference(labels, node_ip), id.to_string().as_bytes());
            self.session.delete(&keys::identity_reference(labels, *named));
            *named = node_ip;
        }
    }

    /// Creates again what is in use here and gone from the store: identities, and this node's references to them, without
    /// which they would be collected. To be called when an identity was seen to go, after every listing, and from time
    /// to time.
    ///
    /// An identity that exists with other labels now (the store was emptied, and its number was given away) is not
    /// used for new endpoints any more; the answer lists these.
    pub async fn restore(&self) -> Vec<(IdentityId, Labels)> {
        let taken = self.restore_identities().await;
        self.restore_references().await;
        taken
    }

    async fn restore_identities(&self) -> Vec<(IdentityId, Labels)> {
        let missing = lock(&self.table).missing();
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
                        lock(&self.table).give_up(&labels);
                        self.dereference(&labels);
                        taken.push((id, labels));
                    }
                }
                Outcome::Refused(refusal) => tracing::warn!(%id, %refusal, "an identity in use cannot be restored"),
                Outcome::Unknown(why) => tracing::warn!(%id, why, "an identity in use cannot be restored"),
            }
        }
        taken
    }

    /// Nobody follows references: those that somebody deleted or changed are found by reading them.
    async fn restore_references(&self) {
        let wanted: Vec<(String, Vec<u8>)> = {
            let references = lock(&self.references);
            let named = references.named.iter();
            named.map(|(labels, (id, ip))| (keys::identity_reference(labels, *ip), id.to_string().into())).collect()
        };
        for some in wanted.chunks(MAX_TXN_OPS) {
            let then = some.iter().map(|(key, _)| Op::Get(Range::one(key.clone()))).collect();
            let read = Txn { then, ..Txn::default() };
            let Outcome::Done(answer) = self.session.kv().txn(read).await else {
                tracing::warn!(
                    "etcd did not tell this node's references to identities; they are looked at again later"
                );
                return;
            };
            for ((key, value), found) in some.iter().zip(answer.answers) {
                let stands = matches!(found, OpAnswer::Get(range) if range.kvs.iter().any(|kv| kv.value == *value));
                if !stands {
                    self.session.rewrite(key);
                }
            }
        }
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

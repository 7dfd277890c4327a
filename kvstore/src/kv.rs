//! The port to etcd, in the five calls that Basal makes (etcd API v3: `etcdserverpb.KV`, `Watch`, `Lease`).
//!
//! Every read is linearizable. Nothing here retries, caches or keeps a lease alive: that lives above the port, once.

use std::time::Duration;

use async_trait::async_trait;
use basal_runtime::outcome::Outcome;
use futures::stream::BoxStream;

/// An etcd revision: one counter for the whole store, 1 for an empty one, raised by each write transaction.
pub type Revision = i64;

/// An etcd lease id; 0 means "no lease".
pub type LeaseId = i64;

/// One key with its value and the counters that etcd keeps for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyValue {
    /// The key. Bytes that are no UTF-8 come as U+FFFD: such a key is visible, and parses as no record of ours.
    pub key: String,
    /// The value.
    pub value: Vec<u8>,
    /// The revision that created the key.
    pub create_revision: Revision,
    /// The revision that wrote the key last.
    pub mod_revision: Revision,
    /// How often the key was written since it was created; 1 for a new key.
    pub version: i64,
    /// The lease that the key hangs on, or 0.
    pub lease: LeaseId,
}

/// Which keys a read or a delete means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Keys {
    /// One key.
    One(String),
    /// Every key that starts with this text, in ascending order of bytes.
    Prefix(String),
    /// Every key at or after `from` that starts with `prefix`: the next page of a list.
    PrefixFrom {
        /// What all keys start with.
        prefix: String,
        /// The first key of the page; mostly the last key of the page before with `\0` behind it.
        from: String,
    },
}

/// A read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Range {
    /// Which keys.
    pub keys: Keys,
    /// At most so many keys; 0 means all.
    pub limit: i64,
    /// The state of the store at this revision; 0 means now.
    pub revision: Revision,
    /// Leave the values out.
    pub keys_only: bool,
}

impl Range {
    /// One key, as it is now.
    pub fn one(key: impl Into<String>) -> Self {
        Self { keys: Keys::One(key.into()), limit: 0, revision: 0, keys_only: false }
    }

    /// All keys with a prefix, as they are now.
    pub fn prefix(prefix: impl Into<String>) -> Self {
        Self { keys: Keys::Prefix(prefix.into()), limit: 0, revision: 0, keys_only: false }
    }
}

/// What every answer says of the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Header {
    /// The id of the etcd cluster. Another one than before means another store behind the same address.
    pub cluster_id: u64,
    /// The store's revision when the request was answered. It never falls, unless an older snapshot was restored.
    pub revision: Revision,
}

/// The answer to a [`Range`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RangeAnswer {
    /// The store's state.
    pub header: Header,
    /// The keys, in ascending order of bytes.
    pub kvs: Vec<KeyValue>,
    /// True when `limit` cut the list.
    pub more: bool,
}

/// One condition of a [`Txn`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Compare {
    /// The key that is looked at. A missing key has version, revisions and lease 0; its value equals nothing.
    pub key: String,
    /// What must hold.
    pub is: Is,
}

/// What a [`Compare`] demands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Is {
    /// The key does not exist (version 0).
    Absent,
    /// The key exists (version above 0).
    Present,
    /// The revision of the last write equals this one; 0 means absent.
    ModRevision(Revision),
    /// The revision that created the key equals this one; 0 means absent.
    CreateRevision(Revision),
    /// The value equals this one.
    Value(Vec<u8>),
    /// The lease equals this one.
    Lease(LeaseId),
}

impl Compare {
    /// Makes a condition.
    pub fn new(key: impl Into<String>, is: Is) -> Self {
        Self { key: key.into(), is }
    }
}

/// One operation of a [`Txn`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    /// Writes a key.
    Put {
        /// The key.
        key: String,
        /// Its new value.
        value: Vec<u8>,
        /// The lease that it hangs on from now on, or 0.
        lease: LeaseId,
    },
    /// Deletes keys.
    Delete(Keys),
    /// Reads keys.
    Get(Range),
}

/// So many conditions, and so many operations a side, etcd takes in a transaction by default (`--max-txn-ops`).
pub const MAX_TXN_OPS: usize = 128;

/// A transaction: all of `then` if every condition holds, else all of `or_else`. etcd allows [`MAX_TXN_OPS`] conditions
/// and as many operations a side, and no key twice among the writes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Txn {
    /// The conditions.
    pub when: Vec<Compare>,
    /// What to do when all hold.
    pub then: Vec<Op>,
    /// What to do otherwise.
    pub or_else: Vec<Op>,
}

/// The answer to a [`Txn`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TxnAnswer {
    /// The store's state after the transaction.
    pub header: Header,
    /// Whether every condition held, that is whether `then` ran.
    pub succeeded: bool,
    /// One answer for each operation that ran, in order.
    pub answers: Vec<OpAnswer>,
}

/// The answer to one [`Op`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OpAnswer {
    /// To a put.
    Put,
    /// To a delete: how many keys went.
    Delete(i64),
    /// To a read.
    Get(RangeAnswer),
}

/// Why a read, or a keep-alive, has no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KvError {
    /// The revision asked for is gone. List again.
    #[error("revision {asked} is compacted away")]
    Compacted {
        /// The revision that was asked for.
        asked: Revision,
    },
    /// The user of this connection may not do that.
    #[error("etcd denied the request: {0}; check the role of the user that the client certificate names")]
    Denied(String),
    /// The lease expired or was revoked.
    #[error("lease {0:x} does not exist")]
    LeaseNotFound(LeaseId),
    /// No answer: no connection, no leader, a time-out.
    #[error("etcd did not answer: {0}")]
    Unavailable(String),
}

/// Why etcd did not carry out a write.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KvRefusal {
    /// The user of this connection may not do that.
    #[error("etcd denied the request: {0}; check the role of the user that the client certificate names")]
    Denied(String),
    /// The lease named in a put expired or was revoked.
    #[error("lease {0:x} does not exist")]
    LeaseNotFound(LeaseId),
    /// The backend quota is used up (alarm NOSPACE).
    #[error("etcd is full: {0}; compact and defragment it, or raise --quota-backend-bytes, then disarm the alarm")]
    NoSpace(String),
    /// The request breaks a limit of etcd (operations a transaction, bytes a request, a key twice).
    #[error("etcd refused the request: {0}")]
    Invalid(String),
    /// The request was not sent or not taken: no connection, no leader.
    #[error("etcd did not take the request: {0}")]
    Unavailable(String),
}

/// One change that a watch saw.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WatchEvent {
    /// The key was written.
    Put(KeyValue),
    /// The key was deleted, or its lease ended.
    Delete {
        /// The key.
        key: String,
        /// The revision of the deletion.
        mod_revision: Revision,
    },
}

impl WatchEvent {
    /// The key that changed.
    #[must_use]
    pub fn key(&self) -> &str {
        match self {
            Self::Put(kv) => &kv.key,
            Self::Delete { key, .. } => key,
        }
    }

    /// The revision of the change.
    #[must_use]
    pub fn mod_revision(&self) -> Revision {
        match self {
            Self::Put(kv) => kv.mod_revision,
            Self::Delete { mod_revision, .. } => *mod_revision,
        }
    }
}

/// What a watch delivers at once: the changes of whole revisions, never a part of one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WatchBatch {
    /// The store's state. Every change of the prefix up to this revision has been delivered.
    pub header: Header,
    /// The changes, oldest first. May be empty: then it only tells that the watch is alive.
    pub events: Vec<WatchEvent>,
}

/// A granted lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lease {
    /// Its id.
    pub id: LeaseId,
    /// How long it lives after a keep-alive; etcd may give more than was asked for.
    pub ttl: Duration,
}

/// etcd as Basal sees it.
#[async_trait]
pub trait Kv: Send + Sync + 'static {
    /// Reads.
    ///
    /// # Errors
    /// `Compacted` for a revision that is gone, `Denied`, or `Unavailable`.
    async fn range(&self, range: Range) -> Result<RangeAnswer, KvError>;

    /// Writes, in one revision. A transaction whose conditions do not hold is `Done` with `succeeded: false`.
    async fn txn(&self, txn: Txn) -> Outcome<TxnAnswer, KvRefusal>;

    /// Follows every change of the keys with a prefix from a revision on, that one included. The stream ends after
    /// its first error; `Compacted` means that the caller has to list again, and `Unavailable` may mean that the
    /// revision lies beyond the store's next one, because an older snapshot was restored.
    fn watch(&self, prefix: &str, from: Revision) -> BoxStream<'static, Result<WatchBatch, KvError>>;

    /// Asks for a lease.
    async fn lease_grant(&self, ttl: Duration) -> Outcome<Lease, KvRefusal>;

    /// Lets a lease live on; answers the time that it lives from now.
    ///
    /// # Errors
    /// `LeaseNotFound` when it is gone with all its keys, else `Unavailable` or `Denied`.
    async fn lease_keep_alive(&self, id: LeaseId) -> Result<Duration, KvError>;

    /// Ends a lease; its keys are deleted. A lease that is gone already is `Done`.
    async fn lease_revoke(&self, id: LeaseId) -> Outcome<(), KvRefusal>;
}

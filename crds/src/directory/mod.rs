//! What an agent learns of the cluster and tells it: nodes, addresses, identities. One interface; the source behind it
//! is etcd or the API server, and nothing above knows which.
//!
//! What the sources have in common stands here too: which deletions wait ([`patience`]), and how identities are kept
//! ([`identities`]).

pub mod identities;
pub mod patience;

use std::net::IpAddr;

use async_trait::async_trait;
use basal_ipam::names::NodeName;
use futures::stream::BoxStream;

use crate::{
    identity::IdentityId,
    kvstore::{IpRecord, IpTarget, NodeRecord},
    labels::Labels,
    names::ClusterName,
};

/// One step of a subscription.
///
/// Every subscription begins with what exists, one `Upsert` each, then `InSync`; changes follow. After an interruption
/// of the source the differences follow, then `InSync` again. A subscriber therefore holds a map, replaces and removes
/// in it, and does not need to know why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change<K, V> {
    /// It exists, and this is how it looks.
    Upsert(K, V),
    /// It is gone, for good: what a source loses by accident is held back first (see [`Directory`]).
    Delete(K),
    /// A record cannot be read. What was known under this name before stays as it was.
    Invalid {
        /// The name of the record at the source.
        name: String,
        /// What is wrong with it, with the field.
        problem: String,
    },
    /// Everything that the source holds has been handed over.
    InSync,
    /// The source cannot be followed at the moment; what is known may be old until the next `InSync`.
    Stale(String),
}

impl<K, V> Change<K, V> {
    /// The same with a part of the value, or another.
    pub fn map<W>(self, value: impl FnOnce(V) -> W) -> Change<K, W> {
        match self {
            Self::Upsert(key, old) => Change::Upsert(key, value(old)),
            Self::Delete(key) => Change::Delete(key),
            Self::Invalid { name, problem } => Change::Invalid { name, problem },
            Self::InSync => Change::InSync,
            Self::Stale(why) => Change::Stale(why),
        }
    }
}

/// Who has an address. There are tens of thousands of records, so no more of one than this is told and kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IpOwner {
    /// The address of the node that it is behind.
    pub host_ip: Option<IpAddr>,
    /// Its identity.
    pub identity: IdentityId,
}

impl From<&IpRecord> for IpOwner {
    fn from(record: &IpRecord) -> Self {
        Self { host_ip: record.host_ip, identity: record.identity }
    }
}

/// A node among all clusters of a mesh.
pub type NodeId = (ClusterName, NodeName);

/// A stream of changes. It has no end.
pub type Changes<K, V> = BoxStream<'static, Change<K, V>>;

/// Why an identity was not allocated.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AllocateError {
    /// The source does not allow it, or refuses.
    #[error("identity for {labels}: refused: {why}")]
    Refused {
        /// The labels that it was for.
        labels: Labels,
        /// Why.
        why: String,
    },
    /// The source does not answer. Trying again may help.
    #[error("identity for {labels}: {why}")]
    Unavailable {
        /// The labels that it was for.
        labels: Labels,
        /// Why.
        why: String,
    },
    /// All identities of the cluster are taken.
    #[error(
        "identity for {labels}: all {count} numbers for new identities are taken; \
         exclude labels that differ from pod to pod (cilium-config key `labels`), then wait for the identity GC"
    )]
    Exhausted {
        /// The labels that it was for.
        labels: Labels,
        /// How many there are.
        count: u32,
    },
}

/// The cluster, as an agent reads and writes it.
///
/// Deletions: a node is reported as deleted only after it was missing for 30 s. Anything that is missing after a
/// listing, rather than deleted in plain sight, waits as long; and while the source holds no record of a kind at all,
/// no deletion of that kind is reported.
#[async_trait]
pub trait Directory: Send + Sync + 'static {
    /// Follows the nodes of this cluster and of its mesh.
    fn nodes(&self) -> Changes<NodeId, NodeRecord>;

    /// Follows the addresses with their owners. The source looks after this agent's own records only while
    /// somebody follows.
    fn ips(&self) -> Changes<IpTarget, IpOwner>;

    /// Follows the identities with their labels.
    fn identities(&self) -> Changes<IdentityId, Labels>;

    /// This record ought to be there from now on, until it is withdrawn or this agent is gone for long. Returns at
    /// once.
    fn publish_ip(&self, record: &IpRecord);

    /// The record ought not to be there any more. Returns at once.
    fn withdraw_ip(&self, target: IpTarget);

    /// This agent's node has these addresses from now on. Records that are named after an address of it follow; those
    /// that are published follow by being published again. Returns at once. A source that names nothing so has nothing
    /// to do.
    fn moved(&self, _node_ips: &[IpAddr]) {}

    /// Withdraws every record behind this agent's own node that this agent has not published: what an earlier run left.
    /// To be called once after the start, when everything was published again, by one who follows [`Self::ips`] and has
    /// heard that it is in sync: a source may go by what it told there.
    ///
    /// # Errors
    /// The source did not answer.
    async fn withdraw_leftover_ips(&self) -> Result<usize, String>;

    /// The identity of these labels, allocated if there is none, and held until as many calls of
    /// [`Self::release_identity`] as of this.
    ///
    /// # Errors
    /// See [`AllocateError`].
    async fn allocate_identity(&self, labels: &Labels) -> Result<IdentityId, AllocateError>;

    /// One user of the identity less.
    fn release_identity(&self, labels: &Labels);
}

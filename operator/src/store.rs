//! Where claims lie, and where nodes are made known: the one place that knows whether there is an etcd.
//!
//! With etcd, claims are keys there, and every node has a record beside its CiliumNode, written under the condition that the
//! claim stands. Without, claims are custom resources and the CiliumNode itself is the record: what the operator confirms in
//! its status, its agent uses, and the other agents read it from there.

mod custom_resources;
mod etcd;
mod identities;

use std::{collections::BTreeMap, sync::Arc};

use async_trait::async_trait;
use basal_crds::resources::LedgerStore;
use basal_ipam::{
    ledger::{Guard, Ledger},
    names::{NodeName, TermId},
};
use basal_kvstore::{
    kv::{KeyValue, Kv, Revision},
    ledger::OwnerError,
};
use basal_objects::{
    leadership::{self, Leadership},
    port::{Objects, ReadError},
};
use basal_runtime::{
    env::{SharedEnv, TaskHandle},
    readiness::Readiness,
};
use futures::future::BoxFuture;
use tokio::sync::watch;

pub use self::{custom_resources::CustomResources, etcd::Etcd};
use crate::{
    duties::DutySettings,
    metrics::OperatorMetrics,
    node::{NodeError, Records},
    ports::Ports,
};

/// Why this cluster cannot use a store.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// Which cluster this is cannot be read.
    #[error("the namespace kube-system, whose uid tells the cluster, cannot be read: {0}")]
    Cluster(#[from] ReadError),
    /// The API server has no such namespace.
    #[error("there is no namespace kube-system, whose uid tells the cluster; create it")]
    NoCluster,
    /// The store is another cluster's, or cannot be written.
    #[error(transparent)]
    Owner(#[from] OwnerError),
}

/// How a node's confirmed blocks are made known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Publication {
    /// By a record in etcd.
    Record,
    /// By `status.ipam.pod-cidrs` of its CiliumNode.
    Status,
    /// By both: some agents still read the one, and some the other already.
    Both,
}

impl Publication {
    /// Whether there are records in etcd.
    #[must_use]
    pub const fn has_records(self) -> bool {
        matches!(self, Self::Record | Self::Both)
    }

    /// Whether CiliumNodes confirm blocks.
    #[must_use]
    pub const fn has_status(self) -> bool {
        matches!(self, Self::Status | Self::Both)
    }
}

/// A change of what is published beside a CiliumNode.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RecordChange {
    /// The node record, as text.
    Publish(String),
    /// The node record goes.
    Withdraw,
    /// ip→identity records go, by their keys.
    WithdrawAddresses(Vec<String>),
}

/// A store of claims, with what is published beside it.
#[async_trait]
pub trait Store: Send + Sync + 'static {
    /// Which one it is.
    fn kind(&self) -> LedgerStore;

    /// How nodes are made known.
    fn publication(&self) -> Publication;

    /// The etcd in it. Whoever has one reaches both stores.
    fn kv(&self) -> Option<Arc<dyn Kv>> {
        None
    }

    /// The claims.
    fn ledger(&self, objects: &Arc<dyn Objects>) -> Arc<dyn Ledger>;

    /// The same store for a leader: it writes only while the term lasts.
    fn during(&self, leadership: &watch::Receiver<Leadership>, term: leadership::TermId) -> Arc<dyn Store>;

    /// A view of the node records, kept by a task.
    fn follow(&self, env: &SharedEnv, readiness: &Readiness) -> (Records, Option<TaskHandle>);

    /// Makes the store this cluster's where it is nobody's, before a term begins.
    async fn own(&self, objects: &Arc<dyn Objects>) -> Result<(), StoreError>;

    /// One look at whether this cluster can use the store, with the name of the server; `None` where the API server is all
    /// of it.
    fn probe(&self, objects: &Arc<dyn Objects>) -> Option<(&'static str, BoxFuture<'static, Result<(), StoreError>>)>;

    /// The keys of everything that is published for single addresses, read at quorum.
    async fn addresses(&self) -> Result<Vec<String>, NodeError>;

    /// The node records by the names of their nodes, read at quorum.
    async fn records(&self) -> Result<BTreeMap<String, KeyValue>, NodeError>;

    /// Changes what is published for a node, if the guard's conditions hold. Answers the revision of the write.
    async fn write(&self, name: &NodeName, guard: &Guard, change: RecordChange) -> Result<Revision, NodeError>;

    /// What a leader keeps up in it beside nodes; the tasks end when their handles are aborted.
    fn duties(
        &self,
        ports: &Ports,
        term: &TermId,
        settings: DutySettings,
        metrics: &OperatorMetrics,
    ) -> Vec<TaskHandle>;
}

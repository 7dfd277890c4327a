//! Keeping what agents read up in both places, while some of them work with etcd and some without.
//!
//! - Every agent writes CiliumEndpoints, whichever place it works with; one without etcd writes no ip→identity record. So the
//!   records are made from CiliumEndpoints, as [copies](basal_kvstore::copies) that the agent replaces once it has etcd, and
//!   that replace what it published once it does without.
//! - Node records are written by the operator. With the claims in etcd its controller writes both; without, copies in etcd are
//!   made from the CiliumNodes.
//! - Identities are allocated by agents, in either place: each gets what it lacks from the other. No number is
//!   [given in both](basal_crds::identity::IdentityPlace), and none is set free meanwhile.

use std::{sync::Arc, time::Duration};

use basal_crds::{
    identity::IdentityRange,
    kvstore::keys,
    resources::{HEARTBEAT_ANNOTATION, LedgerStore},
};
use basal_ipam::{ledger::LedgerError, names::TermId};
use basal_kvstore::{
    copies::{Copies, CopyWrite},
    kv::{KeyValue, Kv, KvError},
    pages::{PAGE_SIZE, list},
    records::Guarded,
};
use basal_objects::{
    directory::identity_object,
    object::{Object, ObjectKey, Resource, resources},
    port::{Freshness, MergePatch, Preconditions, ReadError, Refusal, Scope},
};
use basal_runtime::{env::TaskHandle, outcome::Outcome};
use futures::{StreamExt as _, stream};
use serde_json::json;
use tokio::sync::watch;
use tracing::{info, warn};

use super::copies::{self, Identities, IdentityWrite};
use crate::{ledger_state::Agents, ports::Ports};

/// Pause between two comparisons. A new pod is reached by its node's block until its record is there.
const EVERY: Duration = Duration::from_secs(10);

/// Writes at the same time.
const WRITES_AT_ONCE: usize = 16;

/// How often the two places are compared before somebody is told that they do not get alike: what changes meanwhile is few.
const ROUNDS: usize = 8;

/// Why the two places are not alike.
#[derive(Debug, thiserror::Error)]
pub enum BridgeError {
    /// The API server cannot be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// etcd cannot be read.
    #[error(transparent)]
    Kv(#[from] KvError),
    /// Something was not written.
    #[error("{what} was not written: {why}")]
    Write {
        /// The key or object.
        what: String,
        /// Why.
        why: String,
    },
    /// The fence of etcd cannot be read.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// The ledger in etcd is the one that is left, and somebody took the seal away.
    #[error("the ledger in etcd is not sealed, though the claims were moved out of it; nothing is written there")]
    NotSealed,
    /// Others kept changing it.
    #[error("{0} records were still missing after {ROUNDS} comparisons")]
    Restless(usize),
}

/// Keeps both places up while a term lasts, and counts the agents that work with the new one.
pub(crate) fn start(ports: &Ports, kv: &Arc<dyn Kv>, term: &TermId, counted: watch::Sender<Agents>) -> TaskHandle {
    let (ports, kv, term) = (ports.clone(), Arc::clone(kv), term.clone());
    let env = Arc::clone(&ports.env);
    let task = async move {
        loop {
            match look(&ports, &kv, &term).await {
                Ok(agents) => drop(counted.send_replace(agents)),
                Err(error) => warn!(%error, "the store that is left and the new one are not alike yet"),
            }
            tokio::time::sleep(EVERY).await;
        }
    };
    env.spawn("bridge", Box::pin(task))
}

async fn look(ports: &Ports, kv: &Arc<dyn Kv>, term: &TermId) -> Result<Agents, BridgeError> {
    match ports.store.kind() {
        LedgerStore::Etcd => Bridge::new(ports, kv, term.as_str()).compare(LedgerStore::Etcd).await,
        LedgerStore::CustomResources => {
            // Nobody takes the fence of the ledger that is left from the seal.
            let fence = ports.serving(LedgerStore::Etcd).ledger.begin().await?;
            let seal = fence.value.filter(|value| TermId::is_seal(value)).ok_or(BridgeError::NotSealed)?;
            Bridge::new(ports, kv, &seal).compare(LedgerStore::CustomResources).await
        }
    }
}

/// The two places.
pub(super) struct Bridge {
    ports: Ports,
    kv: Arc<dyn Kv>,
    copies: Copies,
}

impl Bridge {
    /// Writes in etcd only while the fence there holds this text.
    pub(super) fn new(ports: &Ports, kv: &Arc<dyn Kv>, fence: &str) -> Self {
        let copies = Copies::new(Arc::clone(kv), ports.cluster.name().as_str(), fence);
        Self { ports: ports.clone(), kv: Arc::clone(kv), copies }
    }

    /// Makes everything that agents read, but for the claims, ready in a store that is moved to.
    ///
    /// # Errors
    /// See [`BridgeError`].
    pub(super) async fn fill(&self, to: LedgerStore) -> Result<(), BridgeError> {
        let mut missing = 0;
        for _ in 0..ROUNDS {
            missing = self.write_all(self.identities().await?.fill(to)).await?;
            if to == LedgerStore::Etcd {
                let nodes = self.objects(resources::CILIUM_NODE).await?;
                missing += self.nodes(&nodes).await? + self.addresses(&nodes).await?;
            }
            if missing == 0 {
                return Ok(());
            }
        }
        Err(BridgeError::Restless(missing))
    }

    /// With the claims in custom resources node records in etcd are copies.
    async fn compare(&self, active: LedgerStore) -> Result<Agents, BridgeError> {
        let identities = self.identities().await?;
        for id in identities.clashes() {
            warn!(%id, "the number stands for other labels in etcd than among the CiliumIdentities");
        }
        let mut written = self.write_all(identities.exchange()).await?;
        let nodes = self.objects(resources::CILIUM_NODE).await?;
        if active == LedgerStore::CustomResources {
            written += self.nodes(&nodes).await?;
        }
        written += self.addresses(&nodes).await?;
        if written > 0 {
            info!(written, "records copied for agents that are not changed yet");
        }
        Ok(copies::agents(&nodes, active))
    }

    async fn objects(&self, resource: Resource) -> Result<Vec<Object>, BridgeError> {
        Ok(self.ports.objects.list(resource, &Scope::default(), Freshness::Quorum).await?.items)
    }

    async fn keys(&self, prefix: &str) -> Result<Vec<KeyValue>, BridgeError> {
        Ok(list(self.kv.as_ref(), prefix, PAGE_SIZE, false).await?.kvs)
    }

    async fn identities(&self) -> Result<Identities, BridgeError> {
        let range = IdentityRange::of(self.ports.cluster.id());
        let (ids, references) =
            (self.keys(keys::IDENTITY_IDS_PREFIX).await?, self.keys(keys::IDENTITY_VALUES_PREFIX).await?);
        let objects = self.objects(resources::CILIUM_IDENTITY).await?;
        let endpoints = self.objects(resources::CILIUM_ENDPOINT).await?;
        Ok(Identities::of(&range, &objects, &endpoints, &ids, &references))
    }

    /// By CiliumNodes that were listed before: a record that is found now was not made from older ones.
    async fn nodes(&self, cilium_nodes: &[Object]) -> Result<usize, BridgeError> {
        let found = self.keys(&keys::nodes_of(self.ports.cluster.name())).await?;
        self.write_copies(copies::nodes(&self.ports.cluster, cilium_nodes, &found)).await
    }

    async fn addresses(&self, cilium_nodes: &[Object]) -> Result<usize, BridgeError> {
        let objects = self.objects(resources::CILIUM_ENDPOINT).await?;
        let found = self.keys(keys::IPS_PREFIX).await?;
        self.write_copies(copies::addresses(&objects, &copies::without_etcd(cilium_nodes), &found)).await
    }

    async fn write_copies(&self, writes: Vec<CopyWrite>) -> Result<usize, BridgeError> {
        self.write_all(writes.into_iter().map(IdentityWrite::Key).collect()).await
    }

    /// Answers how many there were.
    async fn write_all(&self, writes: Vec<IdentityWrite>) -> Result<usize, BridgeError> {
        let count = writes.len();
        let written = stream::iter(writes).map(|write| self.write(write)).buffer_unordered(WRITES_AT_ONCE);
        let written: Vec<Result<(), BridgeError>> = written.collect().await;
        written.into_iter().collect::<Result<(), _>>().map(|()| count)
    }

    /// What somebody else wrote meanwhile is looked at again by the next comparison.
    async fn write(&self, write: IdentityWrite) -> Result<(), BridgeError> {
        match write {
            IdentityWrite::Key(write) => {
                let (CopyWrite::Put { key, .. } | CopyWrite::Delete { key, .. }) = &write;
                let what = key.clone();
                match self.copies.write(write).await {
                    Guarded::Done(_) | Guarded::GuardLost => Ok(()),
                    Guarded::Refused(refusal) => Err(BridgeError::Write { what, why: refusal.to_string() }),
                    Guarded::Unknown(why) => Err(BridgeError::Write { what, why }),
                }
            }
            IdentityWrite::Create(id, labels) => {
                let object = identity_object(id, &labels);
                done(&object.key(), self.ports.objects.create(resources::CILIUM_IDENTITY, object).await.map(drop))
            }
            IdentityWrite::Unmark { id, uid, resource_version } => {
                let body = json!({ "metadata": { "annotations": { HEARTBEAT_ANNOTATION: null } } });
                let (key, patch) =
                    (ObjectKey::cluster(id.to_string()), MergePatch { resource_version, uid, subresource: None, body });
                done(&key, self.ports.objects.patch(resources::CILIUM_IDENTITY, &key, patch).await.map(drop))
            }
            IdentityWrite::Delete { id, uid, resource_version } => {
                let (key, only_if) = (ObjectKey::cluster(id.to_string()), Preconditions { uid, resource_version });
                done(&key, self.ports.objects.delete(resources::CILIUM_IDENTITY, &key, only_if).await)
            }
        }
    }
}

fn done(key: &ObjectKey, outcome: Outcome<(), Refusal>) -> Result<(), BridgeError> {
    let why = match outcome {
        Outcome::Done(()) | Outcome::Refused(Refusal::AlreadyExists | Refusal::Conflict(_) | Refusal::NotFound(_)) => {
            return Ok(());
        }
        Outcome::Refused(refusal) => refusal.to_string(),
        Outcome::Unknown(why) => why,
    };
    Err(BridgeError::Write { what: format!("CiliumIdentity {key}"), why })
}

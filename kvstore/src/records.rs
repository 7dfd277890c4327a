//! What the operator writes beside the ledger: node records and the clearing of a released block, both under the
//! ledger's guard, the heartbeat, and the cluster's configuration.

use std::{sync::Arc, time::Duration};

use basal_crds::{
    kvstore::{ClusterConfig, keys, timestamp_value},
    names::ClusterName,
};
use basal_ipam::{ledger::Guard, names::NodeName};
use basal_runtime::outcome::Outcome;
use futures::StreamExt;

use crate::{
    kv::{Compare, Keys, Kv, KvRefusal, MAX_TXN_OPS, Op, Revision, Txn, WatchEvent},
    ledger::LedgerKeys,
    list_watch::{ListWatch, Update, list_watch},
    session::Session,
};

/// The time between two heartbeats: Cilium's.
pub const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(60);

/// How often a cluster's configuration is written without need: Cilium's.
const CONFIG_REFRESH: Duration = Duration::from_secs(5 * 60);

/// The answer to a write under a guard.
#[must_use = "a write that was refused or is unknown must be handled"]
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Guarded {
    /// It was carried out, and this is its revision.
    Done(Revision),
    /// Nothing was written: the fence holds another term, or a claim was changed. Read the ledger again.
    GuardLost,
    /// Nothing was written.
    Refused(KvRefusal),
    /// It was written, or not.
    Unknown(String),
}

impl Guarded {
    /// Carries operations out if the conditions hold.
    pub(crate) async fn write(kv: &dyn Kv, when: Vec<Compare>, then: Vec<Op>) -> Self {
        match kv.txn(Txn { when, then, or_else: Vec::new() }).await {
            Outcome::Done(answer) if answer.succeeded => Self::Done(answer.header.revision),
            Outcome::Done(_) => Self::GuardLost,
            Outcome::Refused(refusal) => Self::Refused(refusal),
            Outcome::Unknown(why) => Self::Unknown(why),
        }
    }
}

/// The records that the leader of a cluster's operator writes, and nobody else: those of nodes; and it clears the
/// ip→identity records of blocks that rest.
///
/// Node records have no lease: a dead operator takes no node off the network.
#[derive(Clone)]
pub struct NodeRecords {
    kv: Arc<dyn Kv>,
    ledger: LedgerKeys,
    cluster: ClusterName,
}

impl NodeRecords {
    /// The records of a cluster; `ledger` are the keys of its ledger.
    #[must_use]
    pub fn new(kv: Arc<dyn Kv>, ledger: LedgerKeys, cluster: ClusterName) -> Self {
        Self { kv, ledger, cluster }
    }

    /// Writes the text of a node's record if the term and the claims that it rests on still stand.
    pub async fn publish(&self, guard: &Guard, node: &NodeName, text: String) -> Guarded {
        let put = Op::Put { key: keys::node(&self.cluster, node), value: text.into_bytes(), lease: 0 };
        self.write(guard, vec![put]).await
    }

    /// Deletes a node's record if the term still stands. A record that is not there is no error.
    pub async fn withdraw(&self, guard: &Guard, node: &NodeName) -> Guarded {
        self.write(guard, vec![Op::Delete(Keys::One(keys::node(&self.cluster, node)))]).await
    }

    /// Deletes ip→identity records by their keys, while the claims of the blocks that they lie in stand as they are. It
    /// ends at the first transaction that is not carried out: those before it were. The revision is that of the last,
    /// 0 without any key.
    pub async fn withdraw_addresses(&self, guard: &Guard, keys: &[String]) -> Guarded {
        let mut answer = Guarded::Done(0);
        for some in keys.chunks(MAX_TXN_OPS) {
            answer = self.write(guard, some.iter().map(|key| Op::Delete(Keys::One(key.clone()))).collect()).await;
            if !matches!(answer, Guarded::Done(_)) {
                break;
            }
        }
        answer
    }

    async fn write(&self, guard: &Guard, then: Vec<Op>) -> Guarded {
        Guarded::write(self.kv.as_ref(), self.ledger.conditions(guard), then).await
    }
}

/// Writes the heartbeat every 60 s, until it is dropped. Readers take its arrival, not its text, for a sign of life.
pub async fn heartbeat(session: Session) {
    loop {
        session.put(keys::HEARTBEAT, timestamp_value(session.env().now()).as_bytes());
        tokio::time::sleep(HEARTBEAT_INTERVAL).await;
    }
}

/// Keeps this cluster's configuration in etcd as it ought to be, also against other writers, until it is dropped.
pub async fn enforce_cluster_config(session: Session, cluster: ClusterName, config: ClusterConfig) {
    let key = keys::cluster_config(&cluster);
    let value = config.to_json().into_bytes();
    session.put(&key, &value);
    let what = ListWatch::new(keys::CLUSTER_CONFIG_PREFIX);
    let mut updates = list_watch(Arc::clone(session.env()), Arc::clone(session.kv()), what);
    loop {
        let Ok(update) = tokio::time::timeout(CONFIG_REFRESH, updates.next()).await else {
            session.rewrite(&key);
            continue;
        };
        let is_ours = match update {
            None => return,
            Some(Update::Interrupted(_)) => true,
            Some(Update::Listed(listing)) => {
                !listing.missing.contains(&key) && listing.changed.iter().all(|kv| kv.key != key || kv.value == value)
            }
            Some(Update::Changed(batch)) => batch
                .events
                .iter()
                .rfind(|event| event.key() == key)
                .is_none_or(|event| matches!(event, WatchEvent::Put(kv) if kv.value == value)),
        };
        if !is_ours {
            session.rewrite(&key);
        }
    }
}

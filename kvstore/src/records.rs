//! What the operator writes beside the ledger: node records under the ledger's guard, the clearing of a released block,
//! the heartbeat, and the cluster's configuration.

use std::{sync::Arc, time::Duration};

use basal_crds::{
    kvstore::{ClusterConfig, IpTarget, NodeRecord, keys, timestamp_value},
    names::{ClusterName, NodeName},
};
use basal_ipam::ledger::Guard;
use basal_runtime::outcome::Outcome;
use futures::StreamExt;
use ipnet::IpNet;

use crate::{
    kv::{Compare, Is, Keys, Kv, KvError, KvRefusal, Op, Revision, Txn, WatchEvent},
    ledger::LedgerKeys,
    list_watch::{ListWatch, Update, list_watch},
    pages::{PAGE_SIZE, list},
    session::Session,
};

/// The time between two heartbeats: Cilium's.
pub const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(60);

/// How often a cluster's configuration is written without need: Cilium's.
const CONFIG_REFRESH: Duration = Duration::from_secs(5 * 60);

/// etcd takes so many operations in a transaction by default (`--max-txn-ops`).
const MAX_OPS: usize = 128;

/// The answer to a write under a guard.
#[must_use = "a write that was refused or is unknown must be handled"]
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Guarded {
    /// It was carried out.
    Done,
    /// Nothing was written: the fence holds another term, or a claim was changed. Read the ledger again.
    GuardLost,
    /// Nothing was written.
    Refused(KvRefusal),
    /// It was written, or not.
    Unknown(String),
}

/// The node records of one cluster, written by the leader of its operator only.
///
/// They have no lease: a dead operator takes no node off the network.
#[derive(Clone)]
pub struct NodeRecords {
    kv: Arc<dyn Kv>,
    ledger: LedgerKeys,
}

impl NodeRecords {
    /// The records of a cluster; `ledger` are the keys of its ledger.
    #[must_use]
    pub fn new(kv: Arc<dyn Kv>, ledger: LedgerKeys) -> Self {
        Self { kv, ledger }
    }

    /// Writes a record if the term and the claims that it rests on still stand.
    pub async fn publish(&self, guard: &Guard, record: &NodeRecord) -> Guarded {
        let key = keys::node(&record.cluster, &record.name);
        self.write(guard, Op::Put { key, value: record.to_json().into_bytes(), lease: 0 }).await
    }

    /// Deletes a record if the term still stands. A record that is not there is no error.
    pub async fn withdraw(&self, guard: &Guard, cluster: &ClusterName, node: &NodeName) -> Guarded {
        self.write(guard, Op::Delete(Keys::One(keys::node(cluster, node)))).await
    }

    async fn write(&self, guard: &Guard, op: Op) -> Guarded {
        let txn = Txn { when: self.ledger.conditions(guard), then: vec![op], or_else: Vec::new() };
        match self.kv.txn(txn).await {
            Outcome::Done(answer) if answer.succeeded => Guarded::Done,
            Outcome::Done(_) => Guarded::GuardLost,
            Outcome::Refused(refusal) => Guarded::Refused(refusal),
            Outcome::Unknown(why) => Guarded::Unknown(why),
        }
    }
}

/// The ip→identity records inside a network, with the revision of their last write.
///
/// # Errors
/// The listing failed.
pub async fn ip_records_in(kv: &dyn Kv, network: IpNet) -> Result<Vec<(IpTarget, Revision)>, KvError> {
    let listed = list(kv, keys::IPS_PREFIX, PAGE_SIZE, true).await?;
    let parsed = listed.kvs.iter().filter_map(|kv| Some((keys::parse_ip_target(&kv.key).ok()?, kv.mod_revision)));
    Ok(parsed.filter(|(target, _)| network.contains(&target.network())).collect())
}

/// Deletes the ip→identity records inside a network, but none that was written after the listing. Answers how many
/// went; a block is clear when a later call finds none.
///
/// # Errors
/// The listing failed, or a deletion: some records may be gone.
pub async fn delete_ip_records_in(kv: &dyn Kv, network: IpNet) -> Result<usize, KvError> {
    let mut deleted = 0;
    for some in ip_records_in(kv, network).await?.chunks(MAX_OPS) {
        let key = |target: &IpTarget| keys::ip(*target);
        let txn = Txn {
            when: some.iter().map(|(target, seen)| Compare::new(key(target), Is::ModRevision(*seen))).collect(),
            then: some.iter().map(|(target, _)| Op::Delete(Keys::One(key(target)))).collect(),
            or_else: Vec::new(),
        };
        match kv.txn(txn).await {
            Outcome::Done(answer) if answer.succeeded => deleted += some.len(),
            // One of them was written meanwhile: the next call lists them again.
            Outcome::Done(_) => {}
            Outcome::Refused(KvRefusal::Denied(why)) => return Err(KvError::Denied(why)),
            Outcome::Refused(refusal) => return Err(KvError::Unavailable(refusal.to_string())),
            Outcome::Unknown(why) => return Err(KvError::Unavailable(why)),
        }
    }
    Ok(deleted)
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

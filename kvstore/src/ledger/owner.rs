//! Which Kubernetes cluster a ledger belongs to.

use basal_runtime::outcome::Outcome;

use super::keys::LedgerKeys;
use crate::kv::{Compare, Is, Kv, KvRefusal, Op, OpAnswer, Range, Txn};

/// Why a Kubernetes cluster cannot use a ledger.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OwnerError {
    /// It is the ledger of another Kubernetes cluster.
    #[error(
        "the key {key} says that this ledger belongs to the Kubernetes cluster {owner}, and this one is {asking} (the uid of the \
         namespace kube-system); give each cluster a cluster-name of its own. If the other one is gone for good and this one \
         takes its place, write {asking} into the key"
    )]
    Another {
        /// The key.
        key: String,
        /// What it holds.
        owner: String,
        /// Who asked.
        asking: String,
    },
    /// etcd would not write the ledger.
    #[error(transparent)]
    Refused(#[from] KvRefusal),
    /// No answer. Asking again is harmless.
    #[error("etcd did not answer: {0}")]
    Unknown(String),
}

/// Makes a Kubernetes cluster the owner of a ledger without one. Two clusters of one name in one etcd would otherwise take each
/// other's nodes for nodes that are gone, and their blocks with them. `cluster_uid` is the uid of the namespace kube-system.
///
/// # Errors
/// See [`OwnerError`].
pub async fn own(kv: &dyn Kv, keys: &LedgerKeys, cluster_uid: &str) -> Result<(), OwnerError> {
    ask(kv, keys, cluster_uid, vec![Compare::new(keys.owner(), Is::Absent)]).await
}

/// Looks whether a Kubernetes cluster could write a ledger, and writes nothing: etcd checks rights and space for both sides of
/// a transaction, whichever runs.
///
/// # Errors
/// See [`OwnerError`].
pub async fn look(kv: &dyn Kv, keys: &LedgerKeys, cluster_uid: &str) -> Result<(), OwnerError> {
    let never = vec![Compare::new(keys.owner(), Is::Absent), Compare::new(keys.owner(), Is::Present)];
    ask(kv, keys, cluster_uid, never).await
}

/// Writes the owner when the conditions hold, else reads it.
async fn ask(kv: &dyn Kv, keys: &LedgerKeys, cluster_uid: &str, when: Vec<Compare>) -> Result<(), OwnerError> {
    let key = keys.owner();
    let put = Op::Put { key: key.clone(), value: cluster_uid.into(), lease: 0 };
    let txn = Txn { when, then: vec![put], or_else: vec![Op::Get(Range::one(key.clone()))] };
    let answer = match kv.txn(txn).await {
        Outcome::Done(answer) => answer,
        Outcome::Refused(refusal) => return Err(refusal.into()),
        Outcome::Unknown(why) => return Err(OwnerError::Unknown(why)),
    };
    let owner = answer.answers.into_iter().find_map(|answer| match answer {
        OpAnswer::Get(found) => found.kvs.into_iter().next(),
        OpAnswer::Put | OpAnswer::Delete(_) => None,
    });
    match owner {
        Some(kv) if kv.value != cluster_uid.as_bytes() => {
            let owner = String::from_utf8_lossy(&kv.value).into_owned();
            Err(OwnerError::Another { key, owner, asking: cluster_uid.to_owned() })
        }
        _ => Ok(()),
    }
}

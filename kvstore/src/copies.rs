//! Records in etcd that stand for something elsewhere: written for those who read etcd by an operator that reads the other
//! place as well, while the claims are moved from one to the other.
//!
//! A copy has no lease. What an agent publishes has one, and is never touched.

use std::sync::Arc;

use crate::{
    kv::{Compare, Is, Keys, Kv, Op, Revision},
    ledger::LedgerKeys,
    records::Guarded,
};

/// One write of a copy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CopyWrite {
    /// The key gets this value, without a lease.
    Put {
        /// The key.
        key: String,
        /// Its new value.
        value: Vec<u8>,
        /// The ModRevision that was seen; 0 when there was no such key.
        seen: Revision,
    },
    /// The key goes.
    Delete {
        /// The key.
        key: String,
        /// The ModRevision that was seen.
        seen: Revision,
    },
}

/// Writes copies while the fence of etcd's ledger holds a term, or a seal.
#[derive(Clone)]
pub struct Copies {
    kv: Arc<dyn Kv>,
    fence: Compare,
}

impl Copies {
    /// For the ledger of a cluster, by its name; `fence` is what its fence must hold.
    #[must_use]
    pub fn new(kv: Arc<dyn Kv>, cluster: &str, fence: &str) -> Self {
        let fence = LedgerKeys::new(cluster).fence_holds(fence);
        Self { kv, fence }
    }

    /// Carries a write out if the key still is as it was seen. `GuardLost` tells that it is not, or that the fence holds
    /// something else.
    pub async fn write(&self, write: CopyWrite) -> Guarded {
        let (key, seen, op) = match write {
            CopyWrite::Put { key, value, seen } => (key.clone(), seen, Op::Put { key, value, lease: 0 }),
            CopyWrite::Delete { key, seen } => (key.clone(), seen, Op::Delete(Keys::One(key))),
        };
        let when = vec![self.fence.clone(), Compare::new(key, Is::ModRevision(seen))];
        Guarded::write(self.kv.as_ref(), when, vec![op]).await
    }
}

//! Why a node is not in its desired state.

use std::time::Duration;

use basal_crds::resources::NodeFieldError;
use basal_ipam::{
    allocator::{FreeError, Refusal},
    ledger::{LedgerError, SwapRefusal},
};
use basal_kvstore::kv::{KvError, KvRefusal};
use basal_objects::port::{ReadError, Refusal as ObjectRefusal};
use basal_runtime::{
    failure::{Failure, Retry},
    reason::Reason,
};

use super::endpoints::UnreadableEndpoints;

/// How long a node that was refused waits before it is looked at again. A pool that changes, a node that leaves and a
/// block that is freed bring it back sooner.
const REFUSED_PAUSE: Duration = Duration::from_secs(30);

/// The error of any step of the CiliumNode controller.
#[derive(Debug, Clone, thiserror::Error)]
pub enum NodeError {
    /// The Node does not parse.
    #[error("the Node cannot be used: {0}; correct the field")]
    NodeInvalid(String),
    /// The CiliumNode does not parse.
    #[error(
        "the CiliumNode cannot be used: {0}; correct the field, or delete the object: it is made anew with the same blocks"
    )]
    CiliumNodeInvalid(String),
    /// A field of the CiliumNode keeps the node from being published.
    #[error("the node is not published: {0}; correct the field of the CiliumNode")]
    Field(#[from] NodeFieldError),
    /// The node does not get a block, or does not get the one that it lists.
    #[error("{0}")]
    Refused(#[from] Refusal),
    /// A block cannot leave quarantine.
    #[error(transparent)]
    Free(#[from] FreeError),
    /// CiliumEndpoints that may use the blocks of a node that is gone.
    #[error(
        "the blocks of the node stay in quarantine, because these CiliumEndpoints cannot be read and may have addresses in \
         them: {0}; correct or delete them"
    )]
    Endpoints(UnreadableEndpoints),
    /// The API server has no answer.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The API server did not write.
    #[error("{what}: {refusal}")]
    Write {
        /// What was to be written.
        what: &'static str,
        /// Why it was not.
        refusal: ObjectRefusal,
    },
    /// The API server may have written.
    #[error("{what}: no answer, so it may have been written: {why}")]
    WriteUnknown {
        /// What was to be written.
        what: &'static str,
        /// What was lost.
        why: String,
    },
    /// The ledger cannot be read.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// The ledger was not written.
    #[error(transparent)]
    Swap(#[from] SwapRefusal),
    /// Somebody else wrote the ledger meanwhile, or the answer was lost. It was read again, or will be.
    #[error("the claims are written anew: {0}")]
    Again(String),
    /// Another leader's term began.
    #[error("the fence of the ledger holds another term: another operator leads; this one stops writing")]
    FenceLost,
    /// etcd has no answer.
    #[error(transparent)]
    Kv(#[from] KvError),
    /// etcd did not write.
    #[error(transparent)]
    KvWrite(#[from] KvRefusal),
    /// A record's conditions did not hold: the claim or the fence changed meanwhile.
    #[error("the record was not written, because the node's claim or the leader's fence changed meanwhile")]
    GuardLost,
    /// etcd may have written.
    #[error("no answer of etcd, so the record may have been written: {0}")]
    KvUnknown(String),
}

impl Failure for NodeError {
    fn reason(&self) -> Reason {
        const NODE_INVALID: Reason = Reason::new("NodeInvalid");
        const CILIUM_NODE_INVALID: Reason = Reason::new("CiliumNodeInvalid");
        const API_SERVER_UNAVAILABLE: Reason = Reason::new("APIServerUnavailable");
        const WRITE_REFUSED: Reason = Reason::new("WriteRefused");
        const CONFLICT: Reason = Reason::new("Conflict");
        const LEDGER_UNAVAILABLE: Reason = Reason::new("LedgerUnavailable");
        const LEDGER_REFUSED: Reason = Reason::new("LedgerRefused");
        const LEDGER_CHANGED: Reason = Reason::new("LedgerChanged");
        const FENCE_LOST: Reason = Reason::new("FenceLost");
        const ETCD_UNAVAILABLE: Reason = Reason::new("EtcdUnavailable");
        const ETCD_REFUSED: Reason = Reason::new("EtcdRefused");
        const IN_USE: Reason = Reason::new("QuarantineNotOver");
        const ENDPOINT_UNREADABLE: Reason = Reason::new("EndpointUnreadable");
        match self {
            Self::NodeInvalid(_) => NODE_INVALID,
            Self::CiliumNodeInvalid(_) | Self::Field(_) => CILIUM_NODE_INVALID,
            Self::Refused(refusal) | Self::Free(FreeError::Refused(refusal)) => Reason::new(refusal.reason()),
            Self::Free(_) => IN_USE,
            Self::Endpoints(_) => ENDPOINT_UNREADABLE,
            Self::Read(_) | Self::WriteUnknown { .. } => API_SERVER_UNAVAILABLE,
            Self::Write { refusal: ObjectRefusal::Conflict(_) | ObjectRefusal::AlreadyExists, .. } => CONFLICT,
            Self::Write { .. } => WRITE_REFUSED,
            Self::Ledger(_) => LEDGER_UNAVAILABLE,
            Self::Swap(_) => LEDGER_REFUSED,
            Self::Again(_) | Self::GuardLost => LEDGER_CHANGED,
            Self::FenceLost => FENCE_LOST,
            Self::Kv(_) | Self::KvUnknown(_) => ETCD_UNAVAILABLE,
            Self::KvWrite(_) => ETCD_REFUSED,
        }
    }

    fn retry(&self) -> Retry {
        match self {
            Self::NodeInvalid(_) | Self::CiliumNodeInvalid(_) | Self::Field(_) => Retry::OnChange,
            Self::Refused(Refusal::Busy { .. }) => Retry::Backoff,
            Self::Refused(Refusal::OnlyQuarantined { next_in, .. }) => {
                Retry::After((*next_in).clamp(Duration::from_secs(1), REFUSED_PAUSE))
            }
            Self::Refused(_) | Self::Endpoints(_) => Retry::After(REFUSED_PAUSE),
            Self::FenceLost
            | Self::Ledger(
                LedgerError::StoreReplaced(_) | LedgerError::NotActive { .. } | LedgerError::Sealed { .. },
            ) => Retry::EndTerm,
            Self::Read(ReadError::TooManyRequests { retry_after: Some(pause) })
            | Self::Write { refusal: ObjectRefusal::TooManyRequests { retry_after: Some(pause) }, .. } => {
                Retry::After(*pause)
            }
            _ => Retry::Backoff,
        }
    }
}

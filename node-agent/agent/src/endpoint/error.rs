//! Why an endpoint could not be added or removed.

use basal_cni::api::{AgentError, Attachment};
use basal_runtime::reason::Reason;

use super::state::ReserveError;
use crate::{
    journal::JournalError,
    sync::{AttachError, Failure},
};

/// Why an endpoint could not be added or removed.
#[derive(Debug, thiserror::Error)]
pub enum AddError {
    /// No new pods: the claim to the block is gone.
    #[error("{0}")]
    Refused(String),
    /// No address, and waiting does not help.
    #[error(transparent)]
    Reserve(#[from] ReserveError),
    /// The runtime no longer waits.
    #[error("the container runtime gave up waiting; last reason: {0}")]
    GivenUp(String),
    /// The journal cannot be written.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// Whether the journal was written is not known.
    #[error("journal: {0}; whether the record outlives a crash is not known")]
    JournalUnknown(String),
    /// The datapath refused.
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// A removal was asked for while the ADD was under way.
    #[error("{0} was deleted while it was being added")]
    Overtaken(Attachment),
}

impl AddError {
    /// The reason for events and metrics.
    #[must_use]
    pub fn reason(&self) -> Reason {
        const REFUSED: Reason = Reason::new("PodCIDRLost");
        const ADDRESS: Reason = Reason::new("NoAddress");
        const GIVEN_UP: Reason = Reason::new("RuntimeGaveUp");
        const JOURNAL: Reason = Reason::new("JournalUnwritable");
        const OVERTAKEN: Reason = Reason::new("DeletedMeanwhile");
        match self {
            Self::Refused(_) => REFUSED,
            Self::Reserve(_) => ADDRESS,
            Self::GivenUp(_) => GIVEN_UP,
            Self::Journal(_) | Self::JournalUnknown(_) => JOURNAL,
            Self::Attach(error) => error.reason(),
            Self::Overtaken(_) => OVERTAKEN,
        }
    }
}

impl From<AddError> for AgentError {
    fn from(error: AddError) -> Self {
        let message = error.to_string();
        match error {
            AddError::Reserve(refusal) if !refusal.is_temporary() => {
                Self::Invalid { field: "runtimeConfig.ips".to_owned(), message }
            }
            AddError::Attach(AttachError::Name(_)) => Self::Invalid { field: "CNI_IFNAME".to_owned(), message },
            AddError::Refused(_) | AddError::GivenUp(_) | AddError::Reserve(_) | AddError::Overtaken(_) => {
                Self::TryAgain { message }
            }
            AddError::Attach(AttachError::Change(Failure::Refused(refusal))) if !refusal.is_retryable() => {
                Self::Failed { message }
            }
            AddError::Journal(_) | AddError::JournalUnknown(_) | AddError::Attach(_) => Self::TryAgain { message },
        }
    }
}

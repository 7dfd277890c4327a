//! Leadership by a Lease (`coordination.k8s.io/v1`), as Cilium's operator and Kubernetes' own components elect.
//!
//! [`election::Election`] decides, as a state machine without input and output; [`Elector`] carries its decisions out and
//! publishes [`Leadership`]; [`LeaderWrites`] lets writes begin only while the term lasts. Leadership saves work and is no
//! guard: what must not happen twice is prevented by preconditions and by the ledger's fence.

use std::{fmt, time::Duration};

use basal_runtime::env::Env;
use tokio::time::Instant;

pub use elector::Elector;
pub use writes::LeaderWrites;

use crate::object::ObjectKey;

pub mod election;
mod elector;
pub mod lease;
#[cfg(test)]
mod tests;
mod writes;

/// The name of the Lease that Cilium's operator holds.
pub const LEASE_NAME: &str = "cilium-operator-resource-lock";

/// How leadership is held. The defaults are Cilium's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeadershipOptions {
    /// The Lease.
    pub lease: ObjectKey,
    /// Who we are; different for every process.
    pub identity: String,
    /// How long others wait after they saw a renewal, before they take over.
    pub lease_duration: Duration,
    /// How long after the begin of its last renewal a leader still starts writes. Shorter than `lease_duration`.
    pub renew_deadline: Duration,
    /// The pause between two tries.
    pub retry_period: Duration,
}

impl LeadershipOptions {
    /// Cilium's durations: 15 s, 10 s and 2 s.
    #[must_use]
    pub fn new(namespace: &str, identity: String) -> Self {
        Self {
            lease: ObjectKey::namespaced(namespace, LEASE_NAME),
            identity,
            lease_duration: Duration::from_secs(15),
            renew_deadline: Duration::from_secs(10),
            retry_period: Duration::from_secs(2),
        }
    }

    /// Checks the durations, as client-go's leader election does.
    ///
    /// # Errors
    /// Which relation does not hold.
    pub fn check(&self) -> Result<(), String> {
        let text = |what: &str, a: Duration, b: Duration| Err(format!("leader-election-{what} ({a:?} and {b:?})"));
        if self.lease_duration <= self.renew_deadline {
            return text("lease-duration must be longer than renew-deadline", self.lease_duration, self.renew_deadline);
        }
        if self.renew_deadline <= self.retry_period + self.retry_period / 5 {
            return text("renew-deadline must be 1.2 times retry-period", self.renew_deadline, self.retry_period);
        }
        if self.lease_duration < Duration::from_secs(1) || self.retry_period.is_zero() {
            return text("lease-duration must be 1s and retry-period above 0s", self.lease_duration, self.retry_period);
        }
        Ok(())
    }
}

/// An identity as Cilium's operator makes it: the host's name and ten random letters and digits.
#[must_use]
pub fn identity(host: &str, env: &dyn Env) -> String {
    const LETTERS: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";
    let random = env.random_u64();
    let letter = |place: u32| char::from(LETTERS[usize::from((random >> (5 * place)) as u8 & 31)]);
    let suffix: String = (0..10).map(letter).collect();
    format!("{host}-{suffix}")
}

/// Names one term of one leader; random, so that no other term of any process has it. The ledger's fence holds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TermId(u64);

impl TermId {
    /// A new one.
    #[must_use]
    pub fn new(env: &dyn Env) -> Self {
        Self(env.random_u64())
    }
}

impl fmt::Display for TermId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// A term, while it lasts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Term {
    /// Its name.
    pub id: TermId,
    /// When it ends, unless it is renewed before. No write is started at this time or later.
    pub until: Instant,
}

/// Who leads, as far as this process knows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Leadership {
    /// Somebody else, or nobody.
    Standby {
        /// The holder that the Lease last named.
        holder: Option<String>,
    },
    /// We do, until the term ends.
    Leading(Term),
}

impl Leadership {
    /// The term that lasts at this time. The clock decides, not the last word of a task that may be late.
    #[must_use]
    pub fn term(&self, now: Instant) -> Option<Term> {
        match self {
            Self::Leading(term) if now < term.until => Some(*term),
            _ => None,
        }
    }
}

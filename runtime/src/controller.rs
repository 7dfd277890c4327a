//! A control loop in five steps, of which only two may write, and the one driver that runs it.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    time::Duration,
};

use async_trait::async_trait;
use tokio::time::Instant;

pub use driver::{Driver, DriverOptions, TermEnded};
pub use metrics::ControllerMetrics;

use crate::failure::Failure;

mod driver;
mod metrics;
#[cfg(test)]
mod tests;

/// One result for each key of a batch.
pub type PerKey<C, T> = BTreeMap<<C as Controller>::Key, Result<T, <C as Controller>::Error>>;

/// A control loop: brings whatever a key stands for to its desired state.
///
/// The driver calls, for a batch of keys: [`observe`](Self::observe) → [`validate`](Self::validate) →
/// [`plan`](Self::plan) → [`apply`](Self::apply) → [`settle`](Self::settle) → [`report`](Self::report). The steps
/// without `self` hold no client and so cannot read or write; they are tested as functions. A key whose observation
/// or validation failed skips to `report`, so that its status says so.
///
/// A key is never in two batches at once. With more than one batch at a time ([`DriverOptions::batches`]) the core is
/// shared: it is locked for `validate`, `plan` and `settle` only.
#[async_trait]
pub trait Controller: Send + Sync + 'static {
    /// What the loop is asked to look at.
    type Key: Ord + Clone + fmt::Debug + fmt::Display + Send + Sync + 'static;
    /// The state that plans are made from and that remembers what they reserved; an allocator for example.
    type Core: Send + 'static;
    /// What was read for a key. It says of each part whether it came from a cache, and at which revision.
    type Observed: Send;
    /// An observation without impossible parts.
    type Valid: Send;
    /// What is to be written for a whole batch, as data.
    type Plan: Send;
    /// What was written for a key.
    type Applied: Send + Sync;
    /// The error of any step.
    type Error: Failure;

    /// The name in logs and metric labels.
    fn name(&self) -> &'static str;

    /// Every key that there is, for the full pass.
    fn keys(&self) -> Vec<Self::Key>;

    /// Whether the caches have seen what this loop last wrote for the key. Until then the key waits: it would be
    /// planned from the past. An implementation gives up after a while, since the object may be gone.
    fn caught_up(&self, key: &Self::Key, now: Instant) -> bool;

    /// Reads what the keys need. A key that is left out is tried again.
    async fn observe(&self, keys: &BTreeSet<Self::Key>) -> PerKey<Self, Self::Observed>;

    /// Checks one observation.
    ///
    /// # Errors
    /// What is wrong, where, and what to do.
    fn validate(core: &Self::Core, key: &Self::Key, observed: Self::Observed) -> Result<Self::Valid, Self::Error>;

    /// Decides what to write. Cannot fail: a refusal (an exhausted pool) is a plan, too. What it grants is reserved in
    /// the core until `settle`.
    fn plan(core: &mut Self::Core, batch: BTreeMap<Self::Key, Self::Valid>, now: Instant) -> Self::Plan;

    /// Carries the plan out; the only step that writes, beside the status in `report`.
    async fn apply(&self, plan: Self::Plan) -> PerKey<Self, Self::Applied>;

    /// Tells the core what became of its reservations: done holds them, refused undoes them, and unknown keeps them
    /// until the store was read again.
    fn settle(core: &mut Self::Core, applied: &PerKey<Self, Self::Applied>, now: Instant);

    /// Writes status, events and metrics for one key, on the failure path too, and only what changed. Answers when to
    /// look at the key again after a success.
    ///
    /// # Errors
    /// The status could not be written.
    async fn report(
        &self,
        key: &Self::Key,
        result: &Result<Self::Applied, Self::Error>,
    ) -> Result<Revisit, Self::Error>;
}

/// When to look at a key again that is in its desired state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Revisit {
    /// When it changes.
    OnChange,
    /// After this time at the latest.
    After(Duration),
}

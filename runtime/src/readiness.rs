//! Readiness as a set of named conditions, each with a reason while it does not hold.

use std::{borrow::Cow, collections::BTreeMap};

use tokio::sync::watch;

/// The name of a condition, as users see it in `/readyz`.
pub type Name = &'static str;

/// What a process waits for before it is ready. Ready means that every condition that was ever named holds now.
#[derive(Debug, Clone)]
pub struct Readiness {
    /// For each condition the reason why it does not hold, or nothing when it does.
    conditions: watch::Sender<BTreeMap<Name, Option<Cow<'static, str>>>>,
}

/// A condition that does not hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pending {
    /// Its name.
    pub name: Name,
    /// Why.
    pub reason: Cow<'static, str>,
}

impl Default for Readiness {
    fn default() -> Self {
        Self::new()
    }
}

impl Readiness {
    /// No condition yet.
    #[must_use]
    pub fn new() -> Self {
        Self { conditions: watch::Sender::new(BTreeMap::new()) }
    }

    /// Names a condition; it does not hold before [`Guard::ready`].
    #[must_use = "the condition fails for good when its guard is dropped"]
    pub fn guard(&self, name: Name) -> Guard {
        let guard = Guard { name, readiness: self.clone() };
        guard.not_ready("not started yet");
        guard
    }

    /// The conditions that do not hold, by name.
    #[must_use]
    pub fn pending(&self) -> Vec<Pending> {
        self.conditions
            .borrow()
            .iter()
            .filter_map(|(name, reason)| Some(Pending { name, reason: reason.clone()? }))
            .collect()
    }

    /// The conditions that hold, by name.
    #[must_use]
    pub fn holding(&self) -> Vec<Name> {
        self.conditions.borrow().iter().filter(|(_, reason)| reason.is_none()).map(|(name, _)| *name).collect()
    }

    /// Whether every condition holds.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.conditions.borrow().values().all(Option::is_none)
    }

    /// Waits until every condition holds.
    pub async fn ready(&self) {
        let mut changes = self.conditions.subscribe();
        // The only error is that the sender is gone, and `self` holds it.
        changes.wait_for(|conditions| conditions.values().all(Option::is_none)).await.map(drop).unwrap_or_default();
    }

    fn set(&self, name: Name, reason: Option<Cow<'static, str>>) {
        self.conditions.send_if_modified(|conditions| conditions.insert(name, reason.clone()) != Some(reason));
    }
}

/// The one who says whether a condition holds. Dropped, the condition does not hold: a part that ended is not ready.
#[derive(Debug)]
pub struct Guard {
    name: Name,
    readiness: Readiness,
}

impl Guard {
    /// The condition holds.
    pub fn ready(&self) {
        self.readiness.set(self.name, None);
    }

    /// The condition does not hold, or no longer.
    pub fn not_ready(&self, reason: impl Into<Cow<'static, str>>) {
        self.readiness.set(self.name, Some(reason.into()));
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.not_ready("the part of the program that reports it has ended");
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    #[test]
    fn success_is_an_explicit_call_and_can_be_taken_back() {
        let readiness = Readiness::new();
        assert!(readiness.is_ready());
        let (cache, tunnel) = (readiness.guard("node cache"), readiness.guard("tunnel device"));
        cache.ready();
        assert_eq!(readiness.pending(), [Pending { name: "tunnel device", reason: "not started yet".into() }]);
        assert_eq!(readiness.holding(), ["node cache"]);
        tunnel.ready();
        assert!(readiness.is_ready());
        cache.not_ready(format!("no list for {} s", 30));
        assert_eq!(readiness.pending(), [Pending { name: "node cache", reason: "no list for 30 s".into() }]);
    }

    #[test]
    fn a_dropped_guard_is_not_ready() {
        let readiness = Readiness::new();
        let guard = readiness.guard("etcd session");
        guard.ready();
        drop(guard);
        assert!(!readiness.is_ready());
    }

    #[tokio::test]
    async fn ready_waits_for_the_last_condition() {
        let readiness = Readiness::new();
        let (a, b) = (readiness.guard("a"), readiness.guard("b"));
        a.ready();
        assert_eq!(readiness.ready().now_or_never(), None);
        b.ready();
        readiness.ready().await;
    }
}

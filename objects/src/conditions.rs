//! Status conditions (`metav1.Condition`), set and compared so that nothing is written when nothing changed, and so that
//! Argo CD and Flux show health by the rules of kstatus.

use basal_runtime::reason::Reason;
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};

/// Condition types that kstatus knows (sigs.k8s.io/cli-utils, "kstatus"): an object is current when `Ready` is true and
/// neither of the others is.
pub mod types {
    /// The object is in its desired state.
    pub const READY: &str = "Ready";
    /// Work goes on; true while it does, absent otherwise.
    pub const RECONCILING: &str = "Reconciling";
    /// Work does not get on without help; true while so, absent otherwise.
    pub const STALLED: &str = "Stalled";
}

/// The longest message that the API takes, in bytes.
const MAX_MESSAGE: usize = 32 * 1024;

/// Whether a condition holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Holds {
    /// `True`.
    Yes,
    /// `False`.
    No,
    /// `Unknown`.
    Unknown,
}

impl Holds {
    const fn text(self) -> &'static str {
        match self {
            Self::Yes => "True",
            Self::No => "False",
            Self::Unknown => "Unknown",
        }
    }
}

/// The conditions of an object as they shall be. Types that are not set stay as they are: others may own them.
#[derive(Debug, Clone, PartialEq)]
pub struct Conditions {
    list: Vec<Condition>,
    generation: i64,
    now: Timestamp,
}

impl Conditions {
    /// Begins with what the object has. `generation` is that of the object which was looked at; `now` stamps what changes.
    #[must_use]
    pub fn of(list: Vec<Condition>, generation: i64, now: Timestamp) -> Self {
        Self { list, generation, now }
    }

    /// Sets a condition. Its `lastTransitionTime` is kept while its status stays the same.
    pub fn set(&mut self, kind: &str, holds: Holds, reason: Reason, message: &str) {
        let known = self.list.iter().position(|condition| condition.type_ == kind);
        let since = known
            .map(|index| &self.list[index])
            .filter(|condition| condition.status == holds.text())
            .map_or(Time(self.now), |condition| condition.last_transition_time.clone());
        let condition = Condition {
            type_: kind.to_owned(),
            status: holds.text().to_owned(),
            reason: reason.as_str().to_owned(),
            message: truncated(message, MAX_MESSAGE).to_owned(),
            observed_generation: Some(self.generation),
            last_transition_time: since,
        };
        match known {
            Some(index) => self.list[index] = condition,
            None => self.list.push(condition),
        }
    }

    /// Removes a condition: kstatus reads `Reconciling` and `Stalled` as false when they are absent.
    pub fn clear(&mut self, kind: &str) {
        self.list.retain(|condition| condition.type_ != kind);
    }

    /// In its desired state.
    pub fn ready(&mut self, reason: Reason, message: &str) {
        self.set(types::READY, Holds::Yes, reason, message);
        self.clear(types::RECONCILING);
        self.clear(types::STALLED);
    }

    /// On the way there.
    pub fn reconciling(&mut self, reason: Reason, message: &str) {
        self.set(types::READY, Holds::No, reason, message);
        self.set(types::RECONCILING, Holds::Yes, reason, message);
        self.clear(types::STALLED);
    }

    /// Not to be reached without help.
    pub fn stalled(&mut self, reason: Reason, message: &str) {
        self.set(types::READY, Holds::No, reason, message);
        self.set(types::STALLED, Holds::Yes, reason, message);
        self.clear(types::RECONCILING);
    }

    /// The conditions, to be written.
    #[must_use]
    pub fn into_list(self) -> Vec<Condition> {
        self.list
    }
}

/// Whether two lists say the same, whatever their times and their order.
#[must_use]
pub fn same_but_for_times(one: &[Condition], other: &[Condition]) -> bool {
    let same = |a: &Condition, b: &Condition| {
        (&a.type_, &a.status, &a.reason, &a.message, a.observed_generation)
            == (&b.type_, &b.status, &b.reason, &b.message, b.observed_generation)
    };
    one.len() == other.len() && one.iter().all(|a| other.iter().any(|b| same(a, b)))
}

/// The longest beginning of a text that has at most `max` bytes and ends between two characters.
#[must_use]
pub fn truncated(text: &str, max: usize) -> &str {
    if text.len() <= max { text } else { &text[..text.floor_char_boundary(max)] }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GRANTED: Reason = Reason::new("Granted");
    const EXHAUSTED: Reason = Reason::new("PoolExhausted");

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn seen(list: &[Condition]) -> Vec<(&str, &str, &str, i64)> {
        let row = |c: &Condition| c.last_transition_time.0.as_second();
        list.iter().map(|c| (c.type_.as_str(), c.status.as_str(), c.reason.as_str(), row(c))).collect()
    }

    #[test]
    fn the_transition_time_changes_with_the_status_only() {
        let mut first = Conditions::of(vec![], 1, at(10));
        first.stalled(EXHAUSTED, "pool default is full");
        let mut second = Conditions::of(first.clone().into_list(), 2, at(20));
        second.stalled(EXHAUSTED, "pool default is full; add a CIDR");
        let list = second.into_list();
        assert_eq!(seen(&list), [("Ready", "False", "PoolExhausted", 10), ("Stalled", "True", "PoolExhausted", 10)]);
        assert_eq!(list[0].observed_generation, Some(2));
        let mut third = Conditions::of(list, 2, at(30));
        third.ready(GRANTED, "");
        assert_eq!(seen(&third.into_list()), [("Ready", "True", "Granted", 30)]);
    }

    #[test]
    fn foreign_conditions_are_left_alone() {
        let mut theirs = Conditions::of(vec![], 1, at(1));
        theirs.set("Theirs", Holds::Unknown, GRANTED, "");
        let mut ours = Conditions::of(theirs.into_list(), 1, at(2));
        ours.reconciling(GRANTED, "");
        assert_eq!(seen(&ours.into_list())[0], ("Theirs", "Unknown", "Granted", 1));
    }

    #[test]
    fn times_and_order_do_not_make_a_difference() {
        let list = |second, reason| {
            let mut conditions = Conditions::of(vec![], 1, at(second));
            conditions.reconciling(reason, "m");
            conditions.into_list()
        };
        let mut reversed = list(9, GRANTED);
        reversed.reverse();
        assert!(same_but_for_times(&list(1, GRANTED), &reversed));
        assert!(!same_but_for_times(&list(1, GRANTED), &list(1, EXHAUSTED)));
        assert!(!same_but_for_times(&list(1, GRANTED), &[]));
    }

    #[test]
    fn a_text_is_cut_between_characters() {
        assert_eq!(truncated("ab🐝", 5), "ab");
        assert_eq!(truncated("ab🐝", 6), "ab🐝");
    }
}

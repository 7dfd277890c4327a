//! What an endpoint needs next, as a pure function of what it should be and what is seen.
//!
//! ADD, DEL, a restart and GC are all this function: the executor asks for the next step, carries it out, looks again,
//! and asks again until there is none. Every step can be repeated. The intent is in the journal before any effect, so
//! whatever a crash leaves behind is found and finished, or removed, at the next start.

use crate::endpoint::record::Phase;

/// What is seen of an endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    /// The phase that the journal holds; `None` when it holds nothing.
    pub journal: Option<Phase>,
    /// Whether its interface pair, map rows and programs are in place.
    pub connected: bool,
    /// Whether its ip records are in the set that the etcd session keeps written.
    pub announced: bool,
    /// Whether it holds addresses and a number.
    pub reserved: bool,
}

impl Seen {
    /// Nothing is left of it.
    pub const NOTHING: Self = Self { journal: None, connected: false, announced: false, reserved: false };
}

/// One step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Step {
    /// Write the phase into the journal.
    Record(Phase),
    /// Make the interface pair, move one end into the container and configure it, write the map rows, attach programs.
    Connect,
    /// Hand its ip records to the etcd session.
    Announce,
    /// Take its ip records back from the etcd session.
    Withdraw,
    /// Take programs, interface and map rows away.
    Disconnect,
    /// Delete the record in the journal.
    Forget,
    /// Give addresses and number back.
    Release,
}

/// The next step towards a phase; `None` when it is reached.
#[must_use]
pub fn next(goal: Phase, seen: &Seen) -> Option<Step> {
    match goal {
        Phase::Adding if seen.journal != Some(Phase::Adding) => Some(Step::Record(Phase::Adding)),
        Phase::Adding if !seen.connected => Some(Step::Connect),
        // A lost interface is not made again once ADD was answered: its other end went away with the container's
        // namespace, and DEL is on its way.
        Phase::Committed if seen.journal != Some(Phase::Committed) => Some(Step::Record(Phase::Committed)),
        Phase::Adding | Phase::Committed => (!seen.announced).then_some(Step::Announce),
        Phase::Removing => removal(seen),
    }
}

fn removal(seen: &Seen) -> Option<Step> {
    let anything = seen.connected || seen.announced || seen.reserved;
    if anything && seen.journal.is_some_and(|phase| phase != Phase::Removing) {
        Some(Step::Record(Phase::Removing))
    } else if seen.announced {
        Some(Step::Withdraw)
    } else if seen.connected {
        Some(Step::Disconnect)
    } else if seen.journal.is_some() {
        // The addresses stay reserved until the journal no longer holds them: a restart would bring them back.
        Some(Step::Forget)
    } else {
        seen.reserved.then_some(Step::Release)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What a step does, when it works.
    fn carry_out(step: Step, seen: &mut Seen) {
        match step {
            Step::Record(phase) => seen.journal = Some(phase),
            Step::Connect => seen.connected = true,
            Step::Announce => seen.announced = true,
            Step::Withdraw => seen.announced = false,
            Step::Disconnect => seen.connected = false,
            Step::Forget => seen.journal = None,
            Step::Release => seen.reserved = false,
        }
    }

    fn steps(goal: Phase, seen: &mut Seen) -> Vec<Step> {
        let mut steps = Vec::new();
        while let Some(step) = next(goal, seen) {
            assert!(steps.len() < 16, "{goal:?} does not end: {steps:?}");
            carry_out(step, seen);
            steps.push(step);
        }
        steps
    }

    fn any_seen() -> impl Strategy<Value = Seen> {
        let phases = [None, Some(Phase::Adding), Some(Phase::Committed), Some(Phase::Removing)];
        (proptest::sample::select(phases.to_vec()), any::<[bool; 3]>())
            .prop_map(|(journal, [connected, announced, reserved])| Seen { journal, connected, announced, reserved })
    }

    #[test]
    fn an_add_is_written_down_before_its_first_effect() {
        let mut seen = Seen { reserved: true, ..Seen::NOTHING };
        assert_eq!(steps(Phase::Adding, &mut seen), [Step::Record(Phase::Adding), Step::Connect, Step::Announce]);
        assert_eq!(steps(Phase::Committed, &mut seen), [Step::Record(Phase::Committed)]);
    }

    #[test]
    fn a_del_undoes_in_reverse_and_frees_addresses_last() {
        let mut seen = Seen { journal: Some(Phase::Committed), connected: true, announced: true, reserved: true };
        let expected = [Step::Record(Phase::Removing), Step::Withdraw, Step::Disconnect, Step::Forget, Step::Release];
        assert_eq!(steps(Phase::Removing, &mut seen), expected);
        assert_eq!(steps(Phase::Removing, &mut seen), []);
    }

    #[test]
    fn a_committed_endpoint_whose_namespace_went_is_not_made_again() {
        let mut seen = Seen { journal: Some(Phase::Committed), reserved: true, ..Seen::NOTHING };
        assert_eq!(steps(Phase::Committed, &mut seen), [Step::Announce]);
    }

    proptest! {
        /// From wherever a crash left it a removal ends with nothing, and addresses are free only when the journal no
        /// longer names them and nothing of the endpoint is left.
        #[test]
        fn a_removal_from_anywhere_leaves_nothing(mut seen in any_seen()) {
            while let Some(step) = next(Phase::Removing, &seen) {
                let clean = Seen { reserved: true, ..Seen::NOTHING };
                prop_assert!(step != Step::Release || seen == clean, "{seen:?}");
                carry_out(step, &mut seen);
            }
            prop_assert_eq!(seen, Seen::NOTHING);
        }

        #[test]
        fn an_add_from_anywhere_ends_complete(mut seen in any_seen()) {
            steps(Phase::Adding, &mut seen);
            prop_assert!(seen.connected && seen.announced && seen.journal == Some(Phase::Adding));
        }
    }
}

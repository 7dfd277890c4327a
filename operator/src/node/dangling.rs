//! CiliumNodes that no Node stands behind, and none ever did as far as anybody knows: restored, written by hand before
//! their Node joins, or left from before Basal. They are given time for a Node to appear, as Cilium's operator does it.

use std::{collections::BTreeMap, time::Duration};

use basal_ipam::{allocator::Claim, names::NodeName};

use super::facts::CiliumNodeFacts;

/// Since when each of them was seen, in this term. Times count from its start.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Dangling {
    /// How long one is left alone; `None` is for ever.
    patience: Option<Duration>,
    /// With the uid of the object.
    since: BTreeMap<NodeName, (String, Duration)>,
}

/// What becomes of one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It stays.
    Stays,
    /// It is looked at again after this time.
    Waits(Duration),
    /// It goes.
    Goes,
}

/// Whether a CiliumNode without Node never had one: no Node owns it, and no claim of its name knows a Node. One that lost
/// its Node lets go of its blocks at once instead.
pub(super) fn dangles(facts: &CiliumNodeFacts, claims: &[Claim]) -> bool {
    facts.owners.is_empty() && claims.iter().all(|claim| claim.block.uid.is_none())
}

impl Dangling {
    /// None has been seen yet; one stays for so long, or for ever.
    #[must_use]
    pub fn new(patience: Option<Duration>) -> Self {
        Self { patience, since: BTreeMap::new() }
    }

    /// Looks at one. A new object of the same name has its whole time before it.
    pub(super) fn look(&mut self, name: &NodeName, uid: &str, now: Duration) -> Verdict {
        let Some(patience) = self.patience else { return Verdict::Stays };
        let known = self.since.get(name).filter(|(known, _)| known == uid).map(|(_, since)| *since);
        let since = known.unwrap_or(now);
        self.since.insert(name.clone(), (uid.to_owned(), since));
        let left = (since + patience).saturating_sub(now);
        if left.is_zero() { Verdict::Goes } else { Verdict::Waits(left) }
    }

    /// There is none of this name any more.
    pub(super) fn forget(&mut self, name: &NodeName) {
        self.since.remove(name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn each_object_has_its_time() {
        let (mut dangling, n1) = (Dangling::new(Some(after(300))), NodeName::new("n1").unwrap());
        assert_eq!(dangling.look(&n1, "u1", after(10)), Verdict::Waits(after(300)));
        assert_eq!(dangling.look(&n1, "u1", after(309)), Verdict::Waits(after(1)));
        assert_eq!(dangling.look(&n1, "u2", after(309)), Verdict::Waits(after(300)), "another object");
        assert_eq!(dangling.look(&n1, "u2", after(609)), Verdict::Goes);
        dangling.forget(&n1);
        assert_eq!(dangling.look(&n1, "u2", after(700)), Verdict::Waits(after(300)));
    }

    #[test]
    fn without_a_time_they_stay() {
        let mut dangling = Dangling::default();
        let n1 = NodeName::new("n1").unwrap();
        for at in [0, 1_000_000] {
            assert_eq!(dangling.look(&n1, "u1", after(at)), Verdict::Stays);
        }
    }
}

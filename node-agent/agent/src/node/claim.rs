//! Whether this node's blocks are its own: the ledger says so, not the list in the CiliumNode.

use std::collections::{BTreeMap, BTreeSet};

use basal_ipam::{
    cell::Block,
    names::{NodeName, NodeUid},
    prefix::{Family, PodCidr, PrefixError},
};

/// What the ledger says of one block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// It is this node's.
    Confirmed,
    /// It is not, or not any more.
    Denied,
    /// The ledger could not be read: what was known before still stands.
    Unknown,
}

/// What the ledger's entry means for a node.
#[must_use]
pub fn standing(block: Option<&Block>, name: &NodeName, uid: &NodeUid) -> Standing {
    match block {
        Some(block)
            if block.state.is_usable() && block.node == *name && block.uid.as_ref().is_none_or(|of| of == uid) =>
        {
            Standing::Confirmed
        }
        _ => Standing::Denied,
    }
}

/// The blocks that a CiliumNode lists.
///
/// # Errors
/// The first that is none, with its place.
pub fn listed(pod_cidrs: &[String]) -> Result<BTreeSet<PodCidr>, (String, PrefixError)> {
    let parse = |(i, text): (usize, &String)| text.parse().map_err(|error| (format!("spec.ipam.podCIDRs[{i}]"), error));
    pod_cidrs.iter().enumerate().map(parse).collect()
}

/// The claim of this node.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Claim {
    /// Blocks that the ledger confirmed.
    confirmed: BTreeSet<PodCidr>,
    /// Blocks that were confirmed once and are denied now.
    lost: BTreeSet<PodCidr>,
    /// Blocks that are listed and have not been confirmed yet.
    waiting: BTreeSet<PodCidr>,
}

impl Claim {
    /// Takes in what was listed, and what the ledger said of each block.
    pub fn update(&mut self, seen: &BTreeMap<PodCidr, Standing>) {
        for (block, standing) in seen {
            match standing {
                Standing::Confirmed => {
                    self.lost.remove(block);
                    self.waiting.remove(block);
                    self.confirmed.insert(*block);
                }
                Standing::Denied if self.confirmed.remove(block) => drop(self.lost.insert(*block)),
                Standing::Unknown if self.confirmed.contains(block) => {}
                Standing::Denied | Standing::Unknown if self.lost.contains(block) => {}
                Standing::Denied | Standing::Unknown => drop(self.waiting.insert(*block)),
            }
        }
        self.waiting.retain(|block| seen.contains_key(block));
    }

    /// The blocks whose standing has to be looked up: those listed, and those that were ours.
    #[must_use]
    pub fn to_ask(&self, listed: &BTreeSet<PodCidr>) -> BTreeSet<PodCidr> {
        listed.iter().chain(&self.confirmed).chain(&self.lost).copied().collect()
    }

    /// The blocks that addresses may come from.
    #[must_use]
    pub fn confirmed(&self) -> &BTreeSet<PodCidr> {
        &self.confirmed
    }

    /// The blocks that were this node's and are no more.
    #[must_use]
    pub fn lost(&self) -> &BTreeSet<PodCidr> {
        &self.lost
    }

    /// Why new pods cannot be served; `None` when each family has a confirmed block. `source` names what confirms.
    #[must_use]
    pub fn problem(&self, families: &[Family], source: &str) -> Option<String> {
        let missing = families.iter().find(|family| !self.confirmed.iter().any(|block| block.family() == **family))?;
        let of = |blocks: &BTreeSet<PodCidr>| {
            blocks
                .iter()
                .filter(|block| block.family() == *missing)
                .map(ToString::to_string)
                .collect::<Vec<_>>()
                .join(", ")
        };
        let (lost, waiting) = (of(&self.lost), of(&self.waiting));
        Some(if !lost.is_empty() {
            format!(
                "the claim to {lost} is gone from {source}: another node may have it; waiting for a new {missing:?} PodCIDR"
            )
        } else if waiting.is_empty() {
            format!(
                "the operator has not given this node a {missing:?} PodCIDR; CiliumNode's status.ipam.operator-status.error says why"
            )
        } else {
            format!("{source} does not confirm the claim to {waiting} yet")
        })
    }
}

#[cfg(test)]
mod tests {
    use basal_ipam::cell::BlockState;

    use super::*;

    fn cidr(text: &str) -> PodCidr {
        text.parse().unwrap()
    }

    fn seen(entries: &[(&str, Standing)]) -> BTreeMap<PodCidr, Standing> {
        entries.iter().map(|(block, standing)| (cidr(block), *standing)).collect()
    }

    #[test]
    fn only_a_usable_claim_of_this_very_node_counts() {
        let (name, uid) = (NodeName::new("n1").unwrap(), NodeUid::new("u1").unwrap());
        let block = |state, node: &str, uid: Option<&str>| Block {
            state,
            node: NodeName::new(node).unwrap(),
            uid: uid.map(|uid| NodeUid::new(uid).unwrap()),
        };
        for (block, expected) in [
            (Some(block(BlockState::Granted, "n1", Some("u1"))), Standing::Confirmed),
            (Some(block(BlockState::Orphaned, "n1", Some("u1"))), Standing::Confirmed),
            (Some(block(BlockState::Granted, "n1", None)), Standing::Confirmed),
            (Some(block(BlockState::Granted, "n1", Some("u0"))), Standing::Denied),
            (Some(block(BlockState::Granted, "n2", Some("u1"))), Standing::Denied),
            (Some(block(BlockState::Pending, "n1", Some("u1"))), Standing::Denied),
            (Some(block(BlockState::Quarantined, "n1", Some("u1"))), Standing::Denied),
            (None, Standing::Denied),
        ] {
            assert_eq!(standing(block.as_ref(), &name, &uid), expected, "{block:?}");
        }
    }

    #[test]
    fn a_claim_is_waited_for_held_lost_and_held_again() {
        let families = [Family::V4];
        let mut claim = Claim::default();
        assert!(claim.problem(&families, "etcd").unwrap().contains("operator-status.error"));
        claim.update(&seen(&[("10.0.1.0/24", Standing::Denied)]));
        assert!(claim.problem(&families, "etcd").unwrap().contains("does not confirm the claim to 10.0.1.0/24"));
        claim.update(&seen(&[("10.0.1.0/24", Standing::Confirmed)]));
        assert_eq!(claim.problem(&families, "etcd"), None);
        claim.update(&seen(&[("10.0.1.0/24", Standing::Unknown)]));
        assert_eq!(claim.problem(&families, "etcd"), None, "an etcd that does not answer takes nothing away");
        claim.update(&seen(&[("10.0.1.0/24", Standing::Denied)]));
        assert!(claim.problem(&families, "etcd").unwrap().contains("the claim to 10.0.1.0/24 is gone"));
        assert!(claim.confirmed().is_empty());
        claim.update(&seen(&[("10.0.1.0/24", Standing::Unknown)]));
        assert_eq!(claim.lost().len(), 1, "what was lost stays lost until it is confirmed");
        claim.update(&seen(&[("10.0.1.0/24", Standing::Confirmed)]));
        assert_eq!((claim.problem(&families, "etcd"), claim.lost().len()), (None, 0));
    }

    #[test]
    fn each_family_needs_a_block() {
        let mut claim = Claim::default();
        claim.update(&seen(&[("10.0.1.0/24", Standing::Confirmed)]));
        assert!(claim.problem(&[Family::V4, Family::V6], "etcd").unwrap().contains("V6"));
    }

    #[test]
    fn a_block_that_is_no_longer_listed_is_still_asked_for_while_it_is_held() {
        let mut claim = Claim::default();
        claim.update(&seen(&[("10.0.1.0/24", Standing::Confirmed), ("10.0.2.0/24", Standing::Denied)]));
        assert_eq!(claim.to_ask(&BTreeSet::new()), BTreeSet::from([cidr("10.0.1.0/24")]));
    }
}

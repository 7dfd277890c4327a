//! What happens to a cluster in a run, as a value: nodes that come and go, pools that change, CiliumNodes that somebody
//! edits, and what goes wrong meanwhile.
//!
//! A [`Schedule`] is all that a run is made from. [`generate`] draws one from a seed, [`named`] has fixed ones, [`perform`]
//! carries one out over operators of the caller's choice, [`verdict`] says what must hold at its end.

pub mod generate;
mod machines;
pub mod named;
pub mod perform;
pub mod verdict;

use std::{fmt, str::FromStr, time::Duration};

use basal_ipam::config::{FamilySettings, PoolConfig, PoolConfigError, PoolSettings};
use serde::{Deserialize, Serialize};

use crate::{fault::FaultPlan, text};

/// A run: the same schedule over the same operators gives the same trace. Its text is one line of JSON.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Schedule {
    /// All randomness comes from it: how long things take, the names of terms, pauses.
    pub seed: u64,
    /// Where the claims lie.
    pub store: Store,
    /// How the replicas of the operator share the work.
    pub leaders: Leaders,
    /// Which families nodes get blocks of.
    pub families: Families,
    /// What happens, one after another.
    pub steps: Vec<Step>,
    /// What goes wrong.
    #[serde(default)]
    pub faults: FaultPlan,
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&serde_json::to_string(self).unwrap_or_default())
    }
}

impl FromStr for Schedule {
    type Err = serde_json::Error;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        serde_json::from_str(text)
    }
}

/// Where the claims lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Store {
    /// In etcd, with a record for each node.
    Etcd,
    /// In custom resources, with a confirmation in each CiliumNode.
    CustomResources,
}

impl Store {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Etcd, Self::CustomResources];
}

/// How the two replicas of the operator share the work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Leaders {
    /// They stand for one election.
    One,
    /// Each has a Lease of its own, so both lead throughout, as far as the fence lets them.
    Two,
}

/// Which families nodes get blocks of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Families {
    /// IPv4.
    One,
    /// IPv4 and IPv6.
    Both,
}

/// A pool, small enough to be used up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Pool {
    /// One CIDR of four blocks.
    First,
    /// Another CIDR of four blocks behind it.
    Appended,
    /// Only that other one is left.
    Shrunk,
    /// Both, with blocks of twice the size.
    Remasked,
}

impl Pool {
    /// The operator's configuration.
    ///
    /// # Errors
    /// None of these pools has one.
    pub fn config(self, families: Families) -> Result<PoolConfig, PoolConfigError> {
        let (places, wider): (&[usize], u8) = match self {
            Self::First => (&[0], 0),
            Self::Appended => (&[0, 1], 0),
            Self::Shrunk => (&[1], 0),
            Self::Remasked => (&[0, 1], 1),
        };
        let family = |enabled: bool, cidrs: [&str; 2], mask: u8| FamilySettings {
            enabled,
            cidrs: places.iter().filter(|_| enabled).map(|place| cidrs[*place].to_owned()).collect(),
            mask_size: mask - wider,
        };
        PoolConfig::new(&PoolSettings {
            ipv4: family(true, ["10.0.0.0/28", "10.0.1.0/28"], 30),
            ipv6: family(families == Families::Both, ["fd00::/124", "fd00::100/124"], 126),
        })
    }
}

/// What somebody writes into `spec.ipam.podCIDRs` of a CiliumNode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ByHand {
    /// A block that lies in no pool.
    Foreign,
    /// A block of the pool that it takes for free.
    Free,
    /// What another node's CiliumNode lists.
    Others(u8),
    /// Nothing.
    Emptied,
    /// What is no CIDR.
    Garbage,
}

/// One thing that happens. Nodes are called by their number.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Step {
    /// The kubelet of a machine registers its Node, a new machine or one whose Node somebody deleted: the uid is new.
    Join(u8),
    /// A machine is switched off, and its Node goes.
    Leave(u8),
    /// Somebody deletes a Node whose machine runs on, with its pods.
    Forget(u8),
    /// A pod starts on a node, if its agent has a block.
    StartPod(u8),
    /// The pods of a node end.
    EndPods(u8),
    /// The replicas are restarted with another configuration, one after the other.
    Pool(Pool),
    /// Somebody edits a CiliumNode.
    Edit(u8, ByHand),
    /// Somebody deletes a CiliumNode.
    DeleteCiliumNode(u8),
    /// Somebody saves a CiliumNode.
    Save(u8),
    /// Somebody puts the CiliumNode back that was saved last.
    PutBack(u8),
    /// A replica of the operator is killed.
    Kill(Replica),
    /// Time passes.
    Wait(#[serde(with = "text::time")] Duration),
}

/// One of the two replicas.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Replica {
    /// The first.
    A,
    /// The second.
    B,
}

impl Replica {
    /// Both.
    pub const ALL: [Self; 2] = [Self::A, Self::B];

    /// The name of its process.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::A => "a",
            Self::B => "b",
        }
    }
}

/// A node's name by its number.
#[must_use]
pub fn node_name(number: u8) -> String {
    format!("n{number}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fault::Fault;

    #[test]
    fn the_text_of_a_schedule_is_the_schedule() {
        let schedule = Schedule {
            seed: 7,
            store: Store::Etcd,
            leaders: Leaders::Two,
            families: Families::Both,
            steps: vec![
                Step::Join(1),
                Step::Pool(Pool::Remasked),
                Step::Edit(1, ByHand::Others(2)),
                Step::Kill(Replica::B),
                Step::Wait(Duration::from_millis(1500)),
            ],
            faults: FaultPlan::at(3, Fault::CrashAfter).and(9, Fault::Stall(Duration::from_secs(60))),
        };
        let text = schedule.to_string();
        assert_eq!(
            text,
            r#"{"seed":7,"store":"etcd","leaders":"two","families":"both","steps":[{"join":1},{"pool":"remasked"},{"edit":[1,{"others":2}]},{"kill":"b"},{"wait":"1500ms"}],"faults":{"3":"crash-after","9":{"stall":"60s"}}}"#
        );
        assert_eq!(text.parse::<Schedule>().unwrap(), schedule);
    }

    #[test]
    fn every_pool_can_be_configured() {
        for pool in [Pool::First, Pool::Appended, Pool::Shrunk, Pool::Remasked] {
            for families in [Families::One, Families::Both] {
                pool.config(families).unwrap();
            }
        }
    }
}

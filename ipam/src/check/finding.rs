//! What a check says.

use serde::Serialize;

use crate::{
    cell::{CellError, CellId},
    prefix::PodCidr,
    rest::RestBreach,
};

/// What kind of fault a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Two nodes have an address in common.
    Duplicate,
    /// A block that went on to another node too soon. Only who follows all changes sees that.
    Quarantine,
    /// Something stands for a block or a node that is not there.
    Orphan,
    /// Addresses that nobody can use, or that somebody uses although nobody has them.
    Leak,
    /// A node that has not got what it needs.
    Unserved,
    /// Something that cannot be read, so that nothing is known of it.
    Unreadable,
}

impl Kind {
    /// The word in tables and JSON.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Duplicate => "duplicate",
            Self::Quarantine => "quarantine",
            Self::Orphan => "orphan",
            Self::Leak => "leak",
            Self::Unserved => "unserved",
            Self::Unreadable => "unreadable",
        }
    }
}

/// What can be done about a finding without harm, whatever else happens meanwhile.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Remedy {
    /// Delete the node record of a node of which nothing else is left.
    DeleteRecord {
        /// The node.
        node: String,
    },
    /// Make the operator look at a node again.
    Nudge {
        /// The node.
        node: String,
    },
}

/// One fault.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Finding {
    /// Its kind.
    pub kind: Kind,
    /// Which fault it is, one CamelCase word.
    pub reason: &'static str,
    /// The block, the address, or the name of what is at fault.
    pub what: String,
    /// The nodes that it concerns.
    pub who: Vec<String>,
    /// Where it is written.
    #[serde(rename = "where")]
    pub places: Vec<String>,
    /// What is wrong.
    pub problem: String,
    /// What to do.
    pub advice: String,
    /// What `--fix` does.
    #[serde(skip)]
    pub remedy: Option<Remedy>,
}

impl Finding {
    /// Two nodes have a block, or one a part of the other's. `places` say where that is written.
    #[must_use]
    pub fn two_owners(one: (PodCidr, &str), other: (PodCidr, &str), places: Vec<String>) -> Self {
        let what = if one.0 == other.0 { one.0.to_string() } else { format!("{} and {}", one.0, other.0) };
        Self {
            kind: Kind::Duplicate,
            reason: "TwoOwners",
            what,
            who: vec![one.1.to_owned(), other.1.to_owned()],
            places,
            problem: format!("{} and {} both have it", one.1, other.1),
            advice:
                "keep the node whose claim is granted; replace the pods of the other one that have addresses of the \
                     block, then take it out of that node's CiliumNode"
                    .to_owned(),
            remedy: None,
        }
    }

    /// Quarantine was not kept.
    #[must_use]
    pub fn quarantine(breach: &RestBreach) -> Self {
        Self {
            kind: Kind::Quarantine,
            reason: match breach {
                RestBreach::NoQuarantine { .. } => "NoQuarantine",
                RestBreach::ShortQuarantine { .. } => "ShortQuarantine",
            },
            what: breach.block().to_string(),
            who: vec![breach.node().to_owned()],
            places: vec!["the ledger".to_owned()],
            problem: breach.to_string(),
            advice:
                "other nodes may hold addresses of the block for its old node; was the ledger written by hand, or by \
                     an operator with a shorter cluster-pool-quarantine?"
                    .to_owned(),
            remedy: None,
        }
    }

    /// A cell of the ledger cannot be read.
    #[must_use]
    pub fn unreadable_cell(cell: CellId, error: &CellError) -> Self {
        Self {
            kind: Kind::Unreadable,
            reason: "CellUnreadable",
            what: cell.to_string(),
            who: Vec::new(),
            places: vec![format!("cell {cell} of the ledger")],
            problem: error.to_string(),
            advice: RESTORE_CELL.to_owned(),
            remedy: None,
        }
    }

    /// Whether it is the same fault as one of another look. Texts may differ: they hold times and versions.
    #[must_use]
    pub fn is_that_of(&self, other: &Self) -> bool {
        (self.kind, self.reason) == (other.kind, other.reason) && (&self.what, &self.who) == (&other.what, &other.who)
    }
}

/// What to do about a cell that is not what it should be.
pub(super) const RESTORE_CELL: &str =
    "restore the cell from a backup, or stop all operators and delete it: it is made anew from the CiliumNodes";

/// The findings of a second look that stood in the first one already. Two servers cannot be read at one moment, so
/// what only one look finds may be the time between its reads.
#[must_use]
pub fn standing(first: &[Finding], second: Vec<Finding>) -> Vec<Finding> {
    second.into_iter().filter(|finding| first.iter().any(|before| before.is_that_of(finding))).collect()
}

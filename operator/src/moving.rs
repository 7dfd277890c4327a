//! Moving the claims from one store into the other on a living cluster.
//!
//! An administrator asks for it by `spec.moveTo` of the Ledger. The leader of an operator that reaches both stores (one with
//! etcd) then goes through [`Step`]s: the old ledger is sealed, so that nobody can grant out of it any more; what agents
//! read and then the claims are copied; the copy is compared; and one write of the Ledger makes the new store the active one.
//! Until that write the move can be called off, and after a crash it begins again with the first step.
//!
//! Why a block has one owner all the while:
//!
//! - **The seal is the fence** of the old ledger, which every swap compares. What was swapped before it is copied, and
//!   nothing is swapped after it.
//! - **A term that finds a seal** takes the fence only while no move is asked for, and looks at the Ledger again *after* it
//!   took it; in etcd every term does, since another one may have taken the seal away before. The mover looks at the Ledger
//!   first, then at the seal, and then writes the Ledger as it read it. So either the term sees that a move is asked for, or
//!   the mover sees that its seal is gone.
//! - **The Ledger is a fence for movers**: it holds the fence of the ledger in custom resources, which each mover writes,
//!   be it the old one or the new one. So a mover that wakes up late writes nothing that counts.
//!
//! Afterwards agents are changed one node after the other. While `spec.leaving` of the Ledger stands, the leader keeps what
//! agents read up in both places ([`bridge`]).

pub(crate) mod bridge;
mod copies;
mod mover;

use std::fmt;

use basal_crds::resources::LedgerStore;
use basal_ipam::ledger::LedgerError;
use basal_objects::ledger::Standing;

pub(crate) use self::mover::Mover;
pub use self::mover::{MoveError, Step};

/// What a leader does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Course {
    /// It grants out of a store. `bridged` is whether it keeps what agents read up in both.
    Serve {
        /// The active store.
        store: LedgerStore,
        /// Whether the other one is being left.
        bridged: bool,
    },
    /// It moves the claims.
    Move {
        /// The active store.
        from: LedgerStore,
        /// The other one.
        to: LedgerStore,
    },
    /// It grants nothing: the claims are where it is not told to look for them.
    Refuse {
        /// The active store.
        active: LedgerStore,
    },
}

/// The course of an operator that is configured for `home`. One with etcd reaches both stores.
#[must_use]
pub fn course(home: LedgerStore, standing: Option<&Standing>) -> Course {
    let Some(Standing { store, move_to, leaving }) = standing.copied() else {
        return Course::Serve { store: home, bridged: false };
    };
    match (home, move_to) {
        (LedgerStore::Etcd, Some(to)) if to != store => Course::Move { from: store, to },
        // An operator with etcd goes on until it is told to do without.
        (LedgerStore::Etcd, _) if store == home || leaving == Some(home) => {
            Course::Serve { store, bridged: leaving.is_some() }
        }
        (LedgerStore::CustomResources, _) if store == home => Course::Serve { store, bridged: false },
        _ => Course::Refuse { active: store },
    }
}

impl fmt::Display for Course {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Serve { store, .. } => write!(f, "claims are kept in {}", store.as_str()),
            Self::Move { to, .. } => write!(f, "the claims are to be moved to {}", to.as_str()),
            Self::Refuse { active } => write!(f, "the active store of claims is {} now", active.as_str()),
        }
    }
}

/// Why an operator that is configured for `home` grants nothing.
pub(crate) fn not_active(active: LedgerStore, home: LedgerStore) -> LedgerError {
    LedgerError::NotActive { active: active.as_str(), configured: home.as_str() }
}

#[cfg(test)]
mod tests {
    use LedgerStore::{CustomResources, Etcd};

    use super::*;

    fn serve(store: LedgerStore, bridged: bool) -> Course {
        Course::Serve { store, bridged }
    }

    #[test]
    fn where_there_is_no_ledger_every_operator_begins_with_its_own_store() {
        assert_eq!(course(Etcd, None), serve(Etcd, false));
        assert_eq!(course(CustomResources, None), serve(CustomResources, false));
    }

    #[test]
    fn only_who_reaches_both_stores_moves_and_only_when_asked() {
        use Course::{Move, Refuse};
        for (home, store, move_to, leaving, wanted) in [
            (Etcd, Etcd, None, None, serve(Etcd, false)),
            (Etcd, CustomResources, None, None, Refuse { active: CustomResources }),
            (Etcd, CustomResources, Some(Etcd), None, Move { from: CustomResources, to: Etcd }),
            (Etcd, Etcd, None, Some(CustomResources), serve(Etcd, true)),
            (Etcd, Etcd, Some(CustomResources), None, Move { from: Etcd, to: CustomResources }),
            (Etcd, CustomResources, None, Some(Etcd), serve(CustomResources, true)),
            (Etcd, CustomResources, Some(Etcd), Some(Etcd), Move { from: CustomResources, to: Etcd }),
            (Etcd, Etcd, Some(Etcd), None, serve(Etcd, false)),
            (CustomResources, CustomResources, None, None, serve(CustomResources, false)),
            (CustomResources, CustomResources, Some(Etcd), None, serve(CustomResources, false)),
            (CustomResources, CustomResources, None, Some(Etcd), serve(CustomResources, false)),
            (CustomResources, Etcd, None, None, Refuse { active: Etcd }),
            (CustomResources, Etcd, Some(CustomResources), None, Refuse { active: Etcd }),
            (CustomResources, Etcd, None, Some(CustomResources), Refuse { active: Etcd }),
        ] {
            let standing = Standing { store, move_to, leaving };
            assert_eq!(course(home, Some(&standing)), wanted, "{home:?} {standing:?}");
        }
    }
}

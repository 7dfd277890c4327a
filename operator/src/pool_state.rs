//! What users are told about the pool: its counts and conditions in the status of the Ledger, and what an edit changed.
//! Pure; [`crate::ledger_state`] writes it.

use std::collections::BTreeSet;

use basal_crds::resources::{BlockCounts, LedgerStatus, PoolState};
use basal_ipam::{
    allocator::{Allocator, Counts, PoolCounts, StateCounts},
    prefix::Family,
};
use basal_objects::conditions::{Conditions, Holds};
use basal_runtime::reason::Reason;

/// No block of an enabled family can be granted.
const EXHAUSTED: &str = "PoolExhausted";
/// A pool CIDR, or a part of it, gives no blocks until somebody mends it.
const UNUSABLE: &str = "PoolUnusable";
/// Nodes have blocks outside of every pool CIDR.
const ORPHANED: &str = "BlocksOrphaned";

const NO_FREE_BLOCK: Reason = Reason::new("NoFreeBlock");
const OUTSIDE_POOL: Reason = Reason::new("OutsidePool");

/// JSON numbers are exact up to here in every reader (RFC 8259, section 6).
const MOST: i64 = 1 << 53;

/// What the pool is like at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct State {
    pools: Vec<PoolState>,
    outside: BlockCounts,
    /// The conditions that hold: type, reason, message.
    conditions: Vec<(&'static str, Reason, String)>,
}

impl State {
    pub(crate) fn of(allocator: &Allocator) -> Self {
        let counts = allocator.counts();
        let problems = allocator.problems();
        let unusable = problems.first().map(|first| {
            let all: Vec<String> = problems.iter().map(ToString::to_string).collect();
            (UNUSABLE, Reason::new(first.reason()), all.join("; "))
        });
        let conditions = exhausted(&counts).into_iter().chain(unusable).chain(orphaned(&counts)).collect();
        Self { pools: counts.pools.iter().map(pool_state).collect(), outside: outside(&counts), conditions }
    }

    /// Says so in a status.
    pub(crate) fn tell(&self, status: &mut LedgerStatus, conditions: &mut Conditions) {
        (status.pools, status.outside) = (self.pools.clone(), self.outside);
        for kind in [EXHAUSTED, UNUSABLE, ORPHANED] {
            match self.conditions.iter().find(|(holds, _, _)| *holds == kind) {
                Some((_, reason, message)) => conditions.set(kind, Holds::Yes, *reason, message),
                None => conditions.clear(kind),
            }
        }
    }

    /// What is another pool than a status says. An edit of the pool is never silent.
    pub(crate) fn change(&self, status: &LedgerStatus) -> Option<String> {
        let set = |pools: &[PoolState]| -> BTreeSet<String> {
            pools.iter().map(|pool| format!("{} (blocks of /{})", pool.cidr, pool.mask_size)).collect()
        };
        let (before, now) = (set(&status.pools), set(&self.pools));
        if before.is_empty() || before == now {
            return None;
        }
        let words = |cidrs: Vec<&String>, verb: &str| -> Option<String> {
            let all: Vec<&str> = cidrs.iter().map(|cidr| cidr.as_str()).collect();
            (!all.is_empty()).then(|| format!("{verb} {}", all.join(", ")))
        };
        let parts = [
            words(now.difference(&before).collect(), "it has"),
            words(before.difference(&now).collect(), "it no longer has"),
            (self.outside.orphaned > 0).then(|| format!("{} blocks are orphaned", self.outside.orphaned)),
        ];
        Some(format!("the pool was changed: {}", parts.into_iter().flatten().collect::<Vec<_>>().join("; ")))
    }
}

fn pool_state(counts: &PoolCounts) -> PoolState {
    PoolState {
        cidr: counts.pool.to_string(),
        mask_size: counts.mask,
        free: i64::try_from(counts.free).unwrap_or(MOST).min(MOST),
        blocks: block_counts(&counts.states),
    }
}

fn block_counts(states: &StateCounts) -> BlockCounts {
    let bounded = |count: u64| i64::try_from(count).unwrap_or(MOST).min(MOST);
    BlockCounts {
        granted: bounded(states.granted),
        pending: bounded(states.pending),
        quarantined: bounded(states.quarantined),
        orphaned: bounded(states.orphaned),
    }
}

fn outside(counts: &Counts) -> BlockCounts {
    let families = counts.outside.iter().map(|(_, states)| block_counts(states));
    families.fold(BlockCounts::default(), |sum, more| BlockCounts {
        granted: sum.granted + more.granted,
        pending: sum.pending + more.pending,
        quarantined: sum.quarantined + more.quarantined,
        orphaned: sum.orphaned + more.orphaned,
    })
}

fn exhausted(counts: &Counts) -> Option<(&'static str, Reason, String)> {
    let of = |family: Family| counts.pools.iter().filter(move |pool| pool.pool.family() == family);
    let empty = |family: &Family| of(*family).next().is_some() && of(*family).all(|pool| pool.free == 0);
    let full: Vec<String> = Family::ALL
        .into_iter()
        .filter(empty)
        .map(|family| {
            let cidrs: Vec<String> = of(family).map(|pool| pool.pool.to_string()).collect();
            let resting: u64 = of(family).map(|pool| pool.states.quarantined).sum();
            format!("no free {family} block in {} ({resting} rest)", cidrs.join(", "))
        })
        .collect();
    let message = format!("{}; append a CIDR, or remove Nodes that are gone", full.join("; "));
    (!full.is_empty()).then_some((EXHAUSTED, NO_FREE_BLOCK, message))
}

fn orphaned(counts: &Counts) -> Option<(&'static str, Reason, String)> {
    let sum: u64 = counts.outside.iter().map(|(_, states)| states.orphaned + states.granted).sum();
    let message = format!(
        "{sum} blocks of nodes lie in no pool CIDR any more; their nodes keep them, and nobody gets them afterwards. Put the CIDR \
         back, or replace those nodes"
    );
    (sum > 0).then_some((ORPHANED, OUTSIDE_POOL, message))
}

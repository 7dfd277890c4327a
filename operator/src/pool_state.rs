//! What users are told about the pool: its counts and conditions in the status of the Ledger, and an event when it is
//! another pool than before.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex},
    time::Duration,
};

use basal_crds::resources::{BlockCounts, Ledger, LedgerStatus, PoolState};
use basal_ipam::{
    allocator::{Allocator, Counts, PoolCounts, StateCounts},
    prefix::Family,
};
use basal_objects::{
    conditions::{Conditions, Holds, same_but_for_times},
    events::{EventRecorder, EventType, Happening},
    ledger,
    object::{Object, resources},
    port::{MergePatch, Refusal},
};
use basal_runtime::{env::TaskHandle, outcome::Outcome, reason::Reason, sync::lock};
use serde_json::json;
use tracing::{info, warn};

use crate::{ledger_state::regarding, node::NodeCore, ports::Ports};

const BEGIN: Reason = Reason::new("BeginTerm");
const POOL_CHANGED: Reason = Reason::new("PoolChanged");

/// No block of an enabled family can be granted.
const EXHAUSTED: &str = "PoolExhausted";
/// A pool CIDR, or a part of it, gives no blocks until somebody mends it.
const UNUSABLE: &str = "PoolUnusable";
/// Nodes have blocks outside of every pool CIDR.
const ORPHANED: &str = "BlocksOrphaned";

const NO_FREE_BLOCK: Reason = Reason::new("NoFreeBlock");
const OUTSIDE_POOL: Reason = Reason::new("OutsidePool");

/// Pause between two counts: nodes come by the hundred, and each count may be a write.
const PERIOD: Duration = Duration::from_secs(10);

/// JSON numbers are exact up to here in every reader (RFC 8259, section 6).
const MOST: i64 = 1 << 53;

/// What the pool is like at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
struct State {
    pools: Vec<PoolState>,
    outside: BlockCounts,
    /// The conditions that hold: type, reason, message.
    conditions: Vec<(&'static str, Reason, String)>,
}

impl State {
    fn of(allocator: &Allocator) -> Self {
        let counts = allocator.counts();
        let problems = allocator.problems();
        let unusable = problems.first().map(|first| {
            let all: Vec<String> = problems.iter().map(ToString::to_string).collect();
            (UNUSABLE, Reason::new(first.reason()), all.join("; "))
        });
        let conditions = exhausted(&counts).into_iter().chain(unusable).chain(orphaned(&counts)).collect();
        Self { pools: counts.pools.iter().map(pool_state).collect(), outside: outside(&counts), conditions }
    }

    /// Whether a status says so.
    fn is_said_by(&self, status: &LedgerStatus, conditions: &Conditions) -> bool {
        status.pools == self.pools
            && status.outside == self.outside
            && same_but_for_times(&status.conditions, &conditions.clone().into_list())
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

/// Says how the pool is, for one term.
pub(crate) fn watch(ports: &Ports, core: &Arc<Mutex<NodeCore>>, events: &EventRecorder) -> TaskHandle {
    let (teller, core) = (Teller { ports: ports.clone(), events: events.clone() }, Arc::clone(core));
    let rounds = async move {
        loop {
            let state = State::of(&lock(&core).allocator);
            if let Err(why) = teller.tell(&state).await {
                warn!(why, "the state of the pool was not written into the Ledger's status");
            }
            tokio::time::sleep(PERIOD).await;
        }
    };
    ports.env.spawn("pool-state", Box::pin(rounds))
}

struct Teller {
    ports: Ports,
    events: EventRecorder,
}

impl Teller {
    /// Writes the status, if it says something else.
    async fn tell(&self, state: &State) -> Result<(), String> {
        let (objects, key) = (&self.ports.objects, ledger::key(self.ports.cluster.name().as_str()));
        let found = objects.get(resources::LEDGER, &key).await.map_err(|error| error.to_string())?;
        let Some(object) = found else { return Ok(()) };
        let status = object.parse::<Ledger>().map_err(|error| error.to_string())?.status;
        let mut conditions = Conditions::of(status.conditions.clone(), object.generation(), self.ports.env.now());
        for kind in [EXHAUSTED, UNUSABLE, ORPHANED] {
            match state.conditions.iter().find(|(holds, _, _)| *holds == kind) {
                Some((_, reason, message)) => conditions.set(kind, Holds::Yes, *reason, message),
                None => conditions.clear(kind),
            }
        }
        if state.is_said_by(&status, &conditions) {
            return Ok(());
        }
        self.tell_change(&object, &status, state);
        let body = json!({ "status": {
            "pools": state.pools, "outside": state.outside, "conditions": conditions.into_list(),
        } });
        let patch = MergePatch {
            resource_version: object.resource_version().to_owned(),
            uid: object.uid().to_owned(),
            subresource: Some("status"),
            body,
        };
        match objects.patch(resources::LEDGER, &key, patch).await {
            // Somebody wrote it meanwhile; the next round looks again.
            Outcome::Done(_) | Outcome::Refused(Refusal::Conflict(_)) => Ok(()),
            Outcome::Refused(refusal) => Err(refusal.to_string()),
            Outcome::Unknown(why) => Err(why),
        }
    }

    /// An edit of the pool is never silent.
    fn tell_change(&self, object: &Object, status: &LedgerStatus, state: &State) {
        let set = |pools: &[PoolState]| -> BTreeSet<String> {
            pools.iter().map(|pool| format!("{} (blocks of /{})", pool.cidr, pool.mask_size)).collect()
        };
        let (before, now) = (set(&status.pools), set(&state.pools));
        if before.is_empty() || before == now {
            return;
        }
        let words = |cidrs: Vec<&String>, verb: &str| -> Option<String> {
            let all: Vec<&str> = cidrs.iter().map(|cidr| cidr.as_str()).collect();
            (!all.is_empty()).then(|| format!("{verb} {}", all.join(", ")))
        };
        let parts = [
            words(now.difference(&before).collect(), "it has"),
            words(before.difference(&now).collect(), "it no longer has"),
            (state.outside.orphaned > 0).then(|| format!("{} blocks are orphaned", state.outside.orphaned)),
        ];
        let note = format!("the pool was changed: {}", parts.into_iter().flatten().collect::<Vec<_>>().join("; "));
        info!(note, "another pool than in the last term");
        self.events.record(Happening {
            regarding: regarding(resources::LEDGER, object),
            event_type: EventType::Normal,
            reason: POOL_CHANGED,
            action: BEGIN,
            note,
            shared: None,
        });
    }
}

//! What the operator counts, below `basal_operator_`.

use std::{
    fmt,
    sync::{Arc, Mutex, Weak},
};

use basal_ipam::cell::BlockState;
use basal_runtime::{metrics::Metrics, sync::lock};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric},
    metrics::{counter::Counter, family::Family, gauge::ConstGauge, gauge::Gauge},
};

use crate::node::NodeCore;

pub use upkeep::UpkeepMetrics;

mod upkeep;

/// The label of anything with a closed reason.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ByReason {
    reason: &'static str,
}

/// The label of Cilium's `identity_gc_*` metrics.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ByOutcome {
    outcome: &'static str,
    identity_type: &'static str,
}

/// The operator's metrics. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct OperatorMetrics {
    leader: Gauge,
    grants: Counter,
    published: Counter,
    refusals: Family<ByReason, Counter>,
    conflicts: Counter,
    swaps: Family<ByReason, Counter>,
    condemned: Gauge,
    gc_runs: Family<ByOutcome, Counter>,
    gc_entries: Family<ByOutcome, Gauge>,
    blocks: Blocks,
    /// What is kept in order beside nodes.
    pub upkeep: UpkeepMetrics,
}

impl OperatorMetrics {
    /// Metrics that `registry` shows.
    #[must_use]
    pub fn register(registry: &Metrics) -> Self {
        let metrics = Self::default();
        registry.register(|r| {
            r.register("leader", "1 while this replica leads", metrics.leader.clone());
            r.register("ipam_grants", "Nodes whose blocks were written into their CiliumNode", metrics.grants.clone());
            r.register(
                "node_records_written",
                "Node records written to etcd, without etcd confirmations in CiliumNodes",
                metrics.published.clone(),
            );
            r.register("ipam_refusals", "Looks at a node that ended in a refusal, by reason", metrics.refusals.clone());
            r.register(
                "ledger_conflicts",
                "Batches that found a cell changed by somebody else",
                metrics.conflicts.clone(),
            );
            r.register("ledger_swaps", "Batches written to the ledger, by outcome", metrics.swaps.clone());
            r.register(
                "ledger_cells_deleting",
                "PodCIDRCells that somebody wants to delete and that their finalizer holds",
                metrics.condemned.clone(),
            );
            r.register("identity_gc_runs", "Rounds of identity collection, by outcome", metrics.gc_runs.clone());
            r.register("identity_gc_entries", "Identities in the last round, by outcome", metrics.gc_entries.clone());
            r.register_collector(Box::new(metrics.blocks.clone()));
        });
        metrics.upkeep.register(registry);
        metrics
    }

    /// Whether this replica leads.
    pub fn set_leader(&self, leads: bool) {
        self.leader.set(leads.into());
        if !leads {
            self.upkeep.share_addresses(0);
        }
    }

    /// Blocks were written into a CiliumNode.
    pub fn granted(&self) {
        self.grants.inc();
    }

    /// A node record was written.
    pub fn record_written(&self) {
        self.published.inc();
    }

    /// A node was refused.
    pub fn refused(&self, reason: &'static str) {
        self.refusals.get_or_create(&ByReason { reason }).inc();
    }

    /// A batch went to the ledger.
    pub fn swapped(&self, outcome: &'static str) {
        self.swaps.get_or_create(&ByReason { reason: outcome }).inc();
        if outcome == "Conflict" {
            self.conflicts.inc();
        }
    }

    /// So many cells of the ledger wait for their finalizer.
    pub fn set_condemned(&self, cells: usize) {
        self.condemned.set(i64::try_from(cells).unwrap_or(i64::MAX));
    }

    /// A round of identity collection ended, and so many identities stayed and went; `None` when it failed.
    pub fn collected(&self, identity_type: &'static str, entries: Option<(usize, usize)>) {
        let of = |outcome| ByOutcome { outcome, identity_type };
        self.gc_runs.get_or_create(&of(if entries.is_some() { "success" } else { "fail" })).inc();
        if let Some((alive, deleted)) = entries {
            let count = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
            self.gc_entries.get_or_create(&of("alive")).set(count(alive));
            self.gc_entries.get_or_create(&of("deleted")).set(count(deleted));
        }
    }

    /// Shows the blocks of this term's allocator, for as long as it lives.
    pub fn show(&self, core: &Arc<Mutex<NodeCore>>) {
        *lock(&self.blocks.core) = Arc::downgrade(core);
    }
}

/// Counts blocks when they are asked for, so that no count can drift from the allocator's.
#[derive(Clone, Default)]
struct Blocks {
    core: Arc<Mutex<Weak<Mutex<NodeCore>>>>,
}

impl fmt::Debug for Blocks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Blocks").finish_non_exhaustive()
    }
}

#[derive(Debug, Clone, EncodeLabelSet)]
struct BlockLabels {
    pool: String,
    family: &'static str,
    state: &'static str,
}

impl Collector for Blocks {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let core = lock(&self.core).upgrade();
        let Some(counts) = core.map(|core| lock(&core).allocator.counts()) else { return Ok(()) };
        let blocks = ConstGauge::new(0.0_f64);
        let mut family = encoder.encode_descriptor(
            "ipam_blocks",
            "Blocks by pool CIDR, family and state; pool is \"none\" for those outside every pool CIDR",
            None,
            blocks.metric_type(),
        )?;
        let mut one = |pool: String, of: &'static str, state: &'static str, n: f64| {
            let labels = BlockLabels { pool, family: of, state };
            ConstGauge::new(n).encode(family.encode_family(&labels)?)
        };
        for pool in &counts.pools {
            let (name, of) = (pool.pool.to_string(), pool.pool.family().as_str());
            #[expect(clippy::cast_precision_loss, reason = "a metric is a floating-point number")]
            one(name.clone(), of, "free", pool.free as f64)?;
            for state in BlockState::ALL {
                #[expect(clippy::cast_precision_loss, reason = "a metric is a floating-point number")]
                one(name.clone(), of, state.as_str(), pool.states.get(state) as f64)?;
            }
        }
        for (of, states) in &counts.outside {
            for state in BlockState::ALL {
                #[expect(clippy::cast_precision_loss, reason = "a metric is a floating-point number")]
                one("none".to_owned(), of.as_str(), state.as_str(), states.get(state) as f64)?;
            }
        }
        Ok(())
    }
}

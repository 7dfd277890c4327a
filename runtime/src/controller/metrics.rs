//! What the driver counts.

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::Registry,
};

use crate::metrics::latency_histogram;

/// The label of a control loop.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct Loop {
    controller: &'static str,
}

/// A control loop and the outcome of one key: `Done`, or the reason of the error.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct LoopOutcome {
    controller: &'static str,
    outcome: &'static str,
}

/// A control loop and a step.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct LoopStep {
    controller: &'static str,
    step: &'static str,
}

/// Metrics of all control loops of a process.
#[derive(Debug, Clone)]
pub struct ControllerMetrics {
    reconciled: Family<LoopOutcome, Counter>,
    steps: Family<LoopStep, Histogram, fn() -> Histogram>,
    queue: Family<Loop, Gauge>,
}

impl ControllerMetrics {
    /// Makes them, under `controller_…` of a registry.
    #[must_use]
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self {
            reconciled: Family::default(),
            steps: Family::new_with_constructor(latency_histogram),
            queue: Family::default(),
        };
        let registry = registry.sub_registry_with_prefix("controller");
        registry.register(
            "reconciled",
            "Keys worked on, by outcome (Done, or the reason of the error)",
            metrics.reconciled.clone(),
        );
        registry.register(
            "step_duration_seconds",
            "Duration of one step for a whole batch of keys",
            metrics.steps.clone(),
        );
        registry.register("queue_keys", "Keys that wait or are worked on", metrics.queue.clone());
        metrics
    }

    pub(super) fn count(&self, controller: &'static str, outcome: &'static str) {
        self.reconciled.get_or_create(&LoopOutcome { controller, outcome }).inc();
    }

    pub(super) fn took(&self, controller: &'static str, step: &'static str, since: tokio::time::Instant) {
        self.steps.get_or_create(&LoopStep { controller, step }).observe(since.elapsed().as_secs_f64());
    }

    pub(super) fn queue(&self, controller: &'static str, keys: usize) {
        self.queue.get_or_create(&Loop { controller }).set(i64::try_from(keys).unwrap_or(i64::MAX));
    }
}

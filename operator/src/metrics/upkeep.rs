//! What the operator collects and mends.

use basal_runtime::metrics::Metrics;
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
};

use crate::{endpoint_gc::EndpointGcReport, node::Drift};

/// The label of Cilium's `endpoint_gc_objects`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByEnd {
    outcome: &'static str,
}

/// The label of what drifted.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByKind {
    kind: &'static str,
}

/// Metrics of what the operator keeps in order beside nodes. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct UpkeepMetrics {
    endpoints: Family<ByEnd, Counter>,
    cilium_nodes: Counter,
    drift: Family<ByKind, Counter>,
    sharing: Gauge,
}

impl UpkeepMetrics {
    pub(super) fn register(&self, registry: &Metrics) {
        registry.register(|r| {
            r.register("endpoint_gc_objects", "CiliumEndpoints without pod, by outcome", self.endpoints.clone());
            r.register(
                "ciliumnodes_collected",
                "CiliumNodes without Node that were deleted",
                self.cilium_nodes.clone(),
            );
            r.register("drift", "What a full pass found changed and no watch had told, by kind", self.drift.clone());
            r.register(
                "nodes_sharing_address",
                "Nodes with a tunnel endpoint that another one has too",
                self.sharing.clone(),
            );
        });
        // Shown from the start, so that a rate can be taken of the first one.
        self.endpoints_collected(&EndpointGcReport::default());
        for what in Drift::ALL {
            drop(self.drift.get_or_create(&ByKind { kind: what.as_str() }));
        }
    }

    /// A full pass found a difference.
    pub fn drifted(&self, what: Drift) {
        self.drift.get_or_create(&ByKind { kind: what.as_str() }).inc();
    }

    /// So many nodes share an address with another one.
    pub fn share_addresses(&self, nodes: usize) {
        self.sharing.set(i64::try_from(nodes).unwrap_or(i64::MAX));
    }

    /// A CiliumNode without Node was deleted.
    pub fn cilium_node_collected(&self) {
        self.cilium_nodes.inc();
    }

    /// A round over the CiliumEndpoints ended.
    pub fn endpoints_collected(&self, report: &EndpointGcReport) {
        let count = |n: usize| u64::try_from(n).unwrap_or(u64::MAX);
        for (outcome, n) in [("success", report.deleted), ("fail", report.failed)] {
            self.endpoints.get_or_create(&ByEnd { outcome }).inc_by(count(n));
        }
    }
}

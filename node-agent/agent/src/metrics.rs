//! The agent's metrics, named in Cilium's style (`cilium_…`).

use std::sync::atomic::AtomicU64;

use basal_datapath::{flows::MapUse, kernel::OpError, op::Op};
use basal_runtime::{metrics::latency_histogram, outcome::Outcome};
use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue},
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::Registry,
};

/// The prefix of all of them.
pub const PREFIX: &str = "cilium";

/// Labels of an op.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct OpLabels {
    /// Its kind.
    kind: &'static str,
    /// `done`, `unknown`, or the reason of a refusal.
    outcome: &'static str,
}

/// The label of a kind of op.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct KindLabel {
    kind: &'static str,
}

/// What the datapath counts.
#[derive(Debug, Clone, Default)]
pub struct DatapathMetrics {
    ops: Family<OpLabels, Counter>,
    drift: Family<KindLabel, Counter>,
    without_route: Gauge,
}

impl DatapathMetrics {
    /// Counts an op.
    pub fn op(&self, op: &Op, outcome: &Outcome<(), OpError>) {
        let outcome = match outcome {
            Outcome::Done(()) => "done",
            Outcome::Refused(error) => error.reason().as_str(),
            Outcome::Unknown(_) => "unknown",
        };
        self.ops.get_or_create(&OpLabels { kind: op.kind(), outcome }).inc();
    }

    /// So many nodes should have a route to their pods and cannot.
    pub fn without_route(&self, nodes: usize) {
        self.without_route.set(i64::try_from(nodes).unwrap_or(i64::MAX));
    }

    /// Counts what a comparison on the timer found.
    pub fn drift(&self, ops: &[Op]) {
        for op in ops {
            self.drift.get_or_create(&KindLabel { kind: op.kind() }).inc();
        }
    }
}

/// The label of a map.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct MapLabel {
    map_name: &'static str,
}

/// The label of what came of something.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct StatusLabel {
    status: &'static str,
}

/// What taking connections away counts.
#[derive(Debug, Clone, Default)]
pub struct FlowMetrics {
    pressure: Family<MapLabel, Gauge<f64, AtomicU64>>,
    rows: Family<MapLabel, Gauge>,
    deleted: Family<MapLabel, Counter>,
    runs: Family<StatusLabel, Counter>,
}

impl FlowMetrics {
    /// Counts a run and what it found.
    pub fn collected(&self, maps: &[MapUse]) {
        self.runs.get_or_create(&StatusLabel { status: "completed" }).inc();
        for used in maps {
            let label = MapLabel { map_name: used.map };
            let rows = u32::try_from(used.rows).unwrap_or(u32::MAX);
            self.pressure.get_or_create(&label).set(f64::from(rows) / f64::from(used.max.max(1)));
            self.rows.get_or_create(&label).set(i64::from(rows));
            self.deleted.get_or_create(&label).inc_by(used.deleted as u64);
        }
    }

    /// Counts a run that failed.
    pub fn failed(&self) {
        self.runs.get_or_create(&StatusLabel { status: "uncompleted" }).inc();
    }
}

/// Labels of a call at the CNI socket.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct CallLabels {
    /// `add`, `del`, …
    pub command: &'static str,
    /// `ok`, or the kind of error.
    pub outcome: &'static str,
}

/// The label of a command.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct CommandLabel {
    /// `add`, `del`, …
    pub command: &'static str,
}

/// What a record from the directory is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
#[expect(non_camel_case_types, reason = "the variant's name is the label's value")]
pub enum Records {
    /// Nodes.
    nodes,
    /// ip→identity records.
    ips,
    /// Identities.
    identities,
}

/// What happened to a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
#[expect(non_camel_case_types, reason = "the variant's name is the label's value")]
pub enum Happening {
    /// It came or changed.
    upsert,
    /// It went.
    delete,
    /// It cannot be read.
    invalid,
}

/// Labels of an event from the directory.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct EventLabels {
    /// What it is about.
    pub records: Records,
    /// What happened.
    pub happening: Happening,
}

/// The label of an address family.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct FamilyLabel {
    /// `ipv4` or `ipv6`.
    pub family: &'static str,
}

/// All metrics of the agent.
#[derive(Debug, Clone)]
pub struct AgentMetrics {
    /// The datapath's.
    pub datapath: DatapathMetrics,
    /// Those of connections.
    pub flows: FlowMetrics,
    /// Endpoints on this node.
    pub endpoints: Gauge,
    /// Addresses in use, by family.
    pub addresses: Family<FamilyLabel, Gauge>,
    /// Other nodes known.
    pub nodes: Gauge,
    /// Policy objects that exist and are not enforced.
    pub policies_not_enforced: Gauge,
    /// Calls at the CNI socket.
    pub calls: Family<CallLabels, Counter>,
    /// How long they took.
    pub call_seconds: Family<CommandLabel, Histogram>,
    /// Events from the directory.
    pub events: Family<EventLabels, Counter>,
    /// CiliumEndpoint writes that failed and are tried again.
    pub object_failures: Counter,
}

impl AgentMetrics {
    /// Makes and registers them.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self {
            datapath: DatapathMetrics::default(),
            flows: FlowMetrics::default(),
            endpoints: Gauge::default(),
            addresses: Family::default(),
            nodes: Gauge::default(),
            policies_not_enforced: Gauge::default(),
            calls: Family::default(),
            call_seconds: Family::new_with_constructor(latency_histogram),
            events: Family::default(),
            object_failures: Counter::default(),
        };
        registry.register("datapath_ops", "Changes made to the datapath", metrics.datapath.ops.clone());
        registry.register(
            "datapath_drift",
            "Changes that a comparison on the timer found and mended",
            metrics.datapath.drift.clone(),
        );
        registry.register(
            "nodes_without_route",
            "Other nodes that auto-direct-node-routes can make no route to, because a router is between",
            metrics.datapath.without_route.clone(),
        );
        let flows = &metrics.flows;
        registry.register(
            "bpf_map_pressure",
            "How full a map of connections or translations is, from 0 to 1",
            flows.pressure.clone(),
        );
        registry.register(
            "datapath_conntrack_gc_entries",
            "Rows of a map of connections or translations after those that were over were taken away",
            flows.rows.clone(),
        );
        registry.register(
            "datapath_conntrack_gc_deleted",
            "Rows of a map of connections or translations that were over and were taken away",
            flows.deleted.clone(),
        );
        registry.register(
            "datapath_conntrack_gc_runs",
            "How often connections that ended were taken away",
            flows.runs.clone(),
        );
        registry.register("endpoint", "Endpoints on this node", metrics.endpoints.clone());
        registry.register("ip_addresses", "Addresses in use on this node", metrics.addresses.clone());
        registry.register("remote_nodes", "Other nodes that are known", metrics.nodes.clone());
        registry.register(
            "policies_not_enforced",
            "Policy objects that exist and that Basal does not enforce",
            metrics.policies_not_enforced.clone(),
        );
        registry.register("cni_calls", "Calls at the CNI socket", metrics.calls.clone());
        registry.register("cni_call_seconds", "How long calls at the CNI socket took", metrics.call_seconds.clone());
        registry.register(
            "kvstore_events",
            "Records of nodes, addresses and identities that came from etcd, or from custom resources without it",
            metrics.events.clone(),
        );
        registry.register(
            "object_write_failures",
            "Writes of CiliumEndpoints that failed and are tried again",
            metrics.object_failures.clone(),
        );
        metrics
    }
}

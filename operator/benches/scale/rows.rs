//! The figures of one size, as rows.

use basal_e2e::bench::Row;

use super::{
    basal,
    meter::{Cost, Counts},
    rival,
    servers::Store,
};

const DEFAULT: &str = "kube-controller-manager, default rate";
const RAISED: &str = "kube-controller-manager, raised rate";

const WALL: &str = "first Node created until the last CiliumNode lists its blocks and its record is written (with custom \
                    resources: its status confirms them); real kube-apiserver and etcds on the same machine, fresh for \
                    each case, user system:masters";

const COUNTED: &str = "apiserver_request_total and grpc_server_handled_total from before the first create until the end, without \
                       the Nodes and CiliumNodes that the bench makes";

const PROCESS: &str = "/proc/PID of the process over the same time; RSS is VmHWM";

/// kube-controller-manager at its two rates.
pub(crate) struct Rivals {
    /// At its default rate.
    pub(crate) default: rival::Found,
    /// At a rate that does not hold it back.
    pub(crate) raised: rival::Found,
}

/// The rows of one size and store.
pub(crate) fn of(nodes: u32, store: Store, basal: &basal::Found, ceiling: &Cost, rivals: &Rivals) -> Vec<Row> {
    let count = f64::from(nodes);
    let metric = |what: &str| format!("{what}, {nodes} nodes, {}", store.text());
    let no_logic = "client without logic";
    let (cost, Rivals { default, raised }) = (&basal.cost, rivals);
    let by_ceiling = format!(
        "{WALL}; the ceiling makes the same Nodes, CiliumNodes, patches, records and claims with prepared texts, 32 \
         nodes at once, 256 nodes' claims in a batch"
    );
    let by_default = format!(
        "{WALL}; the manager: until the last Node has podCIDRs, at 20 requests/s; it served {} of {nodes} nodes, the \
         rest is extrapolated",
        default.served
    );
    let by_raised = format!("{WALL}; the manager: until the last Node has podCIDRs, with --kube-api-qps=5000");
    let own = |cost: &Cost| api_writes(&cost.counts) - count;
    let writes = own(cost) + cost.counts.etcd_writes();
    let manager_writes = raised.cost.counts.writes_of("nodes") - count;
    let mut rows = vec![
        Row::new(metric("wall time"), cost.wall, "s", by_ceiling.clone()).against(no_logic, ceiling.wall),
        Row::new(metric("wall time"), cost.wall, "s", by_default).against(DEFAULT, default.cost.wall),
        Row::new(metric("wall time"), cost.wall, "s", by_raised.clone()).against(RAISED, raised.cost.wall),
        Row::new(metric("grants"), count / cost.wall, "nodes/s", by_ceiling).against(no_logic, count / ceiling.wall),
        Row::new(metric("time for each write"), 1e3 * cost.wall / writes, "ms", by_raised)
            .against(RAISED, 1e3 * raised.cost.wall / manager_writes),
        Row::new(metric("API writes"), own(cost) / count, "per node", COUNTED).against(no_logic, own(ceiling) / count),
    ];
    if store == Store::Etcd {
        rows.extend([
            Row::new(metric("etcd writes"), cost.counts.etcd_writes() / count, "per node", COUNTED)
                .against(no_logic, ceiling.counts.etcd_writes() / count),
            Row::new(metric("etcd reads"), cost.counts.etcd_reads() / count, "per node", COUNTED),
        ]);
    }
    rows.extend([
        Row::new(metric("CPU"), cost.cpu, "s", PROCESS).against(RAISED, raised.cost.cpu),
        Row::new(metric("peak RSS"), cost.rss, "MB", PROCESS).against(RAISED, raised.cost.rss),
    ]);
    if let Some(restart) = &basal.restart {
        let method = "a fresh process, the Lease free, until a node made at its start is served";
        rows.push(Row::new(metric("restart"), restart.seconds, "s", method));
        rows.push(Row::new(metric("peak RSS of a restart"), restart.rss, "MB", method));
    }
    if let Some([api, etcd]) = basal.idle {
        let method = "five minutes, one full pass among them, from 20 s after the last grant; what the servers count in \
                      30 s without an operator is taken off; watches do not count";
        rows.push(Row::new(metric("idle API requests"), api, "per minute", method));
        rows.push(Row::new(metric("idle etcd requests"), etcd, "per minute", method));
    }
    rows
}

/// Writes of CiliumNodes, those that the bench makes among them, of events and of the ledger.
fn api_writes(counts: &Counts) -> f64 {
    ["ciliumnodes", "events", "ledgers", "podcidrcells"].into_iter().map(|resource| counts.writes_of(resource)).sum()
}

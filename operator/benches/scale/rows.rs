//! The figures of one size, as rows.

use basal_e2e::bench::Row;

use super::{basal, meter::Cost, rival};

const CEILING: &str = "client without logic";
const DEFAULT: &str = "kube-controller-manager, default rate";
const RAISED: &str = "kube-controller-manager, raised rate";

/// The rows of one size.
pub(crate) fn of(
    nodes: u32,
    basal: &basal::Found,
    ceiling: &Cost,
    raised: &rival::Found,
    default: &rival::Found,
) -> Vec<Row> {
    let count = f64::from(nodes);
    let metric = |what: &str| format!("{what}, {nodes} nodes");
    let cost = &basal.cost;
    let wall = "first Node created until the last CiliumNode lists its blocks and its record is in etcd; real \
                kube-apiserver and etcds on the same machine, fresh for each case, user system:masters";
    let by_ceiling = format!(
        "{wall}; the ceiling makes the Nodes, the CiliumNodes, the records and the claims with prepared texts, 32 nodes \
         at once, 256 nodes' claims in a transaction"
    );
    let by_default = format!(
        "{wall}; the manager: until the last Node has podCIDRs, at 20 requests/s; it served {} of {nodes} nodes, the \
         rest is extrapolated",
        default.served
    );
    let by_raised = format!("{wall}; the manager: until the last Node has podCIDRs, with --kube-api-qps=5000");
    let (own_writes, manager_writes) = (writes(cost), raised.cost.counts.writes_of("nodes") - count);
    let counted = "apiserver_request_total and etcd_mvcc_*_total from before the first create until the end; Nodes are \
                   made by the bench and do not count";
    let process = "/proc/PID of the process over the same time; RSS is VmHWM";
    let mut rows = vec![
        Row::new(metric("wall time"), cost.wall, "s", by_ceiling.clone()).against(CEILING, ceiling.wall),
        Row::new(metric("wall time against the default manager"), cost.wall, "s", by_default)
            .against(DEFAULT, default.cost.wall),
        Row::new(metric("wall time against the raised manager"), cost.wall, "s", by_raised.clone())
            .against(RAISED, raised.cost.wall),
        Row::new(metric("grants"), count / cost.wall, "nodes/s", by_ceiling).against(CEILING, count / ceiling.wall),
        Row::new(metric("time for each write"), 1e3 * cost.wall / own_writes, "ms", by_raised)
            .against(RAISED, 1e3 * raised.cost.wall / manager_writes),
        Row::new(metric("CiliumNode writes"), cost.counts.writes_of("ciliumnodes") / count, "per node", counted)
            .against(CEILING, ceiling.counts.writes_of("ciliumnodes") / count),
        Row::new(metric("event writes"), cost.counts.writes_of("events") / count, "per node", counted),
        Row::new(metric("etcd puts"), cost.counts.etcd("put") / count, "per node", counted)
            .against(CEILING, ceiling.counts.etcd("put") / count),
        Row::new(metric("etcd transactions"), cost.counts.etcd("txn") / count, "per node", counted)
            .against(CEILING, ceiling.counts.etcd("txn") / count),
        Row::new(metric("etcd ranges"), cost.counts.etcd("range") / count, "per node", counted),
        Row::new(metric("CPU"), cost.cpu, "s", process).against(RAISED, raised.cost.cpu),
        Row::new(metric("peak RSS"), cost.rss, "MB", process).against(RAISED, raised.cost.rss),
    ];
    if let Some(restart) = basal.restart {
        let method = "start of a fresh process, the Lease free, until the record of a Node made at that moment is in \
                      etcd";
        rows.push(Row::new(metric("restart"), restart, "s", method));
    }
    if let Some([api, etcd]) = basal.idle {
        let method = "two minutes, from 20 s after the last grant; what the servers count in 30 s without an operator \
                      is taken off; watches do not count";
        rows.push(Row::new(metric("idle API requests"), api, "per minute", method));
        rows.push(Row::new(metric("idle etcd requests"), etcd, "per minute", method));
    }
    rows
}

/// Writes of the operator: CiliumNodes, events, and transactions in etcd.
fn writes(cost: &Cost) -> f64 {
    cost.counts.writes_of("ciliumnodes") + cost.counts.writes_of("events") + cost.counts.etcd("txn")
}

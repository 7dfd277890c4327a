//! How the operator scales: nodes as fast as a real API server takes them, a restart, and a quiet cluster, beside a
//! client without logic that makes the same writes, and beside kube-controller-manager's node IPAM.
//!
//! `NODES=5000,10000` says how many nodes; 1,000 is a quick run.

mod basal;
mod ceiling;
mod meter;
mod nodes;
mod rival;
mod rows;
mod servers;

use anyhow::Context as _;
use basal_e2e::{bench, say::say};

use self::{basal::After, rival::Rate, rows::Rivals, servers::Store};

/// The size of the cluster that is also watched doing nothing.
const QUIET: u32 = 5000;

fn main() -> anyhow::Result<()> {
    let nodes = bench::setting("NODES").unwrap_or_else(|| "5000,10000".into());
    let nodes: Result<Vec<u32>, _> = nodes.split(',').map(|number| number.trim().parse()).collect();
    let nodes = nodes.context("NODES is no list of numbers; 5000,10000 is the default")?;
    let largest = nodes.iter().max().copied();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let mut rows = Vec::new();
    for &nodes in &nodes {
        let mut found = Vec::new();
        for store in [Store::Etcd, Store::CustomResources] {
            let name = store.text();
            say(format!("{nodes} nodes, {name}: the ceiling"));
            let ceiling = ceiling::run(&runtime, store, nodes)?;
            say(ceiling.text());
            say(format!("{nodes} nodes, {name}: the operator"));
            let after = After { restart: Some(nodes) == largest, idle: nodes == QUIET && store == Store::Etcd };
            let basal = basal::run(&runtime, store, nodes, after)?;
            say(basal.cost.text());
            found.push((store, basal, ceiling));
        }
        say(format!("{nodes} nodes: kube-controller-manager with a raised rate"));
        let raised = rival::run(&runtime, nodes, Rate::Raised)?;
        say(raised.cost.text());
        say(format!("{nodes} nodes: kube-controller-manager at its default rate"));
        let default = rival::run(&runtime, nodes, Rate::Default)?;
        say(default.cost.text());
        let rivals = Rivals { default, raised };
        rows.extend(found.iter().flat_map(|(store, basal, ceiling)| rows::of(nodes, *store, basal, ceiling, &rivals)));
    }
    bench::publish("operator", &rows)
}

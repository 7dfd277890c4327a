//! What the node agent costs and how quick it is: pods that come and go, memory and CPU, a start, and the way of a
//! record from etcd into the BPF maps of all nodes; the real daemon in network namespaces, beside real servers.
//!
//! `CASES=pods,size,loaded-pods,records` says what to measure; all of it without. Needs root.

mod cluster;
mod container;
mod figures;
mod load;
mod netns;
mod node;
mod pods;
mod records;
mod size;

use anyhow::bail;
use basal_e2e::{bench, say::say};

use self::cluster::Cluster;

/// What can be measured, in the order that it is: the load that the second one makes stays for the others.
const CASES: [&str; 4] = ["pods", "size", "loaded-pods", "records"];

fn main() -> anyhow::Result<()> {
    let wanted = bench::setting("CASES").unwrap_or_else(|| CASES.join(","));
    let wanted: Vec<&str> = wanted.split(',').map(str::trim).collect();
    if let Some(unknown) = wanted.iter().find(|name| !CASES.contains(name)) {
        bail!("CASES names {unknown:?}; there are {}", CASES.join(", "));
    }
    let plugin = container::build_plugin()?;
    netns::leave_the_machine()?;
    let cluster = Cluster::start(plugin)?;
    let mut rows = Vec::new();
    for case in CASES.into_iter().filter(|case| wanted.contains(case)) {
        say(format!("{case}:"));
        rows.extend(match case {
            "pods" => pods::run(&cluster, [1, 2], "")?,
            "size" => size::run(&cluster)?,
            "loaded-pods" => {
                load::ensure(&cluster)?;
                pods::run(&cluster, [5, 6], "1,000 nodes, ")?
            }
            _ => {
                load::ensure(&cluster)?;
                records::run(&cluster, [7, 8])?
            }
        });
        // After each: it takes a quarter of an hour, and what was found should not be lost with what comes last.
        bench::write("agent", &rows)?;
    }
    bench::publish("agent", &rows)
}

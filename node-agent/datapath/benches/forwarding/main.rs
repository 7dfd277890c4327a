//! How fast packets travel from pod to pod, across nodes and on one, beside what the kernel does without Basal; and how
//! long each program takes for a packet. Needs root, and a binary that was built with the BPF object.
//!
//! `SECONDS_EACH` says how long each of the five rounds of a measure lasts; 1 is the default.

#[expect(dead_code, clippy::unwrap_used, reason = "shared with the tests, which use all of it")]
#[path = "../../tests/it/bench.rs"]
mod bench;
mod empty;
#[expect(dead_code, clippy::unwrap_used, clippy::panic, reason = "shared with the tests, which use all of it")]
#[path = "../../tests/it/harness/mod.rs"]
mod harness;
mod iperf;
mod kernel;
mod load;
mod measures;
mod outside;
mod paths;
mod programs;
mod worlds;

use std::time::Duration;

use anyhow::Context as _;
use basal_datapath::routing::{DirectRoutes, Routing};
use basal_e2e::bench::{Row, publish, setting};

use self::{
    harness::{TUNNEL, sandbox},
    kernel::Tracking,
    measures::Case,
    outside::{BY_PROGRAMS, BY_RULES, Outside},
    worlds::{DIRECT, Dirs, LEGACY, NATIVE, Pair, World},
};

/// Without a tunnel.
const ROUTED: Routing = Routing::Native(DirectRoutes::All);

fn main() -> anyhow::Result<()> {
    let seconds = setting("SECONDS_EACH").unwrap_or_else(|| "1".into());
    let seconds: u64 = seconds.parse().context("SECONDS_EACH is no whole number; 1 is the default")?;
    let logs = tempfile::tempdir()?;
    let mut rows = Ok(Vec::new());
    sandbox(|bpffs| rows = run(Dirs { bpffs, logs: logs.path() }, Duration::from_secs(seconds)));
    publish("forwarding", &rows?)
}

fn run(dirs: Dirs<'_>, time: Duration) -> anyhow::Result<Vec<Row>> {
    let empty = empty::load(dirs.bpffs)?;
    let mut rows = programs::by_hand(dirs.bpffs, &empty)?;
    let legacy = World::basal(LEGACY, dirs, TUNNEL, true)?;
    let direct = World::basal(DIRECT, dirs, TUNNEL, false)?;
    let native = World::basal(NATIVE, dirs, ROUTED, true)?;
    let vxlan = World::kernel("kernel VXLAN", dirs, TUNNEL, Tracking::Off)?;
    let tracked = World::kernel("kernel VXLAN, connections tracked", dirs, TUNNEL, Tracking::On)?;
    let routes = World::kernel("kernel routes", dirs, ROUTED, Tracking::Off)?;
    let tracked_routes = World::kernel("kernel routes, connections tracked", dirs, ROUTED, Tracking::On)?;
    let by_programs = Outside::basal(BY_PROGRAMS, dirs, true)?;
    let by_rules = Outside::basal(BY_RULES, dirs, false)?;
    let one_rule = Outside::kernel("one nftables rule", dirs)?;
    let pair = Pair::new(dirs, legacy.nodes[0].plan.route_mtu())?;

    let cases = [
        Case {
            name: "across nodes",
            subjects: vec![legacy.across(), direct.across()],
            baselines: vec![vxlan.across(), tracked.across()],
        },
        Case {
            name: "on one node",
            subjects: vec![legacy.on_one_node(), direct.on_one_node()],
            baselines: vec![
                pair.way(),
                vxlan.on_one_node().named("two veth pairs, routed"),
                tracked.on_one_node().named("two veth pairs, routed, connections tracked"),
            ],
        },
        Case {
            name: "across nodes",
            subjects: vec![native.across()],
            baselines: vec![routes.across(), tracked_routes.across()],
        },
        Case {
            name: "to the outside",
            subjects: vec![by_programs.way(), by_rules.way()],
            baselines: vec![one_rule.way()],
        },
    ];
    for case in &cases {
        rows.extend(case.run(time)?);
    }
    for (name, world) in [(LEGACY, &legacy), (DIRECT, &direct)] {
        rows.extend(programs::under_load(&empty, name, world, time)?);
    }
    Ok(rows)
}

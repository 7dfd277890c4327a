//! How long the programs take for a packet: run by hand (BPF_PROG_TEST_RUN), and as the kernel counts under load.

use std::{fs, path::Path, time::Duration};

use anyhow::{Context as _, ensure};
use aya::{
    programs::{ProgramInfo, SchedClassifier, TestRun as _, TestRunOptions},
    sys::{Stats, enable_stats},
};
use basal_datapath::{
    routing::{DirectRoutes, Routing},
    state::Symbol,
};
use basal_e2e::{
    bench::{Row, median},
    say::say,
};

use super::{
    load,
    measures::ROUNDS,
    paths::{Again, Packet, masquerading, packets},
    worlds::{DIRECT, LEGACY, NATIVE, World},
};
use crate::{
    bench::{Bench, context},
    harness::TUNNEL,
};

/// Runs in one go, for paths that find the packet as they left it.
const REPEAT: u32 = 200_000;
/// Goes with a fresh packet each, for paths that change it.
const SINGLE: usize = 5_000;

const EMPTY: &str = "a program that does nothing";

/// Every path of every program that runs without a packet from a real tunnel.
pub(crate) fn by_hand(bpffs: &Path, empty: &SchedClassifier) -> anyhow::Result<Vec<Row>> {
    let mut rows = Vec::new();
    for (name, legacy, routing) in
        [(LEGACY, true, TUNNEL), (DIRECT, false, TUNNEL), (NATIVE, true, Routing::Native(DirectRoutes::All))]
    {
        say(format!("programs by hand: {name}"));
        let dir = bpffs.join(format!("by-hand-{}", rows.len()));
        fs::create_dir(&dir)?;
        let bench = Bench::with_routing(&dir, legacy, routing);
        for packet in packets(legacy, matches!(routing, Routing::Tunnel(_))) {
            rows.push(time(&bench, empty, name, &packet)?);
        }
    }
    let name = "masquerading";
    say(format!("programs by hand: {name}"));
    let dir = bpffs.join("by-hand-masquerading");
    fs::create_dir(&dir)?;
    let bench = Bench::masquerading(&dir);
    for packet in masquerading() {
        rows.push(time(&bench, empty, name, &packet)?);
    }
    Ok(rows)
}

fn time(bench: &Bench, empty: &SchedClassifier, name: &str, packet: &Packet) -> anyhow::Result<Row> {
    let Packet { symbol, path, again, .. } = *packet;
    let ifindex = match symbol {
        Symbol::FromContainer => bench.ifindex(7),
        Symbol::FromNetdev | Symbol::ToNetdev => bench.netdev(),
        _ => 0,
    };
    let run = bench.run(symbol, ifindex, packet.mark, &packet.frame);
    let found = (run.action, run.counted.first().map(|(reason, ..)| *reason));
    ensure!(found == (packet.action, packet.reason), "{symbol:?}, {path}, {name}: {run:?}");

    let program = SchedClassifier::from_pin(bench.pin(symbol))?;
    let context = context(ifindex, packet.mark);
    let once = |program: &SchedClassifier, repeat| -> anyhow::Result<f64> {
        let mut options = TestRunOptions::new();
        options.data_in = Some(&packet.frame);
        options.ctx_in = Some(&context);
        options.repeat = repeat;
        Ok(nanoseconds(program.test_run(options)?.duration))
    };
    let round = |program: &SchedClassifier| match again {
        Again::Same => once(program, REPEAT),
        Again::Changed => {
            let found: anyhow::Result<Vec<f64>> = (0..SINGLE).map(|_| once(program, 1)).collect();
            Ok(median(found?))
        }
    };
    let (mut own, mut nothing) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        // In the node's namespace, where the devices are that programs redirect to.
        own.push(bench.node.netns.enter(|| round(&program))?);
        nothing.push(bench.node.netns.enter(|| round(empty))?);
    }
    let how = match again {
        Again::Same => format!("{REPEAT} runs in one go, warm caches"),
        Again::Changed => {
            format!("median of {SINGLE} runs, a system call and a fresh packet each, the clock's reading among it")
        }
    };
    let method = format!("BPF_PROG_TEST_RUN: {how}; median of {ROUNDS} rounds in turn");
    let metric = format!("{}, {path}, {name}", symbol.as_str());
    Ok(Row::new(metric, median(own), "ns/packet", method).against(EMPTY, median(nothing)))
}

/// Every program that packets pass from node to node, by the kernel's own statistics.
pub(crate) fn under_load(
    empty: &SchedClassifier,
    name: &str,
    world: &World,
    time: Duration,
) -> anyhow::Result<Vec<Row>> {
    say(format!("programs under load: {name}"));
    // Until this is dropped.
    let _counting = enable_stats(Stats::RunTime)?;
    let mut rows = Vec::new();
    let mut totals = Vec::new();
    for (node, side) in world.nodes.iter().zip(["sender", "receiver"]) {
        for symbol in Symbol::of(false) {
            totals.push((side, symbol, node.programs().join(symbol.as_str())));
        }
    }
    let before: Vec<Total> = totals.iter().map(|(_, _, pin)| Total::of_pin(pin)).collect::<anyhow::Result<_>>()?;
    let nothing = Total::of(empty)?;
    load::udp_packets(&world.across(), time)?;
    let mut options = TestRunOptions::new();
    let frame = [0; 64];
    options.data_in = Some(&frame);
    options.repeat = REPEAT;
    empty.test_run(options)?;
    let nothing = Total::of(empty)?.since(nothing).each().context("the kernel counts no runs")?;
    for ((side, symbol, pin), before) in totals.iter().zip(before) {
        if let Some(each) = Total::of_pin(pin)?.since(before).each() {
            let metric = format!("{} under load, node of the {side}, {name}", symbol.as_str());
            let method = format!(
                "BPF_ENABLE_STATS over {} s of UDP packets of 64 bytes from node to node; what it calls counts with it; \
                 reading the clock is included, also in the baseline, which is run by hand",
                time.as_secs()
            );
            rows.push(Row::new(metric, each, "ns/packet", method).against(EMPTY, nothing));
        }
    }
    Ok(rows)
}

/// What the kernel counts of a program.
#[derive(Clone, Copy)]
struct Total {
    time: Duration,
    runs: u64,
}

impl Total {
    fn of(program: &SchedClassifier) -> anyhow::Result<Self> {
        Ok(Self::read(&program.info()?))
    }

    fn of_pin(pin: &Path) -> anyhow::Result<Self> {
        Ok(Self::read(&ProgramInfo::from_pin(pin)?))
    }

    fn read(info: &ProgramInfo) -> Self {
        Self { time: info.run_time(), runs: info.run_count() }
    }

    fn since(self, earlier: Self) -> Self {
        Self { time: self.time - earlier.time, runs: self.runs - earlier.runs }
    }

    /// Nanoseconds for each run; `None` for a program that hardly ran.
    #[expect(clippy::cast_precision_loss, reason = "a count of packets")]
    fn each(self) -> Option<f64> {
        /// Fewer are the nodes' own chatter.
        const LOAD: u64 = 1000;
        (self.runs >= LOAD).then(|| nanoseconds(self.time) / self.runs as f64)
    }
}

fn nanoseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e9
}

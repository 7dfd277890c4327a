//! Scenario 5: operators are killed, paused and cut off, both servers restart, nodes come and go, in an order that a
//! seed decides, and an observer follows every change meanwhile. `make soak` runs it for longer.

use std::env;
use std::time::Duration;

use anyhow::{Context, ensure};
use basal_e2e::cluster::{BasalOptions, Cluster};
use basal_e2e::say::say;
use basal_e2e::wait::{self, Check, Stopwatch, unix_time};

use crate::api_nodes::all_leave;
use crate::faults::{Chaos, Fault, SHORT};
use crate::observer::{Observer, check};
use crate::random::Random;
use crate::suite::wider;
use crate::view::{RECORDS, eventually, keys, leader};

/// How long faults go on, in seconds. Where it is set, every scenario takes the time that it needs.
pub(crate) const SECONDS: &str = "SOAK_SECONDS";
/// What decides which faults come, on whom, and which nodes go.
const SEED: &str = "SEED";

/// How many nodes there are at most that exist at the API server only.
const NODES: usize = 500;

/// Until everything is as it should be, after the last fault: a Lease, a term, and quarantines that begin anew.
const RECOVERY: Duration = Duration::from_secs(150);

/// What a run is determined by, beside the times that things take.
struct Plan {
    time: Duration,
    seed: u64,
    faults: Vec<Fault>,
}

impl Plan {
    fn read() -> anyhow::Result<Self> {
        let number = |name: &str| match env::var(name) {
            Ok(text) => text.parse().map(Some).with_context(|| format!("{name} is {text:?}, which is no number")),
            Err(_unset) => Ok(None),
        };
        let (seconds, seed) = (number(SECONDS)?, number(SEED)?);
        Ok(match seconds {
            None => Self { time: Duration::from_secs(60), seed: seed.unwrap_or(0x5eed), faults: SHORT.to_vec() },
            // Whoever asks for more time asks for new orders of events, too.
            Some(seconds) => Self {
                time: Duration::from_secs(seconds),
                seed: seed.unwrap_or(unix_time().as_secs()),
                faults: [SHORT.as_slice(), &[Fault::Kill, Fault::Kill, Fault::ApiAway]].concat(),
            },
        })
    }
}

/// No address has two owners at any time, quarantine is kept, and in the end every node is served and nothing is left
/// of those that went.
pub(crate) fn nothing_breaks(cluster: &mut Cluster) -> anyhow::Result<()> {
    let plan = Plan::read()?;
    say(format!("  {} s of faults with up to {NODES} nodes, {SEED}={}", plan.time.as_secs(), plan.seed));
    // Changes nothing where the pool was widened before.
    cluster.install_basal(&BasalOptions { values: wider() })?;
    eventually("a leader", || leader(cluster))?;
    let mut observer = Observer::start(cluster, &wider())?;
    let went = faults(cluster, &plan, &mut observer).and_then(|()| all_is_well(cluster));
    let seen = observer.end().inspect(|seen| say(format!("  the observer: {seen}")));
    let result = match (went, seen) {
        (Err(error), Err(seen)) => Err(error.context(format!("{seen:#}"))),
        (went, seen) => went.and(seen.map(drop)),
    };
    result.with_context(|| format!("{SEED}={}", plan.seed))
}

/// Every fault of the plan, in an order; again in another one while there is time.
fn faults(cluster: &Cluster, plan: &Plan, observer: &mut Observer) -> anyhow::Result<()> {
    let watch = Stopwatch::start();
    let mut chaos = Chaos::begin(cluster, Random::new(plan.seed), NODES)?;
    let (mut count, mut round) = (0, Vec::new());
    while count < plan.faults.len() || watch.elapsed() < plan.time {
        let Some(fault) = round.pop() else {
            round.clone_from(&plan.faults);
            chaos.shuffle(&mut round);
            continue;
        };
        observer.check_running()?;
        say(format!("  {:>4} s, {} nodes: {fault:?}", watch.elapsed().as_secs(), chaos.nodes()));
        chaos.inflict(fault).with_context(|| format!("{fault:?}"))?;
        chaos.sleep_up_to(1000);
        count += 1;
    }
    say(format!("  {count} faults in {} s", watch.elapsed().as_secs()));
    Ok(())
}

fn all_is_well(cluster: &Cluster) -> anyhow::Result<()> {
    settle(cluster, "every node to be served")?;
    let nodes = cluster.list(&["nodes"])?.len();
    let served = keys(cluster, RECORDS)?.len();
    ensure!(served == nodes, "{served} of {nodes} nodes have a record");
    all_leave(cluster)?;
    settle(cluster, "what the nodes leave to be cleared away")?;
    let records = keys(cluster, RECORDS)?;
    let left: Vec<&String> = records.iter().filter(|key| key.contains("/api-")).collect();
    ensure!(left.is_empty(), "records of nodes that went are left: {left:?}");
    Ok(())
}

/// Waits until `basal ipam check` finds nothing.
fn settle(cluster: &Cluster, what: &str) -> anyhow::Result<()> {
    wait::until(what, RECOVERY, Duration::from_secs(1), || {
        Ok(check(cluster, &wider()).map_or_else(|error| Check::NotYet(format!("{error:#}")), Check::Done))
    })
}

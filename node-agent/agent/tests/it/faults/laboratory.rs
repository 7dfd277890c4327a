//! Runs of scenarios, each from the beginning, with faults in them.

use std::{fmt, panic::AssertUnwindSafe, time::Duration};

use basal_runtime::env::Env;
use futures::{FutureExt as _, select_biased};
use tokio::time::Instant;

use super::{node::Node, scenario::Scenario};
use crate::{
    faulty::{Call, Planned, Side},
    machine::Machine,
    world::Source,
};

/// How long a run may take in virtual time.
const LIMIT: Duration = Duration::from_secs(3600);

/// A paused clock goes on to the next timer when nothing is to be done, and also when a socket wakes a task. When an agent
/// has died, the end of the run would be the next one.
const STEP: Duration = Duration::from_millis(50);

async fn out_of_time() {
    let began = Instant::now();
    while began.elapsed() < LIMIT {
        tokio::time::sleep(STEP).await;
    }
}

/// What is done where, and where something goes wrong.
#[derive(Clone, Copy)]
pub(super) struct Place {
    pub(super) scenario: Scenario,
    pub(super) source: Source,
    pub(super) sides: &'static [Side],
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} over {:?}, faults at {:?}", self.scenario, self.source, self.sides)
    }
}

impl Place {
    /// Faults of the node where the scenario's store makes no difference are tried over one of them.
    pub(super) fn of(scenario: Scenario, node: &[Source]) -> impl Iterator<Item = Self> {
        let of_node = node.iter().map(move |source| Self { scenario, source: *source, sides: &[Side::Node] });
        let both = [Source::Etcd, Source::CustomResources];
        of_node.chain(both.map(|source| Self { scenario, source, sides: &[Side::Servers] }))
    }
}

/// Machines of one kind.
pub(super) struct Laboratory<M> {
    /// One that a run is over on.
    spare: Option<M>,
    /// Of all faults every so many-th is tried.
    every: usize,
    /// How many faults there were.
    faults: usize,
}

impl<M: Machine> Laboratory<M> {
    pub(super) fn new(every: usize) -> Self {
        Self { spare: None, every, faults: 0 }
    }

    /// One run, in a runtime of its own; answers the calls that were numbered, or why it failed.
    fn run(&mut self, place: Place, plan: &[Planned]) -> Result<Vec<Call>, String> {
        let Place { scenario, source, sides } = place;
        let machine = self.spare.take().unwrap_or_else(M::boot);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
        let ran = runtime.block_on(async {
            let whole = async {
                let mut node = Node::new(machine, source).await;
                scenario.before(&mut node).await;
                node.world.script.arm(sides, plan);
                scenario.step(&mut node).await;
                (node.end().await, node.world.kernel)
            };
            let limited = async {
                futures::pin_mut!(whole);
                select_biased! {
                    done = whole.fuse() => Some(done),
                    () = out_of_time().fuse() => None,
                }
            };
            AssertUnwindSafe(limited).catch_unwind().await
        });
        match ran {
            Ok(Some((calls, machine))) => {
                self.spare = machine.again();
                Ok(calls)
            }
            Ok(None) => Err(format!("it did not end within {LIMIT:?}")),
            Err(payload) => Err(payload.downcast_ref::<String>().cloned().unwrap_or_else(|| "a panic".to_owned())),
        }
    }

    /// The calls of a run in which nothing goes wrong.
    pub(super) fn calls(&mut self, place: Place) -> Vec<Call> {
        self.run(place, &[]).unwrap_or_else(|why| panic!("{place}, without one: {why}"))
    }

    /// Every fault at every call, or those of them that are tried.
    #[expect(clippy::print_stdout, reason = "tells those who look how much was tried")]
    pub(super) fn explore(&mut self, place: Place) {
        let calls = self.calls(place);
        let (mut runs, mut failures) = (0, Vec::new());
        for (call, text) in calls.iter().enumerate() {
            for fault in 0..text.faults.len() {
                self.faults += 1;
                if !self.faults.is_multiple_of(self.every) {
                    continue;
                }
                runs += 1;
                let planned = Planned { call, fault };
                let why = match self.run(place, &[planned]) {
                    // Files and the socket are real, so timers fall differently in each run, and one may end before a late call
                    // that another made.
                    Ok(made) if made.len() > call || 2 * made.len() >= calls.len() => continue,
                    Ok(made) => format!("there were {} calls only", made.len()),
                    Err(why) => why,
                };
                failures.push(format!("{:?} at call {call} ({text}): {why}", planned.at(text)));
            }
        }
        println!("{place}: {} calls, {runs} runs", calls.len());
        assert!(failures.is_empty(), "{place}: {} of {runs} runs failed:\n{}", failures.len(), failures.join("\n"));
    }

    /// Two faults in one run: the first anywhere, the second soon after it, wherever that leads.
    pub(super) fn pair(&mut self, place: Place, env: &dyn Env, calls: usize) -> Result<(), String> {
        let below = |limit: usize| usize::try_from(env.random_u64() % limit as u64).unwrap();
        let first = Planned { call: below(calls), fault: below(60) };
        let second = Planned { call: first.call + 1 + below(calls), fault: below(60) };
        let ran = self.run(place, &[first, second]);
        ran.map(drop).map_err(|why| format!("{place}: {first:?}, {second:?}: {why}"))
    }
}

//! Runs a scenario many times, each time with another fault, and replays the one that broke a promise.

use std::{collections::BTreeSet, io};

use crate::{
    fault::{Fault, FaultPlan},
    trace::{Entry, What},
    world::{Options, Trouble, World, simulate},
};

/// Lines of the trace in a report.
const REPORTED_LINES: usize = 80;

/// One run.
#[derive(Debug)]
pub struct Run {
    /// What came of it.
    pub result: Result<(), Trouble>,
    /// What happened.
    pub trace: Vec<Entry>,
    /// What replays it, and its last lines.
    pub report: String,
}

impl Run {
    /// The trace as text.
    #[must_use]
    pub fn lines(&self) -> Vec<String> {
        self.trace.iter().map(ToString::to_string).collect()
    }
}

/// Why an exploration ended early.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// A run broke a promise.
    #[error("{trouble}\n{report}")]
    Broken {
        /// What it was.
        trouble: Trouble,
        /// What replays the run, and its last lines.
        report: String,
    },
    /// No runtime.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Runs a scenario once.
///
/// # Errors
/// When no runtime can be made. What goes wrong in the run stands in its result.
pub fn run(options: Options, scenario: impl AsyncFnOnce(&World) -> Result<(), Trouble>) -> io::Result<Run> {
    simulate(options, async |world| {
        let result = scenario(&world).await;
        Run { result, trace: world.trace(), report: world.report(REPORTED_LINES) }
    })
}

fn sound(run: Run) -> Result<Run, Failure> {
    match run.result {
        Ok(()) => Ok(run),
        Err(trouble) => Err(Failure::Broken { trouble, report: run.report }),
    }
}

/// The numbers of the calls in a trace that a fault can hit.
fn calls(trace: &[Entry], fault: Fault) -> BTreeSet<u64> {
    let number = |entry: &Entry| match &entry.what {
        What::Call { call, .. } if fault.concerns(call) => call.number,
        _ => None,
    };
    trace.iter().filter_map(number).collect()
}

/// Runs a scenario without faults, then once for each call in a part of that run and each fault; answers how many runs that
/// were.
///
/// # Errors
/// The first run that broke a promise.
pub fn every_single_fault(
    options: &Options,
    faults: &[Fault],
    part: impl Fn(&[Entry]) -> &[Entry],
    scenario: impl AsyncFn(&World) -> Result<(), Trouble>,
) -> Result<usize, Failure> {
    let baseline = sound(run(options.clone(), &scenario)?)?;
    let mut runs = 1;
    for fault in faults {
        for call in calls(part(&baseline.trace), *fault) {
            sound(run(options.with(FaultPlan::at(call, *fault)), &scenario)?)?;
            runs += 1;
        }
    }
    Ok(runs)
}

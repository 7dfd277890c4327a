//! Runs schedules by the thousand, on every core, and makes of one that fails the smallest one that still does.

use std::{
    collections::BTreeMap,
    fmt,
    num::NonZero,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use basal_runtime::sync::lock;

use crate::{
    fault::{Fault, FaultPlan},
    trace::{Call, Entry, What},
    workload::{
        Schedule, generate,
        perform::{Ended, Operators, perform},
        verdict::Final,
    },
    world::{Options, Trouble, simulate},
};

/// Lines of the trace in a report of what was found; one of what is replayed has them all.
const REPORTED_LINES: usize = 120;

/// The most runs that one failure is shrunk with.
const SHRINKING_RUNS: usize = 400;

/// One run of a schedule.
#[derive(Debug)]
pub struct Run {
    /// What came of it.
    pub result: Result<Ended, Trouble>,
    /// What happened.
    pub trace: Vec<Entry>,
}

/// A schedule that failed.
#[derive(Debug, Clone)]
pub struct Report {
    /// The smallest one that was found.
    pub schedule: Schedule,
    /// The one that failed first.
    pub found: Schedule,
    /// What went wrong.
    pub trouble: String,
    /// The end of the trace.
    pub tail: String,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { schedule, found, trouble, tail } = self;
        writeln!(f, "{trouble}")?;
        writeln!(f, "replay with: make faults SCHEDULE='{schedule}'")?;
        writeln!(f, "found as:    {found}")?;
        write!(f, "{tail}")
    }
}

/// Runs a schedule. `in_full` says whether the trace is for somebody to read.
#[must_use]
pub fn run(operators: &Operators, schedule: &Schedule, in_full: bool) -> Run {
    let options = Options { in_full, ..Options::seeded(schedule.seed).with(schedule.faults.clone()) };
    let ran = simulate(options, async |world| {
        let result = perform(&world, operators, schedule).await;
        Run { result, trace: world.take_trace() }
    });
    ran.unwrap_or_else(|error| Run {
        result: Err(Trouble::Unsafe { what: format!("no runtime: {error}"), after: String::new() }),
        trace: Vec::new(),
    })
}

/// A schedule without faults, and what came of it.
#[derive(Debug)]
pub struct Baseline {
    schedule: Schedule,
    state: Final,
    calls: Vec<Call>,
}

impl Baseline {
    /// Runs a schedule without its faults.
    ///
    /// # Errors
    /// It fails even so.
    pub fn of(operators: &Operators, schedule: &Schedule) -> Result<Self, Box<Report>> {
        let schedule = Schedule { faults: FaultPlan::none(), ..schedule.clone() };
        let Run { result, trace } = run(operators, &schedule, false);
        match result {
            Ok(Ended { state, busy_until }) => {
                let busy = trace.into_iter().take_while(|entry| entry.at <= busy_until);
                let calls = busy.filter_map(|entry| match entry.what {
                    What::Call { call, .. } if call.number.is_some() => Some(call),
                    _ => None,
                });
                Ok(Self { schedule, state, calls: calls.collect() })
            }
            Err(trouble) => Err(Box::new(report(operators, schedule, &trouble.to_string(), REPORTED_LINES))),
        }
    }

    /// Every single fault that is wanted at every call, but for calls that only ask whether a server is there: what happens at one of them
    /// happens to its neighbour too.
    #[must_use]
    pub fn single_faults(&self, wanted: impl Fn(Fault) -> bool) -> Vec<Schedule> {
        let faults = generate::faults_over(self.schedule.store).into_iter().filter(|fault| wanted(*fault));
        let faults: Vec<Fault> = faults.collect();
        let told = self.calls.iter().filter(|call| !call.is_probe());
        let plans = told.flat_map(|call| {
            let fitting = faults.iter().filter(|fault| fault.concerns(call));
            fitting.filter_map(|fault| Some(FaultPlan::at(call.number?, *fault)))
        });
        plans.map(|faults| self.with(faults)).collect()
    }

    /// So many draws of some faults each.
    #[must_use]
    pub fn drawn_faults(&self, seed: u64, runs: u64, most: u64) -> Vec<Schedule> {
        (0..runs)
            .map(|draw| self.with(generate::faults(seed.wrapping_add(draw), most, self.schedule.store, &self.calls)))
            .collect()
    }

    fn with(&self, faults: FaultPlan) -> Schedule {
        Schedule { faults, ..self.schedule.clone() }
    }

    /// Runs a schedule that differs from this one in its faults.
    ///
    /// # Errors
    /// What went wrong.
    pub fn check(&self, operators: &Operators, schedule: &Schedule) -> Result<(), String> {
        let ended = run(operators, schedule, false).result.map_err(|trouble| trouble.to_string())?;
        ended.state.same(&self.state)
    }
}

/// Runs schedules with their faults on every core; answers how many that were, those without faults included.
///
/// # Errors
/// The first one that failed, in their order, shrunk.
pub fn explore(
    operators: &Operators,
    schedules: &[(usize, Schedule)],
    baselines: &[Baseline],
) -> Result<usize, Box<Report>> {
    let failure = on_all_cores(schedules, |(base, schedule)| baselines.get(*base)?.check(operators, schedule).err());
    match failure {
        None => Ok(schedules.len() + baselines.len()),
        Some(((_, schedule), trouble)) => Err(Box::new(shrink(operators, schedule, &trouble))),
    }
}

/// Runs each schedule without faults.
///
/// # Errors
/// The first one that failed, shrunk.
pub fn baselines(operators: &Operators, schedules: &[Schedule]) -> Result<Vec<Baseline>, Box<Report>> {
    let done = Mutex::new(BTreeMap::new());
    let numbered: Vec<(usize, &Schedule)> = schedules.iter().enumerate().collect();
    let failure = on_all_cores(&numbered, |(number, schedule)| match Baseline::of(operators, schedule) {
        Ok(baseline) => {
            lock(&done).insert(*number, baseline);
            None
        }
        Err(report) => Some(report),
    });
    match failure {
        None => Ok(lock(&done).split_off(&0).into_values().collect()),
        Some((_, report)) => Err(Box::new(shrink(operators, &report.schedule, &report.trouble))),
    }
}

/// Does work on every core, until something fails; answers the first failure in the order of the work.
fn on_all_cores<W: Sync, F: Send>(work: &[W], act: impl Fn(&W) -> Option<F> + Sync) -> Option<(&W, F)> {
    let next = AtomicUsize::new(0);
    let failed: Mutex<BTreeMap<usize, F>> = Mutex::default();
    let cores = std::thread::available_parallelism().map_or(1, NonZero::get);
    std::thread::scope(|scope| {
        for _ in 0..cores {
            scope.spawn(|| {
                while lock(&failed).is_empty() {
                    let place = next.fetch_add(1, Ordering::Relaxed);
                    let Some(item) = work.get(place) else { break };
                    if let Some(failure) = act(item) {
                        lock(&failed).insert(place, failure);
                    }
                }
            });
        }
    });
    let (place, failure) = lock(&failed).pop_first()?;
    Some((work.get(place)?, failure))
}

/// Runs one schedule with its faults, and compares it with the one without.
///
/// # Errors
/// What went wrong, not shrunk.
pub fn replay(operators: &Operators, schedule: &Schedule) -> Result<(), Box<Report>> {
    let baseline = Baseline::of(operators, schedule)?;
    baseline
        .check(operators, schedule)
        .map_err(|trouble| Box::new(report(operators, schedule.clone(), &trouble, usize::MAX)))
}

/// With so many lines of the trace.
fn report(operators: &Operators, schedule: Schedule, trouble: &str, lines: usize) -> Report {
    let Run { result, trace } = run(operators, &schedule, true);
    // The same, with what was sent and answered.
    let trouble = result.err().map_or_else(|| trouble.to_owned(), |trouble| trouble.to_string());
    let skipped = trace.len().saturating_sub(lines);
    let lines: Vec<String> = trace.iter().skip(skipped).map(ToString::to_string).collect();
    let tail = format!("{skipped} earlier lines, then:\n{}", lines.join("\n"));
    Report { found: schedule.clone(), schedule, trouble, tail }
}

/// What a trouble is about, whatever node or block it befell: a smaller schedule that fails in another way shows
/// something else.
fn gist(trouble: &str) -> Vec<&str> {
    trouble.split_whitespace().filter(|word| !word.contains(|c: char| c.is_ascii_digit())).take(4).collect()
}

/// Takes faults and steps away as long as what is left fails alike.
fn shrink(operators: &Operators, found: &Schedule, trouble: &str) -> Report {
    let (mut best, mut why) = (found.clone(), trouble.to_owned());
    let mut runs = 0;
    let mut smaller = true;
    while smaller && runs < SHRINKING_RUNS {
        smaller = false;
        for candidate in candidates(&best) {
            runs += 1;
            if let Err(report) = replay(operators, &candidate)
                && gist(&report.trouble) == gist(trouble)
            {
                (best, why, smaller) = (candidate, report.trouble, true);
                break;
            }
        }
    }
    Report { found: found.clone(), ..report(operators, best, &why, REPORTED_LINES) }
}

/// Everything that is one fault or one step smaller.
fn candidates(schedule: &Schedule) -> Vec<Schedule> {
    let fewer_faults = schedule.faults.calls().map(|(call, _)| schedule.faults.without(call));
    let fewer_faults = fewer_faults.map(|faults| Schedule { faults, ..schedule.clone() });
    let fewer_steps = (0..schedule.steps.len()).map(|place| {
        let mut steps = schedule.steps.clone();
        steps.remove(place);
        Schedule { steps, ..schedule.clone() }
    });
    fewer_faults.chain(fewer_steps).collect()
}

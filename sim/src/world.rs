//! One cluster's servers and the processes that talk to them, in one thread, under one seed.

use std::{
    collections::BTreeMap,
    fmt, io,
    ops::RangeInclusive,
    sync::{Arc, Mutex},
    time::Duration,
};

use basal_kvstore::kv::Revision;
use basal_runtime::{
    env::{Env as _, SeededEnv, SharedEnv, TaskFuture, spawn_on_tokio},
    sync::lock,
};
use jiff::{SignedDuration, Timestamp};
use tokio::{sync::Notify, time::Instant};
use tokio_util::sync::CancellationToken;

use crate::{
    fault::{Fault, FaultPlan},
    faulty::{Faulty, Wire},
    gate::{Ended, Gate},
    kv::ModelKv,
    objects::ModelObjects,
    process::{ProcessPorts, Program, Restart, SimEnv},
    trace::{Call, Entry, ProcessId, What},
};

/// How long things take, in whole milliseconds of virtual time, drawn anew for each. Different seeds so give different
/// orders of events.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Latency {
    /// A request on its way, and an answer on its way back.
    pub call: RangeInclusive<u64>,
    /// One delivery of a watch.
    pub watch: RangeInclusive<u64>,
}

impl Default for Latency {
    fn default() -> Self {
        Self { call: 0..=5, watch: 0..=20 }
    }
}

/// What determines a run, beside the scenario.
#[derive(Debug, Clone)]
pub struct Options {
    /// All randomness comes from it.
    pub seed: u64,
    /// What goes wrong.
    pub plan: FaultPlan,
    /// How long things take.
    pub latency: Latency,
    /// Whether the trace is written in full. Otherwise what was sent, answered and delivered is left out: a run that nobody
    /// reads is cheaper so.
    pub in_full: bool,
    /// Which writes go on for ever (lease renewals, heartbeats): [`World::settle`] does not wait for their end.
    pub background: fn(&Call) -> bool,
}

impl Options {
    /// A run without faults.
    #[must_use]
    pub fn seeded(seed: u64) -> Self {
        let background = |call: &Call| call.request.contains(" leases ") || call.request.contains("/.heartbeat");
        Self { seed, plan: FaultPlan::none(), latency: Latency::default(), in_full: true, background }
    }

    /// The same run with faults.
    #[must_use]
    pub fn with(&self, plan: FaultPlan) -> Self {
        Self { plan, ..self.clone() }
    }
}

/// Why a run is no good.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Trouble {
    /// Something that must never be was, right after this happened.
    #[error("{what}\nright after: {after}")]
    Unsafe {
        /// What was.
        what: String,
        /// The last line of the trace at that moment.
        after: String,
    },
    /// Something that must come did not, in virtual time.
    #[error("{what} did not come within {within:?}")]
    TimedOut {
        /// What.
        what: String,
        /// The time it had.
        within: Duration,
    },
}

/// What is looked at after each change of a store; the text says what is wrong.
pub type Invariant = Box<dyn FnMut(&World) -> Result<(), String> + Send>;

struct Process {
    incarnation: u32,
    gate: Arc<Gate>,
    stop: CancellationToken,
    program: Program,
    restart: Restart,
    /// It was asked to stop, so it does not start again.
    stopped: bool,
}

#[derive(Default)]
struct State {
    calls: u64,
    trace: Vec<Entry>,
    processes: BTreeMap<String, Process>,
    invariant: Option<Invariant>,
    trouble: Option<Trouble>,
    /// The stores' revisions when the invariant was looked at last.
    looked_at: (Revision, Revision),
    /// How far the wall clock of each process is off.
    clocks: BTreeMap<String, SignedDuration>,
    /// How often etcd was put back.
    rollbacks: u64,
    /// Whether the time of faults is over.
    calm: bool,
}

struct Inner {
    options: Options,
    started: Instant,
    kv: ModelKv,
    objects: ModelObjects,
    clock: SharedEnv,
    random: SeededEnv,
    state: Mutex<State>,
    /// Until when somebody had something to do: the last change, or the end of a pause that is known by now.
    busy_until: Mutex<Instant>,
    /// Woken after every step.
    stepped: Notify,
}

/// The simulated cluster. Clones are the same one.
#[derive(Clone)]
pub struct World(Arc<Inner>);

impl fmt::Debug for World {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("World").field("options", &self.0.options).finish_non_exhaustive()
    }
}

/// Runs a scenario in a world of its own, in virtual time.
///
/// # Errors
/// When no runtime can be made.
pub fn simulate<T>(options: Options, scenario: impl AsyncFnOnce(World) -> T) -> io::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build()?;
    Ok(runtime.block_on(async { scenario(World::new(options)).await }))
}

impl World {
    fn new(options: Options) -> Self {
        let clock: SharedEnv = Arc::new(SeededEnv::new(options.seed));
        let started = Instant::now();
        Self(Arc::new(Inner {
            started,
            kv: ModelKv::new(1),
            objects: ModelObjects::new(Arc::clone(&clock)),
            clock,
            random: SeededEnv::new(derive(options.seed, "wire", 0)),
            state: Mutex::default(),
            busy_until: Mutex::new(started),
            stepped: Notify::new(),
            options,
        }))
    }

    /// The etcd, beside all ports.
    #[must_use]
    pub fn kv(&self) -> &ModelKv {
        &self.0.kv
    }

    /// The API server, beside all ports.
    #[must_use]
    pub fn objects(&self) -> &ModelObjects {
        &self.0.objects
    }

    /// The wall clock of a process.
    pub(crate) fn clock_of(&self, name: &str) -> Timestamp {
        let off = lock(&self.0.state).clocks.get(name).copied().unwrap_or_default();
        self.0.clock.now().saturating_add(off).unwrap_or(Timestamp::MAX)
    }

    /// Moves the wall clock of a process by so many seconds, forwards or back. Monotonic time goes on as ever.
    pub fn move_clock(&self, name: &str, seconds: i64) {
        let mut state = lock(&self.0.state);
        let off = state.clocks.entry(name.to_owned()).or_default();
        *off = off.saturating_add(SignedDuration::from_secs(seconds));
    }

    /// Notes that etcd was put back to an earlier state.
    pub(crate) fn rolled_back(&self) {
        lock(&self.0.state).rollbacks += 1;
    }

    /// How often etcd was put back to an earlier state. What was promised since that state is void then: a watcher has to
    /// take the new state as it is.
    #[must_use]
    pub fn rollbacks(&self) -> u64 {
        lock(&self.0.state).rollbacks
    }

    /// A whole number out of a range, from the seed.
    pub(crate) fn draw(&self, range: &RangeInclusive<u64>) -> u64 {
        let span = range.end().saturating_sub(*range.start()).saturating_add(1);
        range.start() + self.0.random.random_u64() % span.max(1)
    }

    /// A text for the trace, where it is written in full.
    pub(crate) fn text(&self, text: impl FnOnce() -> String) -> String {
        if self.0.options.in_full { text() } else { String::new() }
    }

    pub(crate) fn latency(&self) -> &Latency {
        &self.0.options.latency
    }

    /// Looks at the stores after each change from now on.
    pub fn watch_over(&self, invariant: Invariant) {
        lock(&self.0.state).invariant = Some(invariant);
        self.look();
    }

    // Processes.

    /// Starts a process, and starts it again as `restart` says whenever it ended.
    pub fn start<F>(&self, name: &str, restart: Restart, program: impl Fn(ProcessPorts) -> F + Send + Sync + 'static)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let program: Program = Arc::new(move |ports| -> TaskFuture { Box::pin(program(ports)) });
        self.kill(name);
        let mut state = lock(&self.0.state);
        // One that was there before leaves its number, so that no two incarnations are called the same.
        let incarnation = state.processes.get(name).map_or(0, |before| before.incarnation);
        let (gate, stop) = (Arc::default(), CancellationToken::new());
        let process = Process { incarnation, gate, stop, program, restart, stopped: false };
        state.processes.insert(name.to_owned(), process);
        drop(state);
        self.launch(name);
    }

    fn launch(&self, name: &str) {
        let (program, ports, gate) = {
            let mut state = lock(&self.0.state);
            let Some(process) = state.processes.get_mut(name).filter(|process| !process.stopped) else { return };
            process.incarnation += 1;
            process.gate = Arc::default();
            process.stop = CancellationToken::new();
            let id = ProcessId { name: name.to_owned(), incarnation: process.incarnation };
            (Arc::clone(&process.program), self.ports(id, &process.gate, &process.stop), Arc::clone(&process.gate))
        };
        let id = ports.id.clone();
        self.note(Some(&id), "starts".to_owned());
        let world = self.clone();
        let main = gate.guard(program(ports));
        let task = async move {
            match main.await {
                Ended::Returned => world.end(&id, "exits"),
                Ended::Killed => {}
                Ended::Panicked(message) => {
                    world.end(&id, &format!("panics: {message}"));
                    world.condemn(format!("{id} panicked: {message}"));
                }
            }
        };
        drop(spawn_on_tokio("process", Box::pin(task)));
    }

    fn ports(&self, id: ProcessId, gate: &Arc<Gate>, stop: &CancellationToken) -> ProcessPorts {
        let wire = Wire::of_process(self.clone(), id.clone(), Arc::clone(gate));
        let seed = derive(self.0.options.seed, &id.name, id.incarnation);
        ProcessPorts {
            env: Arc::new(SimEnv::new(self.clone(), id.clone(), Arc::clone(gate), seed)),
            kv: Arc::new(Faulty::new(self.0.kv.clone(), wire.clone())),
            objects: Arc::new(Faulty::new(self.0.objects.clone(), wire)),
            stop: stop.clone(),
            id,
        }
    }

    /// Ports for the scenario itself: in the trace, but without faults and at once.
    #[must_use]
    pub fn user(&self) -> ProcessPorts {
        let id = ProcessId { name: "user".to_owned(), incarnation: 1 };
        let wire = Wire::of_user(self.clone(), id.clone());
        let seed = derive(self.0.options.seed, &id.name, id.incarnation);
        ProcessPorts {
            env: Arc::new(SimEnv::new(self.clone(), id.clone(), Arc::default(), seed)),
            kv: Arc::new(Faulty::new(self.0.kv.clone(), wire.clone())),
            objects: Arc::new(Faulty::new(self.0.objects.clone(), wire)),
            stop: CancellationToken::new(),
            id,
        }
    }

    fn with_process<T>(&self, name: &str, act: impl FnOnce(&ProcessId, &Process) -> T) -> Option<T> {
        let state = lock(&self.0.state);
        let process = state.processes.get(name)?;
        let id = ProcessId { name: name.to_owned(), incarnation: process.incarnation };
        Some(act(&id, process))
    }

    /// Kills a process as SIGKILL does; requests that left already arrive all the same.
    pub fn kill(&self, name: &str) {
        if let Some(id) = self.with_process(name, |id, _| id.clone()) {
            self.end(&id, "is killed");
        }
    }

    /// Stops a process as SIGSTOP does: its connections stay open, time goes on.
    pub fn pause(&self, name: &str) {
        let paused = self.with_process(name, |id, process| {
            process.gate.pause();
            id.clone()
        });
        self.note(paused.as_ref(), format!("{name} is paused"));
    }

    /// Lets a paused process go on.
    pub fn resume(&self, name: &str) {
        let resumed = self.with_process(name, |id, process| {
            process.gate.resume();
            id.clone()
        });
        self.note(resumed.as_ref(), format!("{name} goes on"));
    }

    /// Pauses a process for a while. Until it goes on nobody knows what it is about to write.
    pub(crate) fn stall(&self, name: &str, time: Duration) {
        self.pause(name);
        self.busy(Instant::now() + time);
        let name = name.to_owned();
        self.later(time, move |world| world.resume(&name));
    }

    /// Does something so much later.
    pub(crate) fn later(&self, time: Duration, act: impl FnOnce(&Self) + Send + 'static) {
        let world = self.clone();
        let task = async move {
            tokio::time::sleep(time).await;
            act(&world);
        };
        drop(spawn_on_tokio("later", Box::pin(task)));
    }

    /// Asks a process to stop, as SIGTERM does. It does not start again.
    pub fn stop(&self, name: &str) {
        let mut state = lock(&self.0.state);
        if let Some(process) = state.processes.get_mut(name) {
            process.stopped = true;
            process.stop.cancel();
        }
    }

    /// Whether a process runs, paused or not.
    #[must_use]
    pub fn runs(&self, name: &str) -> bool {
        self.with_process(name, |_, process| !process.gate.is_dead()).unwrap_or(false)
    }

    /// The end of an incarnation, unless it ended before.
    pub(crate) fn end(&self, id: &ProcessId, how: &str) {
        let restart = {
            let state = lock(&self.0.state);
            let Some(process) = state.processes.get(&id.name) else { return };
            if process.incarnation != id.incarnation || process.gate.is_dead() {
                return;
            }
            process.gate.kill();
            process.restart
        };
        self.note(Some(id), how.to_owned());
        if let Restart::After(pause) = restart {
            let ended = id.clone();
            self.later(pause, move |world| {
                // Somebody may have started another program under this name meanwhile.
                if world.with_process(&ended.name, |id, _| *id == ended) == Some(true) {
                    world.launch(&ended.name);
                }
            });
        }
    }

    // What happened.

    /// Numbers a call of a process and says what goes wrong at it.
    pub(crate) fn number(&self) -> (u64, Option<Fault>) {
        let mut state = lock(&self.0.state);
        state.calls += 1;
        let fault = self.0.options.plan.fault(state.calls).filter(|_| !state.calm);
        (state.calls, fault)
    }

    fn busy(&self, until: Instant) {
        let mut busy_until = lock(&self.0.busy_until);
        *busy_until = (*busy_until).max(until);
    }

    /// Nothing goes wrong any more, whatever the plan says.
    pub(crate) fn calm(&self) {
        lock(&self.0.state).calm = true;
    }

    fn record(&self, who: Option<&ProcessId>, what: What) {
        let entry = Entry { at: self.0.started.elapsed(), who: who.cloned(), what };
        let mut state = lock(&self.0.state);
        // What comes after the trouble only hides what led to it.
        if state.trouble.is_none() {
            state.trace.push(entry);
        }
        drop(state);
        self.0.stepped.notify_waiters();
    }

    pub(crate) fn note(&self, who: Option<&ProcessId>, text: String) {
        self.record(who, What::Note(text));
    }

    pub(crate) fn delivered(&self, who: &ProcessId, watch: Option<u64>, item: String) {
        self.record(Some(who), What::Delivery { watch, item });
    }

    pub(crate) fn revisions(&self) -> (Revision, Revision) {
        (self.0.kv.header().revision, self.0.objects.revision())
    }

    /// Records a call that took effect, or failed to, and looks at the stores if they changed.
    pub(crate) fn answered(&self, who: &ProcessId, call: Call, answer: String, fault: Option<Fault>, changed: bool) {
        if changed && !(self.0.options.background)(&call) {
            self.busy(Instant::now());
        }
        self.record(Some(who), What::Call { call, answer, fault });
        self.look();
    }

    /// Looks at the stores if they changed since.
    pub(crate) fn look(&self) {
        let revisions = self.revisions();
        let taken = {
            let mut state = lock(&self.0.state);
            if state.looked_at == revisions || state.trouble.is_some() {
                return;
            }
            state.looked_at = revisions;
            state.invariant.take()
        };
        let Some(mut invariant) = taken else { return };
        let verdict = invariant(self);
        lock(&self.0.state).invariant = Some(invariant);
        if let Err(what) = verdict {
            self.condemn(what);
        }
    }

    /// Notes that the run is no good.
    pub(crate) fn condemn(&self, what: String) {
        let mut state = lock(&self.0.state);
        let after = state.trace.last().map(ToString::to_string).unwrap_or_default();
        state.trouble.get_or_insert(Trouble::Unsafe { what, after });
        drop(state);
        self.0.stepped.notify_waiters();
    }

    /// The trace so far.
    #[must_use]
    pub fn trace(&self) -> Vec<Entry> {
        lock(&self.0.state).trace.clone()
    }

    /// The trace so far, taken out.
    pub(crate) fn take_trace(&self) -> Vec<Entry> {
        std::mem::take(&mut lock(&self.0.state).trace)
    }

    /// What replays this run, and its last `lines` lines.
    #[must_use]
    pub fn report(&self, lines: usize) -> String {
        let state = lock(&self.0.state);
        let skipped = state.trace.len().saturating_sub(lines);
        let tail: Vec<String> = state.trace.iter().skip(skipped).map(ToString::to_string).collect();
        format!(
            "seed {}, {}; {} earlier lines, then:\n{}",
            self.0.options.seed,
            self.0.options.plan,
            skipped,
            tail.join("\n")
        )
    }

    // Waiting.

    fn trouble(&self) -> Result<(), Trouble> {
        lock(&self.0.state).trouble.clone().map_or(Ok(()), Err)
    }

    /// Lets the world run until a condition holds.
    ///
    /// # Errors
    /// When it does not within that virtual time, or an invariant breaks on the way.
    pub async fn until(
        &self,
        what: &str,
        within: Duration,
        mut condition: impl FnMut(&Self) -> bool,
    ) -> Result<(), Trouble> {
        let deadline = Instant::now() + within;
        loop {
            let stepped = self.0.stepped.notified();
            self.trouble()?;
            if condition(self) {
                return Ok(());
            }
            if tokio::time::timeout_at(deadline, stepped).await.is_err() {
                return Err(Trouble::TimedOut { what: what.to_owned(), within });
            }
        }
    }

    /// Lets the world run until nothing but background writes changed anything for `quiet`, and no process stood still
    /// meanwhile.
    ///
    /// # Errors
    /// When it is not quiet within that virtual time, or an invariant breaks on the way.
    pub async fn settle(&self, quiet: Duration, within: Duration) -> Result<(), Trouble> {
        let deadline = Instant::now() + within;
        let begun = Instant::now();
        loop {
            self.trouble()?;
            let since = (*lock(&self.0.busy_until)).max(begun);
            if since.elapsed() >= quiet {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(Trouble::TimedOut { what: format!("quiet for {quiet:?}"), within });
            }
            tokio::time::sleep_until((since + quiet).min(deadline)).await;
        }
    }

    /// Lets the world run for a while.
    ///
    /// # Errors
    /// When an invariant breaks meanwhile.
    pub async fn pass(&self, time: Duration) -> Result<(), Trouble> {
        tokio::time::sleep(time).await;
        self.look();
        self.trouble()
    }
}

/// A seed for one user of randomness, so that what one draws does not change what another one gets.
fn derive(seed: u64, name: &str, incarnation: u32) -> u64 {
    // FNV-1a, 64 bits.
    let bytes = seed.to_le_bytes().into_iter().chain(name.bytes()).chain(incarnation.to_le_bytes());
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3))
}

//! What goes wrong between an agent and its surroundings: decorators over the ports, which number every call and place
//! one fault at one of them.

mod stores;

use std::{
    collections::BTreeMap,
    fmt, io,
    path::Path,
    sync::{Arc, Mutex},
    time::Duration,
};

use async_trait::async_trait;
use basal_agent::{
    endpoint::record::EndpointRecord,
    journal::{Entry, Journal, JournalError, JournalKey},
};
use basal_datapath::{
    flows::MapUse,
    kernel::{Device, Kernel, KernelEvent, Observed, OpError, PodDevice, ReadError},
    names::IfName,
    op::Op,
};
use basal_runtime::{
    env::{Env, SharedEnv, TaskFuture, TaskHandle, spawn_on_tokio},
    outcome::Outcome,
};
use futures::{FutureExt as _, future, select_biased, stream::BoxStream};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

/// What goes wrong at one call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The agent dies before the call leaves.
    CrashBefore,
    /// The call is carried out, then the agent dies without its answer. Only for writes: after a read that is a crash
    /// before the next call.
    CrashAfter,
    /// The answer is an error, and nothing is done: the disk is full, the kernel is busy, a server is not there.
    Refuse,
    /// Nothing is done, and the agent learns only that it may have been. Only for writes.
    LoseRequest,
    /// The call is carried out, and the agent learns only that it may have been. Only for writes.
    LoseAnswer,
}

/// Where a call of the agent goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    /// The kernel and the disk.
    Node,
    /// etcd and the API server.
    Servers,
}

/// A call of the agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Call {
    side: Side,
    text: String,
    /// What can go wrong at it.
    pub(crate) faults: &'static [Fault],
}

/// What can go wrong at a read.
const READ: [Fault; 2] = [Fault::CrashBefore, Fault::Refuse];

/// What can go wrong at a write.
const WRITE: [Fault; 5] = [Fault::CrashBefore, Fault::CrashAfter, Fault::Refuse, Fault::LoseRequest, Fault::LoseAnswer];

impl Call {
    fn read(side: Side, text: impl Into<String>) -> Self {
        Self { side, text: text.into(), faults: &READ }
    }

    fn write(side: Side, text: impl Into<String>) -> Self {
        Self { side, text: text.into(), faults: &WRITE }
    }

    /// A change of the kernel. To the agent a request that is lost is one that is refused.
    fn change(op: &Op) -> Self {
        use Fault::{CrashAfter, CrashBefore, LoseAnswer, Refuse};
        Self { side: Side::Node, text: format!("kernel: {op}"), faults: &[CrashBefore, CrashAfter, Refuse, LoseAnswer] }
    }
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// What goes wrong: which of the faults of the call with a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Planned {
    pub(crate) call: usize,
    /// Counted round, since a call has as many as it has.
    pub(crate) fault: usize,
}

impl Planned {
    /// The answer of a write is lost.
    pub(crate) fn lost_answer(call: usize) -> Self {
        Self { call, fault: WRITE.iter().position(|fault| *fault == Fault::LoseAnswer).unwrap() }
    }

    /// A read is refused.
    pub(crate) fn refusal_of_a_read(call: usize) -> Self {
        Self { call, fault: READ.iter().position(|fault| *fault == Fault::Refuse).unwrap() }
    }

    pub(crate) fn at(self, call: &Call) -> Fault {
        call.faults[self.fault % call.faults.len()]
    }
}

/// Numbers the calls of all incarnations of an agent from 0, from a moment on, and says what goes wrong at which.
#[derive(Debug, Default)]
pub(crate) struct Script(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// The calls to these are numbered now.
    armed: Vec<Side>,
    calls: Vec<Call>,
    plan: Vec<Planned>,
    /// Calls that left and are not carried out yet.
    on_the_way: usize,
}

impl Script {
    /// From now on calls to these sides are numbered, and this goes wrong.
    pub(crate) fn arm(&self, sides: &[Side], plan: &[Planned]) {
        let mut state = self.0.lock().unwrap();
        (state.armed, state.plan) = (sides.to_owned(), plan.to_owned());
        state.calls.clear();
    }

    /// From now on nothing goes wrong any more; answers the calls that there were.
    pub(crate) fn disarm(&self) -> Vec<Call> {
        let mut state = self.0.lock().unwrap();
        state.armed.clear();
        std::mem::take(&mut state.calls)
    }

    /// Waits until every call that left is carried out.
    pub(crate) async fn arrived(&self) {
        while self.0.lock().unwrap().on_the_way > 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    fn depart(&self, call: Call) -> Option<Fault> {
        let mut state = self.0.lock().unwrap();
        if !state.armed.contains(&call.side) {
            return None;
        }
        let number = state.calls.len();
        let fault = state.plan.iter().find(|planned| planned.call == number).map(|planned| planned.at(&call));
        state.calls.push(call);
        fault
    }

    fn travel(&self, change: impl FnOnce(&mut usize)) {
        change(&mut self.0.lock().unwrap().on_the_way);
    }
}

/// What a port may answer beside what the other side says.
pub(crate) trait Answer: Send + 'static {
    /// The call was not carried out.
    fn refused() -> Self;
    /// Nobody knows whether it was.
    fn lost() -> Self;
}

/// How a port says that a call was not carried out.
pub(crate) trait Refused: Send + 'static {
    fn refused() -> Self;
}

impl<T: Send + 'static, E: Refused> Answer for Result<T, E> {
    fn refused() -> Self {
        Err(E::refused())
    }

    fn lost() -> Self {
        Self::refused()
    }
}

impl<T: Send + 'static, E: Refused> Answer for Outcome<T, E> {
    fn refused() -> Self {
        Self::Refused(E::refused())
    }

    fn lost() -> Self {
        Self::Unknown("the answer was lost".to_owned())
    }
}

/// How one incarnation of an agent reaches its surroundings. A call that left is carried out even when the agent dies
/// meanwhile.
#[derive(Debug, Clone)]
pub(crate) struct Wire {
    script: Arc<Script>,
    /// Cancelled when the agent dies.
    dead: CancellationToken,
}

impl Wire {
    pub(crate) fn new(script: &Arc<Script>, dead: &CancellationToken) -> Self {
        Self { script: Arc::clone(script), dead: dead.clone() }
    }

    /// One call, whose other side does `effect`.
    pub(crate) async fn call<A: Answer>(&self, call: Call, effect: impl Future<Output = A> + Send + 'static) -> A {
        if self.dead.is_cancelled() {
            return future::pending().await;
        }
        let fault = self.script.depart(call);
        match fault {
            Some(Fault::CrashBefore) => {
                self.dead.cancel();
                return future::pending().await;
            }
            Some(Fault::Refuse) => return A::refused(),
            Some(Fault::LoseRequest) => return A::lost(),
            Some(Fault::CrashAfter | Fault::LoseAnswer) | None => {}
        }
        let (sender, answer) = oneshot::channel();
        let (script, dead) = (Arc::clone(&self.script), self.dead.clone());
        script.travel(|on_the_way| *on_the_way += 1);
        let journey = async move {
            let answer = effect.await;
            script.travel(|on_the_way| *on_the_way -= 1);
            if fault == Some(Fault::CrashAfter) {
                dead.cancel();
            }
            // The agent may have given up, or died.
            sender.send(answer).map_or_else(drop, drop);
        };
        drop(spawn_on_tokio("wire", Box::pin(journey)));
        match answer.await {
            Ok(_) if fault == Some(Fault::LoseAnswer) => A::lost(),
            Ok(answer) if !self.dead.is_cancelled() => answer,
            _ => future::pending().await,
        }
    }
}

/// Surroundings whose tasks end all at once when the agent dies.
pub(crate) struct MortalEnv {
    pub(crate) env: SharedEnv,
    pub(crate) dead: CancellationToken,
}

impl Env for MortalEnv {
    fn now(&self) -> jiff::Timestamp {
        self.env.now()
    }

    fn random_u64(&self) -> u64 {
        self.env.random_u64()
    }

    fn spawn(&self, name: &'static str, task: TaskFuture) -> TaskHandle {
        let dead = self.dead.clone();
        self.env.spawn(name, Box::pin(async move { until_dead(&dead, task).await.unwrap_or_default() }))
    }
}

/// Runs until the agent dies; takes no further step then.
pub(crate) async fn until_dead<T>(dead: &CancellationToken, task: impl Future<Output = T>) -> Option<T> {
    let task = task.fuse();
    futures::pin_mut!(task);
    select_biased! {
        () = dead.cancelled().fuse() => None,
        done = task => Some(done),
    }
}

/// A port with the wire to it.
pub(crate) struct Faulty<P> {
    pub(crate) port: Arc<P>,
    pub(crate) wire: Wire,
}

impl<P> Faulty<P> {
    pub(crate) fn new(port: Arc<P>, wire: &Wire) -> Arc<Self> {
        Arc::new(Self { port, wire: wire.clone() })
    }

    pub(crate) fn port(&self) -> Arc<P> {
        Arc::clone(&self.port)
    }
}

fn busy() -> io::Error {
    io::Error::from(io::ErrorKind::ResourceBusy)
}

impl Refused for ReadError {
    fn refused() -> Self {
        Self::new("the kernel", busy())
    }
}

impl Refused for OpError {
    fn refused() -> Self {
        Self::Refused { op: "a change".into(), message: busy().to_string() }
    }
}

impl Refused for JournalError {
    fn refused() -> Self {
        Self { path: "the journal".into(), why: io::Error::from(io::ErrorKind::StorageFull).to_string() }
    }
}

#[async_trait]
impl<P: Kernel> Kernel for Faulty<P> {
    async fn read(&self) -> Result<Observed, ReadError> {
        let port = self.port();
        self.wire.call(Call::read(Side::Node, "kernel: read"), async move { port.read().await }).await
    }

    async fn read_without_ipcache(&self) -> Result<Observed, ReadError> {
        let port = self.port();
        let effect = async move { port.read_without_ipcache().await };
        self.wire.call(Call::read(Side::Node, "kernel: read without ipcache"), effect).await
    }

    async fn device(&self, name: &IfName) -> Result<Option<Device>, ReadError> {
        let (port, of) = (self.port(), name.clone());
        let effect = async move { port.device(&of).await };
        self.wire.call(Call::read(Side::Node, format!("kernel: device {name}")), effect).await
    }

    async fn pod_device(&self, netns: &Path, name: &IfName) -> Result<Option<PodDevice>, ReadError> {
        let call = Call::read(Side::Node, format!("kernel: device {name} in {}", netns.display()));
        let (port, netns, name) = (self.port(), netns.to_owned(), name.clone());
        self.wire.call(call, async move { port.pod_device(&netns, &name).await }).await
    }

    async fn apply(&self, op: &Op) -> Outcome<(), OpError> {
        let call = Call::change(op);
        let (port, op) = (self.port(), op.clone());
        self.wire.call(call, async move { port.apply(&op).await }).await
    }

    async fn collect_flows(&self) -> Result<Vec<MapUse>, ReadError> {
        let port = self.port();
        self.wire.call(Call::read(Side::Node, "kernel: collect flows"), async move { port.collect_flows().await }).await
    }

    fn events(&self) -> BoxStream<'static, KernelEvent> {
        self.port.events()
    }
}

#[async_trait]
impl<P: Journal> Journal for Faulty<P> {
    async fn load(&self) -> Result<BTreeMap<JournalKey, Entry>, JournalError> {
        let port = self.port();
        self.wire.call(Call::read(Side::Node, "journal: load"), async move { port.load().await }).await
    }

    async fn put(&self, record: &EndpointRecord) -> Outcome<(), JournalError> {
        let call = Call::write(Side::Node, format!("journal: put {} as {:?}", record.attachment, record.phase));
        let (port, record) = (self.port(), record.clone());
        self.wire.call(call, async move { port.put(&record).await }).await
    }

    async fn remove(&self, key: &JournalKey) -> Outcome<(), JournalError> {
        let (port, of) = (self.port(), key.clone());
        let effect = async move { port.remove(&of).await };
        self.wire.call(Call::write(Side::Node, format!("journal: remove {key}")), effect).await
    }
}

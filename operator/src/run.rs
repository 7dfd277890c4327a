//! One operator: keeps its views warm, stands for election, and works while it leads.

mod begin;

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use basal_crds::resources::LedgerStore;
use basal_ipam::{config::PoolConfig, names::NodeName};
use basal_objects::{
    cache::{Cache, Changes, Source},
    events::{self, EventRecorder},
    leadership::{Elector, Leadership, LeadershipOptions, Term, TermId},
    ledger,
    object::{Object, resources},
    port::{Objects, ReadError, Scope},
};
use basal_runtime::{
    backoff::Backoff,
    controller::{ControllerMetrics, Driver, DriverOptions, TermEnded},
    env::{SharedEnv, TaskHandle},
    queue::Queue,
    readiness::{Guard, Readiness},
    sync::lock,
};
use futures::{FutureExt as _, pin_mut, select_biased};
use tokio::{sync::watch, time::Instant};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::{
    denials::{Denials, Noted},
    duties::{self, DutySettings},
    ledger_state::{self, Agents, Work},
    metrics::OperatorMetrics,
    moving::{self, Course, bridge, course},
    node::{
        CiliumNodeFacts, NodeController, NodeFacts, Packed, Records, Reporter, Views, drift::FullPass, shared_address,
    },
    ports::Ports,
    term::Begun,
};

/// How often every node is looked at, and the servers are compared with what watches told.
const FULL_PASS: Duration = Duration::from_secs(300);

/// How the driver works on nodes. One batch at a time, because batches share cells; what arrives meanwhile makes up
/// the next one, so batches grow with the load.
const NODES: DriverOptions = DriverOptions { batch_size: 256, batches: 1, reports: 32, full_pass: Some(FULL_PASS) };

/// The most nodes that wait for a look. Beyond it, whoever adds waits.
const QUEUE: usize = 50_000;

/// Pauses of a node that failed, and of a term that does not begin.
const PAUSES: Backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(30));

/// How long an operator that may not work with the claims leaves the Lease to others.
const STAND_BACK: Duration = Duration::from_secs(10);

/// How long a leader that ends tries to say so in the ledger.
const END_LIMIT: Duration = Duration::from_secs(2);

/// Pause between two looks at the API server and etcd for `/readyz`.
const PROBE: Duration = Duration::from_secs(5);

/// How long an answer to such a look may take.
const PROBE_LIMIT: Duration = Duration::from_secs(5);

/// What an operator works by.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The pool.
    pub pool: PoolConfig,
    /// How long a released block rests.
    pub quarantine: Duration,
    /// How leadership is held.
    pub election: LeadershipOptions,
    /// How long a CiliumNode that never had a Node stays; `None` is for ever.
    pub node_gc: Option<Duration>,
    /// What is kept up beside nodes.
    pub duties: DutySettings,
    /// CustomResourceDefinitions to install; none leaves them to somebody else.
    pub definitions: Vec<Object>,
}

/// One operator process.
pub struct Operator {
    ports: Ports,
    /// For the Lease alone: a renewal must not wait behind the requests that it renews for.
    lease: Arc<dyn Objects>,
    /// What the API server denied to either.
    denials: Denials,
    settings: Settings,
    metrics: OperatorMetrics,
    controllers: ControllerMetrics,
    readiness: Readiness,
}

/// How a term ended that nothing went wrong in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ended {
    /// The Lease is gone, or the process is to stop.
    Over,
    /// The claims are not this operator's to work with.
    Refused,
}

/// Tasks that end with their owner.
#[derive(Default)]
struct Tasks(Vec<TaskHandle>);

impl Drop for Tasks {
    fn drop(&mut self) {
        for task in &self.0 {
            task.abort();
        }
    }
}

impl Operator {
    /// An operator that does nothing yet.
    #[must_use]
    pub fn new(
        ports: Ports,
        lease: Arc<dyn Objects>,
        settings: Settings,
        metrics: OperatorMetrics,
        controllers: ControllerMetrics,
        readiness: Readiness,
    ) -> Self {
        let denials = Denials::default();
        let (ports, lease) = (ports.noting(&denials), Arc::new(Noted::new(lease, &denials)));
        Self { ports, lease, denials, settings, metrics, controllers, readiness }
    }

    /// Works until `stop`, then releases the Lease.
    pub async fn run(&self, stop: CancellationToken) {
        let mut tasks = Tasks::default();
        let views = self.follow(&mut tasks);
        tasks.0.extend(self.probe());
        while !stop.is_cancelled() {
            // Each candidacy is stopped after what it led has ended, so that the Lease is free only then.
            let candidacy = CancellationToken::new();
            let elector =
                Elector::new(Arc::clone(&self.lease), Arc::clone(&self.ports.env), self.settings.election.clone());
            let task = elector.start(candidacy.clone());
            let ended = self.candidate(&elector, &views, &stop).await;
            candidacy.cancel();
            task.join().await;
            if ended == Ended::Refused {
                let (pause, stopped) = (tokio::time::sleep(STAND_BACK).fuse(), stop.cancelled().fuse());
                pin_mut!(pause, stopped);
                select_biased! { () = stopped => return, () = pause => {} }
            }
        }
    }

    /// The views that a leader needs. They are kept also while another one leads; a process that leads at once lists them only
    /// when its term begins.
    fn follow(&self, tasks: &mut Tasks) -> Views {
        let Ports { env, objects, store, .. } = &self.ports;
        let (nodes, task) = Cache::follow_when_asked(Source {
            objects,
            env: env.as_ref(),
            resource: resources::NODE,
            scope: Scope::default(),
            parse: Packed::<NodeFacts>::new,
            ready: self.readiness.guard("cache of Nodes"),
        });
        tasks.0.push(task);
        let (cilium_nodes, task) = Cache::follow_when_asked(Source {
            objects,
            env: env.as_ref(),
            resource: resources::CILIUM_NODE,
            scope: Scope::default(),
            parse: Packed::<CiliumNodeFacts>::new,
            ready: self.readiness.guard("cache of CiliumNodes"),
        });
        tasks.0.push(task);
        let (records, task) = store.follow(env, &self.readiness);
        tasks.0.extend(task);
        Views { nodes, cilium_nodes, records }
    }

    /// Looks again and again whether the servers can be used, and whether claims are kept where this operator keeps them:
    /// a replica that cannot work must not look ready, or a rolling update takes the last one away that can.
    fn probe(&self) -> Vec<TaskHandle> {
        let probe = |name| Probe { env: Arc::clone(&self.ports.env), guard: self.readiness.guard(name) };
        let (objects, store) = (Arc::clone(&self.ports.objects), self.ports.store.kind());
        let key = ledger::key(self.ports.cluster.name().as_str());
        let active = Arc::new(self.readiness.guard("store of claims"));
        let mut tasks = vec![probe("API server").start("probe-api-server", move || {
            let (objects, key, active) = (Arc::clone(&objects), key.clone(), Arc::clone(&active));
            async move {
                let found = match objects.get(resources::LEDGER, &key).await {
                    // The first leader makes the kind.
                    Err(ReadError::UnknownKind(_)) => None,
                    other => other.map_err(|error| error.to_string())?,
                };
                match ledger::standing(found.as_ref()).map(|standing| course(store, standing.as_ref())) {
                    Ok(Course::Serve { .. } | Course::Move { .. }) => active.ready(),
                    Ok(Course::Refuse { active: other }) => {
                        active.not_ready(moving::not_active(other, store).to_string());
                    }
                    Err(error) => active.not_ready(error.to_string()),
                }
                Ok(())
            }
        })];
        let denials = self.denials.clone();
        let rights = move || std::future::ready(denials.check());
        tasks.push(probe("rights at the API server").start("probe-rights", rights));
        let (objects, store) = (Arc::clone(&self.ports.objects), Arc::clone(&self.ports.store));
        if let Some((name, _)) = store.probe(&objects) {
            tasks.push(probe(name).start("probe-store", move || {
                let look = store.probe(&objects);
                async move {
                    match look {
                        Some((_, look)) => look.await.map_err(|error| error.to_string()),
                        None => Ok(()),
                    }
                }
            }));
        }
        tasks
    }

    /// Waits for terms and works in them, until one ends that must not be taken up again or `stop`.
    async fn candidate(&self, elector: &Elector, views: &Views, stop: &CancellationToken) -> Ended {
        let mut leadership = elector.leadership();
        loop {
            let term = {
                let (won, stopped) = (won(&mut leadership, views).fuse(), stop.cancelled().fuse());
                pin_mut!(won, stopped);
                select_biased! { () = stopped => return Ended::Over, term = won => term }
            };
            info!(term = %term.id, "leading");
            self.metrics.set_leader(true);
            let ended = self.lead(elector, views, term, stop).await;
            self.metrics.set_leader(false);
            match ended {
                Ok(Ended::Over) => info!(term = %term.id, "not leading any more"),
                Ok(Ended::Refused) => {
                    warn!(term = %term.id, "giving the Lease back: another operator may be able to work");
                    return Ended::Refused;
                }
                Err(error) => {
                    warn!(term = %term.id, %error, "the term ended; standing for election anew");
                    return Ended::Over;
                }
            }
        }
    }

    /// One term.
    async fn lead(
        &self,
        elector: &Elector,
        views: &Views,
        term: Term,
        stop: &CancellationToken,
    ) -> Result<Ended, TermEnded> {
        let leadership = elector.leadership();
        let over = CancellationToken::new();
        let ports = self.ports.during(&leadership, term.id);
        let work = self.work(ports, elector, views, over.clone()).fuse();
        let (lost, stopped) = (lost(leadership, term.id).fuse(), stop.cancelled().fuse());
        pin_mut!(work, lost, stopped);
        select_biased! {
            ended = work => return ended,
            () = lost => {}
            () = stopped => {}
        }
        // What is under way is finished, or refused by the ports, before the Lease is given back.
        over.cancel();
        work.await
    }

    async fn work(
        &self,
        ports: Ports,
        elector: &Elector,
        views: &Views,
        over: CancellationToken,
    ) -> Result<Ended, TermEnded> {
        let mut tasks = Tasks::default();
        let reporter =
            events::Reporter { controller: "basal-operator", instance: self.settings.election.identity.clone() };
        let (recorder, events) = EventRecorder::start(Arc::clone(&ports.objects), &ports.env, reporter);
        tasks.0.push(events);
        let (ports, work, begun) = match self.begin(&ports, views, elector, &recorder, &over).await {
            Ok(begun) => begun,
            Err(ended) => return Ok(ended),
        };
        // Without etcd as the store of claims no record in it is this term's.
        let records = if ports.store.kind() == work.home { views.records.clone() } else { Records::none() };
        let views = &Views { records, ..views.clone() };
        let reporter = Reporter::new(recorder.clone(), self.metrics.clone());
        if over.run_until_cancelled(views.records.wait_synced()).await.is_none() {
            return Ok(Ended::Over);
        }
        for loss in &begun.lost {
            reporter.lost(views, loss);
        }
        self.metrics.show(&begun.core);
        let (counted, agents) = watch::channel(Agents::default());
        let (task, moved) = ledger_state::watch(&ports, work, &begun.core, agents, (&recorder, &self.metrics));
        tasks.0.push(task);
        tasks.0.extend(self.duties(&ports, work, &begun, counted));
        tasks.0.extend(duties::collect_endpoints(&ports, self.settings.duties, &self.metrics));
        let queue = Queue::new(Arc::clone(&ports.env), QUEUE, PAUSES);
        feed(&ports.env, views, &begun, &queue, &mut tasks);
        let sharing = shared_address::watch(views.clone(), reporter.clone(), self.metrics.clone());
        tasks.0.push(ports.env.spawn("shared-addresses", Box::pin(sharing)));
        let pass = FullPass {
            ports: ports.clone(),
            views: views.clone(),
            core: Arc::clone(&begun.core),
            queue: queue.clone(),
            metrics: self.metrics.clone(),
        };
        let (ledger, term) = (Arc::clone(&ports.ledger), lock(&begun.core).allocator.term().clone());
        let controller = Arc::new(NodeController::new(ports, views.clone(), Arc::clone(&begun.core), reporter));
        let driver = Driver::new(controller, begun.core, queue, NODES, self.controllers.clone());
        let stop = over.child_token();
        let (driven, replaced, moved) = (driver.run(stop.clone()).fuse(), pass.run(FULL_PASS).fuse(), moved.fuse());
        pin_mut!(driven, replaced, moved);
        let ended = select_biased! {
            ended = driven => {
                ended?;
                // No batch is under way. Whether the note gets through is of no importance: not worth a long wait.
                let noted = tokio::time::timeout(END_LIMIT, ledger.end(&term)).await;
                if noted.is_err() {
                    debug!(%term, "the end of the term is not noted: no answer");
                }
                return Ok(Ended::Over);
            }
            ended = replaced => ended,
            // The watch does not end before its task is dropped here.
            message = moved => TermEnded {
                controller: "ledger",
                key: self.ports.cluster.name().to_string(),
                message: message.unwrap_or_default(),
            },
        };
        // What is under way is finished first, as at any other end.
        stop.cancel();
        driven.await?;
        Err(ended)
    }

    /// What is kept up beside nodes in the store of claims, and while another one is left in that too.
    fn duties(&self, ports: &Ports, work: Work, begun: &Begun, counted: watch::Sender<Agents>) -> Vec<TaskHandle> {
        let mut settings = self.settings.duties;
        let term = lock(&begun.core).allocator.term().clone();
        let Some(kv) = ports.kv.as_ref().filter(|_| work.bridged) else {
            return ports.store.duties(ports, &term, settings, &self.metrics);
        };
        // Who uses an identity shows in one of the places only.
        settings.identity_gc = None;
        let mut tasks = ports.serving(LedgerStore::Etcd).store.duties(ports, &term, settings, &self.metrics);
        tasks.push(bridge::start(ports, kv, &term, counted));
        tasks
    }
}

/// Waits for a term of ours, and has the views ready while it is another one's.
async fn won(leadership: &mut watch::Receiver<Leadership>, views: &Views) -> Term {
    loop {
        let seen = leadership.borrow_and_update().clone();
        if let Some(term) = seen.term(Instant::now()) {
            return term;
        }
        if matches!(seen, Leadership::Standby { holder: Some(_) }) {
            views.keep_warm();
        }
        if leadership.changed().await.is_err() {
            // The elector is gone, so nothing can be won any more.
            std::future::pending::<()>().await;
        }
    }
}

/// Waits until a term is over, by the elector's word or by the clock.
async fn lost(mut leadership: watch::Receiver<Leadership>, id: TermId) {
    loop {
        let term = leadership.borrow_and_update().term(Instant::now());
        let Some(term) = term.filter(|term| term.id == id) else { return };
        let (changed, over) = (leadership.changed().fuse(), tokio::time::sleep_until(term.until).fuse());
        pin_mut!(changed, over);
        select_biased! {
            end = changed => if end.is_err() { return },
            () = over => {}
        }
    }
}

/// Puts every name of a view into the queue, and then every name that changes there. Nodes that have nothing yet come first:
/// a leader that has just begun lets nobody wait until it has looked at all the others once more.
fn feed(env: &SharedEnv, views: &Views, begun: &Begun, queue: &Queue<NodeName>, tasks: &mut Tasks) {
    let claimed: Arc<BTreeSet<NodeName>> = Arc::new(lock(&begun.core).allocator.nodes().cloned().collect());
    let from_cache = |changes: Changes, name: &'static str| {
        let feeder = Feeder { queue: queue.clone(), claimed: Arc::clone(&claimed) };
        let feeding = async move {
            feeder.first(changes.next().await.into_iter().map(|key| key.name)).await;
            loop {
                feeder.changed(changes.next().await.into_iter().map(|key| key.name)).await;
            }
        };
        env.spawn(name, Box::pin(feeding))
    };
    tasks.0.push(from_cache(views.nodes.subscribe(), "feed-nodes"));
    tasks.0.push(from_cache(views.cilium_nodes.subscribe(), "feed-ciliumnodes"));
    let (records, feeder) = (views.records.clone(), Feeder { queue: queue.clone(), claimed });
    let feeding = async move {
        feeder.first(records.names().into_iter()).await;
        // Nodes that are gone stand in no view any more, only in claims.
        for name in feeder.claimed.iter() {
            feeder.queue.add_behind(name.clone()).await;
        }
        loop {
            feeder.changed(records.changes().await.into_iter()).await;
        }
    };
    tasks.0.push(env.spawn("feed-records", Box::pin(feeding)));
}

/// Puts names into the queue.
struct Feeder {
    queue: Queue<NodeName>,
    /// The nodes that had claims when the term began.
    claimed: Arc<BTreeSet<NodeName>>,
}

impl Feeder {
    async fn first(&self, names: impl Iterator<Item = String>) {
        for name in names.filter_map(|name| node_name(&name)) {
            if self.claimed.contains(&name) {
                self.queue.add_behind(name).await;
            } else {
                self.queue.add(name).await;
            }
        }
    }

    async fn changed(&self, names: impl Iterator<Item = String>) {
        for name in names.filter_map(|name| node_name(&name)) {
            self.queue.add(name).await;
        }
    }
}

fn node_name(name: &str) -> Option<NodeName> {
    NodeName::new(name).inspect_err(|error| warn!(%error, "a record or object has a name that no node can have")).ok()
}

/// Looks at a server again and again.
struct Probe {
    env: SharedEnv,
    guard: Guard,
}

impl Probe {
    fn start<F>(self, name: &'static str, look: impl Fn() -> F + Send + Sync + 'static) -> TaskHandle
    where
        F: Future<Output = Result<(), String>> + Send + 'static,
    {
        let Self { env, guard } = self;
        guard.not_ready("not asked yet");
        let task = async move {
            loop {
                match tokio::time::timeout(PROBE_LIMIT, look()).await {
                    Ok(Ok(())) => guard.ready(),
                    Ok(Err(error)) => guard.not_ready(error),
                    Err(_late) => guard.not_ready(format!("no answer within {} s", PROBE_LIMIT.as_secs())),
                }
                tokio::time::sleep(PROBE).await;
            }
        };
        env.spawn(name, Box::pin(task))
    }
}

//! One operator: keeps its views warm, stands for election, and works while it leads.

use std::{sync::Arc, time::Duration};

use basal_ipam::{config::PoolConfig, names::NodeName};
use basal_objects::{
    cache::{Cache, Changes},
    crd_install,
    events::{self, EventRecorder},
    leadership::{Elector, Leadership, LeadershipOptions, Term, TermId},
    ledger,
    object::{Object, resources},
    port::{Objects, ReadError, Scope},
};
use basal_runtime::{
    backoff::{Backoff, Failures},
    controller::{ControllerMetrics, Driver, DriverOptions, TermEnded},
    env::{SharedEnv, TaskHandle},
    failure::chain,
    queue::Queue,
    readiness::{Guard, Readiness},
    sync::lock,
};
use futures::{FutureExt as _, pin_mut, select_biased};
use tokio::{sync::watch, time::Instant};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::{
    denials::{Denials, Noted},
    duties::{self, DutySettings},
    ledger_state,
    metrics::OperatorMetrics,
    node::{
        CiliumNodeFacts, Dangling, NodeController, NodeFacts, Packed, Reporter, Views, drift::FullPass, shared_address,
    },
    pool_state,
    ports::Ports,
    term::{self, BeginError, Begun},
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

/// How long a CustomResourceDefinition may take to be served.
const CRD_LIMIT: Duration = Duration::from_secs(60);

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
            self.candidate(&elector, &views, &stop).await;
            candidacy.cancel();
            task.join().await;
        }
    }

    /// Keeps the views that a leader needs, also while another one leads.
    fn follow(&self, tasks: &mut Tasks) -> Views {
        let Ports { env, objects, store, .. } = &self.ports;
        let all = Scope::default();
        let guard = |name| self.readiness.guard(name);
        let (nodes, task) = Cache::follow(
            objects.as_ref(),
            env.as_ref(),
            resources::NODE,
            &all,
            Packed::<NodeFacts>::new,
            guard("cache of Nodes"),
        );
        tasks.0.push(task);
        let (cilium_nodes, task) = Cache::follow(
            objects.as_ref(),
            env.as_ref(),
            resources::CILIUM_NODE,
            &all,
            Packed::<CiliumNodeFacts>::new,
            guard("cache of CiliumNodes"),
        );
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
                match ledger::check(found.as_ref(), store) {
                    Ok(()) => active.ready(),
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
    async fn candidate(&self, elector: &Elector, views: &Views, stop: &CancellationToken) {
        let mut leadership = elector.leadership();
        loop {
            let term = {
                let (won, stopped) = (won(&mut leadership).fuse(), stop.cancelled().fuse());
                pin_mut!(won, stopped);
                select_biased! { () = stopped => return, term = won => term }
            };
            info!(term = %term.id, "leading");
            self.metrics.set_leader(true);
            let ended = self.lead(elector, views, term, stop).await;
            self.metrics.set_leader(false);
            match ended {
                Ok(()) => info!(term = %term.id, "not leading any more"),
                Err(error) => {
                    warn!(term = %term.id, %error, "the term ended; standing for election anew");
                    return;
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
    ) -> Result<(), TermEnded> {
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
    ) -> Result<(), TermEnded> {
        let mut tasks = Tasks::default();
        let reporter =
            events::Reporter { controller: "basal-operator", instance: self.settings.election.identity.clone() };
        let (recorder, events) = EventRecorder::start(Arc::clone(&ports.objects), &ports.env, reporter);
        tasks.0.push(events);
        let Some(begun) = self.begin(&ports, elector, &recorder, &over).await else { return Ok(()) };
        let reporter = Reporter::new(recorder.clone(), self.metrics.clone());
        views.nodes.wait_synced().await;
        views.cilium_nodes.wait_synced().await;
        views.records.wait_synced().await;
        for loss in &begun.lost {
            reporter.lost(views, loss);
        }
        self.metrics.show(&begun.core);
        tasks.0.extend(ports.store.duties(&ports, self.settings.duties, &recorder, &self.metrics));
        tasks.0.extend(duties::collect_endpoints(&ports, self.settings.duties, &self.metrics));
        tasks.0.push(pool_state::watch(&ports, &begun.core, &recorder));
        let queue = Queue::new(Arc::clone(&ports.env), QUEUE, PAUSES);
        feed(&ports.env, views, &queue, &mut tasks);
        // Nodes that are gone stand in no view any more, only in claims.
        let claimed: Vec<NodeName> = lock(&begun.core).allocator.nodes().cloned().collect();
        let adder = queue.clone();
        tasks.0.push(ports.env.spawn(
            "feed-claims",
            Box::pin(async move {
                for name in claimed {
                    adder.add(name).await;
                }
            }),
        ));
        let sharing = shared_address::watch(views.clone(), reporter.clone(), self.metrics.clone());
        tasks.0.push(ports.env.spawn("shared-addresses", Box::pin(sharing)));
        let pass = FullPass {
            ports: ports.clone(),
            views: views.clone(),
            core: Arc::clone(&begun.core),
            queue: queue.clone(),
            metrics: self.metrics.clone(),
        };
        let controller = Arc::new(NodeController::new(ports, views.clone(), Arc::clone(&begun.core), reporter));
        let driver = Driver::new(controller, begun.core, queue, NODES, self.controllers.clone());
        let stop = over.child_token();
        let (driven, replaced) = (driver.run(stop.clone()).fuse(), pass.run(FULL_PASS).fuse());
        pin_mut!(driven, replaced);
        let ended = select_biased! {
            ended = driven => return ended,
            ended = replaced => ended,
        };
        // What is under way is finished first, as at any other end.
        stop.cancel();
        driven.await?;
        Err(ended)
    }

    /// Begins the term, with growing pauses until it succeeds or the term is over.
    async fn begin(
        &self,
        ports: &Ports,
        elector: &Elector,
        events: &EventRecorder,
        over: &CancellationToken,
    ) -> Option<Begun> {
        let mut failures = Failures::none(PAUSES);
        loop {
            let tried = self.try_begin(ports, elector).fuse();
            let stopped = over.cancelled().fuse();
            pin_mut!(tried, stopped);
            let error = select_biased! {
                () = stopped => return None,
                begun = tried => match begun {
                    Ok(begun) => return Some(begun),
                    Err(error) => error,
                },
            };
            warn!(error = %chain(error.as_ref()), "the term does not begin yet");
            if let Some(error) = error.downcast_ref::<BeginError>().filter(|error| error.needs_somebody()) {
                ledger_state::tell_refused(ports, events, error).await;
            }
            let (pause, stopped) =
                (tokio::time::sleep(failures.next(ports.env.as_ref())).fuse(), over.cancelled().fuse());
            pin_mut!(pause, stopped);
            select_biased! { () = stopped => return None, () = pause => {} }
        }
    }

    async fn try_begin(&self, ports: &Ports, elector: &Elector) -> Result<Begun, anyhow::Error> {
        let Settings { pool, quarantine, node_gc, definitions, .. } = &self.settings;
        crd_install::install(ports.objects.as_ref(), ports.env.as_ref(), definitions, CRD_LIMIT).await?;
        let begun = term::begin(ports, elector, pool, *quarantine).await?;
        lock(&begun.core).dangling = Dangling::new(*node_gc);
        Ok(begun)
    }
}

/// Waits for a term of ours.
async fn won(leadership: &mut watch::Receiver<Leadership>) -> Term {
    loop {
        let term = leadership.borrow_and_update().term(Instant::now());
        if let Some(term) = term {
            return term;
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

/// Puts every name that changes in a view into the queue.
fn feed(env: &SharedEnv, views: &Views, queue: &Queue<NodeName>, tasks: &mut Tasks) {
    let from_cache = |changes: Changes, name: &'static str, queue: Queue<NodeName>| {
        env.spawn(
            name,
            Box::pin(async move {
                loop {
                    for key in changes.next().await {
                        add(&queue, &key.name).await;
                    }
                }
            }),
        )
    };
    tasks.0.push(from_cache(views.nodes.subscribe(), "feed-nodes", queue.clone()));
    tasks.0.push(from_cache(views.cilium_nodes.subscribe(), "feed-ciliumnodes", queue.clone()));
    let (records, queue) = (views.records.clone(), queue.clone());
    tasks.0.push(env.spawn(
        "feed-records",
        Box::pin(async move {
            for name in records.names() {
                add(&queue, &name).await;
            }
            loop {
                for name in records.changes().await {
                    add(&queue, &name).await;
                }
            }
        }),
    ));
}

async fn add(queue: &Queue<NodeName>, name: &str) {
    match NodeName::new(name) {
        Ok(name) => queue.add(name).await,
        Err(error) => warn!(%error, "a record or object has a name that no node can have"),
    }
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

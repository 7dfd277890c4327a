//! What users are told about the ledger: the status of the Ledger object, events on it and on cells, a metric.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex},
    time::Duration,
};

use basal_crds::resources::LedgerStore;
use basal_objects::{
    conditions::Conditions,
    events::{EventRecorder, EventType, Happening, Regarding},
    ledger,
    object::{Object, Resource, resources},
    port::{ObjectEvent, Objects, Scope},
};
use basal_runtime::{
    env::{SharedEnv, TaskHandle},
    failure::Failure as _,
    reason::Reason,
    sync::lock,
};
use futures::{FutureExt as _, StreamExt as _, pin_mut, select_biased, stream};
use serde_json::Value;
use tokio::{
    sync::{oneshot, watch},
    time::Instant,
};
use tracing::{error, info, warn};

use crate::{
    ledger_status,
    metrics::OperatorMetrics,
    moving::{Course, course},
    node::NodeCore,
    pool_state::State,
    ports::Ports,
    term::{BeginError, MOVE_STOPPED},
};

const BEGIN: Reason = Reason::new("BeginTerm");
const WATCH: Reason = Reason::new("WatchCells");
const MOVE: Reason = Reason::new("MoveClaims");
const MOVED: Reason = Reason::new("LedgerMoved");
const MOVE_ASKED: Reason = Reason::new("MoveRequested");
const LEAVING: Reason = Reason::new("LeavingStore");
const AGENTS_CHANGED: Reason = Reason::new("AgentsChanged");
const POOL_CHANGED: Reason = Reason::new("PoolChanged");
const ACTIVE: Reason = Reason::new("Active");
const CELL_DELETION: Reason = Reason::new("CellDeletionRequested");
const CELL_LOST: Reason = Reason::new("CellDeleted");

/// Pause between two counts of the pool: nodes come by the hundred, and each count may be a write.
const PERIOD: Duration = Duration::from_secs(10);

/// What to do about a cell that somebody deletes.
const ADVICE: &str = "its claims count as long as the finalizer basal.io/ledger holds it; to keep it for good, save it \
                      with kubectl get -o yaml, stop the operator, remove the finalizer and create it again";

/// What becomes of a cell that is gone.
const LOST: &str = "the claims in it are read from CiliumNodes again when the next term begins";

/// What happens while agents are changed.
const LEFT: &str = "what they read is kept up in both stores until all are";

/// What is to be done then.
const CHANGED: &str = "nobody needs the other store any more. Take spec.leaving away, or etcd from the operators where it is \
                       etcd that is left";

/// An object as what an event is about.
fn regarding(resource: Resource, object: &Object) -> Regarding {
    Regarding { resource, key: object.key(), uid: object.uid().to_owned() }
}

async fn read(ports: &Ports) -> Option<Object> {
    let key = ledger::key(ports.cluster.name().as_str());
    ports.objects.get(resources::LEDGER, &key).await.ok().flatten()
}

/// Tells on the Ledger why no term begins.
pub(crate) async fn tell_refused(ports: &Ports, events: &EventRecorder, error: &BeginError) {
    let reason = error.reason();
    let Some(object) = read(ports).await else { return };
    events.record(Happening {
        regarding: regarding(resources::LEDGER, &object),
        event_type: EventType::Warning,
        reason,
        action: BEGIN,
        note: error.to_string(),
        shared: None,
    });
    if reason == MOVE_STOPPED {
        show(ports, &object, |conditions| conditions.stalled(reason, &error.to_string())).await;
    }
}

/// Tells on the Ledger that the claims are in another store now.
pub(crate) async fn tell_moved(ports: &Ports, events: &EventRecorder, from: LedgerStore, to: LedgerStore) {
    let note = format!("the claims were moved from {} to {}", from.as_str(), to.as_str());
    info!("{note}");
    let Some(object) = read(ports).await else { return };
    events.record(Happening {
        regarding: regarding(resources::LEDGER, &object),
        event_type: EventType::Normal,
        reason: MOVED,
        action: MOVE,
        note,
        shared: None,
    });
}

/// Shows in the Ledger's conditions how far a move is.
pub(crate) async fn show_step(ports: &Ports, step: Reason, message: &str) {
    if let Some(object) = read(ports).await {
        show(ports, &object, |conditions| conditions.reconciling(step, message)).await;
    }
}

/// Writes conditions once.
async fn show(ports: &Ports, object: &Object, set: impl FnOnce(&mut Conditions)) {
    let written =
        ledger_status::write(ports.objects.as_ref(), ports.env.as_ref(), object, |_, conditions| set(conditions));
    if let Err(why) = written.await {
        warn!(why, "the status of the Ledger was not written");
    }
}

/// Follows the Ledger and its cells for one term, and keeps its status: how the pool is, and whether anybody has to do
/// something. A deletion of a cell is also told on that, and by a metric. The answer comes when the Ledger says something
/// else than what the term was begun for: where the claims are, or that they are to be moved.
pub(crate) fn watch(
    ports: &Ports,
    work: Work,
    core: &Arc<Mutex<NodeCore>>,
    agents: watch::Receiver<Agents>,
    (events, metrics): (&EventRecorder, &OperatorMetrics),
) -> (TaskHandle, oneshot::Receiver<String>) {
    let (ended, end) = oneshot::channel();
    let watcher = Watcher {
        work,
        ended: Some(ended),
        core: Arc::clone(core),
        agents,
        env: Arc::clone(&ports.env),
        objects: Arc::clone(&ports.objects),
        cluster: ports.cluster.name().as_str().to_owned(),
        events: events.clone(),
        metrics: metrics.clone(),
        ledger: None,
        condemned: BTreeMap::new(),
        listed: BTreeSet::new(),
        in_sync: false,
    };
    (ports.env.spawn("ledger-state", Box::pin(watcher.run())), end)
}

/// What a term was begun for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Work {
    /// The store that the operator is configured for.
    pub(crate) home: LedgerStore,
    /// The store that it grants out of.
    pub(crate) store: LedgerStore,
    /// Whether it keeps the records in the other one up.
    pub(crate) bridged: bool,
}

/// How many agents work with the active store.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Agents {
    /// Those that say so.
    pub(crate) changed: usize,
    /// All that there are.
    pub(crate) all: usize,
}

struct Watcher {
    work: Work,
    ended: Option<oneshot::Sender<String>>,
    core: Arc<Mutex<NodeCore>>,
    /// Counted while a store is left.
    agents: watch::Receiver<Agents>,
    env: SharedEnv,
    objects: Arc<dyn Objects>,
    cluster: String,
    events: EventRecorder,
    metrics: OperatorMetrics,
    /// The Ledger as it was seen or written last.
    ledger: Option<Object>,
    /// Cells that somebody wants to delete: name to prefix.
    condemned: BTreeMap<String, String>,
    /// Cells in the list that is under way.
    listed: BTreeSet<String>,
    in_sync: bool,
}

impl Watcher {
    async fn run(mut self) {
        let all = Scope::default();
        let ledgers = self.objects.watch(resources::LEDGER, &all).map(|event| (resources::LEDGER, event));
        let cells = self.objects.watch(resources::POD_CIDR_CELL, &all).map(|event| (resources::POD_CIDR_CELL, event));
        let mut changes = stream::select(ledgers, cells).fuse();
        let mut pool = State::of(&lock(&self.core).allocator);
        let mut due = Instant::now() + PERIOD;
        // After a write that failed the next one waits for the next count.
        let mut waits = false;
        loop {
            let tick = tokio::time::sleep_until(due).fuse();
            pin_mut!(tick);
            select_biased! {
                () = tick => {
                    pool = State::of(&lock(&self.core).allocator);
                    due = Instant::now() + PERIOD;
                    waits = false;
                }
                change = changes.next() => match change {
                    Some((resource, Ok(event))) if resource == resources::LEDGER => self.see_ledger(event),
                    Some((_, Ok(event))) => self.see_cells(event),
                    Some((resource, Err(error))) => {
                        warn!(%error, resource = resource.plural, "the state of the ledger is not watched");
                        continue;
                    }
                    None => return,
                },
            }
            if !waits && let Err(why) = self.write_status(&pool).await {
                warn!(why, "the status of the Ledger was not written");
                waits = true;
            }
        }
    }

    fn see_ledger(&mut self, event: ObjectEvent) {
        match event {
            ObjectEvent::Listed(object) | ObjectEvent::Applied(object) if object.name() == self.cluster => {
                self.compare(&object);
                self.ledger = Some(object);
            }
            ObjectEvent::Deleted(object) if object.name() == self.cluster => self.ledger = None,
            _ => {}
        }
    }

    /// Ends the term when it was begun for something else.
    fn compare(&mut self, object: &Object) {
        let Work { home, store, bridged } = self.work;
        let Ok(standing) = ledger::standing(Some(object)) else { return };
        let now = course(home, standing.as_ref());
        if now != (Course::Serve { store, bridged })
            && let Some(ended) = self.ended.take()
        {
            // Nobody listens any more when the term ends anyway.
            drop(ended.send(now.to_string()));
        }
    }

    fn see_cells(&mut self, event: ObjectEvent) {
        match event {
            ObjectEvent::Restarted => self.listed.clear(),
            ObjectEvent::Listed(object) => {
                self.listed.insert(object.name().to_owned());
                self.see_cell(&object);
            }
            ObjectEvent::InSync => {
                self.condemned.retain(|name, _| self.listed.contains(name));
                self.in_sync = true;
            }
            ObjectEvent::Applied(object) => self.see_cell(&object),
            ObjectEvent::Deleted(object) => self.see_end(&object),
        }
        self.metrics.set_condemned(self.condemned.len());
    }

    fn is_ours(&self, object: &Object) -> bool {
        object.0.pointer("/spec/cluster").and_then(Value::as_str) == Some(self.cluster.as_str())
    }

    fn see_cell(&mut self, object: &Object) {
        if !self.is_ours(object) || !object.is_deleting() {
            return;
        }
        let prefix = object.0.pointer("/spec/prefix").and_then(Value::as_str).unwrap_or_default().to_owned();
        if self.condemned.insert(object.name().to_owned(), prefix).is_none() {
            warn!(cell = object.name(), "somebody wants to delete a cell of the ledger; {ADVICE}");
            self.tell(object, CELL_DELETION, ADVICE);
        }
    }

    fn see_end(&mut self, object: &Object) {
        if self.is_ours(object) {
            self.condemned.remove(object.name());
            error!(cell = object.name(), "a cell of the ledger was deleted; {LOST}");
            self.tell(object, CELL_LOST, LOST);
        }
    }

    fn tell(&self, object: &Object, reason: Reason, note: &str) {
        let regarding = regarding(resources::POD_CIDR_CELL, object);
        let (event_type, action, note) = (EventType::Warning, WATCH, note.to_owned());
        self.events.record(Happening { regarding, event_type, reason, action, note, shared: None });
    }

    /// Writes the status of the Ledger, if it changes.
    async fn write_status(&mut self, pool: &State) -> Result<(), String> {
        let Some(object) = self.ledger.as_ref().filter(|_| self.in_sync && self.ended.is_some()) else { return Ok(()) };
        let mut change = None;
        let written = ledger_status::write(self.objects.as_ref(), self.env.as_ref(), object, |status, conditions| {
            change = pool.change(status);
            pool.tell(status, conditions);
            self.judge(conditions);
        });
        let Some(object) = written.await? else { return Ok(()) };
        if let Some(note) = change {
            info!(note, "another pool than in the last term");
            let (regarding, event_type) = (regarding(resources::LEDGER, &object), EventType::Normal);
            let (reason, action) = (POOL_CHANGED, BEGIN);
            self.events.record(Happening { regarding, event_type, reason, action, note, shared: None });
        }
        self.ledger = Some(object);
        Ok(())
    }

    fn judge(&self, conditions: &mut Conditions) {
        let Work { home, store, bridged } = self.work;
        let kept = format!("claims are kept in {}", store.as_str());
        let standing = self.ledger.as_ref().and_then(|object| ledger::standing(Some(object)).ok().flatten());
        let waits = standing.and_then(|standing| standing.move_to).filter(|_| home == LedgerStore::CustomResources);
        if store == LedgerStore::CustomResources && !self.condemned.is_empty() {
            let cells: Vec<&str> = self.condemned.values().map(String::as_str).collect();
            let message = format!("somebody wants to delete the cells {}: {ADVICE}", cells.join(", "));
            conditions.stalled(CELL_DELETION, &message);
        } else if let Some(to) = waits {
            let to = to.as_str();
            conditions.ready(MOVE_ASKED, &format!("{kept}; an operator that reaches {to} as well moves them there"));
        } else if bridged {
            let Agents { changed, all } = *self.agents.borrow();
            let changed_all = changed == all && all > 0;
            let (reason, advice) = if changed_all { (AGENTS_CHANGED, CHANGED) } else { (LEAVING, LEFT) };
            conditions.ready(reason, &format!("{kept}; {changed} of {all} agents are changed: {advice}"));
        } else {
            conditions.ready(ACTIVE, &kept);
        }
    }
}

//! What users are told about the ledger: the conditions of the Ledger object, events on it and on cells, a metric.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use basal_crds::resources::{Ledger, LedgerStore};
use basal_objects::{
    conditions::{Conditions, same_but_for_times},
    events::{EventRecorder, EventType, Happening, Regarding},
    ledger,
    object::{Object, Resource, resources},
    port::{MergePatch, ObjectEvent, Objects, Refusal, Scope},
};
use basal_runtime::{
    env::{Env, SharedEnv, TaskHandle},
    failure::Failure as _,
    outcome::Outcome,
    reason::Reason,
};
use futures::{StreamExt as _, stream};
use serde_json::{Value, json};
use tokio::sync::oneshot;
use tracing::{error, info, warn};

use crate::{
    metrics::OperatorMetrics,
    moving::{Course, course},
    ports::Ports,
    term::{BeginError, MOVE_STOPPED},
};

const BEGIN: Reason = Reason::new("BeginTerm");
const WATCH: Reason = Reason::new("WatchCells");
const MOVE: Reason = Reason::new("MoveClaims");
const MOVED: Reason = Reason::new("LedgerMoved");
const MOVE_ASKED: Reason = Reason::new("MoveRequested");
const LEAVING: Reason = Reason::new("LeavingStore");
const ACTIVE: Reason = Reason::new("Active");
const CELL_DELETION: Reason = Reason::new("CellDeletionRequested");
const CELL_LOST: Reason = Reason::new("CellDeleted");

/// Pause before the status is written again after it was not.
const PAUSE: Duration = Duration::from_secs(10);

/// What to do about a cell that somebody deletes.
const ADVICE: &str = "its claims count as long as the finalizer basal.io/ledger holds it; to keep it for good, save it \
                      with kubectl get -o yaml, stop the operator, remove the finalizer and create it again";

/// What becomes of a cell that is gone.
const LOST: &str = "the claims in it are read from CiliumNodes again when the next term begins";

/// What is to be done after a move.
const LEFT: &str = "what agents read is kept up in the other store too: change the agents, then take spec.leaving away \
                    (an operator without etcd does that itself)";

/// An object as what an event is about.
pub(crate) fn regarding(resource: Resource, object: &Object) -> Regarding {
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

/// Writes conditions once. They are for people: what is done does not depend on them.
async fn show(ports: &Ports, object: &Object, set: impl FnOnce(&mut Conditions)) {
    if let Err(why) = write_status(ports.objects.as_ref(), ports.env.as_ref(), object, set).await {
        warn!(why, "the status of the Ledger was not written");
    }
}

/// Writes the conditions of a Ledger as it was seen, if they change; answers the Ledger as it is then.
async fn write_status(
    objects: &dyn Objects,
    env: &dyn Env,
    object: &Object,
    set: impl FnOnce(&mut Conditions),
) -> Result<Option<Object>, String> {
    let Ok(ledger) = object.parse::<Ledger>() else { return Ok(None) };
    let before = ledger.status.conditions;
    let mut conditions = Conditions::of(before.clone(), object.generation(), env.now());
    set(&mut conditions);
    let conditions = conditions.into_list();
    if same_but_for_times(&before, &conditions) {
        return Ok(None);
    }
    let status = json!({ "observedGeneration": object.generation(), "conditions": conditions });
    let patch = MergePatch {
        resource_version: object.resource_version().to_owned(),
        uid: object.uid().to_owned(),
        subresource: Some("status"),
        body: json!({ "status": status }),
    };
    match objects.patch(resources::LEDGER, &object.key(), patch).await {
        Outcome::Done(object) => Ok(Some(object)),
        // The change that was first comes by the watch.
        Outcome::Refused(Refusal::Conflict(_) | Refusal::NotFound(_)) => Ok(None),
        Outcome::Refused(refusal) => Err(refusal.to_string()),
        Outcome::Unknown(why) => Err(why),
    }
}

/// Follows the Ledger and its cells for one term: a deletion is told on the cell, in the Ledger's conditions, and by a
/// metric. The answer comes when the Ledger says something else than what the term was begun for: where the claims are, or
/// that they are to be moved.
pub(crate) fn watch(
    ports: &Ports,
    work: Work,
    events: &EventRecorder,
    metrics: &OperatorMetrics,
) -> (TaskHandle, oneshot::Receiver<String>) {
    let (ended, end) = oneshot::channel();
    let watcher = Watcher {
        work,
        ended: Some(ended),
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

struct Watcher {
    work: Work,
    ended: Option<oneshot::Sender<String>>,
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
        let mut changes = stream::select(ledgers, cells);
        while let Some((resource, event)) = changes.next().await {
            match event {
                Ok(event) if resource == resources::LEDGER => self.see_ledger(event),
                Ok(event) => self.see_cells(event),
                Err(error) => {
                    warn!(%error, resource = resource.plural, "the state of the ledger is not watched");
                    continue;
                }
            }
            while let Err(why) = self.write_status().await {
                warn!(why, "the status of the Ledger was not written");
                tokio::time::sleep(PAUSE).await;
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

    /// Writes the conditions of the Ledger, if they changed.
    async fn write_status(&mut self) -> Result<(), String> {
        let Some(object) = self.ledger.as_ref().filter(|_| self.in_sync && self.ended.is_some()) else { return Ok(()) };
        let written =
            write_status(self.objects.as_ref(), self.env.as_ref(), object, |conditions| self.judge(conditions));
        if let Some(object) = written.await? {
            self.ledger = Some(object);
        }
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
            conditions.ready(LEAVING, &format!("{kept}; {LEFT}"));
        } else {
            conditions.ready(ACTIVE, &kept);
        }
    }
}

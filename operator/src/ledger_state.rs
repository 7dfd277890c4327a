//! What users are told about the ledger: the conditions of the Ledger object, events on it and on cells, a metric.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use basal_crds::resources::Ledger;
use basal_objects::{
    conditions::{Conditions, same_but_for_times},
    events::{EventRecorder, EventType, Happening, Regarding},
    ledger,
    object::{Object, Resource, resources},
    port::{MergePatch, ObjectEvent, Objects, Refusal, Scope},
};
use basal_runtime::{
    env::{SharedEnv, TaskHandle},
    failure::Failure as _,
    outcome::Outcome,
    reason::Reason,
};
use futures::{StreamExt as _, stream};
use serde_json::{Value, json};
use tracing::{error, warn};

use crate::{metrics::OperatorMetrics, ports::Ports, term::BeginError};

const BEGIN: Reason = Reason::new("BeginTerm");
const WATCH: Reason = Reason::new("WatchCells");
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

/// An object as what an event is about.
pub(crate) fn regarding(resource: Resource, object: &Object) -> Regarding {
    Regarding { resource, key: object.key(), uid: object.uid().to_owned() }
}

/// Tells on the Ledger why this operator's term does not begin.
pub(crate) async fn tell_refused(ports: &Ports, events: &EventRecorder, error: &BeginError) {
    let key = ledger::key(ports.cluster.name().as_str());
    let Ok(Some(object)) = ports.objects.get(resources::LEDGER, &key).await else { return };
    events.record(Happening {
        regarding: regarding(resources::LEDGER, &object),
        event_type: EventType::Warning,
        reason: error.reason(),
        action: BEGIN,
        note: error.to_string(),
        shared: None,
    });
}

/// Follows the Ledger and its cells for one term: a deletion is told on the cell, in the Ledger's conditions, and by a
/// metric.
pub(crate) fn watch(ports: &Ports, events: &EventRecorder, metrics: &OperatorMetrics) -> TaskHandle {
    let watcher = Watcher {
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
    ports.env.spawn("ledger-state", Box::pin(watcher.run()))
}

struct Watcher {
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
                self.ledger = Some(object);
            }
            ObjectEvent::Deleted(object) if object.name() == self.cluster => self.ledger = None,
            _ => {}
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
        let Some(object) = self.ledger.as_ref().filter(|_| self.in_sync) else { return Ok(()) };
        let Ok(ledger) = object.parse::<Ledger>() else { return Ok(()) };
        let before = ledger.status.conditions;
        let mut conditions = Conditions::of(before.clone(), object.generation(), self.env.now());
        if self.condemned.is_empty() {
            conditions.ready(ACTIVE, &format!("claims are kept in {}", ledger.spec.store.as_str()));
        } else {
            let cells: Vec<&str> = self.condemned.values().map(String::as_str).collect();
            let message = format!("somebody wants to delete the cells {}: {ADVICE}", cells.join(", "));
            conditions.stalled(CELL_DELETION, &message);
        }
        let conditions = conditions.into_list();
        if same_but_for_times(&before, &conditions) {
            return Ok(());
        }
        let status = json!({ "observedGeneration": object.generation(), "conditions": conditions });
        let patch = MergePatch {
            resource_version: object.resource_version().to_owned(),
            uid: object.uid().to_owned(),
            subresource: Some("status"),
            body: json!({ "status": status }),
        };
        match self.objects.patch(resources::LEDGER, &object.key(), patch).await {
            Outcome::Done(object) => {
                self.ledger = Some(object);
                Ok(())
            }
            // The change that was first comes by the watch.
            Outcome::Refused(Refusal::Conflict(_) | Refusal::NotFound(_)) => Ok(()),
            Outcome::Refused(refusal) => Err(refusal.to_string()),
            Outcome::Unknown(why) => Err(why),
        }
    }
}

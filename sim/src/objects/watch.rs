//! Watches of [`ModelObjects`]: a list, then the changes; a list again after a gap.

use std::{collections::VecDeque, sync::Arc};

use basal_kvstore::kv::Revision;
use basal_objects::{
    object::{Object, Resource},
    port::{ObjectEvent, ReadError, Scope},
};
use futures::{
    StreamExt as _,
    stream::{self, BoxStream},
};
use serde_json::Value;
use tokio::time::Instant;

use super::{ModelObjects, OldCache, State, kinds, selector::Selector, stamped};
use crate::store::{Change, NoSuchRevision};

struct Watch {
    objects: ModelObjects,
    resource: Resource,
    scope: Scope,
    place: Place,
    ready: VecDeque<Result<ObjectEvent, ReadError>>,
}

/// Where a watch stands.
#[derive(Clone, Copy)]
enum Place {
    /// Before its list.
    Outside,
    /// The list failed at this revision; it is tried again when the store has changed.
    Failed(Revision),
    /// Every change below `next` was delivered. Of the epoch it notices when it was cut.
    Inside { next: Revision, epoch: u64 },
}

pub(super) fn follow(
    objects: ModelObjects,
    resource: Resource,
    scope: Scope,
) -> BoxStream<'static, Result<ObjectEvent, ReadError>> {
    let watch = Watch { objects, resource, scope, place: Place::Outside, ready: VecDeque::new() };
    stream::unfold(watch, |mut watch| async move {
        let item = watch.next_item().await;
        Some((item, watch))
    })
    .boxed()
}

impl Watch {
    async fn next_item(&mut self) -> Result<ObjectEvent, ReadError> {
        loop {
            let objects = self.objects.clone();
            let changed = objects.server.changed.notified();
            let old = {
                let state = objects.state();
                let old = state.old_cache.filter(|cache| Instant::now() < cache.until);
                self.look(&state, old);
                old
            };
            match (self.ready.pop_front(), old) {
                (Some(item), _) => return item,
                (None, None) => changed.await,
                // Running into the time-out is as good as a change: the cache goes on.
                (None, Some(old)) => tokio::time::timeout_at(old.until, changed).await.unwrap_or_default(),
            }
        }
    }

    fn look(&mut self, state: &State, old: Option<OldCache>) {
        if !self.ready.is_empty() {
            return;
        }
        match self.place {
            // A new watch asks the store, as the port promises.
            Place::Outside => self.list(state, None),
            Place::Failed(revision) if revision != state.store.revision() => self.list(state, None),
            Place::Failed(_) => {}
            Place::Inside { epoch, .. } if epoch != state.watch_epoch => self.list(state, old),
            Place::Inside { .. } if old.is_some() => {}
            Place::Inside { next, .. } => match self.changes(state, next) {
                Ok(()) => self.place = Place::Inside { next: state.store.revision() + 1, epoch: state.watch_epoch },
                Err(_gone) => self.list(state, None),
            },
        }
    }

    fn list(&mut self, state: &State, old: Option<OldCache>) {
        let earlier = old.and_then(|old| Some(State { store: state.store.at(old.revision).ok()?, ..State::default() }));
        // A server that does not know the kind yet has no cache of it, and asks the store.
        let earlier = earlier.filter(|earlier| earlier.facts(&self.resource).is_ok());
        let shown = earlier.as_ref().unwrap_or(state);
        match shown.list(&self.resource, &self.scope) {
            Ok(items) => {
                self.ready.push_back(Ok(ObjectEvent::Restarted));
                self.ready.extend(items.into_iter().map(|object| Ok(ObjectEvent::Listed(object))));
                self.ready.push_back(Ok(ObjectEvent::InSync));
                self.place = Place::Inside { next: shown.store.revision() + 1, epoch: state.watch_epoch };
            }
            Err(error) => {
                self.ready.push_back(Err(error));
                self.place = Place::Failed(state.store.revision());
            }
        }
    }

    fn changes(&mut self, state: &State, next: Revision) -> Result<(), NoSuchRevision> {
        let Ok(selector) = Selector::parse(&self.scope) else { return Ok(()) };
        let prefix = kinds::key(&self.resource, selector.namespace.as_deref(), "");
        let mine = state.store.changes_since(next)?.iter().filter(|change| change.key.starts_with(&prefix));
        let events = mine.filter_map(|change| event(&selector, change)).map(Ok);
        self.ready.extend(events);
        Ok(())
    }
}

/// An object that leaves the selection looks deleted, one that enters it looks applied.
fn event(selector: &Selector, change: &Change<Arc<Value>>) -> Option<ObjectEvent> {
    let seen = |object: &Object| selector.matches(object);
    let before = change.before.as_ref().map(|stored| stamped(&stored.value, change.revision)).filter(seen);
    let after = change.after.as_ref().map(|stored| stamped(&stored.value, change.revision)).filter(seen);
    match (before, after) {
        (_, Some(object)) => Some(ObjectEvent::Applied(object)),
        (Some(object), None) => Some(ObjectEvent::Deleted(object)),
        (None, None) => None,
    }
}

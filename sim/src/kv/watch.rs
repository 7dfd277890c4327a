//! Watches of [`ModelKv`].

use basal_kvstore::kv::{KvError, Revision, WatchBatch, WatchEvent};
use futures::{
    StreamExt as _,
    stream::{self, BoxStream},
};
use tokio::time::Instant;

use super::{ModelKv, State, txn};
use crate::store::Change;

struct Watch {
    kv: ModelKv,
    prefix: String,
    next: Revision,
    epoch: u64,
    ended: bool,
}

enum Look {
    Batch(WatchBatch),
    Broken(KvError),
    /// Nothing new; the first lease ends then.
    Nothing(Option<Instant>),
}

/// Follows a prefix from a revision on; 0 means from now on.
pub(super) fn follow(kv: ModelKv, prefix: String, from: Revision) -> BoxStream<'static, Result<WatchBatch, KvError>> {
    let (next, epoch) = {
        let state = kv.state();
        (if from > 0 { from } else { state.store.revision() + 1 }, state.watch_epoch)
    };
    let watch = Watch { kv, prefix, next, epoch, ended: false };
    stream::unfold(watch, |mut watch| async move {
        if watch.ended {
            return None;
        }
        let item = watch.next_item().await;
        watch.ended = item.is_err();
        Some((item, watch))
    })
    .boxed()
}

impl Watch {
    async fn next_item(&mut self) -> Result<WatchBatch, KvError> {
        loop {
            let kv = self.kv.clone();
            let changed = kv.server.changed.notified();
            let look = self.look(&kv.state());
            match look {
                Look::Batch(batch) => return Ok(batch),
                Look::Broken(error) => return Err(error),
                Look::Nothing(None) => changed.await,
                // Running into the time-out is as good as a change: a lease has ended.
                Look::Nothing(Some(expiry)) => tokio::time::timeout_at(expiry, changed).await.unwrap_or_default(),
            }
        }
    }

    fn look(&mut self, state: &State) -> Look {
        if state.watch_epoch != self.epoch {
            return Look::Broken(KvError::Unavailable("the watch was cut".to_owned()));
        }
        let changes = match state.store.changes_since(self.next) {
            Ok(changes) => changes,
            Err(error) => return Look::Broken(txn::read_error(error)),
        };
        let events: Vec<WatchEvent> =
            changes.iter().filter(|change| change.key.starts_with(&self.prefix)).map(event).collect();
        self.next = self.next.max(state.store.revision() + 1);
        if events.is_empty() {
            Look::Nothing(state.next_expiry())
        } else {
            Look::Batch(WatchBatch { header: state.header(), events })
        }
    }
}

fn event(change: &Change<txn::Bytes>) -> WatchEvent {
    match &change.after {
        Some(stored) => WatchEvent::Put(txn::key_value(&change.key, stored)),
        None => WatchEvent::Delete { key: change.key.clone(), mod_revision: change.revision },
    }
}

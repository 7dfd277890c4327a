//! List, then watch, for ever: the keys with a prefix as a stream of whole listings and of changes.
//!
//! After every interruption (compaction, a lost connection, a refusal) the prefix is listed again and compared with
//! what was known. What is missing then is handed over as *one* list, never as single deletions, so that a consumer
//! sees an emptied or replaced store for what it is and decides; `basal_crds::directory::patience` is the usual decision.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use basal_runtime::{
    backoff::{Backoff, Failures},
    env::SharedEnv,
};
use futures::{
    StreamExt,
    stream::{self, BoxStream},
};
use tokio::time::Instant;

use crate::{
    kv::{Header, KeyValue, Kv, KvError, Revision, WatchBatch, WatchEvent},
    pages::{Listed, PAGE_SIZE, list},
};

/// Waits between attempts: Cilium's.
const BACKOFF: Backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(60));

/// A watch that lived so long was a good one: the next interruption starts with short waits again.
const GOOD_WATCH: Duration = Duration::from_secs(10);

/// What is followed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListWatch {
    /// What all keys start with. A `/` is put behind it unless it has one.
    pub prefix: String,
    /// Keys in one page of a list; 0 means all at once.
    pub page_size: i64,
}

impl ListWatch {
    /// Follows a prefix with Cilium's page size.
    pub fn new(prefix: impl Into<String>) -> Self {
        Self { prefix: prefix.into(), page_size: PAGE_SIZE }
    }
}

/// What the stream says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Update {
    /// The prefix was listed. Once at the start, and once after every interruption.
    Listed(Listing),
    /// Changes since the last update, oldest first; never empty.
    Changed(WatchBatch),
    /// The store cannot be followed at the moment; what is known may be old until the next `Listed`.
    Interrupted(KvError),
}

/// A complete listing, compared with what was known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listing {
    /// The store's state, at the revision of the listing.
    pub header: Header,
    /// The keys that are new or were written since, in ascending order of bytes.
    pub changed: Vec<KeyValue>,
    /// The keys that were known and are not there any more.
    pub missing: Vec<String>,
    /// How many keys there are.
    pub total: usize,
    /// True when this is not the store that was followed before: another cluster id, or a revision that fell. Then
    /// `changed` holds every key.
    pub replaced: bool,
}

impl Listing {
    /// True when the store lost everything that was known, which no orderly operation does.
    #[must_use]
    pub fn is_emptied(&self) -> bool {
        self.total == 0 && !self.missing.is_empty()
    }
}

/// Follows a prefix. The stream has no end; dropping it stops everything.
pub fn list_watch(env: SharedEnv, kv: Arc<dyn Kv>, what: ListWatch) -> BoxStream<'static, Update> {
    let mut prefix = what.prefix;
    if !prefix.ends_with('/') {
        prefix.push('/');
    }
    let follower = Follower {
        env,
        kv,
        prefix,
        page_size: what.page_size,
        known: BTreeMap::new(),
        store: None,
        failures: Failures::none(BACKOFF),
        phase: Phase::List { not_before: None },
    };
    stream::unfold(follower, Follower::next).boxed()
}

struct Follower {
    env: SharedEnv,
    kv: Arc<dyn Kv>,
    prefix: String,
    page_size: i64,
    /// Every key that the consumer knows of, with the revision of its last write.
    known: BTreeMap<String, Revision>,
    /// The newest state that was seen.
    store: Option<Header>,
    failures: Failures,
    phase: Phase,
}

enum Phase {
    List { not_before: Option<Instant> },
    Watch { stream: BoxStream<'static, Result<WatchBatch, KvError>>, since: Instant },
}

impl Follower {
    async fn next(mut self) -> Option<(Update, Self)> {
        loop {
            let update = match &mut self.phase {
                Phase::List { not_before } => {
                    if let Some(time) = *not_before {
                        tokio::time::sleep_until(time).await;
                    }
                    match list(&*self.kv, &self.prefix, self.page_size, false).await {
                        Ok(Listed { header, kvs }) => {
                            let stream = self.kv.watch(&self.prefix, header.revision + 1);
                            self.phase = Phase::Watch { stream, since: Instant::now() };
                            Some(Update::Listed(self.compare(header, kvs)))
                        }
                        Err(error) => Some(self.interrupted(error)),
                    }
                }
                Phase::Watch { stream, since } => {
                    let since = *since;
                    match stream.next().await {
                        Some(Ok(batch)) if self.is_same_store(&batch) => self.changed(batch),
                        Some(Ok(_)) => {
                            Some(self.interrupted(KvError::Unavailable("etcd was replaced by another".to_owned())))
                        }
                        end => {
                            if since.elapsed() >= GOOD_WATCH {
                                self.failures.reset();
                            }
                            let ended = || KvError::Unavailable("the watch ended".to_owned());
                            Some(self.interrupted(end.and_then(Result::err).unwrap_or_else(ended)))
                        }
                    }
                }
            };
            if let Some(update) = update {
                return Some((update, self));
            }
        }
    }

    fn is_same_store(&self, batch: &WatchBatch) -> bool {
        self.store.is_none_or(|store| store.cluster_id == batch.header.cluster_id)
    }

    fn interrupted(&mut self, error: KvError) -> Update {
        let wait = self.failures.next(&*self.env);
        tracing::debug!(prefix = self.prefix, %error, ?wait, "listing again");
        self.phase = Phase::List { not_before: Some(Instant::now() + wait) };
        Update::Interrupted(error)
    }

    /// What a listing changes, seen from what was known.
    fn compare(&mut self, header: Header, kvs: Vec<KeyValue>) -> Listing {
        let replaced =
            self.store.is_some_and(|seen| seen.cluster_id != header.cluster_id || header.revision < seen.revision);
        self.store = Some(header);
        let listed: BTreeMap<_, _> = kvs.iter().map(|kv| (kv.key.clone(), kv.mod_revision)).collect();
        let known = std::mem::replace(&mut self.known, listed);
        let total = kvs.len();
        let missing = known.keys().filter(|key| !self.known.contains_key(*key)).cloned().collect();
        let changed = kvs.into_iter().filter(|kv| replaced || known.get(&kv.key) != Some(&kv.mod_revision)).collect();
        Listing { header, changed, missing, total, replaced }
    }

    fn changed(&mut self, batch: WatchBatch) -> Option<Update> {
        self.store = Some(batch.header);
        if batch.events.is_empty() {
            return None;
        }
        self.failures.reset();
        for event in &batch.events {
            match event {
                WatchEvent::Put(kv) => self.known.insert(kv.key.clone(), kv.mod_revision),
                WatchEvent::Delete { key, .. } => self.known.remove(key),
            };
        }
        Some(Update::Changed(batch))
    }
}

//! The full pass over the servers themselves: what they hold and no watch told is drift. It is counted, and mended
//! where it was found, in the views and in the allocator; the control loop then does what it does after any change.
//!
//! A watch may be late, and that is no drift. So what differs is looked at again after a while, and counts only if the
//! server still holds the very state that was read first.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex},
    time::Duration,
};

use basal_ipam::names::NodeName;
use basal_kvstore::kv::Revision;
use basal_objects::{
    cache::{Cache, Version},
    object::{Object, ObjectKey},
    port::{Freshness, ObjectEvent, ReadError, Scope, gather},
};
use basal_runtime::{
    controller::TermEnded,
    failure::{Failure as _, Retry},
    queue::Queue,
    sync::lock,
};
use serde_json::json;
use tokio::time::Instant;
use tracing::warn;

use super::{controller::NodeCore, error::NodeError, views::Views};
use crate::{metrics::OperatorMetrics, ports::Ports};

/// How long a watch may be late.
const LATE: Duration = Duration::from_secs(10);

/// What drifted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Drift {
    /// A Node.
    Node,
    /// A CiliumNode.
    CiliumNode,
    /// A node record.
    Record,
    /// A cell of the ledger.
    Ledger,
}

impl Drift {
    /// All there are.
    pub const ALL: [Self; 4] = [Self::Node, Self::CiliumNode, Self::Record, Self::Ledger];

    /// The word for metrics.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Node => "node",
            Self::CiliumNode => "cilium_node",
            Self::Record => "record",
            Self::Ledger => "ledger",
        }
    }
}

/// A server could not be read.
#[derive(Debug, thiserror::Error)]
enum PassError {
    #[error(transparent)]
    Objects(#[from] ReadError),
    #[error(transparent)]
    Claims(#[from] NodeError),
}

/// The full pass of one term.
pub(crate) struct FullPass {
    pub(crate) ports: Ports,
    pub(crate) views: Views,
    pub(crate) core: Arc<Mutex<NodeCore>>,
    pub(crate) queue: Queue<NodeName>,
    pub(crate) metrics: OperatorMetrics,
}

impl FullPass {
    /// Passes again and again, until it shows that the store of the ledger was put back, or that the fence holds no term or
    /// another one. The term is over then, and nobody else notices where no node has anything to do.
    pub(crate) async fn run(self, every: Duration) -> TermEnded {
        loop {
            tokio::time::sleep(every).await;
            match self.pass().await {
                Ok(()) => {}
                Err(PassError::Claims(error)) if error.retry() == Retry::EndTerm => {
                    self.count(Drift::Ledger, &error.to_string());
                    return TermEnded { controller: "full-pass", key: "ledger".to_owned(), message: error.to_string() };
                }
                Err(error) => warn!(%error, "the full pass was cut short; the next one looks again"),
            }
        }
    }

    async fn pass(&self) -> Result<(), PassError> {
        self.ledger().await?;
        self.objects(Drift::Node, &self.views.nodes).await?;
        self.objects(Drift::CiliumNode, &self.views.cilium_nodes).await?;
        self.records().await
    }

    fn count(&self, what: Drift, which: &str) {
        warn!(kind = what.as_str(), which, "it changed, and no watch told");
        self.metrics.upkeep.drifted(what);
    }

    /// Nobody but this term writes the ledger, so no watch follows it.
    async fn ledger(&self) -> Result<(), NodeError> {
        let loaded = self.ports.ledger.load().await?;
        let (differing, nodes) = {
            let mut core = lock(&self.core);
            if !loaded.fence.holds(core.allocator.term()) {
                return Err(NodeError::FenceLost);
            }
            let mut nodes: BTreeSet<NodeName> = core.allocator.nodes().cloned().collect();
            let differing = core.compare(&loaded, Instant::now());
            nodes.extend(core.allocator.nodes().cloned());
            (differing, nodes)
        };
        for cell in &differing {
            self.count(Drift::Ledger, &cell.to_string());
        }
        if !differing.is_empty() {
            for name in nodes {
                self.queue.add(name).await;
            }
        }
        Ok(())
    }

    async fn objects<T: Send + Sync + 'static>(&self, what: Drift, cache: &Cache<T>) -> Result<(), PassError> {
        let (objects, resource) = (&self.ports.objects, cache.resource());
        let version = |object: &Object| Version::new(object.resource_version());
        let known = |object: &Object| Some((object.key(), version(object)));
        let live = gather(objects.as_ref(), resource, &Scope::default(), Freshness::Quorum, known).await?;
        let live: BTreeMap<ObjectKey, Version> = live.into_iter().collect();
        let cached = |key: &ObjectKey| cache.get(key).map(|cached| cached.version.clone());
        let keys: BTreeSet<ObjectKey> =
            cache.read(|store| store.iter().map(|(key, _)| key).chain(live.keys()).cloned().collect());
        let missed = |key: &ObjectKey| is_missed(cached(key).as_ref(), live.get(key));
        let suspects: Vec<ObjectKey> = keys.into_iter().filter(missed).collect();
        if suspects.is_empty() {
            return Ok(());
        }
        tokio::time::sleep(LATE).await;
        for key in suspects.into_iter().filter(missed).collect::<Vec<_>>() {
            let object = objects.get(resource, &key).await?;
            // What changed again is told again, and what was told meanwhile is known.
            if object.as_ref().map(version).as_ref() != live.get(&key) || !missed(&key) {
                continue;
            }
            self.count(what, &key.to_string());
            match object {
                Some(object) => cache.apply(ObjectEvent::Applied(object)),
                None => cache.apply(ObjectEvent::Deleted(last(&key, cached(&key)))),
            }
        }
        Ok(())
    }

    async fn records(&self) -> Result<(), PassError> {
        let (store, records) = (&self.ports.store, &self.views.records);
        let live: BTreeMap<String, Revision> =
            store.records().await?.into_iter().map(|(name, kv)| (name, kv.mod_revision)).collect();
        let seen = |name: &String| records.get(name).map(|seen| seen.mod_revision);
        let names: BTreeSet<String> = records.names().into_iter().chain(live.keys().cloned()).collect();
        let missed = |name: &String| is_missed(seen(name).as_ref(), live.get(name));
        let suspects: Vec<String> = names.into_iter().filter(missed).collect();
        if suspects.is_empty() {
            return Ok(());
        }
        tokio::time::sleep(LATE).await;
        let mut again = store.records().await?;
        for name in suspects.into_iter().filter(missed).collect::<Vec<_>>() {
            let found = again.remove(&name);
            if found.as_ref().map(|kv| kv.mod_revision).as_ref() != live.get(&name) || !missed(&name) {
                continue;
            }
            self.count(Drift::Record, &name);
            records.correct(name, found);
        }
        Ok(())
    }
}

/// Whether a view at one version lacks what a server holds at another.
fn is_missed<V: Ord>(view: Option<&V>, live: Option<&V>) -> bool {
    match (view, live) {
        (Some(view), Some(live)) => view < live,
        (view, live) => view.is_some() != live.is_some(),
    }
}

/// The last state of an object, as far as an event of its deletion tells it.
fn last(key: &ObjectKey, version: Option<Version>) -> Object {
    let version = version.unwrap_or_default();
    let metadata = json!({ "namespace": key.namespace, "name": key.name, "resourceVersion": version.as_str() });
    Object(json!({ "metadata": metadata }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_view_that_is_newer_than_what_was_read_misses_nothing() {
        for (view, live, missed) in [
            (None, None, false),
            (Some(5), Some(5), false),
            (Some(6), Some(5), false),
            (Some(5), Some(6), true),
            (None, Some(5), true),
            (Some(5), None, true),
        ] {
            assert_eq!(is_missed(view.as_ref(), live.as_ref()), missed, "{view:?} {live:?}");
        }
    }

    #[test]
    fn a_deletion_names_the_object() {
        let key = ObjectKey::cluster("n1");
        let object = last(&key, Some(Version::new("7")));
        assert_eq!((object.key(), object.resource_version()), (key, "7"));
    }
}

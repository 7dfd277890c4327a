//! From the directory into the view.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex},
    time::Duration,
};

use basal_crds::{
    directory::{Change, Changes, IpOwner, NodeId},
    identity::IdentityId,
    kvstore::{IpTarget, NodeRecord},
    labels::Labels,
};
use basal_runtime::sync::lock;
use futures::{FutureExt, StreamExt, select_biased};
use ipnet::IpNet;
use tokio::time::Instant;

use crate::{
    metrics::{AgentMetrics, EventLabels, Happening, Records},
    sync::Datapath,
    view::View,
};

/// How many changes become one edit at most.
const BATCH: usize = 512;
/// How long the first comparison waits for nodes that the kernel still has rows of: longer than the directory holds
/// deletions back.
const HOLD_BACK: Duration = Duration::from_secs(30);

/// One change of what the view holds.
#[derive(Debug, Clone)]
pub enum Event {
    /// Of a node: few, and much larger than the others.
    Node(Box<Change<NodeId, NodeRecord>>),
    /// Of an ip→identity record.
    Ip(Change<IpTarget, IpOwner>),
}

/// Takes a change into the view.
pub fn apply(view: &mut View, event: Event) {
    match event {
        Event::Node(change) => match *change {
            Change::Upsert(_, record) => view.put_node(record),
            Change::Delete(key) => view.remove_node(&key),
            // What was known of a record that cannot be read stays.
            Change::Invalid { .. } | Change::InSync | Change::Stale(_) => {}
        },
        Event::Ip(Change::Upsert(target, owner)) => view.put_ip(target, owner),
        Event::Ip(Change::Delete(target)) => view.remove_ip(target),
        Event::Ip(Change::Invalid { .. } | Change::InSync | Change::Stale(_)) => {}
    }
}

fn count<K, V>(metrics: &AgentMetrics, records: Records, change: &Change<K, V>) {
    let happening = match change {
        Change::Upsert(..) => Happening::upsert,
        Change::Delete(_) => Happening::delete,
        Change::Invalid { name, problem } => {
            tracing::warn!(name, problem, "a record cannot be read; what was known of it stays");
            Happening::invalid
        }
        Change::Stale(why) => {
            tracing::warn!(?records, why, "what is known of the cluster may be old");
            return;
        }
        Change::InSync => return,
    };
    metrics.events.get_or_create(&EventLabels { records, happening }).inc();
}

/// Follows nodes and ip→identity records.
pub struct Pump {
    nodes: Changes<NodeId, NodeRecord>,
    ips: Changes<IpTarget, IpOwner>,
    metrics: AgentMetrics,
    in_sync: (bool, bool),
}

impl Pump {
    /// Follows both.
    #[must_use]
    pub fn new(nodes: Changes<NodeId, NodeRecord>, ips: Changes<IpTarget, IpOwner>, metrics: AgentMetrics) -> Self {
        Self { nodes, ips, metrics, in_sync: (false, false) }
    }

    async fn next(&mut self) -> Option<Event> {
        let event = select_biased! {
            change = self.nodes.next().fuse() => Event::Node(Box::new(change?)),
            change = self.ips.next().fuse() => Event::Ip(change?),
        };
        match &event {
            Event::Node(change) => {
                count(&self.metrics, Records::nodes, change);
                self.in_sync.0 |= matches!(**change, Change::InSync);
            }
            Event::Ip(change) => {
                count(&self.metrics, Records::ips, change);
                self.in_sync.1 |= matches!(change, Change::InSync);
            }
        }
        Some(event)
    }

    /// Fills the view with everything that there is. Blocks that the kernel still has rows of and that nobody tells
    /// about any more are waited for a while: the store may have been emptied, and its writers be at work.
    pub async fn fill(&mut self, view: &mut View, in_kernel: &BTreeSet<IpNet>) {
        let mut deadline: Option<Instant> = None;
        loop {
            if self.in_sync == (true, true) {
                let until = *deadline.get_or_insert_with(|| Instant::now() + HOLD_BACK);
                let told: BTreeSet<IpNet> = view.nodes().values().flat_map(NodeRecord::cidrs).collect();
                let missing: Vec<_> = in_kernel.difference(&told).collect();
                if missing.is_empty() || Instant::now() >= until {
                    return;
                }
                tracing::info!(?missing, "no node tells about these blocks, which the kernel has rows of; waiting");
            }
            let timer = async {
                match deadline {
                    Some(deadline) => tokio::time::sleep_until(deadline).await,
                    None => std::future::pending().await,
                }
            };
            let event = select_biased! {
                event = self.next().fuse() => event,
                () = timer.fuse() => continue,
            };
            match event {
                Some(event) => apply(view, event),
                None => return,
            }
        }
    }

    /// Goes on for ever.
    pub async fn run(mut self, datapath: Datapath) {
        while let Some(first) = self.next().await {
            let mut batch = vec![first];
            while batch.len() < BATCH
                && let Some(Some(event)) = self.next().now_or_never()
            {
                batch.push(event);
            }
            datapath
                .edit(move |view| {
                    for event in batch {
                        apply(view, event);
                    }
                })
                .await;
        }
    }
}

/// The identities that are known, for reports.
#[derive(Debug, Clone, Default)]
pub struct KnownIdentities(Arc<Mutex<BTreeMap<IdentityId, Labels>>>);

impl KnownIdentities {
    /// Goes on for ever.
    pub async fn run(self, mut changes: Changes<IdentityId, Labels>, metrics: AgentMetrics) {
        while let Some(change) = changes.next().await {
            count(&metrics, Records::identities, &change);
            match change {
                Change::Upsert(id, labels) => drop(lock(&self.0).insert(id, labels)),
                Change::Delete(id) => drop(lock(&self.0).remove(&id)),
                Change::Invalid { .. } | Change::InSync | Change::Stale(_) => {}
            }
        }
    }

    /// Looks at them.
    pub fn read<T>(&self, look: impl FnOnce(&BTreeMap<IdentityId, Labels>) -> T) -> T {
        look(&lock(&self.0))
    }
}

#[cfg(test)]
mod tests {
    use basal_runtime::metrics::Metrics;
    use futures::stream;

    use super::*;
    use crate::view::{
        ids::NodeIds,
        tests::{key, local, net, node},
    };

    fn pump(nodes: Vec<Change<NodeId, NodeRecord>>) -> Pump {
        let metrics = Metrics::new("cilium").register(AgentMetrics::register);
        let nodes = stream::iter(nodes).chain(stream::pending()).boxed();
        let ips = stream::iter([Change::InSync]).chain(stream::pending()).boxed();
        Pump::new(nodes, ips, metrics)
    }

    fn view() -> View {
        View::new(key("n0"), local(), NodeIds::default())
    }

    #[tokio::test(start_paused = true)]
    async fn a_view_is_full_once_both_are_in_sync() {
        let mut view = view();
        let mut pump = pump(vec![Change::Upsert(key("n1"), node("n1", 9, 1)), Change::InSync]);
        let before = Instant::now();
        pump.fill(&mut view, &BTreeSet::from([net("10.0.1.0/24")])).await;
        assert_eq!(view.nodes().len(), 1);
        assert_eq!(before.elapsed(), Duration::ZERO);
    }

    #[tokio::test(start_paused = true)]
    async fn a_block_that_only_the_kernel_knows_is_waited_for() {
        let mut view = view();
        let before = Instant::now();
        pump(vec![Change::InSync]).fill(&mut view, &BTreeSet::from([net("10.0.1.0/24")])).await;
        assert_eq!(before.elapsed(), HOLD_BACK);
    }
}

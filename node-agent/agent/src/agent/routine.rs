//! What the agent does at its start with files and rows, and what goes on as long as it lives.

use std::{collections::BTreeSet, net::IpAddr, path::Path, sync::Arc, time::Duration};

use basal_cni::{
    api::{Component, ComponentState},
    delete_queue::{Consumer, QueueError},
};
use basal_crds::directory::Directory;
use basal_datapath::{kernel::Observed, plan::NodePlan, routing::Routing, rows::MapId};
use basal_maps::{
    node::{NodeKey, NodeValue},
    tunnel::TunnelKey,
};
use basal_objects::{cache::Cache, object::ObjectKey};
use basal_runtime::{readiness::Guard, sync::lock};
use futures::{FutureExt, select_biased};
use ipnet::IpNet;
use tokio::sync::watch;
use zerocopy::FromBytes as _;

use super::{
    AgentError,
    report::{AgentReports, ipnet_of},
};
use crate::{
    config::Settings,
    endpoint::Endpoints,
    install::{self, InstallError},
    metrics::{AgentMetrics, FamilyLabel},
    node::{
        facts::{NodeFacts, Underlay},
        watch::ClaimReport,
    },
    sync::{Datapath, SyncReport},
};

/// How often removals that failed are tried again, and gauges set.
const INTERVAL: Duration = Duration::from_secs(5);

/// The node ids that the kernel's map holds.
#[must_use]
pub fn node_ids(observed: &Observed) -> Vec<(IpAddr, u16)> {
    let rows = observed.state.maps.get(&MapId::Nodes);
    let parse = |(key, value): (&Vec<u8>, &Vec<u8>)| {
        let key = NodeKey::read_from_bytes(key).ok()?;
        let value = NodeValue::read_from_bytes(value).ok()?;
        Some((key.ip.to_ip(key.family)?, value.id))
    };
    rows.into_iter().flatten().filter_map(parse).collect()
}

/// The blocks of other nodes that the kernel has tunnels or direct routes for.
#[must_use]
pub fn known_blocks(observed: &Observed) -> BTreeSet<IpNet> {
    let rows = observed.state.maps.get(&MapId::Tunnel);
    let parse = |key: &Vec<u8>| {
        let (ip, bits) = TunnelKey::read_from_bytes(key).ok()?.cidr()?;
        IpNet::new(ip, bits).ok()
    };
    let routes = observed.state.routes.keys().filter(|key| !key.link.is_managed()).map(|key| key.destination);
    rows.into_iter().flatten().filter_map(|(key, _)| parse(key)).chain(routes).collect()
}

/// Waits until the kernel holds what it should. Meanwhile the guard says what keeps it from that.
pub async fn first_pass(mut sync: watch::Receiver<SyncReport>, guard: &Guard) {
    guard.not_ready("comparing the kernel with what it should hold");
    let complete = |report: &SyncReport| {
        if !report.problem.is_empty() {
            guard.not_ready(report.problem.clone());
        }
        report.complete
    };
    // The task is gone only when the agent ends.
    if sync.wait_for(complete).await.is_ok() {
        guard.ready();
    }
}

/// Carries out the deletes that were queued while no agent listened. The queue stays locked until the caller listens.
///
/// # Errors
/// The queue cannot be locked or read. A delete that fails stays in the queue.
pub async fn replay_deletes(folder: &Path, endpoints: &Endpoints) -> Result<Consumer, AgentError> {
    let path = folder.to_owned();
    let locked = tokio::task::spawn_blocking(move || Consumer::lock(&path)).await;
    let consumer = locked.unwrap_or_else(|error| {
        Err(QueueError::Io { path: folder.to_owned(), source: std::io::Error::other(error) })
    })?;
    for queued in consumer.waiting()? {
        match &queued.request {
            Ok(request) => {
                if let Err(error) = endpoints.del(request).await {
                    tracing::warn!(attachment = %request.attachment, %error, "a queued delete; it is tried again");
                }
            }
            Err(why) => {
                tracing::warn!(path = %queued.path.display(), why, "a queued delete cannot be read; GC finds what it meant")
            }
        }
        // A removal that began is in the journal, and the routine goes on with it.
        consumer.remove(&queued)?;
    }
    Ok(consumer)
}

/// Installs plugin and configuration.
///
/// # Errors
/// See [`InstallError`].
pub fn install(settings: &Settings, socket: &Path, queue: &Path) -> Result<(), InstallError> {
    let cni = &settings.cni;
    let beside = std::env::current_exe().ok().and_then(|path| Some(path.parent()?.join(install::PLUGIN)));
    if let Some(plugin) = cni.cni_plugin.clone().or(beside) {
        install::binary(&plugin, &cni.cni_bin_dir)?;
    }
    let portmap = cni.cni_bin_dir.join(install::PORTMAP).exists();
    if !portmap {
        tracing::info!(folder = %cni.cni_bin_dir.display(), "there is no portmap plugin; hostPorts of pods are not served");
    }
    install::configuration(&cni.write_cni_conf_when_ready, &install::conflist(socket, queue, portmap))?;
    if cni.cni_exclusive {
        for path in install::set_others_aside(&cni.write_cni_conf_when_ready)? {
            tracing::info!(path = %path.display(), "another CNI configuration was set aside");
        }
    }
    Ok(())
}

/// What goes on as long as the agent lives.
pub struct Routine {
    /// The endpoints.
    pub endpoints: Endpoints,
    /// The datapath.
    pub datapath: Datapath,
    /// The reports, of which it keeps two lines.
    pub reports: Arc<AgentReports>,
    /// The claim.
    pub claim: watch::Receiver<ClaimReport>,
    /// The Node: its watch tells how the API server is, and where this node is.
    pub node: Cache<NodeFacts>,
    /// The node's addresses, as everybody who follows them is told.
    pub underlay: watch::Sender<Underlay>,
    /// Where records name this node by its addresses.
    pub directory: Arc<dyn Directory>,
    /// Readiness: the claim.
    pub podcidr: Guard,
    /// Readiness: the datapath.
    pub datapath_guard: Guard,
    /// What is counted.
    pub metrics: AgentMetrics,
}

impl Routine {
    /// Runs for ever.
    pub async fn run(mut self) {
        let mut sync = self.datapath.report();
        let node = self.node.subscribe();
        loop {
            self.follow_node().await;
            let claim = self.claim.borrow_and_update().clone();
            self.follow_claim(claim).await;
            let report = sync.borrow_and_update().clone();
            self.follow_datapath(&report);
            self.endpoints.sweep().await;
            self.measure().await;
            *lock(&self.reports.kubernetes) = match self.node.failure() {
                None => Component::new(ComponentState::Ok, "watched"),
                Some(error) => Component::new(ComponentState::Failure, error.to_string()),
            };
            select_biased! {
                changed = self.claim.changed().fuse() => if changed.is_err() { return },
                changed = sync.changed().fuse() => if changed.is_err() { return },
                _ = node.next().fuse() => {}
                () = tokio::time::sleep(INTERVAL).fuse() => {}
            }
        }
    }

    /// The Node says other addresses than before: the datapath, records and objects follow. A Node without addresses, or
    /// without an object, changes nothing: the kubelet is about to write it.
    async fn follow_node(&self) {
        let settings = &self.reports.settings;
        let cached = self.node.get(&ObjectKey::cluster(settings.node.to_string()));
        let facts = cached.as_ref().and_then(|cached| cached.valid());
        let Some(underlay) = facts.and_then(|facts| facts.underlay(&settings.families)) else { return };
        if *self.underlay.borrow() == underlay {
            return;
        }
        tracing::info!(?underlay, "the node's addresses are others");
        self.underlay.send_replace(underlay.clone());
        let Underlay { tunnel_ip, .. } = underlay;
        let (node_ips, follow_mtu) = (underlay.ips(), settings.mtu.is_none());
        self.directory.moved(&underlay.ips::<Vec<_>>());
        self.datapath
            .edit(move |view| {
                let mut local = view.local().clone();
                if let Routing::Tunnel(tunnel) = &mut local.routing {
                    tunnel.ipv6 = tunnel_ip.is_ipv6();
                }
                view.set_local(NodePlan { node_ips, ..local });
                if follow_mtu {
                    view.take_mtu_of(tunnel_ip);
                }
            })
            .await;
        self.endpoints.moved(tunnel_ip);
    }

    async fn follow_claim(&self, claim: ClaimReport) {
        match &claim.problem {
            None => self.podcidr.ready(),
            Some(problem) => self.podcidr.not_ready(problem.clone()),
        }
        let blocks: BTreeSet<IpNet> = claim.confirmed.iter().chain(&claim.lost).map(ipnet_of).collect();
        self.endpoints.serve(&claim.confirmed, claim.lost, claim.problem);
        self.datapath
            .edit(move |view| {
                let mut local = view.local().clone();
                local.local_cidrs = blocks;
                view.set_local(local);
            })
            .await;
    }

    fn follow_datapath(&self, report: &SyncReport) {
        if report.problem.is_empty() {
            self.datapath_guard.ready();
        } else {
            self.datapath_guard.not_ready(report.problem.clone());
        }
        if !report.lost.is_empty() {
            self.endpoints.lost(&report.lost);
        }
    }

    async fn measure(&self) {
        let nodes = self.datapath.look(|view| view.nodes().len()).await.unwrap_or_default();
        let (endpoints, v4, v6) = self.endpoints.read(|state| {
            let v4 = state.pool().all().filter(|(ip, _)| ip.is_ipv4()).count();
            (state.iter().count(), v4, state.pool().all().count() - v4)
        });
        let number = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
        self.metrics.nodes.set(number(nodes));
        self.metrics.endpoints.set(number(endpoints));
        for (family, count) in [("ipv4", v4), ("ipv6", v6)] {
            self.metrics.addresses.get_or_create(&FamilyLabel { family }).set(number(count));
        }
    }
}

#[cfg(test)]
mod tests {
    use basal_datapath::{
        names::IfName,
        rows,
        state::{Route, RouteKey},
    };

    use super::*;

    #[test]
    fn blocks_of_other_nodes_are_known_by_their_tunnels_and_routes() {
        let mut observed = Observed::default();
        rows::tunnel("10.0.2.0/24".parse().unwrap(), [192, 0, 2, 2].into(), 2).insert_into(&mut observed.state.maps);
        for (block, link) in [("10.0.3.0/24", IfName::new("eth0").unwrap()), ("10.0.1.0/24", IfName::host())] {
            let key = RouteKey { destination: block.parse().unwrap(), link };
            observed.state.routes.insert(key, Route::default());
        }
        let expected = ["10.0.2.0/24", "10.0.3.0/24"].map(|block| block.parse().unwrap());
        assert_eq!(known_blocks(&observed), expected.into(), "what is on cilium_host may be this node's own");
    }
}

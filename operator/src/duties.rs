//! What a leader keeps up beside its nodes: the heartbeat, the cluster's configuration, the collection of identities and
//! CiliumEndpoints that nobody uses.

use std::{sync::Arc, time::Duration};

use basal_crds::{
    identity::IdentityRange,
    kvstore::{Capabilities, ClusterConfig},
};
use basal_ipam::names::TermId;
use basal_kvstore::{
    identity_gc::{GcReport, IdentityGc},
    kv::Kv,
    leases::LeaseRules,
    ledger::LedgerKeys,
    lock::Locks,
    records::{enforce_cluster_config, heartbeat},
    session::Session,
};
use basal_runtime::env::TaskHandle;
use tracing::{info, warn};

use crate::{
    endpoint_gc::{EndpointGc, EndpointGcReport},
    metrics::OperatorMetrics,
    ports::Ports,
};

/// How the duties are done.
#[derive(Debug, Clone, Copy)]
pub struct DutySettings {
    /// How long leased keys outlive the operator.
    pub leases: LeaseRules,
    /// Pause between two rounds of identity collection; `None` turns it off.
    pub identity_gc: Option<Duration>,
    /// Pause between two rounds of CiliumEndpoint collection; `None` turns it off.
    pub endpoint_gc: Option<Duration>,
    /// How long an identity among custom resources stays without a sign of life.
    pub identity_heartbeat: Duration,
}

/// Starts those in etcd; they end when their handles are aborted.
pub(crate) fn start(
    ports: &Ports,
    kv: Arc<dyn Kv>,
    term: &TermId,
    settings: DutySettings,
    metrics: &OperatorMetrics,
) -> Vec<TaskHandle> {
    let session = Session::start(Arc::clone(&ports.env), Arc::clone(&kv), settings.leases);
    let config = ClusterConfig {
        id: ports.cluster.id(),
        capabilities: Capabilities { max_connected_clusters: 255, ..Capabilities::default() },
    };
    let name = ports.cluster.name().clone();
    let mut tasks = vec![
        ports.env.spawn("heartbeat", Box::pin(heartbeat(session.clone()))),
        ports.env.spawn("cluster-config", Box::pin(enforce_cluster_config(session.clone(), name, config))),
    ];
    if let Some(interval) = settings.identity_gc {
        let guard = LedgerKeys::new(ports.cluster.name().as_str()).fence_holds(term.as_str());
        let gc = IdentityGc::new(kv, Locks::new(session), IdentityRange::of(ports.cluster.id()), guard);
        tasks.push(ports.env.spawn("identity-gc", Box::pin(collect(gc, interval, metrics.clone()))));
    }
    tasks
}

/// Starts the collection of CiliumEndpoints, which are objects whatever the store of claims is.
pub(crate) fn collect_endpoints(
    ports: &Ports,
    settings: DutySettings,
    metrics: &OperatorMetrics,
) -> Option<TaskHandle> {
    let gc = EndpointGc::new(Arc::clone(&ports.objects));
    let rounds = |interval| Box::pin(endpoint_rounds(gc, interval, metrics.clone()));
    settings.endpoint_gc.map(|interval| ports.env.spawn("endpoint-gc", rounds(interval)))
}

async fn collect(mut gc: IdentityGc, interval: Duration, metrics: OperatorMetrics) {
    loop {
        tokio::time::sleep(interval).await;
        match gc.round().await {
            Ok(report) => {
                let GcReport { alive, unused, deleted, failed, stale_locks, invalid } = &report;
                info!(alive, unused, deleted, failed, stale_locks, "identity collection");
                if !invalid.is_empty() {
                    warn!(keys = invalid.join(", "), "keys among the identities that are none; they are left alone");
                }
                metrics.collected("kvstore", Some((report.alive, report.deleted)));
            }
            Err(error) => {
                warn!(%error, "identity collection failed");
                metrics.collected("kvstore", None);
            }
        }
    }
}

async fn endpoint_rounds(gc: EndpointGc, interval: Duration, metrics: OperatorMetrics) {
    loop {
        tokio::time::sleep(interval).await;
        match gc.round().await {
            Ok(report) => {
                let EndpointGcReport { alive, deleted, failed } = report;
                info!(alive, deleted, failed, "CiliumEndpoint collection");
                metrics.upkeep.endpoints_collected(&report);
            }
            Err(error) => warn!(%error, "CiliumEndpoint collection failed; the next round tries again"),
        }
    }
}

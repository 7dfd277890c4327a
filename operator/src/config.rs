//! The operator's keys: Cilium's names and defaults (cilium-config ConfigMap of 1.20), plus the few of our own.

use std::time::Duration;

use basal_ipam::config::{PoolConfig, PoolConfigError};
use basal_kvstore::flags::{ClusterFlags, EtcdFlags, EtcdSettings, FlagsError, PoolFlags};
use basal_objects::{kube::KubeFlags, leadership::LeadershipOptions};
use basal_runtime::{
    admin::ListenAddress,
    config::{ConfigDirFlag, GoDuration},
    logging::LogFlags,
};

use crate::duties::DutySettings;

/// basal-operator: owns the address space of a cluster and hands out PodCIDRs
#[derive(Debug, Clone, clap::Parser)]
#[command(name = "basal-operator", version)]
pub struct OperatorConfig {
    /// The mounted ConfigMap.
    #[command(flatten)]
    pub config_dir: ConfigDirFlag,
    /// Logging.
    #[command(flatten)]
    pub log: LogFlags,
    /// Which cluster this is.
    #[command(flatten)]
    pub cluster: ClusterFlags,
    /// The pool.
    #[command(flatten)]
    pub pool: PoolFlags,
    /// etcd.
    #[command(flatten)]
    pub etcd: EtcdFlags,
    /// The API server.
    #[command(flatten)]
    pub kubernetes: KubernetesFlags,
    /// Leader election.
    #[command(flatten)]
    pub election: ElectionFlags,
    /// Garbage collection.
    #[command(flatten)]
    pub collection: CollectionFlags,
    /// What is served.
    #[command(flatten)]
    pub serving: ServingFlags,
}

/// The API server.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Kubernetes API server")]
pub struct KubernetesFlags {
    /// Namespace of the leader election's Lease
    #[arg(long, default_value = "default")]
    pub k8s_namespace: String,

    /// How it is reached.
    #[command(flatten)]
    pub reach: KubeFlags,

    /// Do not create or update CustomResourceDefinitions
    #[arg(long)]
    pub skip_crd_creation: bool,
}

/// Leader election.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Leader election")]
pub struct ElectionFlags {
    /// How long a Lease holds after its last renewal
    #[arg(long, default_value = "15s")]
    pub leader_election_lease_duration: GoDuration,

    /// How long the leader goes on without a renewal; shorter than the Lease holds
    #[arg(long, default_value = "10s")]
    pub leader_election_renew_deadline: GoDuration,

    /// Pause between two tries to get or renew the Lease
    #[arg(long, default_value = "2s")]
    pub leader_election_retry_period: GoDuration,
}

/// Collection of what nobody uses any more.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Garbage collection")]
pub struct CollectionFlags {
    /// Pause between two rounds over the identities; one that is unused in two rounds goes. 0 turns it off
    #[arg(long, default_value = "15m")]
    pub identity_gc_interval: GoDuration,

    /// Pause between two rounds over the CiliumEndpoints; those whose pod is gone or has ended go. 0 turns it off
    #[arg(long, default_value = "5m")]
    pub cilium_endpoint_gc_interval: GoDuration,

    /// How long a CiliumNode without Node stays; one whose Node went goes at once. 0 lets it stay
    #[arg(long, default_value = "5m")]
    pub nodes_gc_interval: GoDuration,

    /// Collect no CiliumEndpoints
    ///
    /// Agents publish them all the same: Basal's ignore this key
    #[arg(long)]
    pub disable_endpoint_crd: bool,

    /// How long an identity stays without a sign of life, where identities are custom resources
    #[arg(long, default_value = "30m")]
    pub identity_heartbeat_timeout: GoDuration,
}

/// What the operator serves.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Serving")]
pub struct ServingFlags {
    /// Address of /healthz, /readyz, /metrics and /config
    #[arg(long, default_value = "localhost:9234")]
    pub operator_api_serve_addr: ListenAddress,

    /// Serve Prometheus metrics at an address of their own
    #[arg(long)]
    pub enable_metrics: bool,

    /// The address of the metrics
    #[arg(long, default_value = ":9963")]
    pub operator_prometheus_serve_addr: ListenAddress,
}

/// A key that parses alone and does not fit the others.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// The cluster, or the way to etcd.
    #[error(transparent)]
    Flags(#[from] FlagsError),
    /// The pool.
    #[error(transparent)]
    Pool(#[from] PoolConfigError),
    /// Durations that make leader election unsafe.
    #[error("{0}")]
    Election(String),
}

impl OperatorConfig {
    /// The pool.
    ///
    /// # Errors
    /// See [`PoolConfigError`].
    pub fn pool(&self) -> Result<PoolConfig, CheckError> {
        Ok(self.pool.config()?)
    }

    /// Checks what clap cannot: keys that depend on each other.
    ///
    /// # Errors
    /// The first key that does not fit, with the way out.
    pub fn check(&self) -> Result<(), CheckError> {
        self.cluster.cluster()?;
        self.pool()?;
        self.etcd.settings()?;
        self.leadership(String::new()).check().map_err(CheckError::Election)
    }

    /// What is kept up beside nodes.
    #[must_use]
    pub fn duties(&self, etcd: Option<&EtcdSettings>) -> DutySettings {
        let gc = &self.collection;
        DutySettings {
            leases: etcd.map(|etcd| etcd.leases).unwrap_or_default(),
            identity_gc: every(&gc.identity_gc_interval),
            identity_heartbeat: gc.identity_heartbeat_timeout.0,
            endpoint_gc: every(&gc.cilium_endpoint_gc_interval).filter(|_| !gc.disable_endpoint_crd),
        }
    }

    /// How long a CiliumNode that never had a Node stays; `None` is for ever.
    #[must_use]
    pub fn node_gc(&self) -> Option<Duration> {
        every(&self.collection.nodes_gc_interval)
    }

    /// How leadership is held by a process of this identity.
    #[must_use]
    pub fn leadership(&self, identity: String) -> LeadershipOptions {
        LeadershipOptions {
            lease_duration: self.election.leader_election_lease_duration.0,
            renew_deadline: self.election.leader_election_renew_deadline.0,
            retry_period: self.election.leader_election_retry_period.0,
            ..LeadershipOptions::new(&self.kubernetes.k8s_namespace, identity)
        }
    }
}

/// A period; 0 means never.
fn every(period: &GoDuration) -> Option<Duration> {
    (!period.0.is_zero()).then_some(period.0)
}

//! The keys of `basal ipam check`: those of the daemons, by the same names, and a few of its own.

use std::{ffi::OsString, path::PathBuf};

use anyhow::Context as _;
use basal_crds::names::ClusterName;
use basal_ipam::config::{FamilySettings, PoolConfig, PoolSettings};
use basal_kvstore::{
    config::KvstoreOptions,
    flags::{ClusterFlags, EtcdFlags},
};
use basal_objects::kube::KubeFlags;
use basal_runtime::config::{self, ConfigDirFlag, ConfigError, GoDuration, Sources};

use crate::output::Format;

/// Compares the ledger, the CiliumNodes and the records of the whole cluster, and reports what does not fit: addresses
/// with two owners, orphans, leaks, nodes that are not served, and what cannot be read
#[derive(Debug, Clone, clap::Parser)]
#[command(
    name = "basal ipam check",
    after_help = "Exit code: 0 nothing is wrong, 1 something is, 2 it could not look.\n\
                  In an operator's pod: basal ipam check --config-dir=/tmp/cilium/config-map"
)]
pub(crate) struct CheckConfig {
    /// The mounted ConfigMap.
    #[command(flatten)]
    pub(crate) config_dir: ConfigDirFlag,

    /// How to print: text or json
    #[arg(short, long)]
    pub(crate) output: Option<Format>,

    /// What to do.
    #[command(flatten)]
    pub(crate) action: Action,

    /// Which cluster it is.
    #[command(flatten)]
    pub(crate) cluster: ClusterFlags,

    /// The pool.
    #[command(flatten)]
    pub(crate) pool: PoolKeys,

    /// etcd.
    #[command(flatten)]
    pub(crate) etcd: EtcdFlags,

    /// How the API server is reached; the variable KUBECONFIG names a file too.
    #[command(flatten)]
    pub(crate) reach: KubeFlags,
}

/// What to do beside one look.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Action {
    /// Follow all changes, and report also what was wrong for a moment only
    #[arg(long)]
    pub(crate) watch: bool,

    /// Follow for so long; without it until a signal comes
    #[arg(long = "for", value_name = "DURATION", requires = "watch")]
    pub(crate) duration: Option<GoDuration>,

    /// Mend what can be mended without harm, and say each step before it is done
    #[arg(long, conflicts_with = "watch")]
    pub(crate) fix: bool,

    /// Say what --fix would do, and do nothing
    #[arg(long, conflicts_with = "watch")]
    pub(crate) dry_run: bool,

    /// Pause between the two looks that have to find the same
    #[arg(long, default_value = "2s", value_name = "DURATION")]
    pub(crate) pause: GoDuration,
}

/// The pool, by the operator's keys.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "IPAM")]
pub(crate) struct PoolKeys {
    /// Nodes have IPv4 blocks
    #[arg(long, default_value_t = true)]
    pub(crate) enable_ipv4: bool,

    /// Nodes have IPv6 blocks
    #[arg(long, default_value_t = true)]
    pub(crate) enable_ipv6: bool,

    /// IPv4 CIDRs of the pool
    #[arg(long, value_name = "CIDR,…")]
    pub(crate) cluster_pool_ipv4_cidr: Vec<String>,

    /// Prefix length of a node's IPv4 block
    #[arg(long, default_value_t = 24)]
    pub(crate) cluster_pool_ipv4_mask_size: u8,

    /// IPv6 CIDRs of the pool
    #[arg(long, value_name = "CIDR,…")]
    pub(crate) cluster_pool_ipv6_cidr: Vec<String>,

    /// Prefix length of a node's IPv6 block
    #[arg(long, default_value_t = 112)]
    pub(crate) cluster_pool_ipv6_mask_size: u8,

    /// How long a released block rests
    #[arg(long, default_value = "5m")]
    pub(crate) cluster_pool_quarantine: GoDuration,
}

impl PoolKeys {
    fn config(&self) -> anyhow::Result<PoolConfig> {
        let settings = PoolSettings {
            ipv4: FamilySettings {
                enabled: self.enable_ipv4,
                cidrs: self.cluster_pool_ipv4_cidr.clone(),
                mask_size: self.cluster_pool_ipv4_mask_size,
            },
            ipv6: FamilySettings {
                enabled: self.enable_ipv6,
                cidrs: self.cluster_pool_ipv6_cidr.clone(),
                mask_size: self.cluster_pool_ipv6_mask_size,
            },
        };
        PoolConfig::new(&settings).context("the pool has to be known, as the operator knows it")
    }
}

impl CheckConfig {
    /// Reads flags, variables and the mounted ConfigMap; `arguments` are those behind `basal ipam check`. Help and
    /// wrong usage end the process here, as clap ends it.
    pub(crate) fn load(arguments: &[OsString]) -> anyhow::Result<Self> {
        let mut sources = Sources::of_process();
        sources.arguments = std::iter::once("basal ipam check".into()).chain(arguments.iter().cloned()).collect();
        // The operator refuses what Basal does not do; whoever looks at its blocks may have such keys.
        match config::load::<Self>(&sources, &[]) {
            Err(ConfigError::Help(said) | ConfigError::Flag(said)) => said.exit(),
            Err(error) => Err(error.into()),
            Ok(loaded) => Ok(loaded.config.with_kubeconfig(&sources)),
        }
    }

    /// An administrator's kubeconfig is where kubectl has it.
    fn with_kubeconfig(mut self, sources: &Sources) -> Self {
        let named = || sources.environment.get("KUBECONFIG").filter(|path| !path.is_empty()).map(PathBuf::from);
        self.reach.k8s_kubeconfig_path = self.reach.k8s_kubeconfig_path.or_else(named);
        self
    }

    /// The cluster's name.
    pub(crate) fn cluster(&self) -> anyhow::Result<ClusterName> {
        Ok(self.cluster.cluster()?.name().clone())
    }

    /// The pool.
    pub(crate) fn pool(&self) -> anyhow::Result<PoolConfig> {
        self.pool.config()
    }

    /// The way to etcd.
    pub(crate) fn kvstore(&self) -> anyhow::Result<KvstoreOptions> {
        let etcd = self.etcd.settings()?;
        let etcd =
            etcd.context("kvstore: the check reads a ledger in etcd, not one in custom resources; set it to \"etcd\"")?;
        Ok(etcd.options)
    }
}

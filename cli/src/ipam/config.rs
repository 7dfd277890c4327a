//! The keys of `basal ipam check`: those of the daemons, by the same names, and a few of its own.

use std::{ffi::OsString, path::PathBuf};

use anyhow::Context as _;
use basal_crds::names::ClusterName;
use basal_ipam::config::PoolConfig;
use basal_kvstore::{
    config::KvstoreOptions,
    flags::{ClusterFlags, EtcdFlags, PoolFlags},
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
    pub(crate) pool: PoolFlags,

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
        self.pool.config().context("the pool has to be known, as the operator knows it")
    }

    /// The way to etcd; `None` where claims are kept in custom resources.
    pub(crate) fn kvstore(&self) -> anyhow::Result<Option<KvstoreOptions>> {
        Ok(self.etcd.settings()?.map(|etcd| etcd.options))
    }
}

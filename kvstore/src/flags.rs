//! The keys that several programs have: which cluster it works for, the pool of its blocks, and where its records are.
//! Names and defaults are Cilium's.

use basal_crds::names::{Cluster, ClusterId, ClusterName, NameError};
use basal_ipam::config::{FamilySettings, PoolConfig, PoolConfigError, PoolSettings};
use basal_runtime::config::{GoDuration, StringMap};

use crate::{
    config::{ConfigError, KvstoreOptions},
    leases::{BadLeaseTtl, LeaseRules},
};

/// Which cluster this is.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Cluster")]
pub struct ClusterFlags {
    /// Name of the cluster, unique in a mesh
    ///
    /// At most 32 of a-z, 0-9 and -
    #[arg(long, default_value = "default")]
    pub cluster_name: String,

    /// Number of the cluster, unique in a mesh, 1 to 255; 0 outside of one
    ///
    /// Needs a name other than `default`
    #[arg(long, default_value_t = 0)]
    pub cluster_id: u8,
}

/// etcd.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "etcd")]
pub struct EtcdFlags {
    /// Where the cluster's records are kept: etcd, or empty for custom resources
    #[arg(long, default_value = "")]
    pub kvstore: String,

    /// etcd.config=FILE (endpoints, CA, certificate, key), or etcd.address=URL, and more
    #[arg(long, default_value = "", value_name = "KEY=VALUE,…")]
    pub kvstore_opt: StringMap,

    /// How long leased keys outlive the process that wrote them, 25s to 24h
    #[arg(long, default_value = "15m")]
    pub kvstore_lease_ttl: GoDuration,
}

/// The pool.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "IPAM")]
pub struct PoolFlags {
    /// How addresses are managed; only cluster-pool
    #[arg(long, default_value = "cluster-pool")]
    pub ipam: String,

    /// Give pods IPv4 addresses
    #[arg(long, default_value_t = true)]
    pub enable_ipv4: bool,

    /// Give pods IPv6 addresses
    #[arg(long, default_value_t = true)]
    pub enable_ipv6: bool,

    /// IPv4 CIDRs that blocks are taken from, used up in this order
    #[arg(long, value_name = "CIDR,…")]
    pub cluster_pool_ipv4_cidr: Vec<String>,

    /// Prefix length of a node's IPv4 block, at most 30
    #[arg(long, default_value_t = 24)]
    pub cluster_pool_ipv4_mask_size: u8,

    /// IPv6 CIDRs that blocks are taken from, used up in this order
    #[arg(long, value_name = "CIDR,…")]
    pub cluster_pool_ipv6_cidr: Vec<String>,

    /// Prefix length of a node's IPv6 block, at most 126
    #[arg(long, default_value_t = 112)]
    pub cluster_pool_ipv6_mask_size: u8,

    /// How long a released block rests before it is granted again (Basal's own key)
    #[arg(long, default_value = "5m")]
    pub cluster_pool_quarantine: GoDuration,
}

/// What the keys about etcd say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EtcdSettings {
    /// How it is reached.
    pub options: KvstoreOptions,
    /// How leases are kept.
    pub leases: LeaseRules,
}

/// Keys that parse each for itself and cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum FlagsError {
    /// The cluster's name or id.
    #[error("cluster-name, cluster-id: {0}")]
    Cluster(#[from] NameError),
    /// Another store than etcd.
    #[error(
        "kvstore: {0:?} is not supported; set it to \"etcd\" and kvstore-opt to etcd.config=FILE, or to \"\" to keep \
         records in custom resources"
    )]
    Kvstore(String),
    /// The way to etcd.
    #[error(transparent)]
    KvstoreOpt(#[from] ConfigError),
    /// The leases in etcd.
    #[error(transparent)]
    LeaseTtl(#[from] BadLeaseTtl),
}

impl ClusterFlags {
    /// The cluster's name and id.
    ///
    /// # Errors
    /// [`FlagsError::Cluster`].
    pub fn cluster(&self) -> Result<Cluster, FlagsError> {
        Ok(Cluster::new(ClusterName::new(self.cluster_name.clone())?, ClusterId::new(self.cluster_id))?)
    }
}

impl PoolFlags {
    /// The pool.
    ///
    /// # Errors
    /// See [`PoolConfigError`].
    pub fn config(&self) -> Result<PoolConfig, PoolConfigError> {
        let family =
            |enabled, cidrs: &Vec<String>, mask_size| FamilySettings { enabled, cidrs: cidrs.clone(), mask_size };
        PoolConfig::new(&PoolSettings {
            ipv4: family(self.enable_ipv4, &self.cluster_pool_ipv4_cidr, self.cluster_pool_ipv4_mask_size),
            ipv6: family(self.enable_ipv6, &self.cluster_pool_ipv6_cidr, self.cluster_pool_ipv6_mask_size),
        })
    }
}

impl EtcdFlags {
    /// The way to etcd and the leases there; `None` where records are kept in custom resources.
    ///
    /// # Errors
    /// Every [`FlagsError`] but [`FlagsError::Cluster`].
    pub fn settings(&self) -> Result<Option<EtcdSettings>, FlagsError> {
        match self.kvstore.as_str() {
            "" => return Ok(None),
            "etcd" => {}
            unknown => return Err(FlagsError::Kvstore(unknown.to_owned())),
        }
        let options = KvstoreOptions::from_map(&self.kvstore_opt.0)?;
        let leases = LeaseRules::with_data_ttl(self.kvstore_lease_ttl.0)?;
        Ok(Some(EtcdSettings { options, leases }))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Flags {
        #[command(flatten)]
        cluster: ClusterFlags,
        #[command(flatten)]
        etcd: EtcdFlags,
    }

    fn flags(more: &[&str]) -> Flags {
        let always = ["daemon", "--kvstore-opt=etcd.config=/x"];
        Flags::parse_from(always.iter().chain(more))
    }

    #[test]
    fn defaults_are_ciliums() {
        assert_eq!(flags(&[]).cluster.cluster().unwrap(), Cluster::default());
        assert_eq!(flags(&[]).etcd.settings().unwrap(), None);
        let etcd = flags(&["--kvstore=etcd"]).etcd.settings().unwrap().unwrap();
        assert_eq!(etcd.leases.data_ttl, Duration::from_secs(900));
    }

    #[test]
    fn what_cannot_be_is_named() {
        for (argument, part) in [("--cluster-name=A", "cluster-name"), ("--cluster-id=3", "cluster-id")] {
            let message = flags(&[argument]).cluster.cluster().unwrap_err().to_string();
            assert!(message.contains(part), "{argument}: {message}");
        }
        for (arguments, part) in [
            (&["--kvstore=none"][..], "kvstore: \"none\""),
            (&["--kvstore=etcd", "--kvstore-lease-ttl=5s"], "kvstore-lease-ttl is 5s"),
        ] {
            let message = flags(arguments).etcd.settings().unwrap_err().to_string();
            assert!(message.contains(part), "{arguments:?}: {message}");
        }
        let nowhere = Flags::parse_from(["daemon", "--kvstore=etcd"]).etcd.settings().unwrap_err();
        assert!(nowhere.to_string().contains("exactly one of etcd.config"), "{nowhere}");
    }
}

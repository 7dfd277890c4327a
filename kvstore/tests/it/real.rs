//! A real etcd, and the adapter to it.

use std::{path::Path, sync::Arc, time::Duration};

use basal_e2e::servers::{Etcd, EtcdOptions, basal_users};
use basal_kvstore::{
    config::{EtcdConfig, KvstoreOptions, Source},
    etcd::{EtcdKv, Limits},
};
use basal_runtime::env::{SharedEnv, SystemEnv};

pub(crate) fn system_env() -> SharedEnv {
    Arc::new(SystemEnv)
}

/// Runs what blocks.
pub(crate) fn blocking<T>(work: impl FnOnce() -> anyhow::Result<T>) -> T {
    tokio::task::block_in_place(|| work().unwrap())
}

pub(crate) fn plain() -> Etcd {
    blocking(|| Etcd::start(EtcdOptions::default()))
}

/// With TLS, and the users of the operator and of an agent.
pub(crate) fn secured() -> Etcd {
    blocking(|| Etcd::start(EtcdOptions { tls: true, users: basal_users(), ..EtcdOptions::default() }))
}

/// Short limits, so that what hangs shows soon.
pub(crate) fn limits() -> Limits {
    let options = KvstoreOptions::new(Source::File("unused".into()));
    Limits { connect: Duration::from_secs(3), request: Duration::from_secs(3), ..Limits::from(&options) }
}

pub(crate) async fn connect_to(config: &EtcdConfig) -> EtcdKv {
    EtcdKv::new(&system_env(), config, limits()).await.unwrap()
}

/// As a user, by the client file that Cilium would have.
pub(crate) async fn connect(etcd: &Etcd, user: &str) -> EtcdKv {
    let path = blocking(|| etcd.client_config(user));
    connect_to(&config(&path)).await
}

pub(crate) fn config(path: &Path) -> EtcdConfig {
    EtcdConfig::load(path).unwrap()
}

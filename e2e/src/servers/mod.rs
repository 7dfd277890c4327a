//! Real servers on free loopback ports, with their data in temporary folders.

mod apiserver;
mod etcd;
mod pki;
mod ports;

pub use apiserver::{ApiServer, ApiServerOptions, StaticUser};
pub(crate) use apiserver::{token_of, wait_ready, write_kubeconfig, write_tokens};
pub use etcd::{Etcd, EtcdOptions, EtcdUser, Grant, SavedData, basal_users, client_config};
pub(crate) use etcd::{EtcdFlags, add_users, wait_healthy};
pub use pki::{CertFiles, CertRequest, Pki};
pub use ports::free_port;

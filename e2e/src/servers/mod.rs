//! Real servers on free loopback ports, with their data in temporary folders.

mod apiserver;
mod etcd;
mod pki;
mod ports;

pub use apiserver::{ApiServer, ApiServerOptions, StaticUser};
pub use etcd::{Etcd, EtcdOptions, EtcdUser, Grant, SavedData, basal_users, client_config};
pub use pki::{CertFiles, CertRequest, Pki};
pub use ports::free_port;

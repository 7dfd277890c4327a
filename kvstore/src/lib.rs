//! etcd for Basal: the port [`kv::Kv`] and its adapter, and above the port, once for every user of it: sessions and
//! leases, list-then-watch, locks, the etcd [ledger] and the directory of nodes, identities and
//! ip→identity records in Cilium's key layout.

pub mod config;
pub mod connector;
mod convert;
pub mod copies;
pub mod directory;
pub mod etcd;
pub mod flags;
pub mod identity;
pub mod identity_gc;
pub mod kv;
pub mod leases;
pub mod ledger;
pub mod list_watch;
pub mod lock;
pub mod pages;
pub mod records;
pub mod session;
pub mod status;

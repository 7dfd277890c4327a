//! etcd for Basal: the port [`kv::Kv`] and its adapter, and above the port, once for every user of it: sessions and
//! leases, list-then-watch, locks, the etcd [ledger](basal_ipam) and the directory of nodes, identities and
//! ip→identity records in Cilium's key layout.

pub mod kv;

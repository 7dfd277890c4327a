//! The Kubernetes API server for Basal: the port [`port::Objects`] and its kube adapter, and above the port, once for
//! every user of it: ordered caches, leadership, events, status conditions, the installation of custom resources, and the
//! ledger of claims and the directory of nodes, identities and ip→identity records, both in custom resources.
//!
//! It promises that no write overwrites what its writer has not seen, that a lost answer is told as such, and that an
//! object which does not parse stays visible as invalid.

pub mod cache;
pub mod conditions;
pub mod crd_install;
pub mod directory;
pub mod events;
pub mod kube;
pub mod leadership;
pub mod ledger;
pub mod object;
pub mod pace;
pub mod port;

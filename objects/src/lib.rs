//! The Kubernetes API server for Basal: the port [`port::Objects`] and its kube adapter, and above the port, once for
//! every user of it: ordered caches, leadership, events and status conditions.

pub mod object;
pub mod port;

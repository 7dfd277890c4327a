//! The address space of a cluster.

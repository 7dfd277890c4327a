//! The node agent: registers its node, waits for blocks that the ledger confirms, and turns what etcd tells about nodes
//! and addresses into devices, routes, BPF programs and maps; connects pods when the CNI plugin asks, gives them their
//! identities, and publishes them.
//!
//! It promises that nothing is changed in the kernel before the agent knows what should be there, so that a restart
//! loses no packet; that an address is used by one endpoint only, and free only when nothing of its last user is left;
//! that the intent of every change of an endpoint is on disk before the change; and that an etcd or API server that is
//! away takes nothing from what runs.

pub mod agent;
pub mod config;
pub mod endpoint;
pub mod flows;
pub mod identity;
pub mod install;
pub mod journal;
pub mod mac;
pub mod metrics;
pub mod node;
pub mod pods;
pub mod policy;
pub mod process;
pub mod publish;
pub mod server;
pub mod sync;
pub mod view;

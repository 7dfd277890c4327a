//! The CNI plugin `basal-cni`, and the types of the agent's socket that it shares with the agent and the command line.
//!
//! The plugin is thin: it checks what the container runtime hands it, asks the agent, and answers in the words of the
//! CNI specification (1.1.0, and all results back to 0.1.0). It promises that no input makes it panic, that every
//! error names the field or variable at fault, that an ADD waits for the agent and for an address instead of failing
//! at once, and that a DEL is never lost: with the agent away it is queued on disk.

pub mod api;
pub mod client;
pub mod conf;
pub mod delete_queue;
pub mod error;
pub mod frame;
pub mod invocation;
pub mod plugin;
pub mod result;
pub mod version;

//! The datapath in the real kernel: own network namespaces, own mount namespace, own bpffs. Needs root, and a binary
//! that was built with the BPF object.
#![expect(clippy::unwrap_used, clippy::panic, reason = "helpers of tests fail by panicking")]

mod adoption;
mod answers;
mod bench;
mod check;
mod complexity;
mod crashes;
mod differential;
mod direct;
mod draw;
mod dying;
mod forward;
mod forwarding_model;
mod harness;
mod hostile;
mod layout;
mod masquerade;
mod nat_model;
mod native;
mod netdev;
mod overlay;
mod programs;
mod state;
mod traffic;

//! The node's datapath as a value. [`state::NodeState`] says what devices, addresses, routes, sysctls, programs, map rows
//! and nftables rules a node should have; [`plan::NodePlan`] computes it; [`diff::diff`] gives the ordered
//! [`op::Op`]s that lead from what was observed to what is desired; the [`kernel::Kernel`] port reads and applies.
//!
//! It promises that the value and the diff are pure, that each op is idempotent, that applying a diff and reading
//! back gives an empty diff, that only what Basal made is ever listed or removed, and that programs are replaced
//! without a moment in which a packet meets none. [`linux::LinuxKernel`] is the port's real adapter.

pub mod check;
pub mod diff;
pub mod flows;
pub mod forward;
pub mod kernel;
pub mod linux;
pub mod masquerade;
pub mod names;
pub mod nft;
pub mod op;
pub mod plan;
pub mod program;
pub mod routing;
pub mod rows;
pub mod scope;
pub mod state;

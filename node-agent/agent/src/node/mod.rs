//! This node: its registration as CiliumNode, and its claim to its blocks.

pub mod claim;
pub mod confirm;
pub mod facts;
pub mod registration;
pub mod watch;

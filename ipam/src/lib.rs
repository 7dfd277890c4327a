//! The address space of a cluster: pools, the cells of the ledger and the blocks in them, claims of nodes, and the
//! addresses inside a node's blocks.
//!
//! Nothing here talks to a server, reads a clock or draws a random number: time comes in as a [`std::time::Duration`]
//! since a start of the caller's choice, and what is to be written goes out as a value. It promises that no two
//! claims that it makes overlap, whatever was configured before, and that it forgets no claim: a block is granted,
//! pending, quarantined, orphaned or free, and only a write that the [`ledger::Ledger`] confirmed moves it.

pub mod addresses;
pub mod allocator;
pub mod cell;
pub mod check;
pub mod config;
pub mod ledger;
pub mod names;
pub mod owners;
pub mod prefix;
pub mod rest;
pub mod transfer;

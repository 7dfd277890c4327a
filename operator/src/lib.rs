//! The operator: the only writer of allocations, of node records, and of what nodes may use of their blocks.
//!
//! It promises that a block has one owner, whatever crashes, pauses or leads beside it: a claim stands in the ledger,
//! under the fence of the leader's term, before anybody hears of the block; and it is given back only after reads at
//! quorum found nobody who lists it.

pub mod config;
pub mod denials;
pub mod duties;
pub mod endpoint_gc;
pub mod ledger_state;
mod ledger_status;
pub mod measured;
pub mod metrics;
pub mod moving;
pub mod node;
pub mod pool_state;
pub mod ports;
pub mod process;
pub mod run;
pub mod store;
pub mod term;

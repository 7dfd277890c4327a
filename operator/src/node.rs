//! The CiliumNode controller: a Node gets its blocks, its CiliumNode and its record; a Node that is gone loses them.
//!
//! One file for each of the five steps; [`controller`] ties them to the driver.

mod controller;
mod dangling;
pub(crate) mod drift;
pub(crate) mod endpoints;
mod error;
mod facts;
mod observe;
mod packed;
mod plan;
mod records;
mod report;
pub(crate) mod shared_address;
mod validate;
mod views;
mod write;

pub use controller::{NodeController, NodeCore};
pub use dangling::Dangling;
pub use drift::Drift;
pub use endpoints::{UnreadableEndpoint, UnreadableEndpoints};
pub use error::NodeError;
pub use facts::{CiliumNodeFacts, NodeFacts};
pub use packed::{Facts, Packed};
pub use plan::Site;
pub use records::Records;
pub use report::Reporter;
pub use views::Views;
pub(crate) use write::confirm_blocks;

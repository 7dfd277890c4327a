//! Keeps the kernel as the view wants it.
//!
//! [`core::Core`] decides: it holds the view and what the kernel is believed to hold, and says which ops lead from the
//! one to the other, after an event for what the event touched, and on a timer for everything, against what the kernel
//! really holds. [`task`] carries them out, one after another: it is the only writer of the node's datapath. The
//! interfaces of new endpoints, which take most of an ADD's time, are made several at a time.

pub mod core;
mod handle;
pub mod task;

pub use handle::{AttachError, Datapath, Differences, Failure, SyncReport};

//! Which identity a pod has: its labels, the filter that says which of them count, and the task that gives endpoints
//! their identities.

pub mod filter;
pub mod labels;
pub mod task;

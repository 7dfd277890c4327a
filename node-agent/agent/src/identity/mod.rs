//! Which identity a pod has: its labels, and the filter that says which of them count.

pub mod filter;
pub mod labels;

//! The state of the pool, in the status of the [`Ledger`](super::Ledger): Cilium's `cluster-pool` has no object for it.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{is_default, or_default, pool::Cidr};

/// One pool CIDR, as the leading operator sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PoolState {
    /// The pool CIDR.
    #[schemars(with = "Cidr")]
    pub cidr: String,
    /// The prefix length of the blocks that nodes get from it.
    #[schemars(range(min = 0, max = 128))]
    pub mask_size: u8,
    /// Blocks of that size that can be granted now. What is beyond 2⁵³ counts as 2⁵³.
    #[schemars(range(min = 0))]
    pub free: i64,
    /// Blocks in it, of any size, that are not free.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "or_default")]
    pub blocks: BlockCounts,
}

/// Blocks that are not free, by their state.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct BlockCounts {
    /// A node's.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "or_default")]
    #[schemars(range(min = 0))]
    pub granted: i64,
    /// Going to be a node's.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "or_default")]
    #[schemars(range(min = 0))]
    pub pending: i64,
    /// Resting.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "or_default")]
    #[schemars(range(min = 0))]
    pub quarantined: i64,
    /// A node's, and nobody's after it.
    #[serde(default, skip_serializing_if = "is_default", deserialize_with = "or_default")]
    #[schemars(range(min = 0))]
    pub orphaned: i64,
}

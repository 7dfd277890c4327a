//! Cilium's custom resources and our own, as the types that Basal reads them into and as CustomResourceDefinitions.
//!
//! The types are for reading and for making new objects. Live objects are changed by merge patches on untyped JSON, so
//! fields that a type does not have survive. A missing field, an empty object and a `null` read the same: Cilium's Go
//! encoder writes empty objects for most of what is not set.

mod carried;
mod definition;
mod endpoint;
mod identity;
mod ledger;
mod node;
mod pool;
mod pool_state;
mod schema;

pub use definition::{BASAL, CILIUM, Column, Definition, Group, Kind, Names, SCHEMA_VERSION_LABEL, crds};
pub use endpoint::{
    AddressPair, CiliumEndpoint, EncryptionStatus, EndpointAddressError, EndpointFieldError, EndpointHealth,
    EndpointIdentity, EndpointNetworking, EndpointPolicy, EndpointPolicyDirection, EndpointState, EndpointStatus,
    ExternalIdentifiers, NamedPortStatus, PolicyEntry,
};
pub use identity::{CiliumIdentity, HEARTBEAT_ANNOTATION};
pub use ledger::{
    CellBlock, CellBlockState, CellSpec, EndedTerm, LEDGER_FINALIZER, Ledger, LedgerSpec, LedgerStatus, LedgerStore,
    PodCidrCell, cell_name,
};
pub use node::{
    AGENT_STORE_ANNOTATION, AddressOwner, AllocatedPool, CiliumNode, DO_NOT_GC_ANNOTATION, Encryption, FamilyAddresses,
    NeededAddresses, NodeAddressSpec, NodeFieldError, NodeIpamSpec, NodeIpamStatus, NodeSpec, NodeStatus,
    OperatorStatus, PodCidrStatus, PodCidrUse, PoolsSpec, RequestedPool, WIREGUARD_KEY_ANNOTATION,
};
pub use pool::{
    CiliumPodIpPool, FamilyPool, Ipv4Pool, Ipv6Pool, LabelSelector, PodIpPoolSpec, Requirement, SelectorOperator,
};
pub use pool_state::{BlockCounts, PoolState};

use serde::{Deserialize, Deserializer};

/// For `serde(skip_serializing_if)`: what has its default value is not written.
fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// For `serde(deserialize_with)`: `null` reads as the default value.
fn or_default<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(from: D) -> Result<T, D::Error> {
    Ok(Option::<T>::deserialize(from)?.unwrap_or_default())
}

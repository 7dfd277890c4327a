//! `cilium_node_map_v2`: node address → node id.

use core::net::IpAddr;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::addr::{NetIp, family_of};

/// Key of `cilium_node_map_v2` (Cilium: `node_key`).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct NodeKey {
    /// Zero.
    pub pad1: u16,
    /// Zero.
    pub pad2: u8,
    /// [`crate::addr::FAMILY_IPV4`] or [`crate::addr::FAMILY_IPV6`].
    pub family: u8,
    /// The node's address.
    pub ip: NetIp,
}

impl From<IpAddr> for NodeKey {
    fn from(ip: IpAddr) -> Self {
        Self { pad1: 0, pad2: 0, family: family_of(ip), ip: ip.into() }
    }
}

/// Value of `cilium_node_map_v2` (Cilium: `node_value`).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct NodeValue {
    /// 1 to 65535, chosen by the agent and kept over restarts; 0 is the local node.
    pub id: u16,
    /// IPsec security parameter index; 0 without IPsec.
    pub spi: u8,
    /// Zero.
    pub pad: u8,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::assert_layout;

    #[test]
    fn layouts_are_cilium_1_20() {
        assert_layout!(NodeKey, size 20, { pad1 @ 0, pad2 @ 2, family @ 3, ip @ 4 });
        assert_layout!(NodeValue, size 4, { id @ 0, spi @ 2, pad @ 3 });
    }
}

//! `cilium_tunnel_map`: pod CIDR → node, by longest match. Cilium 1.20 has no such map; before 1.18 it had a hash map of
//! this name. The layout here is ours: the ipcache's key, and the old map's value.

use core::net::IpAddr;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::{
    addr::{NetIp, family_of},
    ipcache::IpcacheKey,
};

/// Key of `cilium_tunnel_map`: laid out as the ipcache's.
pub type TunnelKey = IpcacheKey;

/// Value of `cilium_tunnel_map`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct TunnelValue {
    /// Address of the node that the prefix is routed to.
    pub tunnel_endpoint: NetIp,
    /// Family of `tunnel_endpoint`: [`crate::addr::FAMILY_IPV4`] or [`crate::addr::FAMILY_IPV6`].
    pub family: u8,
    /// Encryption key index: 0 none.
    pub key: u8,
    /// Id of the node in `cilium_node_map_v2`; 0 when none was given.
    pub node_id: u16,
}

impl TunnelValue {
    /// A row that leads to a node.
    #[must_use]
    pub fn new(tunnel_endpoint: IpAddr, node_id: u16) -> Self {
        Self { tunnel_endpoint: tunnel_endpoint.into(), family: family_of(tunnel_endpoint), key: 0, node_id }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::assert_layout;

    #[test]
    fn layout_has_the_old_value() {
        assert_layout!(TunnelKey, size 24, { prefixlen @ 0, prefix @ 4 });
        assert_layout!(TunnelValue, size 20, { tunnel_endpoint @ 0, family @ 16, key @ 17, node_id @ 18 });
    }
}

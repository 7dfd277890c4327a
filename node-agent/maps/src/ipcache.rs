//! `cilium_ipcache_v2`: every address and prefix of the cluster with its identity and the node that serves it.

use core::net::IpAddr;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::addr::{FAMILY_IPV6, NetIp, family_of};

/// Bits of the key that stand before the address and always match: cluster id, padding, family.
pub const STATIC_PREFIX_BITS: u32 = 32;

/// Send to this address without encapsulation, whatever `tunnel_endpoint` says.
pub const FLAG_SKIP_TUNNEL: u8 = 1;
/// `tunnel_endpoint` is set.
pub const FLAG_HAS_TUNNEL_ENDPOINT: u8 = 2;
/// `tunnel_endpoint` is an IPv6 address.
pub const FLAG_IPV6_TUNNEL_ENDPOINT: u8 = 4;
/// The address is in another cluster of the mesh.
pub const FLAG_REMOTE_CLUSTER: u8 = 8;

/// What the trie matches: the part of [`IpcacheKey`] after its prefix length. Shared with the tunnel map.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct IpPrefix {
    /// The address space that the address is unique in; 0 is this cluster's.
    pub cluster_id: u16,
    /// Zero.
    pub pad: u8,
    /// [`crate::addr::FAMILY_IPV4`] or [`crate::addr::FAMILY_IPV6`].
    pub family: u8,
    /// The address; bits beyond the prefix are zero.
    pub ip: NetIp,
}

impl IpPrefix {
    /// The match for an address in this cluster.
    #[must_use]
    #[inline(always)]
    pub const fn new(ip: NetIp, family: u8) -> Self {
        Self { cluster_id: 0, pad: 0, family, ip }
    }

    /// The prefix length, in the map's counting, that matches this one address.
    #[must_use]
    #[inline(always)]
    pub const fn full_length(&self) -> u32 {
        if self.family == FAMILY_IPV6 { STATIC_PREFIX_BITS + 128 } else { STATIC_PREFIX_BITS + 32 }
    }
}

/// Key of `cilium_ipcache_v2` (Cilium: `ipcache_key`).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct IpcacheKey {
    /// [`STATIC_PREFIX_BITS`] + the address bits that count: 64 for an IPv4 address, 160 for an IPv6 one.
    pub prefixlen: u32,
    /// What is matched.
    pub prefix: IpPrefix,
}

impl IpcacheKey {
    /// The key of a CIDR: its network address and how many bits of it count.
    #[must_use]
    pub fn new(network: IpAddr, bits: u8) -> Self {
        Self {
            prefixlen: STATIC_PREFIX_BITS + u32::from(bits),
            prefix: IpPrefix::new(network.into(), family_of(network)),
        }
    }

    /// The CIDR; `None` when the row is not one of ours (unknown family, impossible length).
    #[must_use]
    pub fn cidr(&self) -> Option<(IpAddr, u8)> {
        let ip = self.prefix.ip.to_ip(self.prefix.family)?;
        let bits = self.prefixlen.checked_sub(STATIC_PREFIX_BITS)?;
        (self.prefixlen <= self.prefix.full_length()).then(|| u8::try_from(bits).ok().map(|bits| (ip, bits)))?
    }
}

/// Value of `cilium_ipcache_v2` (Cilium: `remote_endpoint_info`).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct RemoteEndpointInfo {
    /// Security identity of whoever has the address.
    pub sec_identity: u32,
    /// Address of the node that serves it, when [`FLAG_HAS_TUNNEL_ENDPOINT`] is set.
    pub tunnel_endpoint: NetIp,
    /// Zero.
    pub pad: u16,
    /// Encryption key index: 0 none, 255 WireGuard.
    pub key: u8,
    /// `FLAG_…`.
    pub flags: u8,
}

impl RemoteEndpointInfo {
    /// A row with an identity and, for addresses of other nodes, the node to tunnel to.
    #[must_use]
    pub fn new(sec_identity: u32, tunnel_endpoint: Option<IpAddr>) -> Self {
        let flags = match tunnel_endpoint {
            None => 0,
            Some(IpAddr::V4(_)) => FLAG_HAS_TUNNEL_ENDPOINT,
            Some(IpAddr::V6(_)) => FLAG_HAS_TUNNEL_ENDPOINT | FLAG_IPV6_TUNNEL_ENDPOINT,
        };
        Self {
            sec_identity,
            tunnel_endpoint: tunnel_endpoint.map_or(NetIp::UNSPECIFIED, NetIp::from),
            pad: 0,
            key: 0,
            flags,
        }
    }

    /// The tunnel endpoint, when the row has one.
    #[must_use]
    pub fn tunnel_endpoint(&self) -> Option<IpAddr> {
        if self.flags & FLAG_HAS_TUNNEL_ENDPOINT == 0 {
            return None;
        }
        let family = if self.flags & FLAG_IPV6_TUNNEL_ENDPOINT != 0 { FAMILY_IPV6 } else { crate::addr::FAMILY_IPV4 };
        self.tunnel_endpoint.to_ip(family)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::assert_layout;

    #[test]
    fn layouts_are_cilium_1_20() {
        assert_layout!(IpcacheKey, size 24, { prefixlen @ 0, prefix @ 4 });
        assert_layout!(IpPrefix, size 20, { cluster_id @ 0, pad @ 2, family @ 3, ip @ 4 });
        assert_layout!(RemoteEndpointInfo, size 24, {
            sec_identity @ 0, tunnel_endpoint @ 4, pad @ 20, key @ 22, flags @ 23,
        });
    }

    #[test]
    fn prefix_lengths_count_the_static_part() {
        let key = IpcacheKey::new(IpAddr::from([10, 0, 2, 0]), 24);
        assert_eq!(key.prefixlen, 56);
        assert_eq!(key.cidr(), Some((IpAddr::from([10, 0, 2, 0]), 24)));
        let host = IpcacheKey::new(IpAddr::from([0xfd00, 0, 0, 0, 0, 0, 0, 1]), 128);
        assert_eq!((host.prefixlen, host.prefix.full_length()), (160, 160));
        assert_eq!(IpcacheKey { prefixlen: 70, ..key }.cidr(), None, "38 bits of an IPv4 address");
        assert_eq!(IpcacheKey { prefixlen: 8, ..key }.cidr(), None);
    }

    #[test]
    fn flags_tell_the_family_of_the_tunnel_endpoint() {
        let v6 = IpAddr::from([0xfd00, 0, 0, 0, 0, 0, 0, 9]);
        assert_eq!(RemoteEndpointInfo::new(7, None).flags, 0);
        assert_eq!(RemoteEndpointInfo::new(7, Some(IpAddr::from([192, 168, 0, 2]))).flags, 2);
        assert_eq!(RemoteEndpointInfo::new(7, Some(v6)).flags, 6);
        assert_eq!(RemoteEndpointInfo::new(7, Some(v6)).tunnel_endpoint(), Some(v6));
    }
}

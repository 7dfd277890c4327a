//! `cilium_lxc`: the endpoints of this node, by address. Pods have a row per address; the node's own addresses have one
//! with [`FLAG_HOST`].

use core::net::IpAddr;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::addr::{Mac64, NetIp, family_of};

/// The address belongs to the host, not to an endpoint with a device; nothing else in the row counts.
pub const FLAG_HOST: u32 = 1;
/// The endpoint lives in the host's network namespace.
pub const FLAG_AT_HOST_NS: u32 = 2;
/// The endpoint's IPv4 traffic is not masqueraded.
pub const FLAG_NO_SNAT_V4: u32 = 4;
/// The endpoint's IPv6 traffic is not masqueraded.
pub const FLAG_NO_SNAT_V6: u32 = 8;

/// Key of `cilium_lxc` (Cilium: `endpoint_key`).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct EndpointKey {
    /// The endpoint's address.
    pub ip: NetIp,
    /// [`crate::addr::FAMILY_IPV4`] or [`crate::addr::FAMILY_IPV6`].
    pub family: u8,
    /// Unused, zero.
    pub key: u8,
    /// The address space that the address is unique in; 0 is this cluster's.
    pub cluster_id: u16,
}

impl EndpointKey {
    /// The key of an address, from parts that are already in map form.
    #[must_use]
    #[inline(always)]
    pub const fn new(ip: NetIp, family: u8) -> Self {
        Self { ip, family, key: 0, cluster_id: 0 }
    }
}

impl From<IpAddr> for EndpointKey {
    fn from(ip: IpAddr) -> Self {
        Self::new(ip.into(), family_of(ip))
    }
}

/// Value of `cilium_lxc` (Cilium: `endpoint_info`).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct EndpointInfo {
    /// Interface index of the host side of the endpoint's device pair.
    pub ifindex: u32,
    /// Unused, zero.
    pub unused: u16,
    /// Endpoint id: the slot of its policy program in `cilium_call_policy`.
    pub lxc_id: u16,
    /// `FLAG_…`.
    pub flags: u32,
    /// Unused by Basal, zero.
    pub rt_info: u32,
    /// MAC address of the device inside the pod.
    pub mac: Mac64,
    /// MAC address of the host side of the pair.
    pub node_mac: Mac64,
    /// The endpoint's security identity.
    pub sec_id: u32,
    /// Interface index of the device that leads to the endpoint's uplink; 0 when there is none.
    pub parent_ifindex: u32,
    /// Zero.
    pub pad: [u32; 2],
}

impl EndpointInfo {
    /// The row of one of the node's own addresses.
    pub const HOST: Self = Self {
        ifindex: 0,
        unused: 0,
        lxc_id: 0,
        flags: FLAG_HOST,
        rt_info: 0,
        mac: Mac64 { octets: [0; 6], pad: [0; 2] },
        node_mac: Mac64 { octets: [0; 6], pad: [0; 2] },
        sec_id: 0,
        parent_ifindex: 0,
        pad: [0; 2],
    };

    /// True for one of the node's own addresses.
    #[must_use]
    #[inline(always)]
    pub const fn is_host(&self) -> bool {
        self.flags & FLAG_HOST != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::assert_layout;

    #[test]
    fn layouts_are_cilium_1_20() {
        assert_layout!(EndpointKey, size 20, { ip @ 0, family @ 16, key @ 17, cluster_id @ 18 });
        assert_layout!(EndpointInfo, size 48, {
            ifindex @ 0, unused @ 4, lxc_id @ 6, flags @ 8, rt_info @ 12, mac @ 16, node_mac @ 24, sec_id @ 32,
            parent_ifindex @ 36, pad @ 40,
        });
    }

    #[test]
    fn an_ipv4_key_has_zeroes_after_the_address() {
        let key = EndpointKey::from(IpAddr::from([10, 0, 1, 7]));
        assert_eq!(key.as_bytes(), [10, 0, 1, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0]);
    }
}

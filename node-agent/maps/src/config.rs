//! What the loader tells the programs when it loads them: the constant [`Config`] in their read-only data.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::addr::NetIp;

/// Name of the global variable in the object.
pub const SYMBOL: &str = "BASAL_CONFIG";

/// Pod traffic always passes the host stack, where kube-proxy translates services (Cilium's
/// `enable-host-legacy-routing`).
pub const FLAG_LEGACY_ROUTING: u32 = 1;
/// The cluster has both families, so world is two identities (9 and 10) rather than one (2).
pub const FLAG_SPLIT_WORLD: u32 = 2;
/// There is no tunnel: packets travel between nodes as pods sent them (Cilium's `routing-mode: native`).
pub const FLAG_NATIVE_ROUTING: u32 = 4;
/// Programs on the node's devices masquerade, instead of nftables (Cilium's `enable-bpf-masquerade`).
pub const FLAG_BPF_MASQUERADE: u32 = 8;
/// What pods send to other nodes is masqueraded in native routing, too (Cilium's `enable-remote-node-masquerade`).
pub const FLAG_REMOTE_NODE_MASQUERADE: u32 = 16;

/// Load-time constants of all programs.
#[derive(Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Config {
    /// The pods' IPv4 gateway; unspecified without IPv4.
    pub router_ipv4: NetIp,
    /// The pods' IPv6 gateway; unspecified without IPv6.
    pub router_ipv6: NetIp,
    /// Interface index of `cilium_vxlan`; 0 without a tunnel.
    pub vxlan_ifindex: u32,
    /// Largest IP packet that reaches other nodes whole, in bytes: one that fits into the tunnel where there is one.
    pub route_mtu: u32,
    /// UDP port of the tunnel, host order; 0 without one.
    pub tunnel_port: u32,
    /// `FLAG_…`.
    pub flags: u32,
    /// How many rows the maps of TCP connections have; 0 where programs do not masquerade. No program reads this and the
    /// two that follow: the loader makes the maps by them.
    pub ct_tcp_max: u32,
    /// How many rows the maps of other connections have.
    pub ct_any_max: u32,
    /// How many rows the maps of NAT have.
    pub nat_max: u32,
}

impl Config {
    /// What an object has before a loader writes it; programs that run with it pass nothing on.
    pub const UNSET: Self = Self {
        router_ipv4: NetIp::UNSPECIFIED,
        router_ipv6: NetIp::UNSPECIFIED,
        vxlan_ifindex: 0,
        route_mtu: 0,
        tunnel_port: 0,
        flags: FLAG_LEGACY_ROUTING,
        ct_tcp_max: 0,
        ct_any_max: 0,
        nat_max: 0,
    };

    /// True when pod traffic always passes the host stack.
    #[must_use]
    #[inline(always)]
    pub const fn legacy_routing(&self) -> bool {
        self.flags & FLAG_LEGACY_ROUTING != 0
    }

    /// True when world is two identities.
    #[must_use]
    #[inline(always)]
    pub const fn split_world(&self) -> bool {
        self.flags & FLAG_SPLIT_WORLD != 0
    }

    /// True when there is no tunnel.
    #[must_use]
    #[inline(always)]
    pub const fn native_routing(&self) -> bool {
        self.flags & FLAG_NATIVE_ROUTING != 0
    }

    /// True when programs on the node's devices masquerade.
    #[must_use]
    #[inline(always)]
    pub const fn bpf_masquerade(&self) -> bool {
        self.flags & FLAG_BPF_MASQUERADE != 0
    }

    /// True when what pods send to other nodes is masqueraded in native routing, too.
    #[must_use]
    #[inline(always)]
    pub const fn remote_node_masquerade(&self) -> bool {
        self.flags & FLAG_REMOTE_NODE_MASQUERADE != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::assert_layout;

    #[test]
    fn layout_is_fixed() {
        assert_layout!(Config, size 60, {
            router_ipv4 @ 0, router_ipv6 @ 16, vxlan_ifindex @ 32, route_mtu @ 36, tunnel_port @ 40, flags @ 44,
            ct_tcp_max @ 48, ct_any_max @ 52, nat_max @ 56,
        });
    }
}

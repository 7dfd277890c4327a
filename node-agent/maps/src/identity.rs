//! Reserved security identities and how an identity travels as a VXLAN network identifier.

use crate::addr::FAMILY_IPV6;

/// No identity.
pub const UNKNOWN: u32 = 0;
/// The local node.
pub const HOST: u32 = 1;
/// Anything outside the cluster.
pub const WORLD: u32 = 2;
/// A pod that Cilium does not manage.
pub const UNMANAGED: u32 = 3;
/// The health endpoint.
pub const HEALTH: u32 = 4;
/// An endpoint whose labels are not known yet.
pub const INIT: u32 = 5;
/// Another node of the cluster.
pub const REMOTE_NODE: u32 = 6;
/// A node that runs the API server.
pub const KUBE_APISERVER: u32 = 7;
/// Ingress proxy.
pub const INGRESS: u32 = 8;
/// IPv4 outside the cluster, in a dual-stack cluster.
pub const WORLD_IPV4: u32 = 9;
/// IPv6 outside the cluster, in a dual-stack cluster.
pub const WORLD_IPV6: u32 = 10;

/// The largest identity that fits into a VXLAN network identifier.
pub const MAX_ON_WIRE: u32 = 0x00ff_ffff;

/// The network identifier that carries a source identity: the local host is a remote node to the receiver, and the two
/// world identities share the old one.
#[must_use]
#[inline(always)]
pub const fn to_vni(identity: u32) -> u32 {
    match identity {
        HOST => REMOTE_NODE,
        WORLD_IPV4 | WORLD_IPV6 => WORLD,
        other => other,
    }
}

/// The source identity that a received network identifier carries, or `None` for one that no sender may use.
///
/// `split_world` is set in dual-stack clusters, where world is split again by the family of the inner packet.
#[must_use]
#[inline(always)]
pub const fn from_vni(vni: u32, family: u8, split_world: bool) -> Option<u32> {
    match vni {
        HOST => None,
        WORLD => Some(world(family, split_world)),
        other => Some(other),
    }
}

/// The identity of whatever no map knows.
#[must_use]
#[inline(always)]
pub const fn world(family: u8, split_world: bool) -> u32 {
    if !split_world {
        WORLD
    } else if family == FAMILY_IPV6 {
        WORLD_IPV6
    } else {
        WORLD_IPV4
    }
}

/// True for identities of nodes other than this one.
#[must_use]
#[inline(always)]
pub const fn is_remote_node(identity: u32) -> bool {
    matches!(identity, REMOTE_NODE | KUBE_APISERVER)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::FAMILY_IPV4;

    #[test]
    fn identities_on_the_wire() {
        assert_eq!(to_vni(HOST), 6);
        assert_eq!((to_vni(WORLD_IPV4), to_vni(WORLD_IPV6)), (2, 2));
        assert_eq!(to_vni(54321), 54321);
        assert_eq!(from_vni(1, FAMILY_IPV4, false), None);
        assert_eq!(from_vni(2, FAMILY_IPV4, false), Some(2));
        assert_eq!(from_vni(2, FAMILY_IPV4, true), Some(9));
        assert_eq!(from_vni(2, FAMILY_IPV6, true), Some(10));
        assert_eq!(from_vni(0xff_ffff, FAMILY_IPV6, true), Some(0xff_ffff));
    }
}

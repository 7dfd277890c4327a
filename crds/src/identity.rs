//! Numeric security identities: 32 bits, of which 24 travel in the VNI of a tunnelled packet.

use std::{fmt, ops::RangeInclusive, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::names::ClusterId;

/// Bits of an identity below the cluster id.
const CLUSTER_SHIFT: u32 = 16;
/// Bits of an identity below the scope.
const SCOPE_SHIFT: u32 = 24;

/// Why a text or number is no identity.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// No decimal number of 32 bits.
    #[error("{0:?} is not a numeric identity: a decimal number below 2^32 is wanted")]
    NotANumber(String),
}

/// A numeric security identity: bits 0 to 15 number it, bits 16 to 23 are the cluster id, bits 24 to 31 the scope.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct IdentityId(u32);

/// What the upper 8 bits of an identity say about where it is valid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Scope {
    /// In the whole cluster, or mesh.
    Global,
    /// On the node that made it, for a CIDR or a DNS name.
    Local,
    /// On the node that made it, for another node.
    RemoteNode,
    /// Not defined by Cilium 1.20.
    Undefined,
}

impl IdentityId {
    /// Not known (yet).
    pub const UNKNOWN: Self = Self(0);
    /// The local host.
    pub const HOST: Self = Self(1);
    /// Outside of the cluster.
    pub const WORLD: Self = Self(2);
    /// A pod that is not managed.
    pub const UNMANAGED: Self = Self(3);
    /// The health endpoint.
    pub const HEALTH: Self = Self(4);
    /// An endpoint whose labels are not known yet.
    pub const INIT: Self = Self(5);
    /// Another node.
    pub const REMOTE_NODE: Self = Self(6);
    /// The API server, where it is no pod.
    pub const KUBE_APISERVER: Self = Self(7);
    /// The source address of an ingress proxy.
    pub const INGRESS: Self = Self(8);
    /// Outside of the cluster, IPv4, in a dual-stack cluster.
    pub const WORLD_IPV4: Self = Self(9);
    /// Outside of the cluster, IPv6, in a dual-stack cluster.
    pub const WORLD_IPV6: Self = Self(10);
    /// The lowest identity that may be allocated; those below are reserved.
    pub const MIN_ALLOCATED: Self = Self(256);

    /// Takes any number.
    #[must_use]
    pub const fn new(id: u32) -> Self {
        Self(id)
    }

    /// The number.
    #[must_use]
    pub const fn get(self) -> u32 {
        self.0
    }

    /// Where the identity is valid.
    #[must_use]
    pub const fn scope(self) -> Scope {
        match self.0 >> SCOPE_SHIFT {
            0 => Scope::Global,
            1 => Scope::Local,
            2 => Scope::RemoteNode,
            _ => Scope::Undefined,
        }
    }

    /// The cluster of a global identity; identities of other scopes have none.
    #[must_use]
    pub const fn cluster(self) -> Option<ClusterId> {
        match self.scope() {
            Scope::Global => Some(ClusterId::new((self.0 >> CLUSTER_SHIFT) as u8)),
            Scope::Local | Scope::RemoteNode | Scope::Undefined => None,
        }
    }

    /// Whether the identity has a fixed meaning and is never allocated (below 256).
    #[must_use]
    pub const fn is_reserved(self) -> bool {
        self.0 < Self::MIN_ALLOCATED.0
    }

    /// The key of the `reserved:` label of a reserved identity, `host` for example.
    #[must_use]
    pub const fn reserved_name(self) -> Option<&'static str> {
        Some(match self.0 {
            0 => "unknown",
            1 => "host",
            2 => "world",
            3 => "unmanaged",
            4 => "health",
            5 => "init",
            6 => "remote-node",
            7 => "kube-apiserver",
            8 => "ingress",
            9 => "world-ipv4",
            10 => "world-ipv6",
            11 => "aggregate-cluster",
            12 => "aggregate-cluster-mesh",
            13 => "aggregate-world",
            14 => "aggregate-remote-node",
            _ => return None,
        })
    }
}

impl fmt::Display for IdentityId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for IdentityId {
    type Err = IdentityError;

    fn from_str(text: &str) -> Result<Self, IdentityError> {
        // Rust reads "+1" as a number; nothing writes it, and two keys must not name one identity.
        let canonical = text.bytes().all(|b| b.is_ascii_digit()) && (text == "0" || !text.starts_with('0'));
        let number = if canonical { text.parse().ok() } else { None };
        number.map(Self).ok_or_else(|| IdentityError::NotANumber(text.to_owned()))
    }
}

/// The identities that one cluster allocates.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdentityRange(RangeInclusive<u32>);

impl IdentityRange {
    /// Cluster 0 has 256 to 65535; cluster N has N·65536 to N·65536 + 65535.
    #[must_use]
    pub fn of(cluster: ClusterId) -> Self {
        let base = u32::from(cluster.get()) << CLUSTER_SHIFT;
        let first = if base == 0 { IdentityId::MIN_ALLOCATED.0 } else { base };
        Self(first..=base + ((1 << CLUSTER_SHIFT) - 1))
    }

    /// The lowest.
    #[must_use]
    pub fn first(&self) -> IdentityId {
        IdentityId(*self.0.start())
    }

    /// The highest.
    #[must_use]
    pub fn last(&self) -> IdentityId {
        IdentityId(*self.0.end())
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> u32 {
        self.0.end() - self.0.start() + 1
    }

    /// Whether `id` is one of them.
    #[must_use]
    pub fn contains(&self, id: IdentityId) -> bool {
        self.0.contains(&id.0)
    }

    /// Those that new identities get in one place. The other place never gives one of them.
    #[must_use]
    pub fn drawn_in(&self, place: IdentityPlace) -> DrawnIdentities {
        // The first number of every range is even.
        let offset = match place {
            IdentityPlace::CustomResources => 0,
            IdentityPlace::Etcd => 1,
        };
        DrawnIdentities { first: self.0.start() + offset, count: self.count() / 2 }
    }
}

/// Where a cluster keeps its identities.
///
/// Each place takes care by itself that no number has two sets of labels. While the store of a running cluster is changed
/// agents of both kinds allocate, and none of them looks into the other place; so each draws from numbers of its own: even
/// ones become CiliumIdentities, odd ones keys in etcd. What exists in either place is used whatever its number is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IdentityPlace {
    /// Keys in etcd.
    Etcd,
    /// CiliumIdentities.
    CustomResources,
}

/// Every other number of a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DrawnIdentities {
    first: u32,
    count: u32,
}

impl DrawnIdentities {
    /// How many there are.
    #[must_use]
    pub fn count(&self) -> u32 {
        self.count
    }

    /// All of them once, from the place on that `random` points to.
    pub fn from_place(self, random: u64) -> impl Iterator<Item = IdentityId> {
        let start = u32::try_from(random % u64::from(self.count)).unwrap_or_default();
        (0..self.count).map(move |step| IdentityId(self.first + (start + step) % self.count * 2))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn ranges_are_those_of_cilium() {
        let range = IdentityRange::of(ClusterId::new(0));
        assert_eq!((range.first().get(), range.last().get(), range.count()), (256, 65535, 65280));
        let range = IdentityRange::of(ClusterId::new(3));
        assert_eq!((range.first().get(), range.last().get(), range.count()), (196_608, 262_143, 65536));
        assert!(range.contains(IdentityId::new(196_915)));
        assert!(!range.contains(IdentityId::new(262_144)));
        let range = IdentityRange::of(ClusterId::new(255));
        assert_eq!(range.last().get(), 0x00ff_ffff);
    }

    #[test]
    fn no_number_is_drawn_in_both_places() {
        for cluster in [0, 3, 255] {
            let range = IdentityRange::of(ClusterId::new(cluster));
            let drawn = |place| range.drawn_in(place).from_place(7).collect::<BTreeSet<_>>();
            let (etcd, objects) = (drawn(IdentityPlace::Etcd), drawn(IdentityPlace::CustomResources));
            assert!(etcd.is_disjoint(&objects));
            let all: BTreeSet<IdentityId> = etcd.union(&objects).copied().collect();
            assert_eq!(all, (range.first().get()..=range.last().get()).map(IdentityId::new).collect());
        }
    }

    #[test]
    fn scope_and_cluster_are_read_from_the_bits() {
        assert_eq!(IdentityId::new(196_915).cluster(), Some(ClusterId::new(3)));
        assert_eq!(IdentityId::WORLD.cluster(), Some(ClusterId::new(0)));
        assert_eq!(IdentityId::new(0x0100_0001).scope(), Scope::Local);
        assert_eq!(IdentityId::new(0x0100_0001).cluster(), None);
        assert_eq!(IdentityId::new(0x02ff_ffff).scope(), Scope::RemoteNode);
        assert_eq!(IdentityId::new(0x0300_0000).scope(), Scope::Undefined);
    }

    #[test]
    fn reserved_identities_have_names() {
        assert_eq!(IdentityId::REMOTE_NODE.reserved_name(), Some("remote-node"));
        assert_eq!(IdentityId::new(15).reserved_name(), None);
        assert!(IdentityId::new(255).is_reserved());
        assert!(!IdentityId::MIN_ALLOCATED.is_reserved());
    }

    #[test]
    fn only_one_text_names_an_identity() {
        assert_eq!("4294967295".parse(), Ok(IdentityId::new(u32::MAX)));
        for bad in ["", "+1", "01", "-1", "1 ", "4294967296", "0x10"] {
            assert_eq!(bad.parse::<IdentityId>(), Err(IdentityError::NotANumber(bad.to_owned())));
        }
    }
}

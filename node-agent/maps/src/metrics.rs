//! `cilium_metrics`: packets and bytes by reason, direction and place in the program, one copy per CPU.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Key of `cilium_metrics` (Cilium: `metrics_key`).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct MetricsKey {
    /// A [`crate::reason::Reason`].
    pub reason: u8,
    /// A [`Direction`] in the low two bits.
    pub dir: u8,
    /// Source line that counted.
    pub line: u16,
    /// A [`File`].
    pub file: u8,
    /// Zero.
    pub pad1: u8,
    /// Zero.
    pub pad2: u16,
}

/// Value of `cilium_metrics`, per CPU (Cilium: `metrics_value`).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct MetricsValue {
    /// Packets.
    pub count: u64,
    /// Bytes, with the link-layer header.
    pub bytes: u64,
}

/// Which way the packet went, as seen from the endpoint or node that counted it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
#[repr(u8)]
pub enum Direction {
    /// Not known.
    Unknown = 0,
    /// Towards the endpoint or node.
    Ingress = 1,
    /// Away from it.
    Egress = 2,
    /// Service translation.
    Service = 3,
}

impl Direction {
    /// The direction that a key's byte means.
    #[must_use]
    pub const fn from_bits(dir: u8) -> Self {
        match dir & 3 {
            1 => Self::Ingress,
            2 => Self::Egress,
            3 => Self::Service,
            _ => Self::Unknown,
        }
    }

    /// The word that Cilium prints.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Unknown => "UNKNOWN",
            Self::Ingress => "INGRESS",
            Self::Egress => "EGRESS",
            Self::Service => "SERVICE",
        }
    }
}

/// The object that counted, by Cilium's file ids. Basal's programs use the id of the Cilium object that they stand for.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
#[repr(u8)]
pub enum File {
    /// Programs on `cilium_host` and `cilium_net`.
    Host = 1,
    /// Programs of endpoints.
    Lxc = 2,
    /// Programs on `cilium_vxlan`.
    Overlay = 3,
}

/// Cilium's name for a file id; `None` for an id that Cilium 1.20 does not have.
#[must_use]
pub const fn file_name(id: u8) -> Option<&'static str> {
    Some(match id {
        1 => "bpf_host.c",
        2 => "bpf_lxc.c",
        3 => "bpf_overlay.c",
        4 => "bpf_xdp.c",
        5 => "bpf_sock.c",
        7 => "bpf_wireguard.c",
        101 => "drop.h",
        102 => "srv6.h",
        103 => "icmp6.h",
        104 => "nodeport.h",
        105 => "lb.h",
        106 => "mcast.h",
        107 => "ipv4.h",
        108 => "conntrack.h",
        109 => "local_delivery.h",
        110 => "trace.h",
        111 => "encap.h",
        112 => "host_firewall.h",
        113 => "nodeport_egress.h",
        114 => "ipv6.h",
        115 => "classifiers.h",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::assert_layout;

    #[test]
    fn layouts_are_cilium_1_20() {
        assert_layout!(MetricsKey, size 8, { reason @ 0, dir @ 1, line @ 2, file @ 4, pad1 @ 5, pad2 @ 6 });
        assert_layout!(MetricsValue, size 16, { count @ 0, bytes @ 8 });
    }

    #[test]
    fn ids_are_the_contract() {
        assert_eq!((Direction::Ingress as u8, Direction::Egress as u8, Direction::Service as u8), (1, 2, 3));
        assert_eq!(Direction::from_bits(0xfe), Direction::Egress);
        assert_eq!(file_name(File::Lxc as u8), Some("bpf_lxc.c"));
        assert_eq!(file_name(6), None);
    }
}

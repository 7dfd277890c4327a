//! What a node has, as a value that can be compared: desired and observed state are the same type.
//!
//! It holds what Basal owns and nothing else. Policy rules and neighbours are not in it because this datapath needs
//! none: no rule of ours has to come before the local table, so that stays at preference 0 (Cilium moves it to 100
//! for its proxy rules); `cilium_host` and `cilium_net` have ARP off, and pods find their gateway by asking the programs.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::IpAddr,
    path::PathBuf,
};

use ipnet::IpNet;

use crate::{
    forward::FilterTable,
    names::IfName,
    nft::NftTable,
    program::{ProgramHash, ProgramSet},
    rows::MapId,
};

/// The datapath of a node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NodeState {
    /// Kernel parameters by path below `/proc/sys`.
    pub sysctls: BTreeMap<SysctlKey, String>,
    /// Devices by name.
    pub links: BTreeMap<IfName, Link>,
    /// Addresses on devices; link-local ones are the kernel's business and never listed.
    pub addresses: BTreeSet<Address>,
    /// Loaded program sets. One is desired; more may be observed.
    pub programs: BTreeSet<ProgramHash>,
    /// What is pinned of sets that cannot be used: of an earlier version, whose maps were made otherwise, or what a crash
    /// left. None is desired.
    pub broken_programs: BTreeSet<ProgramHash>,
    /// What the desired set is loaded from. Observed state has none: it is inside the programs, and in their hash.
    pub load_from: Option<ProgramSet>,
    /// Rows of the maps that the agent fills. A map that does not exist, or was made differently, is absent.
    pub maps: BTreeMap<MapId, BTreeMap<Vec<u8>, Vec<u8>>>,
    /// Where programs are attached, and from which set.
    pub hooks: BTreeMap<Hook, ProgramHash>,
    /// Routes in the main table.
    pub routes: BTreeMap<RouteKey, Route>,
    /// nftables tables of family inet by name.
    pub nft: BTreeMap<String, NftTable>,
    /// Our rules in each table `filter` of iptables that there is: [`crate::forward::rules`], or none.
    pub forward: BTreeMap<FilterTable, Vec<String>>,
}

/// A kernel parameter: its path below `/proc/sys`, with slashes (`net/ipv4/ip_forward`).
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SysctlKey(String);

impl SysctlKey {
    /// A parameter that is not per device.
    #[must_use]
    pub fn global(path: &'static str) -> Self {
        Self(path.to_owned())
    }

    /// `net/<family>/conf/<device>/<name>`; `family` is `ipv4` or `ipv6`.
    #[must_use]
    pub fn device(family: &'static str, device: &IfName, name: &'static str) -> Self {
        Self(format!("net/{family}/conf/{device}/{name}"))
    }

    /// The path below `/proc/sys`.
    #[must_use]
    pub fn path(&self) -> &str {
        &self.0
    }

    /// The device that a per-device parameter belongs to; `None` for global ones, `all` and `default` included.
    #[must_use]
    pub fn device_name(&self) -> Option<&str> {
        let rest = self.0.strip_prefix("net/ipv4/conf/").or_else(|| self.0.strip_prefix("net/ipv6/conf/"))?;
        let (name, _) = rest.split_once('/')?;
        (name != "all" && name != "default").then_some(name)
    }
}

impl fmt::Debug for SysctlKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// What kind of device.
    pub kind: LinkKind,
    /// Link MTU in bytes.
    pub mtu: u32,
    /// Administratively up.
    pub up: bool,
    /// Answers and sends ARP and neighbour discovery (the opposite of the NOARP flag).
    pub arp: bool,
}

/// What kind of device a link is, with what cannot be changed after it was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LinkKind {
    /// One end of a pair whose both ends are in this network namespace.
    Veth {
        /// The other end.
        peer: IfName,
    },
    /// A VXLAN device without an identifier or remote of its own: both come from the programs, per packet.
    Vxlan {
        /// UDP port.
        port: u16,
    },
    /// The host side of an endpoint's pair. Desired state says how to make the pod's side; observed state says `None`,
    /// and the two compare as equal, because the pod's side is not looked into again.
    Endpoint(Option<PodSide>),
    /// A device with a name of ours that is of another kind, by the kernel's word for it.
    Other(String),
}

impl LinkKind {
    /// True when an observed device need not be made again to become the desired one.
    #[must_use]
    pub fn fits(&self, observed: &Self) -> bool {
        match (self, observed) {
            (Self::Endpoint(_), Self::Endpoint(_)) => true,
            (desired, observed) => desired == observed,
        }
    }
}

/// How the pod's end of an endpoint's device pair is made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodSide {
    /// The pod's network namespace, a path that the agent can open. Empty when it is not known: then the pair exists,
    /// and only its host side is looked after.
    pub netns: PathBuf,
    /// Name of the device in the pod, usually `eth0`.
    pub name: IfName,
    /// MAC address in the pod.
    pub mac: [u8; 6],
    /// MAC address of the host side.
    pub host_mac: [u8; 6],
    /// The pod's addresses, one of a family at most, each with the router address of that family.
    pub addresses: Vec<PodAddress>,
    /// MTU of the pod's default routes in bytes.
    pub route_mtu: u32,
}

/// An address of a pod and the gateway of its default route.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PodAddress {
    /// The pod's address, set as a /32 or /128.
    pub ip: IpAddr,
    /// The router address of the same family.
    pub gateway: IpAddr,
}

/// An address on a device.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Address {
    /// The device.
    pub link: IfName,
    /// Address and prefix length.
    pub net: IpNet,
}

/// Where a route leads, and over which device: one route of ours per pair.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct RouteKey {
    /// Destination.
    pub destination: IpNet,
    /// Device.
    pub link: IfName,
}

/// The rest of a route. All of ours are unicast routes in the main table, `proto kernel`, so that network managers leave
/// them alone. Those over devices that are not ours have a next hop and [`DIRECT_METRIC`]: nobody else's have all three.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Route {
    /// Next hop; a route without one has scope link.
    pub gateway: Option<IpAddr>,
    /// Preferred source address.
    pub source: Option<IpAddr>,
    /// MTU in bytes, when the route has one of its own.
    pub mtu: Option<u32>,
}

/// Metric of our routes over devices that are not ours: "ba". It tells them from the kernel's and from those of others,
/// which are therefore never replaced or removed, and one of those for the same destination goes first.
pub const DIRECT_METRIC: u32 = 0x6261;

/// A place where a program runs.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Hook {
    /// A program on a device of the node.
    Device {
        /// The device.
        link: IfName,
        /// The program.
        symbol: Symbol,
    },
    /// `cil_from_container` on the host side of an endpoint's pair.
    Endpoint {
        /// Endpoint id, which names the pin's folder.
        id: u16,
        /// The device. A pin whose device is gone is observed under [`IfName::gone`].
        link: IfName,
    },
    /// `cil_lxc_policy` in the slot of `cilium_call_policy` that delivers to an endpoint.
    Policy {
        /// Endpoint id: the slot.
        id: u16,
    },
}

impl Hook {
    /// The program that belongs there.
    #[must_use]
    pub fn symbol(&self) -> Symbol {
        match self {
            Self::Device { symbol, .. } => *symbol,
            Self::Endpoint { .. } => Symbol::FromContainer,
            Self::Policy { .. } => Symbol::LxcPolicy,
        }
    }

    /// The device, for hooks that are on one.
    #[must_use]
    pub fn link(&self) -> Option<&IfName> {
        match self {
            Self::Device { link, .. } | Self::Endpoint { link, .. } => Some(link),
            Self::Policy { .. } => None,
        }
    }
}

/// The programs, by Cilium's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Symbol {
    /// Packets that a pod sends.
    FromContainer,
    /// Packets for a pod; called, not attached.
    LxcPolicy,
    /// Packets that the host sends to `cilium_host`.
    FromHost,
    /// Packets that reach the host from `cilium_host` or `cilium_net`.
    ToHost,
    /// Packets out of the tunnel.
    FromOverlay,
    /// Packets into the tunnel.
    ToOverlay,
    /// Packets from outside of the node.
    FromNetdev,
    /// Packets that leave the node.
    ToNetdev,
}

/// The hook of a device that a program is attached to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Direction {
    /// Packets that the device received.
    Ingress,
    /// Packets that the device is about to send.
    Egress,
}

impl Symbol {
    /// Every program.
    pub const ALL: [Self; 8] = [
        Self::FromContainer,
        Self::LxcPolicy,
        Self::FromHost,
        Self::ToHost,
        Self::FromOverlay,
        Self::ToOverlay,
        Self::FromNetdev,
        Self::ToNetdev,
    ];

    /// Those of a set that masquerades, or of one that does not.
    pub fn of(masquerades: bool) -> impl Iterator<Item = Self> {
        Self::ALL.into_iter().filter(move |symbol| masquerades || !symbol.is_for_masquerading())
    }

    /// True for those that there are only where programs masquerade.
    #[must_use]
    pub const fn is_for_masquerading(self) -> bool {
        matches!(self, Self::FromNetdev | Self::ToNetdev)
    }

    /// Name of the program in the object, of its pin, and of its link's pin.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::FromContainer => "cil_from_container",
            Self::LxcPolicy => "cil_lxc_policy",
            Self::FromHost => "cil_from_host",
            Self::ToHost => "cil_to_host",
            Self::FromOverlay => "cil_from_overlay",
            Self::ToOverlay => "cil_to_overlay",
            Self::FromNetdev => "cil_from_netdev",
            Self::ToNetdev => "cil_to_netdev",
        }
    }

    /// Which hook of a device it is made for.
    #[must_use]
    pub const fn direction(self) -> Direction {
        match self {
            Self::FromContainer | Self::LxcPolicy | Self::ToHost | Self::FromOverlay | Self::FromNetdev => {
                Direction::Ingress
            }
            Self::FromHost | Self::ToOverlay | Self::ToNetdev => Direction::Egress,
        }
    }
}

//! The port to the kernel.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    path::Path,
};

use async_trait::async_trait;
use basal_runtime::{outcome::Outcome, reason::Reason};
use futures::stream::BoxStream;
use ipnet::IpNet;

use crate::{
    flows::MapUse,
    names::IfName,
    op::Op,
    state::{NodeState, Route},
};

/// Reads and changes the node's datapath. Implemented by [`crate::linux::LinuxKernel`] and by models in tests.
#[async_trait]
pub trait Kernel: Send + Sync + 'static {
    /// Reads back everything of ours, and the facts about other devices that plans need.
    ///
    /// # Errors
    /// When a part of the picture is missing: a partial picture is never given out, because what is not in it would be
    /// made or removed.
    async fn read(&self) -> Result<Observed, ReadError>;

    /// The same without the rows of the ipcache, for whoever heard [`Kernel::events`]: they are as many as the cluster has
    /// addresses, reading them is most of the work, and no event tells of them.
    ///
    /// # Errors
    /// As [`Kernel::read`].
    async fn read_without_ipcache(&self) -> Result<Observed, ReadError>;

    /// Reads one device, ours or not, and nothing else; `None` when there is none.
    ///
    /// # Errors
    /// As [`Kernel::read`].
    async fn device(&self, name: &IfName) -> Result<Option<Device>, ReadError>;

    /// Reads a device in the network namespace that a path leads to, with the routes over it; `None` when there is none.
    ///
    /// # Errors
    /// The namespace cannot be entered or read.
    async fn pod_device(&self, netns: &Path, name: &IfName) -> Result<Option<PodDevice>, ReadError>;

    /// Makes one change. It is idempotent.
    async fn apply(&self, op: &Op) -> Outcome<(), OpError>;

    /// Takes away what is left of connections that ended, and tells how full the maps of flows are; nothing where no
    /// program masquerades.
    ///
    /// # Errors
    /// As [`Kernel::read`].
    async fn collect_flows(&self) -> Result<Vec<MapUse>, ReadError>;

    /// Tells that devices, addresses or routes changed. The stream ends when the subscription is lost; whoever
    /// subscribes again must read first.
    fn events(&self) -> BoxStream<'static, KernelEvent>;
}

/// What [`Kernel::read`] gives.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Observed {
    /// What there is of what Basal owns.
    pub state: NodeState,
    /// Every device of the namespace.
    pub devices: BTreeMap<IfName, Device>,
    /// The networks that devices other than ours are on, by the main table: the device on whose link a network is, or
    /// none for a part of such a network that the table has elsewhere, behind a router or nowhere.
    pub networks: BTreeMap<IpNet, Option<IfName>>,
    /// The devices other than ours that a default route of the main table leads over.
    pub default_devices: BTreeSet<IfName>,
}

/// A device as it was found, ours or not.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Device {
    /// Interface index.
    pub index: u32,
    /// MAC address; `None` for devices without one.
    pub mac: Option<[u8; 6]>,
    /// Link MTU in bytes.
    pub mtu: u32,
    /// Administratively up.
    pub up: bool,
    /// Index of the other end of a pair, in the namespace in which that is; `None` for other devices.
    pub peer: Option<u32>,
    /// The kernel's word for its kind (`veth`, `vxlan`, `dummy`); `None` for hardware and loopback.
    pub kind: Option<String>,
    /// All of its addresses, link-local ones too.
    pub addresses: Vec<IpNet>,
}

/// A device in a pod's network namespace.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PodDevice {
    /// The device.
    pub device: Device,
    /// The unicast routes of the main table that lead over it, by destination; of several with one destination the one
    /// that the kernel prefers.
    pub routes: BTreeMap<IpNet, Route>,
}

impl Observed {
    /// The device that has an address.
    #[must_use]
    pub fn device_with(&self, ip: IpAddr) -> Option<(&IfName, &Device)> {
        self.devices.iter().find(|(_, device)| device.addresses.iter().any(|net| net.addr() == ip))
    }

    /// The device on whose link an address is; none for one that is reached by way of a router, or not at all.
    #[must_use]
    pub fn link_to(&self, ip: IpAddr) -> Option<&IfName> {
        let containing = self.networks.iter().filter(|(network, _)| network.contains(&ip));
        containing.max_by_key(|(network, _)| network.prefix_len())?.1.as_ref()
    }
}

/// Something changed in the kernel; [`Kernel::read`] tells what it is now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KernelEvent {
    /// A device appeared, changed or vanished.
    Link,
    /// An address appeared or vanished.
    Address,
    /// A route appeared or vanished.
    Route,
}

/// Reading failed.
#[derive(Debug, thiserror::Error)]
#[error("reading {what} failed: {source}")]
pub struct ReadError {
    /// What was read.
    pub what: String,
    /// Why it failed.
    #[source]
    pub source: std::io::Error,
}

impl ReadError {
    /// An error at a thing.
    pub fn new(what: impl Into<String>, source: impl Into<std::io::Error>) -> Self {
        Self { what: what.into(), source: source.into() }
    }
}

/// A change was refused; nothing of it took effect, unless the message says otherwise.
#[derive(Debug, Clone, thiserror::Error)]
pub enum OpError {
    /// The kernel refused.
    #[error("{op}: {message}")]
    Refused {
        /// The change.
        op: String,
        /// What the kernel said, and about what.
        message: String,
    },
    /// A device that the change needs does not exist.
    #[error("{op}: there is no device {link}")]
    NoLink {
        /// The change.
        op: String,
        /// The device.
        link: IfName,
    },
    /// The pod's network namespace is gone or cannot be entered.
    #[error("{op}: network namespace {path} cannot be entered: {message}")]
    NoNetns {
        /// The change.
        op: String,
        /// Path of the namespace.
        path: String,
        /// Why not.
        message: String,
    },
    /// The kernel's verifier refused a program.
    #[error(
        "{op}: this kernel does not take the program {program}, and what ran before runs on; go back to the version that \
         brought it, or use a kernel that takes this one, and report what its verifier says: {message}"
    )]
    ProgramRefused {
        /// The change.
        op: String,
        /// Name of the program.
        program: &'static str,
        /// What the kernel said: its error, and the end of the verifier's log.
        message: String,
    },
    /// The binary was built without the BPF object.
    #[error("{op}: this build contains no BPF programs; run `cargo xtask ebpf` and build again")]
    NoObject {
        /// The change.
        op: String,
    },
    /// Programs to attach are not loaded.
    #[error("{op}: program set {hash} is not loaded; load it first")]
    NotLoaded {
        /// The change.
        op: String,
        /// The set.
        hash: String,
    },
    /// A map has no room for another row.
    #[error("{op}: map {map} is full at {max} rows; the row was not written")]
    MapFull {
        /// The change.
        op: String,
        /// The map.
        map: &'static str,
        /// Its size.
        max: u32,
    },
}

impl OpError {
    /// The reason for events and metrics.
    #[must_use]
    pub const fn reason(&self) -> Reason {
        const REFUSED: Reason = Reason::new("KernelRefused");
        const NO_LINK: Reason = Reason::new("DeviceMissing");
        const NO_NETNS: Reason = Reason::new("NetworkNamespaceMissing");
        const PROGRAM_REFUSED: Reason = Reason::new("ProgramRefused");
        const NO_OBJECT: Reason = Reason::new("ProgramsNotBuilt");
        const NOT_LOADED: Reason = Reason::new("ProgramsNotLoaded");
        const MAP_FULL: Reason = Reason::new("MapFull");
        match self {
            Self::Refused { .. } => REFUSED,
            Self::NoLink { .. } => NO_LINK,
            Self::NoNetns { .. } => NO_NETNS,
            Self::ProgramRefused { .. } => PROGRAM_REFUSED,
            Self::NoObject { .. } => NO_OBJECT,
            Self::NotLoaded { .. } => NOT_LOADED,
            Self::MapFull { .. } => MAP_FULL,
        }
    }

    /// True when the same change may succeed later without anything else changing.
    #[must_use]
    pub const fn is_retryable(&self) -> bool {
        matches!(self, Self::Refused { .. } | Self::MapFull { .. })
    }
}

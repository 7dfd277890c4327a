//! What the agent remembers of an endpoint.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use basal_cni::api::{Attachment, PodRef};
use basal_crds::identity::IdentityId;
use serde::{Deserialize, Serialize};

use crate::mac::MacAddr;

/// The number of an endpoint on its node, 1 to 4095 (Cilium's range).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u16", into = "u16")]
pub struct EndpointId(u16);

/// A number outside the range.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0} is no endpoint id: 1 to 4095 are")]
pub struct EndpointIdError(u16);

impl EndpointId {
    /// The largest.
    pub const MAX: u16 = 4095;

    /// Takes a number.
    ///
    /// # Errors
    /// It is 0 or above [`Self::MAX`].
    pub fn new(id: u16) -> Result<Self, EndpointIdError> {
        if (1..=Self::MAX).contains(&id) { Ok(Self(id)) } else { Err(EndpointIdError(id)) }
    }

    /// All of them, in ascending order.
    pub fn all() -> impl Iterator<Item = Self> {
        (1..=Self::MAX).map(Self)
    }

    /// The number.
    #[must_use]
    pub fn get(self) -> u16 {
        self.0
    }
}

impl TryFrom<u16> for EndpointId {
    type Error = EndpointIdError;

    fn try_from(id: u16) -> Result<Self, EndpointIdError> {
        Self::new(id)
    }
}

impl From<EndpointId> for u16 {
    fn from(id: EndpointId) -> Self {
        id.0
    }
}

impl fmt::Display for EndpointId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// How far an endpoint's life has come. The order is that of a life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// ADD is at work, or its result was not acknowledged. After a restart it is undone: nobody waits for it any more.
    Adding,
    /// The runtime has the result.
    Committed,
    /// Everything that belongs to it is being taken away. There is no way back.
    Removing,
}

/// The addresses of an endpoint, at most one of each family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Addresses {
    /// IPv4.
    pub v4: Option<Ipv4Addr>,
    /// IPv6.
    pub v6: Option<Ipv6Addr>,
}

impl Addresses {
    /// Those that there are, IPv4 first.
    pub fn iter(&self) -> impl Iterator<Item = IpAddr> {
        self.v4.map(IpAddr::V4).into_iter().chain(self.v6.map(IpAddr::V6))
    }
}

/// What the agent remembers of an endpoint, on disk too.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndpointRecord {
    /// Its number.
    pub id: EndpointId,
    /// Which interface of which container.
    pub attachment: Attachment,
    /// The pod; `None` when the runtime is driven by no kubelet.
    pub pod: Option<PodRef>,
    /// The path of the container's network namespace.
    pub netns: String,
    /// Its addresses.
    pub addresses: Addresses,
    /// The hardware address inside the container.
    pub mac: MacAddr,
    /// The hardware address of the interface on the host.
    pub host_mac: MacAddr,
    /// Its identity, as last known.
    pub identity: IdentityId,
    /// The identity's labels in canonical form, as last known.
    pub labels: String,
    /// How far its life has come.
    pub phase: Phase,
    /// The boot in which it was made: nothing of an endpoint outlives its boot but this record.
    pub boot_id: String,
}

impl EndpointRecord {
    /// The name of the interface on the host.
    #[must_use]
    pub fn host_interface(&self) -> String {
        self.attachment.host_interface()
    }

    /// Who has its addresses, as IPAM lists it.
    #[must_use]
    pub fn owner(&self) -> String {
        match &self.pod {
            Some(pod) => pod.to_string(),
            None => self.attachment.container_id.clone(),
        }
    }
}

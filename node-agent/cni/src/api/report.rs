//! What the agent tells the command line about itself.

use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

/// How a component is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum ComponentState {
    /// As it should be.
    Ok,
    /// Works, but somebody should look.
    Warning,
    /// Does not work.
    Failure,
    /// Not in use.
    Disabled,
}

impl ComponentState {
    /// The word that Cilium's status prints.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "Ok",
            Self::Warning => "Warning",
            Self::Failure => "Failure",
            Self::Disabled => "Disabled",
        }
    }
}

/// One line of the status.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Component {
    /// How it is.
    pub state: ComponentState,
    /// What there is to say.
    pub message: String,
}

impl Component {
    /// A line.
    pub fn new(state: ComponentState, message: impl Into<String>) -> Self {
        Self { state, message: message.into() }
    }
}

/// The agent's health.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StatusReport {
    /// The agent's version.
    pub version: String,
    /// The node's name.
    pub node: String,
    /// The cluster's name.
    pub cluster: String,
    /// etcd.
    pub kvstore: Component,
    /// The API server.
    pub kubernetes: Component,
    /// The agent as a whole: `Failure` with the names of the readiness guards that are open.
    pub cilium: Component,
    /// The configuration file of the container runtime.
    pub cni_file: Component,
    /// The last comparison of the kernel with what it should hold.
    pub datapath: Component,
    /// `Warning` with "NOT ENFORCED" when there are policy objects.
    pub policy: Component,
    /// How packets reach other nodes, `Tunnel [vxlan]` for example.
    pub routing: String,
    /// Which families are masqueraded, by what.
    pub masquerading: String,
    /// Whether pod traffic passes the host's network stack: `Legacy` or `BPF`.
    pub host_routing: String,
    /// This node's blocks and addresses.
    pub ipam: IpamReport,
    /// How many other nodes are known.
    pub remote_nodes: usize,
    /// How many endpoints there are, and how many of them are ready.
    pub endpoints: usize,
    /// Of those, how many are ready.
    pub endpoints_ready: usize,
    /// How many identities are known.
    pub identities: usize,
    /// How many rows or settings the timer's comparison found changed and mended since the start.
    pub drift: u64,
}

impl StatusReport {
    /// Whether nothing is at fault: no component says `Failure`.
    #[must_use]
    pub fn healthy(&self) -> bool {
        [&self.kvstore, &self.kubernetes, &self.cilium, &self.cni_file, &self.datapath]
            .iter()
            .all(|component| component.state != ComponentState::Failure)
    }
}

/// One node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeReport {
    /// Its cluster.
    pub cluster: String,
    /// Its name.
    pub name: String,
    /// Whether it is this one.
    pub local: bool,
    /// Its InternalIP addresses.
    pub internal_ips: Vec<IpAddr>,
    /// Its router addresses on `cilium_host`.
    pub router_ips: Vec<IpAddr>,
    /// Its blocks.
    pub pod_cidrs: Vec<IpNet>,
    /// Where its tunnel ends.
    pub tunnel_endpoint: Option<IpAddr>,
}

/// One endpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndpointReport {
    /// Its number on this node, 1 to 65535.
    pub id: u16,
    /// `ready`, `waiting-for-identity`, … as in CiliumEndpoint's `status.state`.
    pub state: String,
    /// Its identity; 0 while unknown.
    pub identity: u32,
    /// The identity's labels, `source:key=value`.
    pub labels: Vec<String>,
    /// Its namespace and pod; empty when it belongs to no pod.
    pub pod: String,
    /// The container.
    pub container_id: String,
    /// The interface on the host.
    pub host_interface: String,
    /// The IPv4 address.
    pub ipv4: Option<IpAddr>,
    /// The IPv6 address.
    pub ipv6: Option<IpAddr>,
}

/// One identity.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdentityReport {
    /// Its number.
    pub id: u32,
    /// Its labels, `source:key=value`.
    pub labels: Vec<String>,
}

/// This node's blocks and addresses.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct IpamReport {
    /// The blocks.
    pub blocks: Vec<BlockReport>,
    /// The addresses in use, in ascending order.
    pub addresses: Vec<AddressUse>,
    /// Why no address can be given out; empty when one can.
    pub problem: String,
}

/// One block.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockReport {
    /// The block.
    pub cidr: IpNet,
    /// Whether the ledger confirms it as this node's: only then new addresses come from it.
    pub confirmed: bool,
    /// How many of its addresses are in use.
    pub used: u64,
    /// How many rest after a release.
    pub cooling: u64,
    /// How many it has; capped at the largest number that 64 bits hold.
    pub capacity: u64,
}

/// One address in use.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AddressUse {
    /// The address.
    pub ip: IpAddr,
    /// Who has it: `router`, `health`, or a namespace and pod.
    pub owner: String,
}

//! What travels over the agent's unix socket.
//!
//! A message is a [`crate::frame`]: four bytes of length, then JSON. A connection carries one [`Call`] and its
//! [`Answer`]. An ADD has two more steps: the agent answers `Added`, the plugin sends [`Ack`], the agent writes that
//! down and answers `Committed`; when the connection ends before, the agent undoes the ADD. So a result that the
//! runtime never saw leaves nothing behind, and one that it saw survives the agent.

mod report;

use std::{collections::BTreeSet, fmt, net::IpAddr};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

pub use report::{
    AddressUse, BlockReport, Component, ComponentState, EndpointReport, IdentityReport, IpamReport, NodeReport,
    StatusReport,
};

/// The version of these messages. It is raised when an older reader could misunderstand a message.
pub const API_VERSION: u32 = 1;

/// The first message of a connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Call {
    /// [`API_VERSION`] of the caller. It is read before `request`, which a newer caller may have extended.
    pub api: u32,
    /// What is asked.
    pub request: Request,
}

impl Call {
    /// A call in the version of this build.
    #[must_use]
    pub fn new(request: Request) -> Self {
        Self { api: API_VERSION, request }
    }
}

/// What the agent is asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Request {
    /// Attach a container.
    Add(AddRequest),
    /// Undo an ADD, whether it was complete or not.
    Del(DelRequest),
    /// Verify an attachment.
    Check(CheckRequest),
    /// Would an ADD be served?
    Ready,
    /// Remove every attachment that is not in the list.
    Gc {
        /// What stays.
        valid: BTreeSet<Attachment>,
    },
    /// The agent's health.
    Status,
    /// The nodes that the agent knows.
    Nodes,
    /// The endpoints of this node.
    Endpoints,
    /// The identities that the agent knows.
    Identities,
    /// This node's blocks and addresses.
    Ipam,
}

/// The message that ends an ADD on the plugin's side.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Ack {
    /// The result arrived.
    Received,
}

/// What the agent answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// To ADD: done, if acknowledged.
    Added(AddResult),
    /// To [`Ack`]: the attachment stays.
    Committed,
    /// To DEL: nothing is left of the attachment.
    Deleted,
    /// To CHECK: all is as ADD left it.
    Intact,
    /// An ADD would be served.
    Ready,
    /// To GC.
    Collected {
        /// What was removed.
        removed: BTreeSet<Attachment>,
    },
    /// To [`Request::Status`].
    Status(Box<StatusReport>),
    /// To [`Request::Nodes`].
    Nodes(Vec<NodeReport>),
    /// To [`Request::Endpoints`].
    Endpoints(Vec<EndpointReport>),
    /// To [`Request::Identities`].
    Identities(Vec<IdentityReport>),
    /// To [`Request::Ipam`].
    Ipam(IpamReport),
    /// To anything.
    Error(AgentError),
}

/// Why the agent did not do what it was asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "kebab-case")]
pub enum AgentError {
    /// The same call may succeed later.
    #[error("{message}")]
    TryAgain {
        /// Why, and what it waits for.
        message: String,
    },
    /// The agent does not serve new pods now.
    #[error("{message}")]
    NotReady {
        /// What is missing.
        message: String,
    },
    /// The request asks for something that cannot be.
    #[error("{field}: {message}")]
    Invalid {
        /// The field.
        field: String,
        /// What is wrong with it.
        message: String,
    },
    /// There is no such attachment.
    #[error("{message}")]
    UnknownAttachment {
        /// Which.
        message: String,
    },
    /// CHECK found differences.
    #[error("{message}")]
    Damaged {
        /// Which.
        message: String,
    },
    /// The caller speaks another version.
    #[error("the agent speaks version {supported} of the socket's API and the caller {asked}")]
    ApiVersion {
        /// [`API_VERSION`] of the agent.
        supported: u32,
        /// What the caller sent.
        asked: u32,
    },
    /// A step failed.
    #[error("{message}")]
    Failed {
        /// Which, and how.
        message: String,
    },
}

/// A container's interface: what one ADD makes and one DEL removes.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Attachment {
    /// The runtime's id of the container, mostly of the pod's sandbox.
    pub container_id: String,
    /// The interface's name inside the container.
    pub ifname: String,
}

impl Attachment {
    /// The name of the interface on the host: `lxc` and the first 12 hexadecimal digits of the SHA-256 of the container
    /// id (Cilium's rule). An interface beside `eth0` puts its name into the hash, for names must differ.
    #[must_use]
    pub fn host_interface(&self) -> String {
        let digest = if self.ifname == "eth0" {
            sha256_hex(self.container_id.as_bytes())
        } else {
            sha256_hex(self.to_string().as_bytes())
        };
        format!("lxc{}", &digest[..12])
    }
}

impl fmt::Display for Attachment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.container_id, self.ifname)
    }
}

/// SHA-256 in lower-case hexadecimal digits: 64 characters.
#[must_use]
pub fn sha256_hex(bytes: &[u8]) -> String {
    use fmt::Write as _;
    Sha256::digest(bytes).iter().fold(String::with_capacity(64), |mut text, byte| {
        // Writing to a String cannot fail.
        write!(text, "{byte:02x}").unwrap_or_default();
        text
    })
}

/// The pod that an attachment belongs to.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PodRef {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its uid; kubelet passes it, older callers may not.
    pub uid: Option<String>,
}

impl fmt::Display for PodRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// The parameters of ADD.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AddRequest {
    /// Which interface of which container.
    pub attachment: Attachment,
    /// The path of the container's network namespace, as the runtime sees it.
    pub netns: String,
    /// The pod; `None` when the caller is no kubelet.
    pub pod: Option<PodRef>,
    /// The addresses that the pod asks for; empty: any.
    pub ips: Vec<IpAddr>,
}

/// The parameters of DEL.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DelRequest {
    /// Which interface of which container.
    pub attachment: Attachment,
}

/// The parameters of CHECK.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckRequest {
    /// Which interface of which container.
    pub attachment: Attachment,
    /// The path of the container's network namespace.
    pub netns: String,
    /// The addresses that ADD answered.
    pub addresses: Vec<IpNet>,
}

/// What ADD made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AddResult {
    /// The interface on the host.
    pub host: InterfaceResult,
    /// The interface inside the container.
    pub container: InterfaceResult,
    /// The path of the container's network namespace.
    pub netns: String,
    /// The container's addresses: at most one of each family.
    pub addresses: Vec<AddressResult>,
    /// The container's routes.
    pub routes: Vec<RouteResult>,
}

/// One interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InterfaceResult {
    /// Its name.
    pub name: String,
    /// Its MAC address, `aa:bb:cc:dd:ee:ff`.
    pub mac: String,
    /// Its MTU in bytes.
    pub mtu: u32,
}

/// One address.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AddressResult {
    /// The address, /32 or /128.
    pub address: IpNet,
    /// The router address, which the container's default route points to.
    pub gateway: IpAddr,
}

/// One route.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RouteResult {
    /// Where to.
    pub dst: IpNet,
    /// By which router; `None`: on the link.
    pub gateway: Option<IpAddr>,
    /// The route's MTU in bytes, where it differs from the interface's.
    pub mtu: Option<u32>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_interface_is_ciliums_name() {
        let attachment = |ifname: &str| Attachment { container_id: "abc".into(), ifname: ifname.into() };
        // SHA-256 of "abc", FIPS 180-2 appendix B.1.
        assert_eq!(attachment("eth0").host_interface(), "lxcba7816bf8f01");
        assert_ne!(attachment("net1").host_interface(), attachment("eth0").host_interface());
        assert_eq!(attachment("net1").host_interface().len(), 15);
    }

    #[test]
    fn messages_have_a_stable_form() {
        let call = Call::new(Request::Del(DelRequest {
            attachment: Attachment { container_id: "abc".into(), ifname: "eth0".into() },
        }));
        let text = r#"{"api":1,"request":{"del":{"attachment":{"container_id":"abc","ifname":"eth0"}}}}"#;
        assert_eq!(serde_json::to_string(&call).unwrap(), text);
        assert_eq!(serde_json::from_str::<Call>(text).unwrap(), call);
        assert_eq!(serde_json::to_string(&Call::new(Request::Ready)).unwrap(), r#"{"api":1,"request":"ready"}"#);
    }
}

//! The handle to the task that changes the datapath.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, io,
    path::Path,
    sync::Arc,
};

use basal_datapath::{
    check::Pair,
    kernel::{Device, Kernel, OpError, ReadError},
    names::IfNameError,
    op::Op,
    plan::{Endpoint, NodePlan},
    routing::NoRoute,
};
use basal_runtime::reason::Reason;
use tokio::sync::{mpsc, oneshot, watch};

use crate::{endpoint::record::EndpointId, view::View};

/// A change that was not made, or of which nobody knows.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Failure {
    /// The kernel refused it.
    #[error(transparent)]
    Refused(#[from] OpError),
    /// Whether it was made is not known.
    #[error("{op}: the kernel's answer was lost: {why}")]
    Unknown {
        /// The change.
        op: String,
        /// What was lost.
        why: String,
    },
}

/// Why an endpoint could not be put into the datapath, or taken out.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// A change was not made.
    #[error(transparent)]
    Change(#[from] Failure),
    /// The kernel could not be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The interface's name inside the container is none.
    #[error(transparent)]
    Name(#[from] IfNameError),
    /// The interface that was just made is not there.
    #[error("interface {0} is gone right after it was made; was the container's network namespace deleted?")]
    Vanished(String),
    /// The agent is ending.
    #[error("the agent is ending")]
    Ending,
}

impl AttachError {
    /// The reason for events and metrics.
    #[must_use]
    pub fn reason(&self) -> Reason {
        const UNKNOWN: Reason = Reason::new("KernelAnswerLost");
        const READ: Reason = Reason::new("KernelUnreadable");
        const NAME: Reason = Reason::new("InterfaceNameInvalid");
        const VANISHED: Reason = Reason::new("DeviceVanished");
        const ENDING: Reason = Reason::new("AgentEnding");
        match self {
            Self::Change(Failure::Refused(error)) => error.reason(),
            Self::Change(Failure::Unknown { .. }) => UNKNOWN,
            Self::Read(_) => READ,
            Self::Name(_) => NAME,
            Self::Vanished(_) => VANISHED,
            Self::Ending => ENDING,
        }
    }
}

/// What the task reports.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SyncReport {
    /// Whether everything was compared once and the kernel held what it should afterwards.
    pub complete: bool,
    /// What failed last and still does; empty when nothing does.
    pub problem: String,
    /// How many changes the comparisons on the timer found and mended.
    pub drift: u64,
    /// Nodes that should have a route to their pods and cannot, by `<cluster>/<name>`.
    pub without_route: BTreeMap<String, NoRoute>,
    /// Endpoints whose interfaces went away without a DEL.
    pub lost: BTreeSet<EndpointId>,
    /// The devices that programs masquerade on.
    pub masquerade_devices: BTreeSet<String>,
}

impl SyncReport {
    /// How programs masquerade, as Cilium's status has it.
    #[must_use]
    pub fn masquerading(&self) -> String {
        let devices: Vec<&str> = self.masquerade_devices.iter().map(String::as_str).collect();
        format!("BPF [{}]", devices.join(", "))
    }
}

/// What of an endpoint differs from what it should be, in words.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Differences {
    /// On the host. The task mends it right after.
    pub host: Vec<String>,
    /// In the pod, which nobody mends: what runs there may have changed it.
    pub pod: Vec<String>,
}

pub(super) type Answer<T> = oneshot::Sender<Result<T, AttachError>>;
type Edit = Box<dyn FnOnce(&mut View) + Send>;
type Build = Box<dyn FnOnce(&NodePlan) -> Result<Endpoint, IfNameError> + Send>;

/// What the task is told.
pub(super) enum Message {
    Edit(Edit),
    Attach(EndpointId, Build, Answer<()>),
    Made(Box<Made>),
    Detach(EndpointId, Answer<()>),
    Verify(EndpointId, Answer<Verified>),
    Settle(oneshot::Sender<()>),
}

/// The interface of an endpoint was made, or not.
pub(super) struct Made {
    pub(super) id: EndpointId,
    pub(super) endpoint: Endpoint,
    /// How it was made.
    pub(super) set: Op,
    pub(super) result: Result<Device, AttachError>,
    /// Why there may be a part of an interface that could not be made.
    pub(super) left: Option<Failure>,
    pub(super) answer: Answer<()>,
}

/// An endpoint whose host side was looked at.
pub(super) struct Verified {
    /// `None` when it is not in the datapath.
    pub(super) endpoint: Option<Endpoint>,
    /// MTU of its interfaces in bytes.
    pub(super) mtu: u32,
    /// Its interface on the host.
    pub(super) device: Option<Device>,
    pub(super) differences: Vec<String>,
}

/// A handle to the task.
#[derive(Clone)]
pub struct Datapath {
    pub(super) messages: mpsc::Sender<Message>,
    pub(super) report: watch::Receiver<SyncReport>,
    pub(super) kernel: Arc<dyn Kernel>,
}

impl fmt::Debug for Datapath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Datapath").field("report", &self.report).finish_non_exhaustive()
    }
}

impl Datapath {
    /// What the task reports, and its changes.
    #[must_use]
    pub fn report(&self) -> watch::Receiver<SyncReport> {
        self.report.clone()
    }

    /// Changes what is known. The kernel follows.
    pub async fn edit(&self, edit: impl FnOnce(&mut View) + Send + 'static) {
        // The task is gone only when the agent ends.
        self.messages.send(Message::Edit(Box::new(edit))).await.unwrap_or_default();
    }

    /// Looks at what is known; `None` when the agent is ending.
    pub async fn look<T: Send + 'static>(&self, look: impl FnOnce(&View) -> T + Send + 'static) -> Option<T> {
        let (answer, answered) = oneshot::channel();
        self.edit(move |view| answer.send(look(view)).unwrap_or_else(drop)).await;
        answered.await.ok()
    }

    /// Makes an endpoint's interface, rows and programs. `build` says how it is made on the node as it is now.
    ///
    /// Interfaces of several endpoints are made at the same time; the caller sees to it that it asks for one endpoint
    /// once at a time.
    ///
    /// # Errors
    /// See [`AttachError`]; nothing of the endpoint is left then, as far as the kernel allows.
    pub async fn attach(
        &self,
        id: EndpointId,
        build: impl FnOnce(&NodePlan) -> Result<Endpoint, IfNameError> + Send + 'static,
    ) -> Result<(), AttachError> {
        self.ask(|answer| Message::Attach(id, Box::new(build), answer)).await
    }

    /// Removes an endpoint's interface, rows and programs.
    ///
    /// # Errors
    /// See [`AttachError`].
    pub async fn detach(&self, id: EndpointId) -> Result<(), AttachError> {
        self.ask(|answer| Message::Detach(id, answer)).await
    }

    /// What of an endpoint differs from what it should be, on the host and in the network namespace at `netns`.
    ///
    /// # Errors
    /// The kernel cannot be read.
    pub async fn verify(&self, id: EndpointId, netns: &Path) -> Result<Differences, AttachError> {
        let Verified { endpoint, mtu, device, differences } = self.ask(|answer| Message::Verify(id, answer)).await?;
        let (Some(endpoint), Some(device)) = (endpoint, device) else {
            return Ok(Differences { host: differences, pod: Vec::new() });
        };
        let pair = Pair { host: &endpoint.link, pod: &endpoint.pod, mtu };
        let pod = match self.kernel.pod_device(netns, &endpoint.pod.name).await {
            Ok(found) => pair.differences(Some(&device), found.as_ref()),
            Err(error) if error.source.kind() == io::ErrorKind::NotFound => vec![error.to_string()],
            Err(error) => return Err(error.into()),
        };
        Ok(Differences { host: differences, pod })
    }

    /// Waits until everything that was said before is in the kernel, or was refused by it.
    pub async fn settle(&self) {
        let (answer, answered) = oneshot::channel();
        if self.messages.send(Message::Settle(answer)).await.is_ok() {
            answered.await.unwrap_or_default();
        }
    }

    async fn ask<T>(&self, message: impl FnOnce(Answer<T>) -> Message) -> Result<T, AttachError> {
        let (answer, answered) = oneshot::channel();
        if self.messages.send(message(answer)).await.is_err() {
            return Err(AttachError::Ending);
        }
        answered.await.unwrap_or(Err(AttachError::Ending))
    }
}

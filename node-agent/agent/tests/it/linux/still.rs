//! Virtual time and a real kernel: while the agent waits for the kernel, no time passes.

use std::{
    path::Path,
    sync::{Arc, Mutex, mpsc},
};

use async_trait::async_trait;
use basal_datapath::{
    flows::MapUse,
    kernel::{Device, Kernel, KernelEvent, Observed, OpError, PodDevice, ReadError},
    linux::LinuxKernel,
    names::IfName,
    op::Op,
};
use basal_runtime::outcome::Outcome;
use futures::stream::BoxStream;

/// Keeps virtual time from jumping to the next timer, as it does when all tasks of a runtime wait. It does not while work
/// that may block is under way.
struct Standstill {
    _until_dropped: mpsc::Sender<()>,
}

impl Standstill {
    fn begin() -> Self {
        let (sender, receiver) = mpsc::channel();
        drop(tokio::task::spawn_blocking(move || receiver.recv()));
        Self { _until_dropped: sender }
    }
}

/// The real kernel, for one agent, with the changes that the agent makes.
pub(crate) struct Still {
    pub(super) kernel: LinuxKernel,
    pub(super) log: Arc<Mutex<Vec<Op>>>,
}

#[async_trait]
impl Kernel for Still {
    async fn read(&self) -> Result<Observed, ReadError> {
        let _still = Standstill::begin();
        self.kernel.read().await
    }

    async fn read_without_ipcache(&self) -> Result<Observed, ReadError> {
        let _still = Standstill::begin();
        self.kernel.read_without_ipcache().await
    }

    async fn device(&self, name: &IfName) -> Result<Option<Device>, ReadError> {
        let _still = Standstill::begin();
        self.kernel.device(name).await
    }

    async fn pod_device(&self, netns: &Path, name: &IfName) -> Result<Option<PodDevice>, ReadError> {
        let _still = Standstill::begin();
        self.kernel.pod_device(netns, name).await
    }

    async fn apply(&self, op: &Op) -> Outcome<(), OpError> {
        self.log.lock().unwrap().push(op.clone());
        let _still = Standstill::begin();
        self.kernel.apply(op).await
    }

    async fn collect_flows(&self) -> Result<Vec<MapUse>, ReadError> {
        let _still = Standstill::begin();
        self.kernel.collect_flows().await
    }

    fn events(&self) -> BoxStream<'static, KernelEvent> {
        self.kernel.events()
    }
}

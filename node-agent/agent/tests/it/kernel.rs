//! A kernel in memory: it holds what ops put there, and nothing in it goes wrong.

use std::sync::Mutex;

use async_trait::async_trait;
use basal_agent::{
    sync::core::Core,
    view::{View, ids::NodeIds},
};
use basal_crds::names::ClusterName;
use basal_datapath::{
    kernel::{Device, Kernel, KernelEvent, Observed, OpError, ReadError},
    names::IfName,
    op::Op,
    plan::{NodePlan, Routers},
};
use basal_ipam::names::NodeName;
use basal_runtime::outcome::Outcome;
use futures::{StreamExt as _, stream, stream::BoxStream};

/// The kernel of one node.
pub(crate) struct ModelKernel {
    // What an op does to what is known is written down there already.
    core: Mutex<Core>,
    log: Mutex<Vec<Op>>,
}

impl ModelKernel {
    /// A kernel with one device, which has these addresses.
    pub(crate) fn new(addresses: &[&str]) -> Self {
        let plan = NodePlan {
            routers: Routers::default(),
            local_cidrs: Default::default(),
            node_ips: Default::default(),
            device_mtu: 1500,
            underlay_ipv6: false,
            tunnel_port: 8472,
            remote_nodes: Default::default(),
            endpoints: Default::default(),
            peers: Default::default(),
            legacy_routing: true,
            dual_stack: true,
            masquerade_ipv4: true,
            masquerade_ipv6: true,
        };
        let mut observed = Observed::default();
        let addresses = addresses.iter().map(|address| address.parse().unwrap()).collect();
        let eth0 = Device { index: 2, mtu: 1500, up: true, addresses, ..Device::default() };
        observed.devices.insert(IfName::new("eth0").unwrap(), eth0);
        let key = (ClusterName::default(), NodeName::new("model").unwrap());
        let core = Core::new(View::new(key, plan, NodeIds::default()), observed);
        Self { core: Mutex::new(core), log: Mutex::default() }
    }

    pub(crate) fn observed(&self) -> Observed {
        self.core.lock().unwrap().known().clone()
    }

    /// The ops since the last call.
    pub(crate) fn take_log(&self) -> Vec<Op> {
        std::mem::take(&mut self.log.lock().unwrap())
    }

    /// Changes something behind the agent's back.
    pub(crate) fn tamper(&self, op: &Op) {
        self.core.lock().unwrap().applied(op);
    }
}

#[async_trait]
impl Kernel for ModelKernel {
    async fn read(&self) -> Result<Observed, ReadError> {
        Ok(self.observed())
    }

    async fn apply(&self, op: &Op) -> Outcome<(), OpError> {
        self.log.lock().unwrap().push(op.clone());
        let mut core = self.core.lock().unwrap();
        core.applied(op);
        match op {
            Op::SetLink(name, _) if !core.known().devices.contains_key(name) => {
                let index = 10 + u32::try_from(core.known().devices.len()).unwrap();
                core.saw_device(name.clone(), Device { index, mtu: 1500, up: true, ..Device::default() });
            }
            Op::AddAddress(address) => {
                let mut device = core.known().devices[&address.link].clone();
                device.addresses.push(address.net);
                core.saw_device(address.link.clone(), device);
            }
            _ => {}
        }
        Outcome::Done(())
    }

    fn events(&self) -> BoxStream<'static, KernelEvent> {
        stream::pending().boxed()
    }
}

//! What an agent runs on.

use std::{net::IpAddr, sync::Arc};

use basal_datapath::{kernel::Kernel, op::Op};
use basal_runtime::env::SharedEnv;

/// The addresses of a machine's one device, `eth0`.
pub(crate) const NODE_ADDRESSES: [&str; 2] = ["172.18.0.1/16", "fc00::1/64"];

/// A kernel, and where containers run. Clones are one machine.
pub(crate) trait Machine: Clone + 'static {
    /// What an agent is given of the kernel.
    type Port: Kernel;

    /// One that was just switched on.
    fn boot() -> Self;

    /// The same without all that the kernel held and that ran.
    fn reboot(&self) -> Self;

    /// The kernel, for one agent.
    fn port(&self, env: &SharedEnv) -> Arc<Self::Port>;

    /// The changes of the kernel since the last call.
    fn take_log(&self) -> Vec<Op>;

    /// All that there is besides what an agent needs that has no endpoints.
    fn left(&self) -> Vec<String>;

    /// There is an agent now, which has no endpoints.
    fn has_an_agent(&self) {}

    /// The container's network namespace is there from now on. That of a model is a name.
    fn run(&self, _container: &str) {}

    /// The container's network namespace goes.
    fn end(&self, _container: &str) {}

    /// Sends a packet from a container to an address, which must answer. A model carries none.
    fn ping(&self, _container: &str, _to: IpAddr) -> Result<(), String> {
        Ok(())
    }

    /// The machine for another run from the beginning, where starting one takes longer. Nothing is left on it.
    fn again(self) -> Option<Self> {
        None
    }
}

//! A pod and a machine outside that knows no pods, so that what the pod sends leaves with its node's address.

use std::fs;

use basal_datapath::masquerade::{BpfMasquerade, FlowSizes};

use super::{
    ROUTED,
    kernel::{self, Tracking},
    worlds::{Dirs, Server, Way},
};
use crate::harness::{Netns, Node, masquerading, node, outside};

/// Names of the configurations, as tables have them.
pub(crate) const BY_PROGRAMS: &str = "masqueraded by programs";
pub(crate) const BY_RULES: &str = "masqueraded by nftables";

/// Cilium's defaults, which are the agent's.
const SIZES: FlowSizes = FlowSizes { tcp: 524_288, any: 262_144, nat: 524_288 };

/// A node with one pod, and a machine behind its device `w0`.
pub(crate) struct Outside {
    name: &'static str,
    /// Ends with the world.
    node: Node,
    client: Netns,
    server: Server,
}

impl Outside {
    /// A node as an agent sets it up, with masquerading by programs, or by the rules that are made without them.
    pub(crate) fn basal(name: &'static str, dirs: Dirs<'_>, by_programs: bool) -> anyhow::Result<Self> {
        let mut world = Self::bare(name, dirs)?;
        if by_programs {
            world.node.plan.bpf_masquerade = masquerading(&["w0"]).map(|asked| BpfMasquerade { sizes: SIZES, ..asked });
        }
        world.node.converge();
        Ok(world)
    }

    /// The same node and pod, connected by the kernel's own means, with one rule that masquerades.
    pub(crate) fn kernel(name: &'static str, dirs: Dirs<'_>) -> anyhow::Result<Self> {
        let world = Self::bare(name, dirs)?;
        kernel::connect(&world.node, Tracking::Off)?;
        kernel::masquerade(&world.node.netns, "w0")?;
        Ok(world)
    }

    fn bare(name: &'static str, dirs: Dirs<'_>) -> anyhow::Result<Self> {
        let bpffs = dirs.bpffs.join(name.replace(' ', "-"));
        fs::create_dir(&bpffs)?;
        let mut node = node(&bpffs, 1);
        (node.plan.routing, node.plan.legacy_routing) = (ROUTED, true);
        let client = node.add_pod(7, 1111);
        let server =
            Server::new(outside(&node), [172, 16, 0, 2].into(), [0xfd16, 0, 0, 0, 0, 0, 0, 2].into(), dirs.logs)?;
        Ok(Self { name, node, client, server })
    }

    /// From the pod to the machine.
    pub(crate) fn way(&self) -> Way<'_> {
        Way { name: self.name, client: &self.client, server: &self.server }
    }
}

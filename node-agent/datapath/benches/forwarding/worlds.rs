//! Two nodes with pods, joined by a wire: as Basal connects them, and as the kernel does without it.

use std::{
    fs,
    net::{Ipv4Addr, Ipv6Addr},
    path::Path,
};

use basal_datapath::routing::Routing;
use basal_e2e::process::Process;

use super::{
    iperf,
    kernel::{self, Tracking},
};
use crate::harness::{Netns, Node, pair};

/// Names of the configurations, as tables have them.
pub(crate) const LEGACY: &str = "legacy host routing";
pub(crate) const DIRECT: &str = "without legacy host routing";
pub(crate) const NATIVE: &str = "native routing";

/// A pod that others talk to.
pub(crate) struct Server {
    /// Its namespace.
    pub(crate) netns: Netns,
    /// Its IPv4 address.
    pub(crate) v4: Ipv4Addr,
    /// Its IPv6 address.
    pub(crate) v6: Ipv6Addr,
    /// Ends with the pod.
    _iperf: Process,
}

/// Two pods, and what carries packets between them.
pub(crate) struct Way<'a> {
    /// What carries them.
    pub(crate) name: &'static str,
    /// The pod that begins.
    pub(crate) client: &'a Netns,
    /// The pod that answers.
    pub(crate) server: &'a Server,
}

impl Way<'_> {
    /// The same by another name.
    pub(crate) fn named(self, name: &'static str) -> Self {
        Self { name, ..self }
    }
}

/// A pod on node one, another one beside it, and a third on node two.
pub(crate) struct World {
    name: &'static str,
    /// Node one and node two.
    pub(crate) nodes: [Node; 2],
    client: Netns,
    beside: Server,
    remote: Server,
}

impl World {
    /// Nodes as an agent sets them up. Pins are in a folder of their own below `bpffs`, logs in `logs`.
    pub(crate) fn basal(
        name: &'static str,
        dirs: Dirs<'_>,
        routing: Routing,
        legacy_routing: bool,
    ) -> anyhow::Result<Self> {
        let world = Self::bare(name, dirs, routing, legacy_routing)?;
        world.nodes.iter().for_each(|node| drop(node.converge()));
        Ok(world)
    }

    /// The same nodes and pods, connected by the kernel's own means. The routing only decides about the pods' MTU.
    pub(crate) fn kernel(
        name: &'static str,
        dirs: Dirs<'_>,
        routing: Routing,
        tracking: Tracking,
    ) -> anyhow::Result<Self> {
        let world = Self::bare(name, dirs, routing, true)?;
        world.nodes.iter().try_for_each(|node| kernel::connect(node, tracking))?;
        Ok(world)
    }

    /// Nodes with the wire between them, and pods that are not connected yet.
    fn bare(name: &'static str, dirs: Dirs<'_>, routing: Routing, legacy_routing: bool) -> anyhow::Result<Self> {
        let bpffs = dirs.bpffs.join(name.replace([' ', ',', '.'], "-"));
        fs::create_dir(&bpffs)?;
        let (mut one, mut two) = pair(&bpffs);
        for node in [&mut one, &mut two] {
            (node.plan.routing, node.plan.legacy_routing) = (routing, legacy_routing);
        }
        let (client, beside, remote) = (one.add_pod(7, 1111), one.add_pod(8, 3333), two.add_pod(7, 2222));
        let beside = Server::new(beside, [10, 1, 1, 8].into(), [0xfd00, 1, 1, 0, 0, 0, 0, 8].into(), dirs.logs)?;
        let remote = Server::new(remote, [10, 1, 2, 7].into(), [0xfd00, 1, 2, 0, 0, 0, 0, 7].into(), dirs.logs)?;
        Ok(Self { name, nodes: [one, two], client, beside, remote })
    }

    /// From node to node.
    pub(crate) fn across(&self) -> Way<'_> {
        Way { name: self.name, client: &self.client, server: &self.remote }
    }

    /// On node one.
    pub(crate) fn on_one_node(&self) -> Way<'_> {
        Way { name: self.name, client: &self.client, server: &self.beside }
    }
}

/// Two pods with one veth pair between them and no host.
pub(crate) struct Pair {
    client: Netns,
    server: Server,
}

impl Pair {
    /// With the addresses that pods of one node have.
    pub(crate) fn new(dirs: Dirs<'_>, mtu: u32) -> anyhow::Result<Self> {
        let (client, server) = (Netns::new(), Netns::new());
        kernel::join(&client, &server, mtu)?;
        let server = Server::new(server, [10, 1, 1, 8].into(), [0xfd00, 1, 1, 0, 0, 0, 0, 8].into(), dirs.logs)?;
        Ok(Self { client, server })
    }

    /// From one to the other.
    pub(crate) fn way(&self) -> Way<'_> {
        Way { name: "a veth pair", client: &self.client, server: &self.server }
    }
}

/// Where worlds keep what is not in a namespace.
#[derive(Clone, Copy)]
pub(crate) struct Dirs<'a> {
    /// A bpffs.
    pub(crate) bpffs: &'a Path,
    /// A folder for logs.
    pub(crate) logs: &'a Path,
}

impl Server {
    /// A server in a namespace with these addresses, its log in a folder.
    pub(crate) fn new(netns: Netns, v4: Ipv4Addr, v6: Ipv6Addr, logs: &Path) -> anyhow::Result<Self> {
        let iperf = iperf::serve(&netns, logs)?;
        Ok(Self { netns, v4, v6, _iperf: iperf })
    }
}

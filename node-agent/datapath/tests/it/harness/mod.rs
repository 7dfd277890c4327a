//! Nodes to test on.

mod namespaces;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
};

use basal_datapath::{
    diff::diff,
    kernel::{Kernel as _, Observed},
    linux::{LinuxKernel, Paths},
    masquerade::{BpfMasquerade, FlowSizes},
    names::IfName,
    op::Op,
    plan::{DEFAULT_TUNNEL_PORT, Endpoint, NodePlan, RemoteNode, Routers},
    program::Object,
    routing::{Routing, Tunnel},
    state::{PodAddress, PodSide},
};
use basal_maps::identity;
use basal_runtime::{
    env::{SharedEnv, SystemEnv},
    outcome::Outcome,
};

use self::namespaces::pins;
pub(crate) use self::namespaces::{Netns, sandbox};

/// What nodes have between them, unless a test says otherwise.
pub(crate) const TUNNEL: Routing = Routing::Tunnel(Tunnel { port: DEFAULT_TUNNEL_PORT, ipv6: false });

/// A node: a namespace, pins of its own, and what it should have.
pub(crate) struct Node {
    pub(crate) netns: Netns,
    pub(crate) paths: Paths,
    pub(crate) plan: NodePlan,
}

/// Number 1 to 9 of a cluster; addresses follow from it.
pub(crate) fn node(bpffs: &Path, number: u8) -> Node {
    let dir = bpffs.join(format!("node{number}"));
    fs::create_dir(&dir).unwrap();
    let paths = Paths { bpffs: dir, ..Paths::default() };
    let plan = NodePlan {
        routers: Routers {
            v4: Some([10, 1, number, 1].into()),
            v6: Some([0xfd00, 1, u16::from(number), 0, 0, 0, 0, 1].into()),
        },
        health_ips: health_ips(number),
        local_cidrs: pod_cidrs(number),
        node_ips: node_ips(number),
        device_mtu: 1500,
        routing: TUNNEL,
        native_networks: BTreeSet::new(),
        remote_nodes: BTreeMap::new(),
        endpoints: BTreeMap::new(),
        peers: BTreeMap::new(),
        legacy_routing: true,
        dual_stack: true,
        masquerade_ipv4: true,
        masquerade_ipv6: true,
        bpf_masquerade: None,
        object: Object::built_in(),
    };
    Node { netns: Netns::new(), paths, plan }
}

/// Masquerading on these devices; on those that lead out when there are none.
pub(crate) fn masquerading(devices: &[&str]) -> Option<BpfMasquerade> {
    let devices = devices.iter().map(|device| device.parse().unwrap()).collect();
    Some(BpfMasquerade { devices, remote_nodes: false, sizes: FlowSizes { tcp: 2048, any: 2048, nat: 4096 } })
}

pub(crate) fn pod_cidrs(number: u8) -> BTreeSet<ipnet::IpNet> {
    [format!("10.1.{number}.0/24"), format!("fd00:1:{number}::/64")].iter().map(|net| net.parse().unwrap()).collect()
}

pub(crate) fn health_ips(number: u8) -> BTreeSet<IpAddr> {
    [format!("10.1.{number}.2"), format!("fd00:1:{number}::2")].iter().map(|ip| ip.parse().unwrap()).collect()
}

pub(crate) fn node_ips(number: u8) -> BTreeSet<IpAddr> {
    [format!("192.168.77.{number}"), format!("fd77::{number}")].iter().map(|ip| ip.parse().unwrap()).collect()
}

/// What other nodes know of a node.
pub(crate) fn remote(number: u8) -> RemoteNode {
    RemoteNode {
        node_id: u16::from(number),
        tunnel_endpoint: format!("192.168.77.{number}").parse().ok(),
        next_hops: node_ips(number).into_iter().collect(),
        pod_cidrs: pod_cidrs(number),
        node_ips: node_ips(number),
        router_ips: [format!("10.1.{number}.1"), format!("fd00:1:{number}::1")]
            .iter()
            .map(|ip| ip.parse().unwrap())
            .collect(),
        identity: identity::REMOTE_NODE,
    }
}

impl Node {
    /// Plans a pod with both families; its addresses end in `id`.
    pub(crate) fn add_pod(&mut self, id: u16, identity: u32) -> Netns {
        let netns = Netns::new();
        let (v4, v6) = (self.plan.routers.v4.unwrap(), self.plan.routers.v6.unwrap());
        let address = |ip: IpAddr, gateway: IpAddr| PodAddress { ip, gateway };
        let [a, b, c, _] = v4.octets();
        let last = u8::try_from(id).unwrap();
        let mut segments = v6.segments();
        segments[7] = u16::from(last);
        let pod = PodSide {
            netns: netns.path(),
            name: IfName::new("eth0").unwrap(),
            mac: [2, 1, c, 0, 0, last],
            host_mac: [2, 2, c, 0, 0, last],
            addresses: vec![address([a, b, c, last].into(), v4.into()), address(segments.into(), v6.into())],
            route_mtu: self.plan.route_mtu(),
        };
        let link = IfName::new(format!("lxc{c:06x}{id:06x}")).unwrap();
        self.plan.endpoints.insert(id, Endpoint { link, pod, identity });
        netns
    }

    /// Runs `work` with the node's kernel, as an agent that has just started.
    pub(crate) fn with<T: Send>(&self, work: impl AsyncFnOnce(&LinuxKernel) -> T + Send) -> T {
        self.netns.enter(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let env: SharedEnv = Arc::new(SystemEnv);
                let kernel = LinuxKernel::new(&env, self.paths.clone()).unwrap();
                work(&kernel).await
            })
        })
    }

    pub(crate) fn read(&self) -> Observed {
        self.with(async |kernel| kernel.read().await.unwrap())
    }

    /// Where the programs are pinned that it has loaded.
    pub(crate) fn programs(&self) -> PathBuf {
        let set = self.read().state.programs.first().unwrap().to_string();
        self.paths.bpffs.join("basal/programs").join(set)
    }

    /// Every pin on its bpffs, and every folder of pins.
    pub(crate) fn pins(&self) -> BTreeSet<PathBuf> {
        pins(&self.paths.bpffs)
    }

    /// Reads, applies the difference, and again, until there is none. Gives what was applied, by round.
    pub(crate) fn converge(&self) -> Vec<Vec<Op>> {
        self.with(async |kernel| {
            let mut rounds = Vec::new();
            loop {
                let observed = kernel.read().await.unwrap();
                let ops = diff(&self.plan.desired(&observed), &observed.state);
                if ops.is_empty() {
                    return rounds;
                }
                assert!(rounds.len() < 3, "after {} rounds there is still {ops:#?}", rounds.len());
                for op in &ops {
                    let outcome = kernel.apply(op).await;
                    assert!(matches!(outcome, Outcome::Done(())), "{outcome:?}");
                }
                rounds.push(ops);
            }
        })
    }
}

/// Two nodes that know each other, with a wire between them.
pub(crate) fn pair(bpffs: &Path) -> (Node, Node) {
    let (mut one, mut two) = (node(bpffs, 1), node(bpffs, 2));
    one.netns.ip(&format!("link add u0 type veth peer name u0 netns {}", two.netns.path().display()));
    for (node, number) in [(&one, 1), (&two, 2)] {
        node.netns.ip(&format!("addr add 192.168.77.{number}/24 dev u0"));
        node.netns.ip(&format!("addr add fd77::{number}/64 dev u0 nodad"));
        node.netns.ip("link set u0 up");
    }
    one.plan.remote_nodes.insert("two".to_owned(), remote(2));
    two.plan.remote_nodes.insert("one".to_owned(), remote(1));
    (one, two)
}

/// A machine that knows node one by 172.16.0.1 and fd16::1, and no pods.
pub(crate) fn outside(node: &Node) -> Netns {
    let outside = Netns::new();
    node.netns.ip(&format!("link add w0 type veth peer name w0 netns {}", outside.path().display()));
    for (netns, last) in [(&node.netns, 1), (&outside, 2)] {
        netns.ip(&format!("addr add 172.16.0.{last}/24 dev w0"));
        netns.ip(&format!("addr add fd16::{last}/64 dev w0 nodad"));
        netns.ip("link set w0 up");
    }
    outside
}

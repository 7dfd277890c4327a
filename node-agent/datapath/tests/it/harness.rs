//! Namespaces to test in.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    net::IpAddr,
    os::fd::AsRawFd as _,
    panic::resume_unwind,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    thread,
};

use basal_datapath::{
    diff::diff,
    kernel::{Kernel as _, Observed},
    linux::{LinuxKernel, Paths},
    masquerade::{BpfMasquerade, FlowSizes},
    names::IfName,
    op::Op,
    plan::{DEFAULT_TUNNEL_PORT, Endpoint, NodePlan, RemoteNode, Routers},
    program::{OBJECT, Object},
    routing::{Routing, Tunnel},
    state::{PodAddress, PodSide},
};
use basal_maps::identity;
use basal_runtime::{
    env::{SharedEnv, SystemEnv},
    outcome::Outcome,
};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, setns, unshare},
};

/// Runs a test on a thread with a mount namespace and a bpffs of its own.
pub(crate) fn sandbox(test: impl FnOnce(&Path) + Send) {
    assert!(nix::unistd::geteuid().is_root(), "this test makes namespaces and loads BPF programs: run it as root");
    assert!(!OBJECT.is_empty(), "built without BPF object: run `cargo xtask ebpf`");
    let dir = tempfile::tempdir().unwrap();
    on_thread(|| {
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).unwrap();
        mount(Some("bpf"), dir.path(), Some("bpf"), MsFlags::empty(), None::<&str>).unwrap();
        test(dir.path());
        umount2(dir.path(), MntFlags::MNT_DETACH).unwrap();
    });
}

fn on_thread<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| scope.spawn(work).join()).unwrap_or_else(|panic| resume_unwind(panic))
}

/// A network namespace. It lives as long as the value, or a process in it.
pub(crate) struct Netns {
    file: File,
}

impl Netns {
    pub(crate) fn new() -> Self {
        let netns = on_thread(|| {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            Self { file: File::open("/proc/thread-self/ns/net").unwrap() }
        });
        netns.ip("link set lo up");
        netns
    }

    /// A path to the namespace for other threads and processes.
    pub(crate) fn path(&self) -> PathBuf {
        format!("/proc/{}/fd/{}", std::process::id(), self.file.as_raw_fd()).into()
    }

    /// Runs `work` on a thread in the namespace.
    pub(crate) fn enter<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        on_thread(|| {
            setns(&self.file, CloneFlags::CLONE_NEWNET).unwrap();
            work()
        })
    }

    /// Runs a command in the namespace; gives what it printed, or, when it failed, that with its errors.
    pub(crate) fn run(&self, command: &str) -> Result<String, String> {
        let mut words = command.split_whitespace();
        let program = words.next().unwrap();
        let output = self.enter(|| Command::new(program).args(words).output());
        let output = output.unwrap_or_else(|error| panic!("{program} cannot be run ({error}); install it"));
        let text = String::from_utf8(output.stdout).unwrap();
        if output.status.success() {
            return Ok(text);
        }
        Err(format!("{command}: {}\n{text}{}", output.status, String::from_utf8_lossy(&output.stderr)))
    }

    pub(crate) fn ip(&self, arguments: &str) {
        self.run(&format!("ip {arguments}")).unwrap();
    }

    /// One ping that must be answered.
    pub(crate) fn ping(&self, ip: &str) -> Result<String, String> {
        self.run(&format!("ping -n -c 1 -W 5 {ip}"))
    }
}

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
        fn below(dir: &Path) -> Vec<PathBuf> {
            let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
            entries
                .flat_map(|path| if path.is_dir() { [below(&path), vec![path]].concat() } else { vec![path] })
                .collect()
        }
        below(&self.paths.bpffs).into_iter().collect()
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

//! The kernel of the machine that the tests run on, in namespaces of their own: nodes and pods are network namespaces.

mod everything;
#[path = "../../../../datapath/tests/it/harness/namespaces.rs"]
mod namespaces;
mod still;

use std::{
    collections::BTreeMap,
    fs::{self, File},
    net::IpAddr,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, OnceLock},
};

use basal_datapath::{
    linux::{LinuxKernel, Paths},
    op::Op,
};
use basal_runtime::env::SharedEnv;
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, setns},
};
use tempfile::TempDir;

use self::{
    everything::Everything,
    namespaces::{Netns, sandbox},
    still::Still,
};
use crate::machine::{Machine, NODE_ADDRESSES};

/// Where a container runtime mounts the namespaces of its containers.
const NAMESPACES: &str = "/run/netns";

/// Runs a test that boots machines; what they mount goes with it.
pub(crate) fn with_machines(test: impl FnOnce() + Send) {
    sandbox(|_| {
        mount(Some("run"), "/run", Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
        fs::create_dir(NAMESPACES).unwrap();
        test();
    });
}

/// A node that the thread which booted it is in, with a bpffs of its own.
#[derive(Clone)]
pub(crate) struct LinuxMachine(Arc<Node>);

struct Node {
    netns: Netns,
    /// The other end of the node's device is there.
    _network: Netns,
    bpffs: Mounted,
    log: Arc<Mutex<Vec<Op>>>,
    containers: Mutex<BTreeMap<String, Container>>,
    /// What it had when it had no endpoints yet.
    fresh: OnceLock<Arc<Everything>>,
}

struct Container {
    netns: Netns,
    /// Where agents find it.
    path: Mounted,
}

/// Something that stays mounted as long as the value lives.
struct Mounted {
    path: PathBuf,
    /// The folder that it is mounted on.
    folder: Option<TempDir>,
}

impl Mounted {
    fn bpffs() -> Self {
        let folder = tempfile::tempdir().unwrap();
        mount(Some("bpf"), folder.path(), Some("bpf"), MsFlags::empty(), None::<&str>).unwrap();
        Self { path: folder.path().to_owned(), folder: Some(folder) }
    }

    fn netns(netns: &Netns, container: &str) -> Self {
        let path = Path::new(NAMESPACES).join(container);
        File::create(&path).unwrap();
        mount(Some(&netns.path()), &path, None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
        Self { path, folder: None }
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        umount2(&self.path, MntFlags::MNT_DETACH).unwrap();
        if self.folder.is_none() {
            fs::remove_file(&self.path).unwrap();
        }
    }
}

impl LinuxMachine {
    fn paths(&self) -> Paths {
        Paths { bpffs: self.0.bpffs.path.clone(), ..Paths::default() }
    }

    fn with(fresh: OnceLock<Arc<Everything>>) -> Self {
        let (netns, network) = (Netns::new(), Netns::new());
        netns.ip(&format!("link add eth0 type veth peer name eth0 netns {}", network.path().display()));
        network.ip("link set eth0 up");
        for address in NODE_ADDRESSES {
            let nodad = if address.contains(':') { " nodad" } else { "" };
            netns.ip(&format!("address add {address} dev eth0{nodad}"));
        }
        netns.ip("link set eth0 up");
        setns(File::open(netns.path()).unwrap(), CloneFlags::CLONE_NEWNET).unwrap();
        let (log, containers) = (Arc::default(), Mutex::default());
        Self(Arc::new(Node { netns, _network: network, bpffs: Mounted::bpffs(), log, containers, fresh }))
    }
}

impl Machine for LinuxMachine {
    type Port = Still;

    fn boot() -> Self {
        Self::with(OnceLock::new())
    }

    fn reboot(&self) -> Self {
        // The namespaces of containers go at once, wherever the machine is still known.
        self.0.containers.lock().unwrap().clear();
        Self::with(self.0.fresh.clone())
    }

    fn port(&self, env: &SharedEnv) -> Arc<Still> {
        let kernel = LinuxKernel::new(env, self.paths()).unwrap();
        Arc::new(Still { kernel, log: Arc::clone(&self.0.log) })
    }

    fn take_log(&self) -> Vec<Op> {
        std::mem::take(&mut self.0.log.lock().unwrap())
    }

    fn left(&self) -> Vec<String> {
        let mut now = Everything::of(&self.0.netns, &self.paths());
        let mut left = Vec::new();
        for (name, container) in self.0.containers.lock().unwrap().iter() {
            now = now.without_mount(&container.path.path);
            let links = container.netns.run("ip -brief link").unwrap();
            left.extend(links.lines().filter(|line| !line.starts_with("lo ")).map(|line| format!("{name} has {line}")));
        }
        left.extend(now.since(self.0.fresh.get().unwrap()));
        left
    }

    fn has_an_agent(&self) {
        self.0.fresh.get_or_init(|| Arc::new(Everything::of(&self.0.netns, &self.paths())));
    }

    fn run(&self, container: &str) {
        self.0.containers.lock().unwrap().entry(container.to_owned()).or_insert_with(|| {
            let netns = Netns::new();
            let path = Mounted::netns(&netns, container);
            Container { netns, path }
        });
    }

    fn end(&self, container: &str) {
        self.0.containers.lock().unwrap().remove(container);
    }

    fn ping(&self, container: &str, to: IpAddr) -> Result<(), String> {
        self.0.containers.lock().unwrap()[container].netns.ping(&to.to_string()).map(drop)
    }

    fn again(self) -> Option<Self> {
        self.0.containers.lock().unwrap().clear();
        Some(self)
    }
}

//! The first process of a node. A node is a set of namespaces: network, mounts, processes, host name, IPC. This process
//! arranges the mounts so that the chart's default paths are the node's own, then reaps. When it ends, the kernel ends
//! every process of the node, and with the last of them go its mounts: overlay mounts of containers, BPF pins, /run/netns.

use std::env;
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::thread;

use anyhow::{Context, bail};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use serde::{Deserialize, Serialize};

use super::names::MARK;
use crate::process;

/// The zeroth argument by which [`run_if_asked`] knows its job.
const NAME: &str = "basal-node-init";

/// What the first process of a node needs to know.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct NodeSpec {
    /// Host name.
    pub(super) name: String,
    /// The cluster, for the mark of its processes.
    pub(super) cluster: String,
    /// Its network namespace, below /run/netns.
    pub(super) netns: String,
    /// The node's folder.
    pub(super) dir: PathBuf,
    /// Its entry in /etc/hosts.
    pub(super) address: String,
}

impl NodeSpec {
    /// Its existence says that the mounts are in place.
    fn ready(&self) -> PathBuf {
        self.dir.join("ready")
    }

    fn log(&self) -> PathBuf {
        self.dir.join("init.log")
    }
}

/// To be called first in `main` of every program that starts nodes: a node's first process is that very program.
pub fn run_if_asked() {
    let mut args = env::args_os();
    if args.next().is_none_or(|arg| arg != NAME) {
        return;
    }
    let done = args.next().context("the first process of a node needs its specification").and_then(|spec| {
        let spec: NodeSpec = serde_json::from_str(&spec.to_string_lossy())?;
        arrange(&spec)?;
        fs::write(spec.ready(), "")?;
        reap()
    });
    if let Err(error) = done {
        crate::say::say(format!("{error:#}"));
    }
    std::process::exit(1);
}

/// Starts the first process of a node and waits until its mounts are in place; answers its process id.
pub(super) fn start(spec: &NodeSpec) -> anyhow::Result<u32> {
    fs::create_dir_all(&spec.dir).with_context(|| format!("creating {}", spec.dir.display()))?;
    let mut command = Command::new("/proc/self/exe");
    command.arg0(NAME).arg(serde_json::to_string(spec)?).env(MARK, &spec.cluster);
    let (netns, log) = (fs::File::open(format!("/run/netns/{}", spec.netns))?, spec.log());
    // A thread may leave its namespaces without taking the rest of the program along; its children follow it. Other
    // threads cannot: once its children are to live in another PID namespace, the kernel refuses to clone one.
    let starter = thread::spawn(move || -> anyhow::Result<Child> {
        setns(netns, CloneFlags::CLONE_NEWNET).context("entering the node's network namespace")?;
        let own = CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWUTS | CloneFlags::CLONE_NEWIPC;
        unshare(own | CloneFlags::CLONE_NEWPID).context("making the node's namespaces")?;
        process::spawn_detached(NAME, command, &log)
    });
    let Ok(child) = starter.join() else { bail!("the thread that starts a node has panicked") };
    let pid = process::collect_when_ended(child?);
    crate::wait::until_ok("the node's mounts", std::time::Duration::from_secs(30), || {
        if spec.ready().exists() || !process::is_alive(pid) { Ok(()) } else { bail!("init is at work") }
    })?;
    if !spec.ready().exists() {
        bail!("the first process of node {} ended: {}", spec.name, process::tail(&spec.log()));
    }
    Ok(pid)
}

fn arrange(spec: &NodeSpec) -> anyhow::Result<()> {
    nix::unistd::sethostname(&spec.name).context("setting the host name")?;
    change("/", MsFlags::MS_REC | MsFlags::MS_PRIVATE)?;
    forget_network_namespaces()?;
    fresh("proc", "/proc", "")?;
    // sysfs shows the links of the network namespace that mounts it; the control groups come back over it.
    let aside = spec.dir.join("cgroup");
    fs::create_dir_all(&aside)?;
    bind(Path::new("/sys/fs/cgroup"), &aside)?;
    fresh("sysfs", "/sys", "")?;
    bind(&aside, Path::new("/sys/fs/cgroup"))?;
    umount2(&aside, MntFlags::MNT_DETACH).context("unmounting the control groups' second place")?;
    fresh("bpf", "/sys/fs/bpf", "mode=0700")?;
    fresh("tmpfs", "/run", "mode=0755")?;
    for folder in ["/etc", "/opt"] {
        overlay(&spec.dir, folder)?;
    }
    // In memory: containerd syncs each file of an image to the disk, which is most of a node's start.
    fresh("tmpfs", "/var/lib", "mode=0755,size=8g")?;
    let log = spec.dir.join("var-log");
    fs::create_dir_all(&log)?;
    bind(&log, Path::new("/var/log"))?;
    for folder in ["/run/netns", "/run/lock", "/etc/cni/net.d", "/opt/cni/bin", "/etc/kubernetes"] {
        fs::create_dir_all(folder).with_context(|| format!("creating {folder}"))?;
    }
    fs::write("/etc/hostname", format!("{}\n", spec.name))?;
    fs::write("/etc/hosts", format!("127.0.0.1 localhost\n::1 localhost\n{} {}\n", spec.address, spec.name))?;
    // Nothing outside can be asked; CoreDNS answers for the cluster.
    replace("/etc/resolv.conf", "nameserver 127.0.0.1\n")?;
    // Last: made shared earlier, the lazy unmount above would take the control groups along.
    change("/", MsFlags::MS_REC | MsFlags::MS_SHARED)
}

/// Unmounts the copies of the machine's named network namespaces, which would keep them alive after their deletion.
fn forget_network_namespaces() -> anyhow::Result<()> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").context("reading the mounts")?;
    let mut places: Vec<&str> =
        mounts.lines().filter(|line| line.contains(" - nsfs ")).filter_map(|line| line.split(' ').nth(4)).collect();
    places.reverse();
    for place in places {
        umount2(place, MntFlags::MNT_DETACH).with_context(|| format!("unmounting {place}"))?;
    }
    Ok(())
}

fn fresh(kind: &str, target: &str, options: &str) -> anyhow::Result<()> {
    mount(Some(kind), target, Some(kind), MsFlags::empty(), Some(options))
        .with_context(|| format!("mounting {kind} on {target}"))
}

fn bind(source: &Path, target: &Path) -> anyhow::Result<()> {
    mount(Some(source), target, None::<&str>, MsFlags::MS_BIND | MsFlags::MS_REC, None::<&str>)
        .with_context(|| format!("binding {} to {}", source.display(), target.display()))
}

fn change(target: &str, propagation: MsFlags) -> anyhow::Result<()> {
    mount(None::<&str>, target, None::<&str>, propagation, None::<&str>)
        .with_context(|| format!("changing the propagation of {target}"))
}

/// The machine's folder to read, the node's own to write.
fn overlay(dir: &Path, target: &str) -> anyhow::Result<()> {
    let name = target.trim_start_matches('/');
    let (upper, work) = (dir.join(name), dir.join(format!("{name}.work")));
    fs::create_dir_all(&upper)?;
    fs::create_dir_all(&work)?;
    let options = format!("lowerdir={target},upperdir={},workdir={}", upper.display(), work.display());
    fresh("overlay", target, &options)
}

/// Writes a file anew where a link may be, without following it.
fn replace(path: &str, text: &str) -> anyhow::Result<()> {
    if Path::new(path).symlink_metadata().is_ok() {
        fs::remove_file(path).with_context(|| format!("removing {path}"))?;
    }
    fs::write(path, text).with_context(|| format!("writing {path}"))
}

/// Collects orphans, as the first process of a system must.
fn reap() -> anyhow::Result<()> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGCHLD);
    signals.thread_block().context("blocking SIGCHLD")?;
    loop {
        while let Ok(status) = waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            if status == WaitStatus::StillAlive {
                break;
            }
        }
        signals.wait().context("waiting for SIGCHLD")?;
    }
}

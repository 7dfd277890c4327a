//! Namespaces of the bench's own. None has a name, so they end with the bench, however it ends.

use std::{
    fs::File,
    os::fd::AsRawFd as _,
    path::{Path, PathBuf},
    thread,
};

use anyhow::{Context as _, anyhow, ensure};
use basal_e2e::command::Run;
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, setns, unshare},
};

/// The bridge that everything is plugged into.
const BRIDGE: &str = "bag0";

/// Takes this process into a network and a mount namespace of its own, with a bridge at [`super::cluster::HUB`]. Must come
/// before anything that starts a thread.
pub(crate) fn leave_the_machine() -> anyhow::Result<()> {
    ensure!(nix::unistd::geteuid().is_root(), "this bench makes namespaces and loads BPF programs: run it as root");
    unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).context("new namespaces")?;
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)
        .context("making all mounts private")?;
    ip("link set lo up")?;
    ip(&format!("link add {BRIDGE} type bridge"))?;
    ip(&format!("address add {}/16 dev {BRIDGE}", super::cluster::HUB))?;
    ip(&format!("link set {BRIDGE} up"))
}

/// Runs `ip` in the namespace of the calling thread.
fn ip(arguments: &str) -> anyhow::Result<()> {
    Run::new("ip").args(arguments.split(' ')).done()
}

/// A network namespace. It lives as long as the value, or a process in it.
pub(crate) struct Netns {
    file: File,
}

impl Netns {
    /// A new one with nothing but loopback.
    pub(crate) fn new() -> anyhow::Result<Self> {
        on_thread(|| {
            unshare(CloneFlags::CLONE_NEWNET).context("a new network namespace")?;
            ip("link set lo up")?;
            Ok(Self { file: File::open("/proc/thread-self/ns/net").context("the namespace of this thread")? })
        })
    }

    /// A path to it for other processes.
    pub(crate) fn path(&self) -> PathBuf {
        Path::new("/proc").join(std::process::id().to_string()).join("fd").join(self.file.as_raw_fd().to_string())
    }

    /// Runs `work` on a thread in it; what that thread starts is in it, too.
    pub(crate) fn enter<T: Send>(&self, work: impl FnOnce() -> anyhow::Result<T> + Send) -> anyhow::Result<T> {
        on_thread(|| {
            setns(&self.file, CloneFlags::CLONE_NEWNET).context("entering a network namespace")?;
            work()
        })
    }

    /// Gives it an `eth0` on the bridge with these addresses.
    pub(crate) fn plug(&self, number: u8, addresses: &[String]) -> anyhow::Result<()> {
        let port = format!("bag-node{number}");
        ip(&format!("link add {port} type veth peer name eth0 netns {}", self.path().display()))?;
        ip(&format!("link set {port} master {BRIDGE} up"))?;
        self.enter(|| {
            for address in addresses {
                let nodad = if address.contains(':') { " nodad" } else { "" };
                ip(&format!("address add {address} dev eth0{nodad}"))?;
            }
            ip("link set eth0 up")
        })
    }
}

fn on_thread<T: Send>(work: impl FnOnce() -> anyhow::Result<T> + Send) -> anyhow::Result<T> {
    thread::scope(|scope| scope.spawn(work).join()).map_err(|_panic| anyhow!("a thread in a namespace panicked"))?
}

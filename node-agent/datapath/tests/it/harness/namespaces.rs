//! Namespaces and bpffs to test in; the agent's tests have them as well.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    os::fd::AsRawFd as _,
    panic::resume_unwind,
    path::{Path, PathBuf},
    process::Command,
    thread,
};

use basal_datapath::program::OBJECT;
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

/// Every pin below a folder of a bpffs, and every folder of pins.
pub(crate) fn pins(dir: &Path) -> BTreeSet<PathBuf> {
    let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    entries
        .flat_map(|path| if path.is_dir() { pins(&path) } else { BTreeSet::new() }.into_iter().chain([path]))
        .collect()
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

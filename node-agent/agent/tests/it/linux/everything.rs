//! All that a node has.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use basal_datapath::{
    diff::diff,
    kernel::Kernel as _,
    linux::{LinuxKernel, Paths},
    names::IfName,
    state::NodeState,
};
use basal_runtime::env::{SharedEnv, SystemEnv};

use super::namespaces::{Netns, pins};

/// Lists of the kernel that show what is not Basal's as well.
const LISTS: [&str; 4] =
    ["ip -4 route show table all", "ip -6 route show table all", "ip -4 rule show", "ip -6 rule show"];

/// All that a node has, as far as it depends on what was done there.
pub(super) struct Everything {
    state: NodeState,
    /// Devices, Basal's or not.
    devices: BTreeSet<IfName>,
    /// Pins and folders of pins, below the bpffs, but the folder of all endpoints: it stays.
    pins: BTreeSet<PathBuf>,
    /// Lines of [`LISTS`].
    listed: BTreeSet<String>,
    /// Where something is mounted, beside the bpffs.
    mounts: BTreeSet<PathBuf>,
}

impl Everything {
    /// What a process finds that has just started.
    pub(super) fn of(netns: &Netns, paths: &Paths) -> Self {
        let observed = netns.enter(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let env: SharedEnv = Arc::new(SystemEnv);
                LinuxKernel::new(&env, paths.clone()).unwrap().read().await.unwrap()
            })
        });
        let listed = LISTS.iter().flat_map(|list| {
            let lines = netns.run(list).unwrap();
            // It takes a while until a device that is up counts as such.
            let lines = lines.lines().filter(|line| !is_by_itself(line)).map(|line| line.replace(" linkdown", ""));
            lines.map(|line| format!("{list}: {line}")).collect::<Vec<_>>()
        });
        let pins = pins(&paths.bpffs).into_iter().map(|pin| pin.strip_prefix(&paths.bpffs).unwrap().to_owned());
        let mounts = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
        let mounts = mounts.lines().map(|line| PathBuf::from(line.split(' ').nth(4).unwrap()));
        Self {
            state: observed.state,
            devices: observed.devices.into_keys().collect(),
            pins: pins.filter(|pin| pin != Path::new("cilium/endpoints")).collect(),
            listed: listed.collect(),
            mounts: mounts.filter(|mount| *mount != paths.bpffs).collect(),
        }
    }

    /// Leaves out what is mounted there.
    pub(super) fn without_mount(mut self, path: &Path) -> Self {
        self.mounts.remove(path);
        self
    }

    /// What is more, less or other than before; of mounts, what is more.
    pub(super) fn since(&self, before: &Self) -> Vec<String> {
        let ops = diff(&before.state, &self.state).into_iter().map(|op| format!("to do: {op}"));
        let mut all: Vec<String> = ops.collect();
        if all.is_empty() && self.state != before.state {
            all.push(format!("{:?} was {:?}", self.state, before.state));
        }
        all.extend(self.devices.symmetric_difference(&before.devices).map(|device| format!("device {device}")));
        all.extend(self.pins.symmetric_difference(&before.pins).map(|pin| format!("pin {}", pin.display())));
        all.extend(self.listed.symmetric_difference(&before.listed).cloned());
        // Mounts go with folders that somebody removes elsewhere; none comes from there.
        all.extend(self.mounts.difference(&before.mounts).map(|mount| format!("mount {}", mount.display())));
        all
    }
}

/// Whether a line is of what the kernel makes of each link in its own time.
fn is_by_itself(line: &str) -> bool {
    line.contains("fe80::") || line.contains("ff00::/8")
}

//! What the datapath needs of process and kernel, checked before anything is changed, each with a name and advice.

use std::{fmt, fs, io, path::Path, process::Command};

use basal_runtime::reason::Reason;
use nix::sys::statfs::statfs;

use super::Paths;
use crate::{forward::FilterTable, program::OBJECT};

/// Number of `CAP_NET_ADMIN` (linux/capability.h).
const CAP_NET_ADMIN: u32 = 12;
/// Number of `CAP_SYS_ADMIN`, which entering namespaces takes, and which older kernels take for BPF.
const CAP_SYS_ADMIN: u32 = 21;
/// Number of `CAP_BPF`.
const CAP_BPF: u32 = 39;
/// `BPF_FS_MAGIC` (linux/magic.h).
const BPFFS_MAGIC: i64 = 0xcafe_4a11;
/// `bpf_redirect_peer` came with this kernel, which is Cilium's minimum too.
const MINIMUM_KERNEL: (u32, u32) = (5, 10);
/// tcx links came with this one.
const TCX_KERNEL: (u32, u32) = (6, 6);

/// Something that is missing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Missing {
    /// A capability of this process, by its name.
    Capability(&'static str),
    /// The kernel is older than what programs use.
    Kernel(String),
    /// No bpffs is mounted at the path.
    Bpffs(String),
    /// `nft` does not run.
    Nft(String),
    /// `iptables` does not run.
    Iptables(String),
    /// The kernel's parameters cannot be written.
    Sysctl(String),
    /// The binary holds no programs.
    Object,
}

impl Missing {
    /// The reason for events and metrics.
    #[must_use]
    pub const fn reason(&self) -> Reason {
        const CAPABILITY: Reason = Reason::new("CapabilityMissing");
        const KERNEL: Reason = Reason::new("KernelTooOld");
        const BPFFS: Reason = Reason::new("BpffsMissing");
        const NFT: Reason = Reason::new("NftMissing");
        const IPTABLES: Reason = Reason::new("IptablesMissing");
        const SYSCTL: Reason = Reason::new("SysctlReadOnly");
        const OBJECT: Reason = Reason::new("ProgramsNotBuilt");
        match self {
            Self::Capability(_) => CAPABILITY,
            Self::Kernel(_) => KERNEL,
            Self::Bpffs(_) => BPFFS,
            Self::Nft(_) => NFT,
            Self::Iptables(_) => IPTABLES,
            Self::Sysctl(_) => SYSCTL,
            Self::Object => OBJECT,
        }
    }
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Capability(name) => {
                write!(f, "capability {name} is missing; add it to the container's securityContext")
            }
            Self::Kernel(release) => write!(
                f,
                "kernel {release} is too old: programs need {}.{} or later",
                MINIMUM_KERNEL.0, MINIMUM_KERNEL.1
            ),
            Self::Bpffs(path) => write!(f, "no bpffs is mounted at {path}; mount it: mount -t bpf bpf {path}"),
            Self::Nft(why) => write!(f, "nft cannot be run ({why}); install nftables"),
            Self::Iptables(why) => write!(f, "iptables cannot be run ({why}); install iptables"),
            Self::Sysctl(why) => write!(f, "kernel parameters cannot be written ({why}); mount /proc/sys/net writable"),
            Self::Object => f.write_str("this build contains no BPF programs; run `cargo xtask ebpf` and build again"),
        }
    }
}

/// Everything that is missing; nothing of it is tried by changing the node.
#[must_use]
pub fn probe(paths: &Paths) -> Vec<Missing> {
    let mut missing = capabilities(&fs::read_to_string("/proc/self/status").unwrap_or_default());
    let release = release();
    if kernel_version(&release).is_none_or(|version| version < MINIMUM_KERNEL) {
        missing.push(Missing::Kernel(release.trim_end().to_owned()));
    }
    if !is_bpffs(&paths.bpffs) {
        missing.push(Missing::Bpffs(paths.bpffs.display().to_string()));
    }
    missing.extend(command(&paths.nft).err().map(Missing::Nft));
    let iptables = FilterTable::ALL.iter().find_map(|table| command(Path::new(table.command())).err());
    missing.extend(iptables.map(Missing::Iptables));
    if let Err(error) = writable(&paths.sysctl.join("net/ipv4/ip_forward")) {
        missing.push(Missing::Sysctl(error.to_string()));
    }
    if OBJECT.is_empty() {
        missing.push(Missing::Object);
    }
    missing
}

/// Runs a command that tells its version.
fn command(program: &Path) -> Result<(), String> {
    match Command::new(program).arg("--version").output() {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => Err(format!("{}: {}", program.display(), output.status)),
        Err(error) => Err(format!("{}: {error}", program.display())),
    }
}

/// True when the kernel has tcx links.
pub(super) fn has_tcx() -> bool {
    kernel_version(&release()).is_some_and(|version| version >= TCX_KERNEL)
}

fn release() -> String {
    fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default()
}

fn writable(path: &Path) -> io::Result<()> {
    fs::OpenOptions::new().write(true).open(path).map(drop)
}

fn is_bpffs(path: &Path) -> bool {
    statfs(path).is_ok_and(|stat| stat.filesystem_type().0 == BPFFS_MAGIC)
}

/// From `/proc/self/status`.
fn capabilities(status: &str) -> Vec<Missing> {
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let effective = effective.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or_default();
    [(CAP_NET_ADMIN, "NET_ADMIN"), (CAP_SYS_ADMIN, "SYS_ADMIN"), (CAP_BPF, "BPF")]
        .into_iter()
        .filter(|(bit, _)| effective & (1 << bit) == 0)
        .map(|(_, name)| Missing::Capability(name))
        .collect()
}

fn kernel_version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_capabilities_are_named() {
        assert_eq!(capabilities("CapEff:\t000001ffffffffff\n"), []);
        assert_eq!(
            capabilities("CapEff:\t0000000000001000\n"),
            [Missing::Capability("SYS_ADMIN"), Missing::Capability("BPF")]
        );
        assert_eq!(capabilities("").len(), 3);
    }

    #[test]
    fn releases_are_compared_as_numbers() {
        assert_eq!(kernel_version("6.18.44-custom\n"), Some((6, 18)));
        assert_eq!(kernel_version("5.10.0"), Some((5, 10)));
        assert_eq!(kernel_version("unknown"), None);
        assert!((6, 18) > TCX_KERNEL && (5, 10) < TCX_KERNEL);
    }
}

//! The stage `packages`.

use std::process::Command;

use anyhow::{Context as _, bail};

use super::{say, store};

const PACKAGES: &[&str] = &[
    // To build: protoc for etcd's API, with the definitions that it imports; a compiler with `core` for BPF.
    "gcc",
    "libprotobuf-dev",
    "libstd-rust-web-dev-bpf",
    "protobuf-compiler",
    "python3-pip",
    "rustc-web",
    // The nodes of a test cluster.
    "conntrack",
    "containerd",
    "containernetworking-plugins",
    "ipset",
    "iptables",
    "kmod",
    "nftables",
    "runc",
    "util-linux",
    // Images.
    "buildah",
    "mmdebstrap",
    // To look at and to measure.
    "bpftool",
    "iperf3",
    "iproute2",
    "iputils-ping",
    "jq",
    "tcpdump",
];

/// Installs the packages that are missing.
pub(super) fn run() -> anyhow::Result<()> {
    let missing = missing()?;
    if missing.is_empty() {
        say(&format!("packages: all {} installed", PACKAGES.len()));
        return Ok(());
    }
    say(&format!("packages: installing {}", missing.join(" ")));
    let advice = "run it as root on Debian 12 with the bookworm-security suite enabled";
    store::quietly(apt().arg("update"), "apt-update").context(advice)?;
    let mut install = apt();
    install.args(["install", "--yes", "--no-install-recommends"]).args(&missing);
    store::quietly(&mut install, "apt-install").context(advice)
}

fn apt() -> Command {
    let mut command = Command::new("apt-get");
    command.env("DEBIAN_FRONTEND", "noninteractive");
    command
}

fn missing() -> anyhow::Result<Vec<&'static str>> {
    let query =
        Command::new("dpkg-query").args(["-W", "-f", "${Package} ${db:Status-Status}\n"]).args(PACKAGES).output();
    let query = query.context("dpkg-query does not start; the set-up is for Debian 12")?;
    let known = String::from_utf8_lossy(&query.stdout).into_owned();
    if known.is_empty() && !query.status.success() && query.stderr.is_empty() {
        bail!("dpkg-query answered nothing");
    }
    let installed = |package: &&&str| known.lines().any(|line| line == format!("{package} installed"));
    Ok(PACKAGES.iter().filter(|package| !installed(package)).copied().collect())
}

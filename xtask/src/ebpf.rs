//! The step `ebpf`: builds the kernel programs into `target/bpf/basal-ebpf.o`, where basal-datapath embeds them.
//!
//! Two toolchains do: a stable compiler that ships a prebuilt `core` for BPF (Debian's `rustc-web` with
//! `libstd-rust-web-dev-bpf`), or a nightly with `rust-src`, which builds `core` itself. Both link with bpf-linker.
//! Objects are cached by a hash of everything that they follow from.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, bail, ensure};
use sha2::{Digest as _, Sha256};

use crate::cache;

/// Where basal-datapath's build script looks.
const OUTPUT: &str = "target/bpf/basal-ebpf.o";
const TARGET: &str = "bpfel-unknown-none";
/// What the object is made of, beside dependencies.
const SOURCES: [&str; 2] = ["node-agent/ebpf", "node-agent/maps"];
/// Dependencies whose versions matter.
const DEPENDENCIES: [&str; 2] = ["aya-ebpf", "zerocopy"];

/// Its options.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Build even when the cache has an object for these sources.
    #[arg(long)]
    force: bool,
}

/// A compiler that can build for BPF.
enum Toolchain {
    /// A stable compiler with a prebuilt `core`, allowed to use unstable features by `RUSTC_BOOTSTRAP`.
    Prebuilt { rustc: PathBuf },
    /// rustup's nightly with `rust-src`.
    Nightly,
}

/// Runs it.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    build_in(cache::checkout(), args.force)
}

/// Builds the object of a checkout into it, or takes it from the cache.
pub(crate) fn build_in(root: &Path, force: bool) -> anyhow::Result<()> {
    let cache = cache::dir()?.join("ebpf");
    let linker = linker()?;
    let toolchain = toolchain()?;
    let output = root.join(OUTPUT);
    let cached = cache.join(format!("{}.o", source_hash(root, &toolchain, &linker)?));

    if force || !cached.exists() {
        let built = build(root, &cache, &toolchain, &linker)?;
        copy(&built, &cached)?;
    }
    // An object that has not changed keeps its time, so that nothing that embeds it is built again.
    let bytes = fs::read(&cached).with_context(|| format!("cannot read {}", cached.display()))?;
    if fs::read(&output).ok().as_deref() != Some(bytes.as_slice()) {
        copy(&cached, &output)?;
    }
    Ok(())
}

/// bpf-linker from PATH, or from where `cargo install` puts it.
fn linker() -> anyhow::Result<PathBuf> {
    let mut dirs: Vec<PathBuf> = env::var_os("PATH").map(|path| env::split_paths(&path).collect()).unwrap_or_default();
    if let Some(home) = env::var_os("HOME") {
        dirs.push(PathBuf::from(home).join(".cargo/bin"));
    }
    dirs.into_iter()
        .map(|dir| dir.join("bpf-linker"))
        .find(|path| path.is_file())
        .context("bpf-linker is missing; run `cargo install bpf-linker --version 0.10.4`")
}

/// The first toolchain that can do it.
fn toolchain() -> anyhow::Result<Toolchain> {
    let rustc = PathBuf::from(env::var_os("BASAL_BPF_RUSTC").unwrap_or_else(|| "/usr/bin/rustc".into()));
    if let Ok(library) = print(Command::new(&rustc).args(["--print", "target-libdir", "--target", TARGET]))
        && has_file(Path::new(&library), "libcore-")
    {
        return Ok(Toolchain::Prebuilt { rustc });
    }
    if let Ok(sysroot) = print(Command::new("rustup").args(["run", "nightly", "rustc", "--print", "sysroot"]))
        && Path::new(&sysroot).join("lib/rustlib/src/rust/library/core").is_dir()
    {
        return Ok(Toolchain::Nightly);
    }
    bail!(
        "no compiler for BPF: {} has no core for {TARGET}, and there is no nightly with rust-src.\n\
         On Debian: apt-get install rustc-web libstd-rust-web-dev-bpf\n\
         Elsewhere: rustup toolchain install nightly --component rust-src\n\
         Another compiler with a prebuilt core can be named in BASAL_BPF_RUSTC.",
        rustc.display()
    )
}

impl Toolchain {
    /// A command of cargo with this compiler.
    fn cargo(&self) -> Command {
        match self {
            Self::Prebuilt { rustc } => {
                let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
                cargo.env("RUSTC", rustc).env("RUSTC_BOOTSTRAP", "1");
                cargo.arg("build");
                cargo
            }
            Self::Nightly => {
                let mut rustup = Command::new("rustup");
                // The running cargo's own choice of toolchain must not reach the nightly one.
                rustup.env_remove("RUSTUP_TOOLCHAIN").env_remove("RUSTC").env_remove("CARGO");
                rustup.args(["run", "nightly", "cargo", "build", "-Z", "build-std=core"]);
                rustup
            }
        }
    }

    /// Its exact version.
    fn version(&self) -> anyhow::Result<String> {
        match self {
            Self::Prebuilt { rustc } => print(Command::new(rustc).arg("-vV")),
            Self::Nightly => print(Command::new("rustup").args(["run", "nightly", "rustc", "-vV"])),
        }
    }
}

fn rustflags() -> String {
    format!("-C debuginfo=2 -C link-arg=--btf --cfg=bpf_target_arch=\"{}\"", env::consts::ARCH)
}

/// Builds the object and gives its path.
fn build(root: &Path, cache: &Path, toolchain: &Toolchain, linker: &Path) -> anyhow::Result<PathBuf> {
    let target_dir = cache.join("target");
    let status = toolchain
        .cargo()
        .args(["--release", "--package", "basal-ebpf", "--bin", "basal-ebpf", "--target", TARGET])
        .current_dir(root)
        .env("CARGO_TARGET_DIR", &target_dir)
        .env("CARGO_TARGET_BPFEL_UNKNOWN_NONE_LINKER", linker)
        .env("RUSTFLAGS", rustflags())
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env_remove("RUSTC_WRAPPER")
        .env_remove("RUSTC_WORKSPACE_WRAPPER")
        .status()
        .context("cannot start the BPF build")?;
    ensure!(status.success(), "the BPF build failed");
    Ok(target_dir.join(TARGET).join("release/basal-ebpf"))
}

/// A hash of everything that the object follows from.
fn source_hash(root: &Path, toolchain: &Toolchain, linker: &Path) -> anyhow::Result<String> {
    let mut sha = Sha256::new();
    for text in [toolchain.version()?, print(Command::new(linker).arg("--version"))?, rustflags()] {
        sha.update(text);
        sha.update([0]);
    }
    let lock = fs::read_to_string(root.join("Cargo.lock")).context("cannot read Cargo.lock")?;
    for package in lock.split("[[package]]") {
        let name = package.lines().find_map(|line| line.strip_prefix("name = \"")).unwrap_or_default();
        if DEPENDENCIES.iter().any(|dependency| name.starts_with(dependency)) {
            sha.update(package);
        }
    }
    let manifest = fs::read_to_string(root.join("Cargo.toml")).context("cannot read Cargo.toml")?;
    sha.update(manifest.split_once("[profile.release]").map(|(_, profile)| profile).unwrap_or_default());
    let mut files = Vec::new();
    for source in SOURCES {
        list(&root.join(source), &mut files)?;
    }
    files.sort();
    for file in files {
        sha.update(file.strip_prefix(root).unwrap_or(&file).as_os_str().as_encoded_bytes());
        sha.update([0]);
        sha.update(fs::read(&file).with_context(|| format!("cannot read {}", file.display()))?);
    }
    Ok(sha.finalize().iter().take(16).map(|byte| format!("{byte:02x}")).collect())
}

/// Every file below a folder.
fn list(dir: &Path, files: &mut Vec<PathBuf>) -> anyhow::Result<()> {
    for entry in fs::read_dir(dir).with_context(|| format!("cannot list {}", dir.display()))? {
        let path = entry?.path();
        if path.is_dir() { list(&path, files)? } else { files.push(path) }
    }
    Ok(())
}

fn has_file(dir: &Path, prefix: &str) -> bool {
    let Ok(entries) = fs::read_dir(dir) else { return false };
    entries.flatten().any(|entry| entry.file_name().to_string_lossy().starts_with(prefix))
}

/// Copies by way of a temporary file, so that nobody sees half of one.
fn copy(from: &Path, to: &Path) -> anyhow::Result<()> {
    let dir = to.parent().context("a file has a folder")?;
    fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let temporary = to.with_extension(format!("tmp{}", std::process::id()));
    fs::copy(from, &temporary).with_context(|| format!("cannot copy {} to {}", from.display(), temporary.display()))?;
    fs::rename(&temporary, to).with_context(|| format!("cannot put {} in place", to.display()))
}

/// What a command prints, without the last line's end.
fn print(command: &mut Command) -> anyhow::Result<String> {
    let output = command.output().with_context(|| format!("cannot run {}", command.get_program().display()))?;
    ensure!(
        output.status.success(),
        "{} failed: {}",
        command.get_program().display(),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(String::from_utf8(output.stdout)?.trim_end().to_owned())
}

//! The step `fuzz`: libFuzzer looks for inputs that break a reader.
//!
//! It does without cargo-fuzz: that adds a few flags to the compiler's, which `fuzz/instrument` adds too, for our own
//! crates only, so that a workspace that was built before is not built again from the bottom.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, bail, ensure};

use crate::cache::checkout;

/// Bytes of the longest input, above what any reader gets in one piece in the corpus.
const LONGEST: u32 = 16 * 1024;

/// Its options.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Seconds for each target.
    #[arg(long, default_value_t = 60)]
    seconds: u32,
    /// This target only: a folder of fuzz/corpus.
    #[arg(long)]
    target: Option<String>,
}

/// Runs it.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let mut targets = targets()?;
    if let Some(target) = &args.target {
        ensure!(targets.contains(target), "there is no target {target}; there are {}", targets.join(", "));
        targets.retain(|name| name == target);
    }
    let build = env::var_os("CARGO_TARGET_DIR").map_or_else(|| checkout().join("target"), PathBuf::from);
    compile(&targets)?;
    let mut broken = Vec::new();
    for target in &targets {
        println!("=== {target}: {} s", args.seconds);
        let found = build.join("fuzz").join(target);
        if !fuzz(&build.join("debug").join(target), target, &found, args.seconds)? {
            broken.push(format!("{target}: the input is crash-… in {}", found.display()));
        }
    }
    if !broken.is_empty() {
        bail!("broken promises:\n{}\nCopy the input to fuzz/corpus/<target>, and mend the reader.", broken.join("\n"));
    }
    Ok(())
}

/// Names of the targets, from their sources.
fn targets() -> anyhow::Result<Vec<String>> {
    let folder = checkout().join("fuzz/fuzz_targets");
    let entries = fs::read_dir(&folder).with_context(|| format!("cannot list {}", folder.display()))?;
    let mut names = Vec::new();
    for entry in entries {
        names.push(entry?.path().file_stem().context("a file without name")?.to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

fn compile(targets: &[String]) -> anyhow::Result<()> {
    // Of the whole workspace, because its features are what the dependencies were built with.
    let mut cargo = Command::new("cargo");
    cargo.args(["build", "--workspace", "--features", "basal-fuzz/libfuzzer"]);
    cargo.args(targets.iter().flat_map(|target| ["--bin", target]));
    cargo.env("RUSTC_WORKSPACE_WRAPPER", checkout().join("fuzz/instrument"));
    let status = cargo.current_dir(checkout()).status().context("could not start cargo")?;
    ensure!(status.success(), "the targets do not build; libFuzzer needs a C++ compiler (apt-get install g++)");
    Ok(())
}

/// True when the target kept its promises. What is worth keeping of the inputs goes to `found`.
fn fuzz(binary: &Path, target: &str, found: &Path, seconds: u32) -> anyhow::Result<bool> {
    fs::create_dir_all(found)?;
    let status = Command::new(binary)
        .arg(found)
        .arg(checkout().join("fuzz/corpus").join(target))
        .arg(format!("-artifact_prefix={}/", found.display()))
        .args([format!("-max_total_time={seconds}"), format!("-max_len={LONGEST}")])
        .args(["-timeout=10", "-rss_limit_mb=1024", "-print_final_stats=1"])
        .status()
        .with_context(|| format!("could not start {}", binary.display()))?;
    Ok(status.success())
}

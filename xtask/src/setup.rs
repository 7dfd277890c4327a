//! The step `setup`: what a bare Debian 12 with Rust and Go lacks. Each stage looks first and does only what is missing;
//! what it makes lies in the cache under a key of everything that went into it, so a changed version is a new entry.

mod basal;
mod images;
mod next;
mod packages;
mod parts;
mod store;
mod tools;

use std::fs::{self, File};

use anyhow::Context as _;
use clap::ValueEnum;

use crate::cache;

/// Its options.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Only these stages.
    #[arg(long, value_delimiter = ',')]
    only: Vec<Stage>,
    /// What the stage `basal` builds: `dev` shares its build tree with the tests, `release` is for the demo and benches.
    #[arg(long, value_enum, default_value_t = Profile::Dev)]
    profile: Profile,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Stage {
    /// Debian packages.
    Packages,
    /// The linker for BPF programs.
    Bpf,
    /// cargo-nextest and cargo-deny.
    Tools,
    /// Kubernetes, etcd, helm, CoreDNS and cnitool, from source.
    Parts,
    /// The images that test clusters need beside Basal's own.
    Images,
    /// Basal's own commands and image.
    Basal,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Profile {
    Dev,
    Release,
}

/// Runs it.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let cache = cache::dir()?;
    fs::create_dir_all(&cache).with_context(|| format!("creating {}", cache.display()))?;
    let lock = File::create(cache.join("setup.lock"))?;
    if lock.try_lock().is_err() {
        say("waiting for another setup to finish");
        lock.lock().context("locking the cache")?;
    }
    for stage in Stage::value_variants() {
        if !args.only.is_empty() && !args.only.contains(stage) {
            continue;
        }
        match stage {
            Stage::Packages => packages::run()?,
            Stage::Bpf => tools::bpf_linker()?,
            Stage::Tools => tools::wheels()?,
            Stage::Parts => parts::run()?,
            Stage::Images => images::run()?,
            Stage::Basal => basal::run(args.profile)?,
        }
    }
    Ok(())
}

/// A line of progress.
fn say(line: &str) {
    println!("setup: {line}");
}

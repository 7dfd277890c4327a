//! Where slow things are kept: build trees, tools, Kubernetes parts, images.

use std::{
    env,
    ffi::OsString,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, ensure};

/// `${BASAL_CACHE:-$HOME/.cache/basal}`.
pub(crate) fn dir() -> anyhow::Result<PathBuf> {
    if let Some(dir) = env::var_os("BASAL_CACHE").filter(|dir| !dir.is_empty()) {
        return Ok(PathBuf::from(dir));
    }
    let home = env::var_os("HOME").context("neither BASAL_CACHE nor HOME is set; set one of them")?;
    Ok(Path::new(&home).join(".cache/basal"))
}

/// The checkout that this xtask was built from.
pub(crate) fn checkout() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("."))
}

/// `PATH` with the cached tools and Kubernetes parts before everything else.
pub(crate) fn path() -> anyhow::Result<OsString> {
    let cache = dir()?;
    let before = [cache.join("tools/bin"), cache.join("parts/bin")];
    let old = env::var_os("PATH").unwrap_or_default();
    Ok(env::join_paths(before.into_iter().chain(env::split_paths(&old)))?)
}

/// A command in the checkout, with [`path`].
pub(crate) fn command(program: &str) -> anyhow::Result<Command> {
    let mut command = Command::new(program);
    command.current_dir(checkout()).env("PATH", path()?);
    // What `cargo run` tells of this crate looks to build scripts as if they were another crate's: they, and all that
    // depends on them, would be built anew by cargo from here and again by cargo without us.
    for (name, _) in env::vars_os() {
        if name.to_str().is_some_and(|name| name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_")) {
            command.env_remove(&name);
        }
    }
    Ok(command)
}

/// Runs a command in the checkout, its output on ours.
pub(crate) fn run(words: &[&str]) -> anyhow::Result<()> {
    let (program, args) = words.split_first().context("no command")?;
    let status = command(program)?
        .args(args)
        .status()
        .with_context(|| format!("could not start {program}; `make setup` installs what is missing"))?;
    ensure!(status.success(), "`{}` failed: {status}", words.join(" "));
    Ok(())
}

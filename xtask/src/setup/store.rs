//! Entries of the cache and the commands that make them.

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context as _, bail};
use sha2::{Digest as _, Sha256};

use super::say;
use crate::cache;

/// The first 12 hexadecimal digits of the SHA-256 of everything that goes into an entry.
#[derive(Default)]
pub(super) struct Key(Sha256);

impl Key {
    pub(super) fn text(mut self, text: &str) -> Self {
        // The length separates neighbours.
        self.0.update(u64::try_from(text.len()).unwrap_or(u64::MAX).to_le_bytes());
        self.0.update(text.as_bytes());
        self
    }

    /// The content of a file. Of what the cache holds under a key of its own, the path says as much.
    pub(super) fn file(self, path: &Path) -> anyhow::Result<Self> {
        let cache = cache::dir()?;
        let real = path.canonicalize().with_context(|| format!("looking for {}", path.display()))?;
        if real.starts_with(cache.join("parts")) || real.starts_with(cache.join("images")) {
            return Ok(self.text(&real.to_string_lossy()));
        }
        // In a build without optimisation our own SHA-256 takes seconds for a binary.
        let sum = Command::new("sha256sum").arg(&real).output().context("sha256sum does not start")?;
        anyhow::ensure!(sum.status.success(), "sha256sum failed on {}", real.display());
        let text = String::from_utf8_lossy(&sum.stdout).into_owned();
        Ok(self.text(text.split_whitespace().next().unwrap_or_default()))
    }

    pub(super) fn finish(self) -> String {
        hex(&self.0.finalize())[..12].to_owned()
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Runs `make` on a new folder, and gives it its name only when that succeeded, so that an entry that exists is whole.
/// Does nothing when it exists already.
pub(super) fn entry(dir: &Path, what: &str, make: impl FnOnce(&Path) -> anyhow::Result<()>) -> anyhow::Result<()> {
    if dir.exists() {
        say(&format!("{what}: cached"));
        return Ok(());
    }
    let mut name = dir.as_os_str().to_owned();
    name.push(".partial");
    let partial = PathBuf::from(name);
    if partial.exists() {
        fs::remove_dir_all(&partial).with_context(|| format!("removing {}", partial.display()))?;
    }
    fs::create_dir_all(&partial).with_context(|| format!("creating {}", partial.display()))?;
    say(&format!("{what}: building"));
    let started = Instant::now();
    make(&partial).with_context(|| format!("building {what}"))?;
    fs::rename(&partial, dir).with_context(|| format!("renaming to {}", dir.display()))?;
    say(&format!("{what}: built in {} s", started.elapsed().as_secs()));
    Ok(())
}

/// Makes `link` point to `target`, over an older link.
pub(super) fn link(target: &Path, link: &Path) -> anyhow::Result<()> {
    if let Some(parent) = link.parent() {
        fs::create_dir_all(parent)?;
    }
    let new = link.with_extension("new");
    if new.symlink_metadata().is_ok() {
        fs::remove_file(&new)?;
    }
    symlink(target, &new).with_context(|| format!("linking {}", new.display()))?;
    fs::rename(&new, link).with_context(|| format!("renaming to {}", link.display()))
}

/// Runs a command with its output in a log of the cache; a failure shows the end of it.
pub(super) fn quietly(command: &mut Command, log: &str) -> anyhow::Result<()> {
    const LINES: usize = 30;
    let logs = cache::dir()?.join("log");
    fs::create_dir_all(&logs)?;
    let path = logs.join(format!("{log}.log"));
    let file = File::create(&path).with_context(|| format!("creating {}", path.display()))?;
    let program = command.get_program().to_string_lossy().into_owned();
    let status = command
        .stdout(file.try_clone()?)
        .stderr(file)
        .status()
        .with_context(|| format!("could not start {program}; `cargo xtask setup --only packages` installs it"))?;
    if !status.success() {
        let bytes = fs::read(&path)?;
        let text = String::from_utf8_lossy(&bytes);
        let lines: Vec<&str> = text.lines().collect();
        let end = lines.get(lines.len().saturating_sub(LINES)..).unwrap_or_default().join("\n");
        bail!("{program} failed with {status}; {} ends with:\n{end}", path.display());
    }
    Ok(())
}

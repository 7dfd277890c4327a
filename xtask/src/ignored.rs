//! The step `ignored`: no test is skipped in silence, so none may carry `#[ignore]`.

use std::process::Command;

use anyhow::{bail, ensure};

use crate::cache;

/// Runs it.
pub(crate) fn run() -> anyhow::Result<()> {
    let output = Command::new("git")
        .args(["grep", "-nE", r"^\s*#\[ignore", "--", "*.rs"])
        .current_dir(cache::checkout())
        .output()?;
    // git grep exits with 1 when nothing matches.
    ensure!(output.status.code().is_some_and(|code| code < 2), "{}", String::from_utf8_lossy(&output.stderr));
    if !output.stdout.is_empty() {
        bail!("these tests are skipped in silence:\n{}", String::from_utf8_lossy(&output.stdout));
    }
    Ok(())
}

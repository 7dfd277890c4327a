//! A later version of Basal, for tests of upgrades: other programs, and another layout of one map.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};

use crate::cache;
use crate::ebpf;
use crate::edits::{Edit, copy, edited};

/// What is another one in it; the rest is this version's.
pub(super) const COMMANDS: [&str; 2] = ["basal-agent", "basal"];

/// Builds the commands in a copy of the checkout, and answers the folder that they are in. It shares the build tree `target`
/// with the checkout, which has to be built afterwards: both leave commands of the same names there.
pub(super) fn build(target: &Path) -> anyhow::Result<PathBuf> {
    let next = cache::dir()?.join("next");
    let (tree, bin) = (next.join("tree"), next.join("bin"));
    copy(&tree, edited(&edits()?)?)?;
    ebpf::build_in(&tree, false)?;
    let mut cargo = cache::command("cargo")?;
    cargo.arg("build").args(COMMANDS.iter().flat_map(|command| ["--bin", command]));
    cargo.current_dir(&tree).env("CARGO_TARGET_DIR", target);
    let built = cargo.status().context("could not start cargo")?;
    ensure!(built.success(), "the later version does not build; bring e2e/next/edits.yaml up to date");
    fs::create_dir_all(&bin).with_context(|| format!("creating {}", bin.display()))?;
    for command in COMMANDS {
        let from = target.join("debug").join(command);
        fs::copy(&from, bin.join(command)).with_context(|| format!("copying {}", from.display()))?;
    }
    Ok(bin)
}

fn edits() -> anyhow::Result<Vec<Edit>> {
    let path = cache::checkout().join("e2e/next/edits.yaml");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_saphyr::from_str(&text).with_context(|| format!("{} is no table of edits", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_edit_still_has_its_place() {
        for (path, text) in edited(&edits().unwrap()).unwrap() {
            assert_ne!(text, fs::read_to_string(cache::checkout().join(path)).unwrap());
        }
    }
}

//! The step `mutants`: breaks the code that ships on purpose, one place at a time, and looks which test notices.
//!
//! The table of edits is `sim/mutants/mutants.yaml`. They are made in a copy of the checkout; nothing else is touched.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, bail, ensure};
use serde::Deserialize;

use crate::cache;

/// Which mutants.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Only these, by name
    only: Vec<String>,
}

/// One place that is broken.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Mutant {
    name: String,
    /// The promise that is broken.
    breaks: String,
    /// Where, from the checkout's root.
    file: PathBuf,
    /// What stands there, exactly once.
    find: String,
    /// What stands there then.
    replace: String,
    /// Why no test can notice, where that is so.
    equivalent: Option<String>,
}

/// What came of one.
enum Fate {
    Killed { test: String, schedule: Option<String> },
    Survived,
}

/// The tests that are to notice, in the order in which they are asked.
const SUITES: [&str; 2] = [
    "package(basal-operator) & test(/^explore::/)",
    "(package(basal-operator) & not test(/^explore::/)) | package(basal-ipam) | package(basal-kvstore) & kind(lib) \
     | package(basal-kvstore) & not test(/^real/) | package(basal-sim) & not test(/^real/)",
];

const PACKAGES: [&str; 8] = ["-p", "basal-ipam", "-p", "basal-kvstore", "-p", "basal-operator", "-p", "basal-sim"];

fn table() -> anyhow::Result<Vec<Mutant>> {
    let path = cache::checkout().join("sim/mutants/mutants.yaml");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_saphyr::from_str(&text).with_context(|| format!("{} is no table of mutants", path.display()))
}

impl Mutant {
    /// The broken text of its file.
    fn apply(&self, tree: &Path) -> anyhow::Result<String> {
        let path = tree.join(&self.file);
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let places = text.matches(&self.find).count();
        ensure!(
            places == 1,
            "mutant {}: what it replaces stands {places} times in {}; bring it up to date",
            self.name,
            self.file.display()
        );
        Ok(text.replacen(&self.find, &self.replace, 1))
    }
}

/// Runs it.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let mut mutants = table()?;
    if let Some(unknown) = args.only.iter().find(|name| !mutants.iter().any(|mutant| mutant.name == **name)) {
        bail!("there is no mutant {unknown}");
    }
    mutants.retain(|mutant| args.only.is_empty() || args.only.contains(&mutant.name));
    let tree = cache::dir()?.join("mutants");
    copy(&tree)?;
    let mut rows = Vec::new();
    let mut survivors = Vec::new();
    for mutant in &mutants {
        println!("=== {}", mutant.name);
        let fate = try_one(&tree, mutant)?;
        rows.push(row(mutant, &fate));
        println!("{}", row(mutant, &fate));
        if matches!(fate, Fate::Survived) && mutant.equivalent.is_none() {
            survivors.push(mutant.name.as_str());
        }
    }
    println!("\n| mutant | what it breaks | noticed by | schedule |\n|---|---|---|---|\n{}", rows.join("\n"));
    ensure!(survivors.is_empty(), "no test noticed {}", survivors.join(", "));
    Ok(())
}

fn row(mutant: &Mutant, fate: &Fate) -> String {
    let Mutant { name, breaks, equivalent, .. } = mutant;
    let (by, schedule) = match fate {
        Fate::Killed { test, schedule } => {
            (format!("`{test}`"), schedule.as_ref().map(|schedule| format!("`{schedule}`")).unwrap_or_default())
        }
        Fate::Survived => {
            let why = equivalent.as_deref().unwrap_or("**nobody**");
            (format!("survives: {why}"), String::new())
        }
    };
    format!("| {name} | {breaks} | {by} | {schedule} |")
}

/// Copies what git knows of the checkout, writing only what differs, so that builds go on where they stopped.
fn copy(tree: &Path) -> anyhow::Result<()> {
    let listed = Command::new("git").args(["ls-files", "-z"]).current_dir(cache::checkout()).output()?;
    ensure!(listed.status.success(), "`git ls-files` failed; mutants are made in a copy of a git checkout");
    for name in String::from_utf8(listed.stdout)?.split('\0').filter(|name| !name.is_empty()) {
        let (from, to) = (cache::checkout().join(name), tree.join(name));
        let Ok(content) = fs::read(&from) else { continue };
        if fs::read(&to).ok().as_ref() != Some(&content) {
            fs::create_dir_all(to.parent().unwrap_or(tree))?;
            fs::write(&to, content)?;
        }
    }
    Ok(())
}

fn try_one(tree: &Path, mutant: &Mutant) -> anyhow::Result<Fate> {
    let path = tree.join(&mutant.file);
    let sound = fs::read_to_string(&path)?;
    fs::write(&path, mutant.apply(tree)?)?;
    let fate = SUITES.iter().map(|suite| ask(tree, mutant, suite)).find(|fate| !matches!(fate, Ok(Fate::Survived)));
    fs::write(&path, sound)?;
    fate.unwrap_or(Ok(Fate::Survived))
}

/// Runs some tests over the broken code.
fn ask(tree: &Path, mutant: &Mutant, suite: &str) -> anyhow::Result<Fate> {
    let ran = Command::new("cargo")
        .args(["nextest", "run", "--fail-fast", "--no-tests", "pass", "--color", "never"])
        .args(PACKAGES)
        .args(["-E", suite])
        .current_dir(tree)
        .env("PATH", cache::path()?)
        .output()
        .context("could not start cargo; `make setup` installs what is missing")?;
    if ran.status.success() {
        return Ok(Fate::Survived);
    }
    let said = format!("{}{}", String::from_utf8_lossy(&ran.stdout), String::from_utf8_lossy(&ran.stderr));
    let failed = said
        .lines()
        .map(str::trim_start)
        .find(|line| ["FAIL [", "TIMEOUT [", "SIGABRT ["].iter().any(|word| line.starts_with(word)));
    let Some(failed) = failed else {
        bail!("mutant {} does not build, or its tests do not run:\n{said}", mutant.name);
    };
    let test = failed.split_whitespace().next_back().unwrap_or(failed).to_owned();
    let schedule = said.lines().find_map(|line| line.trim().strip_prefix("replay with: make faults SCHEDULE='"));
    Ok(Fate::Killed { test, schedule: schedule.map(|text| text.trim_end_matches('\'').to_owned()) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_mutant_still_has_its_place() {
        let mutants = table().unwrap();
        assert!(mutants.len() >= 12);
        for mutant in &mutants {
            let broken = mutant.apply(cache::checkout()).unwrap();
            assert_ne!(broken, fs::read_to_string(cache::checkout().join(&mutant.file)).unwrap());
        }
    }
}

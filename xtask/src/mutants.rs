//! The step `mutants`: breaks the code that ships on purpose, one place at a time, and looks which test notices.
//!
//! The table of edits is `sim/mutants/mutants.yaml`. All of them are made in one copy of the checkout, which is built once; a
//! variable of the environment says which one is awake. Nothing else is touched.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, bail, ensure};
use serde::Deserialize;

use crate::{
    cache,
    edits::{Edit, copy, edited},
};

/// Which mutants.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Only these, by name
    only: Vec<String>,
}

/// The variable that wakes a mutant.
const VARIABLE: &str = "BASAL_MUTANT";

/// What stands in a replacement for the condition that its mutant is awake.
const CONDITION: &str = "MUTANT";

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
    /// What it makes of its place, where a variable decides whether it is awake.
    fn edit(&self) -> anyhow::Result<Edit> {
        let awake = format!("std::env::var_os({VARIABLE:?}).is_some_and(|name| name == {:?})", self.name);
        let broken = self.replace.replace(CONDITION, &awake);
        ensure!(broken != self.replace, "mutant {}: its replacement does not say {CONDITION}", self.name);
        let what = format!("mutant {}", self.name);
        Ok(Edit { what, file: self.file.clone(), find: self.find.clone(), replace: broken })
    }
}

/// The broken files of the checkout.
fn broken_files(mutants: &[Mutant]) -> anyhow::Result<BTreeMap<PathBuf, String>> {
    edited(&mutants.iter().map(Mutant::edit).collect::<anyhow::Result<Vec<_>>>()?)
}

/// Runs it.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let mut mutants = table()?;
    if let Some(unknown) = args.only.iter().find(|name| !mutants.iter().any(|mutant| mutant.name == **name)) {
        bail!("there is no mutant {unknown}");
    }
    mutants.retain(|mutant| args.only.is_empty() || args.only.contains(&mutant.name));
    let tree = cache::dir()?.join("mutants");
    copy(&tree, broken_files(&table()?)?)?;
    build(&tree)?;
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

/// Cargo over the tests of the copy. It has a build tree of its own: cargo takes two checkouts of one workspace for the same
/// and would mix what it built of them.
fn nextest(tree: &Path) -> anyhow::Result<Command> {
    let mut command = cache::command("cargo")?;
    command.args(["nextest", "run", "--color", "never"]).args(PACKAGES).current_dir(tree);
    command.env("CARGO_TARGET_DIR", tree.join("target"));
    Ok(command)
}

fn build(tree: &Path) -> anyhow::Result<()> {
    let built = nextest(tree)?.arg("--no-run").status().context("could not start cargo")?;
    ensure!(built.success(), "the mutants do not build; bring sim/mutants/mutants.yaml up to date");
    Ok(())
}

fn try_one(tree: &Path, mutant: &Mutant) -> anyhow::Result<Fate> {
    let fate = SUITES.iter().map(|suite| ask(tree, mutant, suite)).find(|fate| !matches!(fate, Ok(Fate::Survived)));
    fate.unwrap_or(Ok(Fate::Survived))
}

/// Runs some tests while a mutant is awake.
fn ask(tree: &Path, mutant: &Mutant, suite: &str) -> anyhow::Result<Fate> {
    let ran = nextest(tree)?
        .args(["--fail-fast", "--no-tests", "pass", "-E", suite])
        .env(VARIABLE, &mutant.name)
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
        bail!("the tests do not run while mutant {} is awake:\n{said}", mutant.name);
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
        for (path, broken) in broken_files(&mutants).unwrap() {
            assert_ne!(broken, fs::read_to_string(cache::checkout().join(path)).unwrap());
        }
    }
}

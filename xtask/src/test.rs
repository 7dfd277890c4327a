//! The step `test`: every check of the project, in rungs from cheap to dear, with the time that each took.
//!
//! Its last line is the sum over all test runners: `N passed, N failed, N skipped`.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    process::Stdio,
    time::Duration,
};

use anyhow::{Context as _, bail};

use crate::{cache, totals::Totals};

/// A group of checks with the time that it should stay within, warm, on two cores.
struct Rung {
    name: &'static str,
    budget: Duration,
    steps: &'static [Step],
    /// Without it the later rungs cannot run.
    needed: bool,
}

enum Step {
    /// Passes when it exits with 0.
    Check(&'static [&'static str]),
    /// Unit and integration tests that nextest runs; the arguments pick which.
    Nextest(&'static [&'static str]),
    /// Anything that ends with libtest's `test result:` lines.
    Libtest(&'static [&'static str]),
}

const fn minutes(n: u64) -> Duration {
    Duration::from_secs(n * 60)
}

/// Tests beside the code and tests without servers; the rest of the integration tests need real servers or the kernel.
const PURE: &str = "kind(lib) | kind(bin) | package(basal-ipam) | package(basal-fuzz) | (package(basal-sim) | package(basal-operator)) & not test(/^real/)";
const REAL: &str = "not (kind(lib) | kind(bin) | package(basal-ipam) | package(basal-fuzz) | (package(basal-sim) | package(basal-operator)) & not test(/^real/)) & not package(basal-e2e)";

const RUNGS: &[Rung] = &[
    Rung {
        name: "style",
        budget: minutes(1),
        needed: false,
        steps: &[
            Step::Check(&["cargo", "fmt", "--all", "--check"]),
            Step::Check(&["cargo", "xtask", "ignored"]),
            Step::Check(&["cargo", "xtask", "deps"]),
            Step::Check(&["cargo", "deny", "--log-level", "error", "check", "bans", "licenses", "sources"]),
        ],
    },
    Rung {
        name: "build and clippy",
        budget: minutes(3),
        needed: true,
        steps: &[
            Step::Check(&["cargo", "xtask", "ebpf"]),
            Step::Check(&["cargo", "clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]),
            Step::Check(&["cargo", "xtask", "crds", "--check"]),
            Step::Check(&["cargo", "nextest", "run", "--workspace", "--no-run"]),
            Step::Check(&["cargo", "xtask", "docs", "--check"]),
        ],
    },
    Rung {
        name: "pure and simulated",
        budget: minutes(2),
        needed: false,
        steps: &[Step::Nextest(&["-E", PURE]), Step::Libtest(&["cargo", "test", "--workspace", "--doc", "--quiet"])],
    },
    Rung { name: "real servers and kernel", budget: minutes(2), needed: false, steps: &[Step::Nextest(&["-E", REAL])] },
    Rung {
        name: "clusters",
        budget: minutes(5),
        needed: false,
        steps: &[Step::Libtest(&["cargo", "test", "--workspace", "--test", "cluster"])],
    },
];

/// Runs it.
pub(crate) fn run() -> anyhow::Result<()> {
    let mut totals = Totals::default();
    let mut report = Vec::new();
    let mut failures = Vec::new();
    for rung in RUNGS {
        println!("\n=== {} ===", rung.name);
        let started = std::time::Instant::now();
        let mut failed = false;
        for step in rung.steps {
            if let Err(error) = run_step(step, &mut totals) {
                eprintln!("{error:#}");
                failures.push(format!("{}: {error:#}", rung.name));
                failed = true;
            }
        }
        let took = started.elapsed();
        let overrun =
            if took > rung.budget { format!(", over its {} s", rung.budget.as_secs()) } else { String::new() };
        report.push(format!("{:<24} {:>5} s{overrun}", rung.name, took.as_secs()));
        if failed && rung.needed {
            break;
        }
    }
    println!("\n{}", report.join("\n"));
    for failure in &failures {
        println!("FAILED {failure}");
    }
    println!("{totals}");
    if !failures.is_empty() {
        bail!("{} checks failed", failures.len());
    }
    Ok(())
}

fn run_step(step: &Step, totals: &mut Totals) -> anyhow::Result<()> {
    match step {
        Step::Check(command) => cache::run(command),
        Step::Nextest(which) => {
            // nextest keeps its reports below the checkout, wherever the build tree is.
            let junit = cache::checkout().join("target/nextest/default/junit.xml");
            if junit.exists() {
                fs::remove_file(&junit)?;
            }
            let ran = cache::run(&[&["cargo", "nextest", "run", "--workspace", "--no-tests", "pass"], *which].concat());
            if junit.exists() {
                *totals += Totals::of_junit(&fs::read_to_string(&junit)?)?;
            }
            ran
        }
        Step::Libtest(command) => libtest(command, totals),
    }
}

/// Runs a command whose output stays visible, and reads its `test result:` lines.
fn libtest(command: &[&str], totals: &mut Totals) -> anyhow::Result<()> {
    let (program, args) = command.split_first().context("no command")?;
    let mut child = cache::command(program)?
        .args(args)
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("could not start {program}"))?;
    let output = child.stdout.take().context("no pipe to the tests' output")?;
    for line in BufReader::new(output).lines() {
        let line = line?;
        println!("{line}");
        *totals += Totals::of_libtest_line(&line);
    }
    let status = child.wait()?;
    anyhow::ensure!(status.success(), "`{}` failed: {status}", command.join(" "));
    Ok(())
}

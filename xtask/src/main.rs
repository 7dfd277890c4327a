//! Build and check steps that are more than one cargo command. `make help` lists the targets that call them.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a build tool talks to the terminal")]
#![expect(clippy::disallowed_methods, reason = "a build tool may read the clock")]

mod cache;
mod crds;
mod deps;
mod docs;
mod ebpf;
mod edits;
mod fuzz;
mod ignored;
mod mutants;
mod setup;
mod test;
mod totals;

use clap::{Parser, Subcommand};

/// Build and check steps of Basal.
#[derive(Parser)]
struct Args {
    #[command(subcommand)]
    step: Step,
}

#[derive(Subcommand)]
enum Step {
    /// Write the CustomResourceDefinitions as YAML, or check that the committed ones are current.
    Crds(crds::Args),
    /// Check that the dependencies between our crates point downwards only.
    Deps,
    /// Write the pages that are made from code and chart, or check that the committed ones are current.
    Docs(docs::Args),
    /// Build the BPF object.
    Ebpf(ebpf::Args),
    /// Look for inputs that break a reader, with libFuzzer.
    Fuzz(fuzz::Args),
    /// Check that no test carries `#[ignore]`.
    Ignored,
    /// Break the code that ships on purpose, one place at a time, and look which test notices.
    Mutants(mutants::Args),
    /// Install and build what a bare Debian 12 lacks: packages, BPF toolchain, Kubernetes parts, images.
    Setup(setup::Args),
    /// Run every check, in rungs from cheap to dear, and sum the totals.
    Test,
}

fn main() -> anyhow::Result<()> {
    match Args::parse().step {
        Step::Crds(args) => crds::run(&args),
        Step::Deps => deps::run(),
        Step::Docs(args) => docs::run(&args),
        Step::Ebpf(args) => ebpf::run(&args),
        Step::Fuzz(args) => fuzz::run(&args),
        Step::Ignored => ignored::run(),
        Step::Mutants(args) => mutants::run(&args),
        Step::Setup(args) => setup::run(&args),
        Step::Test => test::run(),
    }
}

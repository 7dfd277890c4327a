//! Build and check steps that are more than one cargo command. `make help` lists the targets that call them.

mod crds;
mod deps;
mod ebpf;
mod setup;

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
    /// Build the BPF object.
    Ebpf(ebpf::Args),
    /// Install and build what a bare Debian 12 lacks: packages, BPF toolchain, Kubernetes parts, images.
    Setup(setup::Args),
}

fn main() -> anyhow::Result<()> {
    match Args::parse().step {
        Step::Crds(args) => crds::run(&args),
        Step::Deps => deps::run(),
        Step::Ebpf(args) => ebpf::run(&args),
        Step::Setup(args) => setup::run(&args),
    }
}

//! `basal-e2e`: clusters on this machine, from the command line.

mod demo;

use std::io::{Write, stdout};
use std::process::{Command, ExitCode};

use anyhow::{Context, bail};
use basal_e2e::cluster::{self, BasalOptions, Cluster, ClusterName, Cni, Options};
use basal_e2e::parts;
use basal_e2e::say::say;
use clap::{Parser, Subcommand};

/// Real Kubernetes clusters on one machine: real control plane, and nodes that are namespaces.
#[derive(Parser)]
struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Start a cluster and wait until it is ready.
    Up {
        #[command(flatten)]
        name: Name,
        /// Number of nodes: n1, n2, …
        #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=16))]
        nodes: u16,
        /// Pod network.
        #[arg(long, value_enum, default_value = "basal")]
        cni: Cni,
        /// Values for the chart, as JSON, merged over the harness's own.
        #[arg(long, default_value = "null")]
        values: String,
    },
    /// Take a cluster down, also one whose start was cut short, and prove that nothing is left.
    Down {
        #[command(flatten)]
        name: Name,
        /// Every cluster of this machine.
        #[arg(long, conflicts_with = "name")]
        all: bool,
    },
    /// Print the shell assignments that point other tools at a cluster.
    Env {
        #[command(flatten)]
        name: Name,
    },
    /// Add a node to a running cluster.
    AddNode {
        #[command(flatten)]
        name: Name,
        /// The node: n1 to n16.
        node: String,
    },
    /// Kill a node and delete its Node object.
    RemoveNode {
        #[command(flatten)]
        name: Name,
        /// The node.
        node: String,
    },
    /// Show what Basal does in a running cluster: two pods, a ping, the packet on the wire.
    Demo {
        #[command(flatten)]
        name: Name,
    },
    /// Write logs, objects, etcd keys, maps and routes into a folder and print its path.
    Collect {
        #[command(flatten)]
        name: Name,
    },
    /// List the clusters of this machine.
    List,
    /// Run the end-to-end tests; arguments go to the test program.
    Test {
        /// For the test program, for example the names of scenarios.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
}

#[derive(clap::Args)]
struct Name {
    /// The cluster's name.
    #[arg(long, default_value = "demo")]
    name: ClusterName,
}

fn main() -> ExitCode {
    cluster::run_if_asked();
    match run(Args::parse().action) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(format!("basal-e2e: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn run(action: Action) -> anyhow::Result<()> {
    match action {
        Action::Up { name: Name { name }, nodes, cni, values } => {
            let values = serde_json::from_str(&values).context("--values is not JSON")?;
            let options = Options { name, nodes, cni, basal: BasalOptions { values } };
            cluster::up(&options).map(drop).map_err(|error| collected("the start", &options.name, error))
        }
        Action::Down { name: Name { name }, all } => {
            let names = if all { cluster::all_names()? } else { vec![name] };
            names.iter().try_for_each(cluster::down)
        }
        Action::Env { name: Name { name } } => print(&open(&name)?.environment()?),
        Action::AddNode { name: Name { name }, node } => open(&name)?.add_nodes(&[node]),
        Action::RemoveNode { name: Name { name }, node } => open(&name)?.remove_node(&node, true),
        Action::Demo { name: Name { name } } => {
            let cluster = open(&name)?;
            demo::run(&cluster).map_err(|error| collected("the demo", &name, error))
        }
        Action::Collect { name: Name { name } } => print(&format!("{}\n", open(&name)?.collect()?.display())),
        Action::List => cluster::all_names()?.iter().try_for_each(|name| print(&format!("{name}\n"))),
        Action::Test { arguments } => test(&arguments),
    }
}

/// A cluster that has to be up.
fn open(name: &ClusterName) -> anyhow::Result<Cluster> {
    Cluster::open(name)
        .with_context(|| format!("`basal-e2e up --name {name}` starts it (`make demo` the one called demo)"))
}

/// Adds where to look to the error of what failed; the cluster stays for whoever wants to look inside.
fn collected(what: &str, name: &ClusterName, error: anyhow::Error) -> anyhow::Error {
    match Cluster::open(name).and_then(|cluster| cluster.collect()) {
        Ok(folder) => error.context(format!(
            "{what} failed; logs, objects and maps are in {}; `basal-e2e down --name {name}` cleans up",
            folder.display()
        )),
        Err(nothing) => error.context(format!("{what} failed, and collecting its logs too: {nothing:#}")),
    }
}

fn test(arguments: &[String]) -> anyhow::Result<()> {
    let status = Command::new("cargo")
        .args(["test", "--workspace", "--test", "cluster", "--"])
        .args(arguments)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .env("BASAL_CACHE", parts::cache_dir()?)
        .status()
        .context("could not start cargo")?;
    if !status.success() {
        bail!("the end-to-end tests failed: {status}");
    }
    Ok(())
}

fn print(text: &str) -> anyhow::Result<()> {
    stdout().write_all(text.as_bytes()).context("writing to standard output")
}

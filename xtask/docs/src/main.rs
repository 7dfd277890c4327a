//! The parts of the documentation that the code knows best: every key of the daemons, every command of `basal`, every
//! value of the chart. `cargo xtask docs` runs it. It is a crate of its own because it is built from the daemons, and the
//! other steps have to build where the daemons do not yet.

mod chart;
mod commands;
mod keys;
mod page;

use std::{fs, path::Path};

use anyhow::{Context as _, bail};
use basal_agent::config::AgentConfig;
use basal_operator::config::OperatorConfig;
use basal_runtime::config::command;
use clap::Parser;

/// Write what of the documentation is made from code and chart, or check that it is current.
#[derive(Parser)]
struct Args {
    /// Change nothing; fail when a committed page is not what would be written.
    #[arg(long)]
    check: bool,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let read = |name: &str| fs::read_to_string(root.join(name)).with_context(|| format!("{name} cannot be read"));
    let tables = keys::tables(&command::<OperatorConfig>(), &command::<AgentConfig>())?;
    let reference = [
        ("keys of both daemons", tables.both),
        ("options of kvstore-opt", keys::kvstore_opt()),
        ("keys of the operator", tables.operator),
        ("keys of the agent", tables.agent),
        ("commands", commands::commands(&basal::command())),
        ("options of commands", commands::options(&basal::command())),
    ];
    let pages = [
        ("docs/reference.md", page::fill(&read("docs/reference.md")?, &reference).context("docs/reference.md")?),
        ("docs/chart.md", chart::page(&read("charts/basal/values.yaml")?, &read("charts/basal/values.schema.json")?)?),
    ];
    let mut stale = Vec::new();
    for (name, text) in pages {
        if read(name).is_ok_and(|committed| committed == text) {
            continue;
        }
        if args.check {
            stale.push(name);
        } else {
            fs::write(root.join(name), text).with_context(|| format!("{name} cannot be written"))?;
        }
    }
    if !stale.is_empty() {
        bail!("not current: {}; run `cargo xtask docs` and commit the pages", stale.join(", "));
    }
    Ok(())
}

//! The step `docs`: the pages that are made from code and chart. A crate of its own makes them, from the daemons, which do
//! not build before `setup` is through; xtask has to.

use crate::cache;

/// Its options.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Change nothing; fail when a committed page is not what would be written.
    #[arg(long)]
    check: bool,
}

/// Runs it.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    // --bin without --package, as in .cargo/config.toml: nothing is built twice.
    let mut command = vec!["cargo", "run", "--quiet", "--bin", "xtask-docs", "--"];
    command.extend(args.check.then_some("--check"));
    cache::run(&command)
}

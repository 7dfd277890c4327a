//! `basal ipam check`: whether the blocks of the whole cluster are as they should be, told from the stores alone.

mod config;
mod fix;
mod overdue;
mod read;
mod stores;
mod watch;

use std::{ffi::OsString, process::ExitCode};

use basal_ipam::check::{Finding, check, standing};
use clap::Subcommand;
use futures::future::LocalBoxFuture;

use self::{
    config::CheckConfig,
    stores::{Look, Stores},
};
use crate::{
    output::{Format, complain, print, print_json},
    table::{lay_out, row},
};

/// The exit code of a check that could not look.
const BLIND: u8 = 2;

/// What can be asked of the blocks of all nodes.
#[derive(Subcommand)]
pub(crate) enum Command {
    /// Compare ledger, objects and records of the whole cluster and report what does not fit
    #[command(disable_help_flag = true)]
    Check {
        /// The operator's keys, and more: see --help
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "KEYS")]
        arguments: Vec<OsString>,
    },
}

/// Runs it.
pub(crate) fn run(command: &Command, format: Format) -> ExitCode {
    let Command::Check { arguments } = command;
    let done = CheckConfig::load(arguments).and_then(|config| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let format = config.output.unwrap_or(format);
        let work: LocalBoxFuture<'_, anyhow::Result<bool>> =
            if config.action.watch { Box::pin(watch::run(&config, format)) } else { Box::pin(once(&config, format)) };
        runtime.block_on(work)
    });
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            complain(&format!("Error: {error:#}"));
            ExitCode::from(BLIND)
        }
    }
}

/// One check: two looks, where the first one finds anything. Answers whether nothing is wrong.
async fn once(config: &CheckConfig, format: Format) -> anyhow::Result<bool> {
    let stores = Stores::connect(config).await?;
    let (look, findings) = look_twice(&stores, config).await?;
    match format {
        Format::Json => print_json(&findings)?,
        Format::Text => print(&text(&findings, &look))?,
    };
    if config.action.fix || config.action.dry_run {
        mend(&stores, &look, &findings, config.action.dry_run).await;
    }
    Ok(findings.is_empty())
}

async fn look_twice(stores: &Stores, config: &CheckConfig) -> anyhow::Result<(Look, Vec<Finding>)> {
    let look = stores.look().await?;
    let first = check(&look.facts);
    if first.is_empty() {
        return Ok((look, first));
    }
    tokio::time::sleep(config.action.pause.0).await;
    let again = stores.look().await?;
    let findings = standing(&first, check(&again.facts));
    Ok((again, findings))
}

/// What is said of steps goes to standard error, beside the findings.
async fn mend(stores: &Stores, look: &Look, findings: &[Finding], dry_run: bool) {
    let plan = fix::plan(stores, look, findings);
    if plan.claims_left > 0 {
        complain(&format!(
            "{} findings are about claims: left alone, only the leader writes the ledger",
            plan.claims_left
        ));
    }
    for step in plan.steps {
        if dry_run {
            complain(&format!("would {step}"));
            continue;
        }
        complain(&step.to_string());
        match fix::carry_out(stores, step).await {
            Ok(()) => complain("  done"),
            Err(why) => complain(&format!("  not done: {why}")),
        }
    }
}

fn text(findings: &[Finding], look: &Look) -> String {
    if findings.is_empty() {
        let (nodes, cells) = (look.facts.nodes.len(), look.facts.cells.len());
        return format!("Nothing is wrong: {nodes} nodes, {cells} cells of the ledger.\n");
    }
    let mut rows = vec![row(["KIND", "WHAT", "WHO", "WHERE", "WHAT IS WRONG, AND WHAT TO DO"])];
    rows.extend(findings.iter().map(cells));
    lay_out(&rows).lines().flat_map(|line| [line.trim_end(), "\n"]).collect()
}

fn cells(finding: &Finding) -> Vec<String> {
    let Finding { kind, what, who, places, problem, advice, .. } = finding;
    row([kind.as_str(), what, &who.join(", "), &places.join("; "), &format!("{problem}; {advice}")])
}

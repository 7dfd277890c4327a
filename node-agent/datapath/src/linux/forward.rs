//! Our rules in the FORWARD chains of iptables, by its commands, one for each way in which it keeps rules.

use std::{collections::BTreeMap, fs, io};

use serde_json::Value;

use super::{command, fault::Fault};
use crate::{
    forward::{Backend, CHAIN, FEEDER, FORWARD, FilterTable, replacing},
    kernel::ReadError,
};

/// Seconds that a command waits for others that change legacy tables.
const PATIENCE: &str = "5";

/// What iptables says of a chain that there is not, or that nft was told to make otherwise than iptables does.
const NO_CHAIN: [&str; 2] = ["No chain/target/match by that name", "incompatible, use 'nft' tool"];

pub(super) async fn set(table: FilterTable, rules: &[String]) -> Result<(), Fault> {
    let feeders = match list(table, FORWARD).await.map_err(|error| Fault::at(table.command(), error))? {
        Some(found) => found.iter().filter(|rule| rule.ends_with(FEEDER)).count(),
        // The table is gone, and with it what it kept from pods.
        None => return Ok(()),
    };
    let program = format!("{}-restore", table.command());
    let input = replacing(rules, feeders);
    let done = command::run(&program, &["-w", PATIENCE, "--noflush"], &input).await;
    done.map(drop).map_err(|error| Fault::at(program, error))
}

/// What there is of ours in each table that has a chain FORWARD. Tables that there are none of are not looked at, for
/// looking makes them. `nft_tables` is what `nft -j list tables` printed.
pub(super) async fn read(nft_tables: &Value) -> Result<BTreeMap<FilterTable, Vec<String>>, ReadError> {
    let mut found = BTreeMap::new();
    for table in FilterTable::ALL {
        let failed = |error| ReadError::new(table.command(), error);
        let exists = match table.backend {
            Backend::Legacy => has_legacy(table.ipv6).map_err(failed)?,
            Backend::Nft => has_nft(nft_tables, table.ipv6),
        };
        if exists && let Some(mut rules) = list(table, FORWARD).await.map_err(failed)? {
            rules.retain(|rule| rule.ends_with(&format!("-j {CHAIN}")));
            rules.extend(list(table, CHAIN).await.map_err(failed)?.unwrap_or_default());
            found.insert(table, rules);
        }
    }
    Ok(found)
}

/// The rules of a chain; `None` when there is no such chain, or it is none that iptables can read.
async fn list(table: FilterTable, chain: &str) -> io::Result<Option<Vec<String>>> {
    match command::run(table.command(), &["-w", PATIENCE, "-S", chain], "").await {
        Ok(output) => {
            let text = String::from_utf8_lossy(&output).into_owned();
            Ok(Some(
                text.lines().filter(|line| line.starts_with("-A ")).map(|line| line.trim_end().to_owned()).collect(),
            ))
        }
        Err(error) if NO_CHAIN.iter().any(|text| error.to_string().contains(text)) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Whether somebody uses the legacy table, in the namespace of the calling thread.
fn has_legacy(ipv6: bool) -> io::Result<bool> {
    let path = format!("/proc/thread-self/net/{}", if ipv6 { "ip6_tables_names" } else { "ip_tables_names" });
    match fs::read_to_string(path) {
        Ok(names) => Ok(names.lines().any(|name| name == "filter")),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

fn has_nft(tables: &Value, ipv6: bool) -> bool {
    let family = if ipv6 { "ip6" } else { "ip" };
    let is_filter = |object: &Value| object["table"]["family"] == family && object["table"]["name"] == "filter";
    tables["nftables"].as_array().is_some_and(|objects| objects.iter().any(is_filter))
}

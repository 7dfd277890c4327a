//! nftables, by the `nft` command: the kernel's own interface has no stable form above netlink attributes.

use std::{collections::BTreeMap, io, path::Path, process::Stdio};

use serde_json::{Value, json};
use tokio::{io::AsyncWriteExt as _, process::Command};

use super::fault::Fault;
use crate::{
    kernel::ReadError,
    nft::{NftTable, TABLE},
};

pub(super) async fn set(nft: &Path, name: &str, table: &NftTable) -> Result<(), Fault> {
    run(nft, &["-j", "-f", "-"], &table.replacing(name)).await.map(drop).map_err(|error| Fault::path(nft, error))
}

pub(super) async fn delete(nft: &Path, name: &str) -> Result<(), Fault> {
    let table = json!({"family": "inet", "name": name});
    // Adding first makes the deletion succeed where there was none.
    let commands = json!({"nftables": [{"add": {"table": table}}, {"delete": {"table": table}}]});
    run(nft, &["-j", "-f", "-"], &commands).await.map(drop).map_err(|error| Fault::path(nft, error))
}

/// Our table, when there is one.
pub(super) async fn read(nft: &Path) -> Result<BTreeMap<String, NftTable>, ReadError> {
    let failed = |error| ReadError::new("nftables", error);
    let tables = list(nft, &["-j", "list", "tables", "inet"]).await.map_err(failed)?;
    let ours = |object: &Value| object["table"]["name"].as_str() == Some(TABLE);
    if !tables["nftables"].as_array().is_some_and(|objects| objects.iter().any(ours)) {
        return Ok(BTreeMap::new());
    }
    let listing = list(nft, &["-j", "list", "table", "inet", TABLE]).await.map_err(failed)?;
    Ok(BTreeMap::from([(TABLE.to_owned(), NftTable::from_listing(&listing))]))
}

async fn list(nft: &Path, args: &[&str]) -> io::Result<Value> {
    let output = run(nft, args, &Value::Null).await?;
    serde_json::from_slice(&output).map_err(io::Error::other)
}

/// Runs the command with `input` as JSON on its standard input; gives what it printed.
async fn run(nft: &Path, args: &[&str], input: &Value) -> io::Result<Vec<u8>> {
    let mut child = Command::new(nft)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()?;
    if let Some(mut stdin) = child.stdin.take()
        && !input.is_null()
    {
        stdin.write_all(input.to_string().as_bytes()).await?;
    }
    let output = child.wait_with_output().await?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    Err(io::Error::other(String::from_utf8_lossy(&output.stderr).trim().to_owned()))
}

//! nftables, by the `nft` command.

use std::{collections::BTreeMap, io, path::Path};

use serde_json::{Value, json};

use super::{command, fault::Fault};
use crate::{
    kernel::ReadError,
    nft::{NftTable, TABLE},
};

pub(super) async fn set(nft: &Path, name: &str, table: &NftTable) -> Result<(), Fault> {
    carry_out(nft, &table.replacing(name)).await
}

pub(super) async fn delete(nft: &Path, name: &str) -> Result<(), Fault> {
    let table = json!({"family": "inet", "name": name});
    // Adding first makes the deletion succeed where there was none.
    let commands = json!({"nftables": [{"add": {"table": table}}, {"delete": {"table": table}}]});
    carry_out(nft, &commands).await
}

async fn carry_out(nft: &Path, commands: &Value) -> Result<(), Fault> {
    let done = command::run(nft, &["-j", "-f", "-"], &commands.to_string()).await;
    done.map(drop).map_err(|error| Fault::path(nft, error))
}

/// The tables of all families, as nft lists them.
pub(super) async fn tables(nft: &Path) -> Result<Value, ReadError> {
    list(nft, &["-j", "list", "tables"]).await.map_err(|error| ReadError::new("nftables", error))
}

/// Our table, when there is one among the tables.
pub(super) async fn read(nft: &Path, tables: &Value) -> Result<BTreeMap<String, NftTable>, ReadError> {
    let failed = |error| ReadError::new("nftables", error);
    let ours = |object: &Value| object["table"]["family"] == "inet" && object["table"]["name"] == TABLE;
    if !tables["nftables"].as_array().is_some_and(|objects| objects.iter().any(ours)) {
        return Ok(BTreeMap::new());
    }
    let listing = list(nft, &["-j", "list", "table", "inet", TABLE]).await.map_err(failed)?;
    Ok(BTreeMap::from([(TABLE.to_owned(), NftTable::from_listing(&listing))]))
}

async fn list(nft: &Path, args: &[&str]) -> io::Result<Value> {
    let output = command::run(nft, args, "").await?;
    serde_json::from_slice(&output).map_err(io::Error::other)
}

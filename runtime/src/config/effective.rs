//! The configuration in force, for people.

use std::{collections::BTreeMap, fmt};

use clap::{ArgAction, ArgMatches, Command};
use serde::Serialize;
use serde_json::Value;

use super::layers::Layers;

/// Where a value comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Layer {
    /// The command line.
    Flag,
    /// A `CILIUM_…` variable.
    Environment,
    /// A file of the folder `config-dir`.
    ConfigDir,
}

impl fmt::Display for Layer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Flag => "flag",
            Self::Environment => "environment",
            Self::ConfigDir => "config-dir",
        })
    }
}

/// Every key of a daemon with the value in force, and where those that are no defaults come from. Basal takes secrets
/// from files only, so no secret is among the values.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Effective {
    /// Texts as they were written; lists as lists. A key without value is not set.
    pub values: BTreeMap<String, Value>,
    /// The layer of each value that is not a default.
    pub from: BTreeMap<String, Layer>,
}

impl Effective {
    pub(super) fn of(command: &Command, matches: &ArgMatches, layers: &Layers) -> Self {
        let mut effective = Self { values: BTreeMap::new(), from: BTreeMap::new() };
        for arg in command.get_arguments() {
            let (Some(key), id) = (arg.get_long(), arg.get_id().as_str()) else { continue };
            if matches!(arg.get_action(), ArgAction::Help | ArgAction::Version) {
                continue;
            }
            let texts = matches.get_raw(id).into_iter().flatten();
            let mut texts = texts.map(|value| Value::from(value.to_string_lossy().into_owned()));
            let value = match arg.get_action() {
                ArgAction::Append => Value::Array(texts.collect()),
                _ => texts.next().unwrap_or_default(),
            };
            effective.values.insert(key.to_owned(), value);
            if let Some((layer, _)) = layers.origin(key) {
                effective.from.insert(key.to_owned(), layer);
            }
        }
        effective
    }
}

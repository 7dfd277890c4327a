//! The keys of the daemons, from their clap structs.

use std::any::TypeId;

use anyhow::{Context as _, bail};
use basal_kvstore::config::KVSTORE_OPT_KEYS;
use basal_runtime::{
    admin::ListenAddress,
    config::{GoDuration, StringMap},
};
use clap::{Arg, ArgAction, Command, builder::StyledStr};

use crate::page::{code, table};

/// A key.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Key {
    name: String,
    form: String,
    default: String,
    meaning: String,
}

/// The tables of keys.
pub(crate) struct Tables {
    /// Keys that mean the same to both daemons.
    pub(crate) both: String,
    /// Keys that the operator alone has, or has with another meaning.
    pub(crate) operator: String,
    /// Keys that the agent alone has, or has with another meaning.
    pub(crate) agent: String,
}

/// Makes the tables.
pub(crate) fn tables(operator: &Command, agent: &Command) -> anyhow::Result<Tables> {
    let (operator, agent) = (keys(operator)?, keys(agent)?);
    let only = |these: &[Key], others: &[Key]| of_keys(these.iter().filter(|key| !others.contains(key)));
    Ok(Tables {
        both: of_keys(operator.iter().filter(|key| agent.contains(key))),
        operator: only(&operator, &agent),
        agent: only(&agent, &operator),
    })
}

/// The table of the options inside `kvstore-opt`.
pub(crate) fn kvstore_opt() -> String {
    let row =
        |option: &basal_kvstore::config::OptKey| [code(option.name), code(option.default), option.meaning.to_owned()];
    table(["option", "default", "meaning"], KVSTORE_OPT_KEYS.iter().map(row))
}

fn of_keys<'k>(keys: impl Iterator<Item = &'k Key>) -> String {
    let row = |key: &Key| [code(&key.name), key.form.clone(), key.default.clone(), key.meaning.clone()];
    table(["key", "written as", "default", "meaning"], keys.map(row))
}

/// The keys of a daemon, in the order of its help.
fn keys(command: &Command) -> anyhow::Result<Vec<Key>> {
    let is_key = |arg: &&Arg| !matches!(arg.get_action(), ArgAction::Help | ArgAction::Version);
    let key = |arg: &Arg| {
        let name = arg.get_long().with_context(|| format!("{} has no long name", arg.get_id()))?;
        let key = || -> anyhow::Result<Key> {
            Ok(Key { name: name.to_owned(), form: form(arg)?, default: default(arg), meaning: meaning(arg)? })
        };
        key().with_context(|| format!("{}: --{name}", command.get_name()))
    };
    command.get_arguments().filter(is_key).map(key).collect()
}

/// How a value is written.
fn form(arg: &Arg) -> anyhow::Result<String> {
    // The name that clap makes up says nothing.
    let made_up = arg.get_id().as_str().to_uppercase();
    if let Some([name]) = arg.get_value_names()
        && *name != *made_up
    {
        return Ok(code(name));
    }
    let parsed = arg.get_value_parser().type_id();
    let is = |of: TypeId| parsed == of;
    Ok(if is(TypeId::of::<bool>()) {
        "`true`, `false`".to_owned()
    } else if [TypeId::of::<u8>(), TypeId::of::<u16>(), TypeId::of::<u32>()].into_iter().any(is) {
        "number".to_owned()
    } else if is(TypeId::of::<GoDuration>()) {
        "duration".to_owned()
    } else if is(TypeId::of::<ListenAddress>()) {
        code("HOST:PORT")
    } else if is(TypeId::of::<StringMap>()) {
        code("KEY=VALUE,…")
    } else if is(TypeId::of::<String>()) {
        "text".to_owned()
    } else {
        bail!("how its value is written is not known: give it a value_name, or teach xtask/docs/src/keys.rs its type")
    })
}

/// What holds when nothing is said.
pub(crate) fn default(arg: &Arg) -> String {
    let defaults: Vec<_> = arg.get_default_values().iter().map(|value| value.to_string_lossy()).collect();
    match arg.get_env() {
        Some(variable) if defaults.is_empty() => format!("environment `{}`", variable.to_string_lossy()),
        _ => code(&defaults.join(",")),
    }
}

/// The whole help of a flag, on one line.
fn meaning(arg: &Arg) -> anyhow::Result<String> {
    arg.get_long_help().or(arg.get_help()).map(one_line).context("it has no help text")
}

/// A help text on one line; its paragraphs become sentences.
pub(crate) fn one_line(text: &StyledStr) -> String {
    let text = text.to_string();
    let paragraphs = text.split("\n\n").map(|paragraph| paragraph.split_whitespace().collect::<Vec<_>>().join(" "));
    paragraphs.collect::<Vec<_>>().join(". ")
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use basal_runtime::config::command;
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct One {
        /// The same for both
        #[arg(long, default_value = "1m")]
        same: GoDuration,
        /// Whether it is so
        ///
        /// Or not.
        #[arg(long)]
        own: bool,
    }

    #[derive(Parser)]
    struct Other {
        /// The same for both
        #[arg(long, default_value = "1m")]
        same: GoDuration,
        /// Something else
        #[arg(long, env = "OWN")]
        own: String,
    }

    #[derive(Parser)]
    struct Odd {
        /// A path without a name for what is written
        #[arg(long)]
        path: PathBuf,
    }

    #[test]
    fn keys_stand_where_they_belong() {
        let tables = tables(&command::<One>(), &command::<Other>()).unwrap();
        let rows = |table: String| table.lines().skip(2).map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(rows(tables.both), ["| `same` | duration | `1m` | The same for both |"]);
        assert_eq!(rows(tables.operator), ["| `own` | `true`, `false` | `false` | Whether it is so. Or not. |"]);
        assert_eq!(rows(tables.agent), ["| `own` | text | environment `OWN` | Something else |"]);
    }

    #[test]
    fn a_value_of_unknown_form_is_refused_by_name() {
        let error = keys(&command::<Odd>()).unwrap_err();
        assert!(format!("{error:#}").contains("--path: how its value is written"), "{error:#}");
    }
}

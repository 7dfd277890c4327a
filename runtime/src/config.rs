//! Configuration in layers, where a daemon's clap struct alone says which keys there are, their types, defaults and help.
//!
//! A key is the long name of a flag. Its value is, in this order: the flag; the environment variable `CILIUM_` + the
//! key in upper case with `_` for `-`; the file of that name in the folder `config-dir` (the mounted `cilium-config`
//! ConfigMap); the default. Values that come from files and variables go through the parsers of the flags, so a wrong
//! one is refused in the same words, with the place where it stands. An empty value is the same as none.
//!
//! Booleans are written as Go has them (`true`, `T`, `1`, …), and a flag without a value means true. Durations are Go's
//! (`15m`, `2m30s`): [`GoDuration`]. A `Vec` is separated by commas or white space. A map: [`StringMap`].

use std::{any::TypeId, ffi::OsString, path::PathBuf};

use clap::{
    Arg, ArgAction, ArgMatches, Command, CommandFactory, Parser,
    error::{ContextKind, ContextValue, ErrorKind},
    parser::ValueSource,
};

pub use effective::{Effective, Layer};
pub use layers::{ReadError, Sources};
pub use refusal::{REFUSALS, Refusal, Refused};
pub use values::{GoDuration, GoDurationError, StringMap, StringMapError, go_bool};

use layers::Layers;

mod effective;
mod layers;
mod refusal;
#[cfg(test)]
mod tests;
mod values;

/// The flag that names the folder with one file per key; flatten it into a daemon's flags.
#[derive(Debug, Clone, PartialEq, Eq, clap::Args)]
pub struct ConfigDirFlag {
    /// Folder with one file per key: the mounted cilium-config ConfigMap
    #[arg(long, value_name = "FOLDER")]
    pub config_dir: Option<PathBuf>,
}

/// A configuration and where it came from.
#[derive(Debug, Clone)]
pub struct Loaded<C> {
    /// The typed configuration.
    pub config: C,
    /// Every key with the value in force, for the log at start and for `/config`.
    pub effective: Effective,
    /// Keys in the folder or the environment that this daemon does not have. They are ignored, with one log line.
    pub unknown: Vec<String>,
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Help or version was asked for: print it and end well.
    #[error("{0}")]
    Help(clap::Error),
    /// A flag on the command line is wrong.
    #[error("{0}")]
    Flag(clap::Error),
    /// A value from a file or a variable is wrong.
    #[error("{key}: {value:?} ({from}) is not valid: {message}")]
    Value {
        /// The key.
        key: String,
        /// What was written.
        value: String,
        /// Where.
        from: String,
        /// What is wrong with it.
        message: String,
    },
    /// The folder cannot be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The configuration asks for something that Basal does not do and must not leave out in silence.
    #[error("{}", refusal::sentence(.0))]
    Refused(Vec<Refused>),
}

/// Reads the configuration of a daemon, and refuses what `refusals` name.
///
/// # Errors
/// See [`ConfigError`].
pub fn load<C: Parser>(sources: &Sources, refusals: &[Refusal]) -> Result<Loaded<C>, ConfigError> {
    let command = command::<C>();
    // What the command line alone says. Missing and wrong values are for the second reading.
    let flags = command.clone().ignore_errors(true).try_get_matches_from(&sources.arguments).map_err(of_flags)?;
    let layers = Layers::read(&command, &flags, sources)?;
    let refused = refusal::check(refusals, &layers);
    if !refused.is_empty() {
        return Err(ConfigError::Refused(refused));
    }
    let arguments = with_lower_layers(&command, &layers, &sources.arguments);
    let mut matches = command.clone().try_get_matches_from(arguments).map_err(|error| explain(error, &layers))?;
    let effective = Effective::of(&command, &matches, &layers);
    let config = C::from_arg_matches_mut(&mut matches).map_err(of_flags)?;
    Ok(Loaded { config, effective, unknown: layers.unknown(&command) })
}

/// The flags of a daemon, with the value forms that Cilium's keys have: what [`load`] reads.
#[must_use]
pub fn command<C: CommandFactory>() -> Command {
    C::command().mut_args(|arg| {
        let is_bool = arg.get_value_parser().type_id() == TypeId::of::<bool>();
        match arg.get_action() {
            // clap gives a plain `bool` its default only through the action that is replaced here.
            ArgAction::SetTrue if arg.get_default_values().is_empty() => switch(arg).default_value("false"),
            ArgAction::SetTrue => switch(arg),
            ArgAction::Set if is_bool => switch(arg),
            ArgAction::Append => arg.value_delimiter(','),
            _ => arg,
        }
    })
}

/// A flag that takes a boolean after `=`, or none.
fn switch(arg: Arg) -> Arg {
    let arg = arg.action(ArgAction::Set).num_args(0..=1).require_equals(true);
    arg.default_missing_value("true").value_parser(go_bool)
}

/// The command line with what the lower layers say of keys that it does not name itself.
fn with_lower_layers(command: &Command, layers: &Layers, arguments: &[OsString]) -> Vec<OsString> {
    let mut with: Vec<OsString> = arguments.first().cloned().into_iter().collect();
    for arg in command.get_arguments() {
        let Some(key) = arg.get_long() else { continue };
        let Some(value) = layers.below_flags(key) else { continue };
        with.extend(pieces(arg, value).map(|piece| format!("--{key}={piece}").into()));
    }
    with.extend(arguments.iter().skip(1).cloned());
    with
}

/// One value, or the items of a list.
fn pieces<'v>(arg: &Arg, value: &'v str) -> Box<dyn Iterator<Item = &'v str> + 'v> {
    match arg.get_action() {
        ArgAction::Append => {
            Box::new(value.split(|c: char| c == ',' || c.is_whitespace()).filter(|piece| !piece.is_empty()))
        }
        _ => Box::new(std::iter::once(value)),
    }
}

fn of_flags(error: clap::Error) -> ConfigError {
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => ConfigError::Help(error),
        _ => ConfigError::Flag(error),
    }
}

/// Says where a wrong value stands, when it came from a lower layer.
fn explain(error: clap::Error, layers: &Layers) -> ConfigError {
    // clap names the flag as `--key <VALUE>` or `--key[=<VALUE>]`.
    let key = match error.get(ContextKind::InvalidArg) {
        Some(ContextValue::String(flag)) => {
            flag.trim_start_matches('-').split([' ', '=', '[']).next().unwrap_or_default().to_owned()
        }
        _ => return of_flags(error),
    };
    let Some((layer, value)) = layers.origin(&key).filter(|(layer, _)| *layer != Layer::Flag) else {
        return of_flags(error);
    };
    let message = match std::error::Error::source(&error) {
        Some(cause) => cause.to_string(),
        None => "it is not one of the values that this key takes".to_owned(),
    };
    ConfigError::Value { from: layers.place(layer, &key), value: value.to_owned(), key, message }
}

/// Whether the command line itself gives the flag.
fn given(matches: &ArgMatches, arg: &Arg) -> bool {
    let id = arg.get_id().as_str();
    matches!(matches.try_contains_id(id), Ok(true)) && matches.value_source(id) == Some(ValueSource::CommandLine)
}

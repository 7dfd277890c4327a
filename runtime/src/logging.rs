//! Log lines on standard error, as text or as JSON.

use std::io::stderr;

use tracing_subscriber::{EnvFilter, filter::ParseError, util::SubscriberInitExt};

use crate::config::StringMap;

/// Log flags, by Cilium's names; flatten them into a daemon's flags.
#[derive(Debug, Clone, PartialEq, Eq, clap::Args)]
#[command(next_help_heading = "Logging")]
pub struct LogFlags {
    /// Log at level debug
    #[arg(long)]
    pub debug: bool,

    /// `format=text` (default), `text-ts`, `json` or `json-ts`; `level=error|warn|info|debug|trace`, or a filter such
    /// as `info,basal_operator=debug`
    #[arg(long, default_value = "", value_name = "KEY=VALUE,…")]
    pub log_opt: StringMap,
}

/// Logging cannot begin.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// `log-opt` asks for a format that there is not.
    #[error("log-opt: unknown format {0:?}; write text or json")]
    Format(String),
    /// `log-opt` names a level or filter that does not parse.
    #[error("log-opt: cannot read the level {level:?}: {cause}")]
    Level {
        /// What was written.
        level: String,
        /// What is wrong with it.
        #[source]
        cause: ParseError,
    },
    /// The process logs already.
    #[error("logging was begun twice")]
    Twice,
}

/// Begins to log. Lines carry the time in both formats.
///
/// # Errors
/// See [`LogError`].
pub fn init(flags: &LogFlags) -> Result<(), LogError> {
    let level = flags.log_opt.get("level").unwrap_or(if flags.debug { "debug" } else { "info" });
    let filter = EnvFilter::try_new(level).map_err(|cause| LogError::Level { level: level.to_owned(), cause })?;
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(stderr);
    let begun = match flags.log_opt.get("format").unwrap_or("text") {
        "text" | "text-ts" => builder.finish().try_init(),
        "json" | "json-ts" => builder.json().flatten_event(true).finish().try_init(),
        other => return Err(LogError::Format(other.to_owned())),
    };
    begun.map_err(|_already| LogError::Twice)
}

//! Printing: text or JSON, to a pipe that may be closed.

use std::{
    io::{self, Write as _},
    process::ExitCode,
    str::FromStr,
};

use serde::Serialize;

/// How to print.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    /// For people.
    Text,
    /// For programs.
    Json,
}

impl FromStr for Format {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            other => Err(format!("{other:?} is no output format; write text or json")),
        }
    }
}

/// Prints text. A reader that has seen enough (`| head`) is no error.
pub(crate) fn print(text: &str) -> anyhow::Result<ExitCode> {
    let written = io::stdout().write_all(text.as_bytes()).and_then(|()| io::stdout().flush());
    match written {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(ExitCode::SUCCESS),
    }
}

/// Prints a value as JSON.
pub(crate) fn print_json<T: Serialize>(value: &T) -> anyhow::Result<ExitCode> {
    print(&format!("{}\n", serde_json::to_string_pretty(value)?))
}

/// Prints to standard error. When that is closed too, the exit code remains.
pub(crate) fn complain(text: &str) {
    writeln!(io::stderr(), "{text}").unwrap_or_default();
}

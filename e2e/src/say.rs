//! Lines of progress on standard error.

use std::fmt::Display;
use std::io::{Write, stderr};

/// Writes one line; a closed standard error is no reason to stop.
pub fn say(line: impl Display) {
    drop(writeln!(stderr(), "{line}"));
}

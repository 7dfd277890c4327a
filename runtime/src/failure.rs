//! What an error of a controller's step tells beside its text: one closed reason, and when to try again.

use std::{error::Error, fmt::Write, time::Duration};

use crate::reason::Reason;

/// When to try again after an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Retry {
    /// When something that the key depends on changed: trying the same again gives the same.
    OnChange,
    /// After a pause that grows with each failure.
    Backoff,
    /// After this time: the other side said when.
    After(Duration),
    /// Not in this term: whoever sees this must stop and begin anew (lost leadership, another store).
    EndTerm,
}

/// The error of a step.
pub trait Failure: Error + Send + Sync + 'static {
    /// The closed word for condition, event and metric label.
    fn reason(&self) -> Reason;

    /// When to try again.
    fn retry(&self) -> Retry;
}

/// The texts of an error and of its sources, joined by `: `. A source whose text the error repeats is left out.
#[must_use]
pub fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            // Writing to a String cannot fail.
            write!(text, ": {cause_text}").unwrap_or_default();
        }
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("the node record was not written")]
    struct Outer(#[source] Inner);

    #[derive(Debug, thiserror::Error)]
    #[error("etcd said no: {0}")]
    struct Inner(#[source] std::num::ParseIntError);

    #[test]
    fn a_chain_names_every_cause_once() {
        let cause = "x".parse::<u8>().unwrap_err();
        assert_eq!(
            chain(&Outer(Inner(cause))),
            "the node record was not written: etcd said no: invalid digit found in string"
        );
    }
}

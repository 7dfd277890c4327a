//! What bytes from outside may do: every reader of Basal as a function that takes any bytes, and panics when a promise is
//! broken.
//!
//! Each promises that it answers or names what is wrong, and that what it took reads the same after it was written again.
//! The integration test of this crate gives them the corpus and mutations of it; the binaries of this crate, which are
//! built with the feature `libfuzzer` only, run the same functions under libFuzzer (`make fuzz`, docs/fuzzing.md).

mod cni;
mod config;
mod journal;
mod labels;
mod objects;
mod records;

/// A reader under test.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    /// Its name, that of its folder in `fuzz/corpus`.
    pub name: &'static str,
    /// Gives it an input.
    ///
    /// # Panics
    /// When a promise is broken.
    pub run: fn(&[u8]),
}

/// All of them.
pub const TARGETS: &[Target] = &[
    Target { name: "cni", run: cni::stdin },
    Target { name: "frame", run: cni::frame },
    Target { name: "journal", run: journal::record },
    Target { name: "keys", run: records::keys },
    Target { name: "records", run: records::values },
    Target { name: "cells", run: records::cell },
    Target { name: "objects", run: objects::object },
    Target { name: "config", run: config::keys },
    Target { name: "etcd-config", run: config::client_file },
    Target { name: "labels", run: labels::filter },
];

/// Gives a target an input; libFuzzer's entry.
///
/// # Panics
/// When there is no such target, or it breaks a promise.
pub fn run(name: &str, input: &[u8]) {
    let target = TARGETS.iter().find(|target| target.name == name);
    (target.expect("binaries are named after targets").run)(input);
}

/// An error must say something.
fn explained(error: &impl std::fmt::Display) {
    assert!(!error.to_string().is_empty(), "an error without a word");
}

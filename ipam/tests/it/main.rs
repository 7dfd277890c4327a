//! The allocator over the pure semantics of its ledger.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod allocator;
mod cast;
mod check;
mod halves;
mod model;
mod model_one_cell;
mod oracle;
mod pools;
mod rest;
mod sealing;
mod seen;
mod support;
mod transfer;
mod unknown;

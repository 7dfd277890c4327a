//! The Helm chart: what it refuses, whether its keys and paths are those of the daemons, and what a real API server makes
//! of what it renders.
#![expect(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

mod chart;
mod keys;
mod rights;
mod values;

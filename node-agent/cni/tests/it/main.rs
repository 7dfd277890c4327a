//! The plugin's executable against an agent's socket that the test serves.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod agent;
mod commands;
mod garbage;
mod waiting;

//! The operator in a simulated cluster: real controllers, model servers, virtual time.
#![expect(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

mod blind;
mod cluster;
mod crashes;
mod dangling;
mod drift;
mod endpoints;
mod gone;
mod input;
mod served;
mod without_etcd;

//! The operator in a simulated cluster: real controllers, model servers, virtual time.
#![expect(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

mod clocks;
mod cluster;
mod dangling;
mod denied;
mod drift;
mod endpoints;
mod explore;
mod gone;
mod hard_days;
mod input;
mod moving;
mod served;
mod weather;
mod without_etcd;

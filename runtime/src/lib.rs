//! What Basal's daemons share, without Kubernetes and without etcd: the [`env::Env`] port (wall clock,
//! randomness, tasks), the shape of a write's answer ([`outcome::Outcome`]), closed [`reason::Reason`]s,
//! the work queue, the five-step controller driver, readiness, configuration, and the admin and metrics server.
//!
//! It promises that nothing in it reads a clock or randomness other than through [`env::Env`] and `tokio::time`,
//! so that whatever is built on it runs the same twice under one seed.

pub mod admin;
pub mod backoff;
pub mod config;
pub mod controller;
pub mod env;
pub mod failure;
pub mod logging;
pub mod metrics;
pub mod outcome;
pub mod queue;
pub mod readiness;
pub mod reason;
pub mod shutdown;
pub mod sync;

//! Surroundings that are the same in every run.

use std::sync::Mutex;

use jiff::Timestamp;
use tokio::time::Instant;

use super::{Env, TaskFuture, TaskHandle, spawn_on_tokio};
use crate::sync::lock;

/// An [`Env`] that a seed determines: a wall clock that begins at a given time and goes with `tokio::time`, and a
/// reproducible row of random numbers (SplitMix64). On a paused current-thread runtime a program then runs the same
/// twice. For tests and the simulator.
#[derive(Debug)]
pub struct SeededEnv {
    random: Mutex<u64>,
    clock: Timestamp,
    started: Instant,
}

impl SeededEnv {
    /// Begins now, at the wall time 2026-01-01T00:00:00Z.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self { random: Mutex::new(seed), clock: Timestamp::constant(1_767_225_600, 0), started: Instant::now() }
    }
}

impl Env for SeededEnv {
    fn now(&self) -> Timestamp {
        self.clock.saturating_add(self.started.elapsed()).unwrap_or(Timestamp::MAX)
    }

    fn random_u64(&self) -> u64 {
        let mut state = lock(&self.random);
        *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = *state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn spawn(&self, name: &'static str, future: TaskFuture) -> TaskHandle {
        spawn_on_tokio(name, future)
    }
}

//! Draws from a seed.

use basal_runtime::env::{Env as _, SeededEnv};

/// A row of draws that a seed determines.
#[derive(Debug)]
pub(crate) struct Dice(SeededEnv);

impl Dice {
    pub(crate) fn new(seed: u64) -> Self {
        Self(SeededEnv::new(seed))
    }

    /// A number below `end`; 0 when that is 0.
    pub(crate) fn below(&self, end: u64) -> u64 {
        self.0.random_u64() % end.max(1)
    }

    /// Whether one of so many equal chances came.
    pub(crate) fn one_in(&self, chances: u64) -> bool {
        self.below(chances) == 0
    }

    /// One of some values; `None` when there is none.
    pub(crate) fn pick<'a, T>(&self, values: &'a [T]) -> Option<&'a T> {
        let place = self.below(values.len() as u64);
        values.get(usize::try_from(place).unwrap_or_default())
    }
}
